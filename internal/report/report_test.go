// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/json"
	"io"
	"iter"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

func TestDuration(t *testing.T) {
	for _, test := range []struct {
		d    time.Duration
		want string
	}{
		{0, "0µs"},
		{350 * time.Microsecond, "350µs"},
		{999_999, "999µs"},
		{time.Millisecond, "1ms"},
		{999*time.Millisecond + 999*time.Microsecond, "999ms"},
		{time.Second, "1.0s"},
		{1449 * time.Millisecond, "1.4s"},
		{59*time.Second + 999*time.Millisecond, "1m00s"}, // never 60.0s
		{time.Minute, "1m00s"},
		{2*time.Minute + 5*time.Second, "2m05s"},
		{time.Hour - 1, "59m59s"},
		{time.Hour, "1h00m"},
		{2*time.Hour + 13*time.Minute, "2h13m"},
		{24*time.Hour - 1, "23h59m"},
		{24 * time.Hour, "1d00h"},
		{76 * time.Hour, "3d04h"},
		{1000 * 24 * time.Hour, "1000d00h"},
	} {
		if got := Duration(test.d); got != test.want {
			t.Errorf("Duration(%d) = %q, want %q", test.d, got, test.want)
		}
	}
}

// A process may call itself anything.
func TestClean(t *testing.T) {
	for _, test := range []struct{ name, in, want string }{
		{"plain", "haproxy", "haproxy"},
		{"shell", `"; rm -rf /`, `"; rm -rf /`}, // harmless to a terminal
		{"newline", "a\nb\r\tc", "a?b??c"},
		{"escape sequence", "\x1b[2J\x1b]0;x\a", "?[2J?]0;x?"},
		{"C1 control", "a\u009b31m", "a?31m"},
		{"UTF-8", "söketé", "söketé"},
		{"UTF-8 cut in half", "sök\xc3", "sök?"},
		{"not UTF-8", "\xff\xfe", "??"},
		{"replacement character", "\ufffd", "?"},
		{"turned round", "a\u202eb\u200b", "a?b?"},
		{"wide space", "a\u3000b", "a?b"},
		{"empty", "", ""},
	} {
		if got := Clean(test.in); got != test.want {
			t.Errorf("%s: Clean(%q) = %q, want %q", test.name, test.in, got, test.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	for _, s := range []string{"haproxy", `"; rm -rf /`, "a\nb", "\x1b[31m", "sök\xc3", "\u202e", "\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		clean := Clean(s)
		if !utf8.ValidString(clean) {
			t.Fatalf("%q is not UTF-8", clean)
		}
		for _, r := range clean {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q has %U", clean, r)
			}
		}
		if utf8.RuneCountInString(clean) != utf8.RuneCountInString(s) {
			t.Fatalf("%q became %q", s, clean)
		}
		if Clean(clean) != clean {
			t.Fatalf("%q became %q, and then %q", s, clean, Clean(clean))
		}
	})
}

const start = events.Time(time.Hour)

var names = &Names{
	Wall: func(t events.Time) time.Time {
		return time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC).Add(t.Sub(start))
	},
	Cgroup: func(id uint64) string {
		if id == 42 {
			return "/system.slice/haproxy.service"
		}
		return ""
	},
	Netns: func(inode uint32) string {
		if inode == 4026532245 {
			return "lb"
		}
		return ""
	},
}

func proc(pid uint32, comm string) (p events.Process) {
	p.PID, p.Cgroup = pid, 42
	copy(p.Comm[:], comm)
	return p
}

func flow(local, remote string) events.Flow {
	return events.Flow{
		Local:  events.EndpointFrom(netip.MustParseAddrPort(local)),
		Remote: events.EndpointFrom(netip.MustParseAddrPort(remote)),
	}
}

var timers = events.Timers{FinTimeout: 60 * time.Second, RTO: 200 * time.Millisecond}

func limit(stage events.Stage) limits.Limit { return new(limits.Rules).For(stage, timers, 0, 0) }

// conns are one of each sort.
func conns() []track.Conn {
	return []track.Conn{
		{
			Cookie: 0x1a, Netns: 4026532245, Flow: flow("10.0.0.1:443", "203.0.113.77:51234"), Side: events.Inbound,
			Stage: events.Held, Process: proc(1234, "haproxy"), ClosedBy: events.ByShutdown,
			Since: start.Add(-133 * time.Minute), SinceExact: true, Duration: 133 * time.Minute,
			Held: 133 * time.Minute, StagesKnown: true, Limit: limit(events.Held), Overdue: true,
		},
		{
			Cookie: 0x2b, Netns: 4026531840, Flow: flow("[2001:db8:1234:5678:9abc:def0:1234:5678]:443", "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535"),
			Side: events.Inbound, Stage: events.Minisock, ClosedBy: events.ByClose,
			Since: start.Add(-12 * time.Second), Duration: 12 * time.Second, Limit: limit(events.Minisock),
		},
		{
			Cookie: 0x3c, Netns: 4026531840, Flow: flow("10.0.0.1:40000", "10.9.8.7:8080"), Side: events.Outbound,
			Stage: events.Orphaned, Process: proc(7, "ev\x1b[2Jil\xc3"), ClosedBy: events.ByClose,
			Since: start.Add(-1400 * time.Millisecond), SinceExact: true, Duration: 1400 * time.Millisecond,
			Held: time.Second, Orphaned: 400 * time.Millisecond, StagesKnown: true, Limit: limit(events.Orphaned),
		},
	}
}

var widths = map[string]int{"60": 60, "80": 80, "120": 120, "unlimited": 0}

func each(conns []track.Conn) iter.Seq[*track.Conn] {
	return func(yield func(*track.Conn) bool) {
		for i := range conns {
			if !yield(&conns[i]) {
				return
			}
		}
	}
}

func list(w io.Writer, conns []track.Conn, style Style) error {
	l := NewListing(style)
	for c := range each(conns) {
		l.Add(c)
	}
	return l.Print(w, each(conns))
}

// The narrower, the fewer columns; but the peer is what one looks for, and never
// cut, however long.
func TestList(t *testing.T) {
	for name, width := range widths {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := list(&b, conns(), Style{Width: width}); err != nil {
				t.Fatal(err)
			}
			golden.Check(t, "testdata/list-"+name+".txt", b.String())
			whole(t, b.String())
		})
	}
}

// Addresses that leave room are laid out within the width.
func TestListFits(t *testing.T) {
	short := []track.Conn{conns()[0], conns()[2]}
	for name, width := range widths {
		var b strings.Builder
		if err := list(&b, short, Style{Width: width}); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(b.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); width > 0 && n > width {
				t.Errorf("width %s: %d cells: %s", name, n, line)
			}
		}
	}
}

func whole(t *testing.T, text string) {
	t.Helper()
	for _, c := range conns() {
		if !strings.Contains(text, c.Flow.Remote.String()) {
			t.Errorf("%s is not whole in:\n%s", c.Flow.Remote, text)
		}
	}
	if strings.Contains(text, "\x1b") || !utf8.ValidString(text) {
		t.Errorf("a process's name went through as it was:\n%q", text)
	}
}

func notices() []track.Notice {
	c := conns()
	overdue := track.Notice{Kind: track.Overdue, Time: start, Conn: c[0]}
	opened := track.Notice{Kind: track.Opened, Time: start, Conn: c[1]}
	moved := track.Notice{Kind: track.Moved, Time: start.Add(time.Second), Conn: c[2]}
	closed := track.Notice{Kind: track.Closed, Time: start.Add(2 * time.Second), Conn: c[2]}
	closed.Conn.End, closed.Conn.EndExact = events.PeerFIN, true
	unseen := track.Notice{Kind: track.Closed, Time: start.Add(3 * time.Second), Conn: c[1]}
	unseen.Conn.End = events.Unseen
	return []track.Notice{overdue, opened, moved, closed, unseen}
}

func TestLive(t *testing.T) {
	for name, width := range widths {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			live := NewLive(&b, Style{Width: width}, names, false)
			if err := live.Header(); err != nil {
				t.Fatal(err)
			}
			for _, n := range notices() {
				if err := live.Notice(&n); err != nil {
					t.Fatal(err)
				}
			}
			golden.Check(t, "testdata/live-"+name+".txt", b.String())
			whole(t, b.String())
		})
	}
}

// Colours only where they are asked for, and always ended.
func TestColor(t *testing.T) {
	var b strings.Builder
	if err := list(&b, conns(), Style{Color: true}); err != nil {
		t.Fatal(err)
	}
	if red := strings.Count(b.String(), "\x1b[31m"); red != 1 {
		t.Errorf("%d red lines, want the overdue one:\n%q", red, b.String())
	}
	if on, off := strings.Count(b.String(), "\x1b["), strings.Count(b.String(), "\x1b[0m"); on != 2*off {
		t.Errorf("%d sequences, %d of them ends", on, off)
	}
}

func TestTransition(t *testing.T) {
	var b strings.Builder
	live := NewLive(&b, Style{}, names, false)
	f := flow("10.0.0.1:443", "203.0.113.77:51234")
	for _, was := range []time.Duration{-1, 0, 1400 * time.Millisecond} {
		if err := live.Transition(start, f, "ESTABLISHED", "FIN_WAIT1", was, proc(7, "ev\nil")); err != nil {
			t.Fatal(err)
		}
	}
	golden.Check(t, "testdata/transitions.txt", b.String())
}

// The names of the fields are a contract with scripts; what is not known is absent.
func TestRecord(t *testing.T) {
	var b strings.Builder
	out := json.NewEncoder(&b)
	out.SetIndent("", "  ")
	for _, n := range notices() {
		if err := out.Encode(NewRecord(n.Kind.String(), n.Time, &n.Conn, names)); err != nil {
			t.Fatal(err)
		}
	}
	c := conns()[0]
	if err := out.Encode(NewRecord("", start, &c, names)); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/records.json", b.String())
}

func TestTransitionRecord(t *testing.T) {
	var b strings.Builder
	out := json.NewEncoder(&b)
	out.SetIndent("", "  ")
	f := flow("10.0.0.1:443", "203.0.113.77:51234")
	for _, record := range []Transition{
		NewTransition(start, 0x1a, 4026531840, f, "ESTABLISHED", "FIN_WAIT1", 1500*time.Millisecond, proc(7, "web"), names),
		NewTransition(start, 0x1a, 4026531840, f, "FIN_WAIT1", "FIN_WAIT2", 0, events.Process{}, names),
		NewTransition(start, 0x1a, 4026531840, f, "FIN_WAIT1", "FIN_WAIT2", -1, events.Process{}, names),
	} {
		if err := out.Encode(record); err != nil {
			t.Fatal(err)
		}
	}
	golden.Check(t, "testdata/transitions.json", b.String())
}

func TestGroups(t *testing.T) {
	// Two of one peer: the one of which less is known may be the older.
	bound := conns()[0]
	bound.Cookie, bound.SinceExact, bound.Overdue, bound.Duration = 9, false, false, time.Minute
	all := append(conns(), bound)
	var b strings.Builder
	for _, keys := range [][]string{{"peer"}, {"port"}, {"process", "stage"}} {
		if err := Groups(&b, keys, GroupBy(each(all), keys), Style{}); err != nil {
			t.Fatal(err)
		}
		b.WriteString("\n")
	}
	out := json.NewEncoder(&b)
	for _, g := range GroupBy(each(all), []string{"peer"}) {
		if err := out.Encode(GroupRecord([]string{"peer"}, g)); err != nil {
			t.Fatal(err)
		}
	}
	golden.Check(t, "testdata/groups.txt", b.String())
}

func TestSortOldest(t *testing.T) {
	c := conns()
	same := c[1]
	same.Cookie = 1
	c = append(c, same)
	SortOldest(c)
	var got []uint64
	for i := range c {
		got = append(got, c[i].Cookie)
	}
	if diff := cmp.Diff([]uint64{0x1a, 1, 0x2b, 0x3c}, got); diff != "" {
		t.Error(diff)
	}
	for n := range 100 {
		many := make([]track.Conn, n)
		for i := range many {
			many[i] = track.Conn{Cookie: uint64(i), Duration: time.Duration(rand.IntN(1 + n/2))}
		}
		want := slices.Clone(many)
		slices.SortFunc(want, func(a, b track.Conn) int { return oldestFirst(&a, &b) })
		if SortOldest(many); !slices.Equal(many, want) {
			t.Fatalf("%d are sorted into %+v", n, many)
		}
	}
}

func TestSummary(t *testing.T) {
	totals := Totals{Traced: 90 * time.Second, Remaining: 2, Corrected: 3, Shed: 4, Instants: 1, Unfollowed: 7, Lost: 5, Missed: 6}
	for _, test := range []struct {
		name    string
		notices []track.Notice
		totals  Totals
	}{
		{"summary", notices(), totals},
		{"summary-empty", nil, Totals{Traced: 1500 * time.Millisecond}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := NewSummary()
			for _, n := range test.notices {
				s.Add(&n)
			}
			var b strings.Builder
			if err := s.Print(&b, test.totals, Style{}); err != nil {
				t.Fatal(err)
			}
			golden.Check(t, "testdata/"+test.name+".txt", b.String())
			b.Reset()
			out := json.NewEncoder(&b)
			out.SetIndent("", "  ")
			if err := out.Encode(s.Record(names.Wall(start), test.totals)); err != nil {
				t.Fatal(err)
			}
			golden.Check(t, "testdata/"+test.name+".json", b.String())
		})
	}
}

// The tallies of peers are bounded, and the worst stay.
func TestSummaryIsBounded(t *testing.T) {
	s := NewSummary()
	worst := conns()[0]
	s.AddConn(&worst)
	for i := range 3 * peersKept {
		c := track.Conn{Duration: time.Second, Flow: worst.Flow}
		c.Flow.Remote.Addr[15], c.Flow.Remote.Addr[14], c.Flow.Remote.Addr[13] = byte(i), byte(i>>8), byte(i>>16)
		s.AddConn(&c)
		if len(s.peers) > peersKept {
			t.Fatalf("%d peers are kept", len(s.peers))
		}
	}
	if s.peers[worst.Flow.Remote.IP()] == nil {
		t.Error("the worst peer was dropped")
	}
}
