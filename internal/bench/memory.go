// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

const memoryConnections = 1_000_000

type memoryRequest struct{ Connections int }

// tableCost is what the table of connections costs when it is full.
type tableCost struct {
	BytesPerConnection float64
	NanosPerApply      float64
	AllocsPerApply     float64
}

// runMemory is the part that fills the table, and then replaces every
// connection by a new one.
func runMemory(r memoryRequest) (tableCost, error) {
	n := r.Connections
	before := heap()
	t := track.New(limits.Rules{}, track.DefaultCapacity)
	var ev events.Event
	for i := range n {
		enter(&ev, uint64(i))
		t.Apply(&ev)
	}
	full := heap()
	if t.Len() != n {
		return tableCost{}, fmt.Errorf("%d of %d connections are tracked", t.Len(), n)
	}
	cost := tableCost{BytesPerConnection: float64(full.HeapAlloc-before.HeapAlloc) / float64(n)}

	began := time.Now()
	for i := range n {
		leave(&ev, uint64(i), uint64(n+i))
		t.Apply(&ev)
		enter(&ev, uint64(n+i))
		t.Apply(&ev)
	}
	cost.NanosPerApply = float64(time.Since(began).Nanoseconds()) / float64(2*n)
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	cost.AllocsPerApply = float64(after.Mallocs-full.Mallocs) / float64(2*n)
	runtime.KeepAlive(t)
	return cost, nil
}

func heap() (m runtime.MemStats) {
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

// enter makes ev the entry of connection i: held, 10 µs after the one before.
func enter(ev *events.Event, i uint64) {
	*ev = events.Event{
		Time:     events.Time(time.Hour) + events.Time(i)*events.Time(10*time.Microsecond),
		Cookie:   1 + i,
		Netns:    4026531840,
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

// leave makes ev the peer's FIN to connection i, at the time of the entry of another.
func leave(ev *events.Event, i, at uint64) {
	enter(ev, at)
	now := ev.Time
	enter(ev, i)
	ev.Time, ev.Old, ev.New, ev.Done = now, events.FinWait2, events.Close, true
}
