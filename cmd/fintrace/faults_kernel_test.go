// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// between connects two addresses of a namespace, again if it has to: the listener
// is the subject's end.
func between(t *testing.T, ns *kerneltest.Namespace, l *net.TCPListener, from int) (h held) {
	t.Helper()
	dialer := net.Dialer{
		LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: from},
		Control: func(_, _ string, raw syscall.RawConn) (err error) {
			e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			return errors.Join(e, err)
		},
	}
	var c net.Conn
	var err error
	ns.Do(func() { c, err = dialer.Dial("tcp4", l.Addr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	h.peer = c.(*net.TCPConn)
	if h.subject, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

// listenAt listens at a port of a namespace's loopback.
func listenAt(t *testing.T, ns *kerneltest.Namespace, port int) (l *net.TCPListener) {
	t.Helper()
	var err error
	ns.Do(func() { l, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// reset has the peer send a RST.
func (h held) reset(t *testing.T) {
	t.Helper()
	if err := errors.Join(h.peer.SetLinger(0), h.peer.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestReused has new connections take the addresses of others at once, and two
// namespaces have the same.
func TestReused(t *testing.T) {
	kerneltest.Require(t)
	r := record(t, probe.Options{Instants: true}, limits.Rules{})
	const here, there = 7000, 7001
	flow := events.Flow{
		Local:  endpoint(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: here}),
		Remote: endpoint(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: there}),
	}
	// notices of a kind, in order.
	of := func(ns *kerneltest.Namespace, kind track.Kind) (found []track.Notice) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, n := range r.notices {
			if n.Kind == kind && n.Conn.Netns == ns.Inode && n.Conn.Flow == flow {
				found = append(found, n)
			}
		}
		return found
	}
	nth := func(t *testing.T, ns *kerneltest.Namespace, kind track.Kind, n int) track.Notice {
		t.Helper()
		if err := awaitFor(soon, fmt.Sprintf("%s, %d times", kind, n), func() bool { return len(of(ns, kind)) >= n }); err != nil {
			t.Fatalf("%v: %v", err, r.about(ns.Inode, flow))
		}
		return of(ns, kind)[n-1]
	}
	shut := func(t *testing.T, h held) moment {
		t.Helper()
		return at(func() {
			if err := h.subject.CloseWrite(); err != nil {
				t.Fatal(err)
			}
		})
	}
	scenario(t, "of a held one", func(t *testing.T, ns *kerneltest.Namespace) {
		l := listenAt(t, ns, here)
		first := between(t, ns, l, there)
		began := shut(t, first)
		if err := first.shutdown(); err != nil {
			t.Fatal(err)
		}
		pause(200 * time.Millisecond)
		reset := at(func() { first.reset(t) })
		second := between(t, ns, l, there)
		again := shut(t, second)
		if err := second.shutdown(); err != nil {
			t.Fatal(err)
		}
		closed, opened := nth(t, ns, track.Closed, 1).Conn, nth(t, ns, track.Opened, 2).Conn
		p := &pair{t: t}
		p.near("the first was held", closed.Held, reset.since(began), 0)
		if closed.End != events.PeerReset || opened.Cookie == closed.Cookie {
			t.Errorf("the first is %+v, the second %+v", closed, opened)
		}
		pause(100 * time.Millisecond)
		ends := at(func() { second.peer.Close() })
		closed = nth(t, ns, track.Closed, 2).Conn
		p.near("the second was held", closed.Held, ends.since(again), 0)
		if closed.End != events.PeerFIN || opened.Cookie != closed.Cookie {
			t.Errorf("the second was %+v and ended as %+v", opened, closed)
		}
	})
	scenario(t, "of a minisock", func(t *testing.T, ns *kerneltest.Namespace) {
		l := listenAt(t, ns, here)
		first := between(t, ns, l, there)
		began := at(func() { first.subject.Close() })
		nth(t, ns, track.Opened, 1)
		pause(100 * time.Millisecond)
		reset := at(func() { first.reset(t) })
		second := between(t, ns, l, there)
		again := shut(t, second)
		if err := second.shutdown(); err != nil {
			t.Fatal(err)
		}
		opened, closed := nth(t, ns, track.Opened, 2).Conn, nth(t, ns, track.Closed, 1).Conn
		// Whether it was reset or went through TIME_WAIT nothing shows any more.
		if closed.End != events.Unseen || closed.EndExact || closed.Duration > reset.since(began).most+exact || opened.Cookie == closed.Cookie {
			t.Errorf("the first ended as %+v, the second is %+v", closed, opened)
		}
		ends := at(func() { second.peer.Close() })
		(&pair{t: t}).near("the second was held", nth(t, ns, track.Closed, 2).Conn.Held, ends.since(again), 0)
	})
	scenario(t, "in another namespace", func(t *testing.T, ns *kerneltest.Namespace) {
		other := kerneltest.NewNamespace(t)
		quickACK(t, other)
		one, two := between(t, ns, listenAt(t, ns, here), there), between(t, other, listenAt(t, other, here), there)
		began := shut(t, one)
		pause(200 * time.Millisecond)
		again := shut(t, two)
		a, b := nth(t, ns, track.Opened, 1).Conn, nth(t, other, track.Opened, 1).Conn
		if a.Cookie == b.Cookie {
			t.Errorf("both are %d", a.Cookie)
		}
		pause(100 * time.Millisecond)
		ends := at(func() { one.peer.Close() })
		p := &pair{t: t}
		p.near("the one was held", nth(t, ns, track.Closed, 1).Conn.Held, ends.since(began), 0)
		r.nextSnapshot(t, other)
		if n := of(other, track.Closed); len(n) > 0 {
			t.Errorf("with the one the other has ended: %+v", n)
		}
		ends = at(func() { two.peer.Close() })
		p.near("the other was held", nth(t, other, track.Closed, 1).Conn.Held, ends.since(again), 0)
	})
}

// keep has a process hold a connection in FIN_WAIT2, and so many descriptors more.
func keep(t *testing.T, h held, descriptors int) *process {
	t.Helper()
	file, err := h.subject.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command("keeper", fmt.Sprint(descriptors))
	cmd.ExtraFiles = []*os.File{file}
	p := started(t, cmd)
	p.until(t, "holding")
	h.subject.Close()
	return p
}

// TestNamespaceGone deletes a network namespace with connections in it whose end
// no record tells: what nobody holds any more leaves, what somebody does stays.
func TestNamespaceGone(t *testing.T) {
	kerneltest.Require(t)
	busy, whole := kerneltest.NewNamespace(t), t
	var tr *jsonTrace
	var keys [3]flowKey
	var stays held
	t.Run("with connections", func(t *testing.T) {
		ns := kerneltest.NewNamespace(t)
		finTimeout(t, ns, 1)
		var all [3]held
		for i := range all {
			var err error
			ns.Do(func() { all[i], err = connected() })
			if err != nil {
				t.Fatal(err)
			}
			keys[i] = all[i].key(ns)
		}
		keeper := keep(t, all[0], 0)
		for _, h := range all[1:] {
			if err := h.shutdown(); err != nil {
				t.Fatal(err)
			}
		}
		tr = traceJSONBy(whole, []*kerneltest.Namespace{ns}, "fintrace", "--ring-bytes", "4096", "--limit", "1h")
		for i, key := range keys {
			if pid, want := tr.await(t, key, "opened").PID, []int{keeper.Process.Pid, os.Getpid(), os.Getpid()}[i]; int(pid) != want {
				t.Errorf("connection %d is held by %d, want %d", i, pid, want)
			}
		}
		if err := tr.cmd.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tr.cmd.Process.Signal(unix.SIGCONT) })
		for range 50 { // which fills the buffer
			h, err := hold(busy)
			if err != nil {
				t.Fatal(err)
			}
			h.close()
		}
		ns.Do(func() {
			if out, err := exec.Command("ip", "link", "set", "lo", "down").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		})
		keeper.Process.Kill()
		keeper.Wait()
		for _, h := range all[:2] {
			h.reset(t)
			h.subject.Close()
		}
		all[2].reset(t)
		stays = all[2]
	})
	if err := tr.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for i, key := range keys[:2] {
		if closed := tr.await(t, key, "closed"); closed.End != "unseen" || *closed.EndExact {
			t.Errorf("connection %d ended as %+v", i, closed)
		}
	}
	if closed := tr.about(keys[2], "closed"); len(closed) > 0 {
		t.Errorf("what is held still has ended as %+v", closed)
	}
	stays.subject.Close()
	if moved := tr.await(t, keys[2], "moved"); moved.Stage != "minisock" {
		t.Errorf("what was held moved as %+v", moved)
	}
	tr.await(t, keys[2], "closed")
	if lost := tr.end(t); lost == 0 || tr.summary.Corrected < 2 || tr.summary.Remaining != 0 {
		t.Errorf("%d records were lost, and the summary is %+v", lost, tr.summary)
	}
}

// TestSlowReader does not read what a trace prints, which stops its loop, under
// load: what is lost is counted, and what it missed is found.
func TestSlowReader(t *testing.T) {
	kerneltest.Require(t)
	ns, busy := kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)
	spaces := []*kerneltest.Namespace{ns, busy}
	tr := exec.Command("fintrace", "trace", "-o", "json", "--min-duration", "0", "--ring-bytes", "65536",
		"--netns", inode(ns), "--netns", inode(busy))
	stdout, err := tr.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Process.Kill() })
	if err := await("it to be attached", func() bool { return len(kernelObjects(t, tr.Process.Pid)["link_id"]) >= 2 }); err != nil {
		t.Fatal(err)
	}
	ends, stays := holdSome(t, ns, 5), holdSome(t, ns, 5)
	stop := halfClosing(t, busy, 1)
	// The loop waits in a write once the pipe is full, of 64 KiB. It is then asleep
	// for good.
	asleep := func() bool {
		was := threadTimes(t, tr.Process.Pid)
		pause(300 * time.Millisecond)
		return threadTimes(t, tr.Process.Pid) == was
	}
	if err := await("the trace to wait for its reader", asleep); err != nil {
		t.Fatal(err)
	}
	for _, h := range ends {
		h.close()
	}
	comes := holdSome(t, ns, 5)
	pause(time.Second)
	made := stop()

	// In the end it has it right.
	var summary struct{ Lost, Corrected, Remaining int }
	var mu sync.Mutex
	last, read := map[flowKey]string{}, make(chan error, 1) // the last record of each connection
	go func() {
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var r struct {
				Kind          string
				Netns         uint32
				Local, Remote string
			}
			err := json.Unmarshal(lines.Bytes(), &r)
			if err == nil && r.Kind == "summary" {
				err = json.Unmarshal(lines.Bytes(), &summary)
			}
			if err != nil {
				read <- fmt.Errorf("%w in %s", err, lines.Bytes())
				return
			}
			mu.Lock()
			last[flowKey{r.Netns, r.Local, r.Remote}] = r.Kind
			mu.Unlock()
		}
		read <- lines.Err()
	}()
	var there, traced []string
	if err := awaitFor(soon, "the trace to agree with ss", func() bool {
		there, traced = ssFinWait2(t, spaces), nil
		mu.Lock()
		defer mu.Unlock()
		for key, kind := range last {
			if kind != "closed" {
				traced = append(traced, fmt.Sprintf("%d %s %s", key.netns, key.local, key.remote))
			}
		}
		slices.Sort(traced)
		return slices.Equal(traced, there)
	}); err != nil {
		t.Errorf("%v:\ntrace %q\nss    %q", err, traced, there)
	}
	if n := len(stays) + len(comes); len(there) != n {
		t.Errorf("ss has %d, and %d are held", len(there), n)
	}
	if err := tr.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-read, tr.Wait()); err != nil {
		t.Error(err)
	}
	t.Logf("%d connections; %d records lost, %d corrected", made, summary.Lost, summary.Corrected)
	if summary.Lost == 0 || summary.Corrected == 0 || summary.Remaining != len(there) {
		t.Errorf("the summary is %+v, and ss has %d", summary, len(there))
	}
}

// threadTimes is what a process has had of the processors, in ticks.
func threadTimes(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	return fields[11] + " " + fields[12] // utime, stime
}

// TestBeside traces twice at once, beside others that use the tracepoint and come
// and go.
func TestBeside(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	beside := func() (end func() (counted bool)) {
		if _, err := exec.LookPath("bpftrace"); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal("bpftrace is not installed")
			}
			t.Log("without bpftrace beside it, which is not installed")
			return func() bool { return true }
		}
		// Mounted or not, it finds the tracepoint's format.
		const mounted = `mount -t debugfs none /sys/kernel/debug; mount -t tracefs none /sys/kernel/tracing; exec bpftrace -e "$0"`
		p := start(t, "unshare", "-m", "sh", "-c", mounted,
			`tracepoint:sock:inet_sock_set_state { @[args->newstate] = count(); } BEGIN { printf("counting\n"); }`)
		p.until(t, "counting")
		return func() bool {
			err := p.Process.Signal(unix.SIGINT)
			out, e := io.ReadAll(p.stdout)
			if err := errors.Join(err, e, p.Wait()); err != nil {
				t.Errorf("bpftrace ends with %v", err)
			}
			return bytes.Contains(out, []byte("@["))
		}
	}
	end := beside()
	traces := []*jsonTrace{traceJSON(t, []*kerneltest.Namespace{ns}), traceJSON(t, []*kerneltest.Namespace{ns})}
	round := func(n int) {
		t.Helper()
		all := holdSome(t, ns, n)
		for _, h := range all {
			h.close()
		}
		for i, tr := range traces {
			for _, h := range all {
				key := h.key(ns)
				opened, closed := tr.await(t, key, "opened"), tr.await(t, key, "closed")
				if len(tr.about(key, "opened")) != 1 || len(tr.about(key, "closed")) != 1 || opened.Cookie != closed.Cookie {
					t.Errorf("trace %d has %+v", i, tr.about(key, ""))
				}
			}
		}
	}
	round(20)
	// The kernel skips events while programs come and go.
	ended := make(chan bool, 1)
	go func() { ended <- end() }()
	round(20)
	if !<-ended {
		t.Error("bpftrace has counted nothing")
	}
	end = beside()
	round(5)
	end()
	if lost := traces[0].end(t); lost > 0 {
		t.Errorf("%d records were lost", lost)
	}
	// The other goes on.
	traces = traces[1:]
	round(5)
	if lost := traces[0].end(t); lost > 0 {
		t.Errorf("%d records were lost", lost)
	}
	checkNothingLeft(t)
}

// TestCrowd looks at a thousand network namespaces, of which few have a socket.
func TestCrowd(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	h := holdSome(t, ns, 1)[0]
	const namespaces = 1000
	crowd := func(args ...string) *exec.Cmd {
		return exec.Command("crowd", append([]string{fmt.Sprint(namespaces)}, args...)...)
	}
	// Timed by bash, without the making of the namespaces.
	cmd := crowd("bash", "-c", "TIMEFORMAT='%R %U %S'; ls /run/netns | wc -l; time fintrace list -o json --netns "+inode(ns))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	lines := strings.SplitN(stdout.String(), "\n", 2)
	if lines[0] != fmt.Sprint(namespaces) || !strings.Contains(lines[1], h.subject.RemoteAddr().String()) {
		t.Errorf("list says %q", &stdout)
	}
	var real, user, system float64
	if _, err := fmt.Sscan(lastLine(stderr.String()), &real, &user, &system); err != nil {
		t.Fatalf("%v: %q", err, &stderr)
	}
	t.Logf("list: %.2f s, of a processor %.2f s", real, user+system)
	if user+system > 2 {
		t.Errorf("list took %.2f s of a processor", user+system)
	}

	tr := traceJSONBy(t, []*kerneltest.Namespace{ns}, fmt.Sprintf("crowd %d fintrace", namespaces))
	tr.await(t, h.key(ns), "opened")
	if said := tr.stderr.String(); !regexp.MustCompile(`in 1\d{3} network namespace`).MatchString(said) {
		t.Errorf("it says %q", said)
	}
	pid, began, open := tr.cmd.Process.Pid, time.Now(), 0
	before := processorOf(t, pid)
	// Minisocks have it look often; the rest of the time nothing is to be done.
	minisock := holdSome(t, ns, 1)[0]
	minisock.subject.Close()
	for time.Since(began) < 12*time.Second {
		open = max(open, descriptors(t, pid))
		pause(10 * time.Millisecond)
	}
	took := time.Since(began)
	share := float64(processorOf(t, pid)-before) / float64(took)
	t.Logf("trace: %.1f %% of a processor, %d descriptors at most", 100*share, open)
	if share > 0.1 || open > 100 {
		t.Errorf("it takes %.1f %% of a processor and %d descriptors", 100*share, open)
	}
	tr.end(t)
}

// processorOf is what a process has had of the processors.
func processorOf(t *testing.T, pid int) time.Duration {
	t.Helper()
	var user, system int64
	if _, err := fmt.Sscan(threadTimes(t, pid), &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ
}

// TestManyDescriptors finds the owner of a connection that has a hundred thousand
// descriptors more.
func TestManyDescriptors(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	var h held
	var err error
	ns.Do(func() { h, err = connected() })
	if err != nil {
		t.Fatal(err)
	}
	defer h.peer.Close()
	remote := h.subject.RemoteAddr().String()
	many := 100_000
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if raised := (unix.Rlimit{Cur: uint64(many) + 100, Max: uint64(many) + 100}); files.Max < raised.Max {
		if err := unix.Prlimit(os.Getpid(), unix.RLIMIT_NOFILE, &raised, nil); err != nil {
			many = int(files.Max) - 100 // without CAP_SYS_RESOURCE
		}
	}
	keeper := keep(t, h, many)
	if n := descriptors(t, keeper.Process.Pid); n < many {
		t.Fatalf("it has %d descriptors", n)
	}
	began := time.Now()
	cmd := exec.Command("fintrace", "list", "-o", "json", "--netns", inode(ns))
	out, err := cmd.Output()
	took, used := time.Since(began), cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()
	var r report.Record
	if err != nil || json.Unmarshal(out, &r) != nil || int(r.PID) != keeper.Process.Pid || r.Comm != "keeper" || r.Remote != remote {
		t.Errorf("%v: list says %s, want it of %d", err, out, keeper.Process.Pid)
	}
	t.Logf("with %d descriptors list takes %s, of a processor %s", many, took, used)
	if used > 2*time.Second {
		t.Errorf("list took %s of a processor", used)
	}
}

// TestVanishing lists while processes come and go as fast as they can.
func TestVanishing(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	h := holdSome(t, ns, 1)[0]
	ctx, cancel := context.WithCancel(t.Context())
	var storm sync.WaitGroup
	defer storm.Wait()
	defer cancel()
	var started [2]int
	for i := range started {
		storm.Go(func() {
			for ctx.Err() == nil {
				// In namespaces of their own, which go too.
				if err := exec.Command("unshare", "--net", "sh", "-c", "(true)& (true)& wait").Run(); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
				started[i]++
			}
		})
	}
	for range 10 {
		var stdout, stderr bytes.Buffer
		cmd := exec.Command("fintrace", "list", "-o", "json", "--netns", inode(ns))
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		var r report.Record
		if err != nil || stderr.Len() > 0 || json.Unmarshal(stdout.Bytes(), &r) != nil || int(r.PID) != os.Getpid() || r.Remote != h.subject.RemoteAddr().String() {
			t.Fatalf("list ends with %v and says %s%s", err, &stdout, &stderr)
		}
	}
	cancel()
	storm.Wait()
	t.Logf("beside %d and %d processes that came and went with their namespaces", started[0], started[1])
	if started[0]+started[1] < 20 {
		t.Error("too few: the test shows nothing")
	}
}
