// SPDX-License-Identifier: Apache-2.0

package track

// An index names a connection of a slab; 0 names none.
type index uint32

const chunkBits = 10

// A slab holds connections at addresses that stay, in chunks, so that a growing
// table is never copied and the garbage collector has nothing to follow.
type slab struct {
	chunks []*[1 << chunkBits]conn
	free   index // a list through conn.next
	made   index // indices handed out so far
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
		s.chunks = append(s.chunks, new([1 << chunkBits]conn))
	}
	return s.made
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
