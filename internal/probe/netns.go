// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// namespaces are the network namespaces of the host, by inode.
type namespaces struct {
	own    uint32
	paths  map[uint32][]string // files that enter it
	hidden bool                // it takes CAP_SYS_PTRACE to see those of some processes
}

// pathsKept is how many processes of a namespace are remembered as ways in: one
// may be gone before it is used.
const pathsKept = 8

// findNamespaces finds those that processes are in and those that are mounted
// (as `ip netns` and container runtimes do).
func findNamespaces() (namespaces, error) {
	found := namespaces{paths: map[uint32][]string{}}
	mounted, err := mountedNamespaces()
	if err != nil {
		return found, err
	}
	for inode, path := range mounted {
		found.paths[inode] = []string{path}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return found, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range entries {
		if name := e.Name(); name[0] < '0' || name[0] > '9' {
			continue
		}
		path := filepath.Join("/proc", e.Name(), "ns/net")
		target, err := os.Readlink(path)
		switch {
		case errors.Is(err, fs.ErrPermission), err == nil && target == "": // "" is how Linux 5.10 refuses
			found.hidden = true
			continue
		case err != nil:
			continue // The process is gone, or a zombie.
		}
		if inode, ok := parseNamespace(target); ok && len(found.paths[inode]) < pathsKept {
			found.paths[inode] = append(found.paths[inode], path)
		}
	}
	// Where /proc is mounted with hidepid, the processes themselves are hidden,
	// of which the first is always there.
	if _, err := os.Stat("/proc/1"); err != nil {
		found.hidden = true
	}
	if may(unix.CAP_SYS_PTRACE) {
		found.hidden = false // A security module hides them, single ones and for good.
	}
	const own = "/proc/thread-self/ns/net"
	target, err := os.Readlink(own)
	if err != nil {
		return found, fmt.Errorf("read the own network namespace: %w", err)
	}
	inode, ok := parseNamespace(target)
	if !ok {
		return found, fmt.Errorf("%s is %q, not net:[inode]", own, target)
	}
	found.own, found.paths[inode] = inode, nil
	return found, nil
}

// may says whether this thread has a capability, of those up to 31.
func may(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<capability) != 0
}

// open opens a file that enters a namespace; nil for the own one, which needs
// no entering. A process that was in it may have gone elsewhere since.
func (n namespaces) open(inode uint32) (*os.File, error) {
	if inode == n.own {
		return nil, nil
	}
	err := fs.ErrNotExist
	for _, path := range n.paths[inode] {
		f, e := os.Open(path)
		if e != nil {
			err = e
			continue
		}
		var st unix.Stat_t
		if unix.Fstat(int(f.Fd()), &st) == nil && uint32(st.Ino) == inode {
			return f, nil
		}
		f.Close()
	}
	return nil, err
}

// enter runs fn on a thread in a namespace.
func (n namespaces) enter(inode uint32, fn func() error) error {
	there, err := n.open(inode)
	if err != nil {
		return err
	}
	if there != nil {
		defer there.Close() // It would keep the namespace.
	}
	return inNamespace(there, fn)
}

// all yields the namespaces, the own one first.
func (n namespaces) all() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if !yield(n.own) {
			return
		}
		for inode := range n.paths {
			if inode != n.own && !yield(inode) {
				return
			}
		}
	}
}

// NamespaceNames maps the inodes of mounted network namespaces to their names.
func NamespaceNames() (map[uint32]string, error) {
	names, err := mountedNamespaces()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(names, func(_ uint32, path string) bool { return filepath.Dir(path) != "/run/netns" })
	for inode, path := range names {
		names[inode] = filepath.Base(path)
	}
	return names, nil
}

func mountedNamespaces() (map[uint32]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	return parseMounts(f)
}

func parseMounts(r io.Reader) (map[uint32]string, error) {
	found := map[uint32]string{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		// proc_pid_mountinfo(5): the fourth field is the root, the fifth the mount point.
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 {
			continue
		}
		if inode, ok := parseNamespace(fields[3]); ok && found[inode] == "" {
			found[inode] = unescapeMount.Replace(fields[4])
		}
	}
	return found, lines.Err()
}

// unescapeMount undoes the kernel's mangle_path().
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// parseNamespace reads "net:[4026531840]".
func parseNamespace(s string) (uint32, bool) {
	s, ok := strings.CutPrefix(s, "net:[")
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, "]")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(s, 10, 32)
	return uint32(inode), err == nil
}

// errEnter is that a network namespace cannot be entered.
var errEnter = errors.New("enter it")

// inNamespace runs fn on a thread in the network namespace that a file is of;
// nil is the caller's own.
func inNamespace(there *os.File, fn func() error) error {
	if there == nil {
		return fn()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			result <- err
			return
		}
		defer back.Close()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("%w: %w", errEnter, err)
			return
		}
		err = fn()
		if back := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); back != nil {
			// Left locked, the thread ends with this goroutine.
			result <- errors.Join(err, fmt.Errorf("leave it: %w", back))
			return
		}
		runtime.UnlockOSThread()
		result <- err
	}()
	return <-result
}

// gone says that a namespace or process went away while it was looked at.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}
