// SPDX-License-Identifier: Apache-2.0

package track

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// TestOldestStay fills a small table from a walk of many sockets in random order,
// again and again while new ones come: those that have been there longest are in it.
func TestOldestStay(t *testing.T) {
	const capacity, sockets = 1000, 5000
	order := rand.New(rand.NewPCG(1, 2))
	tracker := New(limits.Rules{}, capacity, nil)
	now := boot.Add(time.Duration(sockets) * time.Second)
	// The cookie is the age in seconds.
	rows := make([]events.Socket, sockets)
	for i := range rows {
		age := i + 1
		rows[i] = events.Socket{Cookie: uint64(age), Netns: 1, State: events.FinWait2, Stage: events.Held,
			Timers: events.Timers{FinTimeout: 24 * time.Hour}, LastAck: time.Duration(age) * time.Second}
	}
	for pass := range 3 {
		order.Shuffle(len(rows), func(a, b int) { rows[a], rows[b] = rows[b], rows[a] })
		tracker.BeginSnapshot(now)
		for i := range rows {
			rows[i].Time = now.Add(1)
			tracker.Observe(rows[i : i+1])
			tracker.Apply(&events.Event{Time: now.Add(1), Cookie: uint64(sockets + 1 + pass*sockets + i), Netns: 1,
				Old: events.FinWait1, New: events.FinWait2})
		}
		tracker.EndSnapshot(events.Coverage{End: now.Add(2), Netns: map[uint32]events.NetnsCounters{1: {}}},
			func(uint32, events.Flow) bool { return false }, nil)

		missing := 0
		for age := sockets - capacity/2; age <= sockets; age++ {
			if _, ok := tracker.Get(uint64(age), now); !ok {
				missing++
			}
		}
		if missing > 0 {
			t.Errorf("walk %d: %d of the oldest %d are not in the table, which takes %d", pass+1, missing, capacity/2, capacity)
		}
		c := tracker.Counters()
		if tracker.Len() > capacity || c.Entered != c.Left+uint64(tracker.Len()) {
			t.Errorf("walk %d: %d entered, %d left, %d are there", pass+1, c.Entered, c.Left, tracker.Len())
		}
		// What is not in the table was turned away, of the walk or of the events.
		if least := uint64((pass + 1) * (2*sockets - capacity) / 2); c.Shed < least {
			t.Errorf("walk %d: %d turned away, want %d at least", pass+1, c.Shed, least)
		}
		now = now.Add(time.Second)
	}
}
