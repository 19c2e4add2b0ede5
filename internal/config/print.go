// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"io"
	"maps"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// Print says in words what is in force, for people. It shows no secrets, and of
// URLs no more than their hosts.
func (c *Config) Print(w io.Writer) error {
	p := printer{}
	if c.name == "" {
		p.line("There is no configuration file: the defaults hold.")
	} else {
		p.line("%s is in order. In force is:", c.name)
	}

	p.head("HAProxy")
	p.item("configuration", or(strings.Join(c.HAProxy.Config, ", "), "found by its running processes"))
	p.item("runtime socket", or(c.HAProxy.Socket, "found by its configuration"))

	p.head("Limits, of which the first that applies to a connection is its own")
	for i := range c.Limits {
		p.rule(&c.Limits[i], fmt.Sprintf("%s:%d", filepath.Base(c.name), c.lines[i]))
	}
	p.numbered("held by HAProxy", "its timeout client-fin or server-fin; where these do not act, the",
		"timeout that does, unless it is longer than net.ipv4.tcp_fin_timeout")
	p.numbered("held by any", "net.ipv4.tcp_fin_timeout")
	p.numbered("orphaned, minisock", "the kernel's own timer")

	a := &c.Alerts
	p.head("Alerts")
	fire := "at " + connections(a.MinConnections) + " past the limit"
	if a.MaxconnShare > 0 {
		fire += ", or at " + strconv.FormatFloat(100*a.MaxconnShare, 'g', 6, 64) + "% of a frontend's maxconn"
	}
	p.item("fire", fire)
	if a.PeersPerGroup > 0 {
		p.item("peers", fmt.Sprintf("%d of a group by themselves, the rest together", a.PeersPerGroup))
	} else {
		p.item("peers", "all of a group together")
	}
	p.item("update", "every "+short(a.UpdateEvery)+" at most")
	if a.RepeatEvery > 0 {
		p.item("repeat", "every "+short(a.RepeatEvery))
	} else {
		p.item("repeat", "never")
	}
	p.item("resolve", "after "+short(a.ResolveAfter)+" of quiet")
	p.item("remembered", or(a.StateFile, "not beyond a restart"))

	p.head("Sinks")
	p.sinks(&c.Sinks)

	p.head("Web")
	p.item("listen", or(strings.Join(c.Web.Listen, ", "), "nowhere: neither metrics nor page nor API"))
	if len(c.Web.Listen) > 0 {
		p.item("TLS, users", or(c.Web.ConfigFile, "none"))
	}
	if c.Web.ExternalURL != "" {
		p.item("known as", c.Web.ExternalURL)
	}

	p.head("Log")
	p.item("level", strings.ToLower(c.Log.Level.String()))
	p.item("format", c.Log.Format)

	p.line("")
	p.line("The end waits up to %s for what is being delivered.", short(c.ShutdownTimeout))
	_, err := io.WriteString(w, p.text.String())
	return err
}

type printer struct {
	text    strings.Builder
	numbers int
}

func (p *printer) line(format string, args ...any) { fmt.Fprintf(&p.text, format+"\n", args...) }

func (p *printer) head(text string) { p.line("\n%s", text) }

func (p *printer) item(name, text string) { p.line("  %-16s %s", name, text) }

func (p *printer) numbered(name, text string, more ...string) {
	p.numbers++
	p.line("  %2d. %-20s %s", p.numbers, name, text)
	for _, m := range more {
		p.line("      %-20s %s", "", m)
	}
}

// rule is a rule of the user's: its name and limit, and what it selects below.
func (p *printer) rule(rule *limits.Rule, where string) {
	m := &rule.Match
	stage := m.Stage
	if stage == 0 {
		stage = events.Held
	}
	what := []string{stage.String()}
	if m.Side != 0 {
		what = append(what, m.Side.String())
	}
	add := func(name string, values []string) {
		if len(values) > 0 {
			what = append(what, name+" "+strings.Join(values, " or "))
		}
	}
	add("local port", texts(m.LocalPorts))
	add("remote port", texts(m.RemotePorts))
	add("port", texts(m.Ports))
	add("peer", blocks(m.Peers))
	add("process", m.Processes)
	add("cgroup", m.Cgroups)
	add("network namespace", slices.Concat(m.NetnsNames, texts(m.Netns)))
	add("proxy", m.Proxies)
	p.numbered(rule.Name, short(rule.FinTimeout)+"  ("+where+")", wrap(what)...)
}

// wrap joins parts by commas, into lines that are not much longer than wide.
func wrap(parts []string) (lines []string) {
	const wide = 70
	line := parts[0]
	for _, part := range parts[1:] {
		if line += ","; len(line)+len(part) > wide {
			lines, line = append(lines, line), part
		} else {
			line += " " + part
		}
	}
	return append(lines, line)
}

// blocks prints the block of a single address as that.
func blocks(prefixes []netip.Prefix) []string {
	all := texts(prefixes)
	for i, p := range prefixes {
		if p.IsSingleIP() {
			all[i] = p.Addr().String()
		}
	}
	return all
}

func texts[T any](values []T) []string {
	var all []string
	for _, v := range values {
		all = append(all, fmt.Sprint(v))
	}
	return all
}

func (p *printer) sinks(s *Sinks) {
	none := true
	if s.Log {
		none = false
		p.item("log", "as below")
	}
	for i := range s.Webhooks {
		none = false
		h := &s.Webhooks[i]
		to := or(host(h.URL), "as "+h.URLFile+" says")
		p.item(h.Name, "webhook "+to+client(&h.HTTP, maps.Keys(h.Headers)))
	}
	for i := range s.Alertmanagers {
		none = false
		a := &s.Alertmanagers[i]
		var hosts []string
		for _, u := range a.URLs {
			hosts = append(hosts, host(u))
		}
		text := "Alertmanager " + strings.Join(hosts, ", ") + client(&a.HTTP, nil) + ", again every " + short(a.ResendEvery)
		for _, name := range slices.Sorted(maps.Keys(a.Labels)) {
			text += fmt.Sprintf(", %s=%q", name, a.Labels[name])
		}
		p.item(a.Name, text)
	}
	if none {
		p.item("none", "alerts show in the metrics and on the page alone")
	}
}

// client is how requests are made, without what is secret.
func client(h *promconfig.HTTPClientConfig, headers func(func(string) bool)) string {
	var text string
	if headers != nil {
		for _, name := range slices.Sorted(headers) {
			text += ", header " + name
		}
	}
	if h.BearerTokenFile != "" {
		text += ", token of " + h.BearerTokenFile
	}
	if h.BasicAuth != nil {
		text += fmt.Sprintf(", user %s", h.BasicAuth.Username)
	}
	if h.TLSConfig.CertFile != "" {
		text += ", certificate " + h.TLSConfig.CertFile
	}
	if h.TLSConfig.CAFile != "" {
		text += ", trusting " + h.TLSConfig.CAFile
	}
	if h.TLSConfig.InsecureSkipVerify {
		text += ", trusting whoever answers"
	}
	return text
}

// host is the scheme and host of a URL that has been read; "" without one.
func host(s string) string {
	u, err := url.Parse(s)
	if err != nil || s == "" {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

func or(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

func connections(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return strconv.Itoa(n) + " connections"
}
