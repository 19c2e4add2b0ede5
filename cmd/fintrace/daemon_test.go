// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/track"
)

// limited is a configuration with a limit of a second for all that is held in a
// network namespace.
func limited(ns *kerneltest.Namespace, alerts string) string {
	return fmt.Sprintf(`
limits:
  - name: quick
    match: {netns: %d}
    fin_timeout: 1s
alerts: {%s}
`, ns.Inode, alerts)
}

// TestDaemonLatency measures from the moment at which connections are past their
// limit and the grace to the moment at which the log's line can be read.
func TestDaemonLatency(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	var late []time.Duration
	for range 5 {
		h, err := hold(ns)
		entered := time.Now()
		if err != nil {
			t.Fatal(err)
		}
		due := entered.Add(time.Second + track.Grace)
		fired := d.await("the alert", func(l *logLine) bool { return l.Read.After(entered) && spoken(inode(ns), alert.Fired)(l) })
		late = append(late, fired.Read.Sub(due))
		if early := due.Sub(fired.Read); early > 100*time.Millisecond {
			t.Errorf("it fired %s before the limit and the grace had passed", early)
		}
		h.close()
		d.await("the resolution", func(l *logLine) bool { return l.Read.After(entered) && spoken(inode(ns), alert.Resolved)(l) })
	}
	slices.Sort(late)
	t.Logf("from the limit to the line: %s", late)
	if worst := late[len(late)-1]; worst > time.Second {
		t.Errorf("the line came %s after the limit had passed", worst)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// tick is how exact a time is that the kernel counts in jiffies (CONFIG_HZ=100).
const tick = 10 * time.Millisecond

// TestDaemonRestart kills a daemon while an alert fires. The next one goes on
// with the alert, and knows the ages.
func TestDaemonRestart(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	d := startDaemon(t, limited(ns, "min_connections: 3, resolve_after: 1s"))
	entered := time.Now()
	all := holdSome(t, ns, 3)
	heldBy := time.Now()
	first := d.await("the alert", spoken(inode(ns), alert.Fired))
	before := d.alerts(inode(ns))
	if len(before) != 1 || before[0].ID != first.Alert || before[0].Count != 3 {
		t.Fatalf("%+v, want the alert %s of 3 connections", before, first.Alert)
	}
	if err := await("the state to be kept", func() bool {
		text, err := os.ReadFile(d.dir + "/alerts.json")
		return err == nil && strings.Contains(string(text), inode(ns))
	}); err != nil {
		t.Fatal(err)
	}

	d.signal(unix.SIGKILL)
	d.gone()
	again := time.Now()
	d.start()
	going := d.await("the alert to go on", func(l *logLine) bool { return l.Read.After(again) && spoken(inode(ns))(l) })
	after := d.alerts(inode(ns))
	if len(after) != 1 || after[0].ID != first.Alert || !after[0].StartsAt.Equal(before[0].StartsAt) || after[0].Count != 3 || going.Event != alert.Updated {
		t.Errorf("the alert is %q, %+v; want an update of %+v", going.Event, after, before[0])
	}
	for _, r := range d.connections("netns=" + inode(ns)) {
		if r.SinceExact || r.Since.Before(entered.Add(-tick)) || r.Since.After(heldBy.Add(tick)) || r.PID == 0 {
			t.Errorf("one of %v is of process %d since %v, %t; want a bound from %v to %v", r.Local, r.PID, r.Since, r.SinceExact, entered, heldBy)
		}
	}

	for _, h := range all {
		h.close()
	}
	resolved := d.await("the resolution", spoken(inode(ns), alert.Resolved))
	if resolved.Alert != first.Alert {
		t.Errorf("%s has resolved, want %s", resolved.Alert, first.Alert)
	}
	if n := len(d.logged(spoken(inode(ns), alert.Fired))); n != 1 {
		t.Errorf("it fired %d times", n)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}
