// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// rowsPerRead bounds what one read of the iterator returns; the kernel's own
// buffer for it holds some 290 rows.
const rowsPerRead = 512

// Snapshot walks the TCP sockets of every network namespace and calls fn with
// the listeners, the connections in FIN_WAIT2, and those minisocks that went
// from FIN_WAIT2 to TIME_WAIT within the last `since` and that fintrace has
// seen before. A namespace's listeners come before its connections. The slice
// is reused. What could not be looked at is in the Coverage; the error is for
// when nothing could.
func (p *Probe) Snapshot(since time.Duration, fn func([]events.Socket)) (events.Coverage, error) {
	cov := events.Coverage{Begin: Now(), Netns: map[uint32]events.NetnsCounters{}}
	if !p.bare {
		// Not their age: this process may be stopped before it reads them.
		if err := p.objects.TimeWaitSince.Set(uint64(max(cov.Begin.Add(-min(since, 2*time.Minute)), 0))); err != nil {
			return cov, fmt.Errorf("set which minisocks to show: %w", err)
		}
	}
	spaces, err := findNamespaces()
	if err != nil {
		return cov, err
	}
	lookup := Lookup{spaces: &spaces}
	defer lookup.Close()
	buf := rowBuffer{bytes: make([]byte, rowsPerRead*rowSize), sockets: make([]events.Socket, 0, rowsPerRead)}
	for inode := range spaces.paths {
		var counters events.NetnsCounters
		if p.bare {
			counters, err = walkBare(&lookup, inode, fn)
		} else {
			counters, err = p.walk(spaces, inode, &buf, fn)
		}
		if err != nil {
			if !gone(err) {
				cov.Skipped = append(cov.Skipped, fmt.Sprintf("network namespace %d: %v", inode, err))
			}
			continue
		}
		cov.Netns[inode] = counters
	}
	cov.End = Now()
	slices.Sort(cov.Skipped)
	if spaces.hidden {
		cov.Skipped = append(cov.Skipped, "network namespaces of other processes: no permission (CAP_SYS_PTRACE)")
	}
	if len(cov.Netns) == 0 {
		return cov, errors.New("no network namespace could be looked at: " + strings.Join(cov.Skipped, "; "))
	}
	return cov, nil
}

type rowBuffer struct {
	bytes   []byte
	sockets []events.Socket
}

func (p *Probe) walk(spaces namespaces, inode uint32, buf *rowBuffer, fn func([]events.Socket)) (events.NetnsCounters, error) {
	var (
		counters events.NetnsCounters
		iter     io.ReadCloser
	)
	there, err := spaces.open(inode)
	if err != nil {
		return counters, err
	}
	// The iterator keeps to the namespace it was opened in.
	err = inNamespace(there, func() (err error) {
		counters.TimeWaitOverflow, err = readProc("/proc/thread-self/net/netstat", timeWaitOverflow)
		if err != nil {
			return err
		}
		// The hash table is the whole host's: where there is no socket, do not walk it.
		used, err := usesTCP()
		if err != nil || !used {
			return err
		}
		iter, err = p.walker.Open()
		return err
	})
	if there != nil {
		there.Close() // It would keep the namespace.
	}
	if err != nil || iter == nil {
		return counters, err
	}
	defer iter.Close()

	filled := 0
	for {
		n, err := iter.Read(buf.bytes[filled:])
		filled += n
		buf.sockets = buf.sockets[:0]
		used := 0
		for ; filled-used >= rowSize; used += rowSize {
			var s events.Socket
			if err := p.clock.decodeRow(buf.bytes[used:used+rowSize], &s); err != nil {
				return counters, err
			}
			buf.sockets = append(buf.sockets, s)
		}
		filled = copy(buf.bytes, buf.bytes[used:filled])
		if len(buf.sockets) > 0 {
			fn(buf.sockets)
		}
		if errors.Is(err, io.EOF) {
			return counters, nil
		}
		// bpf_seq_read() of kernel/bpf/bpf_iter.c: a million sockets that are not
		// shown, as those in TIME_WAIT, are as many as one read may pass.
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return counters, fmt.Errorf("walk the sockets: %w", err)
		}
	}
}

// usesTCP says whether the calling thread's network namespace has a TCP socket,
// orphans included, or a minisock.
func usesTCP() (bool, error) {
	v4, err := readProc("/proc/thread-self/net/sockstat", func(r io.Reader) (map[string]uint64, error) {
		return protocolCounts(r, "TCP:")
	})
	if err != nil {
		return false, err
	}
	v6, err := readProc("/proc/thread-self/net/sockstat6", func(r io.Reader) (map[string]uint64, error) {
		return protocolCounts(r, "TCP6:")
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
		return false, err
	}
	return v4["inuse"]+v4["tw"]+v6["inuse"] > 0, nil
}

// readProc parses a file of the calling thread's network namespace.
func readProc[T any](path string, parse func(io.Reader) (T, error)) (result T, err error) {
	f, err := os.Open(path)
	if err != nil {
		return result, err
	}
	defer f.Close()
	result, err = parse(f)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return result, err
}

// protocolCounts reads the "name value" pairs of the line that starts with prefix.
func protocolCounts(r io.Reader, prefix string) (map[string]uint64, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	counts := map[string]uint64{}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != prefix {
			continue
		}
		for i := 1; i+1 < len(fields); i += 2 {
			n, err := strconv.ParseUint(fields[i+1], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s %s: %w", prefix, fields[i], err)
			}
			counts[fields[i]] = n
		}
	}
	return counts, nil
}

// timeWaitOverflow reads TcpExt TCPTimeWaitOverflow of net/netstat: a line of
// names, then a line of values.
func timeWaitOverflow(r io.Reader) (uint64, error) {
	const prefix, name = "TcpExt:", "TCPTimeWaitOverflow"
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	column := -1
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		switch {
		case len(fields) == 0 || fields[0] != prefix:
		case column < 0:
			column = slices.Index(fields, name)
		case column < len(fields):
			return strconv.ParseUint(fields[column], 10, 64)
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("no %s %s", prefix, name)
}
