// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// Checked is what a check looks at.
type Checked struct {
	// Processes with their configurations; PID 0 where there are only files.
	Processes []haproxy.Process
	// Sysctls by network namespace, as Process.Netns has it.
	Sysctls map[uint32]events.Sysctls
	// OwnNetns is the namespace where a command typed by the user acts.
	OwnNetns uint32
	Netns    func(inode uint32) string // "" if it has no name
}

// Check finds what configurations and sysctls get wrong about connections that
// wait for a FIN, and says in a line each what it could not decide.
func Check(in Checked) (findings []Finding, unlooked []string) {
	var files []string
	add := func(found []Finding, not []string) {
		for _, f := range found {
			// The workers of one HAProxy have the same to say.
			if !slices.ContainsFunc(findings, func(other Finding) bool { return same(&f, &other) }) {
				findings = append(findings, f)
			}
		}
		for _, line := range not {
			if !slices.Contains(unlooked, line) {
				unlooked = append(unlooked, line)
			}
		}
	}
	for i := range in.Processes {
		p := &in.Processes[i]
		if p.Config == nil {
			continue
		}
		k := &checker{process: p, config: p.Config}
		k.running()
		k.maxconn()
		k.descriptors()
		k.fin()
		k.ignored()
		k.hours()
		files = append(files, p.Config.Files...)
		add(k.findings, k.unlooked)
	}
	add(in.sysctls(), nil)
	SortFindings(findings, files)
	return findings, unlooked
}

func same(a, b *Finding) bool {
	return a.ID == b.ID && a.Title == b.Title && slices.Equal(a.Where, b.Where)
}

// checker looks at one process and its configuration.
type checker struct {
	process  *haproxy.Process
	config   *haproxy.Config
	findings []Finding
	unlooked []string
}

func (k *checker) add(f Finding) { k.findings = append(k.findings, f) }

// name is "haproxy[123]", or HAProxy where there are only files.
func (k *checker) name() string { return processLabel(k.process) }

func processLabel(p *haproxy.Process) string {
	if p.PID == 0 {
		return "HAProxy"
	}
	return fmt.Sprintf("haproxy[%d]", p.PID)
}

// enabled are the proxies that work; those that may be disabled are among them.
func (k *checker) enabled(may func(*haproxy.Proxy) bool) (proxies []*haproxy.Proxy) {
	for _, px := range k.config.Proxies {
		if may(px) && (!px.Disabled.Value || px.Disabled.Undecided) {
			proxies = append(proxies, px)
		}
	}
	return proxies
}

// connects says whether a proxy has somebody to connect to.
func connects(px *haproxy.Proxy) bool { return px.Connects() && len(px.Servers) > 0 }

// running compares what is in force with the files.
func (k *checker) running() {
	file := k.config.Global.Maxconn
	inForce, known := k.maxconnInForce()
	differs := known && file.IsSet() && !file.Undecided && file.Value != inForce && file.Value > 0
	if !differs && !k.process.Changed {
		return
	}
	f := Finding{ID: "running-configuration-differs",
		Title: fmt.Sprintf("%s may run another configuration than its files hold: one was written after it started", k.name()),
		Why:   "What follows is about the files as they are now.",
		Fix:   []Edit{{Text: "Reload HAProxy if the files are what it should run"}}}
	for _, name := range k.config.Files {
		f.Where = append(f.Where, Location{Pos: haproxy.Pos{File: name}})
	}
	if differs {
		f.Title = fmt.Sprintf("%s has maxconn %d in force, and its file says %d", k.name(), inForce, file.Value)
		f.Why = "It was given -n, told so over its socket, or started before the file was changed. What follows goes by what is in force."
		f.Where = []Location{{Pos: file.Pos, Text: file.Text}}
	}
	k.add(f)
}

// maxconnInForce is what the process itself says.
func (k *checker) maxconnInForce() (int, bool) {
	if info := k.process.Info; info != nil && info.Maxconn > 0 {
		return info.Maxconn, true
	}
	return 0, false
}

// maxconnGlobal is the process-wide limit; false if it is not known.
func (k *checker) maxconnGlobal() (int, bool) {
	if n, ok := k.maxconnInForce(); ok {
		return n, true
	}
	s := k.config.Global.Maxconn
	return s.Value, s.Value > 0 && !s.Undecided
}

// roomy is what a global maxconn should be where the frontends may have sum:
// two connections a session, and a tenth for what else there is.
func roomy(sum int) int {
	n := (sum*22 + 9) / 10
	step := 1
	for n/step >= 1000 {
		step *= 10
	}
	return (n + step - 1) / step * step
}

// frontends are the proxies that accept connections, by what limits them.
type frontends struct {
	own, none, undecided []*haproxy.Proxy
	sum                  int // of own
}

func (k *checker) frontends() (f frontends) {
	for _, px := range k.enabled((*haproxy.Proxy).Accepts) {
		switch {
		case px.Undecided || px.Maxconn.Undecided || px.Disabled.Undecided:
			f.undecided = append(f.undecided, px)
		case px.Maxconn.Value <= 0:
			f.none = append(f.none, px)
		default:
			f.own = append(f.own, px)
			f.sum += px.Maxconn.Value
		}
	}
	return f
}

// belowTwice is how bad a global maxconn is that covers the frontends but not
// twice. HAProxy counts a session once against it, for its client's connection
// (actconn, src/listener.c), so that the frontends can be full; that there are
// two connections to a session is a rule for sizing the process.
const belowTwice = Warning

func (k *checker) maxconn() {
	fe := k.frontends()
	k.maxconnUndecided(fe)
	if len(fe.own)+len(fe.none) == 0 {
		return
	}
	global, known := k.maxconnGlobal()
	file := k.config.Global.Maxconn
	k.frontendsWithout(fe, global, known)
	if !known {
		if !file.Undecided {
			k.maxconnUnset(fe)
		}
		return
	}
	// Those that can't be decided could only add to the sum, and those without
	// a limit make it endless.
	partial := len(fe.undecided)+len(fe.none) > 0
	who, them := counted(fe.own), "they"
	if len(fe.own) == 1 {
		who, them = fe.own[0].String(), "it"
	}
	twice, suggested := 2*fe.sum, roomy(fe.sum)
	f := Finding{ID: "global-maxconn-too-small", Severity: Critical,
		Where: k.maxconnPlaces(global, fe.own),
		Fix:   []Edit{k.globalEdit(fmt.Sprintf("maxconn %d", suggested))},
		Verify: fmt.Sprintf("after a reload, `show info` on HAProxy's socket says Maxconn: %d, and Ulimit-n at least twice that.",
			suggested)}
	arithmetic := fmt.Sprintf("A proxied session has two connections, one to each side: 2 × %d = %d, and %d with a tenth to spare.",
		fe.sum, twice, suggested)
	switch {
	case global < fe.sum:
		f.Title = fmt.Sprintf("global maxconn %d is less than the %d that %s may have%s", global, fe.sum, who, together(fe.own))
		f.Why = "It is reached before the frontends' own limits can protect anything, and then nothing is accepted any more, the stats page included. " + arithmetic
	case partial:
		return
	case global < twice:
		f.Severity = belowTwice
		f.Title = fmt.Sprintf("global maxconn %d is less than twice the %d that %s may have%s", global, fe.sum, who, together(fe.own))
		f.Why = fmt.Sprintf("%s HAProxy counts the client's alone against the limit, so %s can be full, but only %d are left for anything else; when none is, nothing is accepted, the stats page included.",
			arithmetic, them, global-fe.sum)
	case global == twice:
		f.ID, f.Severity = "global-maxconn-no-room", Info
		f.Title = fmt.Sprintf("global maxconn %d is exactly twice the %d that %s may have%s: it matches and works, without room", global, fe.sum, who, together(fe.own))
		f.Why = fmt.Sprintf("A proxied session has two connections, one to each side: 2 × %d = %d. About a tenth more leaves room for what else connects, and for the next frontend.",
			fe.sum, twice)
	default:
		return
	}
	k.add(f)
}

func together(proxies []*haproxy.Proxy) string {
	if len(proxies) > 1 {
		return " together"
	}
	return ""
}

// counted is "5 frontends" or "3 frontends and 2 listens".
func counted(proxies []*haproxy.Proxy) string {
	var parts []string
	for _, kind := range []haproxy.Kind{haproxy.Frontend, haproxy.Listen, haproxy.Backend} {
		n := 0
		for _, px := range proxies {
			if px.Kind == kind {
				n++
			}
		}
		if n > 0 {
			parts = append(parts, plural(uint64(n), kind.String(), kind.String()+"s"))
		}
	}
	return listed(parts)
}

const namesShown = 4

// proxyNames are the proxies' own: "frontend www, frontend api and 3 more".
func proxyNames(proxies []*haproxy.Proxy) string {
	words := make([]string, len(proxies))
	for i, px := range proxies {
		words[i] = px.String()
	}
	return some(words, namesShown)
}

// maxconnPlaces are where the limits are written, one place for those that
// share a line.
func (k *checker) maxconnPlaces(global int, own []*haproxy.Proxy) []Location {
	places := []Location{{Text: fmt.Sprintf("%s: Maxconn %d in force", k.name(), global)}}
	if file := k.config.Global.Maxconn; file.IsSet() && file.Value == global {
		places = []Location{{Pos: file.Pos, Text: "global: " + file.Text}}
	}
	if s := k.config.Global.Nbproc; s.Value > 1 {
		places = append(places, Location{Pos: s.Pos, Text: s.Text + ": each process has these limits for itself"})
	}
	groups := groupBy(own, func(px *haproxy.Proxy) haproxy.Pos { return px.Maxconn.Pos })
	for i, g := range groups {
		if i == namesShown && len(groups) > namesShown+1 {
			places = append(places, Location{Text: fmt.Sprintf("and %d lines more", len(groups)-i)})
			break
		}
		text := fmt.Sprintf("%s: %s", g[0].Maxconn.Section, g[0].Maxconn.Text)
		if g[0].Maxconn.Section != g[0].String() {
			text += ", for " + proxyNames(g)
		}
		places = append(places, Location{Pos: g[0].Maxconn.Pos, Text: text})
	}
	return places
}

// groupBy puts those with the same key together, in the order of the first.
func groupBy[T any, K comparable](all []T, key func(T) K) (groups [][]T) {
	at := map[K]int{}
	for _, one := range all {
		i, ok := at[key(one)]
		if !ok {
			i = len(groups)
			at[key(one)] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], one)
	}
	return groups
}

// globalEdit puts a line in the global section, for one with the same keyword
// if there is one.
func (k *checker) globalEdit(line string) Edit {
	g := &k.config.Global
	keyword, _, _ := strings.Cut(line, " ")
	e := Edit{Lines: []string{"    " + line}, Text: "in the section global"}
	if len(k.config.Files) > 0 {
		e.Text += " of " + k.config.Files[0]
	}
	for _, s := range []haproxy.Setting[int]{g.Maxconn, g.UlimitN, g.FDHardLimit, g.Nbproc, g.Nbthread} {
		switch {
		case !s.IsSet():
		case strings.HasPrefix(s.Text, keyword+" "):
			return Edit{Do: Replace, At: []haproxy.Pos{s.Pos}, Lines: e.Lines}
		case e.Do == In:
			e = Edit{Do: After, At: []haproxy.Pos{s.Pos}, Lines: e.Lines}
		}
	}
	if len(g.StatsSockets) > 0 && e.Do == In {
		e = Edit{Do: After, At: []haproxy.Pos{g.StatsSockets[0].Pos}, Lines: e.Lines}
	}
	return e
}

func (k *checker) maxconnUnset(fe frontends) {
	from := "the hard limit of descriptors (ulimit -Hn)"
	if s := k.config.Global.FDHardLimit; s.Value > 0 {
		from = fmt.Sprintf("the hard limit of descriptors, at most %d (fd-hard-limit)", s.Value)
	}
	f := Finding{ID: "global-maxconn-unset",
		Title: "global maxconn is unset: HAProxy computes it from " + from,
		Why:   "It comes to a little less than half of them (20000 give 9984), and changes with how HAProxy is started. Whether it covers the frontends cannot be told from the files.",
	}
	for _, name := range k.config.Files[:min(1, len(k.config.Files))] {
		f.Where = []Location{{Pos: haproxy.Pos{File: name}}}
	}
	if len(fe.none)+len(fe.undecided) == 0 {
		f.Why = fmt.Sprintf("It comes to a little less than half of them (20000 give 9984), and changes with how HAProxy is started. The frontends may have %d sessions, which is 2 × %d connections: %d leaves room.",
			fe.sum, fe.sum, roomy(fe.sum))
		f.Fix = []Edit{k.globalEdit(fmt.Sprintf("maxconn %d", roomy(fe.sum)))}
	}
	f.Verify = "`show info` on HAProxy's socket says what is in force: Maxconn."
	k.add(f)
}

// frontendsWithout is about frontends that have no maxconn: each may take all
// of the global one (proxy_adjust_all_maxconn() of src/proxy.c).
func (k *checker) frontendsWithout(fe frontends, global int, known bool) {
	if len(fe.none) == 0 {
		return
	}
	all := "all of the global one"
	if known {
		all = fmt.Sprintf("all %d of the global one", global)
	}
	f := Finding{ID: "frontend-maxconn-unset", Severity: Warning,
		Title: fmt.Sprintf("%s have no maxconn: each may take %s alone", counted(fe.none), all),
		Why:   "One of them that fills up takes the process with it: nothing is accepted any more, neither by the others nor by the stats page. With a limit only the one that is full stops accepting."}
	if len(fe.none) == 1 {
		f.Title = fmt.Sprintf("%s has no maxconn: it may take %s alone", fe.none[0], all)
		if len(fe.own)+len(fe.undecided) == 0 {
			f.Severity = Info // there is nobody else to suffer
			f.Why = "When it is full, so is the process: nothing is accepted any more, the stats page and what is added later included."
		}
	}
	shown := fe.none
	if len(shown) > namesShown+1 {
		shown = shown[:namesShown]
	}
	for _, px := range shown {
		f.Where = append(f.Where, Location{Pos: px.Pos, Text: px.String()})
	}
	if n := len(fe.none) - len(shown); n > 0 {
		f.Where = append(f.Where, Location{Text: fmt.Sprintf("and %d more", n)})
	}
	// What is left of half the global one, less the tenth, in equal parts.
	share := 0
	if known && len(fe.undecided) == 0 {
		share = (global*10/22 - fe.sum) / len(fe.none)
	}
	edit := Edit{Do: After, Text: "write for example (equal parts of what the global one has room for)"}
	if share < 1 {
		share = 1000
		edit.Text = "write for example (what each needs when it is busiest)"
	}
	for _, px := range fe.none {
		edit.At = append(edit.At, px.Pos)
	}
	edit.Lines = []string{fmt.Sprintf("    maxconn %d", share)}
	f.Fix = []Edit{edit}
	f.Verify = "`show stat` on HAProxy's socket has it as slim in the frontends' rows; smax is the most that was needed."
	k.add(f)
}

func (k *checker) maxconnUndecided(fe frontends) {
	if _, inForce := k.maxconnInForce(); !inForce && k.config.Global.Maxconn.Undecided {
		k.unlooked = append(k.unlooked, fmt.Sprintf("global maxconn (%s) depends on what only HAProxy knows: --haproxy-socket would tell", k.config.Global.Maxconn.Pos))
	}
	for _, px := range fe.undecided {
		pos := px.Pos
		if px.Maxconn.Undecided {
			pos = px.Maxconn.Pos
		}
		k.unlooked = append(k.unlooked, fmt.Sprintf("maxconn of %s (%s) depends on a condition or variable that only HAProxy knows, and is not in the sum", px, pos))
	}
}

// descriptorsNeeded is a lower bound of what a maxconn needs: HAProxy's own
// compute_ideal_maxsock() (src/haproxy.c, src/limits.c) takes two sockets a
// session, the listeners, 10 in reserve, and three for each thread; and checks,
// peers, pipes and the sockets for commands, which are left out here.
func (k *checker) descriptorsNeeded(maxconn int) int {
	n := 2*maxconn + 10
	for _, px := range k.enabled((*haproxy.Proxy).Accepts) {
		for _, b := range px.Binds {
			for _, a := range b.Addrs {
				n += 1 + int(a.Last) - int(a.First)
			}
		}
	}
	threads := max(1, k.config.Global.Nbthread.Value)
	if info := k.process.Info; info != nil && info.Nbthread > 0 {
		threads = info.Nbthread
	}
	return n + 3*threads
}

func (k *checker) descriptors() {
	maxconn, known := k.maxconnGlobal()
	if !known {
		return
	}
	g := &k.config.Global
	need := k.descriptorsNeeded(maxconn)
	ulimit, inForce := g.UlimitN.Value, false
	if info := k.process.Info; info != nil && info.UlimitN > 0 {
		ulimit, inForce = info.UlimitN, true
	}
	if ulimit > 0 && ulimit < need && (inForce || !g.UlimitN.Undecided) {
		f := Finding{ID: "ulimit-n-too-low", Severity: Critical,
			Title:  fmt.Sprintf("ulimit-n %d is too low for maxconn %d, which needs %d or more", ulimit, maxconn, need),
			Why:    "Each session needs two descriptors, and the process some of its own. They run out before maxconn is reached, and HAProxy then fails to accept or to connect.",
			Verify: "`show info` on HAProxy's socket: Ulimit-n is not less than Maxsock."}
		if g.UlimitN.IsSet() {
			f.Where = []Location{{Pos: g.UlimitN.Pos, Text: "global: " + g.UlimitN.Text}}
			f.Fix = []Edit{{Do: Delete, At: []haproxy.Pos{g.UlimitN.Pos}, Text: "(HAProxy computes it from maxconn)"}}
		} else {
			f.Where = []Location{{Text: fmt.Sprintf("%s: Ulimit-n %d in force", k.name(), ulimit)}}
			f.Fix = []Edit{{Text: "with `systemctl edit haproxy`, then restart it", Lines: []string{"[Service]", fmt.Sprintf("LimitNOFILE=%d", roomy(need/2))}}}
		}
		k.add(f)
	}
	hard := g.FDHardLimit
	if hard.Value <= 0 || hard.Undecided || !g.Maxconn.IsSet() && !g.UlimitN.IsSet() {
		return
	}
	wants := fmt.Sprintf("maxconn %d, which needs %d or more", maxconn, need)
	if s := g.UlimitN; s.Value > need && !s.Undecided {
		need, wants = s.Value, s.Text
	}
	if hard.Value < need {
		k.add(Finding{ID: "fd-hard-limit-too-low", Severity: Critical,
			Title:  fmt.Sprintf("fd-hard-limit %d is too low for %s", hard.Value, wants),
			Why:    "HAProxy refuses to start with more descriptors than its hard limit (before 2.3, or with `no strict-limits`, it starts and runs out of them). `haproxy -c` does not notice.",
			Where:  []Location{{Pos: hard.Pos, Text: "global: " + hard.Text}},
			Fix:    []Edit{{Do: Replace, At: []haproxy.Pos{hard.Pos}, Lines: []string{fmt.Sprintf("    fd-hard-limit %d", roomy((need+1)/2))}}},
			Verify: "HAProxy starts, and `show info` on its socket has Ulimit-n not less than Maxsock."})
	}
}

// What a half-closed connection may wait: a minute is what is advised, and five
// are more than any peer that still lives takes to close.
const (
	finAdvised = time.Minute
	finLong    = 5 * time.Minute
)

// waiting is a proxy's side with the timeout that ends half-closed connections there.
type waiting struct {
	proxy *haproxy.Proxy
	side  haproxy.Side
	fin   haproxy.FinTimeout
	http  bool
}

func (w *waiting) option() string { return w.side.String() + "-fin" }

// waits are all of them that can be told from the files.
func (k *checker) waits() (all []waiting) {
	for _, side := range []haproxy.Side{haproxy.ClientSide, haproxy.ServerSide} {
		may := (*haproxy.Proxy).Accepts
		if side == haproxy.ServerSide {
			may = connects
		}
		for _, px := range k.enabled(may) {
			if px.Mode.Value == haproxy.OtherMode {
				continue
			}
			w := waiting{px, side, k.config.FinTimeout(px, side, k.process.Version), px.Mode.Value == haproxy.HTTP}
			if !w.fin.By.Undecided && !px.Mode.Undecided {
				all = append(all, w)
			}
		}
	}
	return all
}

// silent is how bad it is that a peer can make HAProxy wait that long. In mode
// http few connections are ever held half closed: those whose client stalls in
// an upload, and upgraded ones.
func (w *waiting) silent() (s Severity, worth bool) {
	d := w.fin.Duration
	switch {
	case w.http && d == 0:
		return Warning, true
	case w.http:
		return Info, d > finLong
	case d == 0:
		return Critical, true
	case d > finLong:
		return Warning, true
	}
	return Info, d > finAdvised
}

// finUndecided says where it is not known how long HAProxy waits.
func (k *checker) finUndecided() {
	const only = "depends on a condition or variable that only HAProxy knows"
	for _, px := range k.config.Proxies {
		if px.Mode.Undecided {
			k.unlooked = append(k.unlooked, fmt.Sprintf("timeouts of %s: its mode (%s) %s", px, px.Mode.Pos, only))
			continue
		}
		for _, side := range []haproxy.Side{haproxy.ClientSide, haproxy.ServerSide} {
			if side == haproxy.ClientSide && !px.Accepts() || side == haproxy.ServerSide && !connects(px) {
				continue
			}
			if t := k.config.FinTimeout(px, side, k.process.Version); t.By.Undecided {
				k.unlooked = append(k.unlooked, fmt.Sprintf("how long a silent %s holds a session of %s: timeout %s (%s) %s",
					side, px, t.Name, t.By.Pos, only))
			}
		}
	}
}

func (k *checker) fin() {
	k.finUndecided()
	type key struct {
		side     haproxy.Side
		at       haproxy.Pos
		name     string
		http     bool
		severity Severity
	}
	var worth []waiting
	for _, w := range k.waits() {
		if _, ok := w.silent(); ok {
			worth = append(worth, w)
		}
	}
	for _, group := range groupBy(worth, func(w waiting) key {
		severity, _ := w.silent()
		at := w.fin.By.Pos
		if !w.fin.By.IsSet() {
			at = w.proxy.Pos
			at.Line, at.Column = 0, 0 // all that have none, file by file
		}
		return key{w.side, at, w.fin.Name, w.http, severity}
	}) {
		k.finGroup(group)
	}
}

// finGroup is about proxies that wait by the same line.
func (k *checker) finGroup(group []waiting) {
	w := &group[0]
	proxies := make([]*haproxy.Proxy, len(group))
	for i := range group {
		proxies[i] = group[i].proxy
	}
	severity, _ := w.silent()
	hold := "for " + span(w.fin.Duration)
	if w.fin.Duration == 0 {
		hold = "for ever"
	}
	peer, slot, other := "client", "its slot", "server"
	if w.side == haproxy.ServerSide {
		peer, slot, other = "server", "a session", "client"
	}
	holds := fmt.Sprintf("a %s that goes silent holds %s %s", peer, slot, hold)
	unset := fmt.Sprintf("timeout %s is unset", w.option())
	f := Finding{Severity: severity, ID: w.option() + "-unset", Title: unset + ": " + holds,
		Why: fmt.Sprintf("Once HAProxy has sent its FIN, the kernel has no timer for the %s's: only this one ends the wait. Until then the session keeps its place in maxconn, two descriptors, and the %s's side in CLOSE_WAIT.",
			peer, other)}
	if w.fin.By.IsSet() {
		f.Where = []Location{{Pos: w.fin.By.Pos, Text: w.fin.By.Section + ": " + w.fin.By.Text}}
		if w.fin.By.Section != w.proxy.String() || len(proxies) > 1 {
			f.Where[0].Text += ", for " + proxyNames(proxies)
		}
	} else {
		for _, px := range proxies[:min(len(proxies), namesShown)] {
			f.Where = append(f.Where, Location{Pos: px.Pos, Text: fmt.Sprintf("%s has no timeout %s either", px, w.side)})
		}
		if n := len(proxies) - namesShown; n > 0 {
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("and %d more", n)})
		}
	}
	side := "inbound"
	if w.side == haproxy.ServerSide {
		side = "outbound"
	}
	limit := finAdvised
	finLine := fmt.Sprintf("    timeout %s 60s", w.option())
	byFin := k.after(group, finLine)
	v := k.process.Version
	switch {
	case w.fin.Explicit():
		f.ID, f.Title = w.option()+"-long", fmt.Sprintf("%s is long: %s", w.fin.By.Text, holds)
		f.Fix = []Edit{{Do: Replace, At: []haproxy.Pos{w.fin.By.Pos}, Lines: []string{finLine}}}
	case w.http && w.fin.Name == "tunnel":
		limit = finLong
		f.ID = w.side.String() + "-tunnel-long"
		f.Title = fmt.Sprintf("a WebSocket whose %s goes silent holds %s %s", peer, slot, hold)
		f.Why = fmt.Sprintf("What was upgraded waits for its FIN by timeout tunnel, whatever %s says%s. Choose it a little longer than the application's pings are apart.", w.option(), since(w.side, v))
		f.Fix = []Edit{{Do: Replace, At: []haproxy.Pos{w.fin.By.Pos}, Lines: []string{"    timeout tunnel 5m"}}}
	case w.http:
		shorter := Edit{Do: Replace, At: []haproxy.Pos{w.fin.By.Pos}, Lines: []string{fmt.Sprintf("    timeout %s 60s", w.side)}}
		if !w.fin.By.IsSet() {
			shorter = k.after(group, shorter.Lines[0])
		}
		rare := fmt.Sprintf("In mode http this is rare (a %s that stalls halfway, or an upgraded connection), but such a session keeps its place in maxconn.", peer)
		f.Why = rare + " The kernel has no timer for it while HAProxy holds the socket."
		switch {
		case v.AtLeast(3, 0):
			f.ID = w.side.String() + "-timeout-long"
			f.Title = "in mode http " + holds
			f.Why = fmt.Sprintf("%s HAProxy 3.0 and later do not use %s here: timeout %s itself has to be shorter.", rare, w.option(), w.side)
			f.Fix = []Edit{shorter}
		case v.Known():
			f.Fix = []Edit{byFin}
		default:
			byFin.Text, shorter.Text = "(HAProxy before 3.0)", "(3.0 and later, where "+w.option()+" has no effect in mode http)"
			f.Fix = []Edit{byFin, shorter}
		}
	default:
		f.Fix = []Edit{byFin}
	}
	f.Verify = fmt.Sprintf("after a reload, `fintrace list --stage held --side %s --min-duration %s` stays empty.", side, span(limit+10*time.Second))
	k.add(f)
}

// since says from which version on a WebSocket waits for timeout tunnel.
func since(side haproxy.Side, v haproxy.Version) string {
	switch {
	case side == haproxy.ServerSide && v.AtLeast(3, 0), v.AtLeast(3, 2):
		return ""
	case side == haproxy.ServerSide:
		return " (HAProxy 3.0 and later)"
	}
	return " (HAProxy 3.2 and later)"
}

// after puts a line where it acts on all of a group: after the timeout of the
// same side that they share, or else at the head of each section.
func (k *checker) after(group []waiting, line string) Edit {
	e := Edit{Do: After, Lines: []string{line}}
	for i := range group {
		w := &group[i]
		pos := w.proxy.Pos
		if t := w.proxy.Timeouts[w.side.String()]; t.IsSet() {
			pos = t.Pos
		}
		if !slices.Contains(e.At, pos) {
			e.At = append(e.At, pos)
		}
	}
	return e
}

// ignored is about fin timeouts that act on no proxy that has them.
func (k *checker) ignored() {
	type line struct {
		setting haproxy.Setting[time.Duration]
		proxies []*haproxy.Proxy
		option  string
	}
	var lines []*line
	acts := map[haproxy.Pos]bool{}
	for _, w := range k.waits() {
		set := w.proxy.Timeouts[w.option()]
		if !slices.ContainsFunc(w.fin.Ignored, func(s haproxy.Setting[time.Duration]) bool { return s.Pos == set.Pos }) {
			acts[set.Pos] = true
			continue
		}
		i := slices.IndexFunc(lines, func(l *line) bool { return l.setting.Pos == set.Pos })
		if i < 0 {
			i = len(lines)
			lines = append(lines, &line{setting: set, option: w.option()})
		}
		lines[i].proxies = append(lines[i].proxies, w.proxy)
	}
	for _, l := range lines {
		if acts[l.setting.Pos] {
			continue
		}
		side := strings.TrimSuffix(l.option, "-fin")
		k.add(Finding{ID: "fin-timeout-ignored",
			Title: fmt.Sprintf("%s has no effect: HAProxy %d.%d does not use it in mode http", l.setting.Text, k.process.Version.Major, k.process.Version.Minor),
			Where: []Location{{Pos: l.setting.Pos, Text: fmt.Sprintf("%s: for %s", l.setting.Section, proxyNames(l.proxies))}},
			Why:   fmt.Sprintf("Since 3.0, half-closed connections in mode http wait for timeout %s, and upgraded ones for timeout tunnel. The line does no harm, but nothing relies on it.", side),
			Fix:   []Edit{{Text: fmt.Sprintf("none needed; what counts is timeout %s, and timeout tunnel", side)}},
		})
	}
}

// hours is about timeouts of an hour and more.
func (k *checker) hours() {
	type long struct {
		proxy *haproxy.Proxy
		name  string
		set   haproxy.Setting[time.Duration]
		http  bool
		falls *waiting // tcp: half-closed connections wait for it, too
	}
	waits := k.waits()
	var all []long
	for _, name := range []string{"client", "server", "tunnel"} {
		may := connects
		if name == "client" {
			may = (*haproxy.Proxy).Accepts
		}
		for _, px := range k.enabled(may) {
			set := px.Timeouts[name]
			if set.Value < time.Hour || set.Undecided || px.Mode.Undecided || px.Mode.Value == haproxy.OtherMode {
				continue
			}
			l := long{proxy: px, name: name, set: set, http: px.Mode.Value == haproxy.HTTP}
			for i := range waits {
				// A frontend may wait for the tunnel of its backend.
				if w := &waits[i]; !w.http && !w.fin.Explicit() && w.fin.By.Pos == set.Pos {
					l.falls = w
					break
				}
			}
			all = append(all, l)
		}
	}
	type key struct {
		pos  haproxy.Pos
		http bool
	}
	for _, group := range groupBy(all, func(l long) key { return key{l.set.Pos, l.http} }) {
		l := &group[0]
		proxies := make([]*haproxy.Proxy, len(group))
		for i := range group {
			proxies[i] = group[i].proxy
		}
		d := span(l.set.Value)
		f := Finding{ID: "timeout-" + l.name + "-hours",
			Title: fmt.Sprintf("timeout %s is %s: a connection may say nothing for that long", l.name, d),
			Where: []Location{{Pos: l.set.Pos, Text: l.set.Section + ": " + l.set.Text}}}
		if l.set.Section != l.proxy.String() || len(proxies) > 1 {
			f.Where[0].Text += ", for " + proxyNames(proxies)
		}
		keepalive := "srvtcpka"
		if l.name == "client" {
			keepalive = "clitcpka"
		}
		alive := Edit{Do: After, At: []haproxy.Pos{l.set.Pos}, Lines: []string{"    option " + keepalive},
			Text: "if sessions do have such pauses, to find the dead ones"}
		switch {
		case l.http && l.name == "tunnel":
			continue // As HAProxy's manual has it; -tunnel-long says what it does to a FIN.
		case l.http:
			f.Severity = Warning
			f.Why = fmt.Sprintf("In mode http this is the longest pause within a request or answer, and where nothing else is set between them; upgraded connections have timeout tunnel. Nothing needs hours here, and every silent %s keeps its slot.", l.name)
			f.Fix = []Edit{{Do: Replace, At: []haproxy.Pos{l.set.Pos}, Lines: []string{fmt.Sprintf("    timeout %s 60s", l.name)}}}
		case l.falls != nil:
			f.Severity = Warning
			f.Why = fmt.Sprintf("Half-closed connections wait for it too, since %s is unset. %s", l.falls.option(), k.slots(l.falls, d))
			f.Fix = []Edit{{Text: fmt.Sprintf("first as in %s-unset; then make this shorter, unless sessions do have such pauses", l.falls.option())}}
		default:
			f.Why = "Half-closed connections end sooner, by the -fin timeouts. A peer that vanished without a FIN keeps its session for all of it."
			if !l.proxy.Options[keepalive].Value {
				f.Fix = []Edit{alive}
			}
		}
		k.add(f)
	}
}

// slots says what silent peers can fill for how long.
func (k *checker) slots(w *waiting, d string) string {
	if n := w.proxy.Maxconn; w.side == haproxy.ClientSide && n.Value > 0 && !n.Undecided {
		return fmt.Sprintf("%s fill %s (maxconn %d) for %s.",
			plural(uint64(n.Value), "silent client", "silent clients"), w.proxy, n.Value, d)
	}
	if global, known := k.maxconnGlobal(); known {
		return fmt.Sprintf("%d silent %ss fill the whole process for %s.", global, w.side, d)
	}
	return fmt.Sprintf("Every silent %s takes a slot for %s.", w.side, d)
}

// space is a network namespace and the processes in it.
type space struct {
	inode     uint32
	processes []*haproxy.Process
	sysctls   events.Sysctls
}

func (in *Checked) sysctls() (findings []Finding) {
	var spaces []*space
	for i := range in.Processes {
		p := &in.Processes[i]
		at := slices.IndexFunc(spaces, func(s *space) bool { return s.inode == p.Netns })
		if at < 0 {
			at = len(spaces)
			spaces = append(spaces, &space{inode: p.Netns, sysctls: in.Sysctls[p.Netns]})
		}
		spaces[at].processes = append(spaces[at].processes, p)
	}
	for _, s := range spaces {
		findings = append(findings, in.finTimeout(s)...)
		findings = append(findings, in.tables(s)...)
		findings = append(findings, in.conntrack(s)...)
	}
	return findings
}

// place is a sysctl with its value, and whose namespace it is of.
func (in *Checked) place(s *space, name string) Location {
	text := fmt.Sprintf("%s = %d", name, s.sysctls[name])
	if in.isOwn(s) {
		return Location{Text: text}
	}
	where := fmt.Sprint(s.inode)
	if called := in.Netns(s.inode); called != "" {
		where = called
	}
	return Location{Text: fmt.Sprintf("%s in network namespace %s, of %s", text, where, processLabel(s.processes[0]))}
}

func (in *Checked) isOwn(s *space) bool { return s.inode == 0 || s.inode == in.OwnNetns }

// set is how a sysctl gets a value.
func (in *Checked) set(s *space, name string, value int) Edit {
	if !in.isOwn(s) && name != events.SysctlMaxOrphans {
		return Edit{Text: "in that namespace, and where it is made",
			Lines: []string{fmt.Sprintf("nsenter -t %d -n sysctl -w %s=%d", s.processes[0].PID, name, value)}}
	}
	return Edit{Text: "in /etc/sysctl.d/90-tcp.conf, then run sysctl --system",
		Lines: []string{fmt.Sprintf("%s = %d", name, value)}}
}

func (in *Checked) finTimeout(s *space) []Finding {
	seconds, ok := s.sysctls[events.SysctlFinTimeout]
	if !ok || seconds == 60 {
		return nil
	}
	value := time.Duration(seconds) * time.Second
	life := span(limits.Rules{}.For(events.Minisock, events.Timers{FinTimeout: value}, 0).Duration)
	half := span(value - limits.TimeWaitLen)
	const held = "Connections that HAProxy holds are not touched by it: their timers are its own."
	f := Finding{Where: []Location{in.place(s, events.SysctlFinTimeout)},
		Fix:    []Edit{in.set(s, events.SysctlFinTimeout, 60)},
		Verify: "`fintrace list --stage minisock` has nothing older than a minute."}
	switch {
	case value < limits.TimeWaitLen:
		f.ID = "tcp-fin-timeout-changed"
		f.Title = fmt.Sprintf("tcp_fin_timeout is %d, not 60: closed connections leave FIN_WAIT2 after %s", seconds, life)
		f.Why = "That saves little: a closed one is some 250 bytes and no slot of maxconn. " + held
	case value < 2*limits.TimeWaitLen:
		f.ID, f.Severity = "tcp-fin-timeout-trap", Warning
		f.Title = fmt.Sprintf("tcp_fin_timeout %d gives closed connections %s in FIN_WAIT2, not %ds", seconds, life, seconds)
		f.Why = fmt.Sprintf("Above 60 the kernel waits %s with the full socket and %s more without: twice what is above 60. %s", half, half, held)
	case value == 2*limits.TimeWaitLen:
		f.ID = "tcp-fin-timeout-changed"
		f.Title = fmt.Sprintf("tcp_fin_timeout is %d, not 60: closed connections leave FIN_WAIT2 after %s", seconds, life)
		f.Why = fmt.Sprintf("For the first %s each is an orphan with a full socket's memory. %s", half, held)
	default:
		f.ID, f.Severity = "tcp-fin-timeout-long", Warning
		f.Title = fmt.Sprintf("tcp_fin_timeout %d keeps closed connections in FIN_WAIT2 for %s", seconds, life)
		f.Why = fmt.Sprintf("For the first %s each is an orphan: a full socket's memory, counted in tcp_max_orphans. %s", half, held)
	}
	return []Finding{f}
}

// tables compares the kernel's tables with what HAProxy may close at once.
func (in *Checked) tables(s *space) (findings []Finding) {
	sessions, severity := 0, Warning
	for _, p := range s.processes {
		if p.Config == nil || p.Old {
			continue
		}
		k := &checker{process: p, config: p.Config}
		n, known := k.maxconnGlobal()
		if fe := k.frontends(); len(fe.none)+len(fe.undecided) == 0 && (!known || fe.sum < n) {
			n = fe.sum
		} else if !known {
			continue
		} else if p.Config.Global.Maxconn.Value <= 0 {
			severity = Info // Computed from the descriptors, whose limit may be out of all proportion.
		}
		sessions += n // Each process has its own; they share the tables.
	}
	// If all clients go silent at once and HAProxy's timers end the sessions,
	// each leaves one closed connection on the client's side: a minisock for up
	// to 60 s, and then or before it, while data or a FIN is not acknowledged,
	// an orphan. (Towards servers HAProxy resets.) So as many of either as there
	// can be sessions have to fit.
	for _, table := range []struct{ id, name, why string }{
		{"tcp-max-tw-buckets-too-small", events.SysctlMaxTWBuckets,
			"If that many sessions end together, the table is full: the kernel then drops connections that still wait for the peer's FIN (TCPTimeWaitOverflow counts them)."},
		{"tcp-max-orphans-too-small", events.SysctlMaxOrphans,
			"If that many clients vanish together, the kernel resets what is above the limit and loses the data not acknowledged yet (\"too many orphaned sockets\" in its log)."},
	} {
		value, ok := s.sysctls[table.name]
		if !ok || value >= sessions {
			continue
		}
		_, short, _ := strings.Cut(table.name, "ipv4.")
		findings = append(findings, Finding{ID: table.id, Severity: severity,
			Title:  fmt.Sprintf("%s %d is less than the %d sessions that HAProxy may have", short, value, sessions),
			Where:  []Location{in.place(s, table.name)},
			Why:    table.why,
			Fix:    []Edit{in.set(s, table.name, roomy(sessions))},
			Verify: "`ss -s` has the numbers of orphaned and timewait sockets."})
	}
	return findings
}

// conntrack compares its memory with how long HAProxy waits for a FIN.
//
// To conntrack our FIN, acknowledged, is CLOSE_WAIT; before, FIN_WAIT
// (tcp_conntracks of net/netfilter/nf_conntrack_proto_tcp.c). A FIN without an
// entry is INVALID.
func (in *Checked) conntrack(s *space) []Finding {
	if n, ok := s.sysctls[events.SysctlConntrackCount]; ok && n == 0 {
		return nil // Loaded, but nothing makes it follow connections here.
	}
	var longest *waiting
	length := func(w *waiting) time.Duration {
		if w.fin.Duration == 0 {
			return math.MaxInt64
		}
		return w.fin.Duration
	}
	for _, p := range s.processes {
		if p.Config == nil {
			continue
		}
		k := &checker{process: p, config: p.Config}
		for _, w := range k.waits() {
			if w.http || w.proxy.Undecided {
				continue // In mode http half-closed connections are rare.
			}
			if longest == nil || cmp.Compare(length(&w), length(longest)) > 0 {
				longest = &w
			}
		}
	}
	if longest == nil {
		return nil
	}
	f := Finding{ID: "conntrack-forgets-first", Severity: Warning}
	var shown []string
	closeWait, both := false, time.Duration(0)
	for _, name := range []string{events.SysctlConntrackCloseWait, events.SysctlConntrackFinWait} {
		seconds, ok := s.sysctls[name]
		d := time.Duration(seconds) * time.Second
		if !ok || d >= length(longest) {
			continue
		}
		closeWait = closeWait || name == events.SysctlConntrackCloseWait
		both = max(both, d)
		f.Where = append(f.Where, in.place(s, name))
		shown = append(shown, fmt.Sprintf("%s after %s", strings.TrimPrefix(name, "net.netfilter.nf_conntrack_tcp_timeout_"), span(d)))
	}
	if len(f.Where) == 0 {
		return nil
	}
	waits := "for ever"
	if longest.fin.Duration > 0 {
		waits = span(longest.fin.Duration)
	}
	f.Title = fmt.Sprintf("conntrack forgets half-closed connections sooner (%s) than HAProxy does (%s)", listed(shown), waits)
	f.Why = "A FIN that the peer sends after that belongs to no connection, and a stateful firewall drops it as INVALID. HAProxy then waits all of its own timeout."
	if !closeWait {
		f.Severity = Info
		f.Why = "This one counts until our FIN is acknowledged, or where conntrack sees one direction only. After it a stateful firewall drops the peer's packets as INVALID."
	}
	place := Location{Pos: longest.proxy.Pos, Text: longest.proxy.String()}
	if longest.fin.By.IsSet() {
		place = Location{Pos: longest.fin.By.Pos, Text: longest.fin.By.Section + ": " + longest.fin.By.Text}
	}
	f.Where = append(f.Where, place)
	if d := longest.fin.Duration; d > 0 && d <= finLong {
		for i := range f.Where[:len(shown)] {
			name, _, _ := strings.Cut(f.Where[i].Text, " ")
			f.Fix = append(f.Fix, in.set(s, name, int((d+time.Second-1)/time.Second)+10))
		}
	} else {
		text := fmt.Sprintf("as in %s-unset: with timeout %s 60s HAProxy is the first to let go", longest.option(), longest.option())
		if longest.fin.Explicit() {
			text = fmt.Sprintf("as in %s-long: with 60s HAProxy is the first to let go", longest.option())
		}
		f.Fix = []Edit{{Text: text}}
	}
	f.Verify = "`conntrack -L -p tcp --state CLOSE_WAIT` goes on showing what `fintrace list --stage held` shows."
	return []Finding{f}
}
