// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"container/list"
	"time"
)

// capacity bounds the alerts that a sink has waiting, or is told again. Groups
// and their peers are bounded, so a host has far fewer; a thousand, at a few
// KiB each with their examples, still cost no more than some MiB while a sink
// is dead.
const capacity = 1000

// queue holds what a sink has not been told yet, one state of each alert, and
// what it is to be told again.
type queue struct {
	resend time.Duration // how often what fires is told again, 0: never
	keep   time.Duration // for how long after its end what has resolved is told again

	byID  map[string]*item
	news  list.List // of *item, the longest waiting first
	told  list.List // of *item, the soonest due first
	taken []*item
}

type item struct {
	alert Alert // its latest state, with what has happened since the sink was told
	at    *list.Element
	told  bool  // at is in queue.told, and not in queue.news
	taken bool  // it is being delivered as it was when taken
	since Event // what has happened since it was taken, "" nothing
	due   time.Time
}

func newQueue(resend, keep time.Duration) queue {
	return queue{resend: resend, keep: keep, byID: map[string]*item{}}
}

// merge is what has happened to an alert of which first one thing was to be
// told and then another: who has not heard that it fired hears that.
func merge(first, then Event) Event {
	switch {
	case then == Fired, then == Resolved:
		return then
	case first == Fired, first == Updated:
		return first
	}
	return then
}

// put adds an alert, in the place of its earlier state. It returns how many
// alerts were given up for it.
func (q *queue) put(a Alert) (shed int) {
	if it := q.byID[a.ID]; it != nil {
		it.since = merge(it.since, a.Event)
		if it.told {
			q.told.Remove(it.at)
			it.told, it.at = false, q.news.PushBack(it)
		} else {
			a.Event = merge(it.alert.Event, a.Event)
		}
		it.alert = a
		return 0
	}
	if len(q.byID) >= capacity {
		shed = q.makeRoom()
	}
	it := &item{alert: a}
	it.at = q.news.PushBack(it)
	q.byID[a.ID] = it
	return shed
}

// makeRoom removes an alert: one that has resolved and was told, else the one
// that waits longest, else one that was told. It returns how many were given up.
func (q *queue) makeRoom() (shed int) {
	for _, choice := range []struct {
		from *list.List
		any  bool
		shed int
	}{{&q.told, false, 0}, {&q.news, true, 1}, {&q.told, true, 1}} {
		for e := choice.from.Front(); e != nil; e = e.Next() {
			if it := e.Value.(*item); !it.taken && (choice.any || !it.alert.Firing()) {
				q.remove(it)
				return choice.shed
			}
		}
	}
	return 0
}

func (q *queue) remove(it *item) {
	delete(q.byID, it.alert.ID)
	if it.told {
		q.told.Remove(it.at)
	} else {
		q.news.Remove(it.at)
	}
}

// take returns up to n alerts to deliver: what is news, and unless newsOnly is
// set what is due again. done or drop has to follow before anything else is taken.
func (q *queue) take(n int, newsOnly bool, now time.Time) []Alert {
	var alerts []Alert
	take := func(it *item) {
		it.taken, it.since = true, ""
		q.taken = append(q.taken, it)
		alerts = append(alerts, it.alert)
	}
	for e := q.news.Front(); e != nil && len(alerts) < n; e = e.Next() {
		take(e.Value.(*item))
	}
	if newsOnly {
		return alerts
	}
	for e := q.told.Front(); e != nil && len(alerts) < n; {
		it, next := e.Value.(*item), e.Next()
		switch {
		case it.due.After(now):
			return alerts
		case q.over(it, now):
			q.remove(it)
		default:
			take(it)
		}
		e = next
	}
	return alerts
}

// over says whether an alert has resolved so long ago that it is not told again.
func (q *queue) over(it *item, now time.Time) bool {
	return !it.alert.Firing() && now.Sub(*it.alert.EndsAt) >= q.keep
}

// done ends a delivery.
func (q *queue) done(delivered bool, now time.Time) {
	for _, it := range q.taken {
		it.taken = false
		switch {
		case !delivered:
		case it.since != "": // it is news again, and of that only
			it.alert.Event = it.since
		case q.resend == 0 || q.over(it, now):
			q.remove(it)
		default:
			q.remove(it)
			if it.alert.Firing() {
				it.alert.Event = Repeated
			}
			it.told, it.due, it.at = true, now.Add(q.resend), q.told.PushBack(it)
			q.byID[it.alert.ID] = it
		}
	}
	q.taken = nil
}

// drop ends a delivery by giving up what was taken, but for what has changed
// since. It returns how many alerts that were.
func (q *queue) drop() (shed int) {
	for _, it := range q.taken {
		if it.taken = false; it.since == "" {
			q.remove(it)
			shed++
		}
	}
	q.taken = nil
	return shed
}

// due says when there is something to take; false: not before something is put.
func (q *queue) due(newsOnly bool) (at time.Time, ok bool) {
	switch {
	case q.news.Len() > 0:
		return time.Time{}, true
	case newsOnly || q.told.Len() == 0:
		return time.Time{}, false
	}
	return q.told.Front().Value.(*item).due, true
}

// waiting is how many alerts wait to be told for the first time.
func (q *queue) waiting() int { return q.news.Len() }

// clear gives up all, and returns how much of it was waiting.
func (q *queue) clear() (shed int) {
	shed = q.waiting()
	*q = newQueue(q.resend, q.keep)
	return shed
}

// settle changes how often things are told again.
func (q *queue) settle(resend, keep time.Duration) {
	q.resend, q.keep = resend, keep
	for e := q.told.Front(); e != nil && resend == 0; {
		it, next := e.Value.(*item), e.Next()
		if !it.taken { // done removes that
			q.remove(it)
		}
		e = next
	}
}
