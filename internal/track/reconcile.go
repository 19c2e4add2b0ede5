// SPDX-License-Identifier: Apache-2.0

package track

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// jiffy is the longest there is (CONFIG_HZ=100): how exact a kernel timer's time is.
const jiffy = 10 * time.Millisecond

// stampError is how far an entry stamp, in whole milliseconds, may be off.
const stampError = 2 * time.Millisecond

// timerError is how far the times of a timer and of a stamp may be apart that are
// of the same moment.
const timerError = 2*jiffy + stampError

// BeginSnapshot is called before the first socket of a snapshot is read.
func (t *Tracker) BeginSnapshot(now events.Time) {
	t.pass++
	t.began = now
	t.doubtful = false
	t.unowned = false
	clear(t.ended)
}

// Observe takes sockets of the running snapshot. Of a held one whose process is not
// known nothing is said before Own. The notices are valid until the next call of a
// method that returns some.
func (t *Tracker) Observe(sockets []events.Socket) []Notice {
	t.begin()
	for n := range sockets {
		s := &sockets[n]
		if s.State == events.Listen {
			t.listeners[listener{s.Netns, s.Flow.Local.Port}] = t.pass
			continue
		}
		i, known := t.table.get(&t.slab, s.Cookie)
		switch {
		case known && s.State == events.TimeWait:
			t.finished(i, s)
		case known:
			t.refresh(i, s)
		case s.State != events.FinWait2 || t.gone(s.Cookie):
		case s.Handover != 0:
			t.find(s)
		default:
			t.seed(s)
		}
	}
	return t.notices
}

// finished ends a minisock that the peer's FIN has moved on to TIME_WAIT. Its
// timer was set to 60 s then, and where the peer sends timestamps its entry
// stamp was renewed; later packets renew both again.
func (t *Tracker) finished(i index, s *events.Socket) {
	c := t.slab.at(i)
	at := s.Time
	if s.HasTimer {
		at = min(at, s.Time.Add(s.Timer-limits.TimeWaitLen))
	}
	// A stamp that was not renewed is no later than what we know already, but
	// for being cut to milliseconds. Where the record of the handover was lost it
	// may be the time of that, which is before the timer was set.
	if stamp := s.Time.Add(-s.Entry); s.Entry >= 0 && stamp > c.alive.Add(stampError) &&
		(c.stage == events.Minisock || !s.HasTimer || at.Sub(stamp) <= timerError) {
		at = min(at, stamp)
	}
	if c.stage != events.Minisock {
		t.counters.Corrected++
		if c.closing() {
			// The record of the handover was lost.
			c.closed, c.mini = c.alive, c.alive
			t.setStage(c, events.Minisock)
		} else {
			// That of the peer's FIN was, which may have come in any stage.
			c.unsplit = true
		}
	}
	t.end(i, max(at, c.alive), events.PeerFIN, true)
}

// closing says that close() has been seen, but not yet what comes of it.
func (c *conn) closing() bool { return c.stage == events.Held && c.closedBy == events.ByClose }

// refresh brings a connection up to date with what a snapshot shows of it.
func (t *Tracker) refresh(i index, s *events.Socket) {
	c := t.slab.at(i)
	if !t.origin(c).process.Known() {
		switch {
		case s.Process.Known():
			t.own(i, s.Process, s.Time)
		case c.stage == events.Held && s.Stage == events.Held:
			c.inode, t.unowned = uint32(s.Inode), true
		}
	}
	if s.Time <= c.alive {
		return // Read before the last event.
	}
	seen := c.alive
	c.alive, c.inode = s.Time, uint32(s.Inode)
	switch {
	case s.Stage == c.stage:
		t.refreshLimit(i, s)
	case s.Stage > c.stage:
		// The record of its closing was lost, or of the handover.
		t.say(c, seen)
		t.counters.Corrected++
		if c.closing() {
			c.closed = seen
		}
		t.setStage(c, s.Stage)
		t.dateClosed(c, s, seen)
		t.moved(i, s.Time)
	}
}

func (t *Tracker) refreshLimit(i index, s *events.Socket) {
	c := t.slab.at(i)
	before := c.finTimeout
	switch c.stage {
	case events.Held:
		c.setTimers(s.Timers)
	case events.Minisock:
		if s.HasTimer && !c.oddTimer {
			c.deadline = s.Time.Add(s.Timer)
		}
	}
	// One that Advance had doubts about has no timer: this was the fresh look.
	if c.finTimeout != before || c.stage == events.Minisock || !c.timed && !c.overdue {
		t.confirm(i, s.Time)
	}
}

// confirm is for a connection that a snapshot has shown to be there: it is
// overdue, or will be asked for again.
func (t *Tracker) confirm(i index, now events.Time) {
	c := t.slab.at(i)
	if !c.overdue && (c.stage == events.Minisock || !c.timed) && c.overdueFrom(c.limit(&t.rules)) <= now {
		t.passLimit(c, now)
	}
	if t.relimit(i, now) {
		t.notify(Recovered, c, now)
	}
}

// gone says that a connection left after its row was read.
func (t *Tracker) gone(cookie uint64) bool {
	_, ended := t.ended[cookie]
	return ended
}

// find opens a minisock whose handover was not sent, as if it had been: the
// snapshot says what the event would have.
func (t *Tracker) find(s *events.Socket) {
	if t.table.count >= t.capacity {
		t.displace(s.Handover)
	}
	t.leave(0, &events.Event{
		Time: s.Handover, Cookie: s.Cookie, Netns: s.Netns, Flow: s.Flow, Old: events.FinWait2, New: events.Close,
		Process: s.Process, Timers: s.Timers, Dead: true, Accepted: s.Accepted,
	})
	if i, there := t.table.get(&t.slab, s.Cookie); there {
		t.counters.Found++
		t.refresh(i, s)
	}
}

// seed opens a connection that was there before us, or whose record was lost.
func (t *Tracker) seed(s *events.Socket) {
	// Any packet later than the entry makes the time of the last a bound: unknown
	// whether there was one.
	since, inexact := s.Time.Add(-s.LastAck), true
	if s.Stage == events.Minisock {
		// The entry stamp is the time of the last packet before the handover, or
		// of an orphan's timer: the peer's ACK of our FIN, where it was closed then.
		since, inexact = s.Time.Add(-max(s.Entry, 0)), s.Entry < 0
	}
	if t.table.count >= t.capacity {
		t.displace(since)
	}
	i := t.add(s.Cookie)
	if i == 0 {
		return
	}
	if t.pass > 1 {
		t.counters.Corrected++
	}
	c := t.slab.at(i)
	t.setOrigin(c, s.Netns, s.Flow, s.Process)
	t.setStage(c, s.Stage)
	c.side = t.sideOf(s.Accepted, s.Netns, s.Flow.Local.Port)
	c.alive, c.inode = s.Time, uint32(s.Inode)
	t.locate(c)
	c.setTimers(s.Timers)
	c.since, c.inexact = since, inexact
	if c.stage != events.Held {
		t.dateClosed(c, s, 0)
	}
	t.arm(i)
	switch {
	case c.stage != events.Held:
	case s.Process.Known():
		c.closedBy = events.ByShutdown
	default:
		c.unsaid, t.unowned = true, true
		return
	}
	t.notify(Opened, c, s.Time)
}

// Unowned are the inodes of the held connections of the running snapshot whose process
// is not known.
func (t *Tracker) Unowned() (inodes []uint64) {
	if !t.unowned {
		return nil
	}
	t.slab.each(func(_ index, c *conn) {
		if t.lacksOwner(c) {
			inodes = append(inodes, uint64(c.inode))
		}
	})
	return inodes
}

func (t *Tracker) lacksOwner(c *conn) bool {
	return c.stage == events.Held && c.alive >= t.began && !t.origin(c).process.Known()
}

// ownedAtOnce is how many connections Own says something of in one call.
const ownedAtOnce = 512

// Own gives those connections their processes: owner says who holds the socket of an
// inode. It does some at a time, until it returns nothing. The notices are valid until
// the next call of a method that returns some.
func (t *Tracker) Own(owner func(inode uint64) events.Process) []Notice {
	t.begin()
	for ; t.unowned && len(t.notices) < ownedAtOnce; t.owned++ {
		if t.owned >= t.slab.made {
			t.unowned, t.owned = false, 0
			break
		}
		i := t.owned + 1
		c := t.slab.at(i)
		if c.stage == 0 {
			continue
		}
		if t.lacksOwner(c) {
			if p := owner(uint64(c.inode)); p.Known() {
				t.own(i, p, c.alive)
			}
		}
		t.say(c, c.alive)
	}
	return t.notices
}

// own is for a connection whose process becomes known.
func (t *Tracker) own(i index, p events.Process, now events.Time) {
	c := t.slab.at(i)
	t.setProcess(c, p)
	if c.closedBy == 0 {
		c.closedBy = events.ByShutdown
	}
	t.locate(c)
	if t.relimit(i, now) {
		t.notify(Recovered, c, now)
	}
}

// displace makes room in a full table for a connection that has been there since
// a time: the youngest of some others goes, if it is younger and not overdue. So
// a walk, which finds the sockets in no order, leaves the oldest in the table.
func (t *Tracker) displace(since events.Time) {
	const some = 16
	var youngest index
	for range some {
		t.picked = t.picked*6364136223846793005 + 1442695040888963407 // Knuth's MMIX
		i := 1 + index(t.picked>>33)%t.slab.made
		c := t.slab.at(i)
		if c.stage != 0 && !c.overdue && c.since > since {
			youngest, since = i, c.since
		}
	}
	if youngest == 0 {
		return
	}
	t.drop(youngest)
	t.counters.Shed++
	t.counters.Entered-- // The one that it makes room for enters in its place.
}

// dateClosed finds out when a closed connection was closed, and became a
// minisock, from the timer that ends it. seen is when it was last known not to
// be, or 0.
func (t *Tracker) dateClosed(c *conn, s *events.Socket, seen events.Time) {
	timers := s.Timers
	if c.stage == events.Minisock {
		before := c.timers()
		timers.Linger2, timers.RTO = before.Linger2, before.RTO
	}
	c.setTimers(timers)
	c.closedBy = events.ByClose
	if !s.HasTimer { // An orphan that is just being made.
		c.closed = s.Time
		return
	}
	limit := limits.Closed(timers).Duration
	miniLife := limits.FinTime(timers)
	above60 := miniLife > limits.TimeWaitLen
	if above60 {
		miniLife -= limits.TimeWaitLen
	}
	c.deadline = s.Time.Add(s.Timer)
	if c.stage == events.Orphaned && above60 {
		c.deadline = c.deadline.Add(miniLife)
	}
	found := seen == 0 && c.closed == 0
	if c.closed == 0 {
		if found {
			seen = c.since
		}
		c.closed = c.deadline.Add(-limit)
		switch early := seen.Sub(c.closed); {
		case early.Abs() <= timerError:
			c.closed = seen // Closed at its entry, as most are.
		case early < 0:
			// Held before it was closed, or a longer timer than the settings give.
			c.unsplit = true
			c.inexact = c.inexact || found
		case found && c.inexact && (above60 || c.stage == events.Minisock):
			c.since = c.closed // It was in FIN_WAIT2 when it was closed, at the latest.
			c.unsplit = true
		default:
			// A shorter timer than the settings give: TCP_LINGER2, or they have changed.
			c.closed, c.oddTimer, c.unsplit = seen, true, true
			c.inexact = c.inexact || found
		}
	}
	if c.stage == events.Minisock {
		c.mini = c.closed
		switch {
		case above60 && found && s.Timer > miniLife+timerError:
			// By the settings it was an orphan first, but longer is left than they
			// give a minisock: it has TCP_LINGER2, which does not show.
			c.oddTimer = true
		case above60:
			c.mini = min(max(c.deadline.Add(-miniLife), seen, c.closed), s.Time)
		}
	}
}

// GiveUpSnapshot is called in place of EndSnapshot where the walk has failed:
// nothing is judged by its absence, and another snapshot is wanted.
func (t *Tracker) GiveUpSnapshot() {
	t.began = 0
	t.doubtful = true
	clear(t.ended)
}

// EndSnapshot is called after the last socket of a snapshot. What the snapshot
// should have shown and did not has left: its record was lost, or it was a
// minisock, which leaves without one. To tell a minisock's reset from a peer's
// FIN whose TIME_WAIT has made room for a new connection, reused says whether
// somebody has the flow now; of a connection in a namespace that was not looked
// at, holds says whether the process that held it then may hold its socket still,
// whose inode is 0 if it is not known. The notices are valid until the next call
// of a method that returns some.
func (t *Tracker) EndSnapshot(cov events.Coverage, reused func(netns uint32, f events.Flow) bool,
	holds func(p events.Process, inode uint64, then events.Time) bool) []Notice {
	t.begin()
	full := map[uint32]uint64{}
	for netns, counters := range cov.Netns {
		// A namespace that came after the first snapshot began its count at 0;
		// so did one that has been given the number of another.
		if before, ok := t.overflow[netns]; ok || t.pass > 1 {
			full[netns] = counters.TimeWaitOverflow
			if counters.TimeWaitOverflow >= before {
				full[netns] -= before
			}
		}
	}
	later := map[uint32]uint64{} // connections that the counter may have risen for and that the next snapshot judges
	t.slab.each(func(i index, c *conn) {
		from := t.origin(c)
		if c.alive >= t.began {
			if c.stage == events.Minisock && c.alive == c.mini {
				later[from.netns]++
			}
			return
		}
		_, covered := cov.Netns[from.netns]
		// No snapshot ever showed the minisock: there may never have been one.
		never := c.alive == c.mini && full[from.netns] > 0
		switch {
		case !covered:
			// Its namespace is gone, or closed to us: nothing will ever show the
			// end of a minisock, or of a full socket whose record was lost.
			if c.stage == events.Held && from.process.Known() && !c.closing() {
				if holds(from.process, uint64(c.inode), c.alive) {
					return
				}
			} else if c.overdueFrom(c.limit(&t.rules)) > cov.End {
				return
			}
			if c.stage != events.Minisock {
				t.counters.Corrected++
			}
			t.end(i, c.alive, events.Unseen, false)
		case c.stage != events.Minisock:
			t.counters.Corrected++
			t.end(i, c.alive, events.Unseen, false)
		case c.deadline <= cov.End.Add(jiffy) && never:
			// Or it was there, and the counter rose for others.
			t.end(i, c.alive, events.Unseen, false)
		case c.deadline <= cov.End.Add(jiffy):
			// Where it was seen past its deadline, the timer is late: by how much
			// is not known.
			t.end(i, max(c.deadline, c.alive), events.KernelTimeout, c.alive <= c.deadline)
		case never:
			full[from.netns]--
			t.end(i, c.mini, events.TableFull, true)
		case reused(from.netns, t.flow(c)):
			t.end(i, c.alive, events.Unseen, false)
		default:
			t.end(i, c.alive, events.Reset, false)
		}
	})
	slices.SortFunc(t.notices, func(a, b Notice) int { return cmp.Compare(a.Time, b.Time) })
	// Those of a namespace that was not looked at too: its number may be given
	// to another.
	maps.DeleteFunc(t.listeners, func(_ listener, pass uint32) bool { return pass != t.pass })
	for netns, counters := range cov.Netns {
		t.overflow[netns] = counters.TimeWaitOverflow - min(full[netns], later[netns])
	}
	t.began = 0
	clear(t.ended)
	return t.notices
}
