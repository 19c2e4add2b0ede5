// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

const (
	hostRounds = 16
	hostTime   = 1500 * time.Millisecond
	// othersEvery is in how many rounds the tools beside it are measured once:
	// what they cost shows in fewer.
	othersEvery = 4
	hostBar     = 1.0 // percent of connections per second
)

// A tracedHost is what a host is like with a tool at work.
type tracedHost struct {
	*contender
	rare bool
	made loaded // in the last round

	rates, latencies []float64 // of each round: connections per second, µs p99
	lost             []float64 // percent of connections per second, against no tracer in the same round
	slower           []float64 // percent of p99, the same
}

func (s *suite) host(ctx context.Context) (section, error) {
	found := section{name: "host", about: fmt.Sprintf(`
As many connections as the CPUs make, mixed load, for %s a round, %d rounds. Each tool is compared with the load without a tracer
in the same round, and who comes first changes; the tools that cost most are in every %dth round. The loss is the median of
these differences, in brackets the interval that has the true median with a confidence of 95 %%; where it has the bar in
it, it is not known whether the bar is met. Latency is from connect() to the last close() of a connection.`,
		hostTime, hostRounds, othersEvery)}
	full := load{Close: mixed, Connections: math.MaxInt32, Duration: hostTime, Latency: true}
	with := func(attach func() ([]*ebpf.Program, func() error, error)) func() (loaded, error) {
		return func() (loaded, error) {
			programs, detach, err := attach()
			if err != nil {
				return loaded{}, err
			}
			closePrograms(programs)
			made, err := makeLoad(ctx, full)
			return made, errors.Join(err, detach())
		}
	}
	var lost losses
	hosts := []*tracedHost{
		hostWith("no tracer", false, func() (loaded, error) { return makeLoad(ctx, full) }),
		hostWith("fintrace", false, func() (loaded, error) { return lost.add(ctx, s.binary, full) }),
		hostWith("empty program", false, with(attachEmpty)),
	}
	for _, t := range []tool{tcpstates, bccTcpstates, bpftrace} {
		hosts = append(hosts, hostWith(t.name, true, with(func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, t) })))
	}
	for round := range hostRounds {
		if err := hostRound(ctx, round, hosts); err != nil {
			return found, err
		}
	}
	found.rows = hostRows(hosts, lost)
	return found, nil
}

// hostWith is a host whose load is made by a function, with the tool at work.
func hostWith(name string, rare bool, load func() (loaded, error)) *tracedHost {
	h := &tracedHost{rare: rare}
	h.contender = &contender{name: name, round: func() (err error) {
		h.made, err = load()
		return err
	}}
	return h
}

// hostRound measures each host that is due once.
func hostRound(ctx context.Context, round int, hosts []*tracedHost) error {
	var due []*contender
	for i := range hosts {
		if h := hosts[(round+i)%len(hosts)]; !h.rare || round%othersEvery == 0 {
			due = append(due, h.contender)
		}
	}
	if err := compete(ctx, 1, due); err != nil {
		return err
	}
	free := hosts[0]
	if free.err != nil {
		return free.err
	}
	for _, h := range hosts {
		if h.err != nil || !slices.Contains(due, h.contender) {
			continue
		}
		h.rates = append(h.rates, h.made.perSecond())
		h.latencies = append(h.latencies, float64(h.made.P99)/float64(time.Microsecond))
		h.lost = append(h.lost, 100*(1-h.made.perSecond()/free.made.perSecond()))
		h.slower = append(h.slower, 100*(float64(h.made.P99)/float64(free.made.P99)-1))
	}
	return nil
}

func hostRows(hosts []*tracedHost, lost losses) []row {
	rate := row{
		what:     "connections per second that the host loses",
		bar:      fmt.Sprintf("≤ %.0f %%", hostBar),
		met:      unknown,
		fintrace: figure(hosts[1].err, "%s", change(hosts[1].lost)),
		beside:   fmt.Sprintf("no tracer %.0f/s", median(hosts[0].rates)),
	}
	latency := row{
		what:     "p99 latency that the host gains, from connect to close",
		fintrace: figure(hosts[1].err, "%s", change(hosts[1].slower)),
		beside:   fmt.Sprintf("no tracer %.0f µs", median(hosts[0].latencies)),
	}
	var contenders []*contender
	for _, h := range hosts {
		contenders = append(contenders, h.contender)
		if h.err == nil && h != hosts[0] && h != hosts[1] {
			rate.beside = list(rate.beside, h.name+" "+change(h.lost))
			latency.beside = list(latency.beside, h.name+" "+change(h.slower))
		}
	}
	losing := row{what: "records lost meanwhile", bar: "0", met: unknown, fintrace: "?"}
	if hosts[1].err == nil {
		if low, high := interval(hosts[1].lost); low > hostBar || high <= hostBar {
			rate.met = meets(high <= hostBar)
		}
		rate.fintrace += fmt.Sprintf(" of %.0f/s", median(hosts[1].rates))
		losing.met = meets(lost.lost+lost.missed == 0)
		losing.fintrace = fmt.Sprintf("%d for want of buffer, %d events skipped by the kernel, of %s connections",
			lost.lost, lost.missed, spaced(lost.connections))
	}
	return append([]row{rate, latency, losing}, unmeasured(contenders)...)
}

// change renders differences in percent.
func change(percent []float64) string {
	low, high := interval(percent)
	return fmt.Sprintf("%.1f %% (%.1f to %.1f)", median(percent), low, high)
}

// losses are of fintrace, over all its loads.
type losses struct {
	connections  int
	lost, missed uint64
}

// add makes a load with fintrace at work, and adds what fintrace says it has lost.
func (l *losses) add(ctx context.Context, binary string, full load) (loaded, error) {
	out, err := tempOutput()
	if err != nil {
		return loaded{}, err
	}
	defer out.Close()
	r, err := fintrace(binary, "-o", "json").start(ctx, out)
	if err != nil {
		return loaded{}, err
	}
	made, err := makeLoad(ctx, full)
	if err := errors.Join(err, r.stop()); err != nil {
		return made, err
	}
	text, err := readBack(out)
	if err != nil {
		return made, err
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	var summary struct {
		Kind         string
		Lost, Missed uint64
	}
	if err := json.Unmarshal(lines[len(lines)-1], &summary); err != nil || summary.Kind != "summary" {
		return made, fmt.Errorf("fintrace ended without a summary: %s", firstLine(r.stderr.String()))
	}
	l.connections += made.Connections
	l.lost += summary.Lost
	l.missed += summary.Missed
	return made, nil
}
