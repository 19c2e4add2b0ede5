// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/haproxy"
)

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
	http := func(px *haproxy.Proxy) bool { return px.Mode.Value == haproxy.HTTP }
	if !k.process.Version.Known() && len(k.enabled(http)) > 0 {
		k.unlooked = append(k.unlooked, "which version of HAProxy it is: how long it waits for a FIN in mode http depends on that; --haproxy-version tells")
	}
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
	for _, group := range k.finGroups(func(*waiting) bool { return true }) {
		k.add(k.finGroup(group))
	}
}

// finGroups are those wanted that can make HAProxy wait too long, together where
// they do by the same line.
func (k *checker) finGroups(wanted func(*waiting) bool) [][]waiting {
	type key struct {
		side     haproxy.Side
		at       haproxy.Pos
		name     string
		http     bool
		severity Severity
	}
	var worth []waiting
	for _, w := range k.waits() {
		if _, ok := w.silent(); ok && wanted(&w) {
			worth = append(worth, w)
		}
	}
	return groupBy(worth, func(w waiting) key {
		severity, _ := w.silent()
		at := w.fin.By.Pos
		if !w.fin.By.IsSet() {
			at = w.proxy.Pos
			at.Line, at.Column = 0, 0 // all that have none, file by file
		}
		return key{w.side, at, w.fin.Name, w.http, severity}
	})
}

// finGroup is about proxies that wait by the same line.
func (k *checker) finGroup(group []waiting) Finding {
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
	return f
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
		return fmt.Sprintf("%d sessions with a silent %s fill the whole process for %s.", global, w.side, d)
	}
	return fmt.Sprintf("Every silent %s takes a slot for %s.", w.side, d)
}
