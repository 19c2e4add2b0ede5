// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"container/list"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// consistent checks what holds for a queue at all times.
func consistent(t *rapid.T, q *queue) {
	if n := q.news.Len() + q.told.Len(); n != len(q.byID) || n > capacity {
		t.Fatalf("%d alerts are listed, %d known", n, len(q.byID))
	}
	for told, l := range map[bool]*list.List{false: &q.news, true: &q.told} {
		var due time.Time
		for e := l.Front(); e != nil; e = e.Next() {
			it := e.Value.(*item)
			if it.at != e || it.told != told || q.byID[it.alert.ID] != it {
				t.Fatalf("%s is not where it is said to be", it.alert.ID)
			}
			if told && it.due.Before(due) {
				t.Fatalf("%s is due before one that stands before it", it.alert.ID)
			}
			due = it.due
		}
	}
}

// However alerts come while others are delivered, a sink is told the latest
// state of each, that it fired before that it changed, and nothing twice.
func TestQueue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		resend := rapid.SampledFrom([]time.Duration{0, time.Minute}).Draw(t, "resend")
		q := newQueue(resend, 3*time.Minute)
		now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
		latest := map[string]int{}     // the last state sent
		heard := map[string]int{}      // the last state told
		untold := map[string][]Event{} // since then
		resolved := map[string]bool{}  // the last state sent has
		var under []Alert              // delivery
		var before map[string][]Event  // what was untold when it began
		sent := 0
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				id := fmt.Sprint(rapid.IntRange(0, 4).Draw(t, "id"))
				sent++
				a := Alert{ID: id, Count: sent, Event: Fired}
				if _, known := latest[id]; known && !resolved[id] {
					a.Event = rapid.SampledFrom([]Event{Updated, Repeated, Resolved}).Draw(t, "event")
				}
				if resolved[id] = a.Event == Resolved; resolved[id] {
					a.EndsAt = &now
				}
				if shed := q.put(a); shed != 0 {
					t.Fatal("an alert was given up, and there is room")
				}
				latest[id] = sent
				untold[id] = append(untold[id], a.Event)
			},
			"take": func(t *rapid.T) {
				if under != nil {
					t.Skip("one is under way")
				}
				under, before = q.take(rapid.IntRange(1, 6).Draw(t, "n"), false, now), map[string][]Event{}
				for _, a := range under {
					want := Repeated
					if resolved[a.ID] {
						want = Resolved
					}
					if events := untold[a.ID]; len(events) > 0 {
						want = events[0]
						for _, e := range events[1:] {
							want = merge(want, e)
						}
					} else if resend == 0 {
						t.Fatalf("%s is told though nothing has happened", a.ID)
					}
					if a.Event != want || a.Count != latest[a.ID] {
						t.Fatalf("%s is told as %s %d, not %s %d", a.ID, a.Event, a.Count, want, latest[a.ID])
					}
					before[a.ID], untold[a.ID] = untold[a.ID], nil
				}
				if len(under) == 0 {
					q.done(true, now)
					under = nil
				}
			},
			"deliver": func(t *rapid.T) {
				if under == nil {
					t.Skip("none is under way")
				}
				q.done(true, now)
				for _, a := range under {
					heard[a.ID] = a.Count
				}
				under = nil
			},
			"fail": func(t *rapid.T) {
				if under == nil {
					t.Skip("none is under way")
				}
				q.done(false, now)
				for _, a := range under {
					untold[a.ID] = append(before[a.ID], untold[a.ID]...)
				}
				under = nil
			},
			"wait": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 120).Draw(t, "seconds")) * time.Second)
			},
			"": func(t *rapid.T) { consistent(t, &q) },
		})
		if under != nil {
			q.done(true, now)
			for _, a := range under {
				heard[a.ID] = a.Count
			}
		}
		for _, a := range q.take(capacity, true, now) {
			heard[a.ID] = a.Count
		}
		q.done(true, now)
		for id, n := range latest {
			if heard[id] != n {
				t.Errorf("%s was told as of %d, not %d", id, heard[id], n)
			}
		}
		if consistent(t, &q); q.waiting() != 0 {
			t.Errorf("%d wait", q.waiting())
		}
	})
}

// What is given up when there is no room: first what need not be told at all,
// never what is under way.
func TestQueueFull(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
		q := newQueue(time.Minute, time.Hour)
		told := rapid.IntRange(0, 5).Draw(t, "told")
		ended := rapid.IntRange(0, 5).Draw(t, "of which have resolved")
		for i := range told {
			a := Alert{ID: fmt.Sprint("told", i), Event: Fired}
			if i < ended {
				a.Event, a.EndsAt = Resolved, &now
			}
			q.put(a)
		}
		ended = min(ended, told)
		q.take(capacity, false, now)
		q.done(true, now)
		for i := range capacity - told {
			q.put(Alert{ID: fmt.Sprint("news", i), Event: Fired})
		}
		under := q.take(rapid.IntRange(1, capacity/2).Draw(t, "under way"), true, now)
		shed := 0
		for i := range 20 {
			shed += q.put(Alert{ID: fmt.Sprint("more", i), Event: Fired})
		}
		consistent(t, &q)
		if want := 20 - ended; shed != want {
			t.Errorf("%d were given up, not %d", shed, want)
		}
		for _, a := range under {
			if q.byID[a.ID] == nil {
				t.Errorf("%s is under way and was given up", a.ID)
			}
		}
		if id := fmt.Sprint("news", len(under)); shed > 0 && q.byID[id] != nil {
			t.Errorf("%s has waited longest and is still there", id)
		}
		q.done(true, now)
		consistent(t, &q)
	})
}

// What has changed while it was under way is not given up with what was refused.
func TestQueueDrop(t *testing.T) {
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	q := newQueue(0, 0)
	q.put(Alert{ID: "a", Event: Fired})
	q.put(Alert{ID: "b", Event: Fired})
	q.take(2, false, now)
	q.put(Alert{ID: "b", Event: Updated, Count: 2})
	if shed := q.drop(); shed != 1 {
		t.Errorf("%d were given up", shed)
	}
	if left := q.take(2, false, now); len(left) != 1 || left[0].ID != "b" || left[0].Event != Fired || left[0].Count != 2 {
		t.Errorf("%+v are left", left)
	}
}

// A sink that is replaced by one that does not want to hear again, while it
// hears again: what comes afterwards is there.
func TestQueueSettle(t *testing.T) {
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	q := newQueue(time.Minute, 0)
	q.put(Alert{ID: "a", Event: Fired})
	q.put(Alert{ID: "b", Event: Fired})
	q.take(2, false, now)
	q.done(true, now)
	now = now.Add(time.Minute)
	q.take(1, false, now)
	q.settle(0, 0)
	if q.told.Len() != 1 {
		t.Errorf("%d are to be told again, but for what is being told", q.told.Len())
	}
	q.put(Alert{ID: "a", Event: Updated})
	q.done(true, now)
	if left := q.take(2, false, now); len(left) != 1 || left[0].ID != "a" || len(q.byID) != 1 {
		t.Errorf("%+v are left, %d known", left, len(q.byID))
	}
}
