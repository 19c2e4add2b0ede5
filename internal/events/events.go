// SPDX-License-Identifier: Apache-2.0

// Package events holds the words everyone in fintrace uses: what the kernel
// reports (Event, Socket) and the terms it is spoken of in.
package events

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Time is an instant of the kernel's CLOCK_BOOTTIME in nanoseconds. That clock
// goes on through suspend and is never stepped, so differences are durations;
// it becomes wall-clock time only where it is printed.
type Time int64

// Add returns t + d.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

// Sub returns t − u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

// State is a TCP state, numbered as in include/net/tcp_states.h.
type State uint8

// The states by their names in the kernel.
const (
	Established State = iota + 1
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
	NewSynRecv
)

func (s State) String() string {
	names := [...]string{
		"", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT",
		"CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV",
	}
	if s == 0 || int(s) >= len(names) {
		return fmt.Sprintf("state %d", uint8(s))
	}
	return names[s]
}

// Stage is which of the three things that ss prints as FIN-WAIT-2 a connection is.
type Stage uint8

const (
	// Held: a process still has the descriptor; no kernel timer runs.
	Held Stage = iota + 1
	// Orphaned: closed, still a full socket, on the keepalive timer.
	Orphaned
	// Minisock: closed, and swapped for a timewait bucket with its own timer.
	Minisock
)

var stageNames = [...]string{"unknown", "held", "orphaned", "minisock"}

func (s Stage) String() string { return nameOf(stageNames[:], uint8(s)) }

// ParseStage reads what Stage.String prints.
func ParseStage(name string) (Stage, error) {
	i, err := parseName(stageNames[:], name)
	return Stage(i), err
}

// Side is which end of the connection this host is.
type Side uint8

const (
	// Inbound: the local port is listened on; the peer is a client.
	Inbound Side = iota + 1
	// Outbound: we connected; the peer is a server.
	Outbound
)

var sideNames = [...]string{"unknown", "inbound", "outbound"}

func (s Side) String() string { return nameOf(sideNames[:], uint8(s)) }

// ParseSide reads what Side.String prints.
func ParseSide(name string) (Side, error) {
	i, err := parseName(sideNames[:], name)
	return Side(i), err
}

// ClosedBy is the call that sent our FIN.
type ClosedBy uint8

const (
	// ByShutdown is shutdown(SHUT_WR) or shutdown(SHUT_RDWR); the descriptor stays open.
	ByShutdown ClosedBy = iota + 1
	// ByClose is close(), or the end of the process.
	ByClose
)

func (c ClosedBy) String() string { return nameOf([]string{"", "shutdown", "close"}, uint8(c)) }

// End is why a connection left FIN_WAIT2.
type End uint8

const (
	// PeerFIN: the peer closed its end too, as it should.
	PeerFIN End = iota + 1
	// PeerReset: the peer sent a RST to a held socket.
	PeerReset
	// LocalReset: this host sent a RST: closed with unread data, SO_LINGER 0, or TCP_LINGER2 < 0.
	LocalReset
	// Reset: a reset ended it, and the kernel does not show whose: the peer's
	// RST, or ours in answer to data that arrived after close().
	Reset
	// KernelTimeout: the timer of FIN_WAIT2 (or of keepalive) ran out.
	KernelTimeout
	// Destroyed: by SOCK_DESTROY (ss -K) or its like.
	Destroyed
	// TableFull: the kernel had no room for a minisock (tcp_max_tw_buckets).
	TableFull
	// Unseen: it is gone and no record or snapshot shows why.
	Unseen
)

var endNames = [...]string{
	"", "peer_fin", "peer_reset", "local_reset", "reset", "kernel_timeout", "destroyed", "table_full", "unseen",
}

func (e End) String() string { return nameOf(endNames[:], uint8(e)) }

// Ends lists every End.
func Ends() []End {
	ends := make([]End, 0, len(endNames)-1)
	for e := PeerFIN; e <= Unseen; e++ {
		ends = append(ends, e)
	}
	return ends
}

func nameOf(names []string, i uint8) string {
	if int(i) >= len(names) {
		return names[0]
	}
	return names[i]
}

func parseName(names []string, name string) (uint8, error) {
	for i, n := range names[1:] {
		if n == name {
			return uint8(i + 1), nil
		}
	}
	return 0, fmt.Errorf("%q is none of %s", name, strings.Join(names[1:], ", "))
}

// Endpoint is one end of a connection. IPv4 is kept as v4-mapped IPv6, which
// makes an IPv4 client of a dual-stack listener the same peer as any other.
type Endpoint struct {
	Addr [16]byte
	Port uint16
}

// EndpointFrom is the Endpoint of an address and port.
func EndpointFrom(ap netip.AddrPort) Endpoint {
	return Endpoint{Addr: ap.Addr().As16(), Port: ap.Port()}
}

// IP returns the address, an IPv4 one as IPv4.
func (e Endpoint) IP() netip.Addr { return netip.AddrFrom16(e.Addr).Unmap() }

// String is the form host:port, with brackets around IPv6.
func (e Endpoint) String() string { return string(e.AppendTo(nil)) }

// AppendTo appends what String returns.
func (e Endpoint) AppendTo(b []byte) []byte { return netip.AddrPortFrom(e.IP(), e.Port).AppendTo(b) }

// Flow is both ends, seen from this host, and the interface that the socket is
// bound to (SO_BINDTODEVICE), which tells apart what has the same ends.
type Flow struct {
	Local, Remote Endpoint
	Device        uint32 // index of the interface; 0 none
}

// madeUp is set in what stands for a cookie; real ones count from 1.
const madeUp = 1 << 63

// MadeUp is an identity for a socket whose cookie the kernel does not show, from
// a hash of what else tells it apart.
func MadeUp(hash uint64) (cookie uint64) { return hash | madeUp }

// IsCookie says whether an identity is the socket's cookie, and not made up.
func IsCookie(cookie uint64) bool { return cookie&madeUp == 0 }

// Process is who holds or closed a socket.
type Process struct {
	Cgroup uint64   // cgroup2 id, 0 if unknown
	Comm   [16]byte // the process's name as the kernel has it, NUL-padded
	PID    uint32   // thread group id in the initial pid namespace, 0 if unknown
}

// Known says whether there is a process at all.
func (p Process) Known() bool { return p.PID != 0 }

// Name is Comm as text, byte for byte as the process set it: it may hold anything.
func (p Process) Name() string {
	name, _, _ := bytes.Cut(p.Comm[:], []byte{0})
	return string(name)
}

// Timers are the settings that the kernel's limit on a closed FIN_WAIT2 depends on.
type Timers struct {
	FinTimeout time.Duration // net.ipv4.tcp_fin_timeout of the socket's namespace
	Linger2    time.Duration // TCP_LINGER2; 0 unset, negative: reset at once
	RTO        time.Duration // retransmission timeout
}

// Event is one state change, as inet_sock_set_state reported it.
type Event struct {
	Time     Time
	Cookie   uint64 // or what is made up for it
	Netns    uint32 // inode of the network namespace
	Flow     Flow
	Old, New State
	Process  Process // who closed, where the kernel side knows
	Timers   Timers
	Err      uint16 // sk_err
	RcvShut  bool   // RCV_SHUTDOWN: nothing more will be read
	SndShut  bool   // SEND_SHUTDOWN: nothing more will be written
	Dead     bool   // SOCK_DEAD: no process has it any more
	Done     bool   // SOCK_DONE: the peer's FIN has arrived
	Accepted bool   // descends from a listener
}

// Socket is one socket of a snapshot: a listener, a FIN_WAIT2 in any stage, or a
// minisock that has gone on to TIME_WAIT.
type Socket struct {
	Time     Time // when it was read
	Cookie   uint64
	Inode    uint64 // of a held socket, as in /proc/PID/fd
	Netns    uint32
	Flow     Flow
	State    State
	Stage    Stage
	Timers   Timers // without Handover, RTO and Linger2 are unknown (0) for a minisock
	Accepted bool
	Process  Process // with Handover, who closed; of a held one who holds it, if that is known
	Handover Time    // when it became a minisock, if there was no Event of that; 0 unknown

	LastAck time.Duration // since the peer last acknowledged; full sockets only
	Entry   time.Duration // since the minisock's entry stamp; -1 unknown
	Timer   time.Duration // until the timer that ends this stage; valid if HasTimer

	HasTimer bool
}

// Coverage says what a finished snapshot has looked at.
type Coverage struct {
	Begin, End Time
	Netns      map[uint32]NetnsCounters // the namespaces that were walked
	Skipped    []string                 // those that could not be, each with why
}

// NetnsCounters are totals of one network namespace.
type NetnsCounters struct {
	TimeWaitOverflow uint64 // TcpExt TCPTimeWaitOverflow
}
