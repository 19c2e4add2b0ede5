// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// model says the same as a Book, slowly: it makes the labels of each connection,
// and counts everything it can think of.
type model struct {
	settings Settings
	firing   map[Labels]*modelAlert
}

type modelAlert struct {
	starts, notified, low, ended events.Time // low 0: it is not
	count, peak                  int
	restored                     bool
}

// said is a change in short.
type said struct {
	Event        Event
	Labels       Labels
	Count, Peak  int
	Starts, Ends time.Duration // since boot
	Conns        []uint64      // cookies, oldest first
}

func labelsOf(c *track.Conn) Labels {
	peer := c.Flow.Remote.IP()
	l := Labels{Limit: c.Limit.Kind(), Stage: c.Stage.String(), Side: c.Side.String(), Port: c.ServicePort(),
		Process: c.Process.Name(), Peer: peer.String()}
	if peer.Is6() {
		l.Peer = netip.PrefixFrom(peer, 64).Masked().String()
	}
	return l
}

// evaluate returns the changes, and in which group each connection is.
func (m *model) evaluate(now events.Time, conns []track.Conn) (changes []said, groups map[Labels][]*track.Conn) {
	bySource := map[Labels][]*track.Conn{} // family and peer
	families := map[Labels]bool{}
	for i := range conns {
		l := labelsOf(&conns[i])
		bySource[l] = append(bySource[l], &conns[i])
		families[l.family()] = true
	}
	for l := range m.firing {
		families[l.family()] = true
	}
	groups = map[Labels][]*track.Conn{}
	say := func(e Event, l Labels, a *modelAlert) {
		s := said{Event: e, Labels: l, Count: len(groups[l]), Peak: a.peak, Starts: a.starts.Sub(boot)}
		if e == Resolved {
			s.Count, s.Ends = 0, a.ended.Sub(boot)
			delete(m.firing, l)
		} else {
			for _, c := range slices.SortedFunc(slices.Values(groups[l]), func(a, b *track.Conn) int {
				return cmp.Or(cmp.Compare(b.Duration, a.Duration), cmp.Compare(a.Cookie, b.Cookie))
			}) {
				s.Conns = append(s.Conns, c.Cookie)
			}
		}
		a.notified, a.count, a.restored = now, len(groups[l]), false
		changes = append(changes, s)
	}
	judge := func(l Labels) {
		a, n := m.firing[l], len(groups[l])
		if a == nil {
			if n >= m.settings.MinConnections {
				m.firing[l] = &modelAlert{starts: now, peak: n}
				say(Fired, l, m.firing[l])
			}
			return
		}
		a.peak = max(a.peak, n)
		if n < m.settings.MinConnections {
			if a.low == 0 {
				a.low, a.ended = now, now
			}
			if a.restored && n > 0 {
				say(Updated, l, a)
			} else if now.Sub(a.low) >= m.settings.ResolveAfter {
				say(Resolved, l, a)
			}
			return
		}
		a.low = 0
		switch quiet := now.Sub(a.notified); {
		case a.restored, (n >= 2*a.count || 2*n <= a.count) && quiet >= m.settings.UpdateEvery:
			say(Updated, l, a)
		case quiet >= m.settings.RepeatEvery:
			say(Repeated, l, a)
		}
	}
	for family := range families {
		own, rest := 0, family
		rest.Peer = Others
		for _, l := range slices.Collect(maps.Keys(m.firing)) {
			if l.family() == family && l.Peer != Others {
				groups[l] = bySource[l]
				if judge(l); m.firing[l] != nil {
					own++
				} else {
					delete(groups, l)
				}
			}
		}
		var others []Labels
		for l := range bySource {
			if l.family() == family && m.firing[l] == nil {
				others = append(others, l)
			}
		}
		slices.SortFunc(others, func(a, b Labels) int {
			pa, _ := parsePeer(a.Peer)
			pb, _ := parsePeer(b.Peer)
			return cmp.Or(cmp.Compare(len(bySource[b]), len(bySource[a])), slices.Compare(pa[:], pb[:]))
		})
		for _, l := range others {
			if own < m.settings.PeersPerGroup && len(bySource[l]) >= m.settings.MinConnections {
				own++
				groups[l] = bySource[l]
				judge(l)
			} else {
				groups[rest] = append(groups[rest], bySource[l]...)
			}
		}
		judge(rest)
	}
	slices.SortFunc(changes, func(a, b said) int { return cmp.Compare(a.Labels.id(), b.Labels.id()) })
	return changes, groups
}

func (m *model) restart(now events.Time) {
	for _, a := range m.firing {
		a.restored = true
		if a.low == 0 {
			a.ended = now
		}
		a.low = now
	}
}

// next is when something is due though nothing changes.
func (m *model) next(groups map[Labels][]*track.Conn) (at events.Time, ok bool) {
	for l, a := range m.firing {
		n := len(groups[l])
		due := a.notified.Add(m.settings.RepeatEvery)
		switch {
		case a.low != 0:
			due = a.low.Add(m.settings.ResolveAfter)
		case n >= 2*a.count || 2*n <= a.count:
			due = min(due, a.notified.Add(m.settings.UpdateEvery))
		}
		if !ok || due < at {
			at, ok = due, true
		}
	}
	return at, ok
}

// A run is a Book with what becomes overdue, and is no longer.
type run struct {
	book   *Book
	clock  clock
	now    events.Time
	conns  []track.Conn
	cookie uint64
	rules  limits.Rules
}

var modelPeers = []string{"198.51.100.1", "198.51.100.2", "198.51.100.3", "2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:2::1"}

// add makes n connections overdue.
func (r *run) add(t *rapid.T, n int) {
	port := rapid.SampledFrom([]uint16{80, 443}).Draw(t, "port")
	side := rapid.SampledFrom([]events.Side{events.Inbound, events.Inbound, events.Outbound}).Draw(t, "side")
	peer := rapid.SampledFrom(modelPeers).Draw(t, "peer")
	for range n {
		r.cookie++
		c := track.Conn{Cookie: r.cookie, Netns: hostns, Side: side, Stage: events.Held, Overdue: true, SinceExact: true}
		near, far := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port), netip.AddrPortFrom(netip.MustParseAddr(peer), 40000)
		if side == events.Outbound {
			near, far = netip.AddrPortFrom(near.Addr(), far.Port()), netip.AddrPortFrom(far.Addr(), near.Port())
		}
		c.Flow.Local, c.Flow.Remote = events.EndpointFrom(near), events.EndpointFrom(far)
		c.Limit = r.rules.For(c.Stage, events.Timers{FinTimeout: time.Minute}, 0, 0)
		c.Since = r.now.Add(-time.Duration(rapid.IntRange(60, 63).Draw(t, "age")) * time.Second)
		r.conns = append(r.conns, c)
	}
}

// shuffle is in no order, as the table's walk.
func (r *run) shuffle(seed uint64) {
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(r.conns), func(i, j int) { r.conns[i], r.conns[j] = r.conns[j], r.conns[i] })
}

func (r *run) evaluate() []Change {
	for i := range r.conns {
		r.conns[i].Duration = r.now.Sub(r.conns[i].Since)
	}
	return r.book.Evaluate(r.now, walk(r.conns))
}

// restart goes through the file.
func (r *run) restart(t *rapid.T, s Settings) {
	text, err := json.Marshal(r.book.Save())
	if err != nil {
		t.Fatal(err)
	}
	var saved Saved
	if err := json.Unmarshal(text, &saved); err != nil {
		t.Fatal(err)
	}
	bounds := r.book.bounds
	r.book = NewBook(s, r.clock.names(), hostns)
	r.book.bounds = bounds
	if err := r.book.Restore(saved, r.now); err != nil {
		t.Fatal(err)
	}
}

func drawSettings(t *rapid.T) Settings {
	seconds := func(name string, most int) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(t, name)) * time.Second
	}
	return Settings{
		MinConnections: rapid.IntRange(1, 4).Draw(t, "min"),
		PeersPerGroup:  rapid.IntRange(0, 3).Draw(t, "peers"),
		ResolveAfter:   seconds("resolve", 10),
		UpdateEvery:    seconds("update", 5),
		RepeatEvery:    seconds("repeat", 30) + time.Second,
	}
}

// TestModel: a Book says what the model does, whatever comes and goes.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		settings := drawSettings(t)
		r := &run{now: boot}
		r.book = NewBook(settings, r.clock.names(), hostns)
		m := &model{settings: settings, firing: map[Labels]*modelAlert{}}
		history := histories{settings: settings}
		var groups map[Labels][]*track.Conn
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"add", "add", "remove", "wait", "due", "restart"}).Draw(t, "step") {
			case "add":
				r.add(t, rapid.IntRange(1, 6).Draw(t, "n"))
			case "remove":
				r.shuffle(rapid.Uint64().Draw(t, "which"))
				r.conns = r.conns[:rapid.IntRange(0, len(r.conns)).Draw(t, "left")]
			case "wait":
				r.now = r.now.Add(time.Duration(rapid.IntRange(0, 12_000).Draw(t, "ms")) * time.Millisecond)
			case "due":
				got, gotOK := r.book.Next()
				want, wantOK := m.next(groups)
				if got != want || gotOK != wantOK {
					t.Fatalf("due at %v, %v; want %v, %v", got.Sub(boot), gotOK, want.Sub(boot), wantOK)
				}
				r.now = max(r.now, got)
			case "restart":
				r.restart(t, settings)
				m.restart(r.now)
				history.restart()
			}
			changes := r.evaluate()
			var want []said
			want, groups = m.evaluate(r.now, r.conns)
			var got []said
			for _, c := range changes {
				s := said{Event: c.Alert.Event, Labels: c.Alert.Labels, Count: c.Alert.Count, Peak: c.Alert.Peak, Starts: c.Alert.StartsAt.Sub(epoch)}
				if !c.Alert.Firing() {
					s.Ends = c.Alert.EndsAt.Sub(epoch)
				}
				for i := range c.Conns {
					s.Conns = append(s.Conns, c.Conns[i].Cookie)
				}
				got = append(got, s)
			}
			slices.SortFunc(got, func(a, b said) int { return cmp.Compare(a.Labels.id(), b.Labels.id()) })
			if diff := gocmp.Diff(want, got); diff != "" {
				t.Fatalf("at %v (-want +got):\n%s", r.now.Sub(boot), diff)
			}
			if err := history.take(r.now, changes); err != nil {
				t.Fatal(err)
			}
			if err := counted(r.book, groups); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// counted holds the alerts that fire against the groups of the connections.
func counted(b *Book, groups map[Labels][]*track.Conn) error {
	for _, a := range b.Active() {
		conns := groups[a.Labels]
		if a.Count != len(conns) {
			return fmt.Errorf("%s has %d connections, not %d", text(a.Labels), len(conns), a.Count)
		}
		oldest := 0.0
		for _, c := range conns {
			oldest = max(oldest, c.Duration.Seconds())
		}
		if len(conns) > 0 && a.Oldest != oldest {
			return fmt.Errorf("%s has its oldest for %v s, not %v", text(a.Labels), oldest, a.Oldest)
		}
	}
	return nil
}

// histories are what each alert has been said to do. An alert fires, is spoken
// of only so often, resolves, and fires again.
type histories struct {
	settings Settings
	spoken   map[string]events.Time // while it fires
	restored map[string]bool
}

func (h *histories) restart() {
	h.restored = map[string]bool{}
	for id := range h.spoken {
		h.restored[id] = true
	}
}

func (h *histories) take(now events.Time, changes []Change) error {
	if h.spoken == nil {
		h.spoken = map[string]events.Time{}
	}
	said := map[string]bool{}
	for _, c := range changes {
		a := c.Alert
		last, fires := h.spoken[a.ID]
		least := map[Event]time.Duration{Updated: h.settings.UpdateEvery, Repeated: h.settings.RepeatEvery}[a.Event]
		switch {
		case said[a.ID]:
			return fmt.Errorf("%s changes twice at once", text(a.Labels))
		case fires == (a.Event == Fired):
			return fmt.Errorf("%s is %s, and fires already: %v", text(a.Labels), a.Event, fires)
		case (a.Event == Resolved) != (a.EndsAt != nil):
			return fmt.Errorf("%s is %s, and ends at %v", text(a.Labels), a.Event, a.EndsAt)
		case a.EndsAt != nil && a.EndsAt.Before(a.StartsAt):
			return fmt.Errorf("%s ends before it starts", text(a.Labels))
		case fires && now.Sub(last) < least && !h.restored[a.ID]:
			return fmt.Errorf("%s is %s %v after the last word", text(a.Labels), a.Event, now.Sub(last))
		}
		said[a.ID] = true
		h.spoken[a.ID] = now
		delete(h.restored, a.ID)
		if a.Event == Resolved {
			delete(h.spoken, a.ID)
		}
	}
	return nil
}

// TestBounded: with few counters and families, and many peers and ports, the
// alerts are few, and their counts right.
func TestBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		settings := drawSettings(t)
		r := &run{now: boot}
		r.book = NewBook(settings, r.clock.names(), hostns)
		r.book.bounds = bounds{families: rapid.IntRange(1, 3).Draw(t, "families"), counters: rapid.IntRange(1, 3).Draw(t, "counters"),
			keys: rapid.IntRange(1, 4).Draw(t, "keys"), sample: 2, samples: 4}
		history := histories{settings: settings}
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"add", "add", "add", "remove", "wait", "restart"}).Draw(t, "step") {
			case "add":
				r.add(t, rapid.IntRange(1, 12).Draw(t, "n"))
			case "remove":
				r.shuffle(rapid.Uint64().Draw(t, "which"))
				r.conns = r.conns[:rapid.IntRange(0, len(r.conns)).Draw(t, "left")]
			case "wait":
				r.now = r.now.Add(time.Duration(rapid.IntRange(0, 12).Draw(t, "s")) * time.Second)
			case "restart":
				r.restart(t, settings)
				history.restart()
			}
			r.shuffle(rapid.Uint64().Draw(t, "order"))
			changes := r.evaluate()
			if err := history.take(r.now, changes); err != nil {
				t.Fatal(err)
			}
			for _, c := range changes {
				if c.Alert.Firing() && len(c.Conns) != min(c.Alert.Count, max(min(2, 4/len(changes)), 1)) {
					t.Fatalf("%d of the %d connections of %s, one of %d changes", len(c.Conns), c.Alert.Count, text(c.Alert.Labels), len(changes))
				}
			}
			r.checkBounds(t, settings)
		}
	})
}

func (r *run) checkBounds(t *rapid.T, s Settings) {
	active := r.book.Active()
	families := map[Labels]int{} // with their alerts
	firing := map[Labels]*Alert{}
	for _, a := range active {
		families[a.Labels.family()]++
		firing[a.Labels] = a
	}
	if len(families) > r.book.bounds.families {
		t.Fatalf("%d families", len(families))
	}
	for f, n := range families {
		if n > s.PeersPerGroup+1 {
			t.Fatalf("%d alerts of %s", n, text(f))
		}
	}
	// A connection is in its peer's alert, in the others' of its family, in the
	// same of the overflow, or in no alert that is known; all that is counted is
	// counted once.
	known, unknown := 0, 0
	single, whole := map[Labels]int{}, map[Labels]int{}
	for i := range r.conns {
		l := labelsOf(&r.conns[i])
		single[l]++
		whole[l.family()]++
		if f := l.family(); families[f] == 0 && families[overflow] == 0 {
			unknown++
		}
	}
	for _, a := range active {
		known += a.Count
		if n := single[a.Labels]; a.Labels.Peer != Others && a.Labels.family() != overflow && a.Count != n {
			t.Fatalf("%s has %d connections, not %d", text(a.Labels), n, a.Count)
		}
	}
	// What is in no alert is in a rest that does not fire, of fewer than the
	// threshold, in each family that there may be.
	if quiet := len(r.conns) - known; quiet < unknown || quiet > r.book.bounds.families*(s.MinConnections-1) {
		t.Fatalf("%d of %d connections are in no alert, of %d families with fewer than %d", quiet, len(r.conns), r.book.bounds.families, s.MinConnections)
	}
	// No peer is missed that has more than its share of the family.
	for l, n := range single {
		f := l.family()
		rest := f
		rest.Peer = Others
		if a := firing[rest]; a != nil && families[f] < s.PeersPerGroup+1 && firing[l] == nil &&
			n >= s.MinConnections && n > whole[f]/(r.book.bounds.counters+1) {
			t.Fatalf("%d connections of %s are among %d others", n, text(l), a.Count)
		}
	}
	if n := len(r.book.byKey) + len(r.book.byLabels) + len(r.book.families); n != 0 {
		t.Fatalf("%d things are kept of an evaluation", n)
	}
}
