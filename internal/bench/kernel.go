// SPDX-License-Identifier: Apache-2.0

package main

import (
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
)

// kernelCost is nanoseconds per state transition, spent in BPF programs.
type kernelCost struct {
	name                   string
	healthy, waiting, both float64
	err                    error
}

// cost is what BPF programs have had of the kernel's time.
type cost struct {
	runs uint64 // of the one that has run most: several may hang on one tracepoint
	time time.Duration
}

func costOf(programs []*ebpf.Program) (cost, error) {
	var sum cost
	for _, p := range programs {
		s, err := p.Stats()
		if err != nil {
			return sum, fmt.Errorf("statistics of a BPF program: %w", err)
		}
		sum.runs = max(sum.runs, s.RunCount)
		sum.time += s.Runtime
	}
	return sum, nil
}

// measureKernel has the kernel time each tool's programs, one tool at a time
// and in turn, over all state changes of a load.
func measureKernel(ctx context.Context, binary string) ([]kernelCost, error) {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("count the runs of BPF programs: %w", err)
	}
	defer stats.Close()

	costs := []kernelCost{{name: "empty program"}, {name: "fintrace"}, {name: "tcpstates"}, {name: "bpftrace histogram"}}
	attach := []func() ([]*ebpf.Program, func() error, error){
		attachEmpty,
		func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, fintrace(binary)) },
		func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, tcpstates) },
		func() ([]*ebpf.Program, func() error, error) { return attachTool(ctx, bpftrace) },
	}
	healthyRuns := make([][]float64, len(costs))
	waitingRuns := make([][]float64, len(costs))
	bothRuns := make([][]float64, len(costs))
	for range kernelRounds {
		for i := range costs {
			if costs[i].err != nil {
				continue
			}
			h, w, err := kernelRound(ctx, attach[i])
			if err != nil {
				if ctx.Err() != nil {
					return nil, err
				}
				costs[i].err = err
				continue
			}
			healthyRuns[i] = append(healthyRuns[i], h.perRun())
			waitingRuns[i] = append(waitingRuns[i], w.perRun())
			bothRuns[i] = append(bothRuns[i], cost{h.runs + w.runs, h.time + w.time}.perRun())
		}
	}
	for i := range costs {
		if costs[i].err == nil {
			costs[i].healthy, costs[i].waiting, costs[i].both = median(healthyRuns[i]), median(waitingRuns[i]), median(bothRuns[i])
		}
	}
	return costs, nil
}

func (c cost) perRun() float64 { return float64(c.time) / float64(c.runs) }

// kernelRound attaches one tool, and measures it under both loads.
func kernelRound(ctx context.Context, attach func() ([]*ebpf.Program, func() error, error)) (h, w cost, err error) {
	programs, detach, err := attach()
	if err != nil {
		return h, w, err
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
		if _, err := makeLoad(ctx, load{Close: how, Connections: kernelConnections, Duration: 10 * time.Second}); err != nil {
			return cost{}, err
		}
		after, err := costOf(programs)
		return cost{after.runs - before.runs, after.time - before.time}, err
	}
	if h, err = under(healthy); err != nil {
		return h, w, err
	}
	w, err = under(waiting)
	return h, w, err
}

// attachEmpty attaches a program that does nothing: what the tracepoint itself
// costs, the kernel's own measuring included.
func attachEmpty() ([]*ebpf.Program, func() error, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "empty",
		Type:         ebpf.Tracing,
		AttachType:   ebpf.AttachTraceRawTp,
		AttachTo:     "inet_sock_set_state",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		License:      "GPL",
	})
	if err != nil {
		return nil, nil, fmt.Errorf("load an empty program: %w", err)
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
