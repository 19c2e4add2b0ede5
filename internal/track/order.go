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
	slices.SortFunc(o.dated, func(a, b dated) int {
		if a.since != b.since {
			return cmp.Compare(a.since, b.since)
		}
		return cmp.Compare(t.slab.at(a.index).cookie, t.slab.at(b.index).cookie)
	})
	return o
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
