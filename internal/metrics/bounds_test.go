// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// hostile makes connections of peers that do what they can: each has another
// address, port, process and round trip.
type hostile struct {
	random *rand.Rand
	places []*haproxy.Place
	conn   track.Conn
}

func newHostile(seed uint64) *hostile {
	www, proxy := section(haproxy.Frontend, "www"), section(haproxy.Backend, "anywhere")
	process := &haproxy.Process{PID: 1, Config: config(path, www, proxy)}
	return &hostile{
		random: rand.New(rand.NewPCG(seed, 0)),
		places: []*haproxy.Place{nil, at(process, haproxy.ClientSide, www), at(process, haproxy.ServerSide, proxy)},
	}
}

func (h *hostile) next() *track.Conn {
	n := h.random.Uint64()
	c := &h.conn
	c.Cookie, c.Netns = n, uint32(n)
	binary.NativeEndian.PutUint64(c.Flow.Remote.Addr[:], n)
	binary.NativeEndian.PutUint64(c.Flow.Local.Addr[8:], n)
	binary.NativeEndian.PutUint64(c.Process.Comm[:], n)
	c.Process.PID, c.Process.Cgroup = uint32(n>>7), n
	c.Flow.Remote.Port, c.Flow.Local.Port = uint16(n>>16), uint16(n>>32)
	if n>>62&1 == 0 {
		// Some ports are had by many.
		c.Flow.Remote.Port, c.Flow.Local.Port = 1+c.Flow.Remote.Port%1024, 1+c.Flow.Local.Port%1024
	}
	c.Side = events.Side(1 + n>>48%2)
	c.Stage = events.Stage(1 + n>>50%3)
	c.Place = h.places[n>>53%3]
	c.Duration = time.Duration(n >> 20)
	c.Limit = limits.Closed(events.Timers{FinTimeout: time.Second, RTO: time.Duration(n>>59&1) * time.Duration(n>>20&0xffff) * time.Millisecond})
	c.Overdue = n>>60%2 == 0
	c.End = events.Ends()[n>>61]
	return c
}

// A million connections of hostile peers add no series, and no memory, once
// there are as many as there may be; and that is what the constants say.
func TestHostilePeersAddNoSeries(t *testing.T) {
	const perRound = 1_000_000
	m, peers := metrics(), newHostile(1)
	h := showing(m, func(s *State) {
		for range perRound {
			c := peers.next()
			s.Add(c)
			m.Closed(c)
		}
	})
	names := func() []string { return slices.Sorted(maps.Keys(series(t, h))) }
	first := names()
	if diff := cmp.Diff(first, names()); diff != "" {
		t.Errorf("a million more connections changed the series:\n%s", diff)
	}
	places := 2*(proxiedPlaces+otherPlaces) + 2
	if got := len(m.known.places.all()); got != places {
		t.Errorf("%d places, not %d", got, places)
	}
	all := series(t, h)
	if got := len(of(all, "fin_wait2_connections")); got != 3*places {
		t.Errorf("%d series of connections, not %d", got, 3*places)
	}
	if sum := sumOf(of(all, "fin_wait2_connections")); sum != perRound {
		t.Errorf("%v of %d connections are counted", sum, perRound)
	}
	// Those of other places are of both sides, three stages and two kinds of
	// limit: tcp_fin_timeout and the round trip.
	if got := len(of(all, "overdue_connections")); got < excesses || got > excesses+2*3*2 {
		t.Errorf("%d series of overdue ones, not %d and those of other places", got, excesses)
	}
	if over := of(all, "overdue_connections"); sumOf(over) < 0.4*perRound || over[`{limit="RTO",port="other",proxy="",side="inbound",stage="held"}`] < 0.01*perRound {
		t.Errorf("of %d connections, half of them overdue, %v are counted as such", perRound, sumOf(over))
	}
}

func sumOf(series map[string]float64) (sum float64) {
	for _, n := range series {
		sum += n
	}
	return sum
}

// Whatever comes, in whichever order, there is room for so many of each, the
// first keep their place, and every connection is counted once.
func TestPlacesAreBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k, numbered := newKnown(), map[place]int{}
		for range rapid.IntRange(0, 3*proxiedPlaces).Draw(t, "connections") {
			p := place{
				port: port{
					side:   rapid.Uint16Range(uint16(events.Inbound), uint16(events.Outbound)).Draw(t, "side"),
					number: rapid.Uint16Range(1, 200).Draw(t, "port"),
				},
				proxy: rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "proxy"),
			}
			n := k.place(p.proxy, p.port)
			if before, seen := numbered[p]; seen && before != n {
				t.Fatalf("%v is number %d, and was %d", p, n, before)
			}
			numbered[p] = n
			switch got := k.places.all()[n]; {
			case got == p:
			case got != place{port: port{side: p.side}}:
				t.Fatalf("%v is counted as %v", p, got)
			}
		}
		type share struct {
			side    uint16
			proxied bool
		}
		counts := map[share]int{}
		for _, p := range k.places.all() {
			if p.number != 0 {
				counts[share{p.side, p.proxy != ""}]++
			}
		}
		for s, n := range counts {
			if s.proxied && n > proxiedPlaces || !s.proxied && n > otherPlaces {
				t.Fatalf("%d of %v", n, s)
			}
		}
	})
}

// What comes first keeps its series; the rest is one.
func TestOthers(t *testing.T) {
	const more = 3
	m := metrics()
	www := section(haproxy.Frontend, "www")
	place := at(&haproxy.Process{Config: config(path, www)}, haproxy.ClientSide, www)
	all := series(t, showing(m, func(s *State) {
		for i := range otherPlaces + more {
			s.Add(outbound(events.Held, uint16(1000+i), nil, 0))
		}
		s.Add(inbound(events.Held, 80, nil, 0))
		s.Add(inbound(events.Held, 443, place, 0))
	}))
	label := func(side, proxy, port string) string {
		return fmt.Sprintf(`fintrace_fin_wait2_connections{port=%q,proxy=%q,side=%q,stage="held"}`, port, proxy, side)
	}
	for name, want := range map[string]float64{
		label("outbound", "", "1000"):                         1,
		label("outbound", "", fmt.Sprint(1000+otherPlaces-1)): 1,
		label("outbound", "", "other"):                        more,
		label("inbound", "", "80"):                            1,
		label("inbound", "www", "443"):                        1,
	} {
		if got, ok := all[name]; !ok || got != want {
			t.Errorf("%s is %v, not %v", name, got, want)
		}
	}
	if _, there := all[label("outbound", "", fmt.Sprint(1000+otherPlaces))]; there {
		t.Error("one too many has series of its own")
	}
}

// There may be any number of rules, of HAProxies, of frontends.
func TestSettingsAreBounded(t *testing.T) {
	m := metrics()
	round := 0
	h := showing(m, func(s *State) {
		round++
		for i := range 2 * limitKinds {
			rules := limits.Rules{User: []limits.Rule{{Name: fmt.Sprintf("rule %d of %d", i, round), FinTimeout: time.Second}}}
			s.Add(past(inbound(events.Held, 80, nil, 0), rules.For(events.Held, minute, 0, 1)))
		}
		for i := range 2 * configurations {
			name := fmt.Sprintf("%d of %d", i, round)
			if i == 0 {
				name = "the first"
			}
			var sections []*haproxy.Proxy
			for j := range 20 {
				sections = append(sections, section(haproxy.Frontend, fmt.Sprintf("%s in %s", fmt.Sprint(j), name)))
			}
			p := haproxy.Process{PID: i, Config: config("/etc/"+name, sections...), Info: &haproxy.Info{Maxconn: 10, CurrConns: 1}}
			s.HAProxy = append(s.HAProxy, p)
			s.Add(inbound(events.Held, 80, at(&p, haproxy.ClientSide, sections[0]), 0))
		}
	})
	first := series(t, h)
	second := series(t, h)
	for _, metric := range []struct {
		name  string
		most  int
		other string
	}{
		{"overdue_connections", limitKinds + 1, `limit="other"`},
		{"haproxy_maxconn", configurations + 1, `haproxy="other"`},
		{"haproxy_held_connections", frontends + configurations + 1, `proxy="other"`},
	} {
		names := of(first, metric.name)
		maps.Copy(names, of(second, metric.name))
		if len(names) > metric.most || len(names) < metric.most/2 {
			t.Errorf("%d series of %s in two rounds, not %d at most", len(names), metric.name, metric.most)
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(names)), func(name string) bool { return strings.Contains(name, metric.other) }) {
			t.Errorf("%s has no %s", metric.name, metric.other)
		}
	}
	for name, want := range map[string]float64{
		`fintrace_haproxy_maxconn{haproxy="/etc/the first"}`:                                                  10,
		`fintrace_haproxy_held_connections{haproxy="/etc/the first",proxy="0 in the first",worker="current"}`: 1,
	} {
		if second[name] != want {
			t.Errorf("what came first has lost its series: %s is %v", name, second[name])
		}
	}
	for name, want := range map[string]float64{
		"overdue_connections": 2 * limitKinds, "haproxy_maxconn": 20 * configurations, "haproxy_held_connections": 2 * configurations,
	} {
		if got := sumOf(of(second, name)); got != want {
			t.Errorf("all %s are %v, not %v", name, got, want)
		}
	}
}

// Namespaces come and go: so many are shown, the host's own among them, and one
// that is shown stays as long as it is there.
func TestNamespacesAreBounded(t *testing.T) {
	var there []Namespace
	add := func(name string) {
		there = append(there, Namespace{Name: name, Statistics: map[string]int64{"TCP tw": 1}})
	}
	h := showing(metrics(), func(s *State) { s.Namespaces = there })
	shown := func() map[string]float64 { return of(series(t, h), "timewait_sockets") }
	for i := range namespaces - 1 {
		add(fmt.Sprintf("m%02d", i))
	}
	add(Host)
	before := shown()
	if len(before) != namespaces {
		t.Fatalf("%d of %d are shown", len(before), namespaces)
	}
	add("a new one") // sorts before the others
	if diff := cmp.Diff(before, shown()); diff != "" {
		t.Errorf("one more changed what is shown:\n%s", diff)
	}
	there = slices.DeleteFunc(there, func(n Namespace) bool { return n.Name == "m07" })
	after := shown()
	_, gone := after[`{netns="m07"}`]
	_, host := after[`{netns="host"}`]
	_, come := after[`{netns="a new one"}`]
	if gone || !host || !come || len(after) != namespaces {
		t.Errorf("%d are shown; the host's own %v, what is gone %v, what has come %v", len(after), host, gone, come)
	}
	add("m07")
	if diff := cmp.Diff(after, shown()); diff != "" {
		t.Errorf("one that comes back too late changed what is shown:\n%s", diff)
	}
}

// Things happen, and the table is looked at, while scrapes go on, some of which
// are given up before the loop comes to them.
func TestConcurrency(t *testing.T) {
	m, loop := metrics(), make(chan func())
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		peers := newHostile(2)
		for {
			select {
			case <-ctx.Done():
				return
			case do := <-loop:
				do()
			default:
				m.Closed(peers.next())
				m.Snapshot(time.Millisecond, time.Now())
				m.Reloaded(true, time.Now())
			}
		}
	})
	peers, asked := newHostile(3), 0
	h := m.Handler(func(ctx context.Context, s *State) error {
		asked++
		done := make(chan struct{})
		look := func() {
			defer close(done)
			for range 1000 {
				s.Add(peers.next())
			}
		}
		select {
		case loop <- look:
		case <-ctx.Done():
			return ctx.Err()
		}
		if asked%5 == 0 {
			return context.DeadlineExceeded // while the loop goes on with it
		}
		<-done
		return nil
	})
	var scrapes sync.WaitGroup
	for range 3 {
		scrapes.Go(func() {
			for range 20 {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
				if w.Code != 200 && !strings.Contains(w.Body.String(), context.DeadlineExceeded.Error()) {
					t.Errorf("%d: %s", w.Code, w.Body)
				}
			}
		})
	}
	scrapes.Wait()
	stop()
	all.Wait()
	if asked < 20 {
		t.Errorf("gathered %d times for 60 scrapes of three", asked)
	}
}

func BenchmarkClosed(b *testing.B) {
	m, ends, i := metrics(), closing(), 0
	b.ReportAllocs()
	for b.Loop() {
		m.Closed(&ends[i%len(ends)])
		i++
	}
}

// A million connections of a table: of a busy HAProxy, each past its limit, and
// of hostile peers.
func BenchmarkAdd(b *testing.B) {
	const n = 1_000_000
	b.Run("haproxy", func(b *testing.B) {
		var conns []*track.Conn
		l := byHAProxy(b)
		for i := range 20 {
			px := section(haproxy.Listen, fmt.Sprintf("proxy%d", i))
			process := &haproxy.Process{Config: config(path, px)}
			conns = append(conns,
				past(inbound(events.Held, uint16(8000+i), at(process, haproxy.ClientSide, px), time.Hour), l),
				past(outbound(events.Held, uint16(9000+i), at(process, haproxy.ServerSide, px), time.Hour), byKernel))
		}
		random := rand.New(rand.NewPCG(1, 1))
		order := make([]uint8, 1<<16)
		for i := range order {
			order[i] = uint8(random.IntN(len(conns)))
		}
		m := metrics()
		b.ReportAllocs()
		for b.Loop() {
			s := newState(m.known)
			for i := range n {
				s.Add(conns[order[i%len(order)]])
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/conn")
	})
	b.Run("hostile", func(b *testing.B) {
		peers := newHostile(1)
		conns := make([]track.Conn, 1<<14)
		for i := range conns {
			conns[i] = *peers.next()
		}
		m := metrics()
		b.ReportAllocs()
		for b.Loop() {
			s := newState(m.known)
			for i := range n {
				s.Add(&conns[i%len(conns)])
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/conn")
	})
}

// A whole scrape of a table that a tracker keeps: of nothing, of a million
// connections of one listener, and where all places are taken.
func BenchmarkScrape(b *testing.B) {
	for _, format := range []struct{ name, accept string }{{"text", text}, {"protobuf", protobuf}} {
		for _, n := range []int{0, 1_000_000} {
			b.Run(fmt.Sprintf("table/%d/%s", n, format.name), func(b *testing.B) {
				tracker := track.New(limits.Rules{}, n+1, nil)
				for i := range n {
					ev := events.Event{Cookie: uint64(i + 1), Netns: 1, Old: events.FinWait1, New: events.FinWait2, Accepted: true, Timers: minute, SndShut: true}
					ev.Flow.Local.Port = 443
					binary.NativeEndian.PutUint64(ev.Flow.Remote.Addr[:], uint64(i))
					tracker.Apply(&ev)
				}
				h := showing(metrics(), func(s *State) {
					tracker.All(events.Time(time.Hour), s.Add)
				})
				for b.Loop() {
					scrape(b, h, format.accept)
				}
			})
		}
		b.Run("full/"+format.name, func(b *testing.B) {
			peers := newHostile(1)
			rounds := 1_000_000
			h := showing(metrics(), func(s *State) {
				for range rounds {
					s.Add(peers.next())
				}
			})
			scrape(b, h, format.accept)
			rounds = 0
			var bytes int
			for b.Loop() {
				body, err := io.ReadAll(scrape(b, h, format.accept).Body)
				if err != nil {
					b.Fatal(err)
				}
				bytes = len(body)
			}
			b.ReportMetric(float64(bytes), "B/scrape")
		})
	}
}
