// SPDX-License-Identifier: Apache-2.0

package report

import (
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

// Evidence is all that a diagnosis is made from: what was there when the looking
// ended, and what came and went meanwhile.
type Evidence struct {
	Began, Ended events.Time // of the watch; equal where nothing was watched
	Wall         func(events.Time) time.Time

	Conns []track.Conn // in FIN_WAIT2 at Ended
	// Arrivals are those that entered FIN_WAIT2 and were held or orphaned at all,
	// or a minisock for longer than an instant, in the order of their entry;
	// Departures are the same that left, in the order in which they did.
	Arrivals   []Arrival
	Departures []track.Conn
	// Instants entered and left at once, as a healthy close does; nil where that
	// is not known, as it is counted for the whole host.
	Instants *uint64

	CloseWait []CloseWait
	States    map[events.State]int // how many sockets are in each; absent: not counted

	HAProxy  []haproxy.Process
	Settings map[uint32]events.Sysctls // by network namespace
	Tables   []Table
	OwnNetns uint32
	Netns    func(inode uint32) string // "" if it has no name

	// Sampled: without BPF there are no records, only looks at the sockets. What
	// came and went between two is not in Arrivals and Departures.
	Sampled  bool
	Lost     uint64   // records that were lost, or skipped by the kernel
	Unlooked []string // what could not be looked at, a line each
}

// Arrival is an entry into FIN_WAIT2 during the watch.
type Arrival struct {
	At   events.Time
	Conn track.Conn // as it entered
}

// CloseWait is a connection whose peer has closed and whose process has not.
type CloseWait struct {
	Netns   uint32
	Flow    events.Flow
	Side    events.Side
	Process events.Process
	Place   *haproxy.Place // of HAProxy, nil if it is of none
	// IdleAtLeast is the time since anything came from the peer; 0 unknown.
	IdleAtLeast time.Duration
}

// Table is a bounded table of the kernel, or a counter of what did not fit.
type Table struct {
	Name  string // "orphans", "timewait", "TCPTimeWaitOverflow", "TCPAbortOnMemory", "ListenOverflows" ...
	Netns uint32 // 0: of the host
	Count int    // in it at Ended; of a counter: what it grew by during the watch
	Max   int    // 0: a counter
}
