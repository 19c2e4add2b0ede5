// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	pilesShown = 5 // that have findings of their own
	namesOfAll = 3 // names in a list of those concerned
	// peerMost: a peer that has all but one in so many is behind the pile.
	peerMost = 5
	// peerFew: fewer may have one address by chance.
	peerFew = 5
)

// severity is how bad a pile is: it harms now where it takes half of the slots,
// and will where nothing ever ends it.
func (s *spot) severity() Severity {
	if slices.ContainsFunc(s.slots, func(l *slots) bool { return l.past*2 >= l.limit }) {
		return Critical
	}
	if s.place != nil {
		if t, known := s.place.Ends(); known && t.Duration == 0 {
			return Critical
		}
	}
	return Warning
}

// pileUps is about who holds how many, where, from whom and for how long.
func (d *diagnoser) pileUps() {
	for _, s := range d.piles[:min(pilesShown, len(d.piles))] {
		d.pileUp(s)
	}
	if len(d.piles) <= pilesShown {
		return
	}
	more := d.piles[pilesShown:]
	f := Finding{ID: "held-pile-up", Why: "As above."}
	n := 0
	for _, s := range more {
		n += len(s.past)
		f.Severity = max(f.Severity, s.severity())
		if len(f.Where) < pilesShown {
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("%s: %d", s.where(), len(s.past))})
		}
	}
	if len(more) > pilesShown {
		f.Where = append(f.Where, Location{Text: fmt.Sprintf("and %d more", len(more)-pilesShown)})
	}
	f.Title = fmt.Sprintf("%d connections are held past their limit at %d more places", n, len(more))
	f.Verify = "`fintrace list --stage held --group-by proxy,port` shows none overdue."
	d.add(f)
}

func (d *diagnoser) pileUp(s *spot) {
	n, oldest := len(s.past), s.past[0]
	processes := d.byProcess(s.past)
	who := fmt.Sprintf("%d processes hold", len(processes))
	if len(processes) == 1 {
		who = processes[0].name + " holds"
	}
	f := Finding{Severity: s.severity(), ID: "held-pile-up",
		Title: fmt.Sprintf("%s %s limit at %s, for %s, %s", who,
			plural(uint64(n), "connection past its", "connections past their"), s.where(), upTo(oldest), s.from())}
	within := ""
	if young := len(s.held) - n; young > 0 {
		within = fmt.Sprintf(", and %d within it", young)
	}
	if s.place != nil {
		for _, px := range s.place.Proxies {
			f.Where = append(f.Where, Location{Pos: px.Pos, Text: fmt.Sprintf("%s: %d past their limit%s", px, n, within)})
		}
	} else {
		f.Where = append(f.Where, Location{Text: fmt.Sprintf("%s: %d past their limit%s", s.where(), n, within)})
	}
	f.Where = append(f.Where, Location{Text: "held by " + tallied(processes, namesOfAll)})
	if s.side == events.Outbound {
		f.Where = append(f.Where, Location{Text: "to " + tallied(byServer(s.past), namesOfAll)})
	} else {
		f.Where = append(f.Where, Location{Text: "from " + tallied(s.byPeer(), namesOfAll)})
	}
	f.Where = append(f.Where, Location{Text: fmt.Sprintf("in FIN_WAIT2 for %s, half of them for %s, the youngest for %s",
		age(oldest), age(s.past[n/2]), age(s.past[n-1]))},
		Location{Text: "limit: " + oldest.Limit.String()})

	peers := s.peersName(2)
	if s.place != nil {
		f.Why = fmt.Sprintf("HAProxy has closed its direction, and the %s have acknowledged that but not closed theirs. While a process holds the sockets no timer of the kernel runs: %s.",
			peers, s.whatEnds())
	} else if s.unreadHAProxy() {
		f.Why = fmt.Sprintf("HAProxy has closed its direction, and the %s have acknowledged that but not closed theirs. While a process holds the sockets no timer of the kernel runs: only HAProxy's own does, and which that is here is not known.", peers)
	} else {
		f.Why = fmt.Sprintf("The program has shut its direction down, and the %s have acknowledged that but not closed theirs. While a process holds the sockets no timer of the kernel runs: only the program itself can end this.", peers)
	}
	for i := range s.causes {
		f.Fix = append(f.Fix, Edit{Text: fmt.Sprintf("as in %s", s.causes[i].ID)})
	}
	switch {
	case s.unreadHAProxy():
		f.Fix = append(f.Fix, Edit{Text: "in HAProxy's configuration, where that port is, if it is not there yet (mode tcp)", Lines: []string{"    timeout " + s.finOption() + " 60s"}})
	case s.place == nil:
		f.Fix = append(f.Fix, Edit{Text: "in the program: a timeout of its own after shutdown(), or close() in its place, which hands the socket to the kernel's timer"})
	}
	if line, ok := d.kill(s); ok {
		f.Fix = append(f.Fix, Edit{Text: "to end them at once, with the young ones there", Lines: []string{line}})
	}
	f.Verify = s.verify()
	d.add(f)
}

// unreadHAProxy says whether HAProxy holds a pile, and no configuration of its
// that could be read says where.
func (s *spot) unreadHAProxy() bool { return s.place == nil && haproxy.IsName(s.name) }

// finOption is what ends half-closed connections at a spot.
func (s *spot) finOption() string {
	if s.side == events.Outbound {
		return "server-fin"
	}
	return "client-fin"
}

func (s *spot) verify() string {
	limit := s.past[0].Limit.Duration
	if s.place != nil {
		limit = finAdvised
	}
	port := ""
	if s.place == nil {
		port = fmt.Sprintf(" --port %d", s.port)
	} else if s.place.Certain() {
		port = " --proxy " + s.place.Name()
	}
	return fmt.Sprintf("`fintrace list --stage held --side %s%s --min-duration %s` stays empty.", s.side, port, span(max(limit, finAdvised)+10*time.Second))
}

// whatEnds says which timeout of HAProxy ends the connections of a pile.
func (s *spot) whatEnds() string {
	t, known := s.place.Ends()
	switch {
	case !known:
		return "only HAProxy's own does, and which it runs with is not known"
	case t.Duration == 0:
		return "only HAProxy's own would, and none is set"
	case s.outlived(t):
		return fmt.Sprintf("only HAProxy's own does, `%s`. The oldest have outlived even that: such a peer goes on sending, and every byte starts the timeout anew; or HAProxy is stopped, or runs with another configuration", t.By.Text)
	}
	return fmt.Sprintf("only HAProxy's own does, `%s`", t.By.Text)
}

// outlived says whether some are older than what should have ended them.
func (s *spot) outlived(t haproxy.FinTimeout) bool {
	return !t.Uncertain && t.Duration > 0 && s.past[0].Duration > t.Duration+t.Duration/8+track.Grace
}

// byServer counts by address and port, and names the servers of HAProxy.
func byServer(conns []*track.Conn) []countOf {
	type to struct {
		at   events.Endpoint
		name string
	}
	return countBy(conns, func(c *track.Conn) to {
		if c.Place != nil {
			return to{c.Flow.Remote, c.Place.Server}
		}
		return to{c.Flow.Remote, ""}
	}, func(t to) string {
		if t.name == "" {
			return t.at.String()
		}
		return t.at.String() + " (" + t.name + ")"
	})
}

// kill is the command that ends a pile.
func (d *diagnoser) kill(s *spot) (string, bool) {
	port := s.past[0].ServicePort()
	if slices.ContainsFunc(s.past, func(c *track.Conn) bool { return c.ServicePort() != port }) {
		return "", false
	}
	expression := fmt.Sprintf("sport = :%d", port)
	if s.side == events.Outbound {
		expression = fmt.Sprintf("dport = :%d", port)
	}
	if peers := s.byPeer(); len(peers) == 1 {
		ip := s.past[0].Flow.Remote.IP()
		if ip.Is6() {
			expression += fmt.Sprintf(" and dst [%s]", ip)
		} else {
			expression += fmt.Sprintf(" and dst %s", ip)
		}
	}
	line := fmt.Sprintf("ss -tK state fin-wait-2 '%s'", expression)
	if s.netns == d.e.OwnNetns || s.netns == 0 {
		return line, true
	}
	for _, c := range s.past {
		if c.Process.Known() {
			return fmt.Sprintf("nsenter -t %d -n %s", c.Process.PID, line), true
		}
	}
	return "", false
}

// findMirrors finds the connections in the piles whose other end is here.
func (d *diagnoser) findMirrors() {
	d.mirror = make(map[[2]events.Endpoint][]*CloseWait, len(d.e.CloseWait))
	for i := range d.e.CloseWait {
		w := &d.e.CloseWait[i]
		key := [2]events.Endpoint{w.Flow.Remote, w.Flow.Local}
		d.mirror[key] = append(d.mirror[key], w)
	}
	for _, s := range d.piles {
		culprits := map[string]int{}
		for _, c := range s.past {
			if w := d.otherEnd(c); w != nil {
				s.local = append(s.local, c)
				culprits[nameOrNot(w.Process)]++
			}
		}
		for _, name := range slices.Sorted(maps.Keys(culprits)) {
			if culprits[name]*2 > len(s.past) {
				s.culprit = name
			}
		}
	}
}

// nameOrNot names a process in a sentence.
func nameOrNot(p events.Process) string {
	if !p.Known() {
		return "a process that was not found"
	}
	return processName(p)
}

// otherEnd is the connection in CLOSE_WAIT that is c seen from the other side.
// Addresses of loopback mean something in one namespace alone.
func (d *diagnoser) otherEnd(c *track.Conn) *CloseWait {
	for _, w := range d.mirror[[2]events.Endpoint{c.Flow.Local, c.Flow.Remote}] {
		if w.Netns == c.Netns || !c.Flow.Remote.IP().IsLoopback() {
			return w
		}
	}
	return nil
}

// localPeers is about processes here that have not closed their end: of what is
// held past its limit, or of what the other side has closed for good. The
// kernel forgets the latter after a minute, and they stay in CLOSE_WAIT.
func (d *diagnoser) localPeers() {
	type end struct {
		wait *CloseWait
		conn *track.Conn
		at   *spot // nil where the other side has closed
	}
	var all []end
	for _, s := range d.piles {
		for _, c := range s.local {
			all = append(all, end{d.otherEnd(c), c, s})
		}
	}
	for _, c := range d.closed {
		if w := d.otherEnd(c); w != nil && c.Duration >= pileAge {
			all = append(all, end{w, c, nil})
		}
	}
	holds := map[uint32]int{} // in FIN_WAIT2 past their limit
	for _, s := range d.piles {
		for _, c := range s.past {
			holds[c.Process.PID]++
		}
	}
	for _, group := range groupBy(all, func(e end) string { return nameOrNot(e.wait.Process) }) {
		first := group[0]
		if len(group) < pileFew {
			continue
		}
		name := nameOrNot(first.wait.Process)
		f := Finding{Severity: Warning, ID: "local-peer",
			Title:  fmt.Sprintf("%s on this host has not closed its end of %d connections: it has them in CLOSE_WAIT, which keeps the other ends in FIN_WAIT2", name, len(group)),
			Why:    "The other side's FIN has arrived, so read() returns 0 there; what is missing is the close() that has to follow. No timer of the kernel ends CLOSE_WAIT.",
			Fix:    []Edit{{Text: "in that program: close() when the peer has closed; a restart of it frees what is there now"}},
			Verify: "`ss -tnp state close-wait` does not show it any more."}
		if other := holds[first.wait.Process.PID]; first.wait.Process.Known() && other > 0 {
			f.Why = fmt.Sprintf("It holds %d connections in FIN_WAIT2 itself: a proxy that waits for those peers before it closes here. When they go, these do.", other)
			f.Fix = []Edit{{Text: "there, as its own pile in FIN_WAIT2 is the cause of this"}}
		}
		flow := first.wait.Flow
		f.Where = []Location{{Text: fmt.Sprintf("CLOSE_WAIT of %s: %d, such as %s to %s", name, len(group), flow.Local, flow.Remote)}}
		held := map[*spot]int{}
		for _, e := range group {
			held[e.at]++
		}
		for _, s := range d.piles {
			if held[s] == 0 {
				continue
			}
			if s.culprit == name {
				f.Severity = max(f.Severity, s.severity())
			}
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("FIN_WAIT2 at %s, held by %s: %d", s.where(), tallied(d.byProcess(s.local), namesOfAll), held[s])})
		}
		if n := held[nil]; n > 0 {
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("FIN_WAIT2 that the other side has closed: %d", n)})
		}
		d.add(f)
	}
}

// peers says which side it is that does not close, and whether it is one.
func (d *diagnoser) peers() {
	var remote []*track.Conn // clients' connections of piles whose other end is not here
	ports := map[uint16]int{}
	var where []Location
	high := 0
	for _, s := range d.piles {
		if s.side != events.Inbound || s.culprit != "" {
			continue
		}
		for _, c := range s.past {
			remote = append(remote, c)
			ports[c.Flow.Remote.Port]++
			if c.Flow.Remote.Port >= ephemeral {
				high++
			}
		}
		where = append(where, Location{Text: fmt.Sprintf("%s: %s", s.where(), examples(s.past))})
		d.peerIsOne(s)
	}
	// A client has a new port for each connection; a proxy that answers from
	// one port, or one below 1024, would be something else.
	n := len(remote)
	if n == 0 || high*10 < n*9 || len(ports)*2 < n {
		return
	}
	if more := len(where) - namesOfAll; more > 0 {
		where = append(where[:namesOfAll], Location{Text: fmt.Sprintf("and at %d more places", more)})
	}
	who := "the peers are clients here, whatever their names say: they connect"
	if peers := byPeer(remote); len(peers) == 1 {
		who = peers[0].name + " is a client here, whatever its name says: it connects"
	}
	d.add(Finding{ID: "peer-is-client", Where: where,
		Title: who + " from high ports to the port that is listened on",
		Why:   "It is the client's side that does not close, so timeouts for servers (timeout server, server-fin) and the servers' own settings do nothing about it: the client's do (client-fin, timeout client)."})
}

// ephemeral is the first port that programs get who ask for none; below it are
// those that take a privilege.
const ephemeral = 1024

func examples(conns []*track.Conn) string {
	words := make([]string, 0, namesOfAll)
	for _, c := range conns[:min(2, len(conns))] {
		words = append(words, fmt.Sprintf("%s to :%d", c.Flow.Remote, c.Flow.Local.Port))
	}
	if more := len(conns) - len(words); more > 0 {
		words = append(words, fmt.Sprintf("%d more", more))
	}
	return listed(words)
}

func (d *diagnoser) peerIsOne(s *spot) {
	peers := s.byPeer()
	n, all := peers[0].n, len(s.past)
	if all < peerFew || n*peerMost < all*(peerMost-1) {
		return
	}
	d.add(Finding{ID: "peer-is-one",
		Title: fmt.Sprintf("%s has %d of the %d connections held at %s (%d%%): one machine, or what stands in front of many", peers[0].name, n, all, s.where(), n*100/all),
		Where: []Location{{Text: "from " + tallied(peers, namesOfAll)}},
		Why:   "Clients at large have many addresses. A single one is a proxy, a NAT gateway or a load balancer in front, or one program with a pool of connections; it is there that connections are not closed.",
		Fix:   []Edit{{Text: fmt.Sprintf("on %s, look at its own timeouts and at what it does when its peer has closed (half-closed connections, keep-alive pools); a NAT that forgets connections sooner than they end drops the FIN", peers[0].name)}}})
}

// oldWorkers is about workers that a reload has replaced and that cannot end.
func (d *diagnoser) oldWorkers() {
	type left struct {
		process *haproxy.Process
		next    *haproxy.Process
		past    int
		oldest  *track.Conn
		at      []string
	}
	byProcess := map[*haproxy.Process]*left{}
	for _, s := range d.spots {
		for _, c := range s.past {
			p := d.holderOf(c)
			if p == nil || !p.Old {
				continue
			}
			l := byProcess[p]
			if l == nil {
				l = &left{process: p, next: d.successor(p), oldest: c}
				byProcess[p] = l
			}
			l.past++
			if c.Duration > l.oldest.Duration {
				l.oldest = c
			}
			if where := s.where(); !slices.Contains(l.at, where) {
				l.at = append(l.at, where)
			}
		}
	}
	var all []*left
	for _, p := range byPID(maps.Keys(byProcess)) {
		all = append(all, byProcess[p])
	}
	for _, group := range groupBy(all, func(l *left) *haproxy.Process { return l.next }) {
		n, names, pids := 0, []string{}, []string{}
		f := Finding{ID: "old-workers"}
		for _, l := range group {
			n += l.past
			names, pids = append(names, processLabel(l.process)), append(pids, fmt.Sprint(l.process.PID))
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("%s: %d at %s, for %s", processLabel(l.process), l.past, listed(l.at), upTo(l.oldest))})
		}
		if n >= pileFew {
			f.Severity = Warning
		}
		subject := "old worker " + names[0] + " still holds"
		if len(group) > 1 {
			subject = fmt.Sprintf("%d old workers still hold", len(group))
		}
		f.Title = fmt.Sprintf("%s %s past their limit: a reload has replaced it, and it cannot end", subject, plural(uint64(n), "connection", "connections"))
		if len(group) > 1 {
			f.Title = strings.Replace(f.Title, "replaced it, and it", "replaced them, and they", 1)
		}
		f.Why = "After a reload a worker goes on until its last connection is closed, with the settings that it was started with: new timeouts do not reach what it holds. It takes memory and descriptors, but no slots of the new one."
		next := group[0].next
		if next.Config != nil {
			if hard := next.Config.Global.HardStopAfter; hard.IsSet() {
				f.Where = append(f.Where, Location{Pos: hard.Pos, Text: "global: " + hard.Text})
				f.Why += fmt.Sprintf(" `%s` ends it, if it was there when the worker was started.", hard.Text)
			} else {
				f.Why += " hard-stop-after, which would end it, is unset."
				k := &checker{process: next, config: next.Config}
				edit := k.globalEdit("hard-stop-after 15m")
				edit.Text = join(" ", edit.Text, "(longer than sessions last that may not be cut off)")
				f.Fix = append(f.Fix, edit)
			}
		}
		f.Fix = append(f.Fix, Edit{Text: "to end what is there now, with all that it still serves", Lines: []string{"kill -TERM " + strings.Join(pids, " ")}})
		f.Verify = "`fintrace list --group-by process` shows no old worker some time after a reload."
		d.add(f)
	}
}

// closeWaitTwins is about the other connections of the sessions in a pile.
func (d *diagnoser) closeWaitTwins() {
	type who struct {
		pid  uint32
		side events.Side
	}
	pinning := map[who]int{}
	youngest := map[who]time.Duration{}
	for _, s := range d.piles {
		for _, c := range s.past {
			if !c.Process.Known() {
				continue
			}
			w := who{c.Process.PID, s.side}
			if y, ok := youngest[w]; !ok || c.Duration < y {
				youngest[w] = c.Duration
			}
			pinning[w]++
		}
	}
	opposite := map[events.Side]events.Side{events.Inbound: events.Outbound, events.Outbound: events.Inbound}
	type twin struct {
		wait *CloseWait
		who  who
	}
	var twins []twin
	for i := range d.e.CloseWait {
		c := &d.e.CloseWait[i]
		w := who{c.Process.PID, opposite[c.Side]}
		// Its peer's FIN came before ours went out on the other side.
		if c.IdleAtLeast == 0 || c.IdleAtLeast+track.Grace >= youngest[w] {
			twins = append(twins, twin{c, w})
		}
	}
	for _, group := range groupBy(twins, func(t twin) who { return t.who }) {
		first, held := group[0], pinning[group[0].who]
		n := min(len(group), held) // A session has one.
		if n < pileFew {
			continue
		}
		name, at := processName(first.wait.Process), "servers"
		if first.wait.Side == events.Inbound {
			at = "clients"
		}
		d.add(Finding{ID: "close-wait-twins",
			Title: fmt.Sprintf("%s has %d connections in CLOSE_WAIT towards %s: the other sides of the %d that it holds in FIN_WAIT2", name, n, at, held),
			Where: []Location{{Text: fmt.Sprintf("such as %s to %s", first.wait.Flow.Local, first.wait.Flow.Remote)}},
			Why:   fmt.Sprintf("They are the same sessions: each silent peer costs two descriptors. The %s have closed and are not to blame, and these go when the FIN_WAIT2 go.", at),
			Fix:   []Edit{{Text: "none of their own"}}})
	}
}

// pileVerdict is about the largest pile.
func (d *diagnoser) pileVerdict() []string {
	s := d.piles[0]
	n := len(s.past)
	process := tallied(d.byProcess(s.past), namesOfAll)
	var what string
	switch {
	case s.culprit != "":
		what = fmt.Sprintf("%s on this host has not closed its end of %d connections: they wait for that in FIN_WAIT2 at %s, for %s, held by %s.",
			s.culprit, len(s.local), s.where(), upTo(s.past[0]), process)
	case s.place != nil && s.side == events.Inbound:
		what = fmt.Sprintf("%d %s at %s have been silent for %s since HAProxy closed, %s: %s.",
			n, s.peersName(n), s.where(), upTo(s.past[0]), s.from(), d.consequence(s))
	case s.place != nil:
		what = fmt.Sprintf("%d connections to %s have been silent for %s since HAProxy closed, %s: %s.",
			n, s.where(), upTo(s.past[0]), s.from(), d.consequence(s))
	default:
		ends := "nothing but the program itself ends them"
		if s.unreadHAProxy() {
			ends = "which timeout ends them is not known, as no configuration that could be read has this port"
		}
		what = fmt.Sprintf("%s holds %d connections in FIN_WAIT2 at %s, for %s, %s: %s.",
			process, n, s.where(), upTo(s.past[0]), s.from(), ends)
	}
	if strings.HasPrefix(what, "a ") {
		what = "A" + what[1:]
	}
	lines := []string{what, d.advice(s)}
	if others := d.piles[1:]; len(others) > 0 {
		more := 0
		for _, o := range others {
			more += len(o.past)
		}
		lines = append(lines, fmt.Sprintf("%s held at %s.", plural(uint64(more), "more connection is", "more connections are"),
			plural(uint64(len(others)), "other place", "other places")))
	}
	return lines
}

// consequence is what a pile of HAProxy's takes, and what ends it.
func (d *diagnoser) consequence(s *spot) string {
	takes := ""
	switch {
	case d.allOld(s):
		takes = "an old worker that a reload has replaced holds them"
	case len(s.slots) > 0:
		l := s.slots[0]
		takes = fmt.Sprintf("they hold %d of its %d slots", l.past, l.limit)
		if l.proxy == nil {
			takes = fmt.Sprintf("they hold %d of the %d slots of %s", l.past, l.limit, l.what)
		}
	}
	t, known := s.place.Ends()
	switch {
	case !known:
		return join(", ", takes, "and what ends them is not known, as the configuration has changed since")
	case t.Duration == 0:
		return join(", ", takes, "and nothing ends them")
	case s.outlived(t):
		return join(", ", takes, fmt.Sprintf("and `%s` should have ended them", t.By.Text))
	}
	return join(", ", takes, fmt.Sprintf("and nothing but `%s` ends them", t.By.Text))
}

// allOld says whether only old workers hold a pile.
func (d *diagnoser) allOld(s *spot) bool {
	return !slices.ContainsFunc(s.past, func(c *track.Conn) bool {
		p := d.holderOf(c)
		return p == nil || !p.Old
	})
}

// advice is what to do first about a pile.
func (d *diagnoser) advice(s *spot) string {
	now := "."
	if line, ok := d.kill(s); ok {
		now = fmt.Sprintf("; `%s` ends them at once.", line)
	}
	finding := func(id string) *Finding {
		for i := range d.findings {
			if d.findings[i].ID == id {
				return &d.findings[i]
			}
		}
		return nil
	}
	switch {
	case s.culprit != "":
		return fmt.Sprintf("Make it close when its peer has closed; a restart of %s ends them now.", s.culprit)
	case len(s.causes) > 0 && len(s.causes[0].Fix) > 0 && len(s.causes[0].Fix[0].Lines) > 0:
		edit := s.causes[0].Fix[0]
		text := fmt.Sprintf("Set `%s` (%s) and reload", strings.TrimSpace(edit.Lines[0]), edit.short())
		if d.allOld(s) {
			text += fmt.Sprintf(", and `%s`, as no reload changes what an old worker does", lastLine(finding("old-workers")))
		}
		return text + "."
	case d.allOld(s):
		text := fmt.Sprintf("`%s` ends them", lastLine(finding("old-workers")))
		if len(finding("old-workers").Fix) > 1 {
			text += "; `hard-stop-after` in global does so after every reload"
		}
		return text + "."
	case finding("running-configuration-differs") != nil:
		return "Reload HAProxy: its files have changed since it was started" + now
	case s.unreadHAProxy():
		return fmt.Sprintf("`timeout %s` belongs where HAProxy has that port; with --haproxy-config FILE this says more%s", s.finOption(), now)
	case s.place == nil:
		return "The program needs a timeout of its own for this" + now
	}
	return "See held-pile-up below" + now
}

// lastLine is the last command of a finding.
func lastLine(f *Finding) string { return f.Fix[len(f.Fix)-1].Lines[0] }

// short is where an edit goes, with the names of files alone.
func (e Edit) short() string {
	var at []string
	for _, pos := range e.At {
		at = append(at, pos.Short())
	}
	place := some(at, namesOfAll)
	if e.Do == After {
		place = "after " + place
	}
	if place == "" {
		place = e.Text
	}
	return place
}
