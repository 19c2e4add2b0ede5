// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

// Match selects connections. Its zero value selects all; each field that is set
// must match, by one of its values.
type Match struct {
	Ports       []uint16 // local or remote
	LocalPorts  []uint16
	RemotePorts []uint16
	Peers       []netip.Prefix // of the remote address
	Processes   []string       // name or pid
	Cgroups     []string       // path below the root of cgroup2: that one and those below it
	Proxies     []string       // of HAProxy, by name
	Netns       []uint32       // inode
	NetnsNames  []string       // in /run/netns; one of these or of Netns is enough
	Side        events.Side
	Stage       events.Stage
}

// Subject is what a Match looks at.
type Subject struct {
	Netns   uint32
	Flow    *events.Flow
	Side    events.Side
	Stage   events.Stage
	Process *events.Process
	Place   *haproxy.Place // nil if it belongs to no proxy
}

// Names turns the kernel's numbers into the names that a Match has. A function
// that is nil knows none.
type Names struct {
	Cgroup func(id uint64) string    // its path, "" if unknown
	Netns  func(inode uint32) string // "" if it has no name
}

// Selects says whether m selects s.
func (m *Match) Selects(s *Subject, names Names) bool {
	return (m.Side == 0 || m.Side == s.Side) &&
		(m.Stage == 0 || m.Stage == s.Stage) &&
		m.inNetns(s.Netns, names) &&
		m.SelectsFlow(s.Flow) &&
		anyOf(m.Processes, func(name string) bool {
			return s.Process.Known() &&
				(name == s.Process.Name() || name == strconv.FormatUint(uint64(s.Process.PID), 10))
		}) &&
		anyOf(m.Proxies, func(name string) bool { return s.Place != nil && s.Place.Has(name) }) &&
		m.inCgroup(s.Process.Cgroup, names)
}

// SelectsFlow says whether the ports and peers of m select a flow.
func (m *Match) SelectsFlow(f *events.Flow) bool {
	return anyOf(m.Ports, func(p uint16) bool { return p == f.Local.Port || p == f.Remote.Port }) &&
		anyOf(m.LocalPorts, func(p uint16) bool { return p == f.Local.Port }) &&
		anyOf(m.RemotePorts, func(p uint16) bool { return p == f.Remote.Port }) &&
		anyOf(m.Peers, func(p netip.Prefix) bool { return p.Contains(f.Remote.IP()) })
}

func (m *Match) inNetns(inode uint32, names Names) bool {
	if len(m.Netns)+len(m.NetnsNames) == 0 || slices.Contains(m.Netns, inode) {
		return true
	}
	return len(m.NetnsNames) > 0 && names.Netns != nil && slices.Contains(m.NetnsNames, names.Netns(inode))
}

func (m *Match) inCgroup(id uint64, names Names) bool {
	if len(m.Cgroups) == 0 {
		return true
	}
	if names.Cgroup == nil {
		return false
	}
	path := names.Cgroup(id)
	return path != "" && anyOf(m.Cgroups, func(above string) bool { return within(path, above) })
}

// within says whether a path is another, or below it.
func within(path, above string) bool {
	rest, found := strings.CutPrefix(path, strings.TrimSuffix(above, "/"))
	return found && (rest == "" || rest[0] == '/')
}

// anyOf says whether one of the wanted matches, or none is wanted.
func anyOf[T comparable](wanted []T, matches func(T) bool) bool {
	return len(wanted) == 0 || slices.ContainsFunc(wanted, matches)
}

// Covers says whether m selects every connection that other does.
func (m *Match) Covers(other *Match) bool {
	return (m.Side == 0 || m.Side == other.Side) &&
		(m.Stage == 0 || m.Stage == other.Stage) &&
		covers(m.Ports, other.Ports, same) &&
		covers(m.LocalPorts, other.LocalPorts, same) &&
		covers(m.RemotePorts, other.RemotePorts, same) &&
		covers(m.Processes, other.Processes, same) &&
		covers(m.Proxies, other.Proxies, same) &&
		covers(m.Cgroups, other.Cgroups, func(above, path string) bool { return within(path, above) }) &&
		covers(m.Peers, other.Peers, func(block, peer netip.Prefix) bool {
			return block.Bits() <= peer.Bits() && block.Contains(peer.Addr())
		}) &&
		coversAll(len(m.Netns)+len(m.NetnsNames), len(other.Netns)+len(other.NetnsNames),
			eachOf(other.Netns, func(n uint32) bool { return slices.Contains(m.Netns, n) }) &&
				eachOf(other.NetnsNames, func(n string) bool { return slices.Contains(m.NetnsNames, n) }))
}

func same[T comparable](a, b T) bool { return a == b }

// covers says whether each of the other's values is covered by one of ours.
func covers[T comparable](ours, others []T, covers func(our, other T) bool) bool {
	return coversAll(len(ours), len(others), eachOf(others, func(other T) bool {
		return slices.ContainsFunc(ours, func(our T) bool { return covers(our, other) })
	}))
}

func coversAll(ours, others int, eachCovered bool) bool {
	return ours == 0 || others > 0 && eachCovered
}

func eachOf[T comparable](values []T, is func(T) bool) bool {
	return !slices.ContainsFunc(values, func(v T) bool { return !is(v) })
}
