// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

// Diagnosis is what an expert would say of the evidence.
type Diagnosis struct {
	Verdict  []string  // what is the matter, and what to do, a sentence or two each
	Findings []Finding // worst first; what could not be seen is last
	Figures  Figures
}

// Exit is the exit code.
func (d *Diagnosis) Exit() int { return ExitCode(d.Findings) }

// What makes a pile of connections that are held past their limit.
//
// A lonely one or two are on every busy host: a client whose battery died. Ten
// at one place have something in common, and fewer matter where the place has
// so few slots that they take a tenth of them.
const (
	pileMany  = 10
	pileFew   = 3
	pileShare = 10 // one slot in so many
)

// pileAge is what nothing younger is called stuck at, however short the limit:
// where tcp_fin_timeout is turned down to a second or two, a peer that still
// reads, or a slow answer, takes longer than that to close.
const pileAge = 5 * time.Second

// pastLimit says whether a connection is held for longer than it should be. A
// timeout that is meant for it and is hours long is no excuse: five minutes are
// more than any peer takes that still lives.
func pastLimit(c *track.Conn) bool {
	if c.Stage != events.Held {
		return false
	}
	limit := c.Limit.Duration
	if c.Place != nil && limit == c.Place.Timeout.Duration {
		limit = min(limit, finLong)
	}
	return c.Duration >= max(limit+track.Grace, pileAge)
}

// spot is where connections are held: a proxy of HAProxy and one of its sides,
// or a port of another program.
type spot struct {
	place *haproxy.Place // one of those that it has in HAProxy's processes; nil: another program's
	name  string         // of the program
	side  events.Side
	netns uint32
	port  uint16 // where there is no place

	held  []*track.Conn
	past  []*track.Conn // those past their limit, oldest first
	lives []Lifetime    // of the time held
	peers []countOf     // of past; see byPeer

	growth  Growth
	isPile  bool
	slots   []*slots      // of the processes that hold the pile; not of old workers
	causes  []Finding     // timeouts that let it pile up
	local   []*track.Conn // of past, those whose other end is here, too
	culprit string        // who has not closed most of those ends; "" if not most of past are local
}

type spotKey struct {
	place string // "frontend www"
	name  string
	side  events.Side
	netns uint32
	port  uint16
}

// diagnoser goes from the evidence to the findings.
type diagnoser struct {
	e         *Evidence
	judged    bool
	checked   Checked // as a check has it
	processes map[uint32]*haproxy.Process
	spots     []*spot
	piles     []*spot // those of spots that are piles, the largest first
	closed    []*track.Conn
	stuck     int // held past their limit, in piles or not
	mirror    map[[2]events.Endpoint][]*CloseWait
	slots     []slots
	findings  []Finding
	unlooked  []string
}

// Diagnose says what the evidence means.
func Diagnose(e Evidence) Diagnosis { return diagnose(e, false) }

// diagnose is Diagnose; judged: all that is held is too old, and too many.
func diagnose(e Evidence, judged bool) Diagnosis {
	if e.Netns == nil {
		e.Netns = func(uint32) string { return "" }
	}
	d := &diagnoser{e: &e, judged: judged, processes: map[uint32]*haproxy.Process{},
		checked:  Checked{Processes: e.HAProxy, Sysctls: e.Settings, OwnNetns: e.OwnNetns, Netns: e.Netns},
		unlooked: slices.Clone(e.Unlooked)}
	for i := range e.HAProxy {
		d.processes[uint32(e.HAProxy[i].PID)] = &e.HAProxy[i]
	}
	d.gather()
	d.findPiles()
	d.findMirrors()

	d.timeouts() // first, as others refer to what it finds
	causes := d.findings
	d.findings = nil
	d.pileUps()
	d.findings = append(d.findings, causes...)
	d.localPeers()
	d.oldWorkers()
	d.maxconn()
	d.growing()
	d.peers()
	d.closeWaitTwins()
	d.kernelTimers()
	d.kernelTables()
	d.cliffs()
	d.bursts()
	d.closedHarmless()

	slices.SortStableFunc(d.findings, func(a, b Finding) int { return cmp.Compare(b.Severity, a.Severity) })
	d.notSeen()
	f := newFigures(&e, d.stuck)
	f.slots, f.unlooked = d.slots, d.unlooked
	return Diagnosis{Verdict: d.verdict(), Findings: d.findings, Figures: f}
}

// Advice is what Diagnose says of some of a host's connections, which have been
// found to be too many and too old: what lets them pile up and what to change,
// and nothing that compares them with the others.
func Advice(e Evidence) []Finding {
	findings := slices.DeleteFunc(diagnose(e, true).Findings, func(f Finding) bool {
		return slices.Contains([]string{"not-seen", "closed-harmless", "peer-is-one"}, f.ID)
	})
	// What it shows has no IDs to refer to.
	for i := range findings {
		findings[i].Fix = slices.DeleteFunc(findings[i].Fix, func(e Edit) bool {
			return len(e.Lines) == 0 && slices.ContainsFunc(findings, func(f Finding) bool { return strings.HasSuffix(e.Text, "as in "+f.ID) })
		})
	}
	return findings
}

// add adds a finding, but for one that another process has given already.
func (d *diagnoser) add(f Finding) {
	if !slices.ContainsFunc(d.findings, func(other Finding) bool { return same(&f, &other) }) {
		d.findings = append(d.findings, f)
	}
}

func (d *diagnoser) watched() time.Duration { return d.e.Ended.Sub(d.e.Began) }

// gather sorts the connections by where they are.
func (d *diagnoser) gather() {
	byPlace := map[*haproxy.Place]*spot{}
	byKey := map[spotKey]*spot{}
	at := func(c *track.Conn) *spot {
		if s := byPlace[c.Place]; s != nil && c.Place != nil && s.netns == c.Netns {
			return s
		}
		key := spotKey{side: c.Side, netns: c.Netns}
		if c.Place != nil {
			key.place = placeName(c.Place)
		} else {
			key.name, key.port = c.Process.Name(), c.ServicePort()
		}
		s := byKey[key]
		if s == nil {
			s = &spot{place: c.Place, name: key.name, side: c.Side, netns: c.Netns, port: key.port}
			byKey[key] = s
			d.spots = append(d.spots, s)
		}
		byPlace[c.Place] = s
		return s
	}
	for i := range d.e.Conns {
		c := &d.e.Conns[i]
		if c.Stage != events.Held {
			d.closed = append(d.closed, c)
			if c.StagesKnown && c.Held > 0 && c.Since.Add(c.Held) >= d.e.Began {
				s := at(c)
				s.lives = append(s.lives, Lifetime{Entered: c.Since, Lasted: c.Held, Left: true, AtLeast: !c.SinceExact})
			}
			continue
		}
		s := at(c)
		s.held = append(s.held, c)
		s.lives = append(s.lives, Lifetime{Entered: c.Since, Lasted: c.Duration, AtLeast: !c.SinceExact})
		if d.judged || pastLimit(c) {
			d.stuck++
			s.past = append(s.past, c)
		}
	}
	for i := range d.e.Departures {
		c := &d.e.Departures[i]
		held := c.Held
		switch {
		case c.Stage == events.Held:
			held = c.Duration
		case !c.StagesKnown || held == 0 || c.Since.Add(held) < d.e.Began:
			continue
		}
		s := at(c)
		s.lives = append(s.lives, Lifetime{Entered: c.Since, Lasted: held, Left: true, AtLeast: !c.SinceExact})
	}
	for _, s := range d.spots {
		slices.SortFunc(s.past, oldestFirst)
		s.growth = GrowthOf(s.lives, d.e.Began, d.e.Ended)
	}
	// Maps have no order: the report is to be the same each time.
	slices.SortFunc(d.spots, func(a, b *spot) int {
		return cmp.Or(cmp.Compare(len(b.past), len(a.past)), cmp.Compare(len(b.held), len(a.held)),
			cmp.Compare(a.where(), b.where()), cmp.Compare(a.name, b.name), cmp.Compare(a.netns, b.netns))
	})
}

func oldestFirst(a, b *track.Conn) int {
	return cmp.Or(cmp.Compare(b.Duration, a.Duration), cmp.Compare(a.Cookie, b.Cookie),
		cmp.Compare(a.Flow.Remote.Port, b.Flow.Remote.Port))
}

// placeName is "frontend www", or "frontend www or api" where it may be either.
func placeName(p *haproxy.Place) string {
	if p.Certain() {
		return p.Proxies[0].String()
	}
	return p.Proxies[0].Kind.String() + " " + p.Name()
}

// where is "frontend www", "the servers of backend app", "port 8080", "the servers' port 8080".
func (s *spot) where() string {
	switch server := s.side == events.Outbound; {
	case s.place != nil && server:
		return "the servers of " + placeName(s.place)
	case s.place != nil:
		return placeName(s.place)
	case server:
		return fmt.Sprintf("the servers' port %d", s.port)
	}
	return fmt.Sprintf("port %d", s.port)
}

// peersName is what the peers at a spot are.
func (s *spot) peersName(n int) string {
	one := "client"
	if s.side == events.Outbound {
		one = "server"
	}
	if n != 1 {
		one += "s"
	}
	return one
}

func (d *diagnoser) findPiles() {
	for _, s := range d.spots {
		s.slots = d.slotsOf(s)
		n := len(s.past)
		s.isPile = d.judged && n > 0 || n >= pileMany || n >= pileFew && slices.ContainsFunc(s.slots, func(l *slots) bool {
			return n*pileShare >= l.limit
		})
		if s.isPile {
			d.piles = append(d.piles, s)
		}
	}
}

// holderOf is the process of HAProxy that holds a connection, nil if it is none.
func (d *diagnoser) holderOf(c *track.Conn) *haproxy.Process {
	if p := d.processes[c.Process.PID]; p != nil && c.Process.Known() {
		return p
	}
	if c.Place != nil {
		return c.Place.Process
	}
	return nil
}

// holders are the processes of HAProxy that hold a pile, each with how many.
func (d *diagnoser) holders(s *spot) map[*haproxy.Process]int {
	holders := map[*haproxy.Process]int{}
	for _, c := range s.past {
		if p := d.holderOf(c); p != nil {
			holders[p]++
		}
	}
	return holders
}

// successor is the worker that a reload has put in the place of an old one, and
// p itself where it is none or has none.
func (d *diagnoser) successor(p *haproxy.Process) *haproxy.Process {
	if !p.Old {
		return p
	}
	for i := range d.e.HAProxy {
		next := &d.e.HAProxy[i]
		if next.Old || next.Config == nil {
			continue
		}
		if p.Master != 0 && next.Master == p.Master || p.Config != nil && slices.Equal(next.Config.Files, p.Config.Files) {
			return next
		}
	}
	return p
}

// workers are the processes in a pile and those that reloads put in their
// place: what has to be mended is what runs from now on.
func (d *diagnoser) workers(s *spot) []*haproxy.Process {
	set := map[*haproxy.Process]bool{}
	for p := range d.holders(s) {
		set[d.successor(p)] = true
	}
	return byPID(maps.Keys(set))
}

func byPID(all func(func(*haproxy.Process) bool)) []*haproxy.Process {
	return slices.SortedFunc(all, func(a, b *haproxy.Process) int { return cmp.Compare(a.PID, b.PID) })
}

// countOf is how many there are of something.
type countOf struct {
	name string
	n    int
}

// countBy counts by name, the most frequent first.
func countBy[K comparable](conns []*track.Conn, key func(*track.Conn) K, name func(K) string) []countOf {
	counts := map[K]int{}
	for _, c := range conns {
		counts[key(c)]++
	}
	all := make([]countOf, 0, len(counts))
	for k, n := range counts {
		all = append(all, countOf{name(k), n})
	}
	slices.SortFunc(all, func(a, b countOf) int { return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.name, b.name)) })
	return all
}

// tallied is "haproxy[1] 38, haproxy[2] 2"; of one alone it is the name.
func tallied(all []countOf, most int) string {
	if len(all) == 1 {
		return all[0].name
	}
	words := make([]string, len(all))
	for i, c := range all {
		words[i] = fmt.Sprintf("%s %d", c.name, c.n)
	}
	return some(words, most)
}

// byPeer counts the peers of what is past its limit.
func (s *spot) byPeer() []countOf {
	if s.peers == nil {
		s.peers = byPeer(s.past)
	}
	return s.peers
}

func byPeer(conns []*track.Conn) []countOf {
	return countBy(conns, func(c *track.Conn) [16]byte { return c.Flow.Remote.Addr },
		func(a [16]byte) string { return events.Endpoint{Addr: a}.IP().String() })
}

func (d *diagnoser) byProcess(conns []*track.Conn) []countOf {
	type who struct {
		pid  uint32
		comm [16]byte
	}
	return countBy(conns, func(c *track.Conn) who { return who{c.Process.PID, c.Process.Comm} },
		func(w who) string {
			name := nameOrNot(events.Process{PID: w.pid, Comm: w.comm})
			if p := d.processes[w.pid]; p != nil && p.Old {
				name += " (old worker)"
			}
			return name
		})
}

// upTo is how long at most, as far as is known: "up to 2h13m", "2h13m or more".
func upTo(oldest *track.Conn) string {
	if oldest.SinceExact {
		return "up to " + Duration(oldest.Duration)
	}
	return atLeast(oldest.Duration) + " or more"
}

// from is who the peers are: " all from 10.0.0.22", " most (38) from 10.0.0.22", " from 17 addresses".
func (s *spot) from() string {
	peers := s.byPeer()
	preposition := "from"
	if s.side == events.Outbound {
		preposition = "at"
	}
	switch {
	case len(s.past) == 1:
		return preposition + " " + peers[0].name
	case len(peers) == 1:
		return fmt.Sprintf("all %s %s", preposition, peers[0].name)
	case peers[0].n*peerMost >= len(s.past)*(peerMost-1):
		return fmt.Sprintf("%d of them %s %s", peers[0].n, preposition, peers[0].name)
	}
	return fmt.Sprintf("%s %d addresses", preposition, len(peers))
}

// verdict is what one would say on the phone.
func (d *diagnoser) verdict() []string {
	if len(d.piles) > 0 {
		return d.pileVerdict()
	}
	for i := range d.findings {
		if f := &d.findings[i]; f.Severity > Info {
			lines := []string{sentence(f.Title)}
			for _, edit := range f.Fix {
				if len(edit.Lines) > 0 {
					return append(lines, fmt.Sprintf("Fix: %s: `%s`.", edit.String(), strings.TrimSpace(edit.Lines[0])))
				}
			}
			return lines
		}
	}
	return []string{d.calm()}
}

// sentence is a title with its first letter and its full stop. A name that is
// typed as it is, such as tcp_fin_timeout or haproxy[1], keeps its letters.
func sentence(text string) string {
	if first, _, _ := strings.Cut(text, " "); !strings.ContainsAny(first, "_[.") {
		text = strings.ToUpper(text[:1]) + text[1:]
	}
	return text + "."
}

// calm is the one line where nothing is wrong.
func (d *diagnoser) calm() string {
	n, nothing := len(d.e.Conns), "Nothing is stuck"
	if len(d.unlooked) > 0 || d.e.Lost > 0 {
		nothing = "Nothing that could be seen is stuck"
	}
	if n == 0 {
		return nothing + ": no connection is in FIN_WAIT2."
	}
	oldest := slices.MinFunc(d.e.Conns, func(a, b track.Conn) int { return oldestFirst(&a, &b) })
	limits := "none past its limit"
	switch {
	case len(d.closed) == n:
		limits = "all closed already"
	case d.stuck > 0:
		limits = fmt.Sprintf("no more than %d past their limit", d.stuck)
	}
	return fmt.Sprintf("%s: %d in FIN_WAIT2, %s, the oldest for %s.", nothing, n, limits, age(&oldest))
}
