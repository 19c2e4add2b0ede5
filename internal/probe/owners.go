// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

// An ownerFinder goes through the files of all processes for the sockets in a state.
type ownerFinder struct {
	iterator *link.Iter
	holdings mapped[bpfHoldings]
}

// ownersAlone are the programs for it, and what they need: for them to be loaded beside the others.
func ownersAlone(spec *ebpf.CollectionSpec) *ebpf.CollectionSpec {
	return &ebpf.CollectionSpec{
		Programs: map[string]*ebpf.ProgramSpec{
			bpfProgOwners:       spec.Programs[bpfProgOwners],
			bpfProgOwnersByFile: spec.Programs[bpfProgOwnersByFile],
		},
		Maps:      map[string]*ebpf.MapSpec{bpfMapHoldings: spec.Maps[bpfMapHoldings]},
		Types:     spec.Types,
		ByteOrder: spec.ByteOrder,
	}
}

// newOwnerFinder returns nil and no error where the kernel lacks what it takes.
func newOwnerFinder(spec *ebpf.CollectionSpec, kernel *btf.Cache) (_ *ownerFinder, err error) {
	if there, err := showsOwners(kernel); err != nil || !there {
		return nil, err
	}
	if there, err := canWalk(kernel); err != nil {
		return nil, err
	} else if !there {
		spec.Programs[bpfProgOwners] = spec.Programs[bpfProgOwnersByFile]
	}
	var objects struct {
		Owners   *ebpf.Program `ebpf:"owners"`
		Holdings *ebpf.Map     `ebpf:"holdings"`
	}
	if err := spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{Cache: kernel}); err != nil {
		return nil, fmt.Errorf("load the look at the files of processes: %w", err)
	}
	defer func() { err = errors.Join(err, objects.Owners.Close(), objects.Holdings.Close()) }() // What is made of them keeps them.
	o := new(ownerFinder)
	if o.holdings, err = mapValue[bpfHoldings](objects.Holdings); err != nil {
		return nil, err
	}
	if o.iterator, err = link.AttachIter(link.IterOptions{Program: objects.Owners}); err != nil {
		return nil, errors.Join(fmt.Errorf("attach the look at the files of processes: %w", err), o.holdings.unmap())
	}
	return o, nil
}

func (o *ownerFinder) close() error { return errors.Join(o.iterator.Close(), o.holdings.unmap()) }

// Owners are the processes that hold the sockets of these inodes, which are all in one
// state. A socket that several processes hold is given to the one that began first: the
// others have inherited it, for good or until they run another program. Those whose
// process is not found, or may not be seen, have none; the error says, in one line,
// what could not be looked at.
func (p *Probe) Owners(state events.State, inodes []uint64) (*Owners, error) {
	switch {
	case len(inodes) == 0:
		return new(Owners), nil
	case p.owners == nil:
		return findOwners(inodes)
	}
	return p.owners.find(state)
}

// findFirstOwners makes the finder and has it look for those of the connections that
// are in FIN_WAIT2 now, while the other programs are loaded. It returns at once; from
// made comes that there is a finder, or why not.
func (p *Probe) findFirstOwners(spec *ebpf.CollectionSpec, kernel *btf.Cache) (made <-chan error) {
	spec = ownersAlone(spec)
	errs := make(chan error, 1)
	p.first = make(chan *Owners, 1)
	go func() {
		var err error
		p.owners, err = newOwnerFinder(spec, kernel)
		errs <- err
		owners := new(Owners)
		if p.owners != nil {
			owners, _ = p.owners.find(events.FinWait2)
		}
		p.first <- owners
	}()
	return errs
}

// firstOwners are those, once. Who could not be looked at, or all where the kernel lacks
// what it takes, is for Owners.
func (p *Probe) firstOwners() *Owners {
	if p.first == nil {
		return new(Owners)
	}
	owners := <-p.first
	p.first = nil
	return owners
}

// Owners are processes, and which sockets each holds.
type Owners struct {
	processes []owner
	held      []heldSocket
}

// heldSocket is a socket and who holds it, by number.
type heldSocket struct {
	inode   uint64
	process uint32
}

// Of is who holds the socket of an inode; not known if nobody does.
func (o *Owners) Of(inode uint64) events.Process {
	n, found := slices.BinarySearchFunc(o.held, inode, func(h heldSocket, inode uint64) int { return cmp.Compare(h.inode, inode) })
	if !found {
		return events.Process{}
	}
	return o.processes[o.held[n].process].process
}

// An owner is a process that holds sockets.
type owner struct {
	process events.Process
	began   events.Time
}

// holds says that the last of the processes holds a socket.
func (o *Owners) holds(inode uint64) {
	o.held = append(o.held, heldSocket{inode, uint32(len(o.processes) - 1)})
}

// sort is called when all are known. Of several that hold a socket it is the one that
// began first, or the one with the lowest pid of those.
func (o *Owners) sort() {
	slices.SortFunc(o.held, func(a, b heldSocket) int {
		if a.inode != b.inode {
			return cmp.Compare(a.inode, b.inode)
		}
		p, q := &o.processes[a.process], &o.processes[b.process]
		return cmp.Or(cmp.Compare(p.began, q.began), cmp.Compare(p.process.PID, q.process.PID))
	})
	o.held = slices.CompactFunc(o.held, func(a, b heldSocket) bool { return a.inode == b.inode })
}

// find is all of them that hold sockets in a state; with an error, some.
func (o *ownerFinder) find(state events.State) (*Owners, error) {
	owners := new(Owners)
	err := o.look(state, owners)
	owners.sort()
	if err != nil {
		err = fmt.Errorf("who holds a connection: %w", err)
	}
	return owners, err
}

// look has the kernel go from process to process, where it stops for its holdings to be
// taken.
func (o *ownerFinder) look(state events.State, owners *Owners) error {
	held := o.holdings.value
	held.State, held.Filled, held.Task = uint8(state), 0, 0
	files, err := o.iterator.Open()
	if err != nil {
		return err
	}
	defer files.Close()
	var none [1]byte
	for more := true; more; {
		_, err := files.Read(none[:])
		switch {
		case errors.Is(err, io.EOF):
			more = false
		case err != nil && !errors.Is(err, unix.EAGAIN):
			return err
		}
		if held.Filled == 0 {
			continue
		}
		began, n := events.Time(held.Began), len(owners.processes)
		if n == 0 || owners.processes[n-1].process.PID != held.Pid || owners.processes[n-1].began != began {
			owners.processes = append(owners.processes, owner{process(held.Pid, held.Cgroup, &held.Comm), began})
		}
		for _, inode := range held.Inodes[:held.Filled] {
			owners.holds(inode)
		}
		held.Filled = 0
	}
	return nil
}

// findOwners looks through /proc/PID/fd for the sockets of inodes, where the kernel has
// no such iterator.
func findOwners(inodes []uint64) (*Owners, error) {
	owners := new(Owners)
	wanted := map[uint64]bool{}
	for _, inode := range inodes {
		wanted[inode] = true
	}
	hidden := false
	for _, pid := range pids() {
		dir, err := openProcess(pid)
		if err != nil {
			continue
		}
		found, err := socketInodes(dir)
		hidden = hidden || errors.Is(err, fs.ErrPermission)
		found = slices.DeleteFunc(found, func(inode uint64) bool { return !wanted[inode] })
		if len(found) > 0 {
			// One that has ended holds nothing.
			if began, err := beginning(dir); err == nil {
				owners.processes = append(owners.processes, owner{readProcess(dir, pid), began})
				for _, inode := range found {
					owners.holds(inode)
				}
			}
		}
		dir.Close()
	}
	owners.sort()
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

// openProcess opens a process's directory. Whoever is given the pid after the
// process has ended is not in it.
func openProcess(pid uint32) (*os.Root, error) {
	return os.OpenRoot(filepath.Join("/proc", strconv.FormatUint(uint64(pid), 10)))
}

// Holders answers whether processes hold sockets, and reads what each has open
// once.
type Holders struct{ sockets map[uint32]map[uint64]bool }

// Hold says whether the process that held a socket at a time may hold it still; of
// a socket whose inode is 0, which is not known, whether the process is there.
// What cannot be looked at may be.
func (h *Holders) Hold(pid uint32, inode uint64, then events.Time) bool {
	if !hostPIDs() {
		return true
	}
	if unix.Kill(int(pid), 0) == unix.ESRCH {
		return false
	}
	dir, err := openProcess(pid)
	if err != nil {
		return true
	}
	defer dir.Close()
	if began, err := beginning(dir); err == nil && began > then {
		return false // Another has the pid now.
	}
	if inode == 0 {
		return true
	}
	sockets, known := h.sockets[pid]
	if !known {
		if inodes, err := socketInodes(dir); err == nil {
			sockets = map[uint64]bool{}
			for _, inode := range inodes {
				sockets[inode] = true
			}
		}
		if h.sockets == nil {
			h.sockets = map[uint32]map[uint64]bool{}
		}
		h.sockets[pid] = sockets
	}
	return sockets == nil || sockets[inode]
}

// hostPIDs says whether pids are those of BPF: this process is in the first pid
// namespace (PROC_PID_INIT_INO, include/linux/proc_ns.h).
var hostPIDs = sync.OnceValue(func() bool {
	const first = "pid:[4026531836]"
	target, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && target == first
})

// beginning is when a process was started, from the 22nd field of its stat
// (proc_pid_stat(5)), in hundredths of a second rounded down.
func beginning(dir *os.Root) (events.Time, error) {
	text, err := dir.ReadFile("stat")
	if err != nil {
		return 0, err
	}
	// The second field is its name, which may have spaces and parentheses.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("stat has %d fields", len(fields)+2)
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	return events.Time(ticks*int64(10*time.Millisecond) - ownBoot()), err
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
func socketInodes(dir *os.Root) (inodes []uint64, err error) {
	f, err := dir.Open("fd")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	var link [64]byte
	for _, name := range names {
		n, e := unix.Readlinkat(int(f.Fd()), name, link[:])
		if errors.Is(e, fs.ErrNotExist) {
			continue // It has been closed.
		}
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

func readProcess(dir *os.Root, pid uint32) events.Process {
	p := events.Process{PID: pid}
	if comm, err := dir.ReadFile("comm"); err == nil {
		copy(p.Comm[:len(p.Comm)-1], bytes.TrimSuffix(comm, []byte("\n")))
	}
	if cgroups, err := dir.ReadFile("cgroup"); err == nil {
		p.Cgroup = cgroupID(string(cgroups))
	}
	return p
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroupID is the cgroup2 id of the process whose /proc/PID/cgroup this is: the
// inode of its directory (kernfs), which is what bpf_get_current_cgroup_id gives.
func cgroupID(text string) uint64 {
	var st unix.Stat_t
	if path, ok := cgroup2(text); ok && unix.Stat(filepath.Join(cgroupRoot, path), &st) == nil {
		return st.Ino
	}
	return 0
}

// cgroup2 is the path of the cgroup2 in what /proc/PID/cgroup says.
func cgroup2(text string) (path string, ok bool) {
	for line := range strings.Lines(text) {
		// One that begins with .. is outside our cgroup namespace (cgroup_namespaces(7)).
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if ok && !strings.HasPrefix(path, "/..") {
			return path, true
		}
	}
	return "", false
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
