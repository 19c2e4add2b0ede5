// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// State is what a scrape shows of the moment. Whoever gathers it sets the
// fields, leaves what is not known as it is, and calls Add for each connection.
// What it points to must not change afterwards.
type State struct {
	Counters    track.Counters
	Connections int // in the table
	Capacity    int // of the table

	Records  uint64 // that were read
	Lost     uint64 // for want of room
	Missed   uint64 // events that the kernel skipped
	Instants uint64 // healthy closes, which no record is sent of
	// Unfollowed were closed and gone before a look: too many to follow each.
	Unfollowed uint64

	HAProxy    []haproxy.Process
	Namespaces []Namespace

	Firing int // alerts
	Alerts map[alert.Event]uint64
	Sinks  []alert.SinkStats

	LogLost uint64 // lines of the log that were not written

	known   *known
	stages  []stages // by number of place
	overdue []int    // by number of excess
	proxies map[*haproxy.Place]*proxied
	kinds   map[limits.Limit]int // numbers
}

// Namespace is a network namespace. What could not be read is nil.
type Namespace struct {
	Name       string // Host for the host's own
	Sysctls    events.Sysctls
	Statistics map[string]int64 // by file and name: "TCP tw", "TcpExt ListenDrops"
}

// Host is the name of the host's own network namespace.
const Host = "host"

// stages are the connections of a place in each stage.
type stages [events.Minisock + 1]struct {
	count  int
	oldest time.Duration
	// The limit of the last that was past it, which most have, and the number
	// of its excess, from 1; 0: none was.
	limit  limits.Limit
	excess int
}

// proxied is what the labels say of a place of HAProxy, and its connections.
type proxied struct {
	haproxy string // configuration
	name    string // of the proxy
	old     bool
	clients bool // it is a frontend's
	held    int
	ports   map[port]int // known.ports of the proxy
}

// limitsKept bounds the limits of a scrape whose kind is remembered: those that
// follow from the round trip differ from connection to connection.
const limitsKept = 1024

// Add counts a connection of the table. All calls, for whichever State, are to
// be made by one goroutine at a time.
func (s *State) Add(c *track.Conn) {
	of := s.proxied(c.Place)
	p := port{uint16(c.Side), c.ServicePort()}
	n, known := of.ports[p]
	if !known {
		n = s.known.place(of.name, p)
		if of.ports == nil {
			of.ports = s.known.ports[of.name]
		}
	}
	for n >= len(s.stages) {
		s.stages = append(s.stages, stages{})
	}
	stage := &s.stages[n][c.Stage]
	stage.count++
	stage.oldest = max(stage.oldest, c.Duration)
	if c.Stage == events.Held {
		of.held++
	}
	if !c.Overdue {
		return
	}
	if stage.excess == 0 || stage.limit != c.Limit {
		stage.limit = c.Limit
		stage.excess = 1 + s.known.excess(excess{uint32(n), uint16(c.Stage), uint16(s.kind(c.Limit))})
		for stage.excess > len(s.overdue) {
			s.overdue = append(s.overdue, 0)
		}
	}
	s.overdue[stage.excess-1]++
}

// kind is the number of a limit's kind, whose name costs an allocation.
func (s *State) kind(l limits.Limit) int {
	n, known := s.kinds[l]
	if !known {
		n = s.known.kind(l.Kind())
		if len(s.kinds) < limitsKept {
			s.kinds[l] = n
		}
	}
	return n
}

func (s *State) proxied(p *haproxy.Place) *proxied {
	known := s.proxies[p]
	if known == nil {
		known = &proxied{}
		if p != nil {
			known.haproxy, known.name = configOf(p.Process), clean(p.Name())
			known.old, known.clients = p.Process.Old, p.Side == haproxy.ClientSide
		}
		known.ports = s.known.ports[known.name]
		s.proxies[p] = known
	}
	return known
}

func newState(k *known) *State {
	return &State{known: k, proxies: map[*haproxy.Place]*proxied{}, kinds: map[limits.Limit]int{}}
}
