// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"runtime"
	"slices"
	"sort"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

// How a host's speed changes by itself, from one tenth of a second to the next, is
// more than what is looked for. So programs are attached and detached under one
// load, each for a moment, and what comes in between is the comparison.
const (
	toggleGap   = 2 * time.Millisecond   // what a change itself costs is not measured
	toggleAfter = 300 * time.Millisecond // of the load's beginning
)

// toggledPrograms are what is attached in turn.
const (
	withNone = iota
	withFintrace
	withEmpty
	toggledPrograms
)

// A toggledRequest is for a load under which programs come and go, each for a Slot.
// Over and over: in such a group each is as late as the others, on average, so that
// a steady change of speed counts for nothing.
type toggledRequest struct {
	Load  load
	Slot  time.Duration
	Group []int
}

// toggledCosts are of each group, by the program.
type toggledCosts struct {
	Rates []float64                  // connections per second without a tracer
	Lost  [toggledPrograms][]float64 // in percent of that
}

func (c *toggledCosts) join(other toggledCosts) {
	c.Rates = append(c.Rates, other.Rates...)
	for i := range c.Lost {
		c.Lost[i] = append(c.Lost[i], other.Lost[i]...)
	}
}

// A slot is a time with the same program attached, µs since the load began.
type slot struct{ from, to uint32 }

// runToggled is the part that makes a load and attaches programs meanwhile.
func runToggled(request toggledRequest) (costs toggledCosts, err error) {
	programs, closeAll, err := toggleable()
	if err != nil {
		return costs, err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	r, err := request.Load.begin()
	if err != nil {
		return costs, err
	}
	// All processors have other things to do: this thread goes first.
	runtime.LockOSThread()
	err = unix.Setpriority(unix.PRIO_PROCESS, 0, -20)
	var slots []slot
	group := time.Duration(len(request.Group)) * (request.Slot + toggleGap)
	sleep(toggleAfter)
	for err == nil && time.Since(r.start)+2*group < request.Load.Duration {
		for _, n := range request.Group {
			var s slot
			if s, err = programs[n].during(request.Slot, r.start); err != nil {
				break
			}
			slots = append(slots, s)
		}
	}
	all, _, ended := r.end()
	if err = errors.Join(err, ended); err != nil {
		return costs, err
	}
	return compare(request.Group, slots, all), nil
}

// sleep is nanosleep(2): the runtime's own timers wait for a thread of it to be scheduled.
func sleep(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	// It may be short, by a signal: what is measured is how long it was.
	_ = unix.Nanosleep(&ts, nil)
}

// A toggle attaches and detaches a program.
type toggle struct{ on, off func() error }

func toggleOf(p *ebpf.Program) toggle {
	var attached link.Link
	return toggle{
		func() (err error) {
			attached, err = link.AttachTracing(link.TracingOptions{Program: p})
			return err
		},
		func() error { return attached.Close() },
	}
}

// during is the slot of one moment with the program.
func (t toggle) during(moment time.Duration, start time.Time) (s slot, err error) {
	if err := t.on(); err != nil {
		return s, err
	}
	sleep(toggleGap)
	s.from = uint32(time.Since(start).Microseconds())
	sleep(moment)
	s.to = uint32(time.Since(start).Microseconds())
	return s, t.off()
}

// toggleable are the programs, loaded. None is one where nothing happens, so that
// to attach and detach costs the same. fintrace's records are read into a table.
func toggleable() (programs [toggledPrograms]toggle, closeAll func() error, err error) {
	none, err := loadEmpty("sock_exceed_buf_limit")
	if err != nil {
		return programs, nil, err
	}
	empty, err := loadEmpty("inet_sock_set_state")
	if err != nil {
		return programs, nil, errors.Join(err, none.Close())
	}
	p, err := probe.Open(probe.Options{})
	if err != nil {
		return programs, nil, errors.Join(err, empty.Close(), none.Close())
	}
	// There is no ring to read before it is attached once.
	if err := errors.Join(p.Attach(), p.KeepHandovers(), p.Detach()); err != nil {
		return programs, nil, errors.Join(err, p.Close(), empty.Close(), none.Close())
	}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() { stopped <- follow(p, stop) }()
	programs = [...]toggle{withNone: toggleOf(none), withFintrace: {p.Attach, p.Detach}, withEmpty: toggleOf(empty)}
	return programs, func() error {
		close(stop)
		return errors.Join(<-stopped, p.Close(), empty.Close(), none.Close())
	}, nil
}

// follow reads the records as the loop does it where there are many.
func follow(p *probe.Probe, stop <-chan struct{}) error {
	const batchDelay = 100 * time.Millisecond
	t := track.New(limits.Rules{}, track.DefaultCapacity, nil)
	for {
		select {
		case <-stop:
			return nil
		case <-p.Ready():
		}
		for some := true; some; {
			var err error
			if some, err = p.Drain(func(ev *events.Event) { t.Apply(ev) }); err != nil {
				return err
			}
			t.Advance(probe.Now(), func(uint32, events.Flow, uint64) bool { return true })
			time.Sleep(batchDelay)
		}
	}
}

// compare counts what has ended in each slot of each group.
func compare(group []int, slots []slot, all []work) (costs toggledCosts) {
	for ; len(slots) >= len(group); slots = slots[len(group):] {
		var connections, seconds [toggledPrograms]float64
		for i, program := range group {
			seconds[program] += float64(slots[i].to-slots[i].from) / 1e6
			for _, w := range all {
				connections[program] += float64(w.endedIn(slots[i]))
			}
		}
		free := connections[withNone] / seconds[withNone]
		costs.Rates = append(costs.Rates, free)
		for program, n := range connections {
			if slices.Contains(group, program) {
				costs.Lost[program] = append(costs.Lost[program], 100*(1-n/seconds[program]/free))
			}
		}
	}
	return costs
}

// endedIn is how many ended in a slot.
func (w *work) endedIn(s slot) int {
	before := func(us uint32) int {
		return sort.Search(len(w.lives), func(i int) bool { return w.lives[i].end >= us })
	}
	return before(s.to) - before(s.from)
}
