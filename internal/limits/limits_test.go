// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

const rto = 200 * time.Millisecond

func timers(finTimeout, linger2 time.Duration) events.Timers {
	return events.Timers{FinTimeout: finTimeout, Linger2: linger2, RTO: rto}
}

// How long a closed connection lasts whose peer stays silent.
func TestClosed(t *testing.T) {
	for _, test := range []struct {
		name   string
		timers events.Timers
		want   time.Duration
		source string
	}{
		{"fin timeout 5", timers(5*time.Second, 0), 5 * time.Second, "net.ipv4.tcp_fin_timeout 5s"},
		{"fin timeout 60", timers(60*time.Second, 0), 60 * time.Second, "net.ipv4.tcp_fin_timeout 60s"},
		{"fin timeout 61", timers(61*time.Second, 0), 2 * time.Second, "net.ipv4.tcp_fin_timeout 61s: 2 × (61s − 60s)"},
		{"fin timeout 65", timers(65*time.Second, 0), 10 * time.Second, "net.ipv4.tcp_fin_timeout 65s: 2 × (65s − 60s)"},
		{"fin timeout 70", timers(70*time.Second, 0), 20 * time.Second, "net.ipv4.tcp_fin_timeout 70s: 2 × (70s − 60s)"},
		{"fin timeout 90", timers(90*time.Second, 0), 60 * time.Second, "net.ipv4.tcp_fin_timeout 90s: 2 × (90s − 60s)"},
		{"fin timeout 120", timers(120*time.Second, 0), 120 * time.Second, "net.ipv4.tcp_fin_timeout 120s: 2 × (120s − 60s)"},

		{"linger2 3", timers(60*time.Second, 3*time.Second), 3 * time.Second, "TCP_LINGER2 3s"},
		{"linger2 8", timers(60*time.Second, 8*time.Second), 8 * time.Second, "TCP_LINGER2 8s"},
		{"linger2 8 over fin timeout 5", timers(5*time.Second, 8*time.Second), 8 * time.Second, "TCP_LINGER2 8s"},
		{"linger2 90", timers(60*time.Second, 90*time.Second), 60 * time.Second, "TCP_LINGER2 90s: 2 × (90s − 60s)"},
		{"linger2 -1", timers(60*time.Second, -4*time.Millisecond), 0, "TCP_LINGER2 < 0: reset at close"},
		{"linger2 -1, long rto", events.Timers{FinTimeout: 60 * time.Second, Linger2: -1, RTO: 30 * time.Second},
			0, "TCP_LINGER2 < 0: reset at close"},

		{"rto floor", events.Timers{FinTimeout: 5 * time.Second, RTO: 3 * time.Second},
			10500 * time.Millisecond, "3.5 × RTO 10.5s"},
		{"rto floor over linger2", events.Timers{FinTimeout: 60 * time.Second, Linger2: 3 * time.Second, RTO: time.Second},
			3500 * time.Millisecond, "3.5 × RTO 3.5s"},
		{"rto floor just reached", events.Timers{FinTimeout: 7 * time.Second, RTO: 2 * time.Second},
			7 * time.Second, "net.ipv4.tcp_fin_timeout 7s"},
		{"rto floor above 60", events.Timers{FinTimeout: 5 * time.Second, RTO: 20 * time.Second},
			20 * time.Second, "3.5 × RTO 70s: 2 × (70s − 60s)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, stage := range []events.Stage{events.Orphaned, events.Minisock} {
				for _, rules := range []Rules{{}, {Held: time.Second}} {
					l := rules.For(stage, test.timers, 0, 0)
					if l.Duration != test.want || l.Source() != test.source {
						t.Errorf("%v with %+v: %v, %q; want %v, %q", stage, rules, l.Duration, l.Source(), test.want, test.source)
					}
					if l.Slack != test.want/8 {
						t.Errorf("%v: slack %v, want an eighth of %v", stage, l.Slack, test.want)
					}
				}
			}
		})
	}
}

// The kernel does not limit a held connection: neither the doubling nor
// TCP_LINGER2 nor the RTO matter, and no timer is late.
func TestHeld(t *testing.T) {
	for _, test := range []struct {
		name   string
		rules  Rules
		timers events.Timers
		want   time.Duration
		source string
	}{
		{"yardstick", Rules{}, timers(60*time.Second, 0), 60 * time.Second, "net.ipv4.tcp_fin_timeout 60s"},
		{"yardstick above 60", Rules{}, timers(90*time.Second, 0), 90 * time.Second, "net.ipv4.tcp_fin_timeout 90s"},
		{"linger2", Rules{}, timers(60*time.Second, 3*time.Second), 60 * time.Second, "net.ipv4.tcp_fin_timeout 60s"},
		{"linger2 -1", Rules{}, timers(60*time.Second, -1), 60 * time.Second, "net.ipv4.tcp_fin_timeout 60s"},
		{"rto", Rules{}, events.Timers{FinTimeout: 5 * time.Second, RTO: 3 * time.Second}, 5 * time.Second, "net.ipv4.tcp_fin_timeout 5s"},
		{"option", Rules{Held: 30 * time.Second}, timers(60*time.Second, 0), 30 * time.Second, "--limit 30s"},
		{"option, parts of seconds", Rules{Held: 1500 * time.Millisecond}, timers(60*time.Second, 0), 1500 * time.Millisecond, "--limit 1.5s"},
		{"option, hours", Rules{Held: time.Hour}, timers(60*time.Second, 0), time.Hour, "--limit 1h0m0s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := test.rules.For(events.Held, test.timers, 0, 0)
			if l.Duration != test.want || l.Source() != test.source || l.Slack != 0 {
				t.Errorf("%v, slack %v, %q; want %v, no slack, %q", l.Duration, l.Slack, l.Source(), test.want, test.source)
			}
		})
	}
}

func TestFromTimer(t *testing.T) {
	l := FromTimer(3 * time.Second)
	if l.Duration != 3*time.Second || l.Slack != 375*time.Millisecond || l.Source() != "timewait timer 3s" {
		t.Errorf("%v, slack %v, %q", l.Duration, l.Slack, l.Source())
	}
}

func TestFinTime(t *testing.T) {
	for _, test := range []struct {
		timers events.Timers
		want   time.Duration
	}{
		{timers(60*time.Second, 0), 60 * time.Second},
		{timers(60*time.Second, 3*time.Second), 3 * time.Second},
		{timers(120*time.Second, 0), 120 * time.Second}, // not doubled: the timer's own value
		{timers(60*time.Second, -1), 700 * time.Millisecond},
		{timers(0, 0), 700 * time.Millisecond},
	} {
		if got := FinTime(test.timers); got != test.want {
			t.Errorf("FinTime(%+v) = %v, want %v", test.timers, got, test.want)
		}
	}
}

// TestHAProxy: the timeout of HAProxy that ends a held connection is its limit,
// unless it is the problem itself.
func TestHAProxy(t *testing.T) {
	const config = `defaults
timeout client SECONDS
FIN
listen www
bind :80
server web 192.0.2.1:8080
`
	for _, test := range []struct {
		name, client, fin string
		changed           bool
		want              time.Duration
		source, text      string
	}{
		{"client-fin", "1h", "timeout client-fin 3s", false, 3 * time.Second,
			"haproxy.cfg:3 defaults timeout client-fin 3s", "haproxy.cfg:3 defaults timeout client-fin 3s"},
		{"long client-fin is what was asked for", "1h", "timeout client-fin 5m", false, 5 * time.Minute,
			"haproxy.cfg:3 defaults timeout client-fin 5m", "haproxy.cfg:3 defaults timeout client-fin 5m"},
		{"short client", "30s", "", false, 30 * time.Second,
			"haproxy.cfg:2 defaults timeout client 30s (client-fin unset)", "haproxy.cfg:2 defaults timeout client 30s (client-fin unset)"},
		{"long client", "1h", "", false, time.Minute,
			"haproxy.cfg:2 defaults timeout client 1h (client-fin unset); net.ipv4.tcp_fin_timeout 60s",
			"60s; haproxy.cfg:2 defaults timeout client 1h (client-fin unset)"},
		{"none", "0", "", false, time.Minute,
			"haproxy.cfg:2 defaults timeout client 0 (client-fin unset); net.ipv4.tcp_fin_timeout 60s",
			"60s; haproxy.cfg:2 defaults timeout client 0 (client-fin unset)"},
		{"changed", "1h", "timeout client-fin 3s", true, time.Minute,
			"the configuration has changed since haproxy 7 started, and what it runs with is not known; net.ipv4.tcp_fin_timeout 60s",
			"60s; the configuration has changed since haproxy 7 started, and what it runs with is not known"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := strings.NewReplacer("SECONDS", test.client, "FIN", test.fin).Replace(config)
			c, err := haproxy.Parse([]haproxy.Source{{Name: "/etc/haproxy/haproxy.cfg", Text: []byte(text)}}, haproxy.Options{})
			if err != nil {
				t.Fatal(err)
			}
			rules := Rules{HAProxy: haproxy.NewView([]haproxy.Process{{PID: 7, Netns: 1, Config: c, Changed: test.changed}})}
			flow := events.Flow{
				Local:  events.EndpointFrom(netip.MustParseAddrPort("192.0.2.9:80")),
				Remote: events.EndpointFrom(netip.MustParseAddrPort("192.0.2.77:50000")),
			}
			place := rules.Place(1, flow, events.Inbound, 7)
			timers := events.Timers{FinTimeout: time.Minute}
			l := rules.For(events.Held, timers, place, 0)
			if l.Duration != test.want || l.Source() != test.source || l.String() != test.text {
				t.Errorf("%v by %q, %q", l.Duration, l.Source(), &l)
			}
			if closed := rules.For(events.Minisock, timers, place, 0); closed.Duration != time.Minute || closed.Source() != "net.ipv4.tcp_fin_timeout 60s" {
				t.Errorf("of a minisock: %v by %s", closed.Duration, closed.Source())
			}
			rules.Held = 9 * time.Second
			if own := rules.For(events.Held, timers, place, 0); own.Source() != "--limit 9s" {
				t.Errorf("with a limit of one's own: %s", own.Source())
			}
			if rules.Place(1, flow, events.Outbound, 7) != 0 || rules.Place(1, flow, events.Inbound, 8) != 0 {
				t.Error("what is not HAProxy's has a place there")
			}
		})
	}
}
