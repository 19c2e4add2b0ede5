// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"cmp"
	"encoding/json"
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
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// TestScenarios runs testdata/scenarios/*.txt: a command, "----", and what it
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

const (
	// boot is how long the machine is up when a scenario's clock starts.
	boot    = events.Time(24 * time.Hour)
	hostns  = 1
	bluens  = 2
	plainns = 3 // has no name
)

// epoch is what the wall clock shows at boot.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// A clock is the wall clock, which may be set.
type clock struct{ ahead time.Duration }

func (c *clock) names() *report.Names {
	return &report.Names{
		Wall:   func(t events.Time) time.Time { return epoch.Add(t.Sub(boot) + c.ahead) },
		Cgroup: func(uint64) string { return "" },
		Netns:  func(inode uint32) string { return map[uint32]string{hostns: "init", bluens: "blue"}[inode] },
	}
}

// A scenario is a book and the connections that are overdue.
type scenario struct {
	book      *Book
	settings  Settings
	clock     clock
	now       events.Time
	rules     limits.Rules
	processes []haproxy.Process
	conns     []testConn
	cookie    uint64
}

// testConn is a connection whose place and limit are found anew each time.
type testConn struct {
	tag    string
	since  events.Time
	timers events.Timers
	conn   track.Conn
}

func newScenario() *scenario {
	s := &scenario{now: boot, settings: DefaultSettings()}
	s.book = NewBook(s.settings, s.clock.names(), hostns)
	return s
}

// run runs one command. Durations have units; every time counts from the start.
//
//	settings [min=10] [share=0.1] [peers=10] [resolve=2m] [update=1m] [repeat=4h]
//	bounds   [families=3] [counters=4] [keys=5] [sample=10] [samples=20]
//	haproxy  pid=7 [alone]              one runs with the configuration below; those before are old, or gone
//	rule     name=api fin_timeout=5s port=443
//	add      tag=a n=42 CONNECTION      so many are overdue
//	remove   [tag=a] [n=3]              the last n of them, or all, are no more
//	eval     t=1m                       what changes
//	examples t=1m                       the same, with the connections
//	restart  t=2m [settings]            a new book with what was saved
//	wall     ahead=-1h                  the wall clock is set
//	active, next, counts, save
//
// CONNECTION is [local=192.0.2.1:443] [remote=198.51.100.7] [peers=5: one after another] [outbound] [stage=held] [age=1m]
// [atleast] [pid=7] [comm=haproxy] [netns=1] [fin_timeout=60s] [rto=200ms].
func (s *scenario) run(d *datadriven.TestData) (string, error) {
	w := words{}
	for _, a := range d.CmdArgs {
		w[a.Key] = strings.Join(a.Vals, ",")
	}
	if t, ok := w["t"]; ok {
		after, err := time.ParseDuration(t)
		if err != nil || boot.Add(after) < s.now {
			return "", fmt.Errorf("the clock does not go to %q: %w", t, err)
		}
		s.now = boot.Add(after)
	}
	switch d.Cmd {
	case "settings":
		s.settings.MinConnections = w.number("min", s.settings.MinConnections)
		s.settings.PeersPerGroup = w.number("peers", s.settings.PeersPerGroup)
		s.settings.ResolveAfter = w.duration("resolve", s.settings.ResolveAfter)
		s.settings.UpdateEvery = w.duration("update", s.settings.UpdateEvery)
		s.settings.RepeatEvery = w.duration("repeat", s.settings.RepeatEvery)
		if share, ok := w["share"]; ok {
			var err error
			if s.settings.MaxconnShare, err = strconv.ParseFloat(share, 64); err != nil {
				return "", err
			}
		}
		s.book.SetSettings(s.settings)
	case "bounds":
		b := &s.book.bounds
		b.families = w.number("families", b.families)
		b.counters = w.number("counters", b.counters)
		b.keys = w.number("keys", b.keys)
		b.sample = w.number("sample", b.sample)
		b.samples = w.number("samples", b.samples)
	case "haproxy":
		return "", s.haproxy(d.Input, w)
	case "rule":
		s.rules.User = append(s.rules.User, limits.Rule{Name: w.text("name", ""), FinTimeout: w.duration("fin_timeout", time.Second),
			Match: limits.Match{LocalPorts: []uint16{uint16(w.number("port", 443))}}})
	case "add":
		return "", s.add(w)
	case "remove":
		n := w.number("n", len(s.conns))
		for i := len(s.conns) - 1; i >= 0 && n > 0; i-- {
			if tag, some := w["tag"]; !some || s.conns[i].tag == tag {
				s.conns = slices.Delete(s.conns, i, i+1)
				n--
			}
		}
	case "wall":
		s.clock.ahead = w.duration("ahead", 0)
	case "eval", "examples":
		return s.evaluate(d.Cmd == "examples"), nil
	case "active":
		var b strings.Builder
		for _, a := range s.book.Active() {
			s.print(&b, a)
		}
		return b.String(), nil
	case "next":
		if at, ok := s.book.Next(); ok {
			return at.Sub(boot).String() + "\n", nil
		}
		return "never\n", nil
	case "counts":
		return fmt.Sprintf("%+v\n", s.book.Counts()), nil
	case "save":
		text, err := json.MarshalIndent(s.book.Save(), "", " ")
		return string(text) + "\n", err
	case "restart":
		text, err := json.Marshal(s.book.Save())
		if err != nil {
			return "", err
		}
		var saved Saved
		if err := json.Unmarshal(text, &saved); err != nil {
			return "", err
		}
		s.book = NewBook(s.settings, s.clock.names(), hostns)
		if err := s.book.Restore(saved, s.now); err != nil {
			return err.Error() + "\n", nil
		}
	default:
		return "", fmt.Errorf("no command %q", d.Cmd)
	}
	return "", nil
}

func (s *scenario) haproxy(text string, w words) error {
	c, err := haproxy.Parse([]haproxy.Source{{Name: "haproxy.cfg", Text: []byte(text + "\n")}}, haproxy.Options{})
	if err != nil {
		return err
	}
	for i := range s.processes {
		s.processes[i].Old = true
	}
	if _, alone := w["alone"]; alone {
		s.processes = nil
	}
	s.processes = append(s.processes, haproxy.Process{PID: w.number("pid", 0), Netns: hostns, Config: c})
	s.rules.HAProxy = haproxy.NewView(slices.Clone(s.processes))
	return nil
}

func (s *scenario) add(w words) error {
	peers := w.number("peers", 1)
	remote, err := netip.ParseAddr(w.text("remote", "198.51.100.7"))
	if err != nil {
		return err
	}
	stage, err := events.ParseStage(w.text("stage", "held"))
	if err != nil {
		return err
	}
	local, err := netip.ParseAddrPort(w.text("local", "192.0.2.1:443"))
	if err != nil {
		return err
	}
	c := testConn{tag: w.text("tag", ""), since: s.now.Add(-w.duration("age", time.Minute)), timers: events.Timers{
		FinTimeout: w.duration("fin_timeout", time.Minute), RTO: w.duration("rto", 200*time.Millisecond)}}
	c.conn.Netns = uint32(w.number("netns", hostns))
	c.conn.Stage = stage
	c.conn.Process.PID = uint32(w.number("pid", 0))
	copy(c.conn.Process.Comm[:], w.text("comm", ""))
	_, atLeast := w["atleast"]
	c.conn.SinceExact = !atLeast
	addrs := []netip.Addr{remote}
	for len(addrs) < peers {
		addrs = append(addrs, addrs[len(addrs)-1].Next())
	}
	for i := range w.number("n", 1) {
		s.cookie++
		c.conn.Cookie = s.cookie
		far := netip.AddrPortFrom(addrs[i%peers], uint16(20000+s.cookie))
		c.conn.Side = events.Inbound
		c.conn.Flow = events.Flow{Local: events.EndpointFrom(local), Remote: events.EndpointFrom(far)}
		if _, outbound := w["outbound"]; outbound {
			c.conn.Side = events.Outbound
			c.conn.Flow.Local.Port, c.conn.Flow.Remote.Port = far.Port(), local.Port()
		}
		s.conns = append(s.conns, c)
	}
	return nil
}

// overdue is as the tracker's.
func (s *scenario) overdue(fn func(*track.Conn)) {
	for i := range s.conns {
		t := &s.conns[i]
		c := t.conn
		place := s.rules.Place(c.Netns, c.Flow, c.Side, c.Process.PID)
		c.Place = nil
		if place != 0 {
			c.Place = s.rules.HAProxy.Place(place)
		}
		rule := s.rules.Choose(&limits.Subject{Netns: c.Netns, Flow: &c.Flow, Side: c.Side, Stage: c.Stage, Process: &c.Process, Place: c.Place})
		c.Limit = s.rules.For(c.Stage, t.timers, place, rule)
		c.Since, c.Duration, c.Overdue = t.since, s.now.Sub(t.since), true
		fn(&c)
	}
}

func (s *scenario) evaluate(examples bool) string {
	var b strings.Builder
	for _, c := range s.book.Evaluate(s.now, s.overdue) {
		s.print(&b, c.Alert)
		if examples {
			fmt.Fprintf(&b, "  %d connections:", len(c.Conns))
			for i := range c.Conns {
				fmt.Fprintf(&b, " %v from %v", c.Conns[i].Duration, c.Conns[i].Flow.Remote.IP())
			}
			b.WriteString("\n")
		}
	}
	return b.String()
}

func (s *scenario) print(b *strings.Builder, a *Alert) {
	at := func(t time.Time) time.Duration { return t.Sub(epoch) }
	fmt.Fprintf(b, "%v %s %s %d, peak %d, since %v", at(a.UpdatedAt), a.Event, text(a.Labels), a.Count, a.Peak, at(a.StartsAt))
	if !a.Firing() {
		fmt.Fprintf(b, " until %v", at(*a.EndsAt))
	}
	if a.Maxconn > 0 {
		fmt.Fprintf(b, ", maxconn %d", a.Maxconn)
	}
	fmt.Fprintf(b, "\n  %s\n", a.Summary)
}

// text is labels in one line.
func text(l Labels) string {
	j, err := json.Marshal(l)
	if err != nil {
		panic(err)
	}
	return strings.NewReplacer(`"`, "", `\`, "").Replace(string(j))
}

// words are the arguments of a command.
type words map[string]string

func (w words) text(key, otherwise string) string { return cmp.Or(w[key], otherwise) }

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
