// SPDX-License-Identifier: Apache-2.0

package track

import "unsafe"

// An index names a connection of a slab; 0 names none.
type index uint32

const chunkBits = 10

type chunk [1 << chunkBits]conn

// A Memory gives as many bytes as it is asked for, zeroed and aligned for a uint64,
// for good. Connections have no pointers: it need not be of Go's heap.
type Memory func(bytes int) []byte

// A slab holds connections at addresses that stay, in chunks, so that a growing
// table is never copied and the garbage collector has nothing to follow.
type slab struct {
	memory Memory // nil: Go's heap
	chunks []*chunk
	spare  []*chunk // not used yet
	free   index    // a list through conn.next
	made   index    // indices handed out so far
}

func (s *slab) at(i index) *conn { return &s.chunks[i>>chunkBits][i&(1<<chunkBits-1)] }

// take returns a zeroed connection.
func (s *slab) take() index {
	if i := s.free; i != 0 {
		c := s.at(i)
		s.free = c.next
		*c = conn{}
		return i
	}
	s.made++
	if int(s.made>>chunkBits) == len(s.chunks) {
		s.chunks = append(s.chunks, s.more())
	}
	return s.made
}

func (s *slab) more() *chunk {
	if last := len(s.spare) - 1; last >= 0 {
		c := s.spare[last]
		s.spare = s.spare[:last]
		return c
	}
	return &memory[chunk](s.memory, 1)[0]
}

// reuse takes a table's entries as chunks.
func (s *slab) reuse(entries []tableEntry) {
	clear(entries)
	n := len(entries) * int(unsafe.Sizeof(tableEntry{})) / int(unsafe.Sizeof(chunk{}))
	if n == 0 {
		return
	}
	chunks := unsafe.Slice((*chunk)(unsafe.Pointer(unsafe.SliceData(entries))), n)
	for i := range chunks {
		s.spare = append(s.spare, &chunks[i])
	}
}

// memory makes n zeroed values that have no pointers.
func memory[T any](from Memory, n int) []T {
	if from == nil {
		return make([]T, n)
	}
	bytes := from(n * int(unsafe.Sizeof(*new(T))))
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(bytes))), n)
}

func (s *slab) give(i index) {
	c := s.at(i)
	*c = conn{next: s.free}
	s.free = i
}

// each calls fn for each connection. Those that were given back are zeroed, and
// a connection has a stage. fn may give back the one it is called with.
func (s *slab) each(fn func(index, *conn)) {
	for i := index(1); i <= s.made; i++ {
		if c := s.at(i); c.stage != 0 {
			fn(i, c)
		}
	}
}
