// SPDX-License-Identifier: Apache-2.0

package track

import (
	"net/netip"
	"strconv"
	"time"

	"github.com/fintrace/fintrace/internal/events"
)

// Filter selects connections. Its zero value selects all; each field that is
// set must match.
type Filter struct {
	Ports       []uint16       // local or remote
	Peers       []netip.Prefix // of the remote address
	Processes   []string       // name or pid
	Proxies     []string       // of HAProxy, by name
	Netns       []uint32       // inode
	Side        events.Side
	Stage       events.Stage
	MinDuration time.Duration
}

// Match says whether c is selected.
func (f *Filter) Match(c *Conn) bool {
	return c.Duration >= f.MinDuration &&
		(f.Side == 0 || f.Side == c.Side) &&
		(f.Stage == 0 || f.Stage == c.Stage) &&
		matchesAny(f.Netns, func(n uint32) bool { return n == c.Netns }) &&
		matchesAny(f.Processes, func(name string) bool {
			return c.Process.Known() &&
				(name == c.Process.Name() || name == strconv.FormatUint(uint64(c.Process.PID), 10))
		}) &&
		matchesAny(f.Proxies, func(name string) bool { return c.Place != nil && c.Place.Has(name) }) &&
		f.MatchFlow(&c.Flow)
}

// MatchFlow says whether the filters on ports and peers select a flow.
func (f *Filter) MatchFlow(flow *events.Flow) bool {
	return matchesAny(f.Ports, func(p uint16) bool { return p == flow.Local.Port || p == flow.Remote.Port }) &&
		matchesAny(f.Peers, func(p netip.Prefix) bool { return p.Contains(flow.Remote.IP()) })
}

// matchesAny says whether one of the wanted matches, or none is wanted.
func matchesAny[T comparable](wanted []T, matches func(T) bool) bool {
	for _, w := range wanted {
		if matches(w) {
			return true
		}
	}
	return len(wanted) == 0
}

// ServicePort is the port that names the service: ours where the peer is the
// client, else the peer's.
func (c *Conn) ServicePort() uint16 {
	if c.Side == events.Outbound {
		return c.Flow.Remote.Port
	}
	return c.Flow.Local.Port
}
