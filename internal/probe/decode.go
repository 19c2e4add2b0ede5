// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"fmt"
	"hash/maphash"
	"math"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

const (
	eventSize = int(unsafe.Sizeof(bpfEvent{}))
	rowSize   = int(unsafe.Sizeof(bpfRow{}))

	rcvShutdown = 1 // RCV_SHUTDOWN, include/net/sock.h
	sndShutdown = 2 // SEND_SHUTDOWN
)

// clock turns the kernel's units into Go's.
type clock struct {
	hz int64 // jiffies per second, CONFIG_HZ
}

// newClock asks the coarse clock for its tick, which is the jiffy (TICK_NSEC).
func newClock() (clock, error) {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return clock{}, fmt.Errorf("read the length of a jiffy: %w", err)
	}
	return clock{hz: int64(math.Round(float64(time.Second) / float64(tick.Nano())))}, nil
}

func (c clock) jiffies(n int64) time.Duration {
	return time.Duration(n * int64(time.Second) / c.hz)
}

// decodeEvent reads one record of the ring buffer, which is 8-byte aligned.
func (c clock) decodeEvent(record []byte, ev *events.Event) error {
	if len(record) != eventSize {
		return fmt.Errorf("a record of %d bytes where the BPF program sends %d", len(record), eventSize)
	}
	raw := (*bpfEvent)(unsafe.Pointer(unsafe.SliceData(record)))
	*ev = events.Event{
		Time:     events.Time(raw.Time),
		Cookie:   raw.Cookie,
		Netns:    raw.Netns,
		Flow:     flow(&raw.Local, raw.LocalPort, &raw.Remote, raw.RemotePort, raw.Device),
		Old:      events.State(raw.OldState),
		New:      events.State(raw.NewState),
		Process:  process(raw.Pid, raw.Cgroup, &raw.Comm),
		Timers:   c.timers(raw.FinTimeout, raw.Linger2, raw.Rto),
		Err:      raw.Err,
		RcvShut:  raw.Shutdown&rcvShutdown != 0,
		SndShut:  raw.Shutdown&sndShutdown != 0,
		Dead:     raw.Dead != 0,
		Done:     raw.Done != 0,
		Accepted: raw.Accepted != 0,
	}
	if ev.Cookie == 0 {
		ev.Cookie = identity(ev.Netns, ev.Flow)
	}
	return nil
}

// decodeRow reads one row of the iterator, which is 8-byte aligned.
func (c clock) decodeRow(row []byte, s *events.Socket) error {
	if len(row) != rowSize {
		return fmt.Errorf("a row of %d bytes where the BPF program writes %d", len(row), rowSize)
	}
	c.socket((*bpfRow)(unsafe.Pointer(unsafe.SliceData(row))), s)
	return nil
}

func (c clock) socket(raw *bpfRow, s *events.Socket) {
	*s = events.Socket{
		Time:     events.Time(raw.Time),
		Cookie:   raw.Cookie,
		Inode:    raw.Inode,
		Netns:    raw.Netns,
		Flow:     flow(&raw.Local, raw.LocalPort, &raw.Remote, raw.RemotePort, raw.Device),
		State:    events.State(raw.State),
		Timers:   c.timers(raw.FinTimeout, raw.Linger2, raw.Rto),
		Accepted: raw.Accepted != 0,
		LastAck:  c.jiffies(int64(raw.LastAck)),
		Handover: events.Time(raw.Handover),
		Process:  process(raw.Pid, raw.Cgroup, &raw.Comm),
		Entry:    -1,
		Timer:    c.jiffies(int64(raw.Timer)),
		HasTimer: raw.HasTimer != 0,
	}
	if s.Cookie == 0 {
		s.Cookie = identity(s.Netns, s.Flow)
	}
	switch {
	case raw.Minisock != 0:
		s.Stage = events.Minisock
		if raw.HasEntry != 0 {
			s.Entry = time.Duration(raw.Entry) * time.Millisecond
		}
	case s.State == events.FinWait2 && raw.Dead != 0:
		s.Stage = events.Orphaned
	case s.State == events.FinWait2:
		s.Stage = events.Held
	}
}

// identity stands for the cookie where tracing programs may not ask for it
// (before Linux 5.12): a namespace has one connection of a flow at a time, and
// its minisock has the same. Peers choose ports: the seed is nothing they know.
func identity(netns uint32, f events.Flow) uint64 {
	return events.MadeUp(maphash.Comparable(identitySeed, struct {
		netns uint32
		flow  events.Flow
	}{netns, f}))
}

var identitySeed = maphash.MakeSeed()

func (c clock) timers(finTimeout uint32, linger2 int32, rto uint32) events.Timers {
	return events.Timers{
		FinTimeout: c.jiffies(int64(int32(finTimeout))),
		Linger2:    c.jiffies(int64(linger2)),
		RTO:        c.jiffies(int64(rto)),
	}
}

func process(pid uint32, cgroup uint64, comm *[2]uint64) events.Process {
	return events.Process{PID: pid, Cgroup: cgroup, Comm: *(*[16]byte)(unsafe.Pointer(comm))}
}

func flow(local *[16]uint8, localPort uint16, remote *[16]uint8, remotePort uint16, device uint32) events.Flow {
	return events.Flow{
		Local:  events.Endpoint{Addr: *local, Port: localPort},
		Remote: events.Endpoint{Addr: *remote, Port: remotePort},
		Device: device,
	}
}
