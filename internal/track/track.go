// SPDX-License-Identifier: Apache-2.0

// Package track is the table of connections in FIN_WAIT2. Events, snapshots and
// the time come in as values, and what they mean goes out as notices: it has no
// goroutine, lock, clock, log or I/O.
package track

import (
	"syscall"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// Grace is how long past its limit a connection is overdue, so that a timer
// which ends it on time is no alert.
const Grace = 2 * time.Second

// DefaultCapacity is how many connections are tracked at most.
const DefaultCapacity = 1 << 20

// Kind is what a Notice is about.
type Kind uint8

const (
	// Opened: it entered FIN_WAIT2, or was found in it.
	Opened Kind = iota + 1
	// Moved: it went on to another stage.
	Moved
	// Overdue: it passed its limit and the grace, and is still there.
	Overdue
	// Recovered: it is no longer overdue, though still in FIN_WAIT2.
	Recovered
	// Closed: it left FIN_WAIT2.
	Closed
)

func (k Kind) String() string {
	return [...]string{"unknown", "opened", "moved", "overdue", "recovered", "closed"}[k]
}

// Notice is something that happened to a connection. Conn is as of Time.
type Notice struct {
	Kind Kind
	Time events.Time
	Conn Conn
}

// Counters are totals since New.
type Counters struct {
	Entered   uint64 // into FIN_WAIT2, the ones found in it included
	Left      uint64
	Shed      uint64 // records, rows and connections turned away, the table being full: at least one for each connection not tracked
	Corrected uint64 // put right by a snapshot: the record of it was lost
	Found     uint64 // by a snapshot, of those whose handover the kernel side did not send
}

// Tracker is the table. It is not safe for concurrent use.
//
// A snapshot is fed to it between BeginSnapshot and EndSnapshot, a few sockets
// at a time as they are read. Events that were sent before a batch was read
// must be applied before the batch is.
type Tracker struct {
	rules    limits.Rules
	capacity int
	table    table
	slab     slab
	origins  origins
	wheel    wheel
	counters Counters
	stages   [events.Minisock + 1]int // connections in each
	notices  []Notice
	silent   bool // none are made

	pass      uint32              // counts snapshots
	began     events.Time         // when the running snapshot began; 0: none runs
	ended     map[uint64]struct{} // cookies that left while it runs
	doubtful  bool                // only a snapshot can tell
	listeners map[listener]uint32 // by the pass that saw them last
	overflow  map[uint32]uint64   // TCPTimeWaitOverflow as last seen, by namespace
	unowned   bool                // the running snapshot has shown a held one whose process is not known
	owned     index               // how far Own has come
	picked    uint64              // pseudo-random, for displace
}

type listener struct {
	netns uint32
	port  uint16
}

// New makes an empty table of at most capacity connections. Where there are more,
// events are turned away, and of what a snapshot shows the oldest are taken. The
// connections are kept in memory; nil is Go's heap.
func New(rules limits.Rules, capacity int, memory Memory) *Tracker {
	return &Tracker{
		slab:      slab{memory: memory},
		rules:     rules,
		capacity:  capacity,
		origins:   origins{numbers: map[origin]uint32{}},
		ended:     map[uint64]struct{}{},
		listeners: map[listener]uint32{},
		overflow:  map[uint32]uint64{},
	}
}

// Len is how many connections are in the table.
func (t *Tracker) Len() int { return t.table.count }

// Count is how many of them are in a stage.
func (t *Tracker) Count(stage events.Stage) int { return t.stages[stage] }

// Counters returns the totals.
func (t *Tracker) Counters() Counters { return t.counters }

// Next is when Advance should be called, at the latest; ok is false for never.
func (t *Tracker) Next() (at events.Time, ok bool) {
	at = t.wheel.next()
	return at, at != noDeadline
}

// WantsSnapshot says that a snapshot would end a doubt: a minisock is past its
// deadline, which no event shows to have ended or not; or a record must have
// been lost.
func (t *Tracker) WantsSnapshot() bool { return t.doubtful }

// Get returns a connection as of now.
func (t *Tracker) Get(cookie uint64, now events.Time) (Conn, bool) {
	i, ok := t.table.get(&t.slab, cookie)
	if !ok {
		return Conn{}, false
	}
	return t.view(t.slab.at(i), now), true
}

// SetRules replaces the rules, as of now. The notices are valid until the next
// call of a method that returns some.
func (t *Tracker) SetRules(rules limits.Rules, now events.Time) []Notice {
	t.begin()
	before := t.rules.HAProxy
	t.rules = rules
	t.slab.each(func(i index, c *conn) {
		t.relocate(c, before)
		if t.relimit(i, now) {
			t.notify(Recovered, c, now)
		}
	})
	return t.notices
}

// locate finds out which proxy of HAProxy c belongs to.
func (t *Tracker) locate(c *conn) { t.relocate(c, t.rules.HAProxy) }

// relocate is locate where c has its place, if any, in the view of before.
func (t *Tracker) relocate(c *conn, before *haproxy.View) {
	from, flow := t.origin(c), t.flow(c)
	var was *haproxy.Place
	if c.place != 0 {
		was = before.Place(c.place)
	}
	pid := from.process.PID
	c.place = t.rules.Place(from.netns, flow, c.side, pid)
	switch now := t.rules.HAProxy; {
	case c.place != 0 || now == nil || now.Knows(int(pid)):
	case was != nil && was.Process.PID == int(pid):
		// Its process has ended, and nothing is known better than before.
		c.place = now.Keep(was)
	case c.stage > events.Held && haproxy.IsName(from.process.Name()):
		// The worker that closed it had ended before anybody knew it; those that have
		// taken over have the same proxies, most often.
		c.place = t.rules.Place(from.netns, flow, c.side, 0)
	}
	t.choose(c)
}

// choose finds out which of the user's rules is for c.
func (t *Tracker) choose(c *conn) {
	if len(t.rules.User) == 0 {
		c.rule = 0
		return
	}
	from, flow := t.origin(c), t.flow(c)
	s := limits.Subject{Netns: from.netns, Flow: &flow, Side: c.side, Stage: c.stage, Process: &from.process}
	if c.place != 0 {
		s.Place = t.rules.HAProxy.Place(c.place)
	}
	c.rule = t.rules.Choose(&s)
}

// Cookies calls fn for that of each connection, in no order.
func (t *Tracker) Cookies(fn func(uint64)) {
	t.slab.each(func(_ index, c *conn) { fn(c.cookie) })
}

// All calls fn for each connection, in no order, as of now.
func (t *Tracker) All(now events.Time, fn func(*Conn)) {
	t.show(now, func(*conn) bool { return true }, fn)
}

// Overdue is All of those that are past their limit.
func (t *Tracker) Overdue(now events.Time, fn func(*Conn)) {
	t.show(now, func(c *conn) bool { return c.overdue }, fn)
}

func (t *Tracker) show(now events.Time, which func(*conn) bool, fn func(*Conn)) {
	var v Conn // One for all: there may be very many.
	t.slab.each(func(_ index, c *conn) {
		if which(c) {
			v = t.view(c, now)
			fn(&v)
		}
	})
}

// expiredAtOnce is how many deadlines one Advance sees to at most: a million may
// pass at once, as after a suspend, and the caller has other things to do.
const expiredAtOnce = 4096

// Advance makes the time now, or as much of it as one call should: Next says
// whether there is more. A full socket that was not seen past its limit is overdue
// if look, asked for a fresh look at its namespace, flow and cookie, finds it in
// FIN_WAIT2: a record may be lost without anybody knowing. The notices are valid
// until the next call of a method that returns some.
func (t *Tracker) Advance(now events.Time, look func(netns uint32, f events.Flow, cookie uint64) bool) []Notice {
	t.begin()
	t.wheel.expire(&t.slab, now, expiredAtOnce, func(i index) {
		c := t.slab.at(i)
		seen := c.alive >= c.overdueFrom(c.limit(&t.rules))
		if c.stage == events.Minisock || !seen && !look(t.origin(c).netns, t.flow(c), c.cookie) {
			t.doubtful = true
			return
		}
		t.passLimit(c, now)
	})
	return t.notices
}

// noticesKept is how many notices the memory is kept for from call to call.
const noticesKept = 4096

// begin is for a method that returns notices.
func (t *Tracker) begin() {
	if cap(t.notices) > 2*noticesKept {
		t.notices = nil
	}
	t.notices = t.notices[:0]
}

// Apply takes an event. The notices are valid until the next call of a method
// that returns some.
func (t *Tracker) Apply(ev *events.Event) []Notice {
	t.begin()
	i, known := t.table.get(&t.slab, ev.Cookie)
	if known && t.succeeds(i, ev) {
		i = 0
	}
	if i != 0 {
		t.say(t.slab.at(i), ev.Time)
	}
	switch {
	case ev.Old == events.FinWait1 && ev.New == events.FinWait2:
		t.enter(i, ev)
	case ev.Old == events.FinWait2 && ev.New == events.FinWait2:
		t.close(i, ev)
	case ev.Old == events.FinWait2:
		t.leave(i, ev)
	}
	return t.notices
}

// succeeds says that an event is of a new connection which has the identity of i:
// where the kernel gives no cookies, that is the flow. It has ended i. An entry
// that was seen to be there before is its own, and minisocks have no events.
func (t *Tracker) succeeds(i index, ev *events.Event) bool {
	c := t.slab.at(i)
	switch {
	case ev.Old != events.FinWait1 && ev.Old != events.FinWait2,
		ev.Old == events.FinWait1 && ev.Time <= c.alive,
		ev.Old == events.FinWait2 && (c.stage != events.Minisock || ev.Time.Sub(c.mini) <= handoverTime):
		return false
	case c.stage == events.Minisock && c.deadline <= ev.Time:
		t.end(i, max(c.deadline, c.alive), events.KernelTimeout, c.alive <= c.deadline)
	default:
		t.counters.Corrected++
		t.end(i, c.alive, events.Unseen, false)
	}
	return true
}

// enter is FIN_WAIT1 → FIN_WAIT2: the peer has acknowledged our FIN. In it and
// the like, i is 0 for a connection that is not in the table.
func (t *Tracker) enter(i index, ev *events.Event) {
	if i != 0 {
		// A snapshot was quicker.
		c := t.slab.at(i)
		c.since, c.inexact = ev.Time, false
		if c.stage == events.Held && ev.Process.Known() {
			t.setProcess(c, ev.Process)
			c.closedBy = events.ByShutdown
			t.locate(c)
		}
		if t.relimit(i, ev.Time) {
			t.notify(Recovered, c, ev.Time)
		}
		return
	}
	if i = t.open(ev); i == 0 {
		return
	}
	c := t.slab.at(i)
	t.setStage(c, events.Held)
	if ev.Process.Known() {
		c.closedBy = events.ByShutdown
	}
	if ev.Dead {
		t.orphan(c, ev)
	}
	t.arm(i)
	t.notify(Opened, c, ev.Time)
}

// close is FIN_WAIT2 → FIN_WAIT2: tcp_close_state() of close() on a held socket.
func (t *Tracker) close(i index, ev *events.Event) {
	if i == 0 {
		if i = t.discover(ev); i == 0 {
			return
		}
		t.arm(i)
		t.notify(Opened, t.slab.at(i), ev.Time)
	}
	c := t.slab.at(i)
	c.alive = ev.Time
	if ev.Process.Known() {
		t.setProcess(c, ev.Process)
		t.locate(c)
	}
	c.closedBy = events.ByClose
	c.setTimers(ev.Timers)
	if limits.FinTime(ev.Timers) <= limits.TimeWaitLen || ev.Timers.Linger2 < 0 {
		return // What comes of it follows within microseconds.
	}
	t.orphan(c, ev)
	t.moved(i, ev.Time)
}

// handoverTime is between the time that a handover takes, microseconds, and the
// shortest time that the keepalive timer of an orphan does, 3.5 × the least RTO.
const handoverTime = 500 * time.Millisecond

// leave is FIN_WAIT2 → CLOSE, which for the event stream is the end, but for
// the connection may be the handover to a minisock.
func (t *Tracker) leave(i index, ev *events.Event) {
	known := i != 0
	if !known {
		if i = t.discover(ev); i == 0 {
			return
		}
	}
	c := t.slab.at(i)
	end := endOf(ev)
	life := limits.FinTime(ev.Timers)
	if known && c.stage == events.Held && ev.Dead && life > limits.TimeWaitLen && ev.Timers.Linger2 >= 0 {
		// It was an orphan, and the record of the close was lost.
		t.orphan(c, ev)
		c.unsplit = true
	}
	if known && c.stage == events.Orphaned && c.deadline != 0 && end == 0 && life <= limits.TimeWaitLen &&
		ev.Time.Sub(c.closed) > handoverTime {
		// tcp_keepalive_timer() reads tcp_fin_time() anew, and resets where it
		// leaves nothing above 60 s for a minisock.
		end = events.KernelTimeout
	}
	if end != 0 {
		if !known {
			t.notify(Opened, c, ev.Time)
		}
		t.end(i, ev.Time, end, true)
		return
	}
	if life > limits.TimeWaitLen {
		life -= limits.TimeWaitLen
	}
	c.setTimers(ev.Timers)
	c.alive, c.mini, c.deadline = ev.Time, ev.Time, ev.Time.Add(life)
	if c.closed == 0 {
		c.closed = ev.Time
	}
	c.closedBy = events.ByClose
	t.setStage(c, events.Minisock)
	if known {
		t.moved(i, ev.Time)
		return
	}
	t.arm(i)
	t.notify(Opened, c, ev.Time)
}

// endOf tells the endings apart that a record of FIN_WAIT2 → CLOSE shows; 0 is
// the handover to a minisock.
func endOf(ev *events.Event) events.End {
	switch syscall.Errno(ev.Err) {
	case 0:
	case syscall.ECONNRESET:
		if ev.RcvShut {
			// tcp_reset() runs both for a RST that came and for the one we
			// send because data came that nobody will read.
			return events.Reset
		}
		return events.PeerReset
	case syscall.ECONNABORTED:
		return events.Destroyed
	default:
		return events.KernelTimeout // tcp_write_err(): keepalive or TCP_USER_TIMEOUT
	}
	switch {
	case ev.Done:
		return events.PeerFIN
	case !ev.Dead, ev.Timers.Linger2 < 0:
		return events.LocalReset
	}
	return 0
}

// discover opens the connection of an event other than its entry: it entered
// before us, or the record was lost, or it is one of those that the kernel side
// reports once, as it hands them over.
func (t *Tracker) discover(ev *events.Event) index {
	i := t.open(ev)
	if i == 0 {
		return 0
	}
	c := t.slab.at(i)
	c.inexact = true
	t.setStage(c, events.Held)
	if ev.New == events.Close && ev.Dead {
		t.orphan(c, ev)
		// Who closed is noted by the kernel side until it sends the entry:
		// where nobody is, that may have been sent, and lost.
		c.inexact = limits.FinTime(ev.Timers) > limits.TimeWaitLen || !ev.Process.Known()
		c.unsplit = c.inexact
	}
	t.doubtful = t.doubtful || c.inexact
	return i
}

// open makes a connection that enters with an event; 0 if the table is full.
func (t *Tracker) open(ev *events.Event) index {
	i := t.add(ev.Cookie)
	if i == 0 {
		return 0
	}
	c := t.slab.at(i)
	t.setOrigin(c, ev.Netns, ev.Flow, ev.Process)
	c.since = ev.Time
	c.alive = ev.Time
	c.setTimers(ev.Timers)
	c.side = t.sideOf(ev.Accepted, ev.Netns, ev.Flow.Local.Port)
	t.locate(c)
	return i
}

func (t *Tracker) add(cookie uint64) index {
	if t.table.count >= t.capacity {
		t.counters.Shed++
		return 0
	}
	i := t.slab.take()
	t.slab.at(i).cookie = cookie
	t.table.add(&t.slab, i)
	t.counters.Entered++
	return i
}

func (t *Tracker) sideOf(accepted bool, netns uint32, port uint16) events.Side {
	if accepted || t.Listening(netns, port) {
		return events.Inbound
	}
	return events.Outbound
}

// Listening says whether the last snapshot has shown a listener on a port.
func (t *Tracker) Listening(netns uint32, port uint16) bool {
	_, listening := t.listeners[listener{netns, port}]
	return listening
}

// orphan makes c a full socket without a process.
func (t *Tracker) orphan(c *conn, ev *events.Event) {
	t.setStage(c, events.Orphaned)
	c.closedBy = events.ByClose
	c.closed = ev.Time
	c.deadline = ev.Time.Add(limits.Closed(ev.Timers).Duration)
}

// arm sets the one timer of a connection.
func (t *Tracker) arm(i index) {
	c := t.slab.at(i)
	t.wheel.remove(&t.slab, i)
	l := c.limit(&t.rules)
	if c.stage == events.Minisock && !c.overdue && !l.User() {
		// Timers rarely use all of their slack: look once before, then when
		// it is overdue.
		check := c.deadline.Add(l.Slack / 2)
		if check <= c.alive {
			check = c.overdueFrom(l)
		}
		t.wheel.add(&t.slab, i, check)
		return
	}
	if !c.overdue {
		t.wheel.add(&t.slab, i, c.overdueFrom(l))
	}
}

// overdueFrom is when c is past its limit, the timer's slack and the grace.
func (c *conn) overdueFrom(l limits.Limit) events.Time {
	from := c.limitFrom().Add(l.Duration)
	if c.stage == events.Minisock && !l.User() {
		from = c.deadline
	}
	return from.Add(l.Slack + Grace)
}

// passLimit makes c overdue.
func (t *Tracker) passLimit(c *conn, now events.Time) {
	if c.overdue {
		return
	}
	t.say(c, now)
	c.overdue = true
	t.notify(Overdue, c, now)
}

// moved is after a change of stage.
func (t *Tracker) moved(i index, now events.Time) {
	recovered := t.relimit(i, now)
	c := t.slab.at(i)
	t.notify(Moved, c, now)
	if recovered {
		t.notify(Recovered, c, now)
	}
}

// relimit is after a change of limit. It says whether c was overdue and is so
// no longer.
func (t *Tracker) relimit(i index, now events.Time) (recovered bool) {
	c := t.slab.at(i)
	if c.overdue && c.overdueFrom(c.limit(&t.rules)) > now {
		c.overdue = false
		recovered = true
	}
	t.arm(i)
	return recovered
}

// end takes a connection out of the table.
func (t *Tracker) end(i index, at events.Time, end events.End, exact bool) {
	c := t.slab.at(i)
	if !t.silent {
		t.say(c, at)
		v := t.view(c, at)
		v.End, v.EndExact = end, exact
		t.notices = append(t.notices, Notice{Kind: Closed, Time: at, Conn: v})
	}
	if t.began != 0 {
		t.ended[c.cookie] = struct{}{}
	}
	t.drop(i)
	t.counters.Left++
}

// drop removes a connection from the table.
func (t *Tracker) drop(i index) {
	c := t.slab.at(i)
	t.stages[c.stage]--
	t.wheel.remove(&t.slab, i)
	t.table.remove(&t.slab, c.cookie)
	t.origins.release(c.origin)
	t.slab.give(i)
}

// setStage moves c to a stage, or into its first.
func (t *Tracker) setStage(c *conn, stage events.Stage) {
	if c.stage != 0 {
		t.stages[c.stage]--
	}
	c.stage = stage
	t.stages[stage]++
	t.choose(c)
}

// say speaks of a connection for the first time, if that is still to be done.
func (t *Tracker) say(c *conn, at events.Time) {
	if c.unsaid {
		c.unsaid = false
		t.notify(Opened, c, at)
	}
}

// Silence makes it return no notices, for whoever is told nothing and reads the table:
// to make one takes as long as to find its connection.
func (t *Tracker) Silence() { t.silent = true }

func (t *Tracker) notify(kind Kind, c *conn, at events.Time) {
	if t.silent {
		return
	}
	t.notices = append(t.notices, Notice{Kind: kind, Time: at, Conn: t.view(c, at)})
}
