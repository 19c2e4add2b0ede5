// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// bounds are what keeps a Book small, whatever peers and processes do. There are
// at most families × (PeersPerGroup + 1) alerts.
type bounds struct {
	// families are the labels apart from the peer. A host with HAProxy has a few
	// for each of its proxies; what is more than this goes to one, the last.
	families int
	// counters are for the peers of a family. Where there are no more peers the
	// counts are exact at once; else no peer is missed that has more than one in
	// so many of the family's connections. All together take 20 MB at the worst.
	counters int
	// keys are remembered for finding the family of a connection. Old workers
	// of HAProxy have keys of their own.
	keys int
	// sample is how many connections of a change are handed out: enough to judge
	// the group by. Those of all changes together are at most samples: 4 MB, and
	// three times that while they are chosen.
	sample, samples int
}

var defaultBounds = bounds{families: 256, counters: 256, keys: 4096, sample: 1000, samples: 20_000}

// key is what the connections of a family have in common, as they have it:
// several keys may have the same labels.
type key struct {
	kind  string         // of the limit
	place *haproxy.Place // an old worker's is another than its successor's
	comm  [16]byte
	netns uint32
	port  uint16 // 0 where there is a place
	stage events.Stage
	side  events.Side
}

// peer is an address, or the first half of one of IPv6: a client has all of its
// /64 to choose from.
type peer [16]byte

func peerOf(c *track.Conn) peer {
	p := peer(c.Flow.Remote.Addr)
	if !p.is4() {
		clear(p[8:])
	}
	return p
}

var v4Mapped = [12]byte{10: 0xff, 11: 0xff}

// is4 says whether it is an IPv4 address, which is kept as v4-mapped IPv6.
func (p peer) is4() bool { return [12]byte(p[:12]) == v4Mapped }

func (p peer) String() string {
	if p.is4() {
		return netip.AddrFrom16(p).Unmap().String()
	}
	return netip.PrefixFrom(netip.AddrFrom16(p), 64).String()
}

// parsePeer reads what String prints, and nothing else.
func parsePeer(s string) (p peer, ok bool) {
	if prefix, err := netip.ParsePrefix(s); err == nil {
		p = prefix.Addr().As16()
		clear(p[8:])
	} else if addr, err := netip.ParseAddr(s); err == nil {
		p = addr.As16()
	}
	if p.String() != s {
		return peer{}, false
	}
	return p, true
}

// family are the connections that have all labels but the peer in common.
type family struct {
	labels  Labels // without Peer
	maxconn int    // of the frontend, 0 unknown or none

	own  map[peer]*group // the peers with an alert of their own
	rest *group          // all others

	// counts are of peers in the rest, by the algorithm of Misra and Gries: each
	// is too low by dropped at most.
	counts  map[peer]int
	dropped int
	// folded are the peers in the rest that are not in counts, and promoted those
	// in counts that are not in the rest.
	folded, promoted int

	nominees map[peer]*group // that may get an alert of their own; nil: there are none
}

// group are the connections of one alert, or of what may become one.
type group struct {
	tally
	peer   peer // not of a rest
	life   *life
	event  Event // what has happened to it now
	sample *sample
}

// tally is what is known of connections together.
type tally struct {
	count       int
	oldest      time.Duration
	exact       bool
	cookie      uint64
	limit       limits.Limit // of the oldest
	place       *haproxy.Place
	first, last uint16 // service port
}

func (t *tally) add(c *track.Conn) {
	port := c.ServicePort()
	if t.count == 0 {
		t.first, t.last = port, port
	}
	t.first, t.last = min(t.first, port), max(t.last, port)
	if t.count == 0 || older(c.Duration, c.Cookie, t.oldest, t.cookie) {
		t.oldest, t.exact, t.cookie, t.limit, t.place = c.Duration, c.SinceExact, c.Cookie, c.Limit, c.Place
	}
	t.count++
}

// merge adds what another tally has.
func (t *tally) merge(o *tally) {
	if t.count == 0 || o.count == 0 {
		if t.count == 0 {
			*t = *o
		}
		return
	}
	whole := *t
	if older(o.oldest, o.cookie, t.oldest, t.cookie) {
		whole = *o
	}
	whole.count = t.count + o.count
	whole.first, whole.last = min(t.first, o.first), max(t.last, o.last)
	*t = whole
}

// older puts the oldest first; the cookie decides where they are as old, so that
// it does not matter in which order they come.
func older(age time.Duration, cookie uint64, thanAge time.Duration, thanCookie uint64) bool {
	return age > thanAge || age == thanAge && cookie < thanCookie
}

// count counts a peer of the rest. It keeps no more than most of them: where
// there is no room, each of those loses one, and so does the newcomer.
func (f *family) count(p peer, most int) {
	if n, known := f.counts[p]; known || len(f.counts) < most {
		f.counts[p] = n + 1
		return
	}
	for p, n := range f.counts {
		if n == 1 {
			delete(f.counts, p)
		} else {
			f.counts[p] = n - 1
		}
	}
	f.dropped++
}

// groupOf is where a connection of the family belongs.
func (f *family) groupOf(p peer) *group {
	if len(f.own) > 0 {
		if g := f.own[p]; g != nil {
			return g
		}
	}
	return f.rest
}

// each calls fn with each overdue connection, its family and its peer. It makes
// no text of connections: that of a key is made once.
func (b *Book) each(overdue func(fn func(*track.Conn)), fn func(*family, peer, *track.Conn)) {
	var last key
	var lastFamily *family // most often it is that of the connection before
	overdue(func(c *track.Conn) {
		k := key{kind: c.Limit.Kind(), place: c.Place, comm: c.Process.Comm, netns: c.Netns, stage: c.Stage, side: c.Side}
		if k.place == nil {
			k.port = c.ServicePort()
		}
		if lastFamily == nil || k != last {
			last, lastFamily = k, b.familyOf(k)
		}
		fn(lastFamily, peerOf(c), c)
	})
}

func (b *Book) familyOf(k key) *family {
	if f := b.byKey[k]; f != nil {
		return f
	}
	labels := Labels{
		Limit:   report.Clean(k.kind),
		Stage:   k.stage.String(),
		Side:    k.side.String(),
		Port:    k.port,
		Process: report.Clean(events.Process{Comm: k.comm}.Name()),
		Netns:   b.netns(k.netns),
	}
	if k.place != nil {
		labels.Proxy, labels.Server = report.Clean(k.place.Name()), report.Clean(k.place.Server)
	}
	f := b.family(labels)
	// An old worker takes nothing any more: its slots are no measure.
	if k.place != nil && !k.place.Process.Old && f.labels == labels {
		if n := k.place.Maxconn(); n > 0 && (f.maxconn == 0 || n < f.maxconn) {
			f.maxconn = n
		}
	}
	if len(b.byKey) >= b.bounds.keys {
		clear(b.byKey)
	}
	b.byKey[k] = f
	return f
}

func (b *Book) netns(inode uint32) string {
	if inode == 0 || inode == b.own {
		return ""
	}
	if name := b.names.Netns(inode); name != "" {
		return report.Clean(name)
	}
	return strconv.FormatUint(uint64(inode), 10)
}

// overflow are the labels of the connections of more kinds than are told apart.
var overflow = Labels{Limit: Others, Stage: Others, Side: Others, Process: Others}

// family is the one with these labels, or that of overflow where no other can
// be made.
func (b *Book) family(labels Labels) *family {
	if f := b.byLabels[labels]; f != nil {
		return f
	}
	if labels != overflow {
		told := len(b.families)
		if b.byLabels[overflow] != nil {
			told--
		}
		if told >= b.bounds.families-1 {
			return b.family(overflow)
		}
	}
	n := len(b.families)
	b.families = slices.Grow(b.families, 1)[:n+1]
	f := b.families[n] // of an evaluation before
	if f == nil {
		f = &family{own: map[peer]*group{}, counts: map[peer]int{}}
		b.families[n] = f
	}
	f.labels, f.rest = labels, &group{}
	b.byLabels[labels] = f
	return f
}

// release forgets the connections of an evaluation, and keeps the room for the next.
func (b *Book) release() {
	for _, f := range b.families {
		clear(f.own)
		clear(f.counts)
		*f = family{own: f.own, counts: f.counts}
	}
	b.families = b.families[:0]
	clear(b.byLabels)
	clear(b.byKey)
}

// nominate finds the peers of the rest that may reach the threshold, where there
// is room for more alerts.
func (f *family) nominate(threshold, room int) {
	if room <= 0 || f.rest.count < threshold {
		return
	}
	for p, n := range f.counts {
		if n+f.dropped >= threshold {
			if f.nominees == nil {
				f.nominees = map[peer]*group{}
			}
			f.nominees[p] = &group{peer: p}
		}
	}
	if f.nominees != nil {
		f.rest.tally = tally{}
	}
}

// elect gives those nominees an alert of their own that have most connections,
// once all are counted, and leaves the others with the rest.
func (f *family) elect(threshold, room int) {
	var ranked []*group
	for _, g := range f.nominees {
		ranked = append(ranked, g)
	}
	slices.SortFunc(ranked, func(a, b *group) int {
		return cmp.Or(cmp.Compare(b.count, a.count), bytes.Compare(a.peer[:], b.peer[:]))
	})
	for i, g := range ranked {
		if i < room && g.count >= threshold {
			f.own[g.peer] = g
			f.promoted++
		} else {
			f.rest.merge(&g.tally)
		}
	}
}

// sample keeps the oldest of the connections that are added to it.
type sample struct {
	most  int
	conns []track.Conn
	refs  []ref // to conns
	full  bool
	last  ref // the oldest that has been turned away
}

type ref struct {
	age    time.Duration
	cookie uint64
	at     int
}

func byAge(a, b ref) int {
	return cmp.Or(cmp.Compare(b.age, a.age), cmp.Compare(a.cookie, b.cookie))
}

func (s *sample) add(c *track.Conn) {
	r := ref{age: c.Duration, cookie: c.Cookie}
	if s.full && byAge(s.last, r) <= 0 {
		return
	}
	n := len(s.refs)
	if n == 2*s.most { // Seldom enough that to sort them costs next to nothing.
		slices.SortFunc(s.refs, byAge)
		s.refs, s.full, s.last = s.refs[:s.most], true, s.refs[s.most]
		n = s.most
	}
	if n < len(s.conns) {
		r.at = s.refs[:n+1][n].at // of one that was turned away
		s.conns[r.at] = *c
	} else {
		r.at = n
		s.conns = append(s.conns, *c)
	}
	s.refs = append(s.refs, r)
}

// oldest returns what has been kept, the oldest first.
func (s *sample) oldest() []track.Conn {
	slices.SortFunc(s.refs, byAge)
	conns := make([]track.Conn, 0, min(len(s.refs), s.most))
	for _, r := range s.refs[:cap(conns)] {
		conns = append(conns, s.conns[r.at])
	}
	return conns
}
