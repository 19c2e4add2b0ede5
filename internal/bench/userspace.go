// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	userspaceRounds = 3
	userspaceBar    = 0.7 // µs of CPU per connection, at the rate that has the bar
	userspaceTimes  = 30  // less than tcpstates, there
	// oursLasts is how long fintrace is under that load: it looks at all sockets
	// every 30 s, the others do the same all the time.
	oursLasts      = 30 * time.Second
	trackedSockets = 100_000
	trackedBar     = 40e6 // bytes resident
)

// A userLoad is what the tools are under.
type userLoad struct {
	name string
	load load
	bar  bool
	ours bool // only fintrace is measured
}

var userLoads = []userLoad{
	{name: "1 000 connections/s", load: load{Kind: mixed, Rate: 1000, Duration: 3 * time.Second}},
	{name: "5 000 connections/s", load: load{Kind: mixed, Rate: 5000, Duration: 6 * time.Second}, bar: true},
	{name: "5 000 healthy connections/s", load: load{Kind: healthy, Rate: 5000, Duration: 3 * time.Second}, ours: true},
	{name: "5 000 minisocks/s", load: load{Kind: waiting, Rate: 5000, Duration: 3 * time.Second}, ours: true},
	{name: "as many connections/s as go", load: load{Kind: mixed, Duration: 2 * time.Second}},
}

// userCost is what a tool's own process costs under one load, in each round.
type userCost struct {
	cpu  []float64 // µs per connection
	rss  []float64 // bytes, at most
	rate []float64 // connections per second, as they were made
}

func (c *userCost) String() string {
	return fmt.Sprintf("%.2f µs, %s", median(c.cpu), mebibytes(median(c.rss)))
}

func (s *suite) userspace(ctx context.Context) (section, error) {
	found := section{name: "user space", about: fmt.Sprintf(`
CPU time of the tool's process per connection, both ends of which are traced, with the output thrown away, and the most
memory it had resident meanwhile; %d rounds. Where there is a bar fintrace is under the load for %s, as long as it may go
without a look at the sockets. The load is mixed: every other connection is healthy (the peer's FIN comes with its
ACK), the others are minisocks in FIN_WAIT2 for %s. What fintrace has tracked is half held and half minisocks.`,
		userspaceRounds, oursLasts, peerDelay)}
	tools := []tool{fintrace(s.binary), tcpstates, bccTcpstates, bpftrace}
	costs := make([][]userCost, len(tools))
	var contenders []*contender
	for i, t := range tools {
		costs[i] = make([]userCost, len(userLoads))
		contenders = append(contenders, &contender{name: t.name, round: func() error {
			return userspaceRound(ctx, t, i == 0, costs[i])
		}})
	}
	if err := compete(ctx, userspaceRounds, contenders); err != nil {
		return found, err
	}
	known := cmp.Or(contenders[0].err, contenders[1].err) == nil // of fintrace and tcpstates
	for n, l := range userLoads {
		ours, theirs := &costs[0][n], &costs[1][n]
		r := row{what: "CPU per connection and peak memory, " + l.name, fintrace: "?"}
		if contenders[0].err == nil {
			r.fintrace = fmt.Sprintf("%s, at %.0f/s", ours, median(ours.rate))
		}
		if !l.ours {
			r.ratio = "?"
			if known {
				r.ratio = times(median(theirs.cpu), median(ours.cpu)) + " less than tcpstates"
			}
			for i, c := range contenders[1:] {
				if c.err == nil {
					r.beside = list(r.beside, c.name+" "+costs[1+i][n].String())
				}
			}
		}
		if l.bar {
			r.bar, r.met = fmt.Sprintf("≤ %.1f µs, ≥ %d × less than tcpstates", userspaceBar, userspaceTimes), unknown
			if known {
				r.met = meets(median(ours.cpu) <= userspaceBar && median(theirs.cpu) >= userspaceTimes*median(ours.cpu))
			}
		}
		found.rows = append(found.rows, r)
	}
	found.rows = append(found.rows, unmeasured(contenders)...)
	tracked, err := inNamespace[trackedReply](ctx, "tracked", trackedRequest{s.binary})
	if err != nil {
		return found, err
	}
	found.rows = append(found.rows, row{
		what:     fmt.Sprintf("memory with %s tracked", spaced(trackedSockets)),
		bar:      fmt.Sprintf("≤ %.0f MB", trackedBar/1e6),
		met:      meets(tracked.Trace.Peak <= trackedBar && tracked.Daemon.Peak <= trackedBar),
		fintrace: fmt.Sprintf("trace %s, daemon %s", tracked.Trace, tracked.Daemon),
	})
	return found, nil
}

// userspaceRound measures a tool as a user would run it, under all its loads.
func userspaceRound(ctx context.Context, t tool, ours bool, costs []userCost) (err error) {
	r, err := t.start(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	for n, l := range userLoads {
		if l.ours && !ours {
			continue
		}
		l.load.Connections = math.MaxInt32
		if l.bar && ours {
			l.load.Duration = oursLasts
		}
		if err := resetPeakRSS(r.cmd.Process.Pid); err != nil {
			return err
		}
		before, err := r.cpu()
		if err != nil {
			return err
		}
		made, err := makeLoad(ctx, l.load)
		if err != nil {
			return err
		}
		after, err := r.cpu()
		if err != nil {
			return err
		}
		memory, err := memoryOf(r.cmd.Process.Pid)
		if err != nil {
			return err
		}
		c := &costs[n]
		c.cpu = append(c.cpu, float64(after-before)/float64(time.Microsecond)/float64(made.Connections))
		c.rss = append(c.rss, memory.Peak)
		c.rate = append(c.rate, made.perSecond())
	}
	return nil
}

// resetPeakRSS makes the peak of a process what it has now (proc(5), clear_refs).
func resetPeakRSS(pid int) error {
	return os.WriteFile(filepath.Join("/proc", strconv.Itoa(pid), "clear_refs"), []byte("5"), 0)
}

type trackedRequest struct{ Binary string }

type trackedReply struct{ Trace, Daemon memory }

// memory is what a process has resident, in bytes.
type memory struct{ Now, Peak float64 }

func (m memory) String() string {
	return fmt.Sprintf("%.1f MB at most, then %.1f MB", m.Peak/1e6, m.Now/1e6)
}

// runTracked is the part that has fintrace start beside many connections in
// FIN_WAIT2 and track them.
func runTracked(r trackedRequest) (reply trackedReply, err error) {
	if err := prepareNamespace(); err != nil {
		return reply, err
	}
	release, err := fill(holdRequest{Held: trackedSockets / 2}, holdRequest{Minisocks: trackedSockets / 2})
	if err != nil {
		return reply, err
	}
	defer func() { err = errors.Join(err, release()) }()
	after := func(t tool) (memory, error) {
		running, err := t.start(context.Background(), nil)
		if err != nil {
			return memory{}, err
		}
		m, err := memoryOf(running.cmd.Process.Pid)
		return m, errors.Join(err, running.stop())
	}
	if reply.Trace, err = after(fintrace(r.Binary)); err != nil {
		return reply, err
	}
	daemon, remove, err := fintraceDaemon(r.Binary)
	if err != nil {
		return reply, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	reply.Daemon, err = after(daemon)
	return reply, err
}

// memoryOf reads the status of a process.
func memoryOf(pid int) (m memory, err error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return m, err
	}
	for name, value := range map[string]*float64{"VmRSS:": &m.Now, "VmHWM:": &m.Peak} {
		_, rest, _ := strings.Cut(string(text), name)
		if _, err := fmt.Sscan(rest, value); err != nil {
			return m, fmt.Errorf("%s in the status of process %d: %w", name, pid, err)
		}
		*value *= 1024
	}
	return m, nil
}
