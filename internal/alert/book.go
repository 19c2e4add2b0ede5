// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// Settings are when alerts fire, are heard of, and resolve.
type Settings struct {
	MinConnections int     // a group fires with these; at least 1
	MaxconnShare   float64 // or with this share of its frontend's maxconn, held; 0: off
	PeersPerGroup  int     // peers with an alert of their own; 0: none has

	ResolveAfter time.Duration // below the threshold for so long
	// An alert that is not below the threshold is spoken of at most every UpdateEvery
	// if it changes much, and every RepeatEvery (0: never) in any case.
	UpdateEvery, RepeatEvery time.Duration
}

// fewest is what a share of maxconn is not taken to be less than: one or two
// clients that died are on every busy host. (report.Diagnose has the same.)
const fewest = 3

// DefaultSettings are those for where nothing is set.
func DefaultSettings() Settings {
	return Settings{
		// What diagnose calls a pile: ten at one place have something in common,
		// and fewer matter where they take a tenth of the slots.
		MinConnections: 10,
		MaxconnShare:   0.1,
		// A page of alerts for one cause is all that anybody reads.
		PeersPerGroup: 10,
		// Twice the limit that is usual, 60 s: a peer that goes on leaving
		// connections behind has left the next by then.
		ResolveAfter: 2 * time.Minute,
		// So that one can follow a pile that grows, and no more.
		UpdateEvery: time.Minute,
		// Each watch of those on call hears of it once or twice.
		RepeatEvery: 4 * time.Hour,
	}
}

// Book groups overdue connections into alerts, and knows those that fire. It is
// not safe for concurrent use.
//
// A group fires as soon as it has as many connections as the threshold, for the
// limit itself was the delay. It resolves when it has been below for a while
// without a break, so that connections that come and go do not make it flap.
type Book struct {
	settings Settings
	names    *report.Names
	own      uint32
	bounds   bounds

	firing map[Labels]*life
	counts Counts

	// For one evaluation; empty between two.
	families []*family
	byLabels map[Labels]*family
	byKey    map[key]*family
}

// life is an alert that fires.
type life struct {
	alert Alert
	peer  peer // where the label is not Others

	started events.Time

	// As of the last notification.
	notified events.Time
	count    int
	cookie   uint64 // of the oldest connection
	source   string // of its limit
	grave    bool

	late     bool        // an update is held back until UpdateEvery has passed
	low      bool        // it is below the threshold, and has been
	below    events.Time // since then, as far as was watched
	ended    events.Time // and this is when it ended, if it resolves
	restored bool        // nobody has been told of it since the restart
	where    string      // of its connections, when there were some last
}

// Change is something that has happened to an alert.
type Change struct {
	// Alert is the Book's own, until the next evaluation. Its Examples and Advice
	// are for the caller to set, and are kept.
	Alert *Alert
	// Conns are the oldest connections of the group, oldest first: all, or a
	// thousand, or fewer where very many alerts change at once. None where it has resolved.
	Conns []track.Conn
}

// Counts are how many times alerts have changed since NewBook.
type Counts struct {
	Fired, Updated, Repeated, Resolved uint64
}

// NewBook makes an empty Book. Own is the inode of the host's network namespace,
// which labels leave out.
func NewBook(s Settings, names *report.Names, own uint32) *Book {
	b := &Book{
		names:    names,
		own:      own,
		bounds:   defaultBounds,
		firing:   map[Labels]*life{},
		byLabels: map[Labels]*family{},
		byKey:    map[key]*family{},
	}
	b.SetSettings(s)
	return b
}

// SetSettings replaces the settings. What that changes, the next Evaluate says.
func (b *Book) SetSettings(s Settings) {
	s.MinConnections = max(s.MinConnections, 1)
	s.PeersPerGroup = max(s.PeersPerGroup, 0)
	b.settings = s
}

// Counts returns the totals.
func (b *Book) Counts() Counts { return b.counts }

// Active returns the alerts that fire, as of the last evaluation, those with
// most connections first. They are the Book's own, until the next.
func (b *Book) Active() []*Alert {
	all := make([]*Alert, 0, len(b.firing))
	for _, l := range b.firing {
		all = append(all, &l.alert)
	}
	slices.SortFunc(all, byCount)
	return all
}

func byCount(a, b *Alert) int {
	return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.ID, b.ID))
}

// Next is when Evaluate is due although no connection changes: for a repetition,
// an update that was held back, or a resolution. ok is false for never.
func (b *Book) Next() (at events.Time, ok bool) {
	for _, l := range b.firing {
		if next, will := b.next(l); will && (!ok || next < at) {
			at, ok = next, true
		}
	}
	return at, ok
}

func (b *Book) next(l *life) (at events.Time, ok bool) {
	repeats := b.settings.RepeatEvery > 0
	wait := b.settings.RepeatEvery
	switch {
	case l.low:
		return l.below.Add(b.settings.ResolveAfter), true
	case l.late && (!repeats || b.settings.UpdateEvery < wait):
		wait = b.settings.UpdateEvery
	case !repeats:
		return 0, false
	}
	return l.notified.Add(wait), true
}

// Evaluate groups the overdue connections as of now, and returns what that
// changes, the alerts with most connections first. Overdue calls its argument
// with each of them; it is called up to three times, and must find the same ones
// each time.
func (b *Book) Evaluate(now events.Time, overdue func(fn func(*track.Conn))) []Change {
	// Those that fire have their family whatever else there is, and their peers
	// are counted one by one.
	for _, l := range b.firing {
		labels := l.alert.Labels
		labels.Peer = ""
		if f := b.family(labels); l.alert.Labels.Peer == Others {
			f.rest.life = l
		} else {
			f.own[l.peer] = &group{peer: l.peer, life: l}
		}
	}
	defer b.release()

	b.each(overdue, func(f *family, p peer, c *track.Conn) {
		g := f.groupOf(p)
		if g == f.rest {
			f.count(p, b.bounds.counters)
		}
		g.add(c)
	})

	var changed []*group
	judge := func(f *family, g *group) {
		b.judge(f, g, now)
		if g.event != "" {
			changed = append(changed, g)
		}
	}
	nominated := false
	for _, f := range b.families {
		for p, g := range f.own {
			if judge(f, g); g.event == Resolved {
				delete(f.own, p)
				f.rest.merge(&g.tally)
				f.folded += min(g.count, 1)
			}
		}
		f.nominate(b.threshold(f), b.room(f))
		nominated = nominated || f.nominees != nil
	}
	if nominated {
		b.each(overdue, func(f *family, p peer, c *track.Conn) {
			if f.nominees == nil {
				return
			}
			g := f.groupOf(p)
			if g != f.rest {
				return // counted already
			}
			if nominee := f.nominees[p]; nominee != nil {
				g = nominee
			}
			g.add(c)
		})
	}
	for _, f := range b.families {
		f.elect(b.threshold(f), b.room(f))
		for _, g := range f.own {
			if g.life == nil {
				judge(f, g)
			}
		}
		judge(f, f.rest)
	}
	return b.changes(changed, overdue)
}

// room is how many more peers of a family may have an alert of their own.
func (b *Book) room(f *family) int { return b.settings.PeersPerGroup - len(f.own) }

// threshold is with how many connections a group of the family fires.
func (b *Book) threshold(f *family) int {
	n := b.settings.MinConnections
	// Only what is held takes a slot of HAProxy's.
	if f.labels.Stage == events.Held.String() && f.maxconn > 0 && b.settings.MaxconnShare > 0 {
		share := math.Ceil(b.settings.MaxconnShare*float64(f.maxconn) - 1e-9) // 0.07 × 100 is a little more than 7
		if share = max(share, fewest); share < float64(n) {
			n = int(share)
		}
	}
	return n
}

// judge decides what has happened to a group, all of whose connections are counted.
func (b *Book) judge(f *family, g *group, now events.Time) {
	l, s := g.life, &b.settings
	high := g.count >= b.threshold(f)
	if l == nil {
		if high {
			b.fire(f, g, now)
		}
		return
	}
	b.refresh(f, g, now)
	l.late = false
	if !high {
		if !l.low {
			l.low, l.below, l.ended = true, now, now
		}
		switch {
		case l.restored && g.count > 0:
			b.notify(g, Updated, now)
		case now >= l.below.Add(s.ResolveAfter):
			b.resolve(g, now)
		}
		return
	}
	l.low = false
	changed := g.count >= 2*l.count || 2*g.count <= l.count || l.alert.grave() != l.grave ||
		g.cookie == l.cookie && l.alert.LimitSource != l.source
	soon := now < l.notified.Add(s.UpdateEvery)
	switch {
	case l.restored, changed && !soon:
		b.notify(g, Updated, now)
	case s.RepeatEvery > 0 && now >= l.notified.Add(s.RepeatEvery):
		b.notify(g, Repeated, now)
	default:
		l.late = changed
	}
}

// fire makes the alert of a group.
func (b *Book) fire(f *family, g *group, now events.Time) {
	labels := f.labels
	labels.Peer = Others
	if g != f.rest {
		labels.Peer = g.peer.String()
	}
	g.life = &life{peer: g.peer, started: now, alert: Alert{ID: labels.id(), Labels: labels, StartsAt: b.wall(now)}}
	b.firing[labels] = g.life
	b.refresh(f, g, now)
	b.notify(g, Fired, now)
}

// clockSet is by how much the wall clock has moved at least if it was set; less
// than that is between its readings, and the start of an alert is to stay the same.
const clockSet = time.Second

// refresh brings the alert of a group up to date.
func (b *Book) refresh(f *family, g *group, now events.Time) {
	l := g.life
	a := &l.alert
	a.UpdatedAt = b.wall(now)
	if starts := b.wall(l.started); starts.Sub(a.StartsAt).Abs() > clockSet {
		a.StartsAt = starts
	}
	a.Count, a.Peak = g.count, max(a.Peak, g.count)
	if f.maxconn > 0 {
		a.Maxconn = f.maxconn
	}
	if g.count > 0 {
		a.Oldest, a.OldestExact = g.oldest.Seconds(), g.exact
		a.LimitSource, a.LimitSec = report.Clean(g.limit.Source()), g.limit.Duration.Seconds()
		l.where = f.where(g)
	}
	a.Summary = summary(l, g)
}

// notify is where somebody is to be told of the group's alert.
func (b *Book) notify(g *group, e Event, now events.Time) {
	g.event = e
	l := g.life
	l.alert.Event = e
	l.notified, l.restored, l.late = now, false, false
	l.count, l.cookie, l.source, l.grave = g.count, g.cookie, l.alert.LimitSource, l.alert.grave()
	switch e {
	case Fired:
		b.counts.Fired++
	case Updated:
		b.counts.Updated++
	case Repeated:
		b.counts.Repeated++
	case Resolved:
		b.counts.Resolved++
	}
}

// resolve ends the alert of a group: when it fell below the threshold, not now.
func (b *Book) resolve(g *group, now events.Time) {
	a := &g.life.alert
	ends := b.wall(g.life.ended)
	if ends.Before(a.StartsAt) { // The clock was read twice, or what was saved is wrong.
		ends = a.StartsAt
	}
	a.EndsAt, a.Count = &ends, 0
	a.Summary = summary(g.life, g)
	delete(b.firing, a.Labels)
	b.notify(g, Resolved, now)
}

// wall is a time as it is printed and saved, without a reading of another clock.
func (b *Book) wall(t events.Time) time.Time { return b.names.Wall(t).Round(0) }

// changes are those of the groups, with their connections.
func (b *Book) changes(groups []*group, overdue func(fn func(*track.Conn))) []Change {
	if len(groups) == 0 {
		return nil
	}
	most := max(min(b.bounds.sample, b.bounds.samples/len(groups)), 1)
	wanted := false
	for _, g := range groups {
		if g.event != Resolved {
			g.sample = &sample{most: most}
			wanted = true
		}
	}
	if wanted {
		b.each(overdue, func(f *family, p peer, c *track.Conn) {
			if g := f.groupOf(p); g.sample != nil {
				g.sample.add(c)
			}
		})
	}
	all := make([]Change, 0, len(groups))
	for _, g := range groups {
		c := Change{Alert: &g.life.alert}
		if g.sample != nil {
			c.Conns = g.sample.oldest()
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b Change) int { return byCount(a.Alert, b.Alert) })
	return all
}
