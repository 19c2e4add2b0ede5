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

// timeouts is about those that let the piles grow, as a check finds them.
func (d *diagnoser) timeouts() {
	involved := map[*haproxy.Process]map[haproxy.Side]map[string]*spot{}
	for _, s := range d.piles {
		if s.place == nil {
			continue
		}
		for _, p := range d.workers(s) {
			if p.Config == nil {
				continue
			}
			if involved[p] == nil {
				involved[p] = map[haproxy.Side]map[string]*spot{haproxy.ClientSide: {}, haproxy.ServerSide: {}}
			}
			for _, px := range s.place.Proxies {
				involved[p][s.place.Side][px.Name] = s
			}
		}
	}
	for _, p := range byPID(maps.Keys(involved)) {
		k := &checker{process: p, config: p.Config}
		k.running()
		for _, f := range k.findings {
			d.add(f)
		}
		of := func(w *waiting) *spot { return involved[p][w.side][w.proxy.Name] }
		for _, group := range k.finGroups(func(w *waiting) bool { return of(w) != nil }) {
			f := k.finGroup(group)
			hold := "ever"
			if group[0].fin.Duration > 0 {
				hold = span(group[0].fin.Duration)
			}
			f.Why += " " + k.slots(&group[0], hold)
			n := 0
			for i := range group {
				s := of(&group[i])
				n += len(s.past)
				// It is as bad as what it has led to.
				f.Severity = max(f.Severity, s.severity())
			}
			f.Why += fmt.Sprintf(" %s silent now.", plural(uint64(n), "is", "are"))
			for i := range group {
				s := of(&group[i])
				s.causes = append(s.causes, f)
			}
			d.add(f)
		}
		k.unlooked = nil
		k.finUndecided()
		d.note(k.unlooked)
	}
}

// note takes what could not be decided.
func (d *diagnoser) note(lines []string) {
	for _, line := range lines {
		if !slices.Contains(d.unlooked, line) {
			d.unlooked = append(d.unlooked, line)
		}
	}
}

// slots are those of a frontend, or of a whole process, and what takes them.
type slots struct {
	what    string
	process *haproxy.Process
	proxy   *haproxy.Proxy // nil: the whole process
	held    int            // in FIN_WAIT2
	past    int            // those past their limit
	taken   int            // of held at least; all where known
	known   bool
	limit   int
}

// slotsOf are the slots that connections at a spot take: of the frontend, if it
// has a limit of its own, and of the process. An old worker's are nobody's loss.
func (d *diagnoser) slotsOf(s *spot) (all []*slots) {
	if s.place == nil {
		return nil
	}
	type held struct{ all, past int }
	byProcess := map[*haproxy.Process]*held{}
	count := func(conns []*track.Conn, add func(*held)) {
		for _, c := range conns {
			if p := d.holderOf(c); p != nil && !p.Old {
				if byProcess[p] == nil {
					byProcess[p] = &held{}
				}
				add(byProcess[p])
			}
		}
	}
	count(s.held, func(h *held) { h.all++ })
	count(s.past, func(h *held) { h.past++ })
	for _, p := range byPID(maps.Keys(byProcess)) {
		h := byProcess[p]
		if p.Config == nil {
			continue
		}
		global, known := (&checker{process: p, config: p.Config}).maxconnGlobal()
		if s.side == events.Inbound && s.place.Certain() {
			l := &slots{what: placeName(s.place), process: p, proxy: s.place.Proxies[0], held: h.all, past: h.past, taken: h.all}
			in := *s.place
			in.Process = p
			l.limit = in.Maxconn()
			for _, row := range p.Stats {
				if row.Proxy == l.proxy.Name && row.Server == "FRONTEND" && row.Scur >= 0 {
					l.taken, l.known = max(row.Scur, h.all), true // HAProxy was asked a little before.
				}
			}
			// Where the process has no more, it is that which is reached.
			if l.limit > 0 && (!known || l.limit < global) {
				all = append(all, l)
			}
		}
		if known {
			l := &slots{what: processLabel(p), process: p, held: h.all, past: h.past, taken: h.all, limit: global}
			if p.Info != nil && p.Info.CurrConns >= 0 {
				l.taken, l.known = max(p.Info.CurrConns, h.all), true
			}
			all = append(all, l)
		}
	}
	return all
}

// maxconn is about the slots that connections in FIN_WAIT2 take now, and about
// how many there are.
func (d *diagnoser) maxconn() {
	whole := map[*haproxy.Process]*slots{}
	lives := map[*haproxy.Process][]Lifetime{}
	concerned := map[*haproxy.Process]bool{}
	for _, s := range d.spots {
		for _, l := range s.slots {
			if s.isPile {
				concerned[l.process] = true
			}
			if l.proxy != nil {
				d.slots = append(d.slots, *l)
				d.pressure(l, s.growth, s.isPile, len(s.held))
				continue
			}
			lives[l.process] = append(lives[l.process], s.lives...)
			if all := whole[l.process]; all == nil {
				sum := *l
				whole[l.process] = &sum
			} else {
				all.held += l.held
				all.past += l.past
				all.taken = max(all.taken, all.held)
			}
		}
	}
	for _, p := range byPID(maps.Keys(whole)) {
		d.slots = append(d.slots, *whole[p])
		d.pressure(whole[p], GrowthOf(lives[p], d.e.Began, d.e.Ended), concerned[p], whole[p].held)
	}
	for _, p := range byPID(maps.Keys(concerned)) {
		if p.Config == nil {
			continue
		}
		k := &checker{process: p, config: p.Config}
		k.maxconn()
		d.note(k.unlooked)
		for _, f := range k.findings {
			unset := f.ID == "frontend-maxconn-unset" && slices.ContainsFunc(d.piles, func(s *spot) bool {
				return s.place != nil && s.side == events.Inbound &&
					slices.ContainsFunc(s.place.Proxies, func(px *haproxy.Proxy) bool { return px.Maxconn.Value <= 0 })
			})
			if unset || strings.HasPrefix(f.ID, "global-maxconn-") && f.ID != "global-maxconn-unset" {
				d.add(f)
			}
		}
	}
}

const day = 24 * time.Hour

// pressure is a finding where FIN_WAIT2 takes a fifth of the slots or more, and
// there is a pile or little room; or where its growth takes all within a day.
func (d *diagnoser) pressure(l *slots, growth Growth, pile bool, held int) {
	earliest, latest, grows := time.Duration(0), time.Duration(0), false
	if l.taken < l.limit && held >= pileFew {
		if earliest, latest, grows = growth.FullAt(l.taken, l.limit); earliest > day {
			grows = false
		}
	}
	tight := l.taken*5 >= l.limit*4
	if !grows && (l.held*5 < l.limit || !pile && !tight) {
		return
	}
	f := Finding{Severity: Warning, ID: "maxconn-pressure"}
	if l.taken*10 >= l.limit*9 || grows && earliest < time.Hour {
		f.Severity = Critical
	}
	taken := fmt.Sprintf("%d are taken in all", l.taken)
	if !l.known {
		taken = "how many are taken in all is not known"
	}
	if l.taken >= l.limit {
		taken = "it is full"
	}
	f.Title = fmt.Sprintf("FIN_WAIT2 holds %d of the %d slots of %s, and %s", l.held, l.limit, l.what, taken)
	if grows {
		f.Title += fmt.Sprintf("; as it grows (%+.2g a second), it is full in %s", growth.Rate, between(earliest, latest))
	}
	set := ""
	if l.proxy != nil {
		f.Where = []Location{{Pos: l.proxy.Pos, Text: fmt.Sprintf("%s: maxconn %d in force", l.proxy, l.limit)}}
		if n := l.proxy.Maxconn; n.Value == l.limit && n.IsSet() {
			f.Where[0] = Location{Pos: n.Pos, Text: n.Section + ": " + n.Text}
		}
		f.Why = fmt.Sprintf("When they are all taken, %s accepts nobody: new clients wait in the kernel's queue until it is full, and see timeouts then. The other frontends and the stats page still work.", l.proxy)
		set = fmt.Sprintf("set maxconn frontend %s %d", l.proxy.Name, 2*l.limit)
	} else {
		f.Where = []Location{{Text: fmt.Sprintf("%s: maxconn %d", l.what, l.limit)}}
		if n := l.process.Config.Global.Maxconn; n.Value == l.limit && n.IsSet() {
			f.Where[0] = Location{Pos: n.Pos, Text: "global: " + n.Text}
		}
		f.Why = "When they are all taken, the process accepts nothing any more: no frontend does, nor the stats page. A connection that is held half closed takes a slot like any other."
	}
	if pile {
		f.Fix = append(f.Fix, Edit{Text: "first what holds them, as in held-pile-up"})
	}
	if global, known := (&checker{process: l.process, config: l.process.Config}).maxconnGlobal(); set != "" && known && 2*l.limit < global {
		if socket := adminSocket(l.process.Config); socket != "" {
			f.Fix = append(f.Fix, Edit{Text: "for the time being", Lines: []string{fmt.Sprintf("echo '%s' | socat stdio %s", set, socket)}})
		}
	}
	f.Verify = "`show info` on HAProxy's socket: CurrConns falls; `show stat`: scur of the frontend's row does."
	d.add(f)
}

// between is "40s to 2m".
func between(earliest, latest time.Duration) string {
	if latest > day {
		return Duration(earliest) + " or more"
	}
	return Duration(earliest) + " to " + Duration(latest)
}

// adminSocket is a runtime socket that takes commands which change something.
func adminSocket(c *haproxy.Config) string {
	for _, s := range c.Global.StatsSockets {
		if strings.HasPrefix(s.Value, "/") && strings.Contains(s.Text, "level admin") {
			return s.Value
		}
	}
	return ""
}

// kernelTimers is about tcp_fin_timeout: where it matters, and where it does not
// although one would think so.
func (d *diagnoser) kernelTimers() {
	closed := map[uint32]int{}
	process := map[uint32]events.Process{}
	for _, c := range d.closed {
		closed[c.Netns]++
		if c.Process.Known() {
			process[c.Netns] = c.Process
		}
	}
	own, ownKnown := d.e.Settings[d.e.OwnNetns][events.SysctlFinTimeout]
	for _, netns := range slices.Sorted(maps.Keys(closed)) {
		if closed[netns] < pileMany {
			continue
		}
		s := &space{inode: netns, sysctls: d.e.Settings[netns]}
		if p := process[netns]; p.Known() {
			s.owner, s.pid = processName(p), int(p.PID)
		}
		for _, f := range d.checked.finTimeout(s) {
			d.add(f)
		}
		if here, ok := s.sysctls[events.SysctlFinTimeout]; ok && ownKnown && here != own && own != 60 && !d.checked.isOwn(s) {
			d.add(Finding{ID: "tcp-fin-timeout-elsewhere",
				Title: fmt.Sprintf("tcp_fin_timeout is %d here, and %d where %d closed connections are", own, here, closed[netns]),
				Where: []Location{d.checked.place(s, events.SysctlFinTimeout)},
				Why:   "Each network namespace has its own, and a container's is not the host's: what is set here does nothing there.",
				Fix:   []Edit{d.checked.set(s, events.SysctlFinTimeout, own)}})
		}
	}
	held := map[uint32]int{}
	for _, s := range d.piles {
		held[s.netns] += len(s.past)
	}
	for _, netns := range slices.Sorted(maps.Keys(held)) {
		n := held[netns]
		s := &space{inode: netns, sysctls: d.e.Settings[netns]}
		f := Finding{ID: "fin-timeout-no-help",
			Title: fmt.Sprintf("tcp_fin_timeout does nothing about the %d that are held", n),
			Why:   "It counts for what no process has any more. These are held by a process, whose own timeouts alone end them; after that the kernel keeps what is left, 250 bytes each, for as long as tcp_fin_timeout says.",
			Fix:   []Edit{{Text: "leave it as it is"}}}
		if seconds, ok := s.sysctls[events.SysctlFinTimeout]; ok {
			f.Where = []Location{d.checked.place(s, events.SysctlFinTimeout)}
			if seconds != 60 {
				f.Title += fmt.Sprintf(": it has been changed to %d, and they are still there", seconds)
				f.Fix = []Edit{d.checked.set(s, events.SysctlFinTimeout, 60)}
			}
		}
		d.add(f)
	}
}

// kernelTables is about tables that are full or nearly so, counters of what did
// not fit, and conntrack's, whose timers may be the shorter ones.
func (d *diagnoser) kernelTables() {
	for i := range d.e.Tables {
		t := &d.e.Tables[i]
		where := ""
		if t.Netns != 0 && t.Netns != d.e.OwnNetns {
			where = " in network namespace " + d.netnsName(t.Netns)
		}
		f := Finding{ID: "tables", Severity: Warning}
		switch {
		case t.Max == 0 && t.Count == 0, t.Max > 0 && t.Count*5 < t.Max*4:
			continue
		case t.Max == 0:
			f.Title = fmt.Sprintf("%s has risen by %d in %s%s", t.Name, t.Count, Duration(d.watched()), where)
			f.Why = counterMeans[t.Name]
		case t.Count >= t.Max:
			f.Severity = Critical
			f.Title = fmt.Sprintf("the table of %s is full%s: %d of %d", tableNames(t.Name), where, t.Count, t.Max)
		default:
			f.Title = fmt.Sprintf("the table of %s is nearly full%s: %d of %d", tableNames(t.Name), where, t.Count, t.Max)
		}
		f.Where = []Location{{Text: t.Name + where}}
		if m, ok := tableMeans[t.Name]; ok && t.Max > 0 {
			f.Why = m.why
			f.Where[0].Text = fmt.Sprintf("%s = %d%s", m.sysctl, t.Max, where)
			f.Fix = []Edit{d.checked.set(&space{inode: t.Netns}, m.sysctl, roomy(t.Max))}
			f.Verify = m.verify
		}
		d.add(f)
	}
	for _, s := range d.checked.spaces() {
		s.processes = slices.DeleteFunc(s.processes, func(p *haproxy.Process) bool {
			return !slices.ContainsFunc(d.piles, func(pile *spot) bool { return slices.Contains(d.workers(pile), p) })
		})
		if len(s.processes) > 0 {
			for _, f := range d.checked.conntrack(s) {
				d.add(f)
			}
		}
	}
}

func tableNames(name string) string {
	if name == "timewait" {
		return "timewait sockets"
	}
	return name
}

var tableMeans = map[string]struct{ sysctl, why, verify string }{
	"orphans": {events.SysctlMaxOrphans,
		"An orphan is a connection that its process has closed and that still has a full socket. Above the limit the kernel resets them, and what was not acknowledged yet is lost.",
		"`ss -s` has the number: orphaned."},
	"timewait": {events.SysctlMaxTWBuckets,
		"FIN_WAIT2 that are closed share it with TIME_WAIT. When it is full the kernel drops connections without a wait: a late FIN is answered with a reset, and FIN_WAIT2 looks better than it is.",
		"`ss -s` has the number: timewait."},
}

var counterMeans = map[string]string{
	"TCPTimeWaitOverflow": "Connections found no room in the table of timewait sockets (tcp_max_tw_buckets) and were dropped without a wait.",
	"TCPAbortOnMemory":    "Connections were reset for want of memory, or for too many orphans (tcp_max_orphans, tcp_mem).",
	"ListenOverflows":     "Clients were turned away as the queue of a listener was full: its program did not accept. HAProxy does not while its maxconn is reached.",
	"ListenDrops":         "Clients were turned away by a listener: its queue was full, or there was no memory. HAProxy does not accept while its maxconn is reached.",
}

func (d *diagnoser) netnsName(inode uint32) string {
	if name := d.e.Netns(inode); name != "" {
		return name
	}
	return fmt.Sprint(inode)
}

// closedHarmless is about what is in FIN_WAIT2 and belongs to nobody any more.
func (d *diagnoser) closedHarmless() {
	if len(d.closed) < pileMany {
		return
	}
	byStage := map[events.Stage]int{}
	sources := map[string]int{}
	var last time.Duration // until the last of them is gone
	for _, c := range d.closed {
		byStage[c.Stage]++
		sources[c.Limit.String()]++
		since := c.Orphaned + c.Minisock
		if !c.StagesKnown {
			since = 0 // When it was closed is not known: it may have been just now.
		}
		last = max(last, c.Limit.Duration+c.Limit.Slack-since)
	}
	minis, orphans := byStage[events.Minisock], byStage[events.Orphaned]
	var parts, costs []string
	if minis > 0 {
		parts = append(parts, plural(uint64(minis), "minisock", "minisocks"))
		costs = append(costs, fmt.Sprintf("a minisock costs some 250 bytes%s", d.fill("timewait", "tcp_max_tw_buckets")))
	}
	if orphans > 0 {
		parts = append(parts, plural(uint64(orphans), "orphan", "orphans"))
		costs = append(costs, fmt.Sprintf("an orphan costs a full socket's memory%s", d.fill("orphans", "tcp_max_orphans")))
	}
	f := Finding{ID: "closed-harmless",
		Title:  fmt.Sprintf("%d connections in FIN_WAIT2 are closed already (%s): they harm nobody, and are gone in %s", len(d.closed), listed(parts), Duration(max(last, 0))),
		Why:    fmt.Sprintf("No process has them, so they take no slot of maxconn and no descriptor: %s. Each also keeps its pair of ports. The kernel's timers end them; new ones come as long as peers leave theirs open.", listed(costs)),
		Fix:    []Edit{{Text: "none needed"}},
		Verify: "`fintrace list --stage minisock` shows other ones a few minutes later."}
	names := slices.SortedFunc(maps.Keys(sources), func(a, b string) int {
		return cmp.Or(cmp.Compare(sources[b], sources[a]), cmp.Compare(a, b))
	})
	for _, name := range names[:min(len(names), namesOfAll)] {
		f.Where = append(f.Where, Location{Text: fmt.Sprintf("%d end by %s", sources[name], name)})
	}
	d.add(f)
}

// fill is how full a table of the kernel is.
func (d *diagnoser) fill(table, sysctl string) string {
	for _, t := range d.e.Tables {
		if t.Name == table && t.Max > 0 && (t.Netns == 0 || t.Netns == d.e.OwnNetns) {
			return fmt.Sprintf(" and a place in %s (%d of %d)", sysctl, t.Count, t.Max)
		}
	}
	return " and a place in " + sysctl
}

// notSeen is what could not be seen, and how much that weakens the rest.
func (d *diagnoser) notSeen() {
	for _, s := range d.piles {
		for p := range d.holders(s) {
			d.note(p.Problems)
		}
	}
	if len(d.unlooked) == 0 && d.e.Lost == 0 {
		return
	}
	f := Finding{ID: "not-seen", Title: "not everything could be seen"}
	var why []string
	if n := len(d.unlooked); n > 0 {
		f.Title = plural(uint64(n), "thing", "things") + " could not be looked at"
		for _, line := range d.unlooked {
			f.Where = append(f.Where, Location{Text: line})
		}
		rest := "What was found stands, but there may be more."
		if len(d.findings) == 0 {
			rest = "That nothing was found means little for what they concern."
		}
		why = append(why, rest)
	}
	if d.e.Lost > 0 {
		f.Title = join(", and ", strings.TrimPrefix(f.Title, "not everything could be seen"),
			plural(d.e.Lost, "record of the kernel was lost", "records of the kernel were lost"))
		why = append(why, "What is there was looked at anew, so the numbers are right; rates, growth, bursts and cliffs, and who closed what, may be off by what was lost.")
	}
	f.Why = strings.Join(why, " ")
	d.findings = append(d.findings, f)
}
