// SPDX-License-Identifier: Apache-2.0

package track

import (
	"cmp"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// TestSortSince compares the order by digits with one by comparisons, of times that are
// close together, far apart, and before the host's boot.
func TestSortSince(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		span := rapid.SampledFrom([]int64{0, 1, 1 << 11, 1 << 22, 1 << 40, math.MaxInt64}).Draw(t, "span")
		times := rapid.SliceOf(rapid.Int64Range(-span/2, span/2)).Draw(t, "times")
		var all []dated
		for i, at := range times {
			all = append(all, dated{events.Time(at), index(i)})
		}
		want := slices.Clone(all)
		slices.SortStableFunc(want, func(a, b dated) int { return cmp.Compare(a.since, b.since) })
		if got := sortSince(all); !slices.Equal(got, want) {
			t.Fatalf("%v are sorted as %v", times, got)
		}
	})
}

// TestOldest: of connections that came at the same time the one with the lower cookie is
// first, and those that are not selected are not there.
func TestOldest(t *testing.T) {
	tracker := New(limits.Rules{}, 10, nil)
	for _, c := range []struct {
		cookie uint64
		since  events.Time
	}{{5, 30}, {9, 10}, {2, 20}, {7, 10}, {4, 10}, {3, 5}} {
		tracker.Apply(&events.Event{Time: c.since, Cookie: c.cookie, Netns: 1, Old: events.FinWait1, New: events.FinWait2})
	}
	var got []uint64
	for c := range tracker.Oldest(40, func(c *Conn) bool { return c.Cookie != 3 }).All() {
		got = append(got, c.Cookie)
	}
	if want := []uint64{4, 7, 9, 2, 5}; !slices.Equal(got, want) {
		t.Errorf("the oldest are %v, want %v", got, want)
	}
}
