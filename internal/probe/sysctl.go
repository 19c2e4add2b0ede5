// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// OwnNetns is the inode of the caller's network namespace.
func OwnNetns() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, fmt.Errorf("look at the own network namespace: %w", err)
	}
	return uint32(st.Ino), nil
}

// Sysctls reads the sysctls of a network namespace, by inode; 0 is the caller's
// own, which anybody may read. To enter another takes root. With an error come
// those that could be read.
func (l *Lookup) Sysctls(netns uint32) (events.Sysctls, error) {
	own, err := OwnNetns()
	if err != nil {
		return nil, err
	}
	var there *os.File
	if netns != 0 && netns != own {
		if there, err = l.enter(netns); err != nil {
			return nil, fmt.Errorf("sysctls of network namespace %d: %w", netns, err)
		}
		defer there.Close()
	}
	found := events.Sysctls{}
	if err := inNamespace(there, func() error { return readSysctls(found, events.SysctlNames()...) }); err != nil {
		return found, fmt.Errorf("sysctls of network namespace %d: %w", netns, err)
	}
	// The kernel has one tcp_max_orphans for all (ipv4_table of
	// net/ipv4/sysctl_net_ipv4.c), and shows it in the first namespace only:
	// that may be ours, or that of init. If not, it stays absent.
	for _, path := range []string{"/proc/thread-self/ns/net", "/proc/1/ns/net"} {
		if _, ok := found[events.SysctlMaxOrphans]; ok {
			break
		}
		if first, err := os.Open(path); err == nil {
			_ = inNamespace(first, func() error { return readSysctls(found, events.SysctlMaxOrphans) })
			first.Close()
		}
	}
	return found, nil
}

func (l *Lookup) enter(inode uint32) (*os.File, error) {
	f, err := l.open(inode)
	switch {
	case err != nil && os.Geteuid() != 0:
		return nil, errors.New("to enter it takes root")
	case err != nil:
		return nil, fmt.Errorf("no way into it: %w", err)
	}
	return f, nil
}

// readSysctls reads those that the namespace of this thread has. The error is the
// first there is.
func readSysctls(into events.Sysctls, names ...string) (first error) {
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/")))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			first = cmp.Or(first, fmt.Errorf("read %s: %w", name, err))
			continue
		}
		value, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			first = cmp.Or(first, fmt.Errorf("%s is %q, not a number", name, text))
			continue
		}
		into[name] = value
	}
	return first
}
