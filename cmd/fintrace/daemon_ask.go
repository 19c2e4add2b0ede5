// SPDX-License-Identifier: Apache-2.0

package main

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/metrics"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
	"github.com/fintrace/fintrace/internal/web"
)

// ask has do done by the loop's goroutine, between its own steps.
func (d *daemon) ask(ctx context.Context, do func()) error {
	done := make(chan struct{})
	select {
	case d.asked <- func() { defer close(done); do() }:
		<-done
		return nil
	case <-ctx.Done():
		return fmt.Errorf("fintrace is busy: %w", context.Cause(ctx))
	}
}

// source answers the requests of the web listener.
func (d *daemon) source() web.Source {
	source := web.Source{
		Connections: d.connections,
		Alerts:      d.alerts,
		Status:      d.status,
		Healthy:     d.healthy,
		Ready: func() error {
			if d.alive.Load() == 0 {
				return errors.New("the first look at the sockets has not ended")
			}
			return nil
		},
		Metrics: d.metrics.Handler(d.gather),
		Netns:   parseNetns,
	}
	if host := hostname(); host != "" {
		source.Hosts = []string{host}
	}
	return source
}

// hostname is the host's, "" if it is not known.
func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return name
}

// stuckAfter is how long the loop may go without a turn: it takes one a second,
// but for the snapshot of a host with a million sockets.
const stuckAfter = 10 * time.Second

// healthy says whether the loop lives. Before its first turn it does.
func (d *daemon) healthy() error {
	last := events.Time(d.alive.Load())
	if last == 0 {
		return nil
	}
	if since := probe.Now().Sub(last); since > stuckAfter {
		return fmt.Errorf("the loop has made no turn for %s", since.Round(time.Second))
	}
	return nil
}

// connections are the oldest that a query selects.
func (d *daemon) connections(ctx context.Context, q web.Query) (found web.Connections, err error) {
	var oldest oldestFirst
	err = d.ask(ctx, func() {
		now := probe.Now()
		names := d.names.names()
		found.At = names.Wall(now)
		take := func(c *track.Conn) {
			if !q.Filter.Selects(c) {
				return
			}
			found.Total++
			oldest.keep(c, q.Limit)
		}
		if q.Overdue {
			d.watch.tracker.Overdue(now, take)
		} else {
			d.watch.tracker.All(now, take)
		}
		report.SortOldest(oldest)
		for i := range oldest {
			found.Records = append(found.Records, report.NewRecord("", now, &oldest[i], names))
		}
	})
	return found, err
}

// oldestFirst is a heap with the youngest on top, to be thrown out first.
type oldestFirst []track.Conn

// keep adds c, of more than most in place of the youngest.
func (h *oldestFirst) keep(c *track.Conn, most int) {
	switch {
	case len(*h) < most:
		heap.Push(h, *c)
	case most > 0 && c.Since < (*h)[0].Since:
		(*h)[0] = *c
		heap.Fix(h, 0)
	}
}

func (h oldestFirst) Len() int           { return len(h) }
func (h oldestFirst) Less(i, j int) bool { return h[i].Since > h[j].Since }
func (h oldestFirst) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *oldestFirst) Push(c any)        { *h = append(*h, c.(track.Conn)) }
func (h *oldestFirst) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// alerts are those that fire, as of now.
func (d *daemon) alerts(ctx context.Context) (alerts []alert.Alert, err error) {
	err = d.ask(ctx, func() {
		d.evaluate(probe.Now())
		alerts = d.firing()
	})
	return alerts, err
}

// firing are the alerts that fire, as of the last evaluation.
func (d *daemon) firing() (alerts []alert.Alert) {
	for _, a := range d.book.Active() {
		alerts = append(alerts, *a)
	}
	return alerts
}

func (d *daemon) status(ctx context.Context) (s web.Status, err error) {
	err = d.ask(ctx, func() {
		now := probe.Now()
		s = web.Status{
			At: d.names.names().Wall(now), Started: d.began, Version: version(), Host: hostname(),
			Lost:     d.watch.counters.Lost + d.watch.counters.Missed,
			Unlooked: slices.Concat(d.watch.skipped, d.watch.haproxies.warnings()),
		}
		d.watch.tracker.All(now, s.Add)
	})
	return s, err
}

// gather takes what a scrape shows.
func (d *daemon) gather(ctx context.Context, s *metrics.State) error {
	spaces := map[uint32]string{}
	err := d.ask(ctx, func() {
		now := probe.Now()
		w := d.watch
		s.Counters, s.Connections, s.Capacity = w.tracker.Counters(), w.tracker.Len(), track.DefaultCapacity
		s.Records, s.Lost, s.Missed = d.records, w.counters.Lost, w.counters.Missed
		s.Instants, s.Unfollowed = w.counters.Instants, w.unfollowed
		s.HAProxy = w.haproxies.found.Processes
		counts := d.book.Counts()
		s.Firing, s.Alerts = len(d.book.Active()), map[alert.Event]uint64{
			alert.Fired: counts.Fired, alert.Updated: counts.Updated, alert.Repeated: counts.Repeated, alert.Resolved: counts.Resolved,
		}
		w.tracker.All(now, s.Add)
		spaces[d.own] = metrics.Host
		for i := range s.HAProxy {
			if netns := s.HAProxy[i].Netns; netns != 0 && spaces[netns] == "" {
				spaces[netns] = d.names.netnsLabel(netns)
			}
		}
	})
	if err != nil {
		return err
	}
	s.Sinks, s.LogLost = d.outbox.Stats(), d.lines.lost.Load()
	var lookup probe.Lookup
	defer lookup.Close()
	for netns, name := range spaces {
		n := metrics.Namespace{Name: name}
		// What cannot be read is absent.
		n.Sysctls, _ = lookup.Sysctls(netns)
		n.Statistics, _ = lookup.Statistics(netns)
		s.Namespaces = append(s.Namespaces, n)
	}
	return nil
}
