// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
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

// Owners looks through /proc/PID/fd for the processes that hold the sockets
// with these inodes. A socket that several processes hold is given to the one
// with the lowest pid. Those it cannot find, or may not see, are absent; the
// error says, in one line, which processes it may not look at.
func Owners(inodes map[uint64]bool) (map[uint64]events.Process, error) {
	owners := make(map[uint64]events.Process, len(inodes))
	if len(inodes) == 0 {
		return owners, nil
	}
	hidden := false
	for _, pid := range pids() {
		dir := filepath.Join("/proc", strconv.FormatUint(uint64(pid), 10))
		var process events.Process // read when a socket is found
		found, err := socketInodes(dir)
		hidden = hidden || errors.Is(err, fs.ErrPermission)
		for _, inode := range found {
			if !inodes[inode] {
				continue
			}
			if held, ok := owners[inode]; ok && held.PID < pid {
				continue
			}
			if !process.Known() {
				process = readProcess(dir, pid)
			}
			owners[inode] = process
		}
	}
	var lacks []string
	if !may(unix.CAP_DAC_READ_SEARCH) && !may(unix.CAP_DAC_OVERRIDE) {
		lacks = append(lacks, "CAP_DAC_READ_SEARCH")
	}
	if !may(unix.CAP_SYS_PTRACE) {
		lacks = append(lacks, "CAP_SYS_PTRACE")
	}
	// With both a security module hides them, single ones and for good.
	if !hidden || len(lacks) == 0 {
		return owners, nil
	}
	return owners, fmt.Errorf("what processes of other users hold: no permission (%s)", strings.Join(lacks, ", "))
}

func pids() []uint32 {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	found := make([]uint32, 0, len(entries))
	for _, e := range entries {
		if pid, err := strconv.ParseUint(e.Name(), 10, 32); err == nil {
			found = append(found, uint32(pid))
		}
	}
	return found
}

// socketInodes lists the sockets that the process under dir has open. What was
// read before an error is as good.
func socketInodes(dir string) (inodes []uint64, err error) {
	f, err := os.Open(filepath.Join(dir, "fd"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	var link [64]byte
	for _, name := range names {
		n, e := unix.Readlinkat(int(f.Fd()), name, link[:])
		if e != nil {
			err = e
			continue
		}
		if digits, ok := bytes.CutPrefix(link[:n], []byte("socket:[")); ok {
			inode, err := strconv.ParseUint(string(bytes.TrimSuffix(digits, []byte("]"))), 10, 64)
			if err == nil {
				inodes = append(inodes, inode)
			}
		}
	}
	return inodes, err
}

func readProcess(dir string, pid uint32) events.Process {
	p := events.Process{PID: pid}
	if comm, err := os.ReadFile(filepath.Join(dir, "comm")); err == nil {
		copy(p.Comm[:len(p.Comm)-1], bytes.TrimSuffix(comm, []byte("\n")))
	}
	p.Cgroup = cgroupID(filepath.Join(dir, "cgroup"))
	return p
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroupID is the cgroup2 id of the process whose /proc/PID/cgroup this is: the
// inode of its directory (kernfs), which is what bpf_get_current_cgroup_id gives.
func cgroupID(file string) uint64 {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		// One that begins with .. is outside our cgroup namespace (cgroup_namespaces(7)).
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok && !strings.HasPrefix(path, "/..") {
			var st unix.Stat_t
			if unix.Stat(filepath.Join(cgroupRoot, path), &st) == nil {
				return st.Ino
			}
		}
	}
	return 0
}

// CgroupPath is the path below the cgroup2 root of a cgroup id, "" if it is
// gone or there is no cgroup2.
func CgroupPath(id uint64) string {
	if id == 0 {
		return ""
	}
	root, err := unix.Open(cgroupRoot, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(root)
	// A kernfs file handle is the 64-bit id (FILEID_KERNFS, include/linux/exportfs.h).
	const fileidKernfs = 0xfe
	handle := make([]byte, 0, 8)
	for shift := 0; shift < 64; shift += 8 {
		handle = append(handle, byte(id>>shift))
	}
	fd, err := unix.OpenByHandleAt(root, unix.NewFileHandle(fileidKernfs, handle), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return ""
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(path, cgroupRoot), "/")
}
