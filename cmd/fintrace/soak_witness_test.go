// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// soakExact is how far what is said to be exact may be off.
const soakExact = 50 * time.Millisecond

// soakStory is what the generator knows of a connection, which it made, and what
// a trace has said of it. It is guarded by the witness.
type soakStory struct {
	kind  *soakKind
	netns uint32
	flow  events.Flow
	side  events.Side

	entered moment        // into FIN_WAIT2
	packet  moment        // the last of the peer's data
	closed  moment        // by its process; zero while held
	finTime time.Duration // tcp_fin_time() then
	vague   bool          // it has become another since, and counts
	left    moment        // what was done that ends it, if anything was
	end     events.End    // by that
	cut     bool          // its namespace went before that was told
	over    time.Time     // when the last was done to it

	record *report.Record // that it has left
	opened int
}

func (s *soakStory) leaves(m moment, end events.End) {
	if s.left == (moment{}) {
		s.left, s.end = m, end
	}
}

// plus is m and a duration.
func (s span) plus(d span) span { return span{s.least + d.least, s.most + d.most} }

// timer is how long a timer of the kernel takes: it may be an eighth late, and
// some jiffies.
func timer(d time.Duration) span { return span{d, d + d/8 + 2*tick} }

// lifetime is how long a closed connection may last.
func (s *soakStory) lifetime() span {
	switch {
	case s.finTime < 0:
		return span{}
	case s.finTime <= time.Minute:
		return timer(s.finTime)
	}
	return timer(s.finTime - time.Minute).plus(timer(s.finTime - time.Minute))
}

// fate is what has to be said of a connection: one of ends, and how long it was in
// each stage. The stages are not known where the timer and what was done came at
// about the same time.
type fate struct {
	ends                     []events.End
	held, orphaned, minisock span
	stages                   bool
	total                    span
}

func (s *soakStory) fate() (f fate) {
	if s.closed == (moment{}) || s.left == s.closed && s.finTime < 0 || s.end == events.LocalReset {
		f = fate{ends: []events.End{s.end}, held: s.left.since(s.entered), stages: true}
		f.total = f.held
		return f
	}
	if s.closed != s.entered {
		f.held = s.closed.since(s.entered)
	}
	whole, deed := s.lifetime(), span{math.MaxInt64, math.MaxInt64}
	if s.left != (moment{}) {
		deed = s.left.since(s.closed)
	}
	byTimer, byDeed := deed.most >= whole.least, deed.least <= whole.most
	f.stages = !byTimer || !byDeed
	if byTimer {
		f.ends = append(f.ends, events.KernelTimeout)
	}
	closed := span{min(deed.least, whole.least), min(deed.most, whole.most)}
	f.total = f.held.plus(closed)
	if s.finTime <= time.Minute {
		f.minisock = closed
		if byDeed {
			f.ends = append(f.ends, ofClosed(s.end, true))
		}
		return f
	}
	phase := timer(s.finTime - time.Minute)
	switch {
	case closed.most < phase.least:
		f.orphaned = closed
		f.ends = append(f.ends, ofClosed(s.end, false))
	case closed.least > phase.most:
		f.orphaned = phase
		f.minisock = span{max(closed.least-phase.most, 0), closed.most - phase.least}
		if byDeed {
			f.ends = append(f.ends, ofClosed(s.end, true))
		}
	default:
		f.stages = false
		f.ends = append(f.ends, ofClosed(s.end, true), ofClosed(s.end, false))
	}
	return f
}

// ofClosed is what is seen of an end where no process is left.
func ofClosed(end events.End, minisock bool) events.End {
	switch {
	case end == events.PeerReset, end == events.Destroyed && minisock:
		return events.Reset
	}
	return end
}

// soakVerdict is what is made of what was said of a connection: wrong is what is
// not so, weak is what is less than could be known.
type soakVerdict struct{ wrong, weak []string }

// README says what cannot be told apart: an end of a minisock from its timer's, and
// a packet just before the close from the ACK of the FIN.
const takenForTimers, takenForEntry = "taken for its timer's", "dated by a packet just before the close"

// takenByChild is about the generator.
const takenByChild = "closed by a child that was starting"

func (v *soakVerdict) errorf(format string, args ...any) {
	v.wrong = append(v.wrong, fmt.Sprintf(format, args...))
}

func asDuration(d *float64) time.Duration { return time.Duration(*d * float64(time.Second)) }

// judge compares what was said of a connection that has left with what is known.
func (s *soakStory) judge() (v soakVerdict) {
	r := s.record
	early, late := wall(s.entered.before).Add(-soakExact), wall(s.entered.after).Add(soakExact)
	if off := r.Since.Before(early) || r.Since.After(late); off && r.SinceExact {
		// The packet, or our ACK of it, which may be delayed (TCP_DELACK_MIN, 40 ms).
		packet := s.packet != (moment{}) && !r.Since.Before(wall(s.packet.before).Add(-soakExact))
		if packet && s.closed != (moment{}) && wall(s.closed.after).Sub(r.Since).Abs() < soakExact {
			v.weak = append(v.weak, takenForEntry)
			return v
		}
		v.errorf("since %s, exactly; it is since %s", r.Since, wall(s.entered.before))
	}
	if !r.SinceExact {
		v.weak = append(v.weak, "since")
		if r.Since.Before(early) {
			v.errorf("since %s at least; it is since %s", r.Since, wall(s.entered.before))
		}
	}
	if r.Side != s.side.String() {
		v.errorf("%s, is %s", r.Side, s.side)
	}
	switch int(r.PID) {
	case os.Getpid():
	case 0:
		v.weak = append(v.weak, "process")
	default:
		if _, ours := soakChildren.Load(int(r.PID)); !ours {
			v.errorf("process %d", r.PID)
			break
		}
		// It had copies of both ends, and closed them after the generator did.
		v.weak = append(v.weak, takenByChild)
		return v
	}
	if s.opened != 1 {
		v.errorf("entered %d times", s.opened)
	}
	if s.cut {
		return v
	}

	f := s.fate()
	end := events.Ends()[slices.IndexFunc(events.Ends(), func(e events.End) bool { return e.String() == r.End })]
	switch {
	case s.vague:
		// tcp_fin_time() was another when the orphan's timer fired, which ended it or
		// gave its minisock that much longer: for what was to come, too.
		return v
	case end == events.KernelTimeout && slices.Contains(f.ends, end) && slices.Contains(f.ends, events.Reset):
		// It was reset within what its timer may be late by: nothing shows which came first.
		v.weak = append(v.weak, takenForTimers)
		return v
	case slices.Contains(f.ends, end):
	case end == events.Unseen:
		v.weak = append(v.weak, "end")
	case end == events.KernelTimeout && slices.Contains(f.ends, events.Reset) && s.lifetime().least-s.left.since(s.closed).least < soon:
		// At the next look its timer had run out, and nothing shows that it was gone before.
		v.weak = append(v.weak, takenForTimers)
		return v
	default:
		v.errorf("ended by %s, did by %v", r.End, f.ends)
	}
	exact := *r.EndExact
	if !exact && end != events.Reset && end != events.Unseen && end != events.KernelTimeout {
		v.weak = append(v.weak, "end's time")
	}
	near := func(what string, got time.Duration, want span, exactly bool) {
		if got > want.most+soakExact || exactly && got < want.least-soakExact {
			v.errorf("%s for %s (exactly: %t), was for %s to %s", what, got, exactly, want.least, want.most)
		}
	}
	exact = exact && r.SinceExact
	near("in FIN_WAIT2", asDuration(&r.Duration), f.total, exact)
	if r.Held == nil {
		v.weak = append(v.weak, "stages")
		return v
	}
	if !f.stages {
		return v
	}
	near("held", asDuration(r.Held), f.held, r.SinceExact && (exact || s.closed != (moment{}) && end != events.Unseen))
	if asDuration(r.Orphaned) > soakExact && s.finTime <= time.Minute {
		// The ACK of the FIN came in the last steps of close(): it is no minisock.
		v.weak = append(v.weak, "orphaned all the time")
		f.orphaned, f.minisock = f.minisock, span{}
	}
	near("orphaned", asDuration(r.Orphaned), f.orphaned, exact)
	near("minisock", asDuration(r.Minisock), f.minisock, exact)
	return v
}

// soakWitness has all the stories, and what a trace says of the connections.
type soakWitness struct {
	t *testing.T

	mu      sync.Mutex
	spaces  map[uint32]bool // network namespaces that are or were ours
	stories map[string]*soakStory
	told    map[string]bool // those that have been judged
	shaken  *soakShocks
	floods  soakShocks // more than the trace has a buffer for
	kinds   map[*soakKind]*soakTally
	wrong   int
	strays  int
}

// soakTally is of the connections of a kind.
type soakTally struct {
	made, entered, left int
	ends                map[string]int
	weak                map[string]int // said with less than could be known, by what
	doubted             int            // weak, with no fault that explains it
}

func newSoakWitness(t *testing.T, shaken *soakShocks) *soakWitness {
	return &soakWitness{t: t, shaken: shaken, spaces: map[uint32]bool{}, stories: map[string]*soakStory{}, told: map[string]bool{}, kinds: map[*soakKind]*soakTally{}}
}

func (w *soakWitness) know(netns uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.spaces[netns] = true
}

// begin is before a connection's first step. No two have the same ends.
func (w *soakWitness) begin(s *soakStory) *soakStory {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := fmt.Sprint(s.flow.Local, " ", s.flow.Remote)
	if w.told[key] || w.stories[key] != nil {
		w.t.Errorf("%s is there a second time", key)
	}
	w.stories[key] = s
	w.tally(s.kind).made++
	return s
}

func (w *soakWitness) tally(k *soakKind) *soakTally {
	if w.kinds[k] == nil {
		w.kinds[k] = &soakTally{ends: map[string]int{}, weak: map[string]int{}}
	}
	return w.kinds[k]
}

// over is after a connection's last step.
func (w *soakWitness) over(s *soakStory) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s.over = time.Now()
	w.decide(s)
}

// decide judges what is over and has been told.
func (w *soakWitness) decide(s *soakStory) {
	if s.over.IsZero() || s.record == nil {
		return
	}
	if s.entered != (moment{}) {
		w.take(s, s.judge())
	}
	key := fmt.Sprint(s.flow.Local, " ", s.flow.Remote)
	delete(w.stories, key)
	w.told[key] = true
}

// soakWrongShown is how many are printed of what is wrong.
const soakWrongShown = 20

func (w *soakWitness) take(s *soakStory, v soakVerdict) {
	tally := w.tally(s.kind)
	for _, what := range v.weak {
		tally.weak[what]++
	}
	if len(v.weak) > 0 && !slices.Contains(v.weak, takenForTimers) && !slices.Contains(v.weak, takenByChild) && !w.shaken.explain(s) && !w.floods.explain(s) {
		if tally.doubted++; tally.doubted <= soakWrongShown {
			text, _ := json.Marshal(s.record)
			tell(w.t, "%s (%s): weak by %v: %s", s.kind.name, s.kind.does, v.weak, text)
		}
	}
	if len(v.wrong) == 0 {
		return
	}
	if w.wrong++; w.wrong <= soakWrongShown {
		text, _ := json.Marshal(s.record)
		w.t.Errorf("%s (%s) in %d: said to be %s\n%s\nentered %s, closed %s, left %s, now %s", s.kind.name, s.kind.does, s.netns, strings.Join(v.wrong, "; "), text,
			ofMoment(s.entered), ofMoment(s.closed), ofMoment(s.left), time.Now().Format(time.StampMicro))
	}
}

func ofMoment(m moment) string {
	if m == (moment{}) {
		return "never"
	}
	return wall(m.before).Format(time.StampMicro)
}

// hear takes a line of a trace.
func (w *soakWitness) hear(line []byte) {
	var r report.Record
	if err := json.Unmarshal(line, &r); err != nil {
		w.t.Errorf("a line is %q: %v", line, err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.spaces[r.Netns] {
		return
	}
	s := w.stories[r.Local+" "+r.Remote]
	if s == nil || s.netns != r.Netns {
		if w.strays++; w.strays <= soakWrongShown {
			w.t.Errorf("nothing is known of %s", line)
		}
		return
	}
	switch r.Kind {
	case track.Opened.String():
		s.opened++
		w.tally(s.kind).entered++
	case track.Overdue.String():
		if s.left != (moment{}) && r.Time.After(wall(s.left.after).Add(soakExact)) {
			w.t.Errorf("%s was gone when it was said to be past its limit: %s", s.kind.name, line)
		}
	case track.Closed.String():
		w.tally(s.kind).left++
		w.tally(s.kind).ends[r.End]++
		s.record = &r
		w.decide(s)
	}
}

// cutOff is before a namespace goes: what has not been told yet of the connections
// in it may never be.
func (w *soakWitness) cutOff(netns uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.stories {
		s.cut = s.cut || s.netns == netns
	}
}

// await waits until all of a namespace, 0 for any, is told. What has not even been
// begun to be told some seconds after it was over was lost.
func (w *soakWitness) await(netns uint32, most time.Duration) {
	_ = awaitFor(most, "", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, s := range w.stories {
			if (netns == 0 || s.netns == netns) && (s.opened > 0 || time.Since(s.over) < 5*time.Second) {
				return false
			}
		}
		return true
	})
}

// finish waits until the trace has told of all, and takes what it has not. In a
// namespace that is gone, the timer is the end.
func (w *soakWitness) finish() {
	w.await(0, soakTimerMost+soon)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.stories {
		switch {
		case s.entered == (moment{}) && s.opened == 0: // cut off before
		case s.opened > 0:
			w.wrong++
			w.t.Errorf("%s (%s → %s) has entered and not left, though it has", s.kind.name, s.flow.Local, s.flow.Remote)
		default:
			w.take(s, soakVerdict{weak: []string{"never told"}})
		}
	}
}

// verdict says what was seen of each kind.
func (w *soakWitness) verdict(totals soakTotals) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all soakTally
	for _, k := range slices.SortedFunc(maps.Keys(w.kinds), func(a, b *soakKind) int { return a.port() - b.port() }) {
		tally := w.kinds[k]
		tell(w.t, "%-34s %6d made, %6d entered, %6d left: %v; weak %v, %d of them with no reason", k.name, tally.made, tally.entered, tally.left, tally.ends, tally.weak, tally.doubted)
		if tally.entered != tally.left {
			w.t.Errorf("%s: %d entered, %d left", k.name, tally.entered, tally.left)
		}
		all.made += tally.made
		all.entered += tally.entered
		all.doubted += tally.doubted
	}
	tell(w.t, "%d made, %d entered, %d weak with no reason; %d wrong. The trace: lost %d, skipped by the kernel %d, corrected %d",
		all.made, all.entered, all.doubted, w.wrong, totals.Lost, totals.Missed, totals.Corrected)
	// As for churned: what the kernel skips is not always counted.
	if most := all.made/1000 + 5; all.doubted > most {
		w.t.Errorf("%d connections were known less than wholly with no reason, want %d at most", all.doubted, most)
	}
	if totals.Remaining != 0 {
		w.t.Errorf("%d remain", totals.Remaining)
	}
}

// soakShocks are the times at which events may have been lost or skipped: the
// loop that would read them was stopped or had no processor, or a program came to
// the tracepoint or left it, be it another's.
type soakShocks struct {
	mu   sync.Mutex
	all  []soakShock
	open map[string]events.Time
}

type soakShock struct{ from, to events.Time }

// begin is when a loop stops; the result is for when it goes on.
func (s *soakShocks) begin(what string) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = map[string]events.Time{}
	}
	s.open[what] = probe.Now()
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all = append(s.all, soakShock{s.open[what], probe.Now()})
		delete(s.open, what)
	}
}

func (s *soakShocks) add(from, to events.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, soakShock{from, to})
}

// during says whether there was one.
func (s *soakShocks) during(from, to events.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, since := range s.open {
		if since <= to {
			return true
		}
	}
	return slices.ContainsFunc(s.all, func(shock soakShock) bool { return shock.from <= to && from <= shock.to })
}

// settled is how long a record may take to be read.
const settled = 200 * time.Millisecond

// explain says whether a shock may be why a connection is not wholly known.
func (s *soakShocks) explain(story *soakStory) bool {
	for _, m := range []moment{story.entered, story.closed, story.left} {
		if m != (moment{}) && s.during(m.before, m.after.Add(settled)) {
			return true
		}
	}
	// An orphan becomes a minisock with an event.
	phase := timer(story.finTime - time.Minute)
	return story.closed != (moment{}) && phase.least > 0 && s.during(story.closed.before.Add(phase.least), story.closed.after.Add(phase.most+settled))
}

// watch looks for programs that come and go until stop is closed, and returns how
// often they did. Each has a link.
func (s *soakShocks) watch(stop <-chan struct{}) (times int, err error) {
	attached := func() (map[link.ID]bool, error) {
		links := map[link.ID]bool{}
		it := new(link.Iterator)
		defer it.Close()
		for it.Next() {
			links[it.ID] = true
		}
		return links, it.Err()
	}
	at, before := probe.Now(), map[link.ID]bool(nil)
	if before, err = attached(); err != nil {
		return 0, err
	}
	for every := time.NewTicker(50 * time.Millisecond); ; {
		select {
		case <-stop:
			return times, nil
		case <-every.C:
		}
		now, err := attached()
		if err != nil {
			return times, err
		}
		if !maps.Equal(before, now) {
			times++
			// A link's number is given up before the program is detached.
			s.add(at.Add(-settled), probe.Now().Add(time.Second))
		}
		if late := probe.Now(); late.Sub(at) > starved {
			s.add(at, late)
		}
		at, before = probe.Now(), now
	}
}

// starved is how long who looks every 50 ms has to wait for a processor before it
// counts as a shock: a loop that reads records may have had none either.
const starved = 300 * time.Millisecond

// soakTrace is a trace that tells the witness.
type soakTrace struct {
	*exec.Cmd
	witness *soakWitness
	ended   chan struct{}
	last    []byte     // line
	reads   sync.Mutex // held while its lines are not read
	err     bytes.Buffer
	quiet   sync.WaitGroup // until err has all
}

// soakRing is so little that a stop of a second loses records of a flood.
const soakRing = "1048576"

// startSoakTrace traces each connection at the kinds' ports.
func startSoakTrace(t *testing.T, w *soakWitness) *soakTrace {
	t.Helper()
	var ports []string
	for i := range len(soakKinds) + 1 {
		ports = append(ports, strconv.Itoa(soakPort+i))
	}
	trace := &soakTrace{witness: w, Cmd: exec.Command("fintrace", "trace", "-o", "json", "--min-duration", "0", "--ring-bytes", soakRing, "--port", strings.Join(ports, ","), "--peer", soakAddresses), ended: make(chan struct{})}
	trace.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := trace.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said, err := trace.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := trace.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if trace.ProcessState == nil {
			trace.Process.Kill()
		}
	})
	greeted := bufio.NewReader(said)
	for line := ""; !strings.HasPrefix(line, "Tracing "); {
		if line, err = greeted.ReadString('\n'); err != nil {
			t.Fatalf("the trace says %q: %v", line, err)
		}
	}
	trace.quiet.Go(func() { _, _ = io.Copy(&trace.err, greeted) })
	go func() {
		defer close(trace.ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			trace.reads.Lock()
			trace.last = slices.Clone(lines.Bytes())
			trace.reads.Unlock()
			if !bytes.Contains(trace.last, []byte(`"kind":"summary"`)) {
				w.hear(trace.last)
			}
		}
	}()
	return trace
}

// soakTotals is the summary of a trace, as far as it is about what it may have missed.
type soakTotals struct {
	Kind                    string
	Remaining               int
	Lost, Missed, Corrected uint64
}

// end ends the trace as Ctrl-C does.
func (trace *soakTrace) end(t *testing.T) (totals soakTotals) {
	t.Helper()
	if err := trace.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	<-trace.ended
	trace.quiet.Wait()
	if err := trace.Wait(); err != nil {
		t.Errorf("the trace ended with %v: %s", err, &trace.err)
	}
	if err := json.Unmarshal(trace.last, &totals); err != nil || totals.Kind != "summary" {
		t.Errorf("the last line of the trace is %q: %v", trace.last, err)
	}
	return totals
}

// compare holds the daemon's table of a namespace against ss and the generator.
// What each shows at about the same time need not be the same: what counts is
// how long they differ.
func (w *soakWitness) compare(t *testing.T, ns *kerneltest.Namespace, ask func() ([]report.Record, bool)) (compared int) {
	flows := func() map[string]bool {
		there := map[string]bool{}
		cmd := exec.Command("nsenter", "--net="+ns.Path(), "ss", "-tanH", "state", "fin-wait-2")
		var out bytes.Buffer
		cmd.Stdout = &out
		if startAlone(cmd) != nil || cmd.Wait() != nil {
			return nil // The namespace is no more.
		}
		for line := range strings.Lines(out.String()) {
			fields := strings.Fields(line)
			there[unmap(t, fields[2])+" "+unmap(t, fields[3])] = true
		}
		return there
	}
	before := flows()
	asked := probe.Now()
	records, ok := ask()
	after := flows()
	if !ok || before == nil || after == nil {
		return 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	table := map[string]*report.Record{}
	for i := range records {
		r := &records[i]
		key := r.Local + " " + r.Remote
		table[key] = r
		s := w.stories[key]
		if s == nil || s.entered == (moment{}) {
			continue // It is told already, or just being made.
		}
		if r.SinceExact && (r.Since.Before(wall(s.entered.before).Add(-soakExact)) || r.Since.After(wall(s.entered.after).Add(soakExact))) {
			t.Errorf("the table has %s since %s, exactly; it is since %s", s.kind.name, r.Since, ofMoment(s.entered))
		}
		gone := s.left != (moment{}) && s.left.after.Add(soon) < asked || s.closed != (moment{}) && s.closed.after.Add(s.lifetime().most+soon) < asked
		if !before[key] && !after[key] && gone {
			t.Errorf("the table has %s (%s), which left at %s", s.kind.name, key, ofMoment(s.left))
		}
	}
	for key := range before {
		s := w.stories[key]
		if !after[key] || s == nil || s.cut {
			continue
		}
		compared++
		switch {
		case s.entered == (moment{}):
		case s.left != (moment{}) && s.left.after.Add(settled) < asked && s.closed == (moment{}):
			t.Errorf("ss has %s (%s), which left at %s: the witnesses disagree", s.kind.name, key, ofMoment(s.left))
		case table[key] == nil && s.entered.after.Add(soon) < asked:
			t.Errorf("the table has not %s (%s), which is there since %s", s.kind.name, key, ofMoment(s.entered))
		case table[key] == nil && s.entered.after.Add(time.Second) < asked && !w.shaken.explain(s) && !w.shaken.during(s.entered.before, asked):
			w.tally(s.kind).doubted++
			tell(t, "the table has not %s (%s) yet, which is there since %s", s.kind.name, key, ofMoment(s.entered))
		}
	}
	return compared
}
