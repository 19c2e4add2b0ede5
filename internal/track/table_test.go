// SPDX-License-Identifier: Apache-2.0

package track

import (
	"sync"
	"testing"
	"time"
	"unsafe"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/limits"
)

// A table is what a map is, with cookies whose entries collide.
func TestTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var (
			s     slab
			under table
		)
		model := map[uint64]index{}
		// Few hashes, at the end of the table among them: whatever is pushed
		// along goes round.
		cookies := rapid.SampledFrom(colliding())
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				cookie := cookies.Draw(t, "cookie")
				if _, there := model[cookie]; there {
					t.Skip()
				}
				i := s.take()
				s.at(i).cookie = cookie
				under.add(&s, i)
				model[cookie] = i
			},
			"remove": func(t *rapid.T) {
				cookie := cookies.Draw(t, "cookie")
				i, there := model[cookie]
				if !there {
					t.Skip()
				}
				under.remove(&s, cookie)
				s.give(i)
				delete(model, cookie)
			},
			"": func(t *rapid.T) {
				if under.count != len(model) {
					t.Fatalf("%d entries, want %d", under.count, len(model))
				}
				for _, cookie := range colliding() {
					got, found := under.get(&s, cookie)
					if want, there := model[cookie]; got != want || found != there {
						t.Fatalf("cookie %d: %d, %v; want %d, %v", cookie, got, found, want, there)
					}
				}
			},
		})
	})
}

// colliding are cookies of which many have the same place, the last one included.
var colliding = sync.OnceValue(func() (found []uint64) {
	least := table{entries: make([]tableEntry, leastEntries)}
	places := map[int]int{}
	for cookie := range uint64(1 << 16) {
		place := least.home(hashOf(cookie))
		if (place < 2 || place > 252) && places[place] < 60 || place%32 == 7 && places[place] < 10 {
			places[place]++
			found = append(found, cookie)
		}
	}
	return found
})

// What has been a smaller table is used for connections: a table that has grown takes
// no more memory than one that was made as large.
func TestMemory(t *testing.T) {
	const n = 110_000 // The last growth is some time ago.
	given := 0
	tracker := New(limits.Rules{}, n, func(bytes int) []byte {
		given += bytes
		return make([]byte, bytes)
	})
	for i := range n {
		ev := entry(uint64(i+1), boot.Add(time.Duration(i)))
		tracker.Apply(&ev)
	}
	for i := range n {
		if c, there := tracker.Get(uint64(i+1), boot); !there || c.Since != boot.Add(time.Duration(i)) {
			t.Fatalf("connection %d is %+v", i+1, c)
		}
	}
	const chunkBytes = int(unsafe.Sizeof(chunk{}))
	entries := len(tracker.table.entries) * int(unsafe.Sizeof(tableEntry{}))
	// Tables smaller than a chunk are not.
	if most := entries + (n>>chunkBits+1)*chunkBytes + chunkBytes; given > most {
		t.Errorf("%d bytes of memory, want %d at most", given, most)
	}
}
