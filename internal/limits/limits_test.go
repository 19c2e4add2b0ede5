// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
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
					l := rules.For(stage, test.timers, 0)
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
			l := test.rules.For(events.Held, test.timers, 0)
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
