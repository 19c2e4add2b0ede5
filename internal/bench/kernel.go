// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

const (
	kernelRounds      = 5
	kernelConnections = 10_000 // of each load, each round
	kernelBar         = 2.0    // times the empty program
	kernelTimes       = 20     // cheaper than tcpstates
)

// A traced is what one tool's programs cost in each round, in ns per transition.
type traced struct {
	*contender
	healthy, waiting, mixed []float64
	steps                   [][]float64
}

func (s *suite) kernel(ctx context.Context) (section, error) {
	found := section{name: "kernel", about: fmt.Sprintf(`
Time in BPF programs (%s), over all transitions of %s connections of each load, both ends, %d rounds. Healthy: the
peer's FIN comes with its ACK. Waiting: the peer closes %s later, and each connection is a FIN_WAIT2 minisock meanwhile. Mixed:
both. Each kind of transition: %d connections at a time are taken a step on together, with the counters read before and after;
the peer's ACK is held back until it is asked for, and its FIN until it closes. Where a step is of several transitions the
figure is their average; "less" says that the step was measured with others, whose time is subtracted; "?" that other
connections of the host came between each time. The loads are of all CPUs at once, the steps of one. What the tracepoint itself
costs is not in any of this: nearly nothing for fintrace and the empty program, which read the kernel's own arguments, and a
copied record for the others.`, "`bpf_stats`", spaced(kernelConnections), kernelRounds, peerDelay, stepConnections)}
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return found, fmt.Errorf("count the runs of BPF programs: %w", err)
	}
	defer stats.Close()
	all := []*traced{
		tracedBy(ctx, "empty program", attachEmpty),
		tracedBy(ctx, "fintrace", func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, fintrace(s.binary)) }),
	}
	for _, t := range []tool{tcpstates, bccTcpstates, bpftrace} {
		all = append(all, tracedBy(ctx, t.name, func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, t) }))
	}
	var contenders []*contender
	for _, t := range all {
		contenders = append(contenders, t.contender)
	}
	if err := compete(ctx, kernelRounds, contenders); err != nil {
		return found, err
	}
	average := kernelRow("per state transition, all of the mixed load", all, func(t *traced) float64 { return median(t.mixed) })
	average.bar = fmt.Sprintf("≤ %.0f × empty, ≥ %d × less than tcpstates", kernelBar, kernelTimes)
	average.met = unknown
	if empty, ours, others := median(all[0].mixed), median(all[1].mixed), median(all[2].mixed); cmp.Or(all[0].err, all[1].err, all[2].err) == nil {
		average.met = meets(ours <= kernelBar*empty && others >= kernelTimes*ours)
		average.ratio += ", " + times(others, ours) + " less than tcpstates"
	}
	found.rows = []row{
		average,
		kernelRow("healthy connections", all, func(t *traced) float64 { return median(t.healthy) }),
		kernelRow("waiting connections", all, func(t *traced) float64 { return median(t.waiting) }),
	}
	for _, k := range kinds {
		found.rows = append(found.rows, kernelRow(k.name, all, func(t *traced) float64 { return k.of(t.steps) }))
	}
	found.rows = append(found.rows, unmeasured(contenders)...)
	return found, nil
}

func kernelRow(what string, all []*traced, of func(*traced) float64) row {
	r := row{what: what, ratio: times(of(all[1]), of(all[0])) + " empty", fintrace: nanos(of(all[1]))}
	for _, t := range []*traced{all[0], all[2], all[3], all[4]} {
		if t.err == nil {
			r.beside = list(r.beside, t.name+" "+nanos(of(t)))
		}
	}
	return r
}

func tracedBy(ctx context.Context, name string, attach func() ([]*ebpf.Program, func() error, error)) *traced {
	t := &traced{steps: make([][]float64, len(steps))}
	t.contender = &contender{name: name, round: func() error { return t.measure(ctx, attach) }}
	return t
}

// measure attaches the tool, and measures it once under all loads.
func (t *traced) measure(ctx context.Context, attach func() ([]*ebpf.Program, func() error, error)) (err error) {
	programs, detach, err := attach()
	if err != nil {
		return err
	}
	defer func() {
		closePrograms(programs)
		err = errors.Join(err, detach())
	}()
	under := func(how string) (cost, error) {
		before, err := costOf(programs)
		if err != nil {
			return cost{}, err
		}
		if _, err := makeLoad(ctx, load{Kind: how, Connections: kernelConnections, Duration: 10 * time.Second}); err != nil {
			return cost{}, err
		}
		after, err := costOf(programs)
		return after.less(before), err
	}
	h, err := under(healthy)
	if err != nil {
		return err
	}
	w, err := under(waiting)
	if err != nil {
		return err
	}
	t.healthy, t.waiting = append(t.healthy, h.perRun()), append(t.waiting, w.perRun())
	t.mixed = append(t.mixed, cost{h.runs + w.runs, h.time + w.time}.perRun())

	request := stepRequest{}
	for _, p := range programs {
		info, err := p.Info()
		if err != nil {
			return err
		}
		id, _ := info.ID()
		request.Programs = append(request.Programs, id)
	}
	reply, err := inNamespace[[][]float64](ctx, "steps", request)
	for i := range reply {
		t.steps[i] = append(t.steps[i], reply[i]...)
	}
	return err
}

// loadEmpty loads a program for a tracepoint that does nothing.
func loadEmpty(tracepoint string) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "empty",
		Type:         ebpf.Tracing,
		AttachType:   ebpf.AttachTraceRawTp,
		AttachTo:     tracepoint,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		License:      "GPL",
	})
	if err != nil {
		return nil, fmt.Errorf("load an empty program: %w", err)
	}
	return p, nil
}

// attachEmpty attaches a program that does nothing: what the tracepoint itself
// costs, the kernel's own measuring included.
func attachEmpty() ([]*ebpf.Program, func() error, error) {
	p, err := loadEmpty("inet_sock_set_state")
	if err != nil {
		return nil, nil, err
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("attach an empty program: %w", err), p.Close())
	}
	return []*ebpf.Program{p}, l.Close, nil
}

func attachTool(ctx context.Context, t tool) ([]*ebpf.Program, func() error, error) {
	r, err := t.start(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	programs, err := r.programs()
	if err != nil {
		return nil, nil, errors.Join(err, r.stop())
	}
	return programs, r.stop, nil
}
