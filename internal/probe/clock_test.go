// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestBootOffset(t *testing.T) {
	for text, want := range map[string]int64{
		"monotonic          0         0\nboottime           0         0\n": 0,
		"monotonic       7200         0\nboottime        3600       500\n": 3600e9 + 500,
		"monotonic          0         0\nboottime         -10 999999999\n": -10e9 + 999999999,
		"":                                 0,
		"monotonic          1         0\n": 0,
		"boottime           one       0\n": 0,
	} {
		if got := bootOffset(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

// TestWallClock steps the wall clock by an hour: what is printed of a time then is
// by the clock as it is set, and what lies between two times is what it was.
func TestWallClock(t *testing.T) {
	var clock WallClock
	earlier := Now()
	entered := earlier.Add(-time.Minute)
	// ours is what a step moves: now is as long after it as by the boot clock.
	ours := func(when string) {
		t.Helper()
		began := Now()
		off := time.Since(clock.Time(entered)) - Now().Sub(entered)
		if within := Now().Sub(began) + time.Millisecond; off.Abs() > within {
			t.Errorf("%s what is printed is %s off, want %s at most", when, off, within)
		}
	}
	ours("at first")
	// In a bubble the wall clock is another, and only we move it: the boot clock
	// goes on as it is.
	synctest.Test(t, func(t *testing.T) {
		ours("after a step back of years")
		for _, step := range []time.Duration{time.Hour, 2 * time.Millisecond} {
			began := Now()
			first := clock.Time(entered)
			time.Sleep(step)
			ours("after a step of " + step.String())
			second := clock.Time(entered)
			if moved := second.Sub(first); (moved - step).Abs() > Now().Sub(began)+time.Millisecond {
				t.Errorf("a step of %s moves what is printed by %s", step, moved)
			}
			if apart := clock.Time(earlier).Sub(second); apart != time.Minute {
				t.Errorf("what is a minute apart is printed %s apart after a step of %s", apart, step)
			}
		}
	})
}
