// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// An alert keeps its name from version to version.
func TestID(t *testing.T) {
	l := Labels{Limit: "tcp_fin_timeout", Stage: "held", Side: "inbound", Port: 443, Peer: "198.51.100.7", Process: "nginx"}
	if id, want := l.id(), "05c390da93f31c85"; id != want {
		t.Errorf("the ID is %s, not %s", id, want)
	}
	ids := map[string]Labels{}
	for _, l := range []Labels{
		l, {}, {Limit: "a"}, {Stage: "a"}, {Side: "a"}, {Proxy: "a"}, {Server: "a"}, {Port: 1}, {Peer: "a"}, {Process: "a"}, {Netns: "a"},
		{Proxy: "ab"}, {Proxy: "a", Server: "b"}, {Proxy: "a\"\nserver=\"b"},
	} {
		if other, twice := ids[l.id()]; twice {
			t.Errorf("%+v and %+v have the same ID", l, other)
		}
		ids[l.id()] = l
	}
}

// A storm is one alert, and one change, with the oldest of it.
func TestStorm(t *testing.T) {
	for _, n := range []int{10_000, 100_000} {
		for _, peers := range []int{1, n} {
			conns := pile(t, n, peers)
			changes := NewBook(DefaultSettings(), new(clock).names(), hostns).Evaluate(boot, walk(conns))
			if len(changes) != 1 {
				t.Fatalf("%d changes of %d connections from %d peers", len(changes), n, peers)
			}
			c := changes[0]
			if c.Alert.Event != Fired || c.Alert.Count != n || len(c.Conns) != defaultBounds.sample {
				t.Errorf("%s with %d connections, and %d handed out, of %d", c.Alert.Event, c.Alert.Count, len(c.Conns), n)
			}
			for i := range c.Conns {
				if want := time.Hour + time.Duration(n-1-i)*time.Millisecond; c.Conns[i].Duration != want {
					t.Fatalf("number %d of those handed out is %v old, not %v", i, c.Conns[i].Duration, want)
				}
			}
		}
	}
}

// In the steady state nothing is allocated of connections, however many.
func TestEvaluateAllocatesLittle(t *testing.T) {
	for _, peers := range []int{1, 1000} {
		conns := pile(t, 20_000, peers)
		book := NewBook(DefaultSettings(), new(clock).names(), hostns)
		book.Evaluate(boot, walk(conns))
		n := testing.AllocsPerRun(5, func() { book.Evaluate(boot, walk(conns)) })
		t.Logf("%v allocations with %d peers", n, peers)
		if n > 600 {
			t.Errorf("%v allocations for %d connections from %d peers", n, len(conns), peers)
		}
	}
}

// What others name can neither leave its place in a sentence nor make labels
// that are no text; and different names stay different where they can.
func TestHostileNames(t *testing.T) {
	hostile := []string{"a\nb", "\x1b[31mred", "\xff\xfe", "x, the oldest", `"quoted"`, "by haproxy", "\u202eevil", "\ufffd", "tab\tx", "`id`", "💣", "<b>", " "}
	for _, s := range hostile {
		names := new(clock).names()
		names.Netns = func(uint32) string { return s }
		book := NewBook(Settings{MinConnections: 1}, names, hostns)
		c := track.Conn{Netns: bluens, Side: events.Inbound, Stage: events.Held, Process: events.Process{PID: 1}}
		copy(c.Process.Comm[:], s)
		c.Place = &haproxy.Place{Process: &haproxy.Process{}, Server: s, Proxies: []*haproxy.Proxy{{Name: s, Kind: haproxy.Frontend}}}
		changes := book.Evaluate(boot, walk([]track.Conn{c}))
		if len(changes) != 1 {
			t.Fatalf("%q: %d changes", s, len(changes))
		}
		a := changes[0].Alert
		for _, text := range []string{a.Summary, a.Labels.Proxy, a.Labels.Server, a.Labels.Process, a.Labels.Netns} {
			if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
				t.Errorf("%q: %q cannot be printed", s, text)
			}
		}
		quoted := strings.NewReplacer(`\"`, "").Replace(a.Summary) // quotes within
		if n := strings.Count(quoted, `"`); n != 8 {
			t.Errorf("%q: the names are not quoted in %s", s, a.Summary)
		}
		// It is found again after a restart.
		saved := book.Save()
		book = NewBook(Settings{MinConnections: 1}, names, hostns)
		if err := book.Restore(saved, boot); err != nil {
			t.Errorf("%q: %v", s, err)
		}
		if changes := book.Evaluate(boot, walk([]track.Conn{c})); len(changes) != 1 || changes[0].Alert.Event != Updated {
			t.Errorf("%q: after a restart %d changes", s, len(changes))
		}
	}
}

// The cache of keys is bounded while it is filled, and right nevertheless.
func TestKeysAreBounded(t *testing.T) {
	book := NewBook(DefaultSettings(), new(clock).names(), hostns)
	book.bounds.keys = 3
	conns := pile(t, 200, 1)
	for i := range conns {
		conns[i].Process.Comm = [16]byte{'a' + byte(i%20)}
	}
	changes := book.Evaluate(boot, func(fn func(*track.Conn)) {
		for i := range conns {
			if fn(&conns[i]); len(book.byKey) > 3 {
				t.Fatalf("%d keys", len(book.byKey))
			}
		}
	})
	if len(changes) != 20 {
		t.Errorf("%d changes, not 20", len(changes))
	}
}

// The oldest connection is the same in whichever order they come, alone and merged.
func TestOldest(t *testing.T) {
	conns := pile(t, 3, 1)
	for i, d := range []time.Duration{2, 2, 1} {
		conns[i].Duration = d * time.Second
	}
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		var all, first, rest tally
		for n, i := range order {
			all.add(&conns[i])
			if n == 0 {
				first.add(&conns[i])
			} else {
				rest.add(&conns[i])
			}
		}
		first.merge(&rest)
		if all.cookie != conns[0].Cookie || all.count != 3 || first != all {
			t.Errorf("in the order %v: %+v, merged %+v", order, all, first)
		}
	}
}

// What the caller has set on an alert stays there.
func TestExamplesAreKept(t *testing.T) {
	book := NewBook(DefaultSettings(), new(clock).names(), hostns)
	conns := pile(t, 20, 1)
	book.Evaluate(boot, walk(conns))[0].Alert.Examples = []report.Record{{Cookie: "a"}}
	book.Evaluate(boot.Add(time.Second), walk(conns[:19]))
	if a := book.Active()[0]; a.Count != 19 || len(a.Examples) != 1 {
		t.Errorf("%d connections and %d examples", a.Count, len(a.Examples))
	}
}

// saved is a state with one alert, changed.
func saved(change func(*SavedAlert)) Saved {
	a := SavedAlert{Labels: Labels{Limit: "tcp_fin_timeout", Stage: "held", Side: "inbound", Port: 443, Peer: "198.51.100.7"},
		StartsAt: epoch, Peak: 12}
	change(&a)
	return Saved{Version: savedVersion, Alerts: []SavedAlert{a}}
}

func TestRestoreRefuses(t *testing.T) {
	same := func(*SavedAlert) {}
	twice := saved(same)
	twice.Alerts = append(twice.Alerts, twice.Alerts[0])
	many := Saved{Version: savedVersion}
	for i := range 1000 {
		many.Alerts = append(many.Alerts, saved(func(a *SavedAlert) { a.Labels.Port = uint16(i) }).Alerts...)
	}
	peers := Saved{Version: savedVersion}
	for i := range 10_000 {
		peers.Alerts = append(peers.Alerts, saved(func(a *SavedAlert) { a.Labels.Peer = fmt.Sprintf("10.0.%d.%d", i/256, i%256) }).Alerts...)
	}
	for _, test := range []struct {
		name  string
		saved Saved
		err   string // a part of it
		left  int
	}{
		{"fine", saved(same), "", 1},
		{"others", saved(func(a *SavedAlert) { a.Labels.Peer = Others }), "", 1},
		{"overflow", saved(func(a *SavedAlert) { a.Labels = overflow; a.Labels.Peer = Others }), "", 1},
		{"ipv6", saved(func(a *SavedAlert) { a.Labels.Peer = "2001:db8::/64" }), "", 1},
		{"nothing", Saved{}, "of version 0, not 1", 0},
		{"version", Saved{Version: 2, Alerts: saved(same).Alerts}, "of version 2, not 1", 0},
		{"stage", saved(func(a *SavedAlert) { a.Labels.Stage = "other" }), `stage: "other" is none of`, 0},
		{"side", saved(func(a *SavedAlert) { a.Labels.Side = "" }), `side: "" is none of`, 0},
		{"peer", saved(func(a *SavedAlert) { a.Labels.Peer = "example.com" }), `"example.com" is neither`, 0},
		{"host of a /64", saved(func(a *SavedAlert) { a.Labels.Peer = "2001:db8::1/64" }), `is neither`, 0},
		{"block", saved(func(a *SavedAlert) { a.Labels.Peer = "10.0.0.0/8" }), `is neither`, 0},
		{"mapped", saved(func(a *SavedAlert) { a.Labels.Peer = "::ffff:10.0.0.1" }), `is neither`, 0},
		{"control characters", saved(func(a *SavedAlert) { a.Labels.Process = "\x1b[31m" }), `"\x1b[31m" is no label`, 0},
		{"twice", twice, "saved alert 2: there is one with the same labels", 1},
		{"many families", many, "more than there can be", 255},
		{"many peers", peers, "more than there can be", 256 * 11},
	} {
		t.Run(test.name, func(t *testing.T) {
			book := NewBook(DefaultSettings(), new(clock).names(), hostns)
			err := book.Restore(test.saved, boot)
			switch {
			case test.err == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
				t.Errorf("the error is %v, without %s", err, test.err)
			case err != nil && strings.Count(err.Error(), "\n") > refusedSaid:
				t.Errorf("the error has %d lines", strings.Count(err.Error(), "\n"))
			}
			if n := len(book.Active()); n != test.left {
				t.Errorf("%d alerts, not %d", n, test.left)
			}
		})
	}
}

// FuzzRestore: whatever the file says, the alerts are few, begin and end in the
// past, and all of them resolve.
func FuzzRestore(f *testing.F) {
	for _, s := range []Saved{
		{}, saved(func(*SavedAlert) {}), saved(func(a *SavedAlert) { a.Peak = -1 }),
		saved(func(a *SavedAlert) { a.StartsAt, a.EndsAt = time.Time{}, new(time.Time) }),
		saved(func(a *SavedAlert) { a.StartsAt, a.EndsAt = epoch.Add(-time.Hour), new(time.Time) }),
		saved(func(a *SavedAlert) { a.StartsAt = epoch.Add(time.Hour) }),
		saved(func(a *SavedAlert) { later := epoch.Add(time.Hour); a.EndsAt = &later }),
		saved(func(a *SavedAlert) { a.LimitSec, a.LimitSource = -1, "\x1b" }),
	} {
		text, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	conns := pile(f, 50, 5)
	f.Fuzz(func(t *testing.T, text []byte) {
		var s Saved
		if json.Unmarshal(text, &s) != nil {
			return
		}
		book := NewBook(DefaultSettings(), new(clock).names(), hostns)
		err := book.Restore(s, boot)
		restored := len(book.Active())
		if restored > len(s.Alerts) || err == nil && restored < len(s.Alerts) {
			t.Fatalf("%d of %d alerts are restored: %v", restored, len(s.Alerts), err)
		}
		text, err = json.Marshal(book.Active())
		if err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		for _, a := range book.Active() {
			if a.StartsAt.After(epoch) || a.Peak < 0 || a.LimitSec < 0 {
				t.Fatalf("restored: %s", text)
			}
		}
		book.Evaluate(boot, walk(conns))
		changes := book.Evaluate(boot.Add(book.settings.ResolveAfter), walk(nil))
		changes = append(changes, book.Evaluate(boot.Add(2*book.settings.ResolveAfter), walk(nil))...)
		for _, c := range changes {
			if a := c.Alert; a.Event != Resolved || a.EndsAt.Before(a.StartsAt) || a.EndsAt.After(epoch.Add(2*book.settings.ResolveAfter)) {
				t.Fatalf("resolved: %+v", a)
			}
		}
		if n := len(book.Active()); n != 0 {
			t.Fatalf("%d alerts are left", n)
		}
	})
}
