// SPDX-License-Identifier: Apache-2.0

package track

import (
	"sync"
	"testing"

	"pgregory.net/rapid"
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
