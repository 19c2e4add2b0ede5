// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

func diagnoseCommand(e env) *cobra.Command {
	d := &diagnosing{env: e}
	cmd := &cobra.Command{
		Use:   "diagnose",
		Short: "Look and watch for some seconds, and say what is wrong and what to do",
		Long: `diagnose looks at every connection in FIN_WAIT2, at HAProxy, its configuration
and the kernel's settings, watches for --duration, and says in two lines what is
wrong; then why, how it knows, and what to type. Ctrl-C ends the watching, and
the report comes with what has been seen.

Exit codes are those of a monitoring plugin: 0 fine, 1 warning, 2 critical,
3 could not look.`,
	}
	pluginExits(cmd)
	durationFlag(cmd, &d.duration, "duration", 10*time.Second, "how long to watch; 0 only looks")
	d.haproxies = haproxyFlags(cmd)
	cmd.Flags().Var(&parsed{kind: "name|inode|path", parse: func(s string) error {
		inode, err := parseNetns(s)
		d.haproxies.netns = append(d.haproxies.netns, inode)
		return err
	}}, "netns", "only this network namespace (repeatable)")
	cmd.Flags().BoolVar(&d.anonymize, "anonymize", false, "replace addresses, each always by the same, to show the report to others")
	d.output = "text"
	cmd.Flags().VarP(&parsed{kind: "text|json|nagios", parse: func(s string) error {
		if !slices.Contains([]string{"text", "json", "nagios"}, s) {
			return fmt.Errorf("the output is text, json or nagios, not %q", s)
		}
		d.output = s
		return nil
	}}, "output", "o", "print text, a JSON document, or one line with figures for a monitoring system")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		diagnosis, err := d.run(cmd.Context())
		if err != nil {
			return &exitError{report.ExitUnknown, err}
		}
		if err := d.print(diagnosis); err != nil {
			return &exitError{report.ExitUnknown, err}
		}
		if code := diagnosis.Exit(); code != report.ExitFine {
			return &exitError{code: code}
		}
		return nil
	}
	return cmd
}

// diagnosing is one run of diagnose.
type diagnosing struct {
	env       env
	duration  time.Duration
	haproxies *haproxies
	anonymize bool
	output    string

	watch    *watch
	evidence report.Evidence
	passing  int // arrivals and departures that were not kept
}

// keptAtMost bounds the arrivals, and the departures, that are kept.
const keptAtMost = 200_000

func (d *diagnosing) run(ctx context.Context) (diagnosis report.Diagnosis, err error) {
	p, err := openOrBare(d.unlooked)
	if err != nil {
		return diagnosis, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	d.evidence.Sampled = p.Bare()
	d.watch = &watch{
		probe:     p,
		tracker:   track.New(limits.Rules{}, track.DefaultCapacity, hugePages()),
		haproxies: d.haproxies,
		notify:    func(*track.Notice) {},
		warn:      d.unlooked,
	}
	ctx, cancel := context.WithTimeout(ctx, d.duration)
	defer cancel()
	names := names()
	d.evidence.Wall, d.evidence.Netns = names.Wall, names.Netns
	d.evidence.Began = probe.Now()
	if err := d.watch.start(context.WithoutCancel(ctx)); err != nil {
		return diagnosis, err
	}
	d.watch.catchUp()
	before := d.statistics()
	d.watch.notify = d.notice
	stop := d.progress(ctx)
	err = d.watch.run(ctx)
	stop()
	if err != nil {
		return diagnosis, err
	}
	d.collect(context.WithoutCancel(ctx), before)
	if d.anonymize {
		d.evidence = report.Anonymize(d.evidence)
	}
	return report.Diagnose(d.evidence), nil
}

func (d *diagnosing) print(diagnosis report.Diagnosis) error {
	switch d.output {
	case "json":
		return json.NewEncoder(report.JSONWriter(d.env.stdout)).Encode(diagnosis)
	case "nagios":
		_, err := fmt.Fprintln(d.env.stdout, report.Nagios(diagnosis))
		return err
	}
	return report.PrintDiagnosis(d.env.stdout, diagnosis, d.env.style())
}

// unlooked notes what could not be looked at.
func (d *diagnosing) unlooked(err error) {
	if line := err.Error(); !slices.Contains(d.evidence.Unlooked, line) {
		d.evidence.Unlooked = append(d.evidence.Unlooked, line)
	}
}

func (d *diagnosing) selected(netns uint32) bool {
	return len(d.haproxies.netns) == 0 || slices.Contains(d.haproxies.netns, netns)
}

func (d *diagnosing) notice(n *track.Notice) {
	e := &d.evidence
	switch {
	case !d.selected(n.Conn.Netns):
	case n.Kind == track.Opened && len(e.Arrivals) < keptAtMost:
		e.Arrivals = append(e.Arrivals, report.Arrival{At: n.Conn.Since, Conn: n.Conn})
	case n.Kind == track.Closed && len(e.Departures) < keptAtMost:
		e.Departures = append(e.Departures, n.Conn)
	case n.Kind == track.Opened || n.Kind == track.Closed:
		d.passing++
	}
}

// collect takes what is there at the end of the watch.
func (d *diagnosing) collect(ctx context.Context, before map[uint32]map[string]int64) {
	e := &d.evidence
	now := probe.Now()
	e.Ended = now
	d.watch.tracker.All(now, func(c *track.Conn) {
		if d.selected(c.Netns) {
			e.Conns = append(e.Conns, *c)
		}
	})
	report.SortOldest(e.Conns)
	if len(d.haproxies.netns) == 0 && !e.Sampled {
		e.Instants = &d.watch.counters.Instants
	}
	e.Lost = d.watch.counters.Lost + d.watch.counters.Missed
	if d.passing > 0 {
		d.unlooked(fmt.Errorf("%d entries and ends more than the %d that are kept of each", d.passing, keptAtMost))
	}
	// How many slots are taken is to be as of now, like the connections.
	d.haproxies.look(ctx)
	for _, p := range d.haproxies.found.Processes {
		if d.selected(p.Netns) {
			e.HAProxy = append(e.HAProxy, p)
		}
	}
	var err error
	if e.OwnNetns, err = probe.OwnNetns(); err != nil {
		d.unlooked(err)
	}
	after := d.statistics()
	var lookup probe.Lookup
	defer lookup.Close()
	var closing []events.Socket
	e.Settings = map[uint32]events.Sysctls{}
	e.States = map[events.State]int{}
	for netns, counts := range after {
		if e.Settings[netns], err = lookup.Sysctls(netns); err != nil {
			d.unlooked(err)
		}
		d.tables(netns, before[netns], counts)
		sockets, err := lookup.CloseWait(netns)
		if err != nil {
			d.unlooked(err)
		}
		closing = append(closing, sockets...)
		e.States[events.Established] += int(counts["Tcp CurrEstab"])
		e.States[events.TimeWait] += int(counts["TCP tw"])
	}
	d.closeWait(closing)
	for i := range e.Conns {
		if e.Conns[i].Stage == events.Minisock {
			e.States[events.TimeWait]-- // where the kernel counts it
		}
	}
	e.States[events.TimeWait] = max(e.States[events.TimeWait], 0)
	e.States[events.FinWait2] = len(e.Conns)
	e.States[events.CloseWait] = len(e.CloseWait)
	e.States[events.Established] = max(e.States[events.Established]-len(e.CloseWait), 0) // CurrEstab counts both
	slices.SortFunc(e.Tables, func(a, b report.Table) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Netns, b.Netns))
	})
}

// statistics are those of the namespaces that are looked at.
func (d *diagnosing) statistics() map[uint32]map[string]int64 {
	var lookup probe.Lookup
	defer lookup.Close()
	all := map[uint32]map[string]int64{}
	for netns := range d.watch.covered {
		if !d.selected(netns) {
			continue
		}
		counts, err := lookup.Statistics(netns)
		if err != nil {
			d.unlooked(err)
			continue
		}
		all[netns] = counts
	}
	return all
}

// overflows are the counters of what did not fit.
var overflows = []string{"TCPTimeWaitOverflow", "TCPAbortOnMemory", "ListenOverflows", "ListenDrops"}

func (d *diagnosing) tables(netns uint32, before, after map[string]int64) {
	e := &d.evidence
	settings := e.Settings[netns]
	if limit, known := settings[events.SysctlMaxTWBuckets]; known {
		e.Tables = append(e.Tables, report.Table{Name: "timewait", Netns: netns, Count: int(after["TCP tw"]), Max: limit})
	}
	if limit, known := settings[events.SysctlMaxOrphans]; known && !slices.ContainsFunc(e.Tables, func(t report.Table) bool { return t.Name == "orphans" }) {
		e.Tables = append(e.Tables, report.Table{Name: "orphans", Count: int(after["TCP orphan"]), Max: limit})
	}
	for _, name := range overflows {
		if was, known := before["TcpExt "+name]; known {
			e.Tables = append(e.Tables, report.Table{Name: name, Netns: netns, Count: int(after["TcpExt "+name] - was)})
		}
	}
}

// closeWait adds the sockets in CLOSE_WAIT, each with its holder and its proxy.
func (d *diagnosing) closeWait(sockets []events.Socket) {
	inodes := make([]uint64, len(sockets))
	for i := range sockets {
		inodes[i] = sockets[i].Inode
	}
	owners, hidden := d.watch.probe.Owners(events.CloseWait, inodes)
	if hidden != nil {
		d.unlooked(hidden)
	}
	rules := limits.Rules{HAProxy: d.haproxies.view}
	for i := range sockets {
		s := &sockets[i]
		c := report.CloseWait{Netns: s.Netns, Flow: s.Flow, Side: events.Outbound, Process: owners.Of(s.Inode)}
		if d.watch.tracker.Listening(s.Netns, s.Flow.Local.Port) {
			c.Side = events.Inbound
		}
		if place := rules.Place(s.Netns, s.Flow, c.Side, c.Process.PID); place != 0 {
			c.Place = d.haproxies.view.Place(place)
		}
		d.evidence.CloseWait = append(d.evidence.CloseWait, c)
	}
}

// progress says on a terminal how long it still takes. The function that it
// returns ends that.
func (d *diagnosing) progress(ctx context.Context) (stop func()) {
	f, ok := d.env.stderr.(*os.File)
	deadline, limited := ctx.Deadline()
	if !ok || !limited || !term.IsTerminal(int(f.Fd())) {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			fmt.Fprintf(f, "\r\x1b[KLooking for %s more; Ctrl-C for the report now ", time.Until(deadline).Round(time.Second))
			select {
			case <-ctx.Done():
				fmt.Fprint(f, "\r\x1b[K")
				return
			case <-tick.C:
			}
		}
	}()
	return func() { cancel(); <-ended }
}
