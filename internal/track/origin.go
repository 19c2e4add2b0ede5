// SPDX-License-Identifier: Apache-2.0

package track

import "github.com/fintrace/fintrace/internal/events"

// An origin is what a process's connections have in common. There are few, and
// each is half as large as all else that is kept of a connection.
type origin struct {
	process events.Process
	netns   uint32
	device  uint32   // the interface the socket is bound to
	local   [16]byte // its address
}

// origins keeps each origin once, by a number, for as long as a connection has it.
type origins struct {
	kept    []keptOrigin
	numbers map[origin]uint32
	free    []uint32
	last    uint32 // the one that was asked for last: most often it is the next too
}

type keptOrigin struct {
	origin
	uses uint32
}

func (o *origins) at(n uint32) *origin { return &o.kept[n].origin }

// hold returns the number of an origin that one more connection has.
func (o *origins) hold(v origin) uint32 {
	if int(o.last) < len(o.kept) && o.kept[o.last].uses > 0 && o.kept[o.last].origin == v {
		o.kept[o.last].uses++
		return o.last
	}
	n, known := o.numbers[v]
	switch last := len(o.free) - 1; {
	case known:
	case last >= 0:
		n, o.free = o.free[last], o.free[:last]
		o.kept[n] = keptOrigin{origin: v}
		o.numbers[v] = n
	default:
		n = uint32(len(o.kept))
		o.kept = append(o.kept, keptOrigin{origin: v})
		o.numbers[v] = n
	}
	o.kept[n].uses++
	o.last = n
	return n
}

// release is for a connection that has it no longer.
func (o *origins) release(n uint32) {
	kept := &o.kept[n]
	if kept.uses--; kept.uses == 0 {
		delete(o.numbers, kept.origin)
		o.free = append(o.free, n)
	}
}
