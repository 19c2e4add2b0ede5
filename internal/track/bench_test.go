// SPDX-License-Identifier: Apache-2.0

package track

import (
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

var defaultTimers = events.Timers{FinTimeout: 60 * time.Second, RTO: 200 * time.Millisecond}

func entry(cookie uint64, at events.Time) events.Event {
	ev := events.Event{
		Time: at, Cookie: cookie, Netns: 1, Old: events.FinWait1, New: events.FinWait2,
		Timers: defaultTimers, SndShut: true,
	}
	ev.Flow.Local.Port = 80
	binary.BigEndian.PutUint64(ev.Flow.Remote.Addr[8:], cookie)
	return ev
}

func leaving(ev events.Event, at events.Time) events.Event {
	ev.Time, ev.Old, ev.New, ev.Done = at, events.FinWait2, events.Close, true
	return ev
}

// filled is a tracker of n held connections.
func filled(n int) *Tracker {
	t := New(limits.Rules{}, n+1, nil)
	for i := range n {
		ev := entry(uint64(i+1), boot.Add(time.Duration(i)*time.Microsecond))
		t.Apply(&ev)
	}
	return t
}

// A connection is two cache lines, in a chunk that begins with one.
func TestConnSize(t *testing.T) {
	if size := unsafe.Sizeof(conn{}); size != 128 {
		t.Errorf("a connection is %d bytes, want 128", size)
	}
}

// In the steady state an event allocates nothing.
func TestApplyDoesNotAllocate(t *testing.T) {
	tracker := filled(1000)
	cookie := uint64(1 << 32)
	at := boot.Add(time.Second)
	cycle := func(handover bool) {
		cookie++
		at += 1000
		ev := entry(cookie, at)
		if n := tracker.Apply(&ev); len(n) != 1 || n[0].Kind != Opened {
			t.Fatalf("entered: %v", n)
		}
		if handover {
			mini := ev
			mini.Old, mini.New, mini.Dead, mini.RcvShut = events.FinWait2, events.Close, true, true
			if n := tracker.Apply(&mini); len(n) != 1 || n[0].Kind != Moved {
				t.Fatalf("handed over: %v", n)
			}
			ev.Dead = true
		}
		ev = leaving(ev, at+500)
		if n := tracker.Apply(&ev); len(n) != 1 || n[0].Kind != Closed {
			t.Fatalf("left: %v", n)
		}
		tracker.Advance(at, trusting)
	}
	for _, handover := range []bool{false, true} {
		cycle(handover)
		if n := testing.AllocsPerRun(10_000, func() { cycle(handover) }); n != 0 {
			t.Errorf("%v allocations for a connection that comes and goes (by way of a minisock: %v)", n, handover)
		}
	}
}

// A connection that comes and goes, two events, among n that stay.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			tracker := filled(n)
			cookie, at := uint64(n), boot.Add(time.Minute)
			b.ReportAllocs()
			for b.Loop() {
				cookie++
				at += 1000
				ev := entry(cookie, at)
				tracker.Apply(&ev)
				ev = leaving(ev, at+500)
				tracker.Apply(&ev)
			}
			b.ReportMetric(2*float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// A million deadlines over an hour, in steps of 20 ms as the loop makes them.
func BenchmarkAdvance(b *testing.B) {
	const n = 1_000_000
	var (
		w   wheel
		s   slab
		now events.Time
	)
	for i := range n {
		w.add(&s, s.take(), now.Add(time.Duration(i)*time.Hour/n))
	}
	expired := 0
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(20 * time.Millisecond)
		w.expire(&s, now, math.MaxInt, func(i index) {
			expired++
			w.add(&s, i, now.Add(time.Hour))
		})
	}
	b.ReportMetric(float64(expired)/float64(b.N), "expired/op")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(max(expired, 1)), "ns/expired")
}

// All of a million deadlines at once, as after a suspend, with their notices.
func BenchmarkAdvanceAll(b *testing.B) {
	const n = 1_000_000
	for b.Loop() {
		b.StopTimer()
		tracker := filled(n)
		b.StartTimer()
		got, end := 0, boot.Add(time.Hour)
		for at, ok := tracker.Next(); ok && at <= end; at, ok = tracker.Next() {
			got += len(tracker.Advance(end, trusting))
		}
		if got != n {
			b.Fatalf("%d overdue", got)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/conn")
	b.ReportMetric(float64(unsafe.Sizeof(Notice{})), "B/notice")
}

// A snapshot of a million held connections, in the batches of the iterator.
func BenchmarkReconcile(b *testing.B) {
	const n = 1_000_000
	tracker := filled(n)
	now := boot.Add(10 * time.Second)
	rows := make([]events.Socket, 0, 290)
	for b.Loop() {
		now = now.Add(time.Millisecond)
		tracker.BeginSnapshot(now)
		for i := range n {
			ev := entry(uint64(i+1), now)
			rows = append(rows, events.Socket{
				Time: now, Cookie: ev.Cookie, Netns: 1, Flow: ev.Flow, State: events.FinWait2, Stage: events.Held,
				Timers: defaultTimers, Entry: -1,
			})
			if len(rows) == cap(rows) || i == n-1 {
				tracker.Observe(rows)
				rows = rows[:0]
			}
		}
		tracker.EndSnapshot(events.Coverage{End: now, Netns: map[uint32]events.NetnsCounters{1: {}}}, nil, nil)
	}
	if tracker.Len() != n {
		b.Fatalf("%d of %d are left", tracker.Len(), n)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/row")
}

// What a million tracked connections take of the heap, each.
func BenchmarkMemory(b *testing.B) {
	const n = 1_000_000
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for b.Loop() {
		before := heap()
		tracker := filled(n)
		after := heap()
		b.ReportMetric(float64(after-before)/n, "B/conn")
		runtime.KeepAlive(tracker)
	}
}
