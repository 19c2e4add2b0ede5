// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// Figures are what a diagnosis shows of its evidence.
type Figures struct {
	names        Names
	began, ended events.Time
	states       map[events.State]int
	total        int
	stages       [events.Minisock + 1]int
	past         int // held past their limit
	oldest       []track.Conn
	groups       []grouping
	ages         [len(ageBounds)]ageCount
	slots        []slots
	entered      int
	left         int
	ends         map[events.End]int
	instants     *uint64
	closeWait    int
	tables       []Table
	sampled      bool
	lost         uint64
	unlooked     []string
}

// grouping is the connections by one thing that they have in common.
type grouping struct {
	by     string
	groups []Group
	others Group // those that are not shown, together
	more   int   // how many groups that is
}

// ageCount is how many are of an age.
type ageCount struct{ held, closed int }

// ageBounds are where the ranges of the histogram end.
var ageBounds = [...]time.Duration{time.Second, 5 * time.Second, 15 * time.Second, time.Minute, 5 * time.Minute,
	15 * time.Minute, time.Hour, 4 * time.Hour, 24 * time.Hour, math.MaxInt64}

const (
	oldestShown = 5
	groupsShown = 5
	groupsInAll = 20 // in JSON
)

func newFigures(e *Evidence, past int) Figures {
	f := Figures{names: Names{Wall: e.Wall, Netns: e.Netns, Cgroup: func(uint64) string { return "" }}, began: e.Began, ended: e.Ended,
		states: e.States, total: len(e.Conns), past: past, entered: len(e.Arrivals), left: len(e.Departures),
		ends: map[events.End]int{}, instants: e.Instants, closeWait: len(e.CloseWait), tables: e.Tables, sampled: e.Sampled, lost: e.Lost}
	all := make([]*track.Conn, len(e.Conns))
	for i := range e.Conns {
		c := &e.Conns[i]
		all[i] = c
		f.stages[c.Stage]++
		n := &f.ages[ageBucket(c.Duration)]
		if c.Stage == events.Held {
			n.held++
		} else {
			n.closed++
		}
	}
	for i := range e.Departures {
		f.ends[e.Departures[i].End]++
	}
	slices.SortFunc(all, oldestFirst)
	for _, c := range all[:min(oldestShown, len(all))] {
		f.oldest = append(f.oldest, *c)
	}
	side := func(side events.Side) (of []*track.Conn) {
		for _, c := range all {
			if c.Side == side {
				of = append(of, c)
			}
		}
		return of
	}
	type process struct {
		pid  uint32
		comm [16]byte
	}
	f.groups = []grouping{
		groupConns("peer", all, func(c *track.Conn) [16]byte { return c.Flow.Remote.Addr },
			func(c *track.Conn) string { return c.Flow.Remote.IP().String() }),
		groupConns("listener", side(events.Inbound), func(c *track.Conn) events.Endpoint { return c.Flow.Local }, func(c *track.Conn) string {
			return join(" ", c.Flow.Local.String(), belongs(c))
		}),
		groupConns("server", side(events.Outbound), func(c *track.Conn) events.Endpoint { return c.Flow.Remote }, func(c *track.Conn) string {
			return join(" ", c.Flow.Remote.String(), belongs(c))
		}),
		groupConns("process", all, func(c *track.Conn) process { return process{c.Process.PID, c.Process.Comm} }, func(c *track.Conn) string {
			return processName(c.Process)
		}),
	}
	return f
}

// belongs is where in HAProxy a connection does: "www", "app/web1".
func belongs(c *track.Conn) string {
	if c.Place == nil {
		return ""
	}
	if c.Place.Server == "" {
		return Clean(c.Place.Name())
	}
	return Clean(c.Place.Name() + "/" + c.Place.Server)
}

func ageBucket(d time.Duration) int {
	for i, bound := range ageBounds {
		if d < bound {
			return i
		}
	}
	return len(ageBounds) - 1
}

func groupConns[K comparable](by string, conns []*track.Conn, key func(*track.Conn) K, name func(*track.Conn) string) grouping {
	groups := map[K]*Group{}
	for _, c := range conns { // the oldest first
		k := key(c)
		g := groups[k]
		if g == nil {
			g = &Group{Keys: []string{name(c)}, Oldest: c.Duration}
			groups[k] = g
		}
		g.Count++
		g.AtLeast = g.AtLeast || !c.SinceExact // It may be the oldest.
		if pastLimit(c) {
			g.Overdue++
		}
	}
	all := make([]Group, 0, len(groups))
	for _, g := range groups {
		all = append(all, *g)
	}
	slices.SortFunc(all, func(a, b Group) int { return cmp.Or(cmp.Compare(b.Count, a.Count), slices.Compare(a.Keys, b.Keys)) })
	g := grouping{by: by, groups: all}
	if len(all) > groupsInAll {
		g.groups, g.more = all[:groupsInAll], len(all)-groupsInAll
		for _, other := range all[groupsInAll:] {
			g.others.add(other)
		}
	}
	return g
}

func (g *Group) add(other Group) {
	g.Count += other.Count
	g.Overdue += other.Overdue
	g.Oldest = max(g.Oldest, other.Oldest)
	g.AtLeast = g.AtLeast || other.AtLeast
}

// PrintDiagnosis prints it as text.
func PrintDiagnosis(w io.Writer, d Diagnosis, style Style) error {
	var b strings.Builder
	for _, line := range d.Verdict {
		b.WriteString(wrap(Clean(line), style.paper(), "", ""))
	}
	if len(d.Findings) > 0 {
		b.WriteString("\n")
		for i := range d.Findings {
			d.Findings[i].print(&b, style.paper(), style)
		}
		d.Figures.print(&b, Style{Width: style.paper(), Color: style.Color})
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (f *Figures) print(b *strings.Builder, style Style) {
	b.WriteString(style.paint("1", "EVIDENCE") + "\n")
	para := func(text string) { b.WriteString(wrap(text, style.Width, "  ", "  ")) }
	para(fmt.Sprintf("In FIN_WAIT2: %d (%s); held past their limit: %d. In CLOSE_WAIT: %d.", f.total, f.byStage(), f.past, f.closeWait))
	if len(f.states) > 0 {
		var words []string
		for _, s := range slices.Sorted(maps.Keys(f.states)) {
			words = append(words, fmt.Sprintf("%s %d", s, f.states[s]))
		}
		para("Sockets: " + strings.Join(words, ", ") + ".")
	}
	para(f.rates())
	if len(f.tables) > 0 {
		para("Kernel: " + strings.Join(f.fullest(), ", ") + ".")
	}
	if f.total == 0 {
		return
	}
	block := func(text string) {
		b.WriteString("\n")
		for line := range strings.Lines(text) {
			b.WriteString("  " + line)
		}
	}
	inner := Style{Width: style.Width - 2, Color: style.Color}
	rows := make([][]string, len(f.oldest))
	for i := range f.oldest {
		c := &f.oldest[i]
		rows[i] = []string{age(c), c.Stage.String(), c.Flow.Local.String(), c.Flow.Remote.String(), processName(c.Process)}
	}
	block(strings.Join(table([]column{{title: "OLDEST", right: true}, {title: "STAGE", drop: 1}, {title: "LOCAL"}, {title: "PEER"},
		{title: "PROCESS", drop: 2}}, rows, inner.Width), "\n") + "\n")
	for _, g := range f.groups {
		if len(g.groups) > 0 {
			block(strings.Join(g.lines(inner.Width), "\n") + "\n")
		}
	}
	block(f.histogram())
}

// fullest are the tables in words, of each kind the one that is the fullest, and
// the counters that have moved.
func (f *Figures) fullest() (words []string) {
	fullest := map[string]Table{}
	for _, t := range f.tables {
		switch before, known := fullest[t.Name]; {
		case t.Max == 0 && t.Count != 0:
			words = append(words, fmt.Sprintf("%s %+d", t.Name, t.Count))
		case t.Max > 0 && (!known || float64(t.Count)/float64(t.Max) > float64(before.Count)/float64(before.Max)):
			fullest[t.Name] = t
		}
	}
	for _, name := range slices.Sorted(maps.Keys(fullest)) {
		t := fullest[name]
		words = append(words, fmt.Sprintf("%s %d of %d", t.Name, t.Count, t.Max))
	}
	if len(words) == 0 {
		words = append(words, "no counter of what did not fit has moved")
	}
	return words
}

func (f *Figures) byStage() string {
	var words []string
	for s := events.Held; s <= events.Minisock; s++ {
		words = append(words, fmt.Sprintf("%s %d", s, f.stages[s]))
	}
	return strings.Join(words, ", ")
}

func (f *Figures) watched() time.Duration { return f.ended.Sub(f.began) }

func (f *Figures) rates() string {
	if f.watched() <= 0 {
		return "Not watched: how fast they come and go is not known."
	}
	if f.sampled {
		return fmt.Sprintf("Looked at the sockets for %s, without BPF: at least %d came, and %d left; how many more in between is not known.",
			Duration(f.watched()), f.entered, f.left)
	}
	perSecond := func(n int) string { return fmt.Sprintf("%.2g/s", float64(n)/f.watched().Seconds()) }
	text := fmt.Sprintf("Watched for %s: %d came (%s), %d left (%s", Duration(f.watched()), f.entered, perSecond(f.entered), f.left, perSecond(f.left))
	for _, e := range events.Ends() {
		if f.ends[e] > 0 {
			text += fmt.Sprintf(", %s %d", e, f.ends[e])
		}
	}
	if f.instants == nil {
		return text + ")."
	}
	return text + fmt.Sprintf("); %d more came and left at once, as a healthy close does.", *f.instants)
}

func (g *grouping) lines(width int) []string {
	shown, others, more := g.groups, g.others, g.more
	if len(shown) > groupsShown {
		for _, other := range shown[groupsShown:] {
			others.add(other)
		}
		more += len(shown) - groupsShown
		shown = shown[:groupsShown]
	}
	columns := []column{{title: strings.ToUpper(g.by), width: 34}, {title: "COUNT", right: true, width: 7}, {title: "PAST LIMIT", right: true}, {title: "OLDEST", right: true, width: 8}}
	row := func(name string, group Group) []string {
		oldest := Duration(group.Oldest)
		if group.AtLeast {
			oldest = "≥" + atLeast(group.Oldest)
		}
		return []string{name, fmt.Sprint(group.Count), fmt.Sprint(group.Overdue), oldest}
	}
	var rows [][]string
	for _, group := range shown {
		rows = append(rows, row(group.Keys[0], group))
	}
	if more > 0 {
		rows = append(rows, row(fmt.Sprintf("and %d more", more), others))
	}
	return table(columns, rows, width)
}

// histogram is of the ages, no wider than 60 columns.
func (f *Figures) histogram() string {
	most, first, last := 0, len(f.ages), 0
	for i, n := range f.ages {
		if sum := n.held + n.closed; sum > 0 {
			most, first, last = max(most, sum), min(first, i), i
		}
	}
	const barWidth = 60 - 2 - 20
	var b strings.Builder
	fmt.Fprintf(&b, "%-11s%7s  # held  . closed\n", "AGE", "COUNT")
	for i := first; i <= last; i++ {
		n := f.ages[i]
		bar := func(n int) int { return (n*barWidth + most - 1) / most }
		held := bar(n.held)
		text := strings.Repeat("#", held) + strings.Repeat(".", max(bar(n.held+n.closed)-held, 0))
		line := fmt.Sprintf("%-11s%7d  %s", ageRange(i), n.held+n.closed, text)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return b.String()
}

func ageRange(i int) string {
	switch i {
	case 0:
		return "under " + span(ageBounds[0])
	case len(ageBounds) - 1:
		return span(ageBounds[i-1]) + " and more"
	}
	return span(ageBounds[i-1]) + " to " + span(ageBounds[i])
}

// Nagios is the line that a monitoring plugin prints, with performance data.
func Nagios(d Diagnosis) string {
	f := &d.Figures
	word := [...]string{ExitFine: "OK", ExitWarning: "WARNING", ExitCritical: "CRITICAL", ExitUnknown: "UNKNOWN"}[d.Exit()]
	oldest := time.Duration(0)
	if len(f.oldest) > 0 {
		oldest = f.oldest[0].Duration
	}
	data := []string{
		fmt.Sprintf("held=%d;;;0", f.stages[events.Held]),
		fmt.Sprintf("held_past_limit=%d;;;0", f.past),
		fmt.Sprintf("orphaned=%d;;;0", f.stages[events.Orphaned]),
		fmt.Sprintf("minisock=%d;;;0", f.stages[events.Minisock]),
		fmt.Sprintf("close_wait=%d;;;0", f.closeWait),
		fmt.Sprintf("oldest=%.0fs;;;0", oldest.Seconds()),
	}
	if !f.sampled {
		data = append(data, fmt.Sprintf("lost=%d;;;0", f.lost))
	}
	if f.watched() > 0 && !f.sampled {
		data = append(data, fmt.Sprintf("entered_per_second=%.3f;;;0", float64(f.entered)/f.watched().Seconds()),
			fmt.Sprintf("left_per_second=%.3f;;;0", float64(f.left)/f.watched().Seconds()))
	}
	for i := range f.slots {
		l := &f.slots[i]
		name := strings.Map(func(r rune) rune { // what the format gives a meaning to
			if strings.ContainsRune("'= ", r) {
				return '_'
			}
			return r
		}, l.what)
		data = append(data, fmt.Sprintf("'slots_%s'=%d;;;0;%d", name, l.held, l.limit))
	}
	verdict := d.Verdict[0]
	if n := len(f.unlooked); n > 0 {
		verdict += " Not looked at: " + f.unlooked[0]
		if n > 1 {
			verdict += fmt.Sprintf("; and %d more", n-1)
		}
	}
	text := fmt.Sprintf("FINTRACE %s - %s | %s", word, strings.ReplaceAll(verdict, "|", "/"), strings.ReplaceAll(strings.Join(data, " "), "|", "/"))
	return Clean(text)
}

// MarshalJSON is the diagnosis as one document. Its names are a contract with
// scripts; what is not known is absent.
func (d Diagnosis) MarshalJSON() ([]byte, error) {
	findings := d.Findings
	if findings == nil {
		findings = []Finding{}
	}
	return json.Marshal(struct {
		Kind     string    `json:"kind"`
		Verdict  []string  `json:"verdict"`
		Exit     int       `json:"exit"`
		Findings []Finding `json:"findings"`
		Evidence *Figures  `json:"evidence"`
	}{"diagnosis", d.Verdict, d.Exit(), findings, &d.Figures})
}

// MarshalJSON is the evidence as an object.
func (f *Figures) MarshalJSON() ([]byte, error) {
	type ageRecord struct {
		From   float64  `json:"from_seconds"`
		To     *float64 `json:"to_seconds,omitempty"`
		Held   int      `json:"held"`
		Closed int      `json:"closed"`
	}
	type groupsRecord struct {
		Groups []map[string]any `json:"groups"`
		Others map[string]any   `json:"others,omitempty"`
	}
	type slotsRecord struct {
		Of    string `json:"of"`
		Held  int    `json:"fin_wait2"`
		Taken *int   `json:"taken,omitempty"`
		Limit int    `json:"limit"`
	}
	type tableRecord struct {
		Name  string `json:"name"`
		Netns uint32 `json:"netns,omitempty"`
		Count *int   `json:"count,omitempty"`
		Max   *int   `json:"max,omitempty"`
		Rise  *int   `json:"rise,omitempty"`
	}
	type rates struct {
		Entered  int            `json:"entered"`
		Left     int            `json:"left"`
		AtLeast  bool           `json:"at_least,omitempty"` // Entered and Left are lower bounds
		Instants *uint64        `json:"instants,omitempty"`
		In       *float64       `json:"entered_per_second,omitempty"`
		Out      *float64       `json:"left_per_second,omitempty"`
		Ends     map[string]int `json:"ends"`
	}
	record := struct {
		Began     time.Time               `json:"began"`
		Ended     time.Time               `json:"ended"`
		Watched   float64                 `json:"watched_seconds"`
		States    map[string]int          `json:"states,omitempty"`
		Total     int                     `json:"fin_wait2"`
		Stages    map[string]int          `json:"stages"`
		Past      int                     `json:"held_past_limit"`
		CloseWait int                     `json:"close_wait"`
		Oldest    []Record                `json:"oldest"`
		Groups    map[string]groupsRecord `json:"groups"`
		Ages      []ageRecord             `json:"ages"`
		Slots     []slotsRecord           `json:"slots"`
		Rates     rates                   `json:"rates"`
		Tables    []tableRecord           `json:"tables"`
		Lost      *uint64                 `json:"lost,omitempty"`
		Unlooked  []string                `json:"not_looked_at"`
	}{
		Began: f.names.Wall(f.began), Ended: f.names.Wall(f.ended), Watched: f.watched().Seconds(),
		Total: f.total, Stages: map[string]int{}, Past: f.past, CloseWait: f.closeWait, Oldest: []Record{},
		Groups: map[string]groupsRecord{}, Ages: []ageRecord{}, Slots: []slotsRecord{}, Tables: []tableRecord{},
		Rates:    rates{Entered: f.entered, Left: f.left, AtLeast: f.sampled, Instants: f.instants, Ends: map[string]int{}},
		Unlooked: append([]string{}, f.unlooked...),
	}
	if !f.sampled {
		record.Lost = &f.lost
	}
	if f.states != nil {
		record.States = map[string]int{}
		for s, n := range f.states {
			record.States[s.String()] = n
		}
	}
	for s := events.Held; s <= events.Minisock; s++ {
		record.Stages[s.String()] = f.stages[s]
	}
	for i := range f.oldest {
		record.Oldest = append(record.Oldest, NewRecord("", f.ended, &f.oldest[i], &f.names))
	}
	for _, g := range f.groups {
		groups := groupsRecord{Groups: []map[string]any{}}
		one := func(group Group) map[string]any {
			return map[string]any{"count": group.Count, "past_limit": group.Overdue,
				"oldest_seconds": group.Oldest.Seconds(), "oldest_exact": !group.AtLeast}
		}
		for _, group := range g.groups {
			r := one(group)
			r[g.by] = group.Keys[0]
			groups.Groups = append(groups.Groups, r)
		}
		if g.more > 0 {
			groups.Others = one(g.others)
			groups.Others["groups"] = g.more
		}
		record.Groups[g.by] = groups
	}
	from := 0.0
	for i, n := range f.ages {
		age := ageRecord{From: from, Held: n.held, Closed: n.closed}
		if i < len(ageBounds)-1 {
			to := ageBounds[i].Seconds()
			age.To, from = &to, to
		}
		record.Ages = append(record.Ages, age)
	}
	for _, l := range f.slots {
		s := slotsRecord{Of: l.what, Held: l.held, Limit: l.limit}
		if l.known {
			s.Taken = &l.taken
		}
		record.Slots = append(record.Slots, s)
	}
	if seconds := f.watched().Seconds(); seconds > 0 && !f.sampled {
		in, out := float64(f.entered)/seconds, float64(f.left)/seconds
		record.Rates.In, record.Rates.Out = &in, &out
	}
	for e, n := range f.ends {
		record.Rates.Ends[e.String()] = n
	}
	for _, t := range f.tables {
		r := tableRecord{Name: t.Name, Netns: t.Netns}
		if t.Max > 0 {
			r.Count, r.Max = &t.Count, &t.Max
		} else {
			r.Rise = &t.Count
		}
		record.Tables = append(record.Tables, r)
	}
	return json.Marshal(record)
}
