// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// Statistics reads the counts and counters of TCP in a network namespace, by
// inode: those of /proc/net/sockstat as "TCP tw", of /proc/net/snmp as "Tcp
// CurrEstab", and of /proc/net/netstat as "TcpExt TCPTimeWaitOverflow". The
// orphans are the whole host's in each of them.
func (l *Lookup) Statistics(netns uint32) (map[string]int64, error) {
	there, err := l.open(netns)
	if err != nil {
		return nil, fmt.Errorf("statistics of network namespace %d: %w", netns, err)
	}
	if there != nil {
		defer there.Close()
	}
	found := map[string]int64{}
	err = inNamespace(there, func() error {
		sockstat, err := readProc("/proc/thread-self/net/sockstat", func(r io.Reader) (map[string]uint64, error) {
			return protocolCounts(r, "TCP:")
		})
		for name, n := range sockstat {
			found["TCP "+name] = int64(n)
		}
		for _, file := range []string{"snmp", "netstat"} {
			_, more := readProc("/proc/thread-self/net/"+file, func(r io.Reader) (struct{}, error) {
				return struct{}{}, pairedLines(r, found)
			})
			err = cmp.Or(err, more)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("statistics of network namespace %d: %w", netns, err)
	}
	return found, nil
}

// pairedLines reads lines of names and values in turn: "Tcp: A B", "Tcp: 1 2".
func pairedLines(r io.Reader, into map[string]int64) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	var names []string
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 {
			continue
		}
		if names == nil || names[0] != fields[0] {
			names = fields
			continue
		}
		for i := 1; i < min(len(names), len(fields)); i++ {
			n, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return fmt.Errorf("%s %s: %w", names[0], names[i], err)
			}
			into[strings.TrimSuffix(names[0], ":")+" "+names[i]] = n
		}
		names = nil
	}
	return lines.Err()
}

// CloseWait lists the sockets of a network namespace in CLOSE_WAIT: the peer has
// closed, and the process, if Owners finds it by the inode, has not.
func (l *Lookup) CloseWait(netns uint32) (sockets []events.Socket, err error) {
	err = l.dump(netns, events.CloseWait, func(message []byte) error {
		s, err := decodeDiag(message)
		s.Netns = netns
		sockets = append(sockets, s)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sockets of network namespace %d: %w", netns, err)
	}
	return sockets, nil
}

const diagAnswerSize = 72 // struct inet_diag_msg

// diagSocket reads what an inet_diag_msg has of any socket.
func diagSocket(b []byte) events.Socket {
	address := func(at int) netip.Addr {
		if b[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b[at : at+4]))
		}
		return netip.AddrFrom16([16]byte(b[at : at+16]))
	}
	low, high := binary.NativeEndian.Uint32(b[diagAnswerCookie:]), binary.NativeEndian.Uint32(b[diagAnswerCookie+4:])
	return events.Socket{
		Cookie: uint64(high)<<32 | uint64(low),
		Inode:  uint64(binary.NativeEndian.Uint32(b[diagAnswerSize-4:])),
		Flow: events.Flow{
			Local:  events.EndpointFrom(netip.AddrPortFrom(address(8), binary.BigEndian.Uint16(b[4:]))),
			Remote: events.EndpointFrom(netip.AddrPortFrom(address(24), binary.BigEndian.Uint16(b[6:]))),
			Device: binary.NativeEndian.Uint32(b[40:]),
		},
	}
}
