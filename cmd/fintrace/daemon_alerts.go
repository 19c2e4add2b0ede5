// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/config"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// notice takes what has happened to a connection.
func (d *daemon) notice(n *track.Notice) {
	switch n.Kind {
	case track.Closed:
		d.metrics.Closed(&n.Conn)
		d.changed = d.changed || n.Conn.Overdue
	case track.Overdue, track.Recovered:
		d.changed = true
	}
}

// restless is the least time between two evaluations while connections become
// overdue all the time, and busy the part of the time that evaluations take at
// most: one part in so many.
const (
	restless = 100 * time.Millisecond
	busy     = 10
)

// turn follows each turn of the loop, and says when the next is due.
func (d *daemon) turn(now events.Time) (again events.Time) {
	d.alive.Store(int64(now))
	if d.due() <= now {
		d.evaluate(now)
	}
	return d.due()
}

// due is when the book is to be asked.
func (d *daemon) due() events.Time {
	due, ok := d.book.Next()
	if !ok {
		due = math.MaxInt64
	}
	if d.changed {
		due = min(due, d.evaluated.Add(max(restless, busy*d.cost)))
	}
	return due
}

// sinks makes those of a configuration.
func (d *daemon) sinks(c *config.Config) (sinks []alert.Sink, err error) {
	from := alert.Origin{Host: hostname(), Version: version(), URL: c.Web.ExternalURL}
	if c.Sinks.Log {
		sinks = append(sinks, alert.NewLog("log", d.alertTo))
	}
	for _, hook := range c.Sinks.Webhooks {
		sink, err := alert.NewWebhook(hook, from)
		if err != nil {
			return nil, err
		}
		sinks = append(sinks, sink)
	}
	for _, manager := range c.Sinks.Alertmanagers {
		cluster, err := alert.NewAlertmanager(manager, from)
		if err != nil {
			return nil, err
		}
		sinks = append(sinks, cluster...)
	}
	return sinks, nil
}

// evaluate asks the book what there is to say, and says it.
func (d *daemon) evaluate(now events.Time) {
	d.changed = false
	changes := d.book.Evaluate(now, func(fn func(*track.Conn)) { d.watch.tracker.Overdue(now, fn) })
	if len(changes) > 0 {
		d.say(changes)
	}
	d.evaluated = probe.Now()
	d.cost = d.evaluated.Sub(now)
}

// say delivers changes. They are handed to the disk first, which takes some
// milliseconds: if we are killed then, the next run goes on with an alert of
// which a sink may not have heard, and makes up for it.
func (d *daemon) say(changes []alert.Change) {
	defer d.watch.lookup.Close()
	began := probe.Now()
	settings := map[uint32]events.Sysctls{}
	names := d.names.names()
	alerts := make([]alert.Alert, 0, len(changes))
	for i := range changes {
		c := &changes[i]
		c.Alert.Examples = nil
		for n := range min(len(c.Conns), examples) {
			c.Alert.Examples = append(c.Alert.Examples, report.NewRecord("", probe.Now(), &c.Conns[n], names))
		}
		switch {
		case len(c.Conns) == 0:
			c.Alert.Advice = nil
		case probe.Now().Sub(began) < advising:
			netns := c.Conns[0].Netns
			if _, done := settings[netns]; !done {
				var err error
				if settings[netns], err = d.watch.lookup.Sysctls(netns); err != nil {
					d.warn(err)
				}
			}
			c.Alert.Advice = d.advice(c.Conns, settings)
		}
		alerts = append(alerts, *c.Alert)
	}
	d.state.save(d.book.Save())
	d.outbox.Send(alerts...)
}

// advising is how long the loop finds out about advice: with a configuration of
// a thousand proxies it is tens of milliseconds for each alert. Those with most
// connections come first; where hundreds change at once the others have what was
// said before, or nothing until they are spoken of again.
const advising = 50 * time.Millisecond

// examples is how many connections an alert shows.
const examples = 5

// advice is what diagnose would say of these connections.
func (d *daemon) advice(conns []track.Conn, settings map[uint32]events.Sysctls) []report.Finding {
	now := probe.Now()
	return report.Advice(report.Evidence{
		Began: now, Ended: now, Wall: d.names.names().Wall,
		Conns:   conns,
		HAProxy: d.watch.haproxies.found.Processes, Settings: settings,
		OwnNetns: d.own, Netns: d.names.netnsName,
	})
}
