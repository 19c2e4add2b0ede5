// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	// stepConnections: a step is over before the first of their delayed ACKs, 4 ms.
	stepConnections = 50
	stepRepeats     = 20
	// stepAttempts: other connections of the host spoil a count now and then.
	stepAttempts = 4 * stepRepeats
)

// The steps that connections are taken, all of them together.
const (
	stepOpen         = iota // connect: SYN_SENT, SYN_RECV, ESTABLISHED twice
	stepUnanswered          // shutdown, and the peer does not get the FIN
	stepReset               // SO_LINGER 0: this end, and the peer
	stepShutdown            // shutdown, and the peer holds its ACK back
	stepEnter               // the peer's ACK, the connection being held
	stepCloseHeld           // close of the held one: close, handover
	stepPeerEnds            // the peer closes on a held one
	stepPeerEndsMini        // the peer closes on a minisock
	stepClose               // close, and the peer holds its ACK back
	stepHandover            // the peer's ACK, the connection being closed
	stepHealthyEnd          // the peer closes, its FIN with its ACK
)

// steps has how many transitions each is.
var steps = [...]int{
	stepOpen: 4, stepUnanswered: 1, stepReset: 2, stepShutdown: 2, stepEnter: 1, stepCloseHeld: 2,
	stepPeerEnds: 3, stepPeerEndsMini: 2, stepClose: 2, stepHandover: 2, stepHealthyEnd: 4,
}

// A kind of transition, or some that come together.
type kind struct {
	name string
	step int
	less int // a step that was part of it; 0: none
	each int // transitions that are left
}

var kinds = []kind{
	{"connecting: SYN_SENT, SYN_RECV, ESTABLISHED (both)", stepOpen, 0, 4},
	{"ESTABLISHED → FIN_WAIT1", stepUnanswered, 0, 1},
	{"ESTABLISHED → CLOSE_WAIT (less the other end's FIN_WAIT1)", stepShutdown, stepUnanswered, 1},
	{"FIN_WAIT1 → FIN_WAIT2, held", stepEnter, 0, 1},
	{"FIN_WAIT2 → FIN_WAIT2 → CLOSE: a held one is closed, handed over", stepCloseHeld, 0, 2},
	{"FIN_WAIT2 → CLOSE: the peer's FIN to a held one (less LAST_ACK, CLOSE)", stepPeerEnds, stepPeerEndsMini, 1},
	{"FIN_WAIT1 → FIN_WAIT2 → CLOSE: closed, handed over", stepHandover, 0, 2},
	{"FIN_WAIT1 → FIN_WAIT2 → CLOSE: healthy, in one segment (less LAST_ACK, CLOSE)", stepHealthyEnd, stepPeerEndsMini, 2},
	{"CLOSE_WAIT → LAST_ACK → CLOSE", stepPeerEndsMini, 0, 2},
	{"FIN_WAIT1 → CLOSE, ESTABLISHED → CLOSE: resets", stepReset, 0, 2},
}

// of is ns per transition, of what was measured of each step, ns for all its transitions.
func (k *kind) of(measured [][]float64) float64 {
	ns := median(measured[k.step])
	if k.less != 0 {
		ns -= median(measured[k.less])
	}
	return ns / float64(k.each)
}

type stepRequest struct{ Programs []ebpf.ProgramID }

// runSteps is the part that takes connections a step at a time. It returns, of
// each step, ns of the programs for one connection, as often as it was measured
// with no other connections of the host in between.
func runSteps(r stepRequest) ([][]float64, error) {
	if err := prepareNamespace(); err != nil {
		return nil, err
	}
	s := stepper{measured: make([][]float64, len(steps))}
	for _, id := range r.Programs {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return nil, err
		}
		defer p.Close()
		s.programs = append(s.programs, p)
	}
	var err error
	if s.connector, err = newConnector(0); err != nil {
		return nil, err
	}
	for attempt := 0; attempt < stepAttempts && !s.enough(); attempt++ {
		for _, life := range []func(){s.unanswered, s.heldThenClosed, s.heldToTheEnd, s.minisock, s.healthy} {
			if life(); s.err != nil {
				return nil, s.err
			}
		}
	}
	return s.measured, nil
}

type stepper struct {
	programs         []*ebpf.Program
	connector        *connector
	clients, servers [stepConnections]int
	measured         [][]float64
	err              error // the first; nothing is done any more then
}

func (s *stepper) enough() bool {
	for _, values := range s.measured {
		if len(values) < stepRepeats {
			return false
		}
	}
	return true
}

// step does something to each connection, and counts what it costs.
func (s *stepper) step(number int, do func(client, server *int) error) {
	if s.err != nil {
		return
	}
	before, err := costOf(s.programs)
	if err != nil {
		s.err = err
		return
	}
	if s.each(do); s.err != nil {
		return
	}
	after, err := costOf(s.programs)
	if err != nil {
		s.err = err
		return
	}
	if c := after.less(before); c.runs == uint64(steps[number]*stepConnections) {
		s.measured[number] = append(s.measured[number], float64(c.time)/stepConnections)
	}
}

// each does something to each connection.
func (s *stepper) each(do func(client, server *int) error) {
	for i := 0; i < stepConnections && s.err == nil; i++ {
		s.err = do(&s.clients[i], &s.servers[i])
	}
}

func (s *stepper) unanswered() {
	s.step(stepOpen, s.open)
	s.each(deaf)
	s.step(stepUnanswered, shutdownClient)
	s.each(abortive)
	s.step(stepReset, closeClient)
	s.each(closeServer)
}

func (s *stepper) heldThenClosed() {
	s.step(stepOpen, s.open)
	s.step(stepShutdown, shutdownClient)
	s.step(stepEnter, acknowledgeServer)
	s.step(stepCloseHeld, closeClient)
	s.step(stepPeerEndsMini, closeServer)
}

func (s *stepper) heldToTheEnd() {
	s.step(stepOpen, s.open)
	s.step(stepShutdown, shutdownClient)
	s.step(stepEnter, acknowledgeServer)
	s.step(stepPeerEnds, closeServer)
	s.each(closeClient)
}

func (s *stepper) minisock() {
	s.step(stepOpen, s.open)
	s.step(stepClose, closeClient)
	s.step(stepHandover, acknowledgeServer)
	s.step(stepPeerEndsMini, closeServer)
}

func (s *stepper) healthy() {
	s.step(stepOpen, s.open)
	s.step(stepClose, closeClient)
	s.step(stepHealthyEnd, closeServer)
}

func (s *stepper) open(client, server *int) (err error) {
	*client, *server, err = s.connector.connect()
	return err
}

func shutdownClient(client, _ *int) error    { return unix.Shutdown(*client, unix.SHUT_WR) }
func closeClient(client, _ *int) error       { return unix.Close(*client) }
func closeServer(_, server *int) error       { return unix.Close(*server) }
func acknowledgeServer(_, server *int) error { return acknowledge(*server) }

// deaf has the server drop all that comes.
func deaf(_, server *int) error {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	return unix.SetsockoptSockFprog(*server, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]})
}

// abortive has the server listen again, and the client end with a reset.
func abortive(client, server *int) error {
	return errors.Join(
		unix.SetsockoptInt(*server, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0),
		unix.SetsockoptLinger(*client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	)
}
