// SPDX-License-Identifier: Apache-2.0

// Package limits decides how long a connection may stay in FIN_WAIT2, and says
// on whose word.
package limits

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

// TimeWaitLen is TCP_TIMEWAIT_LEN (include/net/tcp.h): the longest a minisock
// waits, and what is taken off a fin timeout that is longer.
const TimeWaitLen = 60 * time.Second

// Rule is a limit of the user's own.
type Rule struct {
	Name string
	// Match selects the connections. Where it names no stage, only held ones:
	// how long the others may stay, the kernel sees to.
	Match      Match
	FinTimeout time.Duration
}

// Rules are what limits depend on beside the connection itself.
type Rules struct {
	// User are the user's rules: the first that selects a connection has its limit.
	User  []Rule
	Names Names // for User
	// Held is the user's own limit for held connections, which the kernel does
	// not limit; 0 leaves it to HAProxy's timeouts and tcp_fin_timeout.
	Held time.Duration
	// HAProxy knows whose connection it is; nil where no HAProxy runs.
	HAProxy *haproxy.View
}

// Limit is a duration that a connection should not exceed, and its source. It
// runs from the entry into FIN_WAIT2 for a held connection, from the close for
// the others.
type Limit struct {
	Duration time.Duration
	// Slack is what the timer behind the limit may be late by. Timers of the
	// kernel are late by up to an eighth (kernel/time/timer.c).
	Slack  time.Duration
	source source
	value  time.Duration  // of the setting that source names
	place  *haproxy.Place // of a held connection of HAProxy, else nil
	rule   *Rule          // of fromRule
}

type source uint8

const (
	fromFinTimeout source = iota
	fromFinTimeoutAbove60
	fromLinger2
	fromLinger2Above60
	fromRTO
	fromRTOAbove60
	fromNegativeLinger2
	fromOption
	fromTimer
	fromHAProxy
	fromRule
)

// Kind names the setting that limits, without its value. There are no more kinds
// than there are settings: one for each rule, and some ten others.
func (l Limit) Kind() string {
	switch l.source {
	case fromLinger2, fromLinger2Above60, fromNegativeLinger2:
		return "TCP_LINGER2"
	case fromRTO, fromRTOAbove60:
		return "RTO"
	case fromOption:
		return "--limit"
	case fromTimer:
		return "timewait timer"
	case fromHAProxy:
		return l.place.Timeout.Setting()
	case fromRule:
		return l.rule.Name
	}
	return "tcp_fin_timeout"
}

// User says whether it is a limit of the user's own, which no timer of the
// kernel's is behind.
func (l Limit) User() bool { return l.source == fromRule || l.source == fromOption }

// Source says in words whose limit it is.
func (l Limit) Source() string {
	doubled := func(setting string) string {
		return fmt.Sprintf("%s %s: 2 × (%s − 60s)", setting, human(l.value), human(l.value))
	}
	const finTimeout, linger2, rto = "net.ipv4.tcp_fin_timeout", "TCP_LINGER2", "3.5 × RTO"
	switch l.source {
	case fromFinTimeoutAbove60:
		return doubled(finTimeout)
	case fromLinger2:
		return linger2 + " " + human(l.value)
	case fromLinger2Above60:
		return doubled(linger2)
	case fromRTO:
		return rto + " " + human(l.value)
	case fromRTOAbove60:
		return doubled(rto)
	case fromNegativeLinger2:
		return linger2 + " < 0: reset at close"
	case fromOption:
		return "--limit " + human(l.value)
	case fromTimer:
		return "timewait timer " + human(l.value)
	case fromHAProxy:
		return l.place.Source()
	case fromRule:
		return fmt.Sprintf("rule %q %s", l.rule.Name, human(l.value))
	}
	if l.place != nil {
		return l.place.Source() + "; " + finTimeout + " " + human(l.value)
	}
	return finTimeout + " " + human(l.value)
}

// String is the Source, and the duration where that is not the setting's own value.
func (l Limit) String() string {
	if l.source == fromFinTimeout && l.place != nil {
		return human(l.Duration) + "; " + l.place.Source()
	}
	if l.Duration == l.value {
		return l.Source()
	}
	return human(l.Duration) + " by " + l.Source()
}

// Place finds the proxy of HAProxy that a connection belongs to: its number for
// For and HAProxy.Place, 0 if it belongs to none.
func (r Rules) Place(netns uint32, f events.Flow, side events.Side, pid uint32) uint32 {
	if r.HAProxy == nil {
		return 0
	}
	s := haproxy.Socket{
		Netns:  netns,
		Local:  netip.AddrPortFrom(f.Local.IP(), f.Local.Port),
		Remote: netip.AddrPortFrom(f.Remote.IP(), f.Remote.Port),
		Device: f.Device,
		Side:   haproxy.ClientSide,
		PID:    int(pid),
	}
	if side == events.Outbound {
		s.Side = haproxy.ServerSide
	}
	return r.HAProxy.Find(s)
}

// Choose is the number, for For, of the first of the user's rules that selects a
// connection; 0 if none does.
func (r *Rules) Choose(s *Subject) uint16 {
	for i := range r.User {
		m := &r.User[i].Match
		if (m.Stage != 0 || s.Stage == events.Held) && m.Selects(s, r.Names) {
			return uint16(i + 1)
		}
	}
	return 0
}

// For is the limit of a connection in a stage, of the place that Place found,
// and of the rule that Choose did.
//
// A held one of HAProxy has until client-fin or server-fin ends it. Where those
// are unset, what ends it instead is its limit too if it is no longer than
// tcp_fin_timeout; a longer one is the very problem, and tcp_fin_timeout stays
// the yardstick, as it is for what is not HAProxy's.
func (r *Rules) For(stage events.Stage, t events.Timers, place uint32, rule uint16) Limit {
	if rule != 0 {
		rule := &r.User[rule-1]
		return Limit{Duration: rule.FinTimeout, source: fromRule, value: rule.FinTimeout, rule: rule}
	}
	if stage != events.Held {
		return Closed(t)
	}
	if r.Held > 0 {
		return Limit{Duration: r.Held, source: fromOption, value: r.Held}
	}
	l := Limit{Duration: t.FinTimeout, source: fromFinTimeout, value: t.FinTimeout}
	if place == 0 {
		return l
	}
	l.place = r.HAProxy.Place(place)
	timeout, known := l.place.Ends()
	if known && timeout.Duration > 0 && (timeout.Explicit() || timeout.Duration <= t.FinTimeout) {
		l.Duration, l.source, l.value = timeout.Duration, fromHAProxy, timeout.Duration
	}
	return l
}

// FromTimer is the limit of a minisock of which only its timer is known: d from
// the close until it fires.
func FromTimer(d time.Duration) Limit {
	return Limit{Duration: d, Slack: d / 8, source: fromTimer, value: d}
}

// WithPlace is l with what stands for its place in the source, which is the
// same but for the names.
func (l Limit) WithPlace(stands func(*haproxy.Place) *haproxy.Place) Limit {
	if l.place != nil {
		l.place = stands(l.place)
	}
	return l
}

// Closed is the kernel's own deadline for a closed connection whose peer stays
// silent, from the close on.
//
// tcp_rcv_state_process(), net/ipv4/tcp_input.c, and tcp_close() alike, where
// they do not reset at once because of a negative TCP_LINGER2:
//
//	tmo = tcp_fin_time(sk);
//	if (tmo > TCP_TIMEWAIT_LEN)
//		tcp_reset_keepalive_timer(sk, tmo - TCP_TIMEWAIT_LEN);
//
// and when that fires tcp_keepalive_timer() calls
// tcp_time_wait(sk, TCP_FIN_WAIT2, tmo - TCP_TIMEWAIT_LEN).
func Closed(t events.Timers) Limit {
	if t.Linger2 < 0 {
		return Limit{source: fromNegativeLinger2}
	}
	finTime, src := FinTime(t), fromFinTimeout
	switch {
	case finTime > configured(t):
		src = fromRTO
	case t.Linger2 > 0:
		src = fromLinger2
	}
	l := Limit{Duration: finTime, source: src, value: finTime}
	if finTime > TimeWaitLen {
		l.Duration = 2 * (finTime - TimeWaitLen)
		l.source++ // each source is followed by its Above60
	}
	l.Slack = l.Duration / 8
	return l
}

// FinTime is tcp_fin_time() (include/net/tcp.h): TCP_LINGER2 where it is set,
// else tcp_fin_timeout, but never under 3.5 × RTO.
func FinTime(t events.Timers) time.Duration {
	return max(configured(t), 7*t.RTO/2)
}

func configured(t events.Timers) time.Duration {
	if t.Linger2 != 0 {
		return t.Linger2
	}
	return t.FinTimeout
}

// human prints whole seconds as such: 60s, not 1m0s.
func human(d time.Duration) string {
	if d%time.Second == 0 && d < 10*time.Minute {
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return d.Round(time.Millisecond).String()
}
