// SPDX-License-Identifier: Apache-2.0

package track

import (
	"math"
	"math/bits"

	"github.com/fintrace/fintrace/internal/events"
)

const (
	tickBits   = 22 // a tick is 2^22 ns, 4.2 ms: the most a deadline is late by
	slotBits   = 6
	slots      = 1 << slotBits
	levels     = 7 // 2^(22+7×6) ns is more than the clock holds
	noDeadline = events.Time(math.MaxInt64)
)

// A wheel is a hierarchical timing wheel over connections of a slab: adding and
// removing cost the same for ten as for a million. A connection whose tick
// differs from now's first in its L-th group of six bits is at level L, in the
// slot that the group names; so the earliest is in the lowest level that is not
// empty, in its first slot.
type wheel struct {
	now  uint64 // the tick up to which all has expired
	used [levels]uint64
	head [levels][slots]index
}

func tickOf(at events.Time) uint64 { return (uint64(at) + 1<<tickBits - 1) >> tickBits }

// add puts c, which must not be in the wheel, where it expires at `at`.
func (w *wheel) add(s *slab, i index, at events.Time) {
	c := s.at(i)
	c.due = at
	if at == noDeadline {
		return
	}
	tick := max(tickOf(at), w.now)
	level := max(bits.Len64(tick^w.now)-1, 0) / slotBits
	slot := tick >> (level * slotBits) % slots
	head := &w.head[level][slot]
	c.timed, c.level, c.slot = true, uint8(level), uint8(slot)
	c.prev, c.next = 0, *head
	if *head != 0 {
		s.at(*head).prev = i
	}
	*head = i
	w.used[level] |= 1 << slot
}

// remove takes c out, if it is in.
func (w *wheel) remove(s *slab, i index) {
	c := s.at(i)
	if !c.timed {
		return
	}
	c.timed = false
	if c.next != 0 {
		s.at(c.next).prev = c.prev
	}
	if c.prev != 0 {
		s.at(c.prev).next = c.next
		return
	}
	w.head[c.level][c.slot] = c.next
	if c.next == 0 {
		w.used[c.level] &^= 1 << c.slot
	}
}

// first is the earliest slot in use and the tick at which it begins.
func (w *wheel) first() (level int, slot, tick uint64, ok bool) {
	for level := range levels {
		if w.used[level] == 0 {
			continue
		}
		slot := uint64(bits.TrailingZeros64(w.used[level]))
		above := w.now >> ((level + 1) * slotBits) << ((level + 1) * slotBits)
		return level, slot, above | slot<<(level*slotBits), true
	}
	return 0, 0, 0, false
}

// next is when expire should be called: no later than the earliest deadline's tick.
func (w *wheel) next() events.Time {
	_, _, tick, ok := w.first()
	if !ok {
		return noDeadline
	}
	return events.Time(tick << tickBits)
}

// expire takes out what is due by now, as many as most, and calls fn for each.
// fn may add and remove, but not what is due by now.
func (w *wheel) expire(s *slab, now events.Time, most int, fn func(index)) {
	until := uint64(now) >> tickBits
	for {
		level, slot, tick, ok := w.first()
		if !ok || tick > until {
			w.now = max(w.now, until)
			return
		}
		w.now = max(w.now, tick)
		for i := w.head[level][slot]; i != 0; i = w.head[level][slot] {
			if most == 0 && level == 0 {
				return
			}
			due := s.at(i).due
			w.remove(s, i)
			if most > 0 && tickOf(due) <= until {
				most--
				fn(i)
			} else {
				w.add(s, i, due)
			}
		}
		if most == 0 {
			return
		}
	}
}
