// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

// results are all that one run has measured.
type results struct {
	when     time.Time
	took     time.Duration
	kernel   string
	cpu      string
	versions []string // of the tools beside it
	sections []section
}

// A section is what one measure has found.
type section struct {
	name  string
	rows  []row
	about string // how it was measured, in Markdown
}

// A row is one line of the table.
type row struct {
	what     string
	ratio    string // of fintrace to what it is compared with
	bar      string // what it is to be; "": there is no bar
	met      verdict
	fintrace string // the figure itself
	beside   string // the others' figures
}

type verdict string

const (
	met     verdict = "yes"
	notMet  verdict = "**no**"
	unknown verdict = "?"
)

// meets is the verdict on a comparison of two figures that are both known.
func meets(yes bool) verdict {
	if yes {
		return met
	}
	return notMet
}

var header = []string{"measure", "what", "ratio", "bar", "met", "fintrace", "beside it"}

const barColumn = 3

// provenance begins the paragraph that says where the figures are from.
const provenance = "Written by `make bench` "

func (r *results) markdown() string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\n")
	fmt.Fprintf(&b, provenance+"on %s in %s. Linux %s, %s.\nBeside it: libbpf-tools' and bcc's tcpstates, %s.\n\n",
		r.when.Format(time.DateOnly), r.took.Round(time.Second), r.kernel, r.cpu, strings.Join(r.versions, ", "))
	b.WriteString("One run; all tools see the same load, in turns, and each figure is the median of its rounds.\n" +
		"Compare the ratios: the absolute times are this machine's.\n\n")
	rows := [][]string{header}
	for _, s := range r.sections {
		for _, r := range s.rows {
			rows = append(rows, []string{s.name, r.what, r.ratio, r.bar, string(r.met), r.fintrace, r.beside})
		}
	}
	writeTable(&b, rows)
	for _, s := range r.sections {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n", s.name, strings.TrimSpace(s.about))
	}
	return b.String()
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

// The marks of what is quoted.
const (
	quoteBegin = "<!-- quoted from BENCHMARKS.md by make bench -->\n"
	quoteEnd   = "<!-- end of the quotation -->\n"
)

// quote is the table of a text of results, those lines alone that have a bar,
// and where they are from.
func quote(results string) string {
	var rows [][]string
	for line := range strings.Lines(results) {
		if !strings.HasPrefix(line, "|") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		rule := strings.HasPrefix(cells[0], "---")
		if len(cells) == len(header) && cells[barColumn] != "" && !rule {
			rows = append(rows, cells)
		}
	}
	if len(rows) == 0 {
		return ""
	}
	var b strings.Builder
	writeTable(&b, rows)
	_, from, _ := strings.Cut(results, provenance)
	from, _, _ = strings.Cut(from, "\n\n")
	b.WriteString("\n" + provenance + from + "\n")
	return b.String()
}

// quoteInto replaces what a file has quoted.
func quoteInto(path, results string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begun := strings.Cut(string(text), quoteBegin)
	_, after, ended := strings.Cut(rest, quoteEnd)
	if !begun || !ended {
		return fmt.Errorf("%s has no marks to quote between: %s%s", path, quoteBegin, strings.TrimSpace(quoteEnd))
	}
	return os.WriteFile(path, []byte(before+quoteBegin+quote(results)+quoteEnd+after), 0o644)
}
