// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// SortOldest puts the oldest first.
func SortOldest(conns []track.Conn) {
	// They are large: each is moved once, to its place.
	order := make([]int, len(conns))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return oldestFirst(&conns[a], &conns[b]) })
	for i := range order {
		first, to := conns[i], i
		for order[to] != i {
			from := order[to]
			conns[to], order[to] = conns[from], to
			to = from
		}
		conns[to], order[to] = first, to
	}
}

// A Listing is connections as a table. Each column is as wide as its widest cell: all
// are Added, in any order, before they are printed. Between the two it keeps none.
type Listing struct {
	style     Style
	columns   []column
	widths    []int
	placed    bool // one is of a proxy
	limits    map[limits.Limit]string
	processes map[events.Process]string
	text      []byte // the cells of a row
	ends      []int  // where each ends
}

// NewListing is an empty one.
func NewListing(style Style) *Listing {
	l := &Listing{
		style: style,
		columns: []column{
			{title: "AGE", right: true},
			{title: "STAGE", drop: 2},
			{title: "LOCAL"},
			{title: "PEER"},
			{title: "SIDE", drop: 6},
			{title: "PROCESS", drop: 4},
			{title: "PROXY", drop: 3},
			{title: "LIMIT", most: 33, drop: 1},
		},
		limits: map[limits.Limit]string{}, processes: map[events.Process]string{}, // few, of very many
	}
	l.widths = make([]int, len(l.columns))
	return l
}

// Add makes room for a connection.
func (l *Listing) Add(c *track.Conn) {
	l.placed = l.placed || c.Place != nil
	l.row(c)
	from := 0
	for i, end := range l.ends {
		l.widths[i] = max(l.widths[i], utf8.RuneCount(l.text[from:end]))
		from = end
	}
}

// row makes the cells of a connection.
func (l *Listing) row(c *track.Conn) {
	l.text, l.ends = l.text[:0], l.ends[:0]
	cell := func(text []byte) { l.text, l.ends = text, append(l.ends, len(text)) }
	cell(appendAge(l.text, c))
	cell(append(l.text, c.Stage.String()...))
	cell(c.Flow.Local.AppendTo(l.text))
	cell(c.Flow.Remote.AppendTo(l.text))
	cell(append(l.text, c.Side.String()...))
	cell(append(l.text, remember(l.processes, c.Process, func() string { return processName(c.Process) })...))
	cell(append(l.text, proxyName(c)...))
	if c.Overdue {
		l.text = append(l.text, "PAST "...)
	}
	cell(append(l.text, remember(l.limits, c.Limit, func() string { return Clean(c.Limit.String()) })...))
}

// Print prints what has been Added.
func (l *Listing) Print(w io.Writer, conns iter.Seq[*track.Conn]) error {
	columns := slices.Clone(l.columns)
	if !l.placed {
		columns[proxyInList].drop = dropped
	}
	columns = laidOut(columns, l.widths, l.style.Width)
	out := bufio.NewWriter(w)
	// An error stays until Flush.
	fmt.Fprintln(out, l.style.paint("1", line(columns, titles(columns))))
	cells := make([]string, len(columns))
	for c := range conns {
		l.row(c)
		text, from := string(l.text), 0
		for i, end := range l.ends {
			cells[i], from = text[from:end], end
		}
		row := l.style.shorten(line(columns, cells), cells[len(cells)-1])
		if c.Overdue {
			row = l.style.paint("31", row)
		}
		fmt.Fprintln(out, row)
	}
	return out.Flush()
}

// remember returns what a key has in texts, which it makes only once.
func remember[K comparable](texts map[K]string, key K, text func() string) string {
	known, ok := texts[key]
	if !ok {
		known = text()
		texts[key] = known
	}
	return known
}

const proxyInList = 6

// proxyName is where in HAProxy a connection belongs: "www", "app/web1",
// and of a worker that a reload has replaced "www (old worker)".
func proxyName(c *track.Conn) string {
	p := c.Place
	if p == nil {
		return "-"
	}
	name := p.Name()
	if p.Server != "" {
		name += "/" + p.Server
	}
	if p.Process.Old {
		name += " (old worker)"
	}
	return Clean(name)
}

// print writes a table's lines: the titles bold, the marked rows red.
func print(w io.Writer, lines []string, style Style, marked func(row int) bool) error {
	out := bufio.NewWriter(w)
	for i, text := range lines {
		switch {
		case i == 0:
			text = style.paint("1", text)
		case marked(i - 1):
			text = style.paint("31", text)
		}
		// An error stays until Flush.
		fmt.Fprintln(out, text)
	}
	return out.Flush()
}

// Group is connections that have something in common.
type Group struct {
	Keys    []string
	Count   int
	Overdue int
	Oldest  time.Duration
	AtLeast bool // Oldest is a lower bound
}

// Keys are what connections can be grouped by.
var Keys = []string{"peer", "port", "process", "proxy", "stage"}

// GroupBy groups connections, the largest group first. Keys must be of Keys.
func GroupBy(conns iter.Seq[*track.Conn], keys []string) []Group {
	groups := map[string]*Group{}
	for c := range conns {
		values := make([]string, len(keys))
		for k, key := range keys {
			values[k] = keyOf(c, key)
		}
		id := strings.Join(values, "\x00")
		g := groups[id]
		if g == nil {
			g = &Group{Keys: values}
			groups[id] = g
		}
		g.Count++
		if c.Overdue {
			g.Overdue++
		}
		g.Oldest = max(g.Oldest, c.Duration)
		g.AtLeast = g.AtLeast || !c.SinceExact // It may be the oldest.
	}
	sorted := make([]Group, 0, len(groups))
	for _, g := range groups {
		sorted = append(sorted, *g)
	}
	slices.SortFunc(sorted, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), slices.Compare(a.Keys, b.Keys))
	})
	return sorted
}

func keyOf(c *track.Conn, key string) string {
	switch key {
	case "peer":
		return c.Flow.Remote.IP().String()
	case "port":
		return serviceOf(c).String()
	case "process":
		return processName(c.Process)
	case "proxy":
		return proxyName(c)
	}
	return c.Stage.String()
}

// Groups prints groups as a table.
func Groups(w io.Writer, keys []string, groups []Group, style Style) error {
	columns := make([]column, 0, len(keys)+3)
	for _, k := range keys {
		columns = append(columns, column{title: strings.ToUpper(k)})
	}
	columns = append(columns, column{title: "COUNT", right: true}, column{title: "OVERDUE", right: true, drop: 2},
		column{title: "OLDEST", right: true, drop: 1})
	rows := make([][]string, len(groups))
	for i, g := range groups {
		oldest := Duration(g.Oldest)
		if g.AtLeast {
			oldest = "≥" + atLeast(g.Oldest)
		}
		rows[i] = append(slices.Clone(g.Keys), fmt.Sprint(g.Count), fmt.Sprint(g.Overdue), oldest)
	}
	return print(w, table(columns, rows, style.Width), style, func(row int) bool { return groups[row].Overdue > 0 })
}

// GroupRecord is a group as JSON: its keys under their names.
func GroupRecord(keys []string, g Group) map[string]any {
	r := map[string]any{"count": g.Count, "overdue": g.Overdue, "oldest_seconds": g.Oldest.Seconds(),
		"oldest_exact": !g.AtLeast}
	for i, k := range keys {
		r[k] = g.Keys[i]
	}
	return r
}
