// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/track"
)

// figures are all that one run has measured.
type figures struct {
	when      time.Time
	kernel    string
	cpu       string
	versions  []string // of the tools
	took      time.Duration
	costs     []kernelCost // the empty program, then fintrace, then others
	users     []userCost   // fintrace first
	rates     []connectionRate
	losses    losses
	snapshot  snapshotTimes
	table     tableCost
	latencies latencies
}

// The budgets; ratios where something of today's can be measured beside it.
const (
	kernelBudget   = 2.5                   // × an empty program
	userBudget     = 1.0                   // µs of CPU per connection
	snapshotBudget = 3.0                   // × faster than ss
	memoryBudget   = 250.0                 // bytes per connection
	latencyBudget  = 50 * time.Millisecond // from the limit and its grace to the line
)

// markdown renders the figures, the budgets first.
func (f *figures) markdown() string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\n")
	fmt.Fprintf(&b, "Written by `make bench` on %s in %s.\nLinux %s, %s. Beside it: %s.\n\n",
		f.when.Format(time.DateOnly), f.took.Round(time.Second), f.kernel, f.cpu, strings.Join(f.versions, ", "))
	b.WriteString("One run; all tools see the same load, in turns, and each figure is the median of its rounds.\n" +
		"Compare the ratios: the absolute times are this machine's.\n\n")
	writeTable(&b, f.budgets())
	b.WriteString("\n## Kernel time per state transition\n\n")
	fmt.Fprintf(&b, "Time in BPF programs (`bpf_stats`), over all transitions of %d connections of each load, %d rounds.\n"+
		"Healthy: the peer's FIN comes with its ACK. Waiting: the peer closes %s later, and each connection is a FIN_WAIT2\n"+
		"minisock meanwhile. Mixed: both, the budget's load. What the tracepoint itself costs is not in it: nearly nothing for\n"+
		"fintrace's and the empty program, which read the kernel's own arguments, and a copied record for the others.\n\n",
		kernelConnections, kernelRounds, peerDelay)
	writeTable(&b, f.kernelTable())
	b.WriteString("\n## User space\n\n")
	fmt.Fprintf(&b, "CPU time of the tool's process per connection at %d connections/s, both ends traced, output to /dev/null; %d rounds.\n\n",
		userspaceRate, userspaceRounds)
	writeTable(&b, f.userTable())
	b.WriteString("\n## Connections per second\n\n")
	fmt.Fprintf(&b, "As many connections as the CPUs make, mixed load, %d rounds of %s.\n\n", rateRounds, rateTime)
	writeTable(&b, f.rateTable())
	b.WriteString("\n## Snapshot\n\n")
	fmt.Fprintf(&b, "%d connections in FIN_WAIT2, half held and half minisocks, beside their %d peers in CLOSE_WAIT; %d rounds.\n\n",
		snapshotSockets, snapshotSockets, snapshotRounds)
	writeTable(&b, f.snapshotTable())
	b.WriteString("\n## Table and notices\n\n")
	fmt.Fprintf(&b, "With %d connections tracked, an event costs %.0f ns and %.3f allocations. A connection is overdue at its limit\n"+
		"and %s grace; its line was read %s later in the median, p99 %s, at most %s (%d connections).\n",
		memoryConnections, f.table.NanosPerApply, f.table.AllocsPerApply,
		track.Grace, short(f.latencies.P50), short(f.latencies.P99), short(f.latencies.Max), latencyConnections)
	return b.String()
}

func (f *figures) budgets() [][]string {
	empty, ours := f.costs[0], f.costs[1]
	user := f.users[0]
	lost := f.losses.lost + f.losses.missed
	walk := ratio(float64(f.snapshot.SS), float64(f.snapshot.Walk))
	rows := [][]string{{"what", "budget", "fintrace", "met", "today's tools"}}
	add := func(what, budget string, err error, figure string, met bool, others ...string) {
		verdict := "**no**"
		switch {
		case err != nil:
			figure, verdict = err.Error(), "?"
		case met:
			verdict = "yes"
		}
		rows = append(rows, []string{what, budget, figure, verdict, strings.Join(others, "; ")})
	}
	var kernelOthers, userOthers, rateOthers []string
	for _, c := range f.costs[2:] {
		kernelOthers = append(kernelOthers, c.name+" "+orError(c.err, "%.1f × (%.0f ns)", ratio(c.both, empty.both), c.both))
	}
	for _, c := range f.users[1:] {
		userOthers = append(userOthers, c.name+" "+orError(c.err, "%.0f × fintrace (%.1f µs)", ratio(c.both, user.both), c.both))
	}
	for _, r := range f.rates[2:] {
		rateOthers = append(rateOthers, r.name+" "+orError(r.err, "%.1f %%", f.slower(r)))
	}
	add("kernel cost per state transition, all of the mixed load averaged",
		fmt.Sprintf("≤ %.1f × an empty program", kernelBudget), cmp.Or(empty.err, ours.err),
		fmt.Sprintf("%.2f × (%.0f ns)", ratio(ours.both, empty.both), ours.both),
		ours.both <= kernelBudget*empty.both, kernelOthers...)
	add(fmt.Sprintf("userspace CPU per connection at %d/s, both ends traced", userspaceRate),
		fmt.Sprintf("≤ %.0f µs", userBudget), user.err,
		fmt.Sprintf("%.2f µs", user.both), user.both <= userBudget, userOthers...)
	add("connections per second that it costs the host", "", f.rates[1].err,
		fmt.Sprintf("%.1f %%", f.slower(f.rates[1])), true, rateOthers...)
	rows[len(rows)-1][3] = ""
	add("records lost at the highest connection rate", "0", f.rates[1].err,
		fmt.Sprintf("%d for want of buffer, %d events skipped by the kernel, of %d connections at %.0f/s",
			f.losses.lost, f.losses.missed, f.losses.connections, f.rates[1].perSecond), lost == 0)
	ss := asError(f.snapshot.SSError)
	add(fmt.Sprintf("snapshot of %d FIN_WAIT2 sockets", snapshotSockets),
		fmt.Sprintf("≥ %.0f × faster than `ss`", snapshotBudget), nil,
		orError(ss, "%.1f × (%s)", walk, short(f.snapshot.Walk)), walk >= snapshotBudget,
		"ss "+orError(ss, "%s", short(f.snapshot.SS)))
	if ss != nil {
		rows[len(rows)-1][2], rows[len(rows)-1][3] = short(f.snapshot.Walk), "?"
	}
	add(fmt.Sprintf("memory per tracked connection, %d tracked", memoryConnections),
		fmt.Sprintf("≤ %.0f bytes", memoryBudget), nil,
		fmt.Sprintf("%.0f bytes", f.table.BytesPerConnection), f.table.BytesPerConnection <= memoryBudget)
	add("limit and grace passed → notice", "≤ "+short(latencyBudget), nil,
		fmt.Sprintf("%s p99, %s at most", short(f.latencies.P99), short(f.latencies.Max)),
		f.latencies.P99 <= latencyBudget, "exporters: the scrape interval")
	return rows
}

func (f *figures) kernelTable() [][]string {
	rows := [][]string{{"program", "healthy", "waiting", "mixed", "× empty"}}
	for _, c := range f.costs {
		if c.err != nil {
			rows = append(rows, []string{c.name, c.err.Error(), "", "", ""})
			continue
		}
		rows = append(rows, []string{c.name, nanos(c.healthy), nanos(c.waiting), nanos(c.both),
			fmt.Sprintf("%.2f", ratio(c.both, f.costs[0].both))})
	}
	return rows
}

func (f *figures) userTable() [][]string {
	rows := [][]string{{"tool", "healthy", "waiting", "mixed", "peak RSS"}}
	for _, c := range f.users {
		if c.err != nil {
			rows = append(rows, []string{c.name, c.err.Error(), "", "", ""})
			continue
		}
		µs := func(x float64) string { return fmt.Sprintf("%.2f µs", x) }
		rows = append(rows, []string{c.name, µs(c.healthy), µs(c.waiting), µs(c.both),
			fmt.Sprintf("%.1f MiB", c.peakRSS/(1<<20))})
	}
	return rows
}

func (f *figures) rateTable() [][]string {
	rows := [][]string{{"with", "connections/s", "change"}}
	for i, r := range f.rates {
		switch {
		case r.err != nil:
			rows = append(rows, []string{r.name, r.err.Error(), ""})
		case i == 0:
			rows = append(rows, []string{r.name, fmt.Sprintf("%.0f", r.perSecond), ""})
		default:
			rows = append(rows, []string{r.name, fmt.Sprintf("%.0f", r.perSecond), fmt.Sprintf("%+.1f %%", -f.slower(r))})
		}
	}
	return rows
}

func (f *figures) snapshotTable() [][]string {
	s := &f.snapshot
	against := func(d time.Duration) string {
		if s.SSError != "" {
			return ""
		}
		return fmt.Sprintf("%.1f", ratio(float64(s.SS), float64(d)))
	}
	rows := [][]string{
		{"what", "time", "× faster than ss"},
		{"fintrace's walk of all namespaces", short(s.Walk), against(s.Walk)},
		{"`fintrace list -o json`, start to end, with owners and limits", short(s.List), against(s.List)},
	}
	if s.SSError != "" {
		rows = append(rows, []string{"`ss -tan state fin-wait-2`", s.SSError, ""})
	} else {
		rows = append(rows, []string{"`ss -tan state fin-wait-2`", short(s.SS), against(s.SS)})
	}
	return append(rows, []string{"reading /proc/net/tcp, not parsing it", short(s.ProcNetTCP), against(s.ProcNetTCP)})
}

// slower is how many percent of the connections per second a tool costs.
func (f *figures) slower(r connectionRate) float64 {
	return 100 * (1 - ratio(r.perSecond, f.rates[0].perSecond))
}

// writeTable writes rows as a Markdown table that lines up as plain text too.
func writeTable(b *strings.Builder, rows [][]string) {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	line := func(row []string) {
		for i, cell := range row {
			b.WriteString("| " + cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)) + " ")
		}
		b.WriteString("|\n")
	}
	line(rows[0])
	for _, w := range widths {
		b.WriteString("|" + strings.Repeat("-", w+2))
	}
	b.WriteString("|\n")
	for _, row := range rows[1:] {
		line(row)
	}
}

func orError(err error, format string, args ...any) string {
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf(format, args...)
}

func asError(s string) error {
	if s == "" {
		return nil
	}
	return errors.New(s)
}

func nanos(x float64) string { return fmt.Sprintf("%.0f ns", x) }

// short has three digits.
func short(d time.Duration) string {
	if d <= 0 {
		return d.String()
	}
	unit := time.Duration(math.Pow(10, math.Floor(math.Log10(float64(d)))-2))
	return d.Round(max(unit, 1)).String()
}

func ratio(a, b float64) float64 { return a / b }

func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile interpolates between the two nearest; 0.5 is the median, 1 the largest.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (at-float64(below))*(sorted[above]-sorted[below])
}
