// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// lastPID is the pid that the kernel gave last (CONFIG_CHECKPOINT_RESTORE).
const lastPID = "/proc/sys/kernel/ns_last_pid"

// TestOwners: who has a socket open is found by the iterator of files and in
// /proc; of two processes it is the one that began first.
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
	for name, opts := range map[string]Options{"iterator": {}, "proc": {Plain: true}} {
		p, err := Open(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		for state := range ends {
			held := inode(state)
			owners, err := p.Owners(state, []uint64{1, held})
			if err != nil {
				t.Fatal(err)
			}
			if got := owners.Of(held); got != own || owners.Of(1).Known() {
				t.Errorf("%s: the socket in %s is held by %+v, want %+v; one that is not there by %+v", name, state, got, own, owners.Of(1))
			}
		}
		want := own
		if p.owners == nil {
			want = events.Process{}
		}
		if got := p.FirstOwners().Of(inode(events.FinWait2)); got != want {
			t.Errorf("%s: the first owner of the socket in FIN_WAIT2 is %+v, want %+v", name, got, want)
		}
	}
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
