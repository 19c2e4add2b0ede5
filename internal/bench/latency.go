// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/track"
)

const (
	latencyConnections = 300
	latencyEvery       = 7 * time.Millisecond // a prime against the timers' ticks
	latencyLimit       = time.Second
	latencyPatience    = 10 * time.Second
)

type latencyRequest struct{ Binary string }

// latencies are from the moment a connection is overdue to its line being read.
type latencies struct{ P50, P99, Max time.Duration }

// runLatency is the part that waits for held connections to pass their limit.
func runLatency(r latencyRequest) (l latencies, err error) {
	if err := prepareNamespace(); err != nil {
		return l, err
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return l, err
	}
	inode, err := strconv.ParseUint(strings.Trim(own, "net:[]"), 10, 32)
	if err != nil {
		return l, fmt.Errorf("inode of %s: %w", own, err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		return l, err
	}
	defer out.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	tracer, err := fintrace(r.Binary, "-o", "json", "--limit", latencyLimit.String(),
		"--netns", strconv.FormatUint(inode, 10)).start(ctx, in)
	if err := errors.Join(err, in.Close()); err != nil {
		return l, err
	}
	defer func() { err = errors.Join(err, tracer.stop()) }()

	late := make(chan time.Duration)
	go overdue(out, late)
	c, err := newConnector(0)
	if err != nil {
		return l, err
	}
	var all []float64
	note := func(d time.Duration) { all = append(all, float64(d)) }
	for range latencyConnections {
		client, server, err := c.connect()
		if err != nil {
			return l, err
		}
		if err := errors.Join(unix.Shutdown(client, unix.SHUT_WR), acknowledge(server)); err != nil {
			return l, err
		}
		for next := time.After(latencyEvery); next != nil; {
			select {
			case d := <-late:
				note(d)
			case <-next:
				next = nil
			}
		}
	}
	for patience := time.After(latencyPatience); len(all) < latencyConnections; {
		select {
		case d, ok := <-late:
			if !ok {
				return l, errors.New("fintrace ended early")
			}
			note(d)
		case <-patience:
			return l, fmt.Errorf("%d of %d connections were not reported as overdue", latencyConnections-len(all), latencyConnections)
		}
	}
	return latencies{
		P50: time.Duration(quantile(all, 0.5)),
		P99: time.Duration(quantile(all, 0.99)),
		Max: time.Duration(quantile(all, 1)),
	}, nil
}

// overdue sends how late each record of an overdue connection is, as it is read.
func overdue(from *os.File, late chan<- time.Duration) {
	defer close(late)
	for lines := bufio.NewScanner(from); lines.Scan(); {
		now := time.Now()
		var record struct {
			Kind  string
			Since time.Time
		}
		if json.Unmarshal(lines.Bytes(), &record) == nil && record.Kind == track.Overdue.String() {
			late <- now.Sub(record.Since.Add(latencyLimit + track.Grace))
		}
	}
}
