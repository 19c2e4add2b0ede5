// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/track"
)

const (
	noticeConnections = 1000
	noticeEvery       = 7 * time.Millisecond // a prime against the timers' ticks
	noticeLimit       = time.Second
	noticePatience    = 20 * time.Second
	noticeIdleBar     = 20 * time.Millisecond
	noticeChurnBar    = 100 * time.Millisecond
)

// noticeBounds are those of the histogram.
var noticeBounds = []time.Duration{
	1 * time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, math.MaxInt64,
}

func (s *suite) notice(ctx context.Context) (section, error) {
	found := section{name: "notice"}
	idle, err := inNamespace[[]float64](ctx, "notice", noticeRequest{s.binary})
	if err != nil {
		return found, err
	}
	churn, rate, err := s.noticeUnderChurn(ctx)
	if err != nil {
		return found, err
	}
	row := func(what string, late []float64, bar time.Duration) row {
		p99 := time.Duration(quantile(late, 0.99))
		return row{
			what:  "limit and grace passed → line read, p99, " + what,
			bar:   "≤ " + bar.String(),
			met:   meets(p99 <= bar),
			ratio: times(float64(p99), float64(bar)) + " the bar",
			fintrace: fmt.Sprintf("%s; median %s, most %s", short(p99),
				short(time.Duration(median(late))), short(time.Duration(quantile(late, 1)))),
			beside: "exporters: the scrape interval",
		}
	}
	found.rows = append(found.rows,
		row("idle", idle, noticeIdleBar),
		row(fmt.Sprintf("at %.0f connections/s", rate), churn, noticeChurnBar),
	)
	found.about = fmt.Sprintf(`
%d held connections, one each %s, with a limit of %s and the grace of %s: how much later than that the line of
%s was read, by a process that has to be scheduled too. Under churn: beside as many connections of
another network namespace as the CPUs make.

%s`, noticeConnections, noticeEvery, noticeLimit, track.Grace, "`fintrace trace -o json`", histogram(idle, churn))
	return found, nil
}

// noticeUnderChurn measures while as many connections are made as go, and says how many that were.
func (s *suite) noticeUnderChurn(ctx context.Context) (late []float64, perSecond float64, err error) {
	type result struct {
		made loaded
		err  error
	}
	duration := noticeConnections*noticeEvery + noticeLimit + track.Grace + time.Second
	churned := make(chan result, 1)
	go func() {
		made, err := makeLoad(ctx, load{Kind: mixed, Connections: math.MaxInt32, Duration: duration})
		churned <- result{made, err}
	}()
	late, err = inNamespace[[]float64](ctx, "notice", noticeRequest{s.binary})
	r := <-churned
	return late, r.made.perSecond(), errors.Join(err, r.err)
}

// histogram renders how many notices were how late, as a block of Markdown.
func histogram(idle, churn []float64) string {
	var b strings.Builder
	b.WriteString("```\nlate       idle   churn\n")
	below := func(late []float64, bound time.Duration) (n int) {
		for _, l := range late {
			if time.Duration(l) <= bound {
				n++
			}
		}
		return n
	}
	var last time.Duration
	for _, bound := range noticeBounds {
		name := "≤ " + bound.String()
		if bound == math.MaxInt64 {
			name = "> " + last.String()
		}
		fmt.Fprintf(&b, "%-8s %6d  %6d\n", name, below(idle, bound)-below(idle, last), below(churn, bound)-below(churn, last))
		last = bound
	}
	b.WriteString("```")
	return b.String()
}

type noticeRequest struct{ Binary string }

// runNotice is the part that waits for held connections to pass their limit. It
// returns how many ns after the moment that each is overdue its line was read.
func runNotice(r noticeRequest) (late []float64, err error) {
	if err := prepareNamespace(); err != nil {
		return nil, err
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	inode, err := strconv.ParseUint(strings.Trim(own, "net:[]"), 10, 32)
	if err != nil {
		return nil, fmt.Errorf("inode of %s: %w", own, err)
	}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	tracer, err := fintrace(r.Binary, "-o", "json", "--limit", noticeLimit.String(),
		"--netns", strconv.FormatUint(inode, 10)).launch(ctx, in)
	if err := errors.Join(err, in.Close()); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, tracer.stop()) }()
	if err := tracer.attached(ctx); err != nil {
		return nil, err
	}

	notices := make(chan time.Duration, noticeConnections)
	go overdue(out, notices)
	c, err := newConnector(0)
	if err != nil {
		return nil, err
	}
	next := time.NewTicker(noticeEvery)
	defer next.Stop()
	for range noticeConnections {
		<-next.C
		client, server, err := c.connect()
		if err != nil {
			return nil, err
		}
		if err := errors.Join(unix.Shutdown(client, unix.SHUT_WR), acknowledge(server)); err != nil {
			return nil, err
		}
	}
	for patience := time.After(noticePatience); len(late) < noticeConnections; {
		select {
		case d, ok := <-notices:
			if !ok {
				return nil, errors.New("fintrace ended early")
			}
			late = append(late, float64(d))
		case <-patience:
			return nil, fmt.Errorf("%d of %d connections were not reported as overdue", noticeConnections-len(late), noticeConnections)
		}
	}
	return late, nil
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
			late <- now.Sub(record.Since.Add(noticeLimit + track.Grace))
		}
	}
}
