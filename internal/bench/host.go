// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
)

const (
	hostTime = time.Second // of a load that a tool is under as a user would run it
	hostRuns = 3           // of each tool
	// toggledTime is that of a load under which programs come and go. Those in
	// TIME_WAIT pile up meanwhile, which is not what is measured.
	toggledTime = 10 * time.Second
	hostBar     = 1.0 // percent of connections per second
)

// A hostLoad is what the host is busy with.
type hostLoad struct {
	name  string
	load  load
	slot  time.Duration // some dozens of connections on a slow machine
	group []int
	runs  int // of toggledTime
}

var hostLoads = []hostLoad{
	{"connections and nothing else", load{Kind: mixed}, 15 * time.Millisecond,
		[]int{withNone, withFintrace, withEmpty, withEmpty, withFintrace, withNone}, 3},
	{"https requests through HAProxy", load{Kind: https}, 60 * time.Millisecond,
		[]int{withNone, withFintrace, withFintrace, withNone}, 11},
}

// A tracedHost is what a host is like with a tool at work.
type tracedHost struct {
	*contender
	made loaded // in the last round

	latencies []float64 // of each round: µs p99
	lost      []float64 // percent of connections per second, against no tracer in the same round
	slower    []float64 // percent of p99, the same
}

func (s *suite) host(ctx context.Context) (section, error) {
	found := section{name: "host", about: fmt.Sprintf(`
As many connections as the CPUs make. The first load is the worst there is: both ends of each, opened and closed by system
calls alone, every other one healthy. The second is what a load balancer does: a real HAProxy that ends TLS, with a
connection to it and one from it to a server for each request, clients and server on the same CPUs. fintrace and the empty
program are attached and detached under the load, for %s and %s at a time, %s and %s long: how fast a machine is by itself
changes by more than what is looked for, from one second to the next. Its records are read meanwhile, into its table. The
others are started as a user would, and fintrace too for its latency: %d rounds of %s, each compared with no tracer in the
same round, and who comes first changes. The loss is the median of the differences, in brackets the interval that has the
true median with a confidence of 95 %%; where it has the bar in it, it is not known whether the bar is met. Latency is from
connect() to the last close() of a connection, or of a request.`,
		hostLoads[0].slot, hostLoads[1].slot, s.toggles(hostLoads[0]), s.toggles(hostLoads[1]), hostRuns, hostTime)}
	var lost losses
	for _, l := range hostLoads {
		l.load.Connections, l.load.Latency = math.MaxInt32, true
		toggled, err := s.toggle(ctx, l)
		if err != nil && ctx.Err() != nil {
			return found, err
		}
		if err != nil {
			found.rows = append(append(found.rows, hostRow(l.name)), unmeasured([]*contender{{name: l.name, err: err}})...)
			continue
		}
		hosts := s.hosts(ctx, l.load, &lost)
		for round := range hostRuns {
			if err := hostRound(ctx, round, hosts); err != nil {
				return found, err
			}
		}
		found.rows = append(found.rows, hostRows(l.name, toggled, hosts)...)
	}
	found.rows = append(found.rows, lost.row())
	return found, nil
}

// toggles is for how long programs come and go under a load.
func (s *suite) toggles(l hostLoad) time.Duration {
	return time.Duration(s.longer*l.runs) * toggledTime
}

// toggle compares the programs under a load.
func (s *suite) toggle(ctx context.Context, l hostLoad) (costs toggledCosts, err error) {
	request := toggledRequest{Load: l.load, Slot: l.slot, Group: l.group}
	request.Load.Duration = toggledTime
	for range s.toggles(l) / toggledTime {
		more, err := inNamespace[toggledCosts](ctx, "toggled", request)
		if err != nil {
			return costs, err
		}
		costs.join(more)
	}
	return costs, nil
}

// hosts are one without a tracer, and one with each of the tools: fintrace first.
func (s *suite) hosts(ctx context.Context, full load, lost *losses) []*tracedHost {
	full.Duration = hostTime
	hosts := []*tracedHost{
		hostWith("no tracer", func() (loaded, error) { return makeLoad(ctx, full) }),
		hostWith("fintrace", func() (loaded, error) { return lost.add(ctx, s.binary, full) }),
	}
	for _, t := range []tool{tcpstates, bccTcpstates, bpftrace} {
		hosts = append(hosts, hostWith(t.name, func() (loaded, error) {
			r, err := t.start(ctx, nil)
			if err != nil {
				return loaded{}, err
			}
			made, err := makeLoad(ctx, full)
			return made, errors.Join(err, r.stop())
		}))
	}
	return hosts
}

// hostWith is a host whose load is made by a function, with the tool at work.
func hostWith(name string, load func() (loaded, error)) *tracedHost {
	h := &tracedHost{}
	h.contender = &contender{name: name, round: func() (err error) {
		h.made, err = load()
		return err
	}}
	return h
}

// hostRound measures each host once.
func hostRound(ctx context.Context, round int, hosts []*tracedHost) error {
	var all []*contender
	for i := range hosts {
		all = append(all, hosts[(round+i)%len(hosts)].contender)
	}
	if err := compete(ctx, 1, all); err != nil {
		return err
	}
	free := hosts[0]
	if free.err != nil {
		return free.err
	}
	for _, h := range hosts {
		if h.err != nil {
			continue
		}
		h.latencies = append(h.latencies, float64(h.made.P99)/float64(time.Microsecond))
		h.lost = append(h.lost, 100*(1-h.made.perSecond()/free.made.perSecond()))
		h.slower = append(h.slower, 100*(float64(h.made.P99)/float64(free.made.P99)-1))
	}
	return nil
}

// hostRow is the row of a load of which nothing is known.
func hostRow(name string) row {
	return row{
		what:     "connections per second that the host loses: " + name,
		bar:      fmt.Sprintf("≤ %.0f %%", hostBar),
		met:      unknown,
		fintrace: "?",
	}
}

// hostRows are those of one load.
func hostRows(name string, toggled toggledCosts, hosts []*tracedHost) []row {
	rate := hostRow(name)
	rate.fintrace = fmt.Sprintf("%s of %.0f/s", change(toggled.Lost[withFintrace]), median(toggled.Rates))
	if low, high := interval(toggled.Lost[withFintrace]); low > hostBar || high <= hostBar {
		rate.met = meets(high <= hostBar)
	}
	if empty := toggled.Lost[withEmpty]; empty != nil {
		rate.beside = "empty program " + change(empty)
	}
	latency := row{
		what:     "p99 latency that the host gains, the same",
		fintrace: figure(hosts[1].err, "%s", change(hosts[1].slower)),
		beside:   fmt.Sprintf("no tracer %.0f µs", median(hosts[0].latencies)),
	}
	var contenders []*contender
	for i, h := range hosts {
		contenders = append(contenders, h.contender)
		if h.err == nil && i > 1 {
			rate.beside = list(rate.beside, h.name+" "+change(h.lost))
			latency.beside = list(latency.beside, h.name+" "+change(h.slower))
		}
	}
	return append([]row{rate, latency}, unmeasured(contenders)...)
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

func (l *losses) row() row {
	r := row{what: "records lost meanwhile", bar: "0", met: unknown, fintrace: "?"}
	if l.connections > 0 {
		r.met = meets(l.lost+l.missed == 0)
		r.fintrace = fmt.Sprintf("%d for want of buffer, %d events skipped by the kernel, of %s connections",
			l.lost, l.missed, spaced(l.connections))
	}
	return r
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
