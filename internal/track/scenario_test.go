// SPDX-License-Identifier: Apache-2.0

package track

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// TestScenarios runs testdata/scenarios/*.txt: a command, "----", and the notices it
// brings. With -rewrite the outputs are written anew; read the difference.
func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata/scenarios", func(t *testing.T, path string) {
		s := newScenario()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			out, err := s.run(d)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			return out
		})
	})
}

// boot is how long the machine is up when a scenario's clock starts: what was
// there before has a time too.
const boot = events.Time(24 * time.Hour)

// A scenario is a tracker and what its file has said so far.
type scenario struct {
	tracker   *Tracker
	now       events.Time               // as the last command has it
	cov       events.Coverage           // of the running snapshot
	processes []haproxy.Process         // that run
	owners    map[uint64]events.Process // by the inodes of the sockets that they hold
	rules     limits.Rules
}

func newScenario() *scenario {
	return &scenario{tracker: New(limits.Rules{}, 100, nil), now: boot, owners: map[uint64]events.Process{}}
}

// run runs one command. Durations have units; every time counts from the start.
//
//	new [held=5s] [capacity=2] [silent]             a new tracker, the clock at 0
//	enter   SOCKET [dead]                           FIN_WAIT1 → FIN_WAIT2
//	close   SOCKET                                  FIN_WAIT2 → FIN_WAIT2
//	leave   SOCKET [dead] [done] [rcvshut] [err=104] FIN_WAIT2 → CLOSE
//	advance t=62s
//	haproxy t=5s pid=7 [changed] [alone]            one runs with the configuration below; those before are old, or gone
//	rules t=5s                                      the user's own, a line each: NAME fin_timeout=5s [local_port=80] [process=web] [proxy=app] [stage=held]
//	begin t=70s, observe, end t=71s [covers=1,2] [overflow=3] [reused] [gone=7] [given_up=12]
//	snapshot t=70s ...                              all three
//	state                                           what is in the table
//
// The clock does not go back, but for what is marked late. SOCKET is cookie=1 t=0s [netns=1] [fin_timeout=60s] [linger2=3s] [rto=200ms]
// [local=192.0.2.1:80] [remote=198.51.100.1:40001] [pid=7] [comm=web] [accepted].
// A snapshot's rows are the lines below it: held, orphan, minisock, time_wait or
// listen, with the same words and [timer=3s] [entry=5s] [last_ack=5s] [inode=12]; a minisock
// whose handover was not sent has handover=, the time of it.
func (s *scenario) run(d *datadriven.TestData) (string, error) {
	words, err := newWords(d.CmdArgs)
	if err != nil {
		return "", err
	}
	if t, ok := words["t"]; ok {
		after, err := time.ParseDuration(t)
		if err != nil {
			return "", err
		}
		if at := boot.Add(after); at >= s.now || words.is("late") {
			s.now = at
		} else {
			return "", fmt.Errorf("the clock would go back to %s", t)
		}
	}
	switch d.Cmd {
	case "new":
		s.now, s.processes, s.rules = boot, nil, limits.Rules{}
		s.tracker = New(limits.Rules{Held: words.duration("held", 0)}, words.number("capacity", 100), nil)
		if words.is("silent") {
			s.tracker.Silence()
		}
		return "", nil
	case "enter", "close", "leave":
		states := map[string][2]events.State{
			"enter": {events.FinWait1, events.FinWait2},
			"close": {events.FinWait2, events.FinWait2},
			"leave": {events.FinWait2, events.Close},
		}
		ev := words.event(s.now)
		ev.Old, ev.New = states[d.Cmd][0], states[d.Cmd][1]
		return s.print(s.tracker.Apply(&ev)), nil
	case "advance":
		return s.print(s.tracker.Advance(s.now, trusting)), nil
	case "haproxy":
		return s.haproxy(d, words)
	case "rules":
		return s.userRules(d.Input)
	case "begin":
		s.begin()
		return "", nil
	case "observe":
		return s.observe(d.Input)
	case "end":
		return s.end(words), nil
	case "snapshot":
		s.begin()
		out, err := s.observe(d.Input)
		return out + s.end(words), err
	case "state":
		return s.state(), nil
	}
	return "", fmt.Errorf("no command %q", d.Cmd)
}

func (s *scenario) haproxy(d *datadriven.TestData, words words) (string, error) {
	c, err := haproxy.Parse([]haproxy.Source{{Name: "haproxy.cfg", Text: []byte(d.Input + "\n")}}, haproxy.Options{})
	if err != nil {
		return "", err
	}
	s.processes = slices.Clone(s.processes) // The view of before has the others.
	for i := range s.processes {
		s.processes[i].Old = true
	}
	if words.is("alone") {
		s.processes = nil
	}
	s.processes = append(s.processes, haproxy.Process{PID: words.number("pid", 0), Netns: 1, Config: c, Changed: words.is("changed")})
	s.rules.HAProxy = haproxy.NewView(s.processes)
	return s.print(s.tracker.SetRules(s.rules, s.now)), nil
}

func (s *scenario) userRules(lines string) (string, error) {
	s.rules.User = nil
	for line := range strings.Lines(lines) {
		name, args, err := datadriven.ParseLine(strings.TrimSpace(line))
		if err != nil {
			return "", err
		}
		words, err := newWords(args)
		if err != nil {
			return "", err
		}
		rule := limits.Rule{Name: name, FinTimeout: words.duration("fin_timeout", 0)}
		if port := words.number("local_port", 0); port != 0 {
			rule.Match.LocalPorts = []uint16{uint16(port)}
		}
		if name := words.text("process", ""); name != "" {
			rule.Match.Processes = []string{name}
		}
		if name := words.text("proxy", ""); name != "" {
			rule.Match.Proxies = []string{name}
		}
		if stage := words.text("stage", ""); stage != "" {
			if rule.Match.Stage, err = events.ParseStage(stage); err != nil {
				return "", err
			}
		}
		s.rules.User = append(s.rules.User, rule)
	}
	return s.print(s.tracker.SetRules(s.rules, s.now)), nil
}

func (s *scenario) begin() {
	s.cov = events.Coverage{Begin: s.now}
	s.tracker.BeginSnapshot(s.now)
}

func (s *scenario) observe(rows string) (string, error) {
	var sockets []events.Socket
	for line := range strings.Lines(rows) {
		kind, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		_, parsed, err := datadriven.ParseLine("row " + args)
		if err != nil {
			return "", err
		}
		words, err := newWords(parsed)
		if err != nil {
			return "", err
		}
		row, err := words.socket(kind, s.now)
		if err != nil {
			return "", err
		}
		if p := words.process(); row.Stage == events.Held && p.Known() && !words.is("known") {
			row.Inode, row.Process = uint64(1000+p.PID), events.Process{}
			s.owners[row.Inode] = p
		}
		sockets = append(sockets, row)
	}
	return s.print(s.tracker.Observe(sockets)), nil
}

func (s *scenario) end(words words) string {
	s.cov.End = s.now
	s.cov.Netns = map[uint32]events.NetnsCounters{}
	for netns := range strings.SplitSeq(words.text("covers", "1"), ",") {
		if n, err := strconv.ParseUint(netns, 10, 32); err == nil { // covers=none
			s.cov.Netns[uint32(n)] = events.NetnsCounters{TimeWaitOverflow: uint64(words.number("overflow", 0))}
		}
	}
	said := s.print(s.tracker.Own(func(inode uint64) events.Process { return s.owners[inode] }))
	return said + s.print(s.tracker.EndSnapshot(s.cov, func(uint32, events.Flow) bool { return words.is("reused") },
		func(p events.Process, inode uint64, _ events.Time) bool {
			return int(p.PID) != words.number("gone", 0) && (inode == 0 || int(inode) != words.number("given_up", 0))
		}))
}

// state prints the table and the counters.
func (s *scenario) state() string {
	var b strings.Builder
	var conns []Conn
	s.tracker.All(s.now, func(c *Conn) { conns = append(conns, *c) })
	slices.SortFunc(conns, func(a, b Conn) int { return int(a.Cookie) - int(b.Cookie) })
	for i := range conns {
		fmt.Fprintln(&b, describe(&conns[i]))
	}
	c := s.tracker.Counters()
	fmt.Fprintf(&b, "entered %d, left %d, shed %d, corrected %d; held %d, orphaned %d, minisock %d",
		c.Entered, c.Left, c.Shed, c.Corrected,
		s.tracker.Count(events.Held), s.tracker.Count(events.Orphaned), s.tracker.Count(events.Minisock))
	if at, ok := s.tracker.Next(); ok {
		// The wheel may ask for a call before the deadline.
		fmt.Fprintf(&b, "; a deadline by %v", s.deadline(at))
	}
	if s.tracker.WantsSnapshot() {
		b.WriteString("; wants a snapshot")
	}
	b.WriteString("\n")
	return b.String()
}

// deadline is the earliest in the table.
func (s *scenario) deadline(next events.Time) time.Duration {
	first := noDeadline
	s.tracker.slab.each(func(_ index, c *conn) {
		if c.timed {
			first = min(first, c.due)
		}
	})
	if next > first.Add(1<<tickBits) {
		return -1
	}
	return first.Sub(boot)
}

func (s *scenario) print(notices []Notice) string {
	var b strings.Builder
	for _, n := range sorted(notices) {
		fmt.Fprintf(&b, "%v %s %s\n", n.Time.Sub(boot), n.Kind, describe(&n.Conn))
	}
	return b.String()
}

// sorted puts the notices of one call in the order of the connections: the
// table has none.
func sorted(notices []Notice) []Notice {
	notices = slices.Clone(notices)
	slices.SortStableFunc(notices, func(a, b Notice) int { return int(a.Conn.Cookie) - int(b.Conn.Cookie) })
	return notices
}

func describe(c *Conn) string {
	exact := map[bool]string{true: "=", false: "<="}
	text := fmt.Sprintf("cookie=%d %s %s since%s%v", c.Cookie, c.Side, c.Stage, exact[c.SinceExact], c.Since.Sub(boot))
	if c.StagesKnown {
		text += fmt.Sprintf(" duration=%v held=%v orphaned=%v minisock=%v", c.Duration, c.Held, c.Orphaned, c.Minisock)
	} else {
		text += fmt.Sprintf(" duration=%v stages=unknown", c.Duration)
	}
	text += fmt.Sprintf(" limit=%v (%s)", c.Limit.Duration, c.Limit.Source())
	if c.Place != nil {
		text += fmt.Sprintf(" proxy=%s/%s", c.Place.Name(), c.Place.Server)
		if c.Place.Process.Old {
			text += " old"
		}
	}
	if c.Process.Known() {
		text += fmt.Sprintf(" process=%s[%d]", c.Process.Name(), c.Process.PID)
	}
	if c.ClosedBy != 0 {
		text += " by=" + c.ClosedBy.String()
	}
	if c.Overdue {
		text += " overdue"
	}
	if c.End != 0 {
		text += fmt.Sprintf(" end%s%s", exact[c.EndExact], c.End)
	}
	return text
}

// words are the arguments of a command or row.
type words map[string]string

var vocabulary = strings.Fields(`t held capacity silent cookie netns fin_timeout linger2 rto local remote pid comm accepted
	dead done rcvshut err covers overflow reused gone given_up inode timer entry last_ack handover port late changed alone local_port process proxy
	stage known`)

func newWords(args []datadriven.CmdArg) (words, error) {
	w := words{}
	for _, a := range args {
		if !slices.Contains(vocabulary, a.Key) {
			return nil, fmt.Errorf("no word %q", a.Key)
		}
		w[a.Key] = strings.Join(a.Vals, ",")
	}
	return w, nil
}

func (w words) is(key string) bool { _, ok := w[key]; return ok }

func (w words) text(key, otherwise string) string {
	if v, ok := w[key]; ok {
		return strings.Trim(v, "()")
	}
	return otherwise
}

func (w words) number(key string, otherwise int) int {
	n, err := strconv.Atoi(w.text(key, strconv.Itoa(otherwise)))
	if err != nil {
		panic(err)
	}
	return n
}

func (w words) duration(key string, otherwise time.Duration) time.Duration {
	d, err := time.ParseDuration(w.text(key, otherwise.String()))
	if err != nil {
		panic(err)
	}
	return d
}

func (w words) process() (p events.Process) {
	p.PID = uint32(w.number("pid", 0))
	copy(p.Comm[:], w.text("comm", ""))
	return p
}

func (w words) flow() events.Flow {
	cookie := w.number("cookie", 1)
	return events.Flow{
		Local:  events.EndpointFrom(netip.MustParseAddrPort(w.text("local", "192.0.2.1:80"))),
		Remote: events.EndpointFrom(netip.MustParseAddrPort(w.text("remote", fmt.Sprintf("198.51.100.7:%d", 40000+cookie)))),
	}
}

func (w words) timers() events.Timers {
	return events.Timers{
		FinTimeout: w.duration("fin_timeout", 60*time.Second),
		Linger2:    w.duration("linger2", 0),
		RTO:        w.duration("rto", 200*time.Millisecond),
	}
}

func (w words) event(now events.Time) events.Event {
	return events.Event{
		Time:     now,
		Cookie:   uint64(w.number("cookie", 1)),
		Netns:    uint32(w.number("netns", 1)),
		Flow:     w.flow(),
		Process:  w.process(),
		Timers:   w.timers(),
		Err:      uint16(w.number("err", 0)),
		SndShut:  true,
		RcvShut:  w.is("dead") || w.is("rcvshut"), // close() shuts both
		Dead:     w.is("dead"),
		Done:     w.is("done"),
		Accepted: w.is("accepted"),
	}
}

func (w words) socket(kind string, now events.Time) (events.Socket, error) {
	kinds := map[string]struct {
		state events.State
		stage events.Stage
	}{
		"held":      {events.FinWait2, events.Held},
		"orphan":    {events.FinWait2, events.Orphaned},
		"minisock":  {events.FinWait2, events.Minisock},
		"time_wait": {events.TimeWait, events.Minisock},
		"listen":    {events.Listen, 0},
	}
	k, ok := kinds[kind]
	if !ok {
		return events.Socket{}, fmt.Errorf("no row %q", kind)
	}
	s := events.Socket{
		Time:     now,
		Cookie:   uint64(w.number("cookie", 1)),
		Inode:    uint64(w.number("inode", 0)),
		Netns:    uint32(w.number("netns", 1)),
		Flow:     w.flow(),
		State:    k.state,
		Stage:    k.stage,
		Process:  w.process(),
		Timers:   w.timers(),
		Accepted: w.is("accepted"),
		LastAck:  w.duration("last_ack", 0),
		Entry:    w.duration("entry", -1),
		Timer:    w.duration("timer", 0),
		HasTimer: w.is("timer"),
	}
	switch k.stage {
	case 0:
		s.Flow.Local.Port = uint16(w.number("port", 80))
	case events.Minisock:
		if w.is("handover") {
			s.Handover = boot.Add(w.duration("handover", 0))
			break
		}
		s.Timers.Linger2, s.Timers.RTO, s.LastAck, s.Accepted = 0, 0, 0, false // it has none
	}
	return s, nil
}

// trusting finds everything as the events have it.
func trusting(uint32, events.Flow, uint64) bool { return true }
