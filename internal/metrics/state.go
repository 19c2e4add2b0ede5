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

	HAProxy    []haproxy.Process
	Namespaces []Namespace

	Firing int // alerts
	Alerts map[alert.Event]uint64
	Sinks  []alert.SinkStats

	known   *known
	stages  []stages // by number of place
	overdue []int    // by number of excess
	proxies map[*haproxy.Place]*proxied
	limits  map[limits.Limit]int // number of its kind
	last    last
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
}

// proxied is what the labels say of a place of HAProxy, and its connections.
type proxied struct {
	haproxy string // configuration
	name    string // of the proxy
	old     bool
	clients bool // it is a frontend's
	held    int
}

// last is how the connection before was sorted: most are alike.
type last struct {
	place  *haproxy.Place
	port   uint16
	side   events.Side
	valid  bool
	number int
	proxy  *proxied // nil without a place

	limit limits.Limit
	kind  int
	known bool // limit and kind are
}

// limitsKept bounds the limits of a scrape whose kind is remembered: those that
// follow from the round trip differ from connection to connection.
const limitsKept = 1024

// Add counts a connection of the table. All calls, for whichever State, are to
// be made by one goroutine at a time.
func (s *State) Add(c *track.Conn) {
	l := &s.last
	if port := c.ServicePort(); !l.valid || c.Place != l.place || port != l.port || c.Side != l.side {
		l.valid, l.place, l.port, l.side = true, c.Place, port, c.Side
		l.proxy = nil
		p := place{side: c.Side, port: port}
		if c.Place != nil {
			l.proxy = s.proxied(c.Place)
			p.proxy = l.proxy.name
		}
		l.number = s.known.place(p)
		for l.number >= len(s.stages) {
			s.stages = append(s.stages, stages{})
		}
	}
	stage := &s.stages[l.number][c.Stage]
	stage.count++
	stage.oldest = max(stage.oldest, c.Duration)
	if l.proxy != nil && l.proxy.clients && c.Stage == events.Held {
		l.proxy.held++
	}
	if !c.Overdue {
		return
	}
	n := s.known.excess(excess{place: l.number, stage: c.Stage, kind: s.kind(c.Limit)})
	for n >= len(s.overdue) {
		s.overdue = append(s.overdue, 0)
	}
	s.overdue[n]++
}

// kind is the number of a limit's kind, whose name costs an allocation.
func (s *State) kind(limit limits.Limit) int {
	l := &s.last
	if l.known && l.limit == limit {
		return l.kind
	}
	n, found := s.limits[limit]
	if !found {
		n = s.known.kind(limit.Kind())
		if len(s.limits) < limitsKept {
			s.limits[limit] = n
		}
	}
	l.known, l.limit, l.kind = true, limit, n
	return n
}

func (s *State) proxied(p *haproxy.Place) *proxied {
	known := s.proxies[p]
	if known == nil {
		known = &proxied{haproxy: configOf(p.Process), name: clean(p.Name()), old: p.Process.Old, clients: p.Side == haproxy.ClientSide}
		s.proxies[p] = known
	}
	return known
}

func newState(k *known) *State {
	return &State{known: k, proxies: map[*haproxy.Place]*proxied{}, limits: map[limits.Limit]int{}}
}
