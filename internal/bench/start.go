// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	startRounds  = 5
	startSockets = 100_000
	startBar     = 300 * time.Millisecond
	idleBar      = 0.1 // percent of a processor
	outputWithin = 5 * time.Second
)

// startingOurs is how many of starting are commands of fintrace.
const startingOurs = 2

// starting are the tools whose first output is waited for; fintrace's first.
func starting(binary string) []tool {
	return []tool{
		{name: "trace", args: []string{binary, "trace"}},
		{name: "list", args: []string{binary, "list"}},
		tcpstates,
		bccTcpstates,
		bpftrace,
		{name: "ss", args: []string{"ss", "-tan", "state", "fin-wait-2"}},
	}
}

type startRequest struct {
	Binary  string
	Sockets int
}

// A startTime is of one command.
type startTime struct {
	First time.Duration // from its start to its first output
	Error string
}

func (s *suite) start(ctx context.Context) (section, error) {
	found := section{name: "start", about: fmt.Sprintf(`
From starting a command to the first byte that it writes to a pipe, %d rounds; the sockets that are there are in FIN_WAIT2, half
of them held and half minisocks, beside their peers. Idle is for %s, after the start: processor time of all threads, and
how often one of them went to sleep of its own accord, which is how often it was woken; what else the host does is in it.`,
		startRounds, s.idle)}
	tools := starting(s.binary)
	out := make([]*contender, len(tools))
	for i, t := range tools {
		out[i] = &contender{name: t.name}
	}
	for _, n := range []int{0, startSockets} {
		times, err := inNamespace[[]startTime](ctx, "start", startRequest{s.binary, n})
		if err != nil {
			return found, err
		}
		var beside string
		for i, t := range times {
			if t.Error != "" {
				out[i].err = errors.New(t.Error)
			} else if i >= startingOurs {
				beside = list(beside, tools[i].name+" "+short(t.First))
			}
		}
		for i, t := range tools[:startingOurs] {
			r := row{
				what:     fmt.Sprintf("`fintrace %s`: start to first output, %s FIN_WAIT2 sockets there", t.name, spaced(n)),
				bar:      "≤ " + startBar.String(),
				met:      unknown,
				fintrace: figure(out[i].err, "%s", short(times[i].First)),
				beside:   beside,
			}
			if out[i].err == nil {
				r.met = meets(times[i].First <= startBar)
			}
			found.rows = append(found.rows, r)
		}
	}
	found.rows = append(found.rows, unmeasured(out)...)
	info, err := os.Stat(s.binary)
	if err != nil {
		return found, err
	}
	found.rows = append(found.rows, row{what: "size of the program", fintrace: mebibytes(float64(info.Size()))})
	daemon, remove, err := fintraceDaemon(s.binary)
	if err != nil {
		return found, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	trace := fintrace(s.binary)
	trace.name = "fintrace trace"
	for _, t := range []tool{trace, daemon} {
		cpu, wakes, err := idling(ctx, t, s.idle)
		if err != nil {
			return found, err
		}
		found.rows = append(found.rows, row{
			what:     "idle, `" + t.name + "`",
			bar:      fmt.Sprintf("≤ %.1f %% of a core", idleBar),
			met:      meets(cpu <= idleBar),
			fintrace: fmt.Sprintf("%.3f %%, %.1f wake-ups/s", cpu, wakes),
		})
	}
	return found, nil
}

// runStart is the part that starts the commands in turn.
func runStart(r startRequest) (all []startTime, err error) {
	if err := prepareNamespace(); err != nil {
		return nil, err
	}
	if r.Sockets > 0 {
		release, err := fill(holdRequest{Held: r.Sockets / 2}, holdRequest{Minisocks: r.Sockets / 2})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, release()) }()
	}
	var contenders []*contender
	tools := starting(r.Binary)
	all = make([]startTime, len(tools))
	for i, t := range tools {
		var took []float64
		contenders = append(contenders, &contender{name: t.name, round: func() error {
			d, err := t.firstOutput()
			took = append(took, float64(d))
			all[i].First = time.Duration(median(took))
			return err
		}})
	}
	if err := compete(context.Background(), startRounds, contenders); err != nil {
		return nil, err
	}
	for i, c := range contenders {
		if c.err != nil {
			all[i].Error = c.err.Error()
		}
	}
	return all, nil
}

// firstOutput is how long it takes a tool to write something.
func (t tool) firstOutput() (took time.Duration, err error) {
	cmd, err := t.command(context.Background())
	if err != nil {
		return 0, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = in, in
	began := time.Now()
	if err := errors.Join(cmd.Start(), in.Close()); err != nil {
		return 0, err
	}
	_ = out.SetReadDeadline(began.Add(outputWithin)) // A pipe has one.
	_, err = out.Read(make([]byte, 1))
	took = time.Since(began)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("writes nothing within %s to a pipe, without a connection", outputWithin)
	}
	// How it exits on a signal is its own affair.
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return took, err
}

// idling is what a tool costs while nothing happens: percent of a processor, and wake-ups per second.
func idling(ctx context.Context, t tool, during time.Duration) (percent, wakes float64, err error) {
	r, err := t.start(ctx, nil)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	cpu, err := r.cpu()
	if err != nil {
		return 0, 0, err
	}
	slept, err := switches(r.cmd.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	select {
	case <-time.After(during):
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
	cpuNow, err := r.cpu()
	if err != nil {
		return 0, 0, err
	}
	sleptNow, err := switches(r.cmd.Process.Pid)
	took := time.Since(began).Seconds()
	return 100 * (cpuNow - cpu).Seconds() / took, float64(sleptNow-slept) / took, err
}

// switches is how often a thread of a process has given up its processor to wait.
func switches(pid int) (sum int, err error) {
	files, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task/*/status"))
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // The thread has ended.
		}
		for line := range bytes.Lines(text) {
			if value, ok := strings.CutPrefix(string(line), "voluntary_ctxt_switches:"); ok {
				n, err := strconv.Atoi(strings.TrimSpace(value))
				if err != nil {
					return 0, fmt.Errorf("%s: %w", file, err)
				}
				sum += n
			}
		}
	}
	return sum, nil
}
