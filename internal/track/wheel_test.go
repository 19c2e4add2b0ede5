// SPDX-License-Identifier: Apache-2.0

package track

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
)

const tick = time.Duration(1 << tickBits)

// The wheel against a list that is searched: nothing expires early, nothing
// more than a tick late, and next is never later than that.
func TestWheelAgainstList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var (
			w       wheel
			s       slab
			list    []index
			removed []index // may be used again
		)
		now := events.Time(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "now"))
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		// Powers of ten of a nanosecond, up to three years.
		far := func() time.Duration {
			d := time.Duration(1)
			for range random.IntN(18) {
				d *= 10
			}
			return time.Duration(random.Int64N(int64(d) + 1))
		}
		add := func(at events.Time) {
			i := index(0)
			if len(removed) > 0 {
				i, removed = removed[len(removed)-1], removed[:len(removed)-1]
			} else {
				i = s.take()
			}
			w.add(&s, i, at)
			list = append(list, i)
		}
		due := func(i index) events.Time { return s.at(i).due }
		expire := func() {
			before := slices.Clone(list)
			most := 1 + random.IntN(8)
			for expired := most; expired == most; {
				expired = 0
				w.expire(&s, now, most, func(i index) {
					expired++
					if !slices.Contains(list, i) {
						t.Fatalf("%d expired, and is not in the wheel", i)
					}
					if due(i) > now {
						t.Fatalf("%d expired %v early", i, due(i).Sub(now))
					}
					list = slices.DeleteFunc(list, func(j index) bool { return j == i })
					removed = append(removed, i)
					if random.IntN(4) == 0 { // A deadline may be followed by another.
						add(now.Add(tick + far()))
					}
				})
				if next := w.next(); expired == most && next > now && slices.ContainsFunc(list, func(i index) bool {
					return slices.Contains(before, i) && due(i).Add(tick) <= now
				}) {
					t.Fatalf("next is %v late with deadlines that have passed", next.Sub(now))
				}
			}
			for _, i := range list {
				if slices.Contains(before, i) && due(i).Add(tick) <= now {
					t.Fatalf("%d is %v past its deadline", i, now.Sub(due(i)))
				}
			}
		}
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			switch do := random.IntN(10); {
			case do < 5:
				at := now.Add(far())
				if random.IntN(10) == 0 {
					at = now.Add(-min(far(), time.Duration(now))) // Past already.
				}
				add(at)
			case do < 7 && len(list) > 0:
				n := random.IntN(len(list))
				i := list[n]
				w.remove(&s, i)
				w.remove(&s, i) // It is not in any more.
				list = slices.Delete(list, n, n+1)
				removed = append(removed, i)
			case do < 9:
				now = now.Add(far())
				expire()
			default:
				// As the loop does: sleep until next, and look.
				if next := w.next(); next != noDeadline {
					now = max(now, next)
					expire()
				}
			}
			next := w.next()
			if (next == noDeadline) != (len(list) == 0) {
				t.Fatalf("next is %v with %d in the wheel", next, len(list))
			}
			for _, i := range list {
				if next > max(due(i).Add(tick), now) {
					t.Fatalf("next is %v after a deadline", next.Sub(due(i)))
				}
			}
		}
		// Sleeping from one next to the other empties it.
		for range 1000 + 10*len(list) {
			next := w.next()
			if next == noDeadline {
				break
			}
			now = max(now, next)
			w.expire(&s, now, math.MaxInt, func(i index) {
				if due(i) > now {
					t.Fatalf("%d expired %v early", i, due(i).Sub(now))
				}
				list = slices.DeleteFunc(list, func(j index) bool { return j == i })
			})
		}
		if len(list) != 0 || w.used != [levels]uint64{} {
			t.Fatalf("%d left in the wheel, %v", len(list), w.used)
		}
	})
}

// A connection without a deadline is not in the wheel.
func TestWheelNoDeadline(t *testing.T) {
	var (
		w wheel
		s slab
	)
	i := s.take()
	w.add(&s, i, noDeadline)
	if w.next() != noDeadline {
		t.Errorf("next is %v", w.next())
	}
	w.remove(&s, i)
}

// Indices that are given back are used again, zeroed, and the slab grows by chunks.
func TestSlab(t *testing.T) {
	var s slab
	const n = 3 << chunkBits
	for range n {
		s.at(s.take()).cookie = 1
	}
	s.give(7)
	s.give(n)
	for _, want := range []index{n, 7, n + 1} {
		if i := s.take(); i != want || *s.at(i) != (conn{}) {
			t.Errorf("took %d, %+v; want %d, zeroed", i, *s.at(i), want)
		}
	}
	if len(s.chunks) != 4 {
		t.Errorf("%d chunks for %d", len(s.chunks), n+1)
	}
}
