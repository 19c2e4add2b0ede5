// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// lastPID is the pid that the kernel gave last (CONFIG_CHECKPOINT_RESTORE).
const lastPID = "/proc/sys/kernel/ns_last_pid"

// byFile is a finder that goes through all files, as on kernels before Linux 6.2.
func byFile(t *testing.T) *ownerFinder {
	t.Helper()
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	spec = ownersAlone(spec)
	spec.Programs[bpfProgOwners] = spec.Programs[bpfProgOwnersByFile]
	finder, err := newOwnerFinder(spec, btf.NewCache())
	if err != nil {
		t.Fatal(err)
	}
	if finder != nil {
		t.Cleanup(func() { finder.close() })
	}
	return finder
}

// everyFinder runs a test with each way to find owners that the kernel has.
func everyFinder(t *testing.T, test func(t *testing.T, p *Probe)) {
	kerneltest.Require(t)
	p, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	for name, finder := range map[string]*ownerFinder{"tables": p.owners, "files": byFile(t)} {
		if finder != nil {
			t.Run(name, func(t *testing.T) { test(t, &Probe{owners: finder}) })
		}
	}
	t.Run("proc", func(t *testing.T) { test(t, new(Probe)) })
}

// TestOwners: of two processes that have a socket open it is the one that began first.
func TestOwners(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	// The one that shuts down is in FIN_WAIT2, its peer in CLOSE_WAIT.
	client, server := connected(t, ns, "127.0.0.1:0")
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	ends := map[events.State]*os.File{}
	for state, conn := range map[events.State]*net.TCPConn{events.FinWait2: client, events.CloseWait: server} {
		file, err := conn.File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		ends[state] = file
	}
	inode := func(state events.State) uint64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(ends[state].Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	// A second that has them open, and began later, with a lower pid if there is one.
	_ = os.WriteFile(lastPID, []byte("300"), 0)
	other := exec.Command("cat")
	other.ExtraFiles = []*os.File{ends[events.FinWait2], ends[events.CloseWait]}
	input, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { input.Close(); _ = other.Wait() }()

	dir, err := openProcess(uint32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	own := readProcess(dir, uint32(os.Getpid()))
	everyFinder(t, func(t *testing.T, p *Probe) {
		for state := range ends {
			held := inode(state)
			owners, err := p.Owners(state, []uint64{1, held})
			if err != nil {
				t.Fatal(err)
			}
			if got := owners.Of(held); got != own || owners.Of(1).Known() {
				t.Errorf("the socket in %s is held by %+v, want %+v; one that is not there by %+v", state, got, own, owners.Of(1))
			}
		}
	})
	// The first snapshot of a Probe shows it, where the kernel does; the next does not.
	p, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	want := own
	if p.owners == nil {
		want = events.Process{}
	}
	for _, want := range []events.Process{want, {}} {
		var got []events.Process
		if _, err := p.Snapshot(func(func(uint64)) {}, func(sockets []events.Socket) {
			for _, s := range sockets {
				if s.Inode == inode(events.FinWait2) {
					got = append(got, s.Process)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("a snapshot shows %+v as the owner, want %+v", got, want)
		}
	}
}

// newListener listens on a port of the kernel's choice.
func newListener(t *testing.T) (fd int, inode uint64) {
	fd, inode = newSocket(t)
	if err := unix.Listen(fd, 1); err != nil {
		t.Error(err)
	}
	return fd, inode
}

func newSocket(t *testing.T) (fd int, inode uint64) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	var st unix.Stat_t
	if err := errors.Join(err, unix.Fstat(fd, &st)); err != nil {
		t.Error(err)
	}
	return fd, st.Ino
}

// TestOwnersOfMany has more sockets open than a look stops at, with gaps, far apart, and
// in a table of descriptors that only one thread has.
func TestOwnersOfMany(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	const n, far, files = 5000, 9000, 10_000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur < files {
		limit.Cur, limit.Max = files, max(files, limit.Max)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
	}
	sockets := map[int]uint64{}
	ns.Do(func() {
		for range n {
			fd, inode := newListener(t)
			sockets[fd] = inode
		}
	})
	t.Cleanup(func() {
		for fd := range sockets {
			unix.Close(fd)
		}
	})
	var closed []uint64
	for fd, inode := range maps.Clone(sockets) {
		switch fd % 50 {
		case 0:
			apart, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, far)
			if err != nil {
				t.Fatal(err)
			}
			sockets[apart] = inode
		case 1:
			closed = append(closed, inode)
		default:
			continue
		}
		unix.Close(fd)
		delete(sockets, fd)
	}
	open := slices.Collect(maps.Values(sockets))
	opened, leave := make(chan uint64), make(chan struct{})
	t.Cleanup(func() { close(leave) })
	var thread func()
	thread = func() {
		runtime.LockOSThread() // For good: this thread is not like the others.
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread() // The leader has to be.
			go thread()
			<-leave
			return
		}
		// What was open before is closed when the last thread has closed it.
		if err := errors.Join(unix.Unshare(unix.CLONE_FILES), unix.CloseRange(0, math.MaxUint32, 0)); err != nil {
			t.Error(err)
		}
		_, inode := newListener(t)
		opened <- inode
		<-leave
	}
	go thread()
	alone := <-opened

	everyFinder(t, func(t *testing.T, p *Probe) {
		looked := append(slices.Clone(open), closed...)
		if p.owners != nil { // /proc/PID/fd is the leader's.
			looked = append(looked, alone)
		}
		owners, err := p.Owners(events.Listen, looked)
		if err != nil {
			t.Fatal(err)
		}
		for _, inode := range looked {
			if owned, want := owners.Of(inode).PID == uint32(os.Getpid()), !slices.Contains(closed, inode); owned != want {
				t.Fatalf("that the socket %d is held is %t, want %t", inode, owned, want)
			}
		}
		if p.owners == nil {
			return
		}
		// Those in another state are not looked for.
		if owners, err = p.Owners(events.FinWait2, looked); err != nil || owners.Of(open[0]).Known() {
			t.Errorf("of those in FIN_WAIT2 a listener is held by %+v (%v)", owners.Of(open[0]), err)
		}
	})
}

// TestOwnersInChurn looks while files of all kinds are opened and closed: the sockets that
// stay are found each time, and nothing is that never was one in the state.
func TestOwnersInChurn(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	var stay, all sync.Map
	ns.Do(func() {
		for range 100 {
			fd, inode := newListener(t)
			stay.Store(inode, true)
			all.Store(inode, true)
			t.Cleanup(func() { unix.Close(fd) })
		}
	})
	everyFinder(t, func(t *testing.T, p *Probe) {
		if p.owners == nil {
			return // /proc is for those that are asked for.
		}
		var churn sync.WaitGroup
		defer churn.Wait()
		end := make(chan struct{})
		defer close(end)
		for range 4 {
			churn.Go(func() {
				ns.Do(func() {
					for {
						select {
						case <-end:
							return
						default:
						}
						var pipe [2]int
						listening, inode := newSocket(t)
						all.Store(inode, true) // before it may be found
						event, e1 := unix.Eventfd(5, unix.EFD_CLOEXEC)
						epoll, e2 := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
						null, e3 := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
						local, e4 := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
						if err := errors.Join(unix.Listen(listening, 1), e1, e2, e3, e4, unix.Pipe2(pipe[:], unix.O_CLOEXEC)); err != nil {
							t.Error(err)
						}
						for _, fd := range []int{pipe[0], listening, local, event, pipe[1], null, epoll} {
							unix.Close(fd)
						}
					}
				})
			})
		}
		for range 500 {
			owners, err := p.Owners(events.Listen, []uint64{1})
			if err != nil {
				t.Fatal(err)
			}
			stay.Range(func(inode, _ any) bool {
				if got := owners.Of(inode.(uint64)).PID; got != uint32(os.Getpid()) {
					t.Fatalf("the socket %d is held by %d, want %d", inode, got, os.Getpid())
				}
				return true
			})
			for _, h := range owners.held {
				if _, was := all.Load(h.inode); !was && owners.processes[h.process].process.PID == uint32(os.Getpid()) {
					t.Fatalf("%d is held, and never was a listening socket", h.inode)
				}
			}
		}
	})
}

// TestPIDReused has a process that holds a socket end, and another that holds it
// too be given its pid: it is not taken for the first.
func TestPIDReused(t *testing.T) {
	if os.Geteuid() != 0 || !hostPIDs() {
		t.Skip("not run: it takes root, and the first pid namespace")
	}
	if _, err := os.Stat(lastPID); err != nil {
		t.Skip("not run: a kernel without CONFIG_CHECKPOINT_RESTORE")
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(socket.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	// cat holds it until its input ends.
	holder := func() (pid uint32, end func()) {
		cmd := exec.Command("cat")
		cmd.ExtraFiles = []*os.File{socket}
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		output, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Its answer shows that it is cat by now.
		if _, err := io.WriteString(input, "."); err != nil {
			t.Fatal(err)
		}
		if _, err := output.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return uint32(cmd.Process.Pid), func() { input.Close(); _ = cmd.Wait() }
	}
	pid, end := holder()
	then := Now()
	dir, err := openProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if sockets, err := socketInodes(dir); err != nil || readProcess(dir, pid).Name() != "cat" || !slices.Contains(sockets, st.Ino) {
		t.Errorf("%d is %+v and has the sockets %v (%v), want cat and %d", pid, readProcess(dir, pid), sockets, err, st.Ino)
	}
	var before Holders
	for inode, want := range map[uint64]bool{st.Ino: true, 0: true, 1: false} {
		if before.Hold(pid, inode, then) != want {
			t.Errorf("that it holds %d is %t", inode, !want)
		}
	}
	end()
	if new(Holders).Hold(pid, st.Ino, then) || new(Holders).Hold(pid, 0, then) {
		t.Error("a process that is gone holds it")
	}

	// The kernel shows hundredths of a second: who comes within one may be either.
	for Now() < then.Add(10*time.Millisecond) {
		time.Sleep(time.Millisecond)
	}
	for tries := 0; ; tries++ {
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(int(pid)-1)), 0); err != nil {
			t.Fatal(err)
		}
		other, end := holder()
		if other == pid {
			defer end()
			break
		}
		end()
		if tries == 1000 {
			t.Skip("not run: others are always given the pid")
		}
	}
	if new(Holders).Hold(pid, st.Ino, then) || new(Holders).Hold(pid, 0, then) {
		t.Error("a process that has the pid now is taken for the one before")
	}
	if !new(Holders).Hold(pid, st.Ino, Now()) {
		t.Error("it does not hold what it has")
	}
	if sockets, err := socketInodes(dir); err == nil || readProcess(dir, pid).Name() != "" {
		t.Errorf("of the one before there is %+v with the sockets %v", readProcess(dir, pid), sockets)
	}
}
