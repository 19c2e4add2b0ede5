// SPDX-License-Identifier: Apache-2.0

package web

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/report"
)

const (
	refreshSeconds = 10
	// What the page has of each; it says how many more there are.
	alertsShown, groupsShown, connectionsShown = 20, 50, 50
	// adviceOpen is how many pieces of advice are unfolded: more push the tables
	// out of sight.
	adviceOpen = 3
)

//go:embed page.css
var style string

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"style": func() template.CSS { return template.CSS(style) },
	"spans": spans,
	"ends":  ends,
}).Parse(pageText))

// contentPolicy allows the page's own style sheet, and nothing else at all.
var contentPolicy = func() string {
	sum := sha256.Sum256([]byte(style))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// page is what the template shows. All text of it is clean.
type page struct {
	Title   string
	Refresh int    // seconds; 0 never
	Problem string // why there is nothing but this
	Notice  string // what is not as it should be with the daemon itself

	Bad      bool // something is past its limit, or an alert fires
	Partial  bool // not all is known
	Headline string
	Details  string
	Figures  []figure

	Alerts          []alertView
	MoreAlerts      int
	Groups          []groupView
	MoreGroups      int
	Connections     []connectionView
	MoreConnections int
	Unlooked        []string

	Host, Version string
	At            moment
	Started       moment
	Uptime        string
	Lost          uint64
}

type figure struct {
	Name, Value string
	Bad         bool
}

// moment is a time as it is shown, and as machines read it.
type moment struct{ Text, Machine string }

func at(t time.Time, layout string) moment {
	return moment{t.Format(layout), t.UTC().Format(time.RFC3339)}
}

type alertView struct {
	Summary  string
	Labels   []string
	Since    moment
	For      string
	Count    int
	Peak     int
	Maxconn  int // 0 unknown
	Oldest   string
	Limit    string
	Source   string
	Advice   []adviceView
	Examples []connectionView
}

type adviceView struct {
	ID       string // of its place in the page
	Above    bool   // it has been shown before
	Open     bool
	Severity string
	Title    string
	Where    []string
	Why      string
	Fix      []fixView
	Verify   string
}

type fixView struct {
	Do    string
	Lines string // to paste
}

type groupView struct {
	Name, Service            string
	Held, Orphaned, Minisock int
	Overdue                  int
	Oldest                   string
}

type connectionView struct {
	Age, Stage  string
	Peer, Local string
	Side        string
	Process     string
	Proxy       string
	Limit       string
	Source      string
	Netns       string
	Old         bool // its worker
}

func (h *handler) page(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	refresh := refreshSeconds
	switch query := r.URL.RawQuery; query {
	case "":
	case "refresh=0":
		refresh = 0
	default:
		refuse(w, r, &refusal{http.StatusBadRequest, "the page takes refresh=0, and nothing else"})
		return
	}
	code := http.StatusOK
	p, err := h.look(ctx)
	if err != nil {
		var why string
		code, why = explain(err)
		p = page{Title: "fintrace: no answer", Problem: why}
	}
	p.Refresh = refresh
	// As a whole, so that a fault in the template is no half of a page.
	var text strings.Builder
	if err := pageTemplate.Execute(&text, p); err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	// What fails now is the connection.
	_, _ = w.Write([]byte(text.String()))
}

// look asks for what the page shows.
func (h *handler) look(ctx context.Context) (page, error) {
	status, err := h.Status(ctx)
	if err != nil {
		return page{}, err
	}
	alerts, err := h.Alerts(ctx)
	if err != nil {
		return page{}, err
	}
	overdue, err := h.Connections(ctx, Query{Overdue: true, Limit: connectionsShown})
	if err != nil {
		return page{}, err
	}
	alerts = slices.DeleteFunc(slices.Clone(alerts), func(a alert.Alert) bool { return !a.Firing() })
	return newPage(&status, alerts, &overdue, h.Ready()), nil
}

// newPage is the page of a moment. Alerts are those that fire, notReady what the
// daemon is not ready for, nil if it is.
func newPage(s *Status, alerts []alert.Alert, overdue *Connections, notReady error) page {
	p := page{
		Host:    report.Clean(s.Host),
		Version: report.Clean(s.Version),
		At:      at(s.At, "2006-01-02 15:04:05 MST"),
		Started: at(s.Started, "2006-01-02 15:04:05 MST"),
		Uptime:  report.Duration(max(s.At.Sub(s.Started), 0)),
		Lost:    s.Lost,
		Bad:     s.Overdue > 0 || len(alerts) > 0,
		Partial: notReady != nil || len(s.Unlooked) > 0,
	}
	if notReady != nil {
		p.Notice = report.Clean(notReady.Error())
	}
	for _, line := range s.Unlooked {
		p.Unlooked = append(p.Unlooked, report.Clean(line))
	}
	p.judge(s, len(alerts))
	p.addAlerts(s.At, alerts)

	groups := slices.Clone(s.Groups)
	slices.SortStableFunc(groups, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Overdue, a.Overdue), cmp.Compare(b.total(), a.total()),
			cmp.Compare(b.Oldest.Duration, a.Oldest.Duration), cmp.Compare(a.Proxy, b.Proxy),
			cmp.Compare(a.Side, b.Side), cmp.Compare(a.Port, b.Port))
	})
	p.MoreGroups = max(len(groups)-groupsShown, 0)
	for i := range groups[:len(groups)-p.MoreGroups] {
		p.Groups = append(p.Groups, viewGroup(&groups[i]))
	}
	shown := overdue.Records[:min(len(overdue.Records), connectionsShown)]
	p.MoreConnections = max(overdue.Total-len(shown), 0)
	p.Connections = viewConnections(shown)
	return p
}

// judge says in a sentence how it is, and then in figures.
func (p *page) judge(s *Status, alerts int) {
	total := s.total()
	switch {
	case s.Overdue == 1:
		p.Headline = "1 connection is past its limit"
	case s.Overdue > 1:
		p.Headline = fmt.Sprintf("%d connections are past their limit", s.Overdue)
	case p.Partial:
		p.Headline = "Nothing that could be looked at is past its limit"
	default:
		p.Headline = "Nothing is past its limit"
	}
	p.Title = p.Headline
	if p.Host != "" {
		p.Title += " · " + p.Host
	}
	p.Headline += "."
	oldest := "–"
	switch {
	case total > 0:
		oldest = s.Oldest.String()
		words := oldest
		if lower, bound := strings.CutPrefix(oldest, "≥"); bound {
			words = lower + " or more"
		}
		p.Details = fmt.Sprintf("%s in FIN_WAIT2, the oldest for %s.", count(total, "connection"), words)
	case p.Partial:
		p.Details = "No connection is known to be in FIN_WAIT2."
	default:
		p.Details = "No connection is in FIN_WAIT2."
	}
	switch {
	case alerts > 0 && s.Overdue == 0:
		p.Details += fmt.Sprintf(" %s not resolved yet.", count(alerts, "alert")+has(alerts))
	case alerts > 0:
		p.Details += fmt.Sprintf(" %s firing.", count(alerts, "alert")+is(alerts))
	}
	p.Figures = []figure{
		{Name: "past limit", Value: fmt.Sprint(s.Overdue), Bad: s.Overdue > 0},
		{Name: "in FIN_WAIT2", Value: fmt.Sprint(total)},
		{Name: "held", Value: fmt.Sprint(s.Held)},
		{Name: "orphaned", Value: fmt.Sprint(s.Orphaned)},
		{Name: "minisock", Value: fmt.Sprint(s.Minisock)},
		{Name: "oldest", Value: oldest},
	}
}

func (p *page) addAlerts(now time.Time, alerts []alert.Alert) {
	p.MoreAlerts = max(len(alerts)-alertsShown, 0)
	shown := map[string]string{} // the advice, by all that it says: its ID
	for i := range alerts[:len(alerts)-p.MoreAlerts] {
		a := &alerts[i]
		v := alertView{
			Summary:  report.Clean(a.Summary),
			Labels:   labels(&a.Labels),
			Since:    at(a.StartsAt, sinceLayout(now, a.StartsAt)),
			For:      report.Duration(max(now.Sub(a.StartsAt), 0)),
			Count:    a.Count,
			Peak:     a.Peak,
			Maxconn:  a.Maxconn,
			Oldest:   oldest(a),
			Limit:    limit(a.LimitSec),
			Source:   report.Clean(a.LimitSource),
			Examples: viewConnections(a.Examples),
		}
		for j := range a.Advice {
			advice := viewAdvice(&a.Advice[j])
			said := fmt.Sprint(advice)
			if id, before := shown[said]; before {
				advice.ID, advice.Above = id, true
			} else {
				advice.Open = len(shown) < adviceOpen
				advice.ID = fmt.Sprintf("advice-%d", len(shown)+1)
				shown[said] = advice.ID
			}
			v.Advice = append(v.Advice, advice)
		}
		p.Alerts = append(p.Alerts, v)
	}
}

// labels are what the connections of an alert have in common, in words.
func labels(l *alert.Labels) []string {
	all := []string{l.Side, l.Stage}
	if l.Port != 0 { // else the proxy says it
		all = append(all, fmt.Sprintf("port %d", l.Port))
	}
	for _, label := range [...][2]string{
		{"proxy", l.Proxy}, {"server", l.Server}, {"peer", l.Peer}, {"process", l.Process}, {"netns", l.Netns},
	} {
		if label[1] != "" {
			all = append(all, label[0]+" "+label[1])
		}
	}
	for i := range all {
		all[i] = report.Clean(all[i])
	}
	return all
}

func viewAdvice(f *report.Finding) adviceView {
	v := adviceView{
		Severity: f.Severity.String(),
		Title:    report.Clean(f.Title),
		Why:      report.Clean(f.Why),
		Verify:   report.Clean(f.Verify),
	}
	for _, place := range f.Where {
		v.Where = append(v.Where, place.String())
	}
	for _, edit := range f.Fix {
		lines := make([]string, len(edit.Lines))
		for i, line := range edit.Lines {
			lines[i] = report.Clean(line)
		}
		v.Fix = append(v.Fix, fixView{Do: report.Clean(edit.String()), Lines: strings.Join(lines, "\n")})
	}
	return v
}

func viewGroup(g *Group) groupView {
	return groupView{
		Name:     report.Clean(g.Proxy),
		Service:  fmt.Sprintf("%s, port %d", g.Side, g.Port),
		Held:     g.Held,
		Orphaned: g.Orphaned,
		Minisock: g.Minisock,
		Overdue:  g.Overdue,
		Oldest:   g.Oldest.String(),
	}
}

func viewConnections(records []report.Record) []connectionView {
	views := make([]connectionView, len(records))
	for i := range records {
		r := &records[i]
		v := connectionView{
			Age:     age(r.Duration, r.SinceExact),
			Stage:   report.Clean(r.Stage),
			Peer:    report.Clean(r.Remote),
			Local:   report.Clean(r.Local),
			Side:    report.Clean(r.Side),
			Process: "?",
			Proxy:   "–",
			Limit:   limit(r.Limit),
			Source:  report.Clean(r.LimitSource),
			Netns:   report.Clean(r.NetnsName),
		}
		if r.PID != 0 {
			v.Process = fmt.Sprintf("%s[%d]", report.Clean(r.Comm), r.PID)
		}
		if at := r.HAProxy; at != nil {
			v.Proxy = at.Proxy
			if at.Proxy == "" {
				v.Proxy = strings.Join(at.Proxies, " or ")
			}
			if at.Server != "" {
				v.Proxy += "/" + at.Server
			}
			v.Proxy, v.Old = report.Clean(v.Proxy), at.Old
		}
		views[i] = v
	}
	return views
}

func (a Age) String() string { return age(a.Duration.Seconds(), !a.AtLeast) }

// oldest is how old the oldest connection of an alert is, or was: of one that goes
// on after a restart, none may have been seen since.
func oldest(a *alert.Alert) string {
	if a.Oldest == 0 {
		return "?"
	}
	return age(a.Oldest, a.OldestExact)
}

// age is a time in FIN_WAIT2: rounded down, and marked, where it is a lower bound.
func age(seconds float64, exact bool) string {
	d := time.Duration(seconds * float64(time.Second))
	if exact {
		return report.Duration(d)
	}
	if d >= time.Second {
		d = d.Truncate(100 * time.Millisecond)
	}
	return "≥" + report.Duration(d)
}

// limit is a limit as settings are written, 60s, and as ages are from ten
// minutes on.
func limit(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d%time.Second == 0 && d < 10*time.Minute {
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return report.Duration(d)
}

// sinceLayout has the day where that is not today.
func sinceLayout(now, then time.Time) string {
	if now.Format(time.DateOnly) == then.Format(time.DateOnly) {
		return time.TimeOnly
	}
	return time.DateTime
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func is(n int) string {
	if n == 1 {
		return " is"
	}
	return " are"
}

func has(n int) string {
	if n == 1 {
		return " has"
	}
	return " have"
}

// span is a part of a text: what stands between backticks is code.
type span struct {
	Code bool
	Text string
}

func spans(text string) []span {
	parts := strings.Split(text, "`")
	if len(parts)%2 == 0 { // one without its fellow
		return []span{{Text: text}}
	}
	var all []span
	for i, part := range parts {
		if part != "" {
			all = append(all, span{Code: i%2 == 1, Text: part})
		}
	}
	return all
}

// ends are an address and its port, between which it may be broken.
func ends(address string) [2]string {
	at := max(strings.LastIndexByte(address, ':'), 0)
	return [2]string{address[:at], address[at:]}
}
