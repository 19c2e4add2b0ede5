// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"cmp"
	"slices"
	"unicode/utf8"
)

// column is one column of a table. Where the terminal is too narrow, the
// columns with the lowest drop are the first to be given room; those with 0 are
// there in any case.
type column struct {
	title string
	width int // at least
	most  int // of the last column, where more may be cut: what it is given room for; 0: all
	right bool
	drop  int
}

const dropped = -1

// fit says which columns are shown when width cells are there; 0 is no limit.
func fit(columns []column, width int) []column {
	columns = slices.Clone(columns)
	if width == 0 {
		return columns
	}
	order := make([]*column, len(columns))
	for i := range columns {
		order[i] = &columns[i]
	}
	slices.SortStableFunc(order, func(a, b *column) int { return cmp.Compare(a.drop, b.drop) })
	const gap = 2
	room := width + gap
	for _, c := range order {
		if c.drop == dropped {
			continue
		}
		if c.drop > 0 && room < c.width+gap {
			c.drop = dropped
			continue
		}
		room -= c.width + gap
	}
	return columns
}

// line lays out one row in columns that fit has chosen.
func line(columns []column, cells []string) string {
	text := make([]byte, 0, 256)
	for i, c := range columns {
		if c.drop == dropped {
			continue
		}
		if len(text) > 0 {
			text = append(text, "  "...)
		}
		if !c.right {
			text = append(text, cells[i]...)
		}
		for range c.width - utf8.RuneCountInString(cells[i]) {
			text = append(text, ' ')
		}
		if c.right {
			text = append(text, cells[i]...)
		}
	}
	return string(bytes.TrimRight(text, " "))
}

func titles(columns []column) []string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.title
	}
	return names
}

// laidOut gives columns the widths of their widest cells, and says which are shown.
func laidOut(columns []column, widest []int, width int) []column {
	columns = slices.Clone(columns)
	for i := range columns {
		c := &columns[i]
		c.width = max(c.width, utf8.RuneCountInString(c.title), widest[i])
		if c.most > 0 {
			c.width = min(c.width, c.most)
		}
	}
	return fit(columns, width)
}

// table lays out rows that are all known, each column as wide as its widest cell.
func table(columns []column, rows [][]string, width int) []string {
	widths := make([]int, len(columns))
	for _, row := range rows {
		for i := range widths {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	columns = laidOut(columns, widths, width)
	lines := append(make([]string, 0, 1+len(rows)), line(columns, titles(columns)))
	for _, row := range rows {
		lines = append(lines, line(columns, row))
	}
	return lines
}
