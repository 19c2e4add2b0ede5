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
	"time"
)

const (
	userspaceRounds = 3
	userspaceBar    = 0.7 // µs of CPU per connection, at the rate that has the bar
	userspaceTimes  = 30  // less than tcpstates, there
	trackedSockets  = 100_000
	trackedBar      = 40e6 // bytes resident
)

// A userLoad is what the tools are under.
type userLoad struct {
	name string
	load load
	bar  bool
	ours bool // only fintrace is measured
}

var userLoads = []userLoad{
	{name: "1 000 connections/s", load: load{Close: mixed, Rate: 1000, Duration: 4 * time.Second}},
	{name: "5 000 connections/s", load: load{Close: mixed, Rate: 5000, Duration: 6 * time.Second}, bar: true},
	{name: "5 000 healthy connections/s", load: load{Close: healthy, Rate: 5000, Duration: 4 * time.Second}, ours: true},
	{name: "5 000 minisocks/s", load: load{Close: waiting, Rate: 5000, Duration: 4 * time.Second}, ours: true},
	{name: "as many connections/s as go", load: load{Close: mixed, Duration: 2 * time.Second}},
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
memory it had resident meanwhile; %d rounds. The load is mixed: every other connection is healthy (the peer's FIN comes with its
ACK), the others are minisocks in FIN_WAIT2 for %s. What fintrace has tracked is half held and half minisocks.`,
		userspaceRounds, peerDelay)}
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
	for n, l := range userLoads {
		ours := &costs[0][n]
		r := row{
			what:     "CPU per connection and peak memory, " + l.name,
			fintrace: figure(contenders[0].err, "%s", ours),
		}
		if l.load.Rate == 0 {
			r.fintrace += fmt.Sprintf(", at %.0f/s", median(ours.rate))
		}
		if !l.ours {
			for i, c := range contenders[1:] {
				other := &costs[1+i][n]
				if c.err == nil {
					r.beside = list(r.beside, c.name+" "+other.String())
				}
			}
			r.ratio = times(median(costs[1][n].cpu), median(ours.cpu)) + " less than tcpstates"
		}
		if l.bar {
			r.bar = fmt.Sprintf("≤ %.1f µs, ≥ %d × less than tcpstates", userspaceBar, userspaceTimes)
			r.met = unknown
			if cmp.Or(contenders[0].err, contenders[1].err) == nil {
				r.met = meets(median(ours.cpu) <= userspaceBar && median(costs[1][n].cpu) >= userspaceTimes*median(ours.cpu))
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
		met:      meets(tracked.TracePeak <= trackedBar && tracked.DaemonPeak <= trackedBar),
		fintrace: fmt.Sprintf("trace %.1f MB at most, daemon %.1f MB", tracked.TracePeak/1e6, tracked.DaemonPeak/1e6),
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
		peak, err := peakRSS(r.cmd.Process.Pid)
		if err != nil {
			return err
		}
		c := &costs[n]
		c.cpu = append(c.cpu, float64(after-before)/float64(time.Microsecond)/float64(made.Connections))
		c.rss = append(c.rss, peak)
		c.rate = append(c.rate, made.perSecond())
	}
	return nil
}

// resetPeakRSS makes the peak of a process what it has now (proc(5), clear_refs).
func resetPeakRSS(pid int) error {
	return os.WriteFile(filepath.Join("/proc", strconv.Itoa(pid), "clear_refs"), []byte("5"), 0)
}

type trackedRequest struct{ Binary string }

type trackedReply struct{ TracePeak, DaemonPeak float64 } // bytes

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
	peak := func(t tool) (float64, error) {
		running, err := t.start(context.Background(), nil)
		if err != nil {
			return 0, err
		}
		peak, err := peakRSS(running.cmd.Process.Pid)
		return peak, errors.Join(err, running.stop())
	}
	if reply.TracePeak, err = peak(fintrace(r.Binary)); err != nil {
		return reply, err
	}
	daemon, remove, err := fintraceDaemon(r.Binary)
	if err != nil {
		return reply, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	reply.DaemonPeak, err = peak(daemon)
	return reply, err
}
