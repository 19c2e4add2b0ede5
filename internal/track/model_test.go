// SPDX-License-Identifier: Apache-2.0

package track

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// The model is a kernel of a few connections whose whole history is known from
// the start. The tracker hears of it what a lossy ring buffer and snapshots
// tell, and must never say more than is true.

// A phase is what a connection is from a moment on.
type phase struct {
	from     events.Time
	state    events.State // FinWait2, TimeWait, or Close: gone
	stage    events.Stage // of FinWait2
	deadline events.Time  // of the timer that ends the phase, as the kernel shows it
}

// A history is the truth about a connection.
type history struct {
	cookie uint64
	timers events.Timers
	phases []phase // the first is its entry into FIN_WAIT2
	end    events.End
	ended  events.Time
	sent   []events.Event // the records of it
	stamps bool           // the kernel has entry stamps
	unsent bool           // its handover is not sent, and known to the kernel side
	pid    uint32

	// What became of it on the way to the tracker.
	lost      int // records
	lastPlace int // records delivered or lost
	shown     bool
	closed    bool // the tracker has said so
	overdue   bool // likewise
}

func (h *history) at(t events.Time) phase {
	p := phase{state: events.Close}
	for _, next := range h.phases {
		if next.from <= t {
			p = next
		}
	}
	return p
}

func (h *history) entered() events.Time { return h.phases[0].from }

// stageTimes are the parts of its FIN_WAIT2.
func (h *history) stageTimes() (d [events.Minisock + 1]time.Duration) {
	for i, p := range h.phases {
		if p.state == events.FinWait2 {
			until := h.ended
			if i+1 < len(h.phases) {
				until = h.phases[i+1].from
			}
			d[p.stage] += until.Sub(p.from)
		}
	}
	return d
}

// handover is how long after FIN_WAIT2's entry, or its close, the minisock is made.
const handover = 5 * time.Microsecond

func (h *history) record(at events.Time, from, to events.State, change func(*events.Event)) {
	ev := events.Event{
		Time: at, Cookie: h.cookie, Netns: 1, Timers: h.timers, Old: from, New: to, SndShut: true,
		Flow: events.Flow{
			Local:  events.EndpointFrom(netip.MustParseAddrPort("192.0.2.1:80")),
			Remote: events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), uint16(h.cookie))),
		},
	}
	if change != nil {
		change(&ev)
	}
	h.sent = append(h.sent, ev)
}

func process(pid uint32) events.Process {
	return events.Process{PID: pid, Comm: [16]byte{'w', 'e', 'b'}}
}

// span draws a duration: rapid alone prefers the small, so that most are even.
func span(t *rapid.T, name string, least, most time.Duration) time.Duration {
	if rapid.IntRange(0, 3).Draw(t, name+" near the edge") == 0 {
		return time.Duration(rapid.Int64Range(int64(least), int64(most)).Draw(t, name))
	}
	seed := rapid.Uint64().Draw(t, name+" seed")
	return least + time.Duration(rand.New(rand.NewPCG(seed, 0)).Int64N(int64(most-least)+1))
}

// draw makes up the history of a connection that enters at a time.
func draw(t *rapid.T, cookie uint64, entry events.Time, stamps bool) *history {
	seconds := func(name string, values ...float64) time.Duration {
		return time.Duration(rapid.SampledFrom(values).Draw(t, name) * float64(time.Second))
	}
	h := &history{cookie: cookie, stamps: stamps, pid: uint32(cookie), timers: events.Timers{
		FinTimeout: seconds("fin timeout", 5, 60, 61, 65, 90),
		RTO:        200 * time.Millisecond,
	}}
	// A minisock does not show TCP_LINGER2. Found without a stamp, its timer is
	// taken for that of tcp_fin_timeout; with one, a longer timer's slack is not
	// known; and twice 90 − 60 s looks like 60.
	switch {
	case stamps && (h.timers.FinTimeout == 60*time.Second || h.timers.FinTimeout == 90*time.Second):
		h.timers.Linger2 = seconds("linger2", 0, 0, 3, 100, -0.004)
	case stamps:
		h.timers.Linger2 = seconds("linger2", 0, 0, 3, -0.004)
	}
	finTime, lingers := limits.FinTime(h.timers), h.timers.Linger2 >= 0
	above60 := finTime > limits.TimeWaitLen
	slack := func(d time.Duration) time.Duration {
		return span(t, "timer late", 0, d/8)
	}
	// What the peer, or the administrator, does; and when, if it lasts so long.
	const silent, fin, rst, destroy = 0, 1, 2, 3
	act := rapid.IntRange(silent, destroy).Draw(t, "act")
	acts := entry.Add(span(t, "acts", time.Millisecond, 100*time.Second))
	var closes events.Time
	held := rapid.Bool().Draw(t, "held")
	if held {
		closes = entry.Add(span(t, "closes", time.Millisecond, 150*time.Second))
	}

	// acted ends it by what the peer does before `until`.
	acted := func(until events.Time, stage events.Stage) bool {
		if act == silent || acts >= until {
			return false
		}
		h.ended = acts
		dead := stage != events.Held
		full := stage != events.Minisock
		send := func(change func(*events.Event)) {
			if full {
				h.record(acts, events.FinWait2, events.Close, func(ev *events.Event) {
					ev.Dead, ev.RcvShut = dead, dead
					change(ev)
				})
			}
		}
		after := phase{from: acts, state: events.Close}
		switch act {
		case fin:
			h.end = events.PeerFIN
			send(func(ev *events.Event) { ev.Done, ev.RcvShut = true, true })
			after = phase{from: acts, state: events.TimeWait, deadline: acts.Add(limits.TimeWaitLen)}
		case rst:
			h.end = events.Reset
			if stage == events.Held {
				h.end = events.PeerReset
			}
			send(func(ev *events.Event) { ev.Err = uint16(syscall.ECONNRESET) })
		case destroy:
			h.end = events.Destroyed
			if !full {
				h.end = events.Reset // Nothing tells them apart.
			}
			send(func(ev *events.Event) { ev.Err = uint16(syscall.ECONNABORTED) })
		}
		h.phases = append(h.phases, after)
		if after.state == events.TimeWait {
			h.phases = append(h.phases, phase{from: after.deadline, state: events.Close})
		}
		return true
	}

	at := entry
	if held {
		h.phases = []phase{{from: entry, state: events.FinWait2, stage: events.Held}}
		h.record(entry, events.FinWait1, events.FinWait2, func(ev *events.Event) { ev.Process = process(h.pid) })
		if acted(closes, events.Held) {
			return h
		}
		at = closes
		if rapid.IntRange(0, 9).Draw(t, "unread") == 0 {
			h.end, h.ended = events.LocalReset, at
			h.record(at, events.FinWait2, events.Close, func(ev *events.Event) { ev.RcvShut = true })
			h.phases = append(h.phases, phase{from: at, state: events.Close})
			return h
		}
		h.record(at, events.FinWait2, events.FinWait2, func(ev *events.Event) { ev.Process = process(h.pid) })
	}
	noted := func(ev *events.Event) { // by the kernel side, until it sends the entry
		ev.Dead, ev.RcvShut = true, true
		if !held && (!above60 || !lingers) {
			ev.Process = process(h.pid)
		}
	}
	if !lingers {
		at = at.Add(handover)
		h.end, h.ended = events.LocalReset, at
		if !held {
			h.phases = []phase{{from: at, state: events.Close}}
		} else {
			h.phases = append(h.phases, phase{from: at, state: events.Close})
		}
		h.record(at, events.FinWait2, events.Close, noted)
		return h
	}
	miniLife := finTime
	if above60 {
		miniLife -= limits.TimeWaitLen
		timer := at.Add(miniLife)
		h.phases = append(h.phases, phase{from: at, state: events.FinWait2, stage: events.Orphaned, deadline: timer})
		if !held {
			h.record(at, events.FinWait1, events.FinWait2, func(ev *events.Event) {
				ev.Dead, ev.RcvShut, ev.Process = true, true, process(h.pid)
			})
		}
		fires := timer.Add(slack(miniLife))
		if acted(fires, events.Orphaned) {
			return h
		}
		at = fires
	} else if !held || !acted(at.Add(handover), events.Orphaned) {
		at = at.Add(handover)
	} else {
		return h
	}
	h.record(at, events.FinWait2, events.Close, noted)
	h.unsent = !held && !above60 && at > boot && rapid.IntRange(0, 2).Draw(t, "unsent") == 0
	timer := at.Add(miniLife)
	h.phases = append(h.phases, phase{from: at, state: events.FinWait2, stage: events.Minisock, deadline: timer})
	fires := timer.Add(slack(miniLife))
	if acted(fires, events.Minisock) {
		return h
	}
	h.end, h.ended = events.KernelTimeout, fires
	h.phases = append(h.phases, phase{from: fires, state: events.Close})
	return h
}

// row is what the iterator shows of it at a time; ok is false for nothing.
func (h *history) row(at events.Time) (s events.Socket, ok bool) {
	p := h.at(at)
	if p.state == events.Close {
		return s, false
	}
	s = events.Socket{
		Time: at, Cookie: h.cookie, Netns: 1, Flow: h.sent[0].Flow, State: p.state, Stage: p.stage,
		Timers: h.timers, Entry: -1,
	}
	milliseconds := func(d time.Duration) time.Duration { return d.Truncate(time.Millisecond) }
	switch {
	case p.state == events.TimeWait || p.stage == events.Minisock:
		s.Stage = events.Minisock
		if h.unsent && p.state == events.FinWait2 {
			s.Handover, s.Process = p.from, process(h.pid)
		} else {
			s.Timers.Linger2, s.Timers.RTO = 0, 0
		}
		if h.stamps {
			// In milliseconds, cut: of the clock, and of the stamp. The peer
			// sends timestamps where its cookie is odd.
			stamp := h.entered()
			if p.state == events.TimeWait && (h.cookie%2 == 1 || h.at(p.from-1).stage != events.Minisock) {
				stamp = p.from
			}
			s.Entry = milliseconds(time.Duration(at)) - milliseconds(time.Duration(stamp))
		}
	default:
		s.LastAck = jiffies(at.Sub(h.entered()))
		s.Inode = h.cookie
	}
	if s.HasTimer = p.deadline != 0; s.HasTimer {
		// The timer is set in whole jiffies, and read in them.
		s.Timer = time.Duration(jiffy) * (time.Duration(p.deadline)/jiffy - time.Duration(at)/jiffy)
	}
	return s, true
}

func jiffies(d time.Duration) time.Duration { return d / jiffy * jiffy }

// A run is one property check: the truth, and the tracker that hears of it.
type run struct {
	t       *rapid.T
	tracker *Tracker
	conns   []*history
	byID    map[uint64]*history
	now     events.Time
	loss    int // of a hundred records
	shuffle *rand.Rand
}

func TestTrackerAgainstModel(t *testing.T) {
	for range 30 { // A hundred worlds each, unless -rapid.checks says otherwise.
		rapid.Check(t, againstModel)
	}
}

func againstModel(t *rapid.T) {
	r := &run{t: t, tracker: New(limits.Rules{}, 1000, nil), byID: map[uint64]*history{}, now: boot}
	r.loss = rapid.SampledFrom([]int{0, 0, 10, 50, 90}).Draw(t, "loss")
	r.shuffle = rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	stamps := rapid.Bool().Draw(t, "stamps")
	for n := range rapid.IntRange(1, 12).Draw(t, "connections") {
		entry := boot.Add(span(t, "entry", -100*time.Second, 100*time.Second))
		h := draw(t, uint64(n+1), entry, stamps)
		r.conns = append(r.conns, h)
		r.byID[h.cookie] = h
	}
	// What was there before nobody has told us.
	for _, h := range r.conns {
		for h.lastPlace < len(h.sent) && h.sent[h.lastPlace].Time <= boot {
			h.lastPlace++
			h.lost++
		}
	}
	r.snapshot()
	for range rapid.IntRange(1, 30).Draw(t, "steps") {
		r.advanceTo(r.now.Add(span(t, "step", 0, 20*time.Second)))
		r.forget()
		switch rapid.IntRange(0, 3).Draw(t, "do") {
		case 0, 1:
			r.snapshot()
		case 2:
			r.check(r.tracker.Advance(r.now, trusting))
			r.alerted()
		}
		r.invariants()
	}
	// All of them are gone in the end, and a look shows it.
	r.advanceTo(boot.Add(20 * time.Minute))
	r.check(r.tracker.Advance(r.now, trusting))
	r.snapshot()
	r.invariants()
	if n := r.tracker.Len(); n != 0 {
		t.Fatalf("%d connections in the table of an empty world", n)
	}
	if at, ok := r.tracker.Next(); ok {
		t.Fatalf("an empty table waits for %v", at)
	}
	for stage := range events.Minisock + 1 {
		if n := r.tracker.Count(stage); n != 0 {
			t.Fatalf("%d connections of an empty table are %v", n, stage)
		}
	}
}

// advanceTo lets the time pass: the records of it come in order, but for those
// that are lost; some wake-ups are before, some after.
func (r *run) advanceTo(until events.Time) {
	var due []*events.Event
	for _, h := range r.conns {
		for ; h.lastPlace < len(h.sent) && h.sent[h.lastPlace].Time <= until; h.lastPlace++ {
			switch {
			case h.unsent:
				continue
			case r.shuffle.IntN(100) < r.loss:
				h.lost++
				continue
			}
			due = append(due, &h.sent[h.lastPlace])
		}
	}
	slices.SortStableFunc(due, func(a, b *events.Event) int { return cmp.Compare(a.Time, b.Time) })
	for _, ev := range due {
		r.now = ev.Time
		if r.shuffle.IntN(4) == 0 {
			r.check(r.tracker.Advance(r.now, trusting))
		}
		r.check(r.tracker.Apply(ev))
		if ev.New == events.FinWait2 && r.shuffle.IntN(10) == 0 {
			r.check(r.tracker.Apply(ev)) // No harm in hearing it twice.
		}
	}
	r.now = until
}

// forget has the kernel side need the room of what it has not sent for others.
func (r *run) forget() {
	for _, h := range r.conns {
		if h.unsent && h.phases[0].from <= r.now && r.shuffle.IntN(10) == 0 {
			h.unsent = false
			h.lost++
		}
	}
}

// snapshot walks the sockets, in batches between which the world goes on, and
// finds some of them twice.
func (r *run) snapshot() {
	r.tracker.BeginSnapshot(r.now)
	began := r.now
	order := slices.Clone(r.conns)
	r.shuffle.Shuffle(len(order), func(a, b int) { order[a], order[b] = order[b], order[a] })
	for batch := range slices.Chunk(order, 3) {
		var rows []events.Socket
		for _, h := range batch {
			for range 1 + r.shuffle.IntN(2) {
				if row, ok := h.row(r.now); ok {
					rows = append(rows, row)
				}
			}
		}
		// What was sent before the rows were read has been applied; so is what
		// comes until they are looked at.
		r.advanceTo(r.now.Add(time.Duration(r.shuffle.IntN(int(2 * time.Second)))))
		r.check(r.tracker.Observe(rows))
	}
	cov := events.Coverage{Begin: began, End: r.now, Netns: map[uint32]events.NetnsCounters{1: {}}}
	nobody := func(uint64) events.Process { return events.Process{} }
	for said := r.tracker.Own(nobody); len(said) > 0; said = r.tracker.Own(nobody) {
		r.check(said)
	}
	r.check(r.tracker.EndSnapshot(cov, func(uint32, events.Flow) bool { return false }, nil))
	// What was there throughout is in the table, and what was gone before is not.
	for _, h := range r.conns {
		c, ok := r.tracker.Get(h.cookie, r.now)
		first, last := h.at(began), h.at(r.now)
		switch {
		case first.state == events.FinWait2 && last.state == events.FinWait2:
			if !ok {
				r.t.Fatalf("cookie %d was in FIN_WAIT2 all through the snapshot, and is not in the table", h.cookie)
			}
			if first.stage == last.stage && c.Stage != last.stage {
				r.t.Fatalf("cookie %d is %v, and %v in the table", h.cookie, last.stage, c.Stage)
			}
		case first.state != events.FinWait2 && began >= h.entered():
			if ok {
				r.t.Fatalf("cookie %d had left before the snapshot, and is in the table", h.cookie)
			}
		}
	}
}

// alerted says whether each held connection past its limit has been announced,
// a tick or two after. It is called after Advance.
func (r *run) alerted() {
	for _, h := range r.conns {
		due := h.entered().Add(h.timers.FinTimeout + Grace + 2<<tickBits)
		if h.lost == 0 && !h.overdue && h.at(r.now).stage == events.Held && due <= r.now {
			r.t.Fatalf("at %v not overdue:\n%s", r.now.Sub(boot), h)
		}
	}
}

func (r *run) invariants() {
	c := r.tracker.Counters()
	if c.Entered != c.Left+uint64(r.tracker.Len()) {
		r.t.Fatalf("entered %d, left %d, there %d", c.Entered, c.Left, r.tracker.Len())
	}
	if c.Shed != 0 {
		r.t.Fatalf("shed %d", c.Shed)
	}
	n := 0
	r.tracker.All(r.now, func(c *Conn) {
		n++
		r.honest(c, r.now)
	})
	if n != r.tracker.Len() {
		r.t.Fatalf("All showed %d of %d", n, r.tracker.Len())
	}
	if at, ok := r.tracker.Next(); ok {
		r.tracker.slab.each(func(_ index, conn *conn) {
			if conn.timed && at > max(conn.due.Add(1<<tickBits), r.now) {
				r.t.Fatalf("Next is %v after a deadline", at.Sub(conn.due))
			}
		})
	}
}

// near is how exact the times of seeded and reconciled connections are: what a
// stamp and a timer may differ by and still mean the same, and a reading of each.
const near = 3*jiffy + 6*time.Millisecond

func about(a, b time.Duration) bool { return (a - b).Abs() <= near }

// check compares notices with the truth.
func (r *run) check(notices []Notice) {
	for i := range notices {
		n := &notices[i]
		c := &n.Conn
		h := r.byID[c.Cookie]
		if h == nil {
			r.t.Fatalf("a notice of nobody: %s", describe(c))
		}
		if h.closed {
			r.t.Fatalf("%v after it closed: %s", n.Kind, describe(c))
		}
		if h.shown == (n.Kind == Opened) {
			r.t.Fatalf("%v out of place: %s", n.Kind, describe(c))
		}
		h.shown = true
		r.honest(c, n.Time)
		switch n.Kind {
		case Overdue:
			r.overdue(h, n)
			if h.overdue {
				r.t.Fatalf("overdue twice: %s", describe(c))
			}
			h.overdue = true
		case Recovered:
			if !h.overdue {
				r.t.Fatalf("recovered without being overdue: %s", describe(c))
			}
			h.overdue = false
		case Closed:
			h.closed = true
			r.closed(h, n)
		}
		recovers := i+1 < len(notices) && notices[i+1].Kind == Recovered && notices[i+1].Conn.Cookie == c.Cookie
		if c.Overdue != (h.overdue && !recovers) {
			r.t.Fatalf("%v, overdue %v where %v was announced: %s", n.Kind, c.Overdue, h.overdue, describe(c))
		}
	}
}

// honest says whether what is claimed of a connection is true.
func (r *run) honest(c *Conn, at events.Time) {
	h := r.byID[c.Cookie]
	claimed, entered := c.Since.Sub(boot), h.entered().Sub(boot)
	if c.SinceExact && !about(claimed, entered) {
		r.t.Fatalf("entered at %v, and the claim is %v exactly: %s\n%s", entered, claimed, describe(c), h)
	}
	if claimed < entered-near {
		r.t.Fatalf("entered at %v, and the bound is earlier: %s\n%s", entered, describe(c), h)
	}
	if c.StagesKnown && (c.Held+c.Orphaned+c.Minisock-c.Duration).Abs() > 0 {
		r.t.Fatalf("the parts are not the sum: %s", describe(c))
	}
	if c.StagesKnown && c.SinceExact && h.ended >= at {
		var want [events.Minisock + 1]time.Duration
		for i, p := range h.phases {
			if p.state == events.FinWait2 && p.from <= at {
				until := at
				if i+1 < len(h.phases) {
					until = min(until, h.phases[i+1].from)
				}
				want[p.stage] += until.Sub(p.from)
			}
		}
		// Stages move on when a record or a look shows it.
		if c.Stage == h.at(at).stage &&
			!(about(c.Held, want[events.Held]) && about(c.Orphaned, want[events.Orphaned]) && about(c.Minisock, want[events.Minisock])) {
			r.t.Fatalf("at %v the stages are %v: %s\n%s", at.Sub(boot), want, describe(c), h)
		}
	}
}

// overdue says whether a connection is truly past its limit and the grace. One
// whose record of leaving was lost may be gone.
func (r *run) overdue(h *history, n *Notice) {
	p := h.at(n.Time.Add(-handover - 1)) // its next record may be due this very moment
	if h.lost == 0 && (p.state != events.FinWait2 || p.stage != n.Conn.Stage) {
		r.t.Fatalf("overdue as %v, and it is %v %v: %s\n%s", n.Conn.Stage, p.state, p.stage, describe(&n.Conn), h)
	}
	limit, from := h.timers.FinTimeout, h.entered()
	if n.Conn.Stage != events.Held {
		if h.lost == 0 {
			r.t.Fatalf("overdue, and its timers are on time: %s\n%s", describe(&n.Conn), h)
		}
		limit = 0
		for _, d := range h.stageTimes() {
			limit += d
		}
	}
	if n.Time < from.Add(limit+Grace-near) {
		r.t.Fatalf("overdue early: %s\n%s", describe(&n.Conn), h)
	}
}

// closed compares an end with the truth.
func (r *run) closed(h *history, n *Notice) {
	c := &n.Conn
	fail := func(why string) { r.t.Fatalf("%s: %s\n%s", why, describe(c), h) }
	if h.ended > r.now {
		fail("closed, and it is there still")
	}
	if h.lost == 0 && c.End == events.Unseen {
		fail("unseen, and no record was lost")
	}
	if c.End != events.Unseen && c.End != h.end {
		// A minisock that is gone ended by its timer, if the deadline has
		// passed, or else by a reset: a snapshot that came late knows no better.
		if last := h.phases[len(h.phases)-1]; !(c.Stage == events.Minisock && (c.End == events.KernelTimeout || c.End == events.Reset) && last.from <= r.now) {
			fail("the end is not true")
		}
		return
	}
	late := time.Duration(0)
	if h.end == events.KernelTimeout {
		late = limits.FinTime(h.timers) / 8 // how late the timer was nobody sees
	}
	if c.EndExact && (n.Time.Sub(h.ended) > near || h.ended.Sub(n.Time) > near+late) {
		fail(fmt.Sprintf("ended at %v, not at %v", h.ended.Sub(boot), n.Time.Sub(boot)))
	}
	if !c.EndExact && n.Time > h.ended.Add(near) {
		fail(fmt.Sprintf("ended at %v, not %v or later", h.ended.Sub(boot), n.Time.Sub(boot)))
	}
	want := h.stageTimes()
	if h.lost == 0 && c.EndExact {
		if !c.SinceExact || !c.StagesKnown {
			fail("all records came, and it is not known")
		}
		if !about(c.Held, want[events.Held]) || !about(c.Orphaned, want[events.Orphaned]) || want[events.Minisock]-c.Minisock > near+late {
			fail(fmt.Sprintf("the stages were %v", want))
		}
	}
}

func (h *history) String() string {
	text := fmt.Sprintf("truth: %+v, %d of %d records lost or before, stamps %v;", h.timers, h.lost, len(h.sent), h.stamps)
	for _, p := range h.phases {
		text += fmt.Sprintf(" %v %v %v (timer %v);", p.from.Sub(boot), p.state, p.stage, p.deadline.Sub(boot))
	}
	return text + fmt.Sprintf(" ended %v by %v", h.ended.Sub(boot), h.end)
}
