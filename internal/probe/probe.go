// SPDX-License-Identifier: Apache-2.0

// Package probe is everything fintrace asks of the kernel: it loads and attaches
// the BPF programs, reads their records, walks the socket tables of every
// network namespace, and finds the processes behind sockets.
package probe

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -g -Wall -Werror" -target amd64,arm64 -type event -type row bpf ../../bpf/fintrace.bpf.c

// Options choose what the kernel side reports.
type Options struct {
	// AllStates sends every transition of every TCP socket.
	AllStates bool
	// Instants sends also the connections that leave FIN_WAIT2 in the very
	// segment that brought them there. They are counted in any case.
	Instants bool
	// RingBytes is the size of the ring buffer, a power of two and a multiple
	// of the page size; 0 is the default of 8 MiB.
	RingBytes int
}

// Probe is the loaded kernel side.
type Probe struct {
	objects  bpfObjects
	attached link.Link
	walker   *link.Iter
	ring     *ring
	clock    clock
}

// Counters are totals since Open, over all namespaces.
type Counters struct {
	Lost     uint64 // records the ring buffer had no room for
	Missed   uint64 // events the kernel did not run the program for, because it was running on that CPU
	Instants uint64 // connections that left FIN_WAIT2 as they entered it, and were not sent
}

// Open loads the programs. Attach starts the records; Snapshot works without.
// An error is one line that says what is missing and how to get it.
func Open(opts Options) (_ *Probe, err error) {
	clock, err := newClock()
	if err != nil {
		return nil, err
	}
	p := &Probe{clock: clock}
	defer func() {
		if err != nil {
			err = errors.Join(explain(err), p.Close())
		}
	}()

	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	if opts.RingBytes != 0 {
		spec.Maps[bpfMapRing].MaxEntries = uint32(opts.RingBytes)
	}
	config := bpfConfig{
		Hz:             uint32(clock.hz),
		AllStates:      flag(opts.AllStates),
		ReportInstants: flag(opts.Instants || opts.AllStates),
	}
	if err := spec.Variables[bpfVarConfig].Set(config); err != nil {
		return nil, fmt.Errorf("configure the BPF programs: %w", err)
	}
	if err := spec.LoadAndAssign(&p.objects, nil); err != nil {
		return nil, fmt.Errorf("load the BPF programs: %w", err)
	}
	p.walker, err = link.AttachIter(link.IterOptions{Program: p.objects.Snapshot})
	if err != nil {
		return nil, fmt.Errorf("attach the socket iterator: %w", err)
	}
	return p, nil
}

// Attach starts the records: from here on Drain finds them.
func (p *Probe) Attach() error {
	ring, err := newRing(p.objects.Ring)
	if err != nil {
		return explain(fmt.Errorf("map the ring buffer: %w", err))
	}
	p.ring = ring
	p.attached, err = link.AttachTracing(link.TracingOptions{Program: p.objects.OnSetState})
	if err != nil {
		return explain(fmt.Errorf("attach to inet_sock_set_state: %w", err))
	}
	return nil
}

// Close detaches and frees all. It may be called on a half-open Probe.
func (p *Probe) Close() error {
	var errs []error
	if p.attached != nil {
		errs = append(errs, p.attached.Close())
	}
	if p.walker != nil {
		errs = append(errs, p.walker.Close())
	}
	if p.ring != nil {
		errs = append(errs, p.ring.close())
	}
	return errors.Join(append(errs, p.objects.Close())...)
}

// Ready receives when records are waiting. The kernel wakes it once for any
// number of records until they are drained, so a caller that waits a little
// before it drains is woken that much less often.
func (p *Probe) Ready() <-chan struct{} { return p.ring.ready }

// Drain calls fn for each waiting record; before Attach there is none. The Event
// is reused.
func (p *Probe) Drain(fn func(*events.Event)) error {
	if p.ring == nil {
		return nil
	}
	var ev events.Event
	return p.ring.drain(func(record []byte) error {
		if err := p.clock.decodeEvent(record, &ev); err != nil {
			return err
		}
		fn(&ev)
		return nil
	})
}

// Counters reads the kernel side's counts.
func (p *Probe) Counters() (Counters, error) {
	var perCPU []bpfCounters
	if err := p.objects.Counts.Lookup(uint32(0), &perCPU); err != nil {
		return Counters{}, fmt.Errorf("read the counters: %w", err)
	}
	var c Counters
	for _, n := range perCPU {
		c.Lost += n.Lost
		c.Instants += n.Instants
	}
	stats, err := p.objects.OnSetState.Stats()
	if err != nil {
		return Counters{}, fmt.Errorf("read the program's counters: %w", err)
	}
	c.Missed = stats.RecursionMisses
	return c, nil
}

// Now reads the clock that events are dated by, CLOCK_BOOTTIME.
func Now() events.Time {
	var ts unix.Timespec
	// Cannot fail: the clock has been there since Linux 2.6.39.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return events.Time(ts.Nano())
}

// Wall is t on the wall clock as that is set now.
func Wall(t events.Time) time.Time {
	return time.Now().Add(t.Sub(Now())).Round(0)
}

// explain puts the way out before the errors that a user can do something about.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		var rejected *ebpf.VerifierError
		if errors.As(err, &rejected) {
			return err
		}
		return fmt.Errorf("no permission to use BPF: run as root, for example with sudo (%w)", err)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("this kernel (%s) lacks what fintrace needs: Linux 5.12 or later with CONFIG_DEBUG_INFO_BTF=y (%w)", release(), err)
	}
	return err
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "of unknown release"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
