// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/probe"
)

const (
	snapshotSockets = 50_000
	snapshotRounds  = 5
)

type snapshotRequest struct {
	Binary  string
	Sockets int
}

// snapshotTimes are those of one look at all connections in FIN_WAIT2.
type snapshotTimes struct {
	Walk, List time.Duration // the probe's walk alone; fintrace list as a command
	SS         time.Duration
	SSError    string
	ProcNetTCP time.Duration
}

// runSnapshot is the part that looks at many connections in FIN_WAIT2, half of
// them held and half minisocks, beside as many in CLOSE_WAIT: their peers.
func runSnapshot(r snapshotRequest) (snapshotTimes, error) {
	var times snapshotTimes
	if err := prepareNamespace(); err != nil {
		return times, err
	}
	release, err := fill(r.Sockets)
	if err != nil {
		return times, err
	}
	defer release()
	p, err := probe.Open(probe.Options{})
	if err != nil {
		return times, err
	}
	defer p.Close()

	listing, ssing := []string{"list", "-o", "json"}, []string{"-tan", "state", "fin-wait-2"}
	if err := shows(r.Sockets, r.Binary, listing...); err != nil {
		return times, err
	}
	if err := shows(r.Sockets, "ss", ssing...); err != nil {
		times.SSError = err.Error()
	}
	var walk, list, ss, proc []float64
	for range snapshotRounds {
		began := time.Now()
		found := 0
		if _, err := p.Snapshot(func(func(uint64)) {}, func(sockets []events.Socket) {
			for i := range sockets {
				if sockets[i].State == events.FinWait2 {
					found++
				}
			}
		}); err != nil {
			return times, err
		}
		walk = append(walk, float64(time.Since(began)))
		if found < r.Sockets {
			return times, fmt.Errorf("the snapshot shows %d of %d connections", found, r.Sockets)
		}

		took, err := timed(r.Binary, listing...)
		if err != nil {
			return times, err
		}
		list = append(list, took)

		if times.SSError == "" {
			took, err := timed("ss", ssing...)
			if err != nil {
				return times, err
			}
			ss = append(ss, took)
		}

		began = time.Now()
		if err := readProc(); err != nil {
			return times, err
		}
		proc = append(proc, float64(time.Since(began)))
	}
	times.Walk, times.List = time.Duration(median(walk)), time.Duration(median(list))
	times.ProcNetTCP = time.Duration(median(proc))
	if times.SSError == "" {
		times.SS = time.Duration(median(ss))
	}
	return times, nil
}

// fill makes connections and leaves them in FIN_WAIT2, by as many processes as
// it takes: each may have only so many files open.
func fill(n int) (release func(), err error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("read the limit of open files: %w", err)
	}
	var holders []io.Closer
	release = func() {
		for _, h := range holders {
			h.Close()
		}
	}
	const others = 100                        // files that are not sockets
	each := min((int(files.Max)-others)/2, n) // a held connection takes two
	for number := 0; n > 0; number, n = number+1, n-each {
		h, err := startHolder(holdRequest{Number: number, Sockets: min(each, n)})
		if err != nil {
			release()
			return nil, err
		}
		holders = append(holders, h)
	}
	return release, nil
}

type holdRequest struct{ Number, Sockets int }

type held struct{}

// runHold is the part that has connections in FIN_WAIT2. Minisocks stay for
// tcp_fin_timeout, 60 s: long enough.
func runHold(r holdRequest) (held, error) {
	c, err := newConnector(r.Number)
	if err != nil {
		return held{}, err
	}
	for i := range r.Sockets {
		client, server, err := c.connect()
		if err != nil {
			return held{}, err
		}
		if i%2 == 0 {
			err = unix.Close(client)
		} else {
			err = unix.Shutdown(client, unix.SHUT_WR)
		}
		if err := errors.Join(err, acknowledge(server)); err != nil {
			return held{}, err
		}
	}
	return held{}, nil
}

// timed is how many nanoseconds a command takes, its output thrown away.
func timed(name string, args ...string) (float64, error) {
	began := time.Now()
	if err := exec.Command(name, args...).Run(); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return float64(time.Since(began)), nil
}

// shows checks that a command prints a line for each connection.
func shows(lines int, name string, args ...string) error {
	if _, err := exec.LookPath(name); err != nil {
		return errors.New("not installed")
	}
	out := &lineCounter{}
	cmd := exec.Command(name, args...)
	cmd.Stdout = out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if out.lines < lines {
		return fmt.Errorf("%s shows %d of %d connections", name, out.lines, lines)
	}
	return nil
}

type lineCounter struct{ lines int }

func (c *lineCounter) Write(b []byte) (int, error) {
	c.lines += bytes.Count(b, []byte{'\n'})
	return len(b), nil
}

func readProc() error {
	f, err := os.Open("/proc/self/net/tcp")
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}
