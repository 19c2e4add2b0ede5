// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// A Lookup asks for what is in single network namespaces, for sockets by
// sock_diag(7). Close it after a series of questions: it keeps the namespaces
// alive. It may be asked again after that, and remembers the ways into them.
type Lookup struct {
	spaces *namespaces
	fresh  bool // spaces are of this series
	conns  map[uint32]*netlink.Conn
}

// Close ends the series.
func (l *Lookup) Close() error {
	var errs []error
	for _, c := range l.conns {
		errs = append(errs, c.Close())
	}
	l.conns, l.fresh = nil, false
	return errors.Join(errs...)
}

// include/uapi/linux/inet_diag.h: struct inet_diag_req_v2 and the inet_diag_msg
// that answers it, of which the second byte is the state.
const (
	diagRequestSize  = 56
	diagAnswerCookie = 44
	noCookie         = 0xffffffffffffffff // INET_DIAG_NOCOOKIE, twice
)

// Find asks for the connection, in any state, between the two ends of a flow,
// and returns its state and cookie; 0 and 0 if there is none. A minisock's
// state is that of its substate.
func (l *Lookup) Find(netns uint32, f events.Flow) (events.State, uint64, error) {
	conn, err := l.dial(netns)
	if err != nil {
		return 0, 0, err
	}
	family, local, remote := byte(unix.AF_INET6), f.Local.IP().AsSlice(), f.Remote.IP().AsSlice()
	if len(local) == 4 {
		family = unix.AF_INET
	}
	req := make([]byte, diagRequestSize)
	req[0], req[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 0xffffffff) // all states
	binary.BigEndian.PutUint16(req[8:], f.Local.Port)
	binary.BigEndian.PutUint16(req[10:], f.Remote.Port)
	copy(req[12:28], local)
	copy(req[28:44], remote)
	binary.NativeEndian.PutUint32(req[44:], f.Device)
	binary.NativeEndian.PutUint64(req[48:], noCookie)
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request},
		Data:   req,
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	for _, a := range answers {
		state, cookie, err := decodeFound(a.Data)
		if state != 0 || err != nil {
			return state, cookie, err
		}
	}
	return 0, 0, nil
}

// decodeFound reads the state and the cookie of an inet_diag_msg; 0 and 0 of a
// listener: the kernel falls back to the one that would take a SYN of the flow.
func decodeFound(message []byte) (events.State, uint64, error) {
	if len(message) < diagAnswerCookie+8 {
		return 0, 0, fmt.Errorf("an answer of %d bytes from sock_diag", len(message))
	}
	state := events.State(message[1])
	if state == events.Listen {
		return 0, 0, nil
	}
	low := binary.NativeEndian.Uint32(message[diagAnswerCookie:])
	high := binary.NativeEndian.Uint32(message[diagAnswerCookie+4:])
	return state, uint64(high)<<32 | uint64(low), nil
}

func (l *Lookup) dial(netns uint32) (*netlink.Conn, error) {
	if c := l.conns[netns]; c != nil {
		return c, nil
	}
	there, err := l.open(netns)
	if err != nil {
		return nil, err
	}
	var config netlink.Config
	if there != nil {
		defer there.Close()
		config.NetNS = int(there.Fd())
	}
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &config)
	if err != nil {
		return nil, err
	}
	if l.conns == nil {
		l.conns = map[uint32]*netlink.Conn{}
	}
	l.conns[netns] = c
	return c, nil
}

// open returns a file that enters a namespace, nil for the caller's own. It goes
// through the processes of the host once in a series at most, and only where no
// way in is known.
func (l *Lookup) open(netns uint32) (*os.File, error) {
	own, err := OwnNetns()
	if err != nil {
		return nil, err
	}
	if netns == own {
		return nil, nil
	}
	if l.spaces != nil {
		if f, err := l.spaces.open(netns); err == nil || l.fresh {
			return f, err
		}
	}
	spaces, err := findNamespaces()
	if err != nil {
		return nil, err
	}
	l.spaces, l.fresh = &spaces, true
	return spaces.open(netns)
}
