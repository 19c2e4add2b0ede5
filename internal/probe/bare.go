// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// OpenBare is for where BPF cannot be used: Snapshot asks sock_diag(7), which any
// user may do in their own network namespace, and there are no records. What is
// less: when a held connection began that was not there at the snapshot before,
// TCP_LINGER2, which side accepted it where nobody listens any more, and the
// TIME_WAIT minisocks that show how a FIN_WAIT2 one ended.
func OpenBare() (*Probe, error) {
	clock, err := prepare()
	return &Probe{clock: clock, bare: true}, err
}

// Bare says whether there are no records, because BPF cannot be used.
func (p *Probe) Bare() bool { return p.bare }

// walkBare is walk by sock_diag.
func walkBare(lookup *Lookup, inode uint32, fn func([]events.Socket)) (counters events.NetnsCounters, err error) {
	if _, err := lookup.dial(inode); err != nil {
		return counters, fmt.Errorf("%w: %w", errEnter, err)
	}
	statistics, err := lookup.Statistics(inode)
	if err != nil {
		return counters, err
	}
	counters.TimeWaitOverflow = uint64(statistics["TcpExt TCPTimeWaitOverflow"])
	settings, err := lookup.Sysctls(inode)
	if err != nil {
		return counters, err
	}
	finTimeout := time.Duration(settings[events.SysctlFinTimeout]) * time.Second
	for _, state := range []events.State{events.Listen, events.FinWait2} {
		var sockets []events.Socket
		err := lookup.dump(inode, state, func(message []byte) error {
			s, err := decodeDiag(message)
			if err != nil {
				return err
			}
			s.Netns, s.Time = inode, Now()
			s.Timers.FinTimeout = finTimeout
			sockets = append(sockets, s)
			return nil
		})
		if err != nil {
			return counters, err
		}
		if len(sockets) > 0 {
			fn(sockets)
		}
	}
	return counters, nil
}

// dump asks for the sockets of a state, and calls fn with each inet_diag_msg and
// the attributes behind it.
func (l *Lookup) dump(netns uint32, state events.State, fn func([]byte) error) error {
	conn, err := l.dial(netns)
	if err != nil {
		return err
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, diagRequestSize)
		req[0], req[1] = family, unix.IPPROTO_TCP
		req[2] = 1 << (inetDiagInfo - 1)
		binary.NativeEndian.PutUint32(req[4:], 1<<state)
		answers, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump},
			Data:   req,
		})
		if err != nil {
			return err
		}
		for _, a := range answers {
			if err := fn(a.Data); err != nil {
				return err
			}
		}
	}
	return nil
}

// include/uapi/linux/inet_diag.h
const (
	inetDiagInfo       = 2  // INET_DIAG_INFO, a struct tcp_info
	diagAnswerTimer    = 2  // idiag_timer
	diagAnswerExpires  = 52 // idiag_expires, in ms
	diagTimerKeepalive = 2
	diagTimerTimeWait  = 3
)

// decodeDiag reads an inet_diag_msg with its attributes: all of a socket that
// sock_diag shows, but for its namespace and when it was read.
func decodeDiag(b []byte) (events.Socket, error) {
	if len(b) < diagAnswerSize {
		return events.Socket{}, fmt.Errorf("an answer of %d bytes from sock_diag", len(b))
	}
	s := diagSocket(b)
	s.State, s.Entry = events.State(b[1]), -1
	timer := b[diagAnswerTimer]
	if timer == diagTimerTimeWait || timer == diagTimerKeepalive {
		s.Timer = time.Duration(binary.NativeEndian.Uint32(b[diagAnswerExpires:])) * time.Millisecond
	}
	switch {
	case s.State != events.FinWait2:
		return s, nil
	case timer == diagTimerTimeWait:
		s.Stage, s.HasTimer = events.Minisock, true
	case s.Inode == 0:
		s.Stage, s.HasTimer = events.Orphaned, timer == diagTimerKeepalive
	default:
		s.Stage = events.Held // A keepalive timer of its own ends nothing here.
	}
	attributes, err := netlink.NewAttributeDecoder(b[diagAnswerSize:])
	if err != nil {
		return s, fmt.Errorf("an answer from sock_diag: %w", err)
	}
	for attributes.Next() {
		if attributes.Type() != inetDiagInfo {
			continue
		}
		var info unix.TCPInfo // Older kernels send less of it.
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info)), attributes.Bytes())
		s.Timers.RTO = time.Duration(info.Rto) * time.Microsecond
		s.LastAck = time.Duration(info.Last_ack_recv) * time.Millisecond
	}
	if err := attributes.Err(); err != nil {
		return s, fmt.Errorf("an answer from sock_diag: %w", err)
	}
	return s, nil
}
