// SPDX-License-Identifier: Apache-2.0

package track

import (
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// TestSeenPastLimit: what a snapshot has shown past its limit is overdue without
// another look, and what it has shown before that is looked at once more.
func TestSeenPastLimit(t *testing.T) {
	const limit = time.Minute
	for age, want := range map[time.Duration]int{limit - time.Second: 1, 2 * limit: 0, time.Hour: 0} {
		tracker := New(limits.Rules{}, 10, nil)
		now := boot.Add(2 * time.Hour)
		tracker.BeginSnapshot(now)
		tracker.Observe([]events.Socket{{Time: now, Cookie: 1, Netns: 1, State: events.FinWait2, Stage: events.Held,
			Timers: events.Timers{FinTimeout: limit}, LastAck: age}})
		tracker.EndSnapshot(events.Coverage{End: now, Netns: map[uint32]events.NetnsCounters{1: {}}}, nil, nil)
		looks, overdue := 0, 0
		for _, n := range tracker.Advance(now.Add(limit), func(uint32, events.Flow, uint64) bool { looks++; return true }) {
			if n.Kind == Overdue {
				overdue++
			}
		}
		if looks != want || overdue != 1 {
			t.Errorf("seen %s after its entry: %d looks and %d times overdue, want %d and 1", age, looks, overdue, want)
		}
	}
}
