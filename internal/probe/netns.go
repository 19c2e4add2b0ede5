// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Namespaces finds the network namespaces of the host: those that processes
// are in and those that are mounted (as `ip netns` and container runtimes do).
// It maps each one's inode to a file that enters it.
func Namespaces() (map[uint32]string, error) {
	found, err := mountedNamespaces()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range entries {
		if name := e.Name(); name[0] < '0' || name[0] > '9' {
			continue
		}
		path := filepath.Join("/proc", e.Name(), "ns/net")
		target, err := os.Readlink(path)
		if err != nil {
			continue // The process is gone, or a zombie, or not ours to see.
		}
		if inode, ok := parseNamespace(target); ok && found[inode] == "" {
			found[inode] = path
		}
	}
	// The own one comes last: it needs no entering, whoever else is in it.
	own, err := ownNamespace()
	if err != nil {
		return nil, err
	}
	found[own] = ""
	return found, nil
}

func ownNamespace() (uint32, error) {
	target, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0, fmt.Errorf("read the own network namespace: %w", err)
	}
	inode, ok := parseNamespace(target)
	if !ok {
		return 0, fmt.Errorf("/proc/self/ns/net is %q, not net:[inode]", target)
	}
	return inode, nil
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

// inNamespace runs fn on a thread in the network namespace that path names; ""
// is the caller's own.
func inNamespace(path string, fn func() error) error {
	if path == "" {
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
		there, err := os.Open(path)
		if err != nil {
			result <- err
			return
		}
		defer there.Close()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("enter %s: %w", path, err)
			return
		}
		err = fn()
		if back := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); back != nil {
			// Left locked, the thread ends with this goroutine.
			result <- errors.Join(err, fmt.Errorf("leave %s: %w", path, back))
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
