// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	trackerRounds   = 3
	trackerEvents   = 1_000_000 // measured in each round
	trackerFull     = 1_000_000
	trackerNanosBar = 250.0 // ns per event
	trackerBytesBar = 200.0 // per tracked connection
	trackerStep     = 20 * time.Millisecond
	trackerNetns    = 4026531840
	// rowsPerRead is what the iterator returns at a time.
	rowsPerRead = 290
)

var trackerSizes = []int{1_000, 10_000, 100_000, trackerFull}

type trackerRequest struct{ Connections int }

// trackerCost is what the table of connections costs when so many are in it.
type trackerCost struct {
	BytesPerConnection float64
	NanosPerEvent      float64
	AllocsPerEvent     float64
	// An Advance of the clock by trackerStep.
	IdleAdvance, BusyAdvance time.Duration
	ExpiredPerBusy           float64
	AdvanceAll               time.Duration // past all deadlines at once
	Reconcile                time.Duration // a snapshot that shows them all
}

func (s *suite) tracker(ctx context.Context) (section, error) {
	found := section{name: "tracker", about: fmt.Sprintf(`
The table of connections alone, in one goroutine, %d rounds in processes of their own. An event: every other one is the peer's
FIN to the oldest connection, the others the entry of a new one, so that as many are tracked all the time. Memory is that of the
heap. Deadlines are of held connections, 10 µs apart; Advance is called as the loop does it, each %s. A reconciliation is a
snapshot that shows each connection, in reads of %d rows.`, trackerRounds, trackerStep, rowsPerRead)}
	for _, n := range trackerSizes {
		costs := make([]trackerCost, 0, trackerRounds)
		for range trackerRounds {
			c, err := inNamespace[trackerCost](ctx, "tracker", trackerRequest{n})
			if err != nil {
				return found, err
			}
			costs = append(costs, c)
		}
		of := func(value func(trackerCost) float64) float64 {
			var all []float64
			for _, c := range costs {
				all = append(all, value(c))
			}
			return median(all)
		}
		nanos := of(func(c trackerCost) float64 { return c.NanosPerEvent })
		allocs := of(func(c trackerCost) float64 { return c.AllocsPerEvent })
		bytes := of(func(c trackerCost) float64 { return c.BytesPerConnection })
		event := row{
			what:     fmt.Sprintf("an event with %s tracked", spaced(n)),
			fintrace: fmt.Sprintf("%.0f ns, %.3f allocations; %.1f million/s", nanos, allocs, 1e3/nanos),
		}
		memory := row{
			what:     fmt.Sprintf("memory per connection with %s tracked", spaced(n)),
			fintrace: fmt.Sprintf("%.0f bytes", bytes),
		}
		if n == trackerFull {
			event.bar, event.met = fmt.Sprintf("≤ %.0f ns, 0 allocations", trackerNanosBar), meets(nanos <= trackerNanosBar && allocs < 0.001)
			memory.bar, memory.met = fmt.Sprintf("≤ %.0f bytes", trackerBytesBar), meets(bytes <= trackerBytesBar)
		}
		found.rows = append(found.rows, event, memory)
		if n == trackerFull {
			took := func(value func(trackerCost) time.Duration) time.Duration {
				return time.Duration(of(func(c trackerCost) float64 { return float64(value(c)) }))
			}
			found.rows = append(found.rows, row{
				what: fmt.Sprintf("Advance by %s with %s deadlines", trackerStep, spaced(n)),
				fintrace: fmt.Sprintf("%s with none due, %s with %.0f due, %s with all due",
					short(took(func(c trackerCost) time.Duration { return c.IdleAdvance })),
					short(took(func(c trackerCost) time.Duration { return c.BusyAdvance })),
					of(func(c trackerCost) float64 { return c.ExpiredPerBusy }),
					short(took(func(c trackerCost) time.Duration { return c.AdvanceAll }))),
			}, row{
				what:     fmt.Sprintf("reconciliation of %s rows", spaced(n)),
				fintrace: short(took(func(c trackerCost) time.Duration { return c.Reconcile })),
			})
		}
	}
	return found, nil
}

// runTracker is the part that fills the table, and then replaces connections by
// new ones, looks at them all, and lets them pass their limits.
func runTracker(r trackerRequest) (c trackerCost, err error) {
	n := uint64(r.Connections)
	before := heap()
	t := track.New(limits.Rules{}, track.DefaultCapacity, nil)
	var ev events.Event
	for i := range n {
		enter(&ev, i)
		t.Apply(&ev)
	}
	full := heap()
	if t.Len() != r.Connections {
		return c, fmt.Errorf("%d of %d connections are tracked", t.Len(), n)
	}
	c.BytesPerConnection = float64(full.HeapAlloc-before.HeapAlloc) / float64(n)

	replaced := uint64(trackerEvents / 2)
	began := time.Now()
	for i := range replaced {
		leave(&ev, i, n+i)
		t.Apply(&ev)
		enter(&ev, n+i)
		t.Apply(&ev)
	}
	c.NanosPerEvent = float64(time.Since(began).Nanoseconds()) / trackerEvents
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	c.AllocsPerEvent = float64(after.Mallocs-full.Mallocs) / trackerEvents

	first, last := replaced, n+replaced-1
	now := entered(last).Add(time.Second)
	began = time.Now()
	reconcile(t, first, last, now)
	c.Reconcile = time.Since(began)
	if t.Len() != r.Connections {
		return c, fmt.Errorf("%d of %d connections are left after a snapshot that shows them all", t.Len(), n)
	}
	return c, advance(t, &c, first, last, now)
}

// reconcile shows the table connections first to last.
func reconcile(t *track.Tracker, first, last uint64, now events.Time) {
	var ev events.Event
	rows := make([]events.Socket, 0, rowsPerRead)
	t.BeginSnapshot(now)
	for i := first; i <= last; i++ {
		enter(&ev, i)
		rows = append(rows, events.Socket{
			Time: now, Cookie: ev.Cookie, Netns: ev.Netns, Flow: ev.Flow, State: events.FinWait2, Stage: events.Held,
			Timers: ev.Timers, Entry: -1,
		})
		if len(rows) == cap(rows) || i == last {
			t.Observe(rows)
			rows = rows[:0]
		}
	}
	t.EndSnapshot(events.Coverage{End: now, Netns: map[uint32]events.NetnsCounters{trackerNetns: {}}}, nil, nil)
}

// advance lets the clock pass the deadlines of connections first to last.
func advance(t *track.Tracker, c *trackerCost, first, last uint64, now events.Time) error {
	trusting := func(uint32, events.Flow, uint64) bool { return true }
	step := func() (took time.Duration, overdue int) {
		now = now.Add(trackerStep)
		began := time.Now()
		notices := t.Advance(now, trusting)
		return time.Since(began), len(notices)
	}
	var idle, busy, expired []float64
	for range 10 {
		took, overdue := step()
		if overdue > 0 {
			return fmt.Errorf("%d connections are overdue early", overdue)
		}
		idle = append(idle, float64(took))
	}
	// The first is due a minute and a grace after its entry.
	now = max(now, entered(first).Add(time.Minute+track.Grace))
	t.Advance(now, trusting)
	total := 0
	for range 10 {
		took, overdue := step()
		busy, expired = append(busy, float64(took)), append(expired, float64(overdue))
		total += overdue
	}
	began := time.Now()
	end := entered(last).Add(time.Hour)
	for at, ok := t.Next(); ok && at <= end; at, ok = t.Next() {
		total += len(t.Advance(end, trusting))
	}
	c.AdvanceAll = time.Since(began)
	if total == 0 {
		return fmt.Errorf("no connection has become overdue")
	}
	c.IdleAdvance, c.BusyAdvance = time.Duration(median(idle)), time.Duration(median(busy))
	c.ExpiredPerBusy = median(expired)
	return nil
}

func heap() (m runtime.MemStats) {
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

// entered is when connection i entered FIN_WAIT2: 10 µs after the one before.
func entered(i uint64) events.Time {
	return events.Time(time.Hour) + events.Time(i)*events.Time(10*time.Microsecond)
}

// enter makes ev the entry of connection i, which is held.
func enter(ev *events.Event, i uint64) {
	*ev = events.Event{
		Time:     entered(i),
		Cookie:   1 + i,
		Netns:    trackerNetns,
		Old:      events.FinWait1,
		New:      events.FinWait2,
		Process:  events.Process{PID: 1234, Comm: [16]byte{'h', 'a', 'p', 'r', 'o', 'x', 'y'}},
		Timers:   events.Timers{FinTimeout: time.Minute, RTO: 200 * time.Millisecond},
		SndShut:  true,
		Accepted: true,
	}
	ev.Flow.Local.Port, ev.Flow.Remote.Port = 443, uint16(i)
	ev.Flow.Remote.Addr = [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: byte(i >> 32), 14: byte(i >> 24), 15: byte(i >> 16)}
}

// leave makes ev the peer's FIN to connection i, at the entry of connection at.
func leave(ev *events.Event, i, at uint64) {
	enter(ev, i)
	ev.Time, ev.Old, ev.New, ev.Done = entered(at), events.FinWait2, events.Close, true
}
