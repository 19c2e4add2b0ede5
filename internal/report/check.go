// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"slices"
	"strings"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
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
	tight := share < 1
	edit := Edit{Do: After, Text: "write for example (equal parts of what the global one has room for)"}
	if tight {
		share = 1000
		edit.Text = "write for example (what each needs when it is busiest)"
	}
	for _, px := range fe.none {
		edit.At = append(edit.At, px.Pos)
	}
	edit.Lines = []string{fmt.Sprintf("    maxconn %d", share)}
	f.Fix = []Edit{edit}
	if tight && len(fe.undecided) == 0 && !k.config.Global.Maxconn.Undecided {
		f.Fix = append(f.Fix, k.globalEdit(fmt.Sprintf("maxconn %d", roomy(fe.sum+share*len(fe.none)))))
	}
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
