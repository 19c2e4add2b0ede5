// SPDX-License-Identifier: Apache-2.0

package track

import (
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// conn is one connection of the table. It is kept small, two cache lines, and free
// of pointers: there may be a million.
type conn struct {
	cookie     uint64
	remote     [16]byte
	remotePort uint16
	localPort  uint16
	origin     uint32 // by number
	place      uint32 // of HAProxy's, by number

	since    events.Time // the entry into FIN_WAIT2, or the earliest that is known
	closed   events.Time // when the last process gave it up; 0 while held
	mini     events.Time // when it became a minisock; 0 before
	alive    events.Time // the last event or snapshot that showed it
	deadline events.Time // when the kernel's timer ends a closed one; 0 while none runs

	// Of its settings, in the units that fit: up to 49 days in milliseconds.
	finTimeout, rto uint32 // ms
	linger2         int32  // ms

	inode uint32 // of the held socket, as the last snapshot has it; sockfs gives no larger ones

	// The place in the wheel.
	due         events.Time
	next, prev  index
	level, slot uint8
	timed       bool

	rule     uint16 // of the user's, by number
	stage    events.Stage
	side     events.Side
	closedBy events.ClosedBy
	inexact  bool // since is a bound: it was there before us
	unsplit  bool // how long it was held, and how long closed, is not known
	overdue  bool
	oddTimer bool // the minisock's timer is not what the settings say
	unsaid   bool // no notice has been given of it yet: its process is looked for
}

func (c *conn) timers() events.Timers {
	return events.Timers{
		FinTimeout: time.Duration(c.finTimeout) * time.Millisecond,
		Linger2:    time.Duration(c.linger2) * time.Millisecond,
		RTO:        time.Duration(c.rto) * time.Millisecond,
	}
}

func (c *conn) setTimers(t events.Timers) {
	c.finTimeout = uint32(t.FinTimeout / time.Millisecond)
	c.linger2 = int32(t.Linger2 / time.Millisecond)
	c.rto = uint32(t.RTO / time.Millisecond)
}

func (c *conn) limit(rules *limits.Rules) limits.Limit {
	if c.oddTimer {
		return limits.FromTimer(c.deadline.Sub(c.closed))
	}
	return rules.For(c.stage, c.timers(), c.place, c.rule)
}

// limitFrom is when the limit began to run.
func (c *conn) limitFrom() events.Time {
	if c.stage == events.Held {
		return c.since
	}
	return c.closed
}

// Conn is what is known of a connection at a moment.
type Conn struct {
	Cookie  uint64
	Netns   uint32
	Flow    events.Flow
	Side    events.Side
	Stage   events.Stage // the last it was in
	Process events.Process
	Place   *haproxy.Place // the proxy of HAProxy that it belongs to, nil if to none
	// ClosedBy is how our FIN was sent, or that the process has closed since; 0 unknown.
	ClosedBy events.ClosedBy

	// Since is the entry into FIN_WAIT2. Where it is not exact, the connection
	// was there before, and Duration and the last stage are at least what they say.
	Since      events.Time
	SinceExact bool

	// Duration is the time in FIN_WAIT2 so far, or to its end; the stages are
	// its parts. StagesKnown is false where the kernel shows only the sum.
	Duration                 time.Duration
	Held, Orphaned, Minisock time.Duration
	StagesKnown              bool

	Limit   limits.Limit
	Overdue bool

	// End is set once it has left. EndExact is false where it is only known to
	// have left between the last look and now: Duration ends at the last look.
	End      events.End
	EndExact bool
}

// origin is that of c. It is valid until a connection comes or goes.
func (t *Tracker) origin(c *conn) *origin { return t.origins.at(c.origin) }

func (t *Tracker) flow(c *conn) events.Flow {
	from := t.origin(c)
	return events.Flow{
		Local:  events.Endpoint{Addr: from.local, Port: c.localPort},
		Remote: events.Endpoint{Addr: c.remote, Port: c.remotePort},
		Device: from.device,
	}
}

// setOrigin is for a connection that has none yet.
func (t *Tracker) setOrigin(c *conn, netns uint32, f events.Flow, p events.Process) {
	c.remote, c.remotePort, c.localPort = f.Remote.Addr, f.Remote.Port, f.Local.Port
	c.origin = t.origins.hold(origin{process: p, netns: netns, device: f.Device, local: f.Local.Addr})
}

// setProcess is for a connection whose process becomes known later.
func (t *Tracker) setProcess(c *conn, p events.Process) {
	from := *t.origin(c)
	from.process = p
	before := c.origin
	c.origin = t.origins.hold(from)
	t.origins.release(before)
}

// view is c as of now.
func (t *Tracker) view(c *conn, now events.Time) Conn {
	from := t.origin(c)
	v := Conn{
		Cookie:      c.cookie,
		Netns:       from.netns,
		Flow:        t.flow(c),
		Side:        c.side,
		Stage:       c.stage,
		Process:     from.process,
		ClosedBy:    c.closedBy,
		Since:       c.since,
		SinceExact:  !c.inexact,
		Duration:    max(now.Sub(c.since), 0),
		StagesKnown: !c.unsplit,
		Limit:       c.limit(&t.rules),
		Overdue:     c.overdue,
	}
	if c.place != 0 {
		v.Place = t.rules.HAProxy.Place(c.place)
	}
	if c.unsplit {
		return v
	}
	held, orphaned := now, now
	if c.mini != 0 {
		orphaned = c.mini
		v.Minisock = max(now.Sub(c.mini), 0)
	}
	if c.closed != 0 {
		held = c.closed
		v.Orphaned = max(orphaned.Sub(c.closed), 0)
	}
	v.Held = max(held.Sub(c.since), 0)
	return v
}
