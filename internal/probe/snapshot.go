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
// buffer for it holds some 200 rows.
const rowsPerRead = 512

// socketsAtOnce is how many are handed on at once: what one run of the walk finds, mostly,
// so that whoever is given them has the time of the next.
const socketsAtOnce = aimedRows

// Snapshot walks the TCP sockets of every network namespace and calls fn with
// the listeners, the connections in FIN_WAIT2, and those minisocks that went
// from FIN_WAIT2 to TIME_WAIT since the last Snapshot and whose cookies known
// names; it may be called with some others. The listeners of a namespace come
// before its connections. The first Snapshot after Open knows who holds them, of those
// that were there then. A slice stays as it is until the next call of fn returns.
// What could not be looked at is in the Coverage; the error is for when nothing could.
func (p *Probe) Snapshot(known func(show func(cookie uint64)), fn func([]events.Socket)) (events.Coverage, error) {
	cov := events.Coverage{Begin: Now(), Netns: map[uint32]events.NetnsCounters{}}
	spaces, err := findNamespaces()
	if err != nil {
		return cov, err
	}
	l := look{Probe: p, spaces: &spaces, lookup: Lookup{spaces: &spaces}, fn: fn,
		tables: map[uint64]bool{}, strangers: map[uint32]bool{},
		sockets: make([]events.Socket, 0, socketsAtOnce), before: make([]events.Socket, 0, socketsAtOnce)}
	defer l.lookup.Close()
	if err := l.begin(known, cov.Begin); err != nil {
		return cov, err
	}
	locked := false
	failed := func(inode uint32, err error) {
		delete(cov.Netns, inode)
		switch {
		case errors.Is(err, errEnter) && errors.Is(err, unix.EPERM):
			locked = true
		case !gone(err):
			cov.Skipped = append(cov.Skipped, fmt.Sprintf("network namespace %d: %v", inode, err))
		}
	}
	for inode := range spaces.all() {
		counters, err := l.at(inode)
		if err != nil {
			failed(inode, err)
			continue
		}
		cov.Netns[inode] = counters
	}
	for inode := range l.strangers {
		if err := l.iterate(inode); err != nil {
			failed(inode, err)
		}
	}
	cov.End = Now()
	slices.Sort(cov.Skipped)
	if locked {
		cov.Skipped = append(cov.Skipped, "other network namespaces: no permission to enter them (CAP_SYS_ADMIN)")
	}
	if spaces.hidden {
		cov.Skipped = append(cov.Skipped, "network namespaces of other processes: no permission (CAP_SYS_PTRACE)")
	}
	if len(cov.Netns) == 0 {
		return cov, errors.New("no network namespace could be looked at: " + strings.Join(cov.Skipped, "; "))
	}
	return cov, nil
}

// A look is one Snapshot.
type look struct {
	*Probe
	spaces *namespaces
	lookup Lookup
	fn     func([]events.Socket)
	owners *Owners

	tables    map[uint64]bool // those that the walker has been through
	strangers map[uint32]bool // the namespaces of connections that have no cookie yet
	sockets   []events.Socket
	before    []events.Socket // those that fn was called with last
	bytes     []byte          // reused
}

func (l *look) begin(known func(func(uint64)), now events.Time) error {
	l.owners = l.firstOwners()
	since := l.looked
	l.looked = now
	switch {
	case l.bare:
		return nil
	case l.walker != nil:
		l.walker.show(known)
		return nil
	}
	// Not their age: this process may be stopped before it reads them.
	if err := l.objects.TimeWaitSince.Set(uint64(max(since.Add(-time.Second), 0))); err != nil {
		return fmt.Errorf("set which minisocks to show: %w", err)
	}
	return nil
}

// at looks at one namespace, and with the walker at all that share its tables.
func (l *look) at(inode uint32) (counters events.NetnsCounters, err error) {
	if l.bare {
		return walkBare(&l.lookup, inode, l.fn)
	}
	used := true
	err = l.spaces.enter(inode, func() (err error) {
		counters.TimeWaitOverflow, err = readProc("/proc/thread-self/net/netstat", timeWaitOverflow)
		if err != nil {
			return err
		}
		if l.walker != nil {
			return l.walk()
		}
		// The hash table is the whole host's: where there is no socket, do not walk it.
		used, err = usesTCP()
		return err
	})
	if err == nil && l.walker == nil && used {
		err = l.iterate(inode)
	}
	return counters, err
}

// walk goes through the calling thread's tables, once.
func (l *look) walk() error {
	table, err := l.walker.table()
	if err != nil || l.tables[table] {
		return err
	}
	err = l.walker.walk(func(rows []bpfRow) {
		for i := range rows {
			r := &rows[i]
			if r.Cookie == 0 && events.State(r.State) == events.FinWait2 {
				l.strangers[r.Netns] = true
				continue
			}
			l.clock.socket(r, l.next())
		}
		l.handOn()
	})
	l.tables[table] = err == nil
	return err
}

// next is the place of one more socket.
func (l *look) next() *events.Socket {
	if len(l.sockets) == cap(l.sockets) {
		l.handOn()
	}
	l.sockets = append(l.sockets, events.Socket{})
	return &l.sockets[len(l.sockets)-1]
}

// handOn calls fn with the sockets.
func (l *look) handOn() {
	for i := range l.sockets {
		if s := &l.sockets[i]; s.Stage == events.Held {
			s.Process = l.owners.Of(s.Inode)
		}
	}
	if len(l.sockets) > 0 {
		l.fn(l.sockets)
		l.sockets, l.before = l.before[:0], l.sockets
	}
}

// iterate has the iterator go through a namespace: it gives the connections there
// cookies, for their later events and minisocks to have too.
func (l *look) iterate(inode uint32) error {
	var sockets io.ReadCloser
	err := l.spaces.enter(inode, func() (err error) {
		// It keeps to the namespace it was opened in.
		sockets, err = l.iterator.Open()
		return err
	})
	if err != nil {
		return err
	}
	defer sockets.Close()
	if l.bytes == nil {
		l.bytes = make([]byte, rowsPerRead*rowSize)
	}
	err = readRows(sockets, l.bytes, rowSize, func(rows []byte) error {
		for i := 0; i < len(rows); i += rowSize {
			if err := l.clock.decodeRow(rows[i:i+rowSize], l.next()); err != nil {
				return err
			}
		}
		l.handOn()
		return nil
	})
	if err != nil {
		return fmt.Errorf("walk the sockets: %w", err)
	}
	return nil
}

// readRows reads an iterator to its end and calls fn with whole rows of a size,
// some at a time, in the buffer.
func readRows(iterator io.Reader, buffer []byte, size int, fn func(rows []byte) error) error {
	filled := 0
	for {
		n, err := iterator.Read(buffer[filled:])
		filled += n
		whole := filled / size * size
		if err := fn(buffer[:whole]); err != nil {
			return err
		}
		filled = copy(buffer, buffer[whole:filled])
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, unix.EAGAIN):
			// bpf_seq_read() of kernel/bpf/bpf_iter.c: a million that are not shown,
			// as sockets in TIME_WAIT, are as many as one read may pass.
		case err != nil:
			return err
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
