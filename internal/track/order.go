// SPDX-License-Identifier: Apache-2.0

package track

import (
	"cmp"
	"iter"
	"slices"

	"github.com/fintrace/fintrace/internal/events"
)

// An Order is connections of a table in the order of their entries into FIN_WAIT2, as
// of a moment. It is valid until the table changes.
type Order struct {
	table *Tracker
	now   events.Time
	dated []dated
}

// dated is what is sorted: connections are large, and there may be very many.
type dated struct {
	since events.Time
	index index
}

// Oldest orders those that selected takes. What it is called with is reused.
func (t *Tracker) Oldest(now events.Time, selected func(*Conn) bool) Order {
	o := Order{t, now, make([]dated, 0, t.Len())}
	var v Conn
	t.slab.each(func(i index, c *conn) {
		v = t.view(c, now)
		if selected(&v) {
			o.dated = append(o.dated, dated{c.since, i})
		}
	})
	o.dated = sortSince(o.dated)
	for from, to := 0, 0; from < len(o.dated); from = to {
		for to = from + 1; to < len(o.dated) && o.dated[to].since == o.dated[from].since; to++ {
		}
		slices.SortFunc(o.dated[from:to], func(a, b dated) int {
			return cmp.Compare(t.slab.at(a.index).cookie, t.slab.at(b.index).cookie)
		})
	}
	return o
}

// sortSince sorts, a digit at a time: of very many several times as fast as by comparing
// them. What it is given is overwritten.
func sortSince(all []dated) []dated {
	if len(all) == 0 {
		return all
	}
	first, last := all[0].since, all[0].since
	for _, d := range all {
		first, last = min(first, d.since), max(last, d.since)
	}
	const digit = 11 // bits
	sorted := make([]dated, len(all))
	for shift := 0; uint64(last-first)>>shift != 0; shift += digit {
		var place [1 << digit]int
		at := func(d *dated) *int { return &place[uint64(d.since-first)>>shift%(1<<digit)] }
		for i := range all {
			*at(&all[i])++
		}
		before := 0
		for i, n := range place {
			place[i] = before
			before += n
		}
		for i := range all {
			n := at(&all[i])
			sorted[*n] = all[i]
			*n++
		}
		all, sorted = sorted, all
	}
	return all
}

// Len is how many there are.
func (o Order) Len() int { return len(o.dated) }

// All is each of them, the oldest first. It is valid until the next.
func (o Order) All() iter.Seq[*Conn] {
	return func(yield func(*Conn) bool) {
		var v Conn
		for _, d := range o.dated {
			v = o.table.view(o.table.slab.at(d.index), o.now)
			if !yield(&v) {
				return
			}
		}
	}
}
