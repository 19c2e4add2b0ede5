// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	// batchDelay is how long records gather before they are read: at most 10
	// wake-ups a second, however many connections.
	batchDelay = 100 * time.Millisecond
	// fewDelay is that after a batch of few, as on a quiet host: who watches it sees
	// them soon.
	fewDelay = 250 * time.Millisecond
	few      = 32
	// someDelay is that after one of more, up to lots: each wake-up costs as much as
	// dozens of records.
	someDelay = time.Second
	lots      = 1000
	// reconcileEvery is how long the table goes without a look at the sockets.
	reconcileEvery = 30 * time.Second
	// doubtfulAtMost is how long it goes while something is in doubt.
	doubtfulAtMost = 10 * time.Second
	// checkEvery is how often the kernel side is asked whether records were lost.
	checkEvery = time.Second
	// lookupsPerPass bounds the flows that are asked for one by one, each with
	// some system calls: they are of minisocks that are gone early, and where that
	// is many their ports have new connections.
	lookupsPerPass = 256
	// holdersPerPass bounds the connections of namespaces that are gone whose
	// holders are looked at.
	holdersPerPass = 10_000
)

// watch is the loop between the kernel and the table: one goroutine that owns
// the table, reads the records, takes the snapshots and keeps the time.
type watch struct {
	probe   *probe.Probe
	tracker *track.Tracker
	onEvent func(*events.Event) // each record, after the tracker has had it; may be nil
	notify  func(*track.Notice)
	warn    func(error) // of what could not be looked at
	// turn is called when the table is up to date; it says when it wants to be
	// called again if nothing happens. May be nil.
	turn   func(now events.Time) (again events.Time)
	looked func(took time.Duration, at time.Time) // after each snapshot; may be nil
	// asked has what others want done between the loop's own steps; may be nil.
	asked <-chan func()

	rules     limits.Rules
	haproxies *haproxies
	lookup    probe.Lookup // closed between two steps

	running  bool // between start and finish
	counters probe.Counters
	checked  events.Time // when the counters were read
	losses   uint64      // lost and missed records as of the last snapshot
	unsent   uint64      // handovers that were not sent as of the last snapshot
	// unfollowed were closed and gone before a snapshot, and were not sent.
	unfollowed uint64
	drainAt    events.Time // when records are read; 0: once there are some
	began      events.Time // the last snapshot
	ended      events.Time
	cost       time.Duration // of the last snapshot, of one processor

	covered map[uint32]events.NetnsCounters // the namespaces of the last snapshot
	skipped []string                        // those that it could not look at, each with why
}

// start attaches, and fills the table with what is in FIN_WAIT2 already.
func (w *watch) start(ctx context.Context) error {
	if err := w.probe.Attach(); err != nil {
		return err
	}
	giveBack()
	return w.seed(ctx)
}

// seed takes the first snapshot, with HAProxy's proxies known.
func (w *watch) seed(ctx context.Context) error {
	w.haproxies.look(ctx)
	w.rules.HAProxy = w.haproxies.view
	w.warnOf(w.haproxies.warnings())
	w.tracker.SetRules(w.rules, probe.Now())
	return w.reconcile(ctx)
}

// run goes on until ctx ends.
func (w *watch) run(ctx context.Context) error {
	if err := w.probe.KeepHandovers(); err != nil {
		return err
	}
	settle()
	timer := time.NewTimer(0)
	defer timer.Stop()
	again := probe.Now() // the first turn is at once
	w.running = true
	for {
		now := probe.Now()
		timer.Reset(max(min(w.nextWake(), again).Sub(now), 0))
		select {
		case <-ctx.Done():
			return w.finish(ctx)
		case do := <-w.asked:
			do()
			continue
		case <-w.probe.Ready():
			if soon := probe.Now().Add(batchDelay); w.drainAt == 0 || w.drainAt > soon {
				w.drainAt = soon
			}
			continue
		case found := <-w.haproxies.running:
			w.found(found)
			continue
		case <-timer.C:
		}
		now = probe.Now()
		if err := w.drain(); err != nil {
			return err
		}
		if now >= w.checked.Add(checkEvery) || w.due(now) {
			if err := w.check(now); err != nil {
				return err
			}
		}
		if now >= w.nextSnapshot() {
			if err := w.reconcile(ctx); err != nil {
				return err
			}
			now = probe.Now()
		}
		w.advance(now)
		w.haproxies.refresh(ctx, now)
		again = events.Time(math.MaxInt64)
		if w.turn != nil {
			again = w.turn(probe.Now())
		}
	}
}

// settle is for the long run: there is never so much to do that a second processor
// is worth being woken for.
func settle() {
	giveBack()
	if _, set := os.LookupEnv("GOMAXPROCS"); !set {
		runtime.GOMAXPROCS(1)
	}
}

// use puts the user's rules in force. Where one is about minisocks, each is
// followed from its handover on: a look might find it too late.
func (w *watch) use(user []limits.Rule) error {
	w.rules.User = user
	w.each(w.tracker.SetRules(w.rules, probe.Now()))
	return w.probe.SendEveryHandover(slices.ContainsFunc(user, func(r limits.Rule) bool { return r.Match.Stage == events.Minisock }))
}

// found takes what a look for HAProxy has found.
func (w *watch) found(found haproxy.Found) {
	if w.haproxies.take(found) {
		w.rules.HAProxy = w.haproxies.view
		w.each(w.tracker.SetRules(w.rules, probe.Now()))
	}
	w.warnOf(w.haproxies.warnings())
}

func (w *watch) warnOf(lines []string) {
	for _, line := range lines {
		w.warn(errors.New(line))
	}
}

// advance makes the time now, or as much of it as the tracker does at once.
func (w *watch) advance(now events.Time) {
	defer w.lookup.Close()
	w.each(w.tracker.Advance(now, func(netns uint32, f events.Flow, cookie uint64) bool {
		state, found, err := w.lookup.Find(netns, f)
		// Where it may not be looked at, the events' word must do.
		return err != nil || state == events.FinWait2 && (found == cookie || !events.IsCookie(cookie))
	}))
}

// catchUp makes the time now, however much that takes.
func (w *watch) catchUp() {
	for now := probe.Now(); w.due(now); {
		w.advance(now)
	}
}

// finish reads what is left and looks at the sockets once more.
func (w *watch) finish(ctx context.Context) error {
	w.running = false
	if err := w.drain(); err != nil {
		return err
	}
	if err := w.check(probe.Now()); err != nil {
		return err
	}
	return w.reconcile(ctx)
}

func (w *watch) nextWake() events.Time {
	wake := min(w.checked.Add(checkEvery), w.nextSnapshot())
	if w.drainAt != 0 {
		wake = min(wake, w.drainAt)
	}
	if at, ok := w.tracker.Next(); ok {
		wake = min(wake, at)
	}
	return wake
}

func (w *watch) due(now events.Time) bool {
	at, ok := w.tracker.Next()
	return ok && at <= now
}

// nextSnapshot is as soon as it is needed, but so that snapshots take a bounded
// share of a processor: a hundredth where something is in doubt, a two thousandth
// to see minisocks end, which no event shows. On a busy host a snapshot lasts many
// times what it costs: by the clock they would stop when they are needed most.
func (w *watch) nextSnapshot() events.Time {
	wait := reconcileEvery
	switch {
	case w.probe.Bare():
		// Snapshots are all there is.
		wait = min(reconcileEvery, max(time.Second, 20*w.cost))
	case w.counters.Lost+w.counters.Missed > w.losses, w.tracker.WantsSnapshot():
		wait = min(doubtfulAtMost, max(time.Second, 100*w.cost))
	case w.tracker.Count(events.Minisock) > 0, w.counters.Unsent > w.unsent:
		wait = min(wait, max(2*time.Second, 2000*w.cost))
	}
	return w.ended.Add(wait)
}

// check reads the kernel side's counters.
func (w *watch) check(now events.Time) (err error) {
	w.checked = now
	w.haproxies.check()
	w.counters, err = w.probe.Counters()
	return err
}

func (w *watch) drain() error {
	n := 0
	some, err := w.probe.Drain(func(ev *events.Event) {
		n++
		w.haproxies.noticed(ev.Process)
		w.each(w.tracker.Apply(ev))
		if w.onEvent != nil {
			w.onEvent(ev)
		}
	})
	switch {
	case !some:
		w.drainAt = 0
	case n < few:
		w.drainAt = probe.Now().Add(fewDelay)
	case n < lots:
		w.drainAt = probe.Now().Add(someDelay)
	default:
		w.drainAt = probe.Now().Add(batchDelay)
	}
	return err
}

// reconcile looks at all sockets, and for the processes of held ones whose is not
// known: each connection is complete when it is first spoken of.
func (w *watch) reconcile(ctx context.Context) error {
	// Read before: what is lost from now on may be lost on this snapshot too.
	if err := w.check(probe.Now()); err != nil {
		return err
	}
	losses, unsent := w.counters.Lost+w.counters.Missed, w.counters.Unsent
	began, spent := probe.Now(), processorTime()
	var (
		owners = new(probe.Owners)
		cov    events.Coverage
		err    error
	)
	w.tracker.BeginSnapshot(began)
	drained := w.aside(ctx, func(inLoop func(func() error)) {
		known := func(show func(cookie uint64)) {
			// What was sent before it began is to be known.
			inLoop(func() error {
				drained := w.drain()
				w.tracker.Cookies(show)
				return drained
			})
			inLoop(nothing)
		}
		cov, err = w.probe.Snapshot(known, func(sockets []events.Socket) {
			inLoop(func() error {
				drained := w.drain()
				for i := range sockets {
					w.haproxies.noticed(sockets[i].Process)
				}
				w.each(w.tracker.Observe(sockets))
				return drained
			})
		})
		var unowned []uint64
		inLoop(func() error {
			unowned = w.tracker.Unowned()
			return nil
		})
		inLoop(nothing)
		if len(unowned) > 0 {
			var hidden error
			if owners, hidden = w.probe.Owners(events.FinWait2, unowned); hidden != nil {
				cov.Skipped = append(cov.Skipped, hidden.Error())
			}
		}
	})
	if err := errors.Join(drained, w.drain()); err != nil {
		return err
	}
	if err != nil {
		return w.unlooked(err)
	}
	for said := w.tracker.Own(owners.Of); len(said) > 0; said = w.tracker.Own(owners.Of) {
		for i := range said {
			w.haproxies.noticed(said[i].Conn.Process)
		}
		w.each(said)
	}
	w.skipped = cov.Skipped
	w.warnOf(cov.Skipped)
	defer w.lookup.Close()
	lookups, held := 0, 0
	var holders probe.Holders
	w.each(w.tracker.EndSnapshot(cov, func(netns uint32, f events.Flow) bool {
		if lookups++; lookups > lookupsPerPass {
			return true // Not known to be free.
		}
		state, _, err := w.lookup.Find(netns, f)
		return state != 0 || err != nil
	}, func(p events.Process, inode uint64, then events.Time) bool {
		if held++; held > holdersPerPass {
			return true
		}
		return holders.Hold(p.PID, inode, then)
	}))
	w.cost = processorTime() - spent
	w.began, w.ended, w.covered = began, probe.Now(), cov.Netns
	w.losses, w.unsent = losses, unsent
	// A snapshot finds some that were not sent since it began, too.
	if found := w.tracker.Counters().Found; unsent > found {
		w.unfollowed = max(w.unfollowed, unsent-found)
	}
	if w.looked != nil {
		w.looked(w.ended.Sub(began), time.Now())
	}
	return nil
}

// unlooked is for a snapshot that could not be taken, for want of a descriptor or
// of memory: what is in the table stays there, and it is tried again soon. Without
// a first one there is nothing to go on with.
func (w *watch) unlooked(err error) error {
	if w.ended == 0 {
		return err
	}
	w.tracker.GiveUpSnapshot()
	w.warn(err)
	w.skipped = []string{err.Error()}
	w.ended = probe.Now()
	return nil
}

// aside does work on a goroutine of its own: to walk a million sockets takes
// seconds where the processors are busy. The loop goes on meanwhile, with all but
// what a snapshot is for. What work gives to its argument is begun by the loop's
// goroutine when that returns, and done when the next call does, which may be of
// nothing, or aside; the first of the errors of all this is returned.
func (w *watch) aside(ctx context.Context, work func(inLoop func(func() error))) (err error) {
	steps, ended := make(chan func() error), make(chan struct{})
	go func() {
		defer close(ended)
		work(func(step func() error) { steps <- step })
	}()
	tick := time.NewTicker(batchDelay)
	defer tick.Stop()
	for {
		asked, running := w.asked, w.haproxies.running
		if !w.running {
			asked, running = nil, nil
		}
		select {
		case <-ended:
			return err
		case step := <-steps:
			err = cmp.Or(err, step())
		case do := <-asked:
			do()
		case found := <-running:
			w.found(found)
		case <-tick.C:
			err = cmp.Or(err, w.drain())
			if !w.running {
				continue
			}
			now := probe.Now()
			if now >= w.checked.Add(checkEvery) {
				err = cmp.Or(err, w.check(now))
			}
			w.advance(now)
			w.haproxies.refresh(ctx, now)
			if w.turn != nil {
				w.turn(probe.Now())
			}
		}
	}
}

func nothing() error { return nil }

// processorTime is what this process has had so far.
func processorTime() time.Duration {
	var used unix.Rusage
	// Cannot fail: it is for this process, into memory of its own.
	_ = unix.Getrusage(unix.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// openOrBare opens the probe, without BPF where that cannot be used: warn is told
// what is less then.
func openOrBare(warn func(error)) (*probe.Probe, error) {
	p, err := probe.Open(probe.Options{EveryHandover: true})
	if err == nil {
		return p, nil
	}
	bare, bareErr := probe.OpenBare()
	if bareErr != nil {
		return nil, err
	}
	warn(fmt.Errorf("what only BPF shows: when held connections began that were not there before (≥), how minisocks end, and what comes and goes between two looks: %w", err))
	return bare, nil
}

func (w *watch) each(notices []track.Notice) {
	for i := range notices {
		w.notify(&notices[i])
	}
}
