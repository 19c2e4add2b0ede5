// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Side is which of its two connections HAProxy has with a peer.
type Side uint8

// The sides of a proxied session.
const (
	ClientSide Side = iota + 1
	ServerSide
)

func (s Side) String() string { return [...]string{"", "client", "server"}[s] }

// FinTimeout is which timeout ends a connection that HAProxy has half closed
// and holds while the peer stays silent. It runs from the last activity, which
// may be before the FIN; before HAProxy 3.0 the -fin timeouts run from the FIN.
type FinTimeout struct {
	Duration time.Duration          // 0: nothing ends it
	Name     string                 // "client-fin", "tunnel", "client" ...
	By       Setting[time.Duration] // what sets it; unset where nothing does
	// Ignored are those that are set and have no effect here.
	Ignored []Setting[time.Duration]
	Why     string // why it is this one: "client-fin unset"; "" where it is the -fin timeout
	// Uncertain: it may also be shorter, or another; Why says on what it depends.
	Uncertain bool
}

// Explicit says whether it is the timeout that is meant for half-closed connections.
func (f FinTimeout) Explicit() bool { return strings.HasSuffix(f.Name, "-fin") }

// Setting names the setting that it comes from, without its value.
func (f *FinTimeout) Setting() string {
	// It is asked of every connection: the usual ones are not put together each time.
	switch f.Name {
	case "client-fin":
		return "haproxy timeout client-fin"
	case "server-fin":
		return "haproxy timeout server-fin"
	case "client":
		return "haproxy timeout client"
	case "server":
		return "haproxy timeout server"
	case "tunnel":
		return "haproxy timeout tunnel"
	}
	return "haproxy timeout " + f.Name
}

// String is its source in words: "haproxy.cfg:9 defaults timeout client 1h (client-fin unset)".
func (f FinTimeout) String() string {
	if !f.By.IsSet() {
		return "timeout " + f.Name + " and " + f.Why
	}
	text := fmt.Sprintf("%s %s %s", f.By.Pos.Short(), f.By.Section, f.By.Text)
	if f.Why != "" {
		text += " (" + f.Why + ")"
	}
	return text
}

// FinTimeout says which timeout ends a connection of p that HAProxy holds in
// FIN_WAIT2: in mode tcp client-fin (server-fin), else tunnel, else client
// (server). In mode http HAProxy 3.0 and later do not use the -fin timeouts,
// and what was upgraded (WebSocket) waits for timeout tunnel: towards servers
// always, towards clients since 3.2.
func (c *Config) FinTimeout(p *Proxy, side Side, v Version) FinTimeout {
	base, tunnel := "client", c.tunnel(p)
	if side == ServerSide {
		base, tunnel = "server", p.Timeouts["tunnel"]
	}
	fin, plain := p.Timeouts[base+"-fin"], p.Timeouts[base]
	isSet := func(t Setting[time.Duration]) bool { return t.Value > 0 || t.IsSet() && t.Undecided }
	http := p.Mode.Value == HTTP

	f := FinTimeout{Name: base, By: plain, Duration: plain.Value}
	if isSet(tunnel) && plain.Value != 0 {
		switch upgraded := side == ServerSide || !v.Known() || v.AtLeast(3, 2); {
		case !http:
			f.Name, f.By, f.Duration = "tunnel", tunnel, tunnel.Value
		case upgraded && tunnel.Value > plain.Value:
			f.Name, f.By, f.Duration, f.Uncertain = "tunnel", tunnel, tunnel.Value, true
		}
	}
	switch {
	case !isSet(fin):
		f.Why = base + "-fin unset"
	case http && v.AtLeast(3, 0):
		f.Why = fmt.Sprintf("%s-fin has no effect in mode http since HAProxy 3.0", base)
		f.Ignored = append(f.Ignored, fin)
	case http && !v.Known() && f.Duration != 0 && f.Duration <= fin.Value:
		f.Name, f.By, f.Duration, f.Uncertain = base+"-fin", fin, fin.Value, true
	case http && !v.Known():
		f.Why = fmt.Sprintf("%s before HAProxy 3.0, whose version is not known", strings.TrimPrefix(fin.Text, "timeout "))
		f.Uncertain = true
	default:
		return FinTimeout{Name: base + "-fin", By: fin, Duration: fin.Value, Uncertain: fin.Undecided}
	}
	if http && f.Name == "tunnel" {
		f.Why += "; where it was not upgraded, " + strings.TrimPrefix(plain.Text, "timeout ")
	}
	f.Uncertain = f.Uncertain || f.By.Undecided || fin.Undecided || p.Mode.Undecided
	return f
}

// tunnel is the longest timeout tunnel of the backends that a frontend may use.
func (c *Config) tunnel(p *Proxy) Setting[time.Duration] {
	longest := p.Timeouts["tunnel"]
	if p.Kind == Backend {
		return longest
	}
	uses := []string{p.DefaultBackend.Value} // few, and a configuration may have thousands
	all := false
	for _, u := range p.UseBackends {
		uses = append(uses, u.Value)
		all = all || u.Undecided || strings.Contains(u.Value, "%[")
	}
	for _, b := range c.Proxies {
		if !b.Connects() || !all && !slices.Contains(uses, b.Name) {
			continue
		}
		if t := b.Timeouts["tunnel"]; t.Value > longest.Value {
			longest = t
		}
	}
	return longest
}
