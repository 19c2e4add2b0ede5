// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/haproxy"
)

// Severity is how bad a finding is.
type Severity uint8

// The severities.
const (
	Info     Severity = iota // good to know, and no reason to alarm anybody
	Warning                  // will do harm when something else goes wrong
	Critical                 // does harm, or cannot work as it was meant
)

func (s Severity) String() string { return [...]string{"info", "warning", "critical"}[s] }

// Exit codes are those of a monitoring plugin.
const (
	ExitFine     = 0
	ExitWarning  = 1
	ExitCritical = 2
	ExitUnknown  = 3 // could not look
)

// ExitCode is that of the worst finding. What is only good to know is fine.
func ExitCode(findings []Finding) int {
	code := ExitFine
	for i := range findings {
		switch findings[i].Severity {
		case Warning:
			code = max(code, ExitWarning)
		case Critical:
			code = ExitCritical
		}
	}
	return code
}

// Finding is something wrong, or good to know, with what to do about it.
type Finding struct {
	Severity Severity
	ID       string // stable: scripts know findings by it
	Title    string // one sentence, with the figures
	Where    []Location
	Why      string
	Fix      []Edit
	Verify   string // how to see that it worked
}

// Location is where something was found: a line of a file, or what Text says.
type Location struct {
	Pos  haproxy.Pos
	Text string // what stands there, or who is meant
}

func (p Location) String() string {
	switch {
	case p.Pos.File == "":
		return Clean(p.Text)
	case p.Pos.Line == 0:
		return Clean(join(": ", p.Pos.File, p.Text))
	}
	return Clean(join(": ", p.Pos.String(), p.Text))
}

// Edit is a change to make by hand.
type Edit struct {
	Do    Action
	At    []haproxy.Pos // lines that Do refers to
	Text  string        // where it belongs, or what it takes, if that is no line of a file
	Lines []string      // to paste
}

// Action is what an Edit does at its lines.
type Action uint8

// The actions.
const (
	In      Action = iota // where Text says
	After                 // the lines go after each of At
	Replace               // they take the place of each of At
	Delete                // each of At goes
)

func (a Action) String() string { return [...]string{"in", "after", "replace", "delete"}[a] }

// String says where the lines of an edit go.
func (e Edit) String() string {
	at := make([]string, len(e.At))
	for i, pos := range e.At {
		if at[i] = fmt.Sprintf("%s:%d", pos.File, pos.Line); i > 0 && pos.File == e.At[i-1].File {
			at[i] = fmt.Sprint(pos.Line)
		}
	}
	places := Clean(listed(at))
	switch e.Do {
	case After:
		return join(" ", "after "+places, e.Text)
	case Replace:
		return join(" ", "instead of "+places, e.Text)
	case Delete:
		return join(" ", "delete "+places, e.Text)
	}
	return e.Text
}

// SortFindings puts the worst first, and those that are as bad as each other in
// the order of their lines in the files; what has no line comes after them.
func SortFindings(findings []Finding, files []string) {
	rank := func(f *Finding) (file int, pos haproxy.Pos) {
		for _, place := range f.Where {
			if i := slices.Index(files, place.Pos.File); i >= 0 {
				return i, place.Pos
			}
		}
		return len(files), haproxy.Pos{}
	}
	slices.SortStableFunc(findings, func(a, b Finding) int {
		fileA, posA := rank(&a)
		fileB, posB := rank(&b)
		return cmp.Or(cmp.Compare(b.Severity, a.Severity), cmp.Compare(fileA, fileB),
			cmp.Compare(posA.Line, posB.Line), cmp.Compare(posA.Column, posB.Column))
	})
}

// paper is how wide text may be that is pasted into a mail or a forum.
func (s Style) paper() int {
	if s.Width > 0 {
		return min(s.Width, 80)
	}
	return 80
}

// Findings prints findings as text, an empty line after each.
func Findings(w io.Writer, findings []Finding, style Style) error {
	var b strings.Builder
	for i := range findings {
		findings[i].print(&b, style.paper(), style)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

var severityColours = [...]string{Info: "36", Warning: "33", Critical: "31;1"}

func (f *Finding) print(b *strings.Builder, width int, style Style) {
	label := strings.ToUpper(f.Severity.String())
	// Wrapped as it is, coloured afterwards: escapes have no width.
	title := wrap(label+"  "+Clean(f.Title), width, "", "  ")
	b.WriteString(style.paint(severityColours[f.Severity], label) + strings.TrimPrefix(title, label))
	for _, place := range f.Where {
		b.WriteString(wrap(place.String(), width, "  ", "      "))
	}
	b.WriteString(wrap("Why: "+Clean(f.Why), width, "  ", "  "))
	for _, edit := range f.Fix {
		colon := ":"
		if len(edit.Lines) == 0 {
			colon = "."
		}
		b.WriteString(wrap("Fix: "+edit.String()+colon, width, "  ", "  "))
		for _, line := range edit.Lines { // to be pasted: never wrapped
			b.WriteString("      " + Clean(line) + "\n")
		}
	}
	if f.Verify != "" {
		b.WriteString(wrap("Then: "+Clean(f.Verify), width, "  ", "  "))
	}
	b.WriteString(wrap("("+f.ID+")", width, "  ", "  "))
	b.WriteString("\n")
}

// wrap breaks text at spaces into lines of a width, each ended.
func wrap(text string, width int, first, rest string) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Split(text, " ") {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
			b.WriteString(first + word)
			column = utf8.RuneCountInString(first) + n
		case column+1+n > width:
			b.WriteString("\n" + rest + word)
			column = utf8.RuneCountInString(rest) + n
		default:
			b.WriteString(" " + word)
			column += 1 + n
		}
	}
	return b.String() + "\n"
}

// MarshalJSON is the finding as a record of kind "finding". Its names are a
// contract with scripts; what is not known is absent.
func (f Finding) MarshalJSON() ([]byte, error) {
	type place struct {
		File   string `json:"file,omitempty"`
		Line   int    `json:"line,omitempty"`
		Column int    `json:"column,omitempty"`
		Text   string `json:"text,omitempty"`
	}
	type edit struct {
		Do    string   `json:"do"`
		At    []place  `json:"at,omitempty"`
		Text  string   `json:"text,omitempty"`
		Lines []string `json:"lines,omitempty"`
	}
	record := struct {
		Kind     string  `json:"kind"`
		Severity string  `json:"severity"`
		ID       string  `json:"id"`
		Title    string  `json:"title"`
		Where    []place `json:"where"`
		Why      string  `json:"why"`
		Fix      []edit  `json:"fix"`
		Verify   string  `json:"verify,omitempty"`
	}{Kind: "finding", Severity: f.Severity.String(), ID: f.ID, Title: f.Title, Where: []place{}, Why: f.Why, Fix: []edit{}, Verify: f.Verify}
	at := func(pos haproxy.Pos, text string) place {
		return place{File: pos.File, Line: pos.Line, Column: pos.Column, Text: text}
	}
	for _, p := range f.Where {
		record.Where = append(record.Where, at(p.Pos, p.Text))
	}
	for _, e := range f.Fix {
		fix := edit{Do: e.Do.String(), Text: e.Text, Lines: e.Lines}
		for _, pos := range e.At {
			fix.At = append(fix.At, at(pos, ""))
		}
		record.Fix = append(record.Fix, fix)
	}
	return json.Marshal(record)
}

// CheckSummary is the last record of a check in JSON.
type CheckSummary struct {
	Kind     string   `json:"kind"` // "check"
	Looked   []string `json:"looked_at"`
	Unlooked []string `json:"not_looked_at"`
	Critical int      `json:"critical"`
	Warning  int      `json:"warning"`
	Info     int      `json:"info"`
	Exit     int      `json:"exit"`
}

// NewCheckSummary counts findings. Looked says what was looked at, unlooked what
// could not be.
func NewCheckSummary(findings []Finding, looked, unlooked []string) CheckSummary {
	s := CheckSummary{Kind: "check", Looked: append([]string{}, looked...), Unlooked: append([]string{}, unlooked...)}
	for i := range findings {
		switch findings[i].Severity {
		case Critical:
			s.Critical++
		case Warning:
			s.Warning++
		default:
			s.Info++
		}
	}
	if s.Exit = ExitCode(findings); len(looked) == 0 {
		s.Exit = ExitUnknown
	}
	return s
}

// String is the one line that a check ends with.
func (s CheckSummary) String() string {
	where := Clean(listed(s.Looked))
	var parts []string
	if s.Critical > 0 {
		parts = append(parts, fmt.Sprintf("%d critical", s.Critical))
	}
	if s.Warning > 0 {
		parts = append(parts, plural(uint64(s.Warning), "warning", "warnings"))
	}
	if s.Info > 0 {
		parts = append(parts, plural(uint64(s.Info), "note", "notes"))
	}
	switch {
	case len(s.Looked) == 0:
		return "Nothing could be looked at."
	case len(parts) == 0 && len(s.Unlooked) > 0:
		return "Nothing to change in what could be looked at of " + where + "."
	case len(parts) == 0:
		return "Nothing to change in " + where + "."
	}
	return listed(parts) + " in " + where + "."
}

// PrintCheck prints what a check found, what it could not look at, and its summary.
func PrintCheck(w io.Writer, findings []Finding, summary CheckSummary, style Style) error {
	if err := Findings(w, findings, style); err != nil {
		return err
	}
	var b strings.Builder
	for _, line := range summary.Unlooked {
		b.WriteString(wrap("not looked at: "+Clean(line), style.paper(), "", "  "))
	}
	b.WriteString(wrap(summary.String(), style.paper(), "", "  "))
	_, err := io.WriteString(w, b.String())
	return err
}

// listed is "a", "a and b", "a, b and c".
func listed(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

// some is listed with at most n words: "a, b and 3 more".
func some(words []string, n int) string {
	if len(words) <= n {
		return listed(words)
	}
	return listed(append(slices.Clone(words[:n-1]), fmt.Sprintf("%d more", len(words)-n+1)))
}

// join joins the words that are not empty.
func join(between string, words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), between)
}

// span prints a duration as one writes it: 60s, 5m, 1h, 1h30m, 24d.
func span(d time.Duration) string {
	switch {
	case d%time.Second != 0:
		return d.String()
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	}
	var b strings.Builder
	for _, unit := range []struct {
		d    time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / unit.d; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, unit.name)
			d -= n * unit.d
		}
	}
	return b.String()
}
