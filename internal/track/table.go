// SPDX-License-Identifier: Apache-2.0

package track

import "math/bits"

// A table finds connections of a slab by their cookies: open addressing with
// linear probing, where an entry has the hash and the index, so that to grow it
// touches no connection and to look one up touches that one alone. A map of Go's
// takes twice the memory and half as much time again.
type table struct {
	entries []tableEntry // a power of two of them, or none
	count   int
}

type tableEntry struct {
	hash  uint32
	index index // 0: free
}

// leastEntries is what a table begins with.
const leastEntries = 1 << 8

// lineMask is for the entry in a cache line, which has eight.
const lineMask = 7

// hashOf spreads cookies by Fibonacci hashing, but those that the kernel counts up
// one after the other stay together, a cache line of them: connections that come
// one after the other then wait for memory once.
func hashOf(cookie uint64) uint32 {
	return uint32((cookie&^lineMask)*0x9e3779b97f4a7c15>>32)&^lineMask | uint32(cookie&lineMask)
}

// home is where the entry of a hash is, or was meant to be.
func (t *table) home(hash uint32) int {
	return int(hash>>(33-bits.Len(uint(len(t.entries)))))&^lineMask | int(hash&lineMask)
}

func (t *table) after(at int) int { return (at + 1) & (len(t.entries) - 1) }

// find is the place of a cookie's entry, or the free one where it belongs.
func (t *table) find(s *slab, cookie uint64) int {
	hash := hashOf(cookie)
	at := t.home(hash)
	for {
		e := t.entries[at]
		if e.index == 0 || e.hash == hash && s.at(e.index).cookie == cookie {
			return at
		}
		at = t.after(at)
	}
}

// get returns the connection that has a cookie; 0 and false if there is none.
func (t *table) get(s *slab, cookie uint64) (index, bool) {
	if t.count == 0 {
		return 0, false
	}
	i := t.entries[t.find(s, cookie)].index
	return i, i != 0
}

// add is for a connection that is not in it.
func (t *table) add(s *slab, i index) {
	if t.count >= len(t.entries)/4*3 {
		t.grow(s)
	}
	cookie := s.at(i).cookie
	t.entries[t.find(s, cookie)] = tableEntry{hashOf(cookie), i}
	t.count++
}

// grow doubles it. What it has had is for connections from then on.
func (t *table) grow(s *slab) {
	before := t.entries
	t.entries = memory[tableEntry](s.memory, max(2*len(before), leastEntries))
	for _, e := range before {
		if e.index == 0 {
			continue
		}
		at := t.home(e.hash)
		for t.entries[at].index != 0 {
			at = t.after(at)
		}
		t.entries[at] = e
	}
	s.reuse(before)
}

// remove takes out the connection that has a cookie, which is in it. What follows
// moves up, if it was only pushed along: nothing marks where something was.
func (t *table) remove(s *slab, cookie uint64) {
	free := t.find(s, cookie)
	for at := t.after(free); t.entries[at].index != 0; at = t.after(at) {
		mask := len(t.entries) - 1
		if (at-t.home(t.entries[at].hash))&mask >= (at-free)&mask {
			t.entries[free] = t.entries[at]
			free = at
		}
	}
	t.entries[free] = tableEntry{}
	t.count--
}
