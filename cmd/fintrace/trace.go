// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

func traceCommand(e env) *cobra.Command {
	var (
		t        tracing
		duration time.Duration
	)
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "Watch connections in FIN_WAIT2: past their limit, and gone",
		Long: `Prints a line when a connection passes its limit, when it moves from stage to
stage, and when it leaves FIN_WAIT2; and a summary at the end (Ctrl-C).
Connections that have been in FIN_WAIT2 for less than --min-duration are counted
but not printed; with --min-duration 0 each is printed from its entry on. Where
very many are closed, those that are gone within seconds are not followed one by
one, unless --min-duration is given.`,
		Args: noArguments,
	}
	t.filter = filterFlags(cmd, time.Second)
	asJSON := outputFlag(cmd)
	limitFlag(cmd, &t.rules.Held)
	t.haproxies = haproxyFlags(cmd)
	cmd.Flags().BoolVar(&t.allStates, "all-states", false, "print every TCP transition, with the time in the state before")
	durationFlag(cmd, &duration, "duration", 0, "stop after this long (default: at Ctrl-C)")
	ringFlag(cmd, &t.ringBytes, "ring-bytes", "size of the buffer for records, a power of two (default 4 MiB)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if t.allStates && !cmd.Flags().Changed("min-duration") {
			t.filter.MinDuration = 0
		}
		t.everyone = cmd.Flags().Changed("min-duration") && t.filter.MinDuration < reconcileEvery
		ctx := cmd.Context()
		if duration > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, duration)
			defer cancel()
		}
		t.env, t.asJSON = e, *asJSON
		t.haproxies.netns = t.filter.Netns
		return t.run(ctx)
	}
	return cmd
}

// tracing is one run of trace.
type tracing struct {
	env       env
	rules     limits.Rules
	haproxies *haproxies
	filter    *track.Filter
	allStates bool
	everyone  bool // also those that are minisocks for less than from look to look
	asJSON    bool
	ringBytes int

	watch   *watch
	names   *report.Names
	out     *json.Encoder
	live    *report.Live
	summary *report.Summary
	states  map[uint64]was
	err     error // of printing: it ends the trace
	cancel  context.CancelFunc
}

// was is the state a socket went into last, for --all-states.
type was struct {
	state events.State
	since events.Time
}

// statesKept bounds the sockets whose last transition is remembered.
const statesKept = 1 << 20

func (t *tracing) run(ctx context.Context) (err error) {
	ctx, t.cancel = context.WithCancel(ctx)
	defer t.cancel()
	t.env.whenUnread(t.cancel)
	p, err := probe.Open(probe.Options{
		AllStates:     t.allStates,
		Instants:      t.filter.MinDuration == 0,
		EveryHandover: t.everyone,
		RingBytes:     t.ringBytes,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	t.names = names()
	t.out = json.NewEncoder(report.JSONWriter(t.env.stdout))
	t.summary = report.NewSummary()
	t.states = map[uint64]was{}
	warned := map[string]bool{}
	t.watch = &watch{
		probe:     p,
		tracker:   track.New(t.rules, track.DefaultCapacity, hugePages()),
		rules:     t.rules,
		haproxies: t.haproxies,
		notify:    t.seeding,
		warn: func(err error) {
			if !warned[err.Error()] {
				warned[err.Error()] = true
				t.env.notLookedAt(err)
			}
		},
	}
	if t.allStates {
		t.watch.onEvent = t.transition
	}
	began := probe.Now()
	if err := t.watch.start(ctx); err != nil {
		return err
	}
	t.watch.catchUp()
	t.live = report.NewLive(t.env.stdout, t.env.style(), t.names, len(t.haproxies.found.Processes) > 0)
	t.watch.notify = t.notice
	t.greet()
	if err := t.watch.run(ctx); err != nil {
		return err
	}
	if t.err == nil {
		t.finish(began)
	}
	return t.err
}

// seeding takes the notices of what was there before the trace began.
func (t *tracing) seeding(n *track.Notice) {
	if t.asJSON {
		t.notice(n)
		return
	}
	if t.selected(&n.Conn) {
		t.summary.Add(n)
	}
}

// selected leaves the minimal duration aside: it is for printing, not for counting.
func (t *tracing) selected(c *track.Conn) bool {
	all := *t.filter
	all.MinDuration = 0
	return all.Selects(c)
}

func (t *tracing) notice(n *track.Notice) {
	if !t.selected(&n.Conn) {
		return
	}
	t.summary.Add(n)
	if n.Conn.Duration < t.filter.MinDuration {
		return
	}
	switch {
	case t.allStates:
		t.minisockEnd(n)
	case t.asJSON:
		t.printed(t.out.Encode(report.NewRecord(n.Kind.String(), n.Time, &n.Conn, t.names)))
	default:
		t.printed(t.live.Notice(n))
	}
}

// printed ends the trace when nobody reads it any more.
func (t *tracing) printed(err error) {
	if err != nil && t.err == nil {
		t.err = fmt.Errorf("print: %w", err)
		t.cancel()
	}
}

// overdueShown is how many of those past their limit at the start are printed.
const overdueShown = 10

// greet says what it is attached to and what was found.
func (t *tracing) greet() {
	var (
		stages          [events.Minisock + 1]int
		found, past     int
		oldest, overdue oldestFirst
	)
	t.watch.tracker.All(probe.Now(), func(c *track.Conn) {
		if !t.selected(c) {
			return
		}
		found++
		stages[c.Stage]++
		oldest.keep(c, 1)
		if c.Overdue {
			past++
			overdue.keep(c, overdueShown)
		}
	})
	report.SortOldest(overdue)
	fmt.Fprintf(t.env.stderr, "Tracing inet_sock_set_state in %d network namespace(s); Ctrl-C ends with a summary.\n", len(t.watch.covered))
	fmt.Fprintf(t.env.stderr, "In FIN_WAIT2 already: %d", found)
	if found > 0 {
		var parts []string
		for _, s := range []events.Stage{events.Held, events.Orphaned, events.Minisock} {
			if stages[s] > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", stages[s], s))
			}
		}
		bound := ""
		if !oldest[0].SinceExact {
			bound = "at least "
		}
		fmt.Fprintf(t.env.stderr, " (%s), the oldest for %s%s; %d past their limit",
			strings.Join(parts, ", "), bound, report.Duration(oldest[0].Duration), past)
	}
	fmt.Fprintln(t.env.stderr, ".")
	if t.asJSON {
		return
	}
	if t.allStates {
		t.printed(t.live.TransitionHeader())
		return
	}
	t.printed(t.live.Header())
	for i := range overdue {
		t.printed(t.live.Notice(&track.Notice{Kind: track.Overdue, Time: probe.Now(), Conn: overdue[i]}))
	}
	if more := past - len(overdue); more > 0 {
		fmt.Fprintf(t.env.stderr, "… and %d more past their limit: fintrace list\n", more)
	}
}

// finish prints the summary.
func (t *tracing) finish(began events.Time) {
	now := probe.Now()
	remaining := 0
	t.watch.tracker.All(now, func(c *track.Conn) {
		if t.selected(c) {
			remaining++
			t.summary.AddConn(c)
		}
	})
	counters := t.watch.tracker.Counters()
	totals := report.Totals{
		Traced:     now.Sub(began),
		Remaining:  remaining,
		Instants:   t.watch.counters.Instants,
		Unfollowed: t.watch.unfollowed,
		Lost:       t.watch.counters.Lost,
		Missed:     t.watch.counters.Missed,
		Corrected:  counters.Corrected,
		Shed:       counters.Shed,
	}
	if t.asJSON {
		t.printed(t.out.Encode(t.summary.Record(t.names.Wall(now), totals)))
		return
	}
	t.printed(t.summary.Print(t.env.stdout, totals, t.env.style()))
}

// transition prints a state change. FIN_WAIT2 → CLOSE is not one where the
// kernel hands the connection to a minisock: it is in FIN_WAIT2 as before.
func (t *tracing) transition(ev *events.Event) {
	before, known := t.states[ev.Cookie]
	spent := time.Duration(-1)
	if known && before.state == ev.Old {
		spent = ev.Time.Sub(before.since)
	}
	to := ev.New.String()
	if ev.New != events.Close {
		if len(t.states) >= statesKept {
			clear(t.states) // Their times become unknown, which is printed as such.
		}
		if ev.New != ev.Old {
			t.states[ev.Cookie] = was{ev.New, ev.Time}
		}
	} else {
		delete(t.states, ev.Cookie)
		if _, there := t.watch.tracker.Get(ev.Cookie, ev.Time); there {
			to = minisockState
		}
	}
	t.state(ev.Time, ev.Cookie, ev.Netns, ev.Flow, ev.Old.String(), to, spent, ev.Process)
}

const minisockState = "FIN_WAIT2(minisock)"

// minisockEnd prints the transition that no event shows.
func (t *tracing) minisockEnd(n *track.Notice) {
	c := &n.Conn
	if n.Kind != track.Closed || c.Stage != events.Minisock {
		return
	}
	to := events.Close
	if c.End == events.PeerFIN {
		to = events.TimeWait
	}
	t.state(n.Time, c.Cookie, c.Netns, c.Flow, minisockState, to.String(), c.Duration, c.Process)
}

func (t *tracing) state(at events.Time, cookie uint64, netns uint32, flow events.Flow, from, to string, spent time.Duration, p events.Process) {
	as := track.Conn{Netns: netns, Flow: flow, Process: p, Duration: max(spent, 0), Side: t.filter.Side, Stage: t.filter.Stage}
	if !t.filter.Selects(&as) {
		return
	}
	if !t.asJSON {
		t.printed(t.live.Transition(at, flow, from, to, spent, p))
		return
	}
	t.printed(t.out.Encode(report.NewTransition(at, cookie, netns, flow, from, to, spent, p, t.names)))
}
