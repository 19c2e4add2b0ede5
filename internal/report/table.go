// SPDX-License-Identifier: Apache-2.0

package report

import (
	"strings"
	"unicode/utf8"
)

// column is one column of a table. Where the terminal is too narrow, the
// columns with the highest drop go first; those with 0 stay.
type column struct {
	title string
	width int // at least
	right bool
	drop  int
}

// fit says which columns are shown when width cells are there; 0 is no limit.
func fit(columns []column, width int) []column {
	total := func() int {
		n := 0
		for _, c := range columns {
			if c.drop >= 0 {
				n += c.width + 2
			}
		}
		return n - 2
	}
	const dropped = -1
	all := columns
	columns = append([]column(nil), columns...)
	for width > 0 && total() > width {
		last := 0
		for i, c := range columns {
			if c.drop > columns[last].drop {
				last = i
			}
		}
		if columns[last].drop <= 0 {
			break
		}
		columns[last].drop = dropped
	}
	// A wide one that went last may have made room for others that went before.
	for {
		best := -1
		for i, c := range columns {
			if c.drop < 0 && total()+2+c.width <= width && (best < 0 || all[i].drop < all[best].drop) {
				best = i
			}
		}
		if best < 0 {
			return columns
		}
		columns[best].drop = all[best].drop
	}
}

// line lays out one row in columns that fit has chosen.
func line(columns []column, cells []string) string {
	var b strings.Builder
	for i, c := range columns {
		if c.drop < 0 {
			continue
		}
		if b.Len() > 0 {
			b.WriteString("  ")
		}
		pad := strings.Repeat(" ", max(c.width-utf8.RuneCountInString(cells[i]), 0))
		if c.right {
			b.WriteString(pad + cells[i])
		} else {
			b.WriteString(cells[i] + pad)
		}
	}
	return strings.TrimRight(b.String(), " ")
}

func titles(columns []column) []string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.title
	}
	return names
}

// table lays out rows that are all known, each column as wide as its widest cell.
func table(columns []column, rows [][]string, width int) []string {
	columns = append([]column(nil), columns...)
	for i := range columns {
		columns[i].width = max(columns[i].width, utf8.RuneCountInString(columns[i].title))
		for _, row := range rows {
			columns[i].width = max(columns[i].width, utf8.RuneCountInString(row[i]))
		}
	}
	columns = fit(columns, width)
	lines := []string{line(columns, titles(columns))}
	for _, row := range rows {
		lines = append(lines, line(columns, row))
	}
	return lines
}
