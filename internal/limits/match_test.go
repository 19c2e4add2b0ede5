// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

func endpoint(s string) events.Endpoint { return events.EndpointFrom(netip.MustParseAddrPort(s)) }

func named(pid uint32, comm string, cgroup uint64) *events.Process {
	p := &events.Process{PID: pid, Cgroup: cgroup}
	copy(p.Comm[:], comm)
	return p
}

var knownNames = Names{
	Cgroup: func(id uint64) string { return map[uint64]string{7: "/system.slice/haproxy.service"}[id] },
	Netns:  func(inode uint32) string { return map[uint32]string{5: "blue"}[inode] },
}

func TestSelects(t *testing.T) {
	s := Subject{
		Netns:   5,
		Flow:    &events.Flow{Local: endpoint("192.0.2.1:443"), Remote: endpoint("198.51.100.7:40001")},
		Side:    events.Inbound,
		Stage:   events.Held,
		Process: named(30, "haproxy", 7),
		Place:   &haproxy.Place{Proxies: []*haproxy.Proxy{{Name: "https"}}},
	}
	peer := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for _, test := range []struct {
		name     string
		yes, not Match
	}{
		{"side", Match{Side: events.Inbound}, Match{Side: events.Outbound}},
		{"stage", Match{Stage: events.Held}, Match{Stage: events.Orphaned}},
		{"local port", Match{LocalPorts: []uint16{80, 443}}, Match{LocalPorts: []uint16{40001}}},
		{"remote port", Match{RemotePorts: []uint16{40001}}, Match{RemotePorts: []uint16{443}}},
		{"either port", Match{Ports: []uint16{40001}}, Match{Ports: []uint16{80}}},
		{"peer", Match{Peers: peer("198.51.100.0/24")}, Match{Peers: peer("192.0.2.0/24")}},
		{"name", Match{Processes: []string{"nginx", "haproxy"}}, Match{Processes: []string{"hap"}}},
		{"pid", Match{Processes: []string{"30"}}, Match{Processes: []string{"3"}}},
		{"proxy", Match{Proxies: []string{"https"}}, Match{Proxies: []string{"http"}}},
		{"cgroup", Match{Cgroups: []string{"/system.slice/haproxy.service"}}, Match{Cgroups: []string{"/system.slice/haproxy"}}},
		{"cgroup above", Match{Cgroups: []string{"/system.slice"}}, Match{Cgroups: []string{"/user.slice"}}},
		{"all cgroups", Match{Cgroups: []string{"/"}}, Match{Cgroups: []string{"/x"}}},
		{"netns", Match{Netns: []uint32{4, 5}}, Match{Netns: []uint32{4}}},
		{"name of netns", Match{Netns: []uint32{4}, NetnsNames: []string{"blue"}}, Match{NetnsNames: []string{"green"}}},
		{"two fields", Match{Side: events.Inbound, Proxies: []string{"https"}}, Match{Side: events.Inbound, Proxies: []string{"http"}}},
	} {
		if !test.yes.Selects(&s, knownNames) {
			t.Errorf("%s: %+v does not select it", test.name, test.yes)
		}
		if test.not.Selects(&s, knownNames) {
			t.Errorf("%s: %+v selects it", test.name, test.not)
		}
	}

	// What is not known is not selected by what names it.
	unknown := Subject{Netns: 6, Flow: s.Flow, Process: &events.Process{}}
	for _, m := range []Match{
		{Processes: []string{""}}, {Processes: []string{"0"}}, {Cgroups: []string{"/"}}, {Proxies: []string{""}}, {NetnsNames: []string{"blue"}},
	} {
		if m.Selects(&unknown, knownNames) || m.Selects(&unknown, Names{}) {
			t.Errorf("%+v selects what is not known", m)
		}
	}
}

func TestChoose(t *testing.T) {
	rules := Rules{User: []Rule{
		{Name: "mini", Match: Match{Stage: events.Minisock}, FinTimeout: time.Second},
		{Name: "first", Match: Match{LocalPorts: []uint16{443}}, FinTimeout: 2 * time.Second},
		{Name: "second", FinTimeout: 3 * time.Second},
	}}
	for _, test := range []struct {
		stage  events.Stage
		port   string
		source string
		kind   string
	}{
		{events.Held, "192.0.2.1:443", `rule "first" 2s`, "first"},
		{events.Held, "192.0.2.1:80", `rule "second" 3s`, "second"},
		{events.Minisock, "192.0.2.1:443", `rule "mini" 1s`, "mini"},
		{events.Orphaned, "192.0.2.1:443", "net.ipv4.tcp_fin_timeout 60s", "tcp_fin_timeout"},
	} {
		flow := events.Flow{Local: endpoint(test.port), Remote: endpoint("198.51.100.7:40001")}
		rule := rules.Choose(&Subject{Flow: &flow, Stage: test.stage, Process: &events.Process{}})
		l := rules.For(test.stage, timers(time.Minute, 0), 0, rule)
		if l.Source() != test.source || l.Kind() != test.kind || l.User() != (rule != 0) || rule != 0 && l.Slack != 0 {
			t.Errorf("%v at %s: %q of kind %q, %+v; want %q of kind %q", test.stage, test.port, l.Source(), l.Kind(), l, test.source, test.kind)
		}
	}
}

// TestCovers holds a Match that covers another against the connections that
// both select.
func TestCovers(t *testing.T) {
	ports := []uint16{1, 2}
	peers := []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("198.51.100.0/31"), netip.MustParsePrefix("198.51.100.1/32")}
	cgroups := []string{"/system.slice", "/system.slice/haproxy.service"}
	netns := []uint32{5, 6}
	match := rapid.Custom(func(t *rapid.T) Match {
		m := Match{
			Side:       rapid.SampledFrom([]events.Side{0, events.Inbound, events.Outbound}).Draw(t, "side"),
			LocalPorts: rapid.SliceOfDistinct(rapid.SampledFrom(ports), rapid.ID).Draw(t, "ports"),
			Peers:      rapid.SliceOfDistinct(rapid.SampledFrom(peers), rapid.ID).Draw(t, "peers"),
		}
		if rapid.Bool().Draw(t, "place") {
			m.Netns = rapid.SliceOfDistinct(rapid.SampledFrom(netns), rapid.ID).Draw(t, "netns")
			m.Cgroups = rapid.SliceOfDistinct(rapid.SampledFrom(cgroups), rapid.ID).Draw(t, "cgroups")
		}
		return m
	})
	names := Names{Cgroup: func(id uint64) string { return append(cgroups, "/")[id] }}
	rapid.Check(t, func(t *rapid.T) {
		a, b := match.Draw(t, "a"), match.Draw(t, "b")
		counterexample := false
		for _, side := range []events.Side{events.Inbound, events.Outbound} {
			for _, port := range append(ports, 3) {
				for _, peer := range []string{"198.51.100.0", "198.51.100.1", "198.51.100.2", "192.0.2.1"} {
					for _, ns := range append(netns, 7) {
						for cgroup := range uint64(3) {
							flow := events.Flow{
								Local:  events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.9"), port)),
								Remote: events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr(peer), 9)),
							}
							s := Subject{Netns: ns, Flow: &flow, Side: side, Process: &events.Process{Cgroup: cgroup}}
							counterexample = counterexample || b.Selects(&s, names) && !a.Selects(&s, names)
						}
					}
				}
			}
		}
		if a.Covers(&b) && counterexample {
			t.Fatalf("%+v is said to cover %+v, and does not", a, b)
		}
		// Blocks that only together make up another are not seen as such, which
		// is no harm; and a field with all values of this small world is not
		// one that takes all.
		if !a.Covers(&b) && !counterexample && len(a.Peers) < 2 && len(a.LocalPorts) < 2 {
			t.Fatalf("%+v covers %+v, and is said not to", a, b)
		}
	})
}
