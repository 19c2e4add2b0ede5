// SPDX-License-Identifier: Apache-2.0

// Package haproxy reads what HAProxy is told and what it does: its
// configuration files, its processes, and its runtime socket. It knows nothing
// of FIN_WAIT2 but which timeouts end it.
package haproxy

import (
	"fmt"
	"net/netip"
	"path"
	"time"
)

// Pos is a place in a configuration file. Column is in bytes, from 1.
type Pos struct {
	File         string
	Line, Column int
}

// String is file:line.
func (p Pos) String() string { return fmt.Sprintf("%s:%d", p.File, p.Line) }

// Short is String with the name of the file alone.
func (p Pos) Short() string { return fmt.Sprintf("%s:%d", path.Base(p.File), p.Line) }

// Setting is a value that a configuration may set. Its zero value is unset.
type Setting[T any] struct {
	Value   T
	Text    string // the words as written: "timeout client 1h"
	Pos     Pos    // Line 0: unset
	Section string // where it was written: "global", "defaults web", "frontend www"
	// Undecided: whether it holds, or its value, depends on what only HAProxy
	// knows (a condition, an environment variable); Value is one possibility.
	Undecided bool
}

// IsSet says whether it was written at all.
func (s Setting[T]) IsSet() bool { return s.Pos.Line != 0 }

// Mode is what a proxy speaks.
type Mode uint8

// The modes; a proxy that sets none is in mode tcp.
const (
	TCP Mode = iota
	HTTP
	OtherMode // log, spop, haterm and whatever comes
)

func (m Mode) String() string { return [...]string{"tcp", "http", "other"}[m] }

// Kind is what a section defines.
type Kind uint8

// The kinds of section that proxies are made of.
const (
	Defaults Kind = iota + 1
	Frontend
	Backend
	Listen
)

func (k Kind) String() string { return [...]string{"", "defaults", "frontend", "backend", "listen"}[k] }

// Config is what a set of configuration files says.
type Config struct {
	Files   []string
	Global  Global
	Proxies []*Proxy // frontend, backend and listen sections in their order
	// Notes are things that a reader of the files alone cannot decide, or that
	// HAProxy would warn of.
	Notes []Note
}

// Note is a remark about a line.
type Note struct {
	Pos  Pos
	Text string
}

// Global is the global section. Later ones add to earlier ones.
type Global struct {
	Maxconn       Setting[int]
	UlimitN       Setting[int]
	FDHardLimit   Setting[int]
	Nbproc        Setting[int]
	Nbthread      Setting[int]
	HardStopAfter Setting[time.Duration]
	StatsSockets  []Setting[string] // addresses as written: /run/haproxy.sock, ipv4@127.0.0.1:9999
}

// Proxy is a frontend, backend or listen section with what it inherits, or a
// defaults section.
type Proxy struct {
	Kind      Kind
	Name      string // "" for an unnamed defaults section
	Pos       Pos
	Undecided bool // it stands in a condition that only HAProxy can decide

	Mode     Setting[Mode]
	Disabled Setting[bool]
	Maxconn  Setting[int]                      // of a frontend; 0 is none of its own
	Fullconn Setting[int]                      // of a backend
	Timeouts map[string]Setting[time.Duration] // by name: "client-fin"; 0 is as good as unset
	Options  map[string]Setting[bool]          // by name: "nolinger"; false: no option nolinger

	DefaultBackend Setting[string]
	UseBackends    []Setting[string] // names as written; "%[" makes one of them dynamic
	Binds          []Bind
	Servers        []Server

	defaultServer Server // what its servers have that do not say otherwise
}

// String is the section's first words: "frontend www".
func (p *Proxy) String() string {
	if p.Name == "" {
		return p.Kind.String()
	}
	return p.Kind.String() + " " + p.Name
}

// Accepts says whether clients connect to it.
func (p *Proxy) Accepts() bool { return p.Kind == Frontend || p.Kind == Listen }

// Connects says whether it connects to servers.
func (p *Proxy) Connects() bool { return p.Kind == Backend || p.Kind == Listen }

// Bind is one line of addresses to listen on.
type Bind struct {
	Pos         Pos
	Undecided   bool
	Addrs       []BindAddr
	Interface   string
	Namespace   string // name of a network namespace, as in /run/netns
	V4V6        bool   // :: takes IPv4 too
	V6Only      bool   // :: takes no IPv4
	Transparent bool   // takes connections to foreign addresses
	SSL         bool
	AcceptProxy bool
	Maxconn     Setting[int]
}

// BindAddr is one address of a bind line.
type BindAddr struct {
	Text        string
	IP          netip.Addr // 0.0.0.0 is any IPv4, :: any IPv6; invalid where it is a name
	First, Last uint16     // ports; 0: not a TCP address that is known (unix, abns, fd, udp, quic)
}

// Server is one server of a backend, or the pattern of a server-template.
type Server struct {
	Name      string // of a template: the prefix
	Pos       Pos
	Undecided bool
	Count     int        // of a template; else 1
	Host      string     // as written
	IP        netip.Addr // invalid where Host is a name, or not an Internet address
	Port      uint16     // 0: that of the client's connection, or relative to it
	AnyDest   bool       // 0.0.0.0, * or ::: where the client was going
	Namespace string
	SOCKS4    netip.AddrPort // what is connected to in its place
	Disabled  bool
	SendProxy bool
	SSL       bool
	Maxconn   Setting[int]
}

// Version is HAProxy's. Its zero value is unknown.
type Version struct {
	Major, Minor int
	Text         string // all of it: "2.6.12-1+deb12u4"
}

// Known says whether it is known.
func (v Version) Known() bool { return v.Major != 0 }

// AtLeast says whether a known version is that or later.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// Errors are all that is wrong with a configuration.
type Errors []*Error

// Error is the first of them, and how many there are.
func (e Errors) Error() string {
	if len(e) > 1 {
		return fmt.Sprintf("%v (and %d more)", e[0], len(e)-1)
	}
	return e[0].Error()
}

// Error is what HAProxy would not accept, or what cannot be read.
type Error struct {
	Pos  Pos
	Text string // what is wrong, and what was expected
}

func (e *Error) Error() string {
	if e.Pos.Line == 0 {
		return fmt.Sprintf("%s: %s", e.Pos.File, e.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.Pos.File, e.Pos.Line, e.Pos.Column, e.Text)
}

// Source is the text of one configuration file.
type Source struct {
	Name     string
	Text     []byte
	Modified time.Time // when it was last written; zero where that means nothing
}

// Options are what a reader of the files has to be told.
type Options struct {
	Version Version
	// Env is the environment of HAProxy. EnvComplete says that there is no more
	// to it: what is not in it is not set.
	Env         map[string]string
	EnvComplete bool
}
