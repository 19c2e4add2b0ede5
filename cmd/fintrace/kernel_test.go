// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

// childEnv makes the test binary a process that shuts down the socket it
// inherits as descriptor 3, and holds it.
const childEnv = "FINTRACE_TEST_HOLD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := unix.Shutdown(3, unix.SHUT_WR); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		for { // A signal ends it.
			unix.Pause()
		}
	}
	programs := map[string]func(){"fintrace": main, "unprivileged": unprivileged, "trespassing": trespassing, "named": named}
	maps.Copy(programs, labPrograms)
	maps.Copy(programs, faultPrograms)
	testscript.Main(tests{m}, programs)
}

// tests are what runs where the test binary is not run as a command.
type tests struct{ *testing.M }

func (m tests) Run() int {
	flag.Parse()
	// Kernel tests wait for timers of the kernel, not for the processor.
	if err := flag.Set("test.parallel", "64"); err != nil {
		panic(err)
	}
	return m.M.Run()
}

// A recorder runs the loop for real and keeps what it says.
type recorder struct {
	watch *watch
	stop  func()
	looks atomic.Int64 // that have ended
	// unfollowed is the watch's, as of the last look.
	unfollowed atomic.Uint64

	mu      sync.Mutex
	news    *sync.Cond
	notices []track.Notice    // the last notices, noticesKept of them or more
	opened  map[uint32]uint64 // by namespace
}

// noticesKept bounds what a churn leaves behind.
const noticesKept = 100_000

// record starts the loop; it ends with the test.
func record(t *testing.T, opts probe.Options, rules limits.Rules) *recorder {
	t.Helper()
	p, err := probe.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{opened: map[uint32]uint64{}}
	r.news = sync.NewCond(&r.mu)
	r.watch = &watch{
		probe:     p,
		tracker:   track.New(rules, track.DefaultCapacity, hugePages()),
		rules:     rules,
		haproxies: &haproxies{},
		notify: func(n *track.Notice) {
			r.mu.Lock()
			if len(r.notices) >= 2*noticesKept {
				r.notices = append(r.notices[:0], r.notices[noticesKept:]...)
			}
			r.notices = append(r.notices, *n)
			if n.Kind == track.Opened {
				r.opened[n.Conn.Netns]++
			}
			r.news.Broadcast()
			r.mu.Unlock()
		},
		warn: func(err error) { t.Log("not looked at:", err) },
		looked: func(time.Duration, time.Time) {
			r.unfollowed.Store(r.watch.unfollowed)
			r.looks.Add(1)
		},
	}
	if err := r.watch.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.watch.run(ctx) }()
	objects := kernelObjects(t, os.Getpid())
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, p.Close()); err != nil {
			t.Error(err)
		}
		// While a program is being detached the kernel skips events of others.
		checkGone(t, objects)
	})
	t.Cleanup(r.stop)
	return r
}

// await returns the first notice of a kind about a flow, and fails if it does
// not come in time.
func (r *recorder) await(t *testing.T, netns uint32, flow events.Flow, kind track.Kind, within time.Duration) track.Notice {
	t.Helper()
	n := r.find(netns, flow, kind, within)
	if n == nil {
		t.Fatalf("no notice %s of %s → %s within %s; there are %v", kind, flow.Local, flow.Remote, within, r.about(netns, flow))
	}
	return *n
}

func (r *recorder) find(netns uint32, flow events.Flow, kind track.Kind, within time.Duration) *track.Notice {
	late := false
	timer := time.AfterFunc(within, func() {
		r.mu.Lock()
		late = true
		r.news.Broadcast()
		r.mu.Unlock()
	})
	defer timer.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		for i := range r.notices {
			if n := &r.notices[i]; n.Kind == kind && n.Conn.Netns == netns && n.Conn.Flow == flow {
				return n
			}
		}
		if late {
			return nil
		}
		r.news.Wait()
	}
}

// about lists the kinds of all notices about a flow.
func (r *recorder) about(netns uint32, flow events.Flow) (kinds []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.notices {
		if n := &r.notices[i]; n.Conn.Netns == netns && n.Conn.Flow == flow {
			kinds = append(kinds, n.Kind.String())
		}
	}
	return kinds
}

// A pair is a TCP connection of which both ends are here. The subject is the
// end that will be in FIN_WAIT2.
type pair struct {
	t             *testing.T
	ns            *kerneltest.Namespace
	subject, peer int
	flow          events.Flow // as the subject sees it
	shut, closed  moment      // when the subject was shut down, and closed
}

// A moment is when a system call was made, as well as the test can know: it may
// have had to wait for a processor.
type moment struct {
	before, after events.Time
	// lag is by how much the kernel's jiffies were behind its clock, which on an
	// emulated machine they are when the tick is late.
	lag time.Duration
}

func at(call func()) moment {
	before, lag := probe.Now(), tickLag()
	call()
	lag = max(lag, tickLag())
	return moment{before, probe.Now(), lag}
}

// tickLag is how long ago the last tick was.
func tickLag() time.Duration {
	var coarse, now unix.Timespec
	// Neither can fail: the clocks are always there.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &coarse)
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return time.Duration(now.Nano() - coarse.Nano())
}

// instant is a moment that is known exactly.
func instant(t events.Time) moment { return moment{before: t, after: t} }

// A span is a duration between two bounds.
type span struct{ least, most time.Duration }

func (m moment) since(earlier moment) span {
	return span{m.before.Sub(earlier.after), m.after.Sub(earlier.before)}
}

func about(d time.Duration) span { return span{d, d} }

// family is how a pair is connected.
type family struct{ listen, connect string }

var (
	ipv4     = family{"127.0.0.1", "127.0.0.1"}
	ipv6     = family{"::1", "::1"}
	v4mapped = family{"::", "127.0.0.1"}
)

// connect makes a pair in ns, with the subject on the given side.
func connect(t *testing.T, ns *kerneltest.Namespace, side events.Side, f family) *pair {
	t.Helper()
	p := &pair{t: t, ns: ns}
	var err error
	ns.Do(func() { err = p.connect(side, f) })
	if err != nil {
		t.Fatal("connect:", err)
	}
	local, err := unix.Getsockname(p.subject)
	if err != nil {
		t.Fatal(err)
	}
	remote, err := unix.Getpeername(p.subject)
	if err != nil {
		t.Fatal(err)
	}
	p.flow = events.Flow{Local: endpoint(local), Remote: endpoint(remote)}
	t.Cleanup(func() {
		p.closeFD(&p.subject)
		p.closeFD(&p.peer)
	})
	return p
}

func (p *pair) connect(side events.Side, f family) error {
	domain, any := unix.AF_INET, sockaddr(f.listen, 0)
	if _, v6 := any.(*unix.SockaddrInet6); v6 {
		domain = unix.AF_INET6
	}
	listener, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	// The listener stays while the pair does: that is what makes the side.
	p.t.Cleanup(func() { unix.Close(listener) })
	if err := errors.Join(unix.Bind(listener, any), unix.Listen(listener, 1)); err != nil {
		return err
	}
	bound, err := unix.Getsockname(listener)
	if err != nil {
		return err
	}
	to := sockaddr(f.connect, endpoint(bound).Port)
	domain = unix.AF_INET
	if _, v6 := to.(*unix.SockaddrInet6); v6 {
		domain = unix.AF_INET6
	}
	client, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(client, to); err != nil {
		return err
	}
	server, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	p.subject, p.peer = server, client
	if side == events.Outbound {
		p.subject, p.peer = client, server
	}
	return nil
}

func sockaddr(addr string, port uint16) unix.Sockaddr {
	a := netip.MustParseAddr(addr)
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

func endpoint(sa unix.Sockaddr) events.Endpoint {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return events.EndpointFrom(netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)))
	case *unix.SockaddrInet6:
		return events.EndpointFrom(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)))
	}
	panic("not an internet address")
}

// forking is locked while a child may have copies of the descriptors: it, and
// not the test, would be the last to close one.
var forking sync.RWMutex

func (p *pair) closeFD(fd *int) {
	if *fd >= 0 {
		forking.RLock()
		defer forking.RUnlock()
		unix.Close(*fd)
		*fd = -1
	}
}

// shutdown sends the subject's FIN and leaves it held.
func (p *pair) shutdown() {
	p.shut = at(func() { p.must(unix.Shutdown(p.subject, unix.SHUT_WR)) })
}

// close closes the subject.
func (p *pair) close() {
	p.closed = at(func() { p.closeFD(&p.subject) })
}

func (p *pair) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// resetPeer makes the peer send a RST.
func (p *pair) resetPeer() {
	p.must(unix.SetsockoptLinger(p.peer, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	p.closeFD(&p.peer)
}

// writeLate sends data that nobody will read.
func (p *pair) writeLate() {
	_, err := unix.Write(p.peer, []byte("late"))
	p.must(err)
}

// pause lets time pass in a stage; what is asserted is how long that was found to be.
func pause(d time.Duration) { time.Sleep(d) }

const (
	// exact is how far a time may be off that an event or a stamp dates.
	exact = 20 * time.Millisecond
	// soon is how long a notice may take that waits for no timer, only for the
	// next look at the sockets, which on a busy host is reconcileEvery away.
	soon = reconcileEvery + 15*time.Second
)

// want is what is expected of a connection that has left.
type want struct {
	end                      events.End
	held, orphaned, minisock span
	limit                    time.Duration
	source                   string
	closedBy                 events.ClosedBy
	pid                      int // 0: this process
}

func (p *pair) check(r *recorder, side events.Side, within time.Duration, w want) track.Conn {
	p.t.Helper()
	c := r.await(p.t, p.ns.Inode, p.flow, track.Closed, within).Conn
	if c.End != w.end {
		p.t.Errorf("it ended by %s, want %s", c.End, w.end)
	}
	// A timer's end is exact unless the connection was seen past its deadline.
	if exactly := w.end != events.Reset && w.end != events.Unseen; c.EndExact != exactly && w.end != events.KernelTimeout {
		p.t.Errorf("EndExact is %v, want %v", c.EndExact, exactly)
	}
	if !c.StagesKnown || !c.SinceExact {
		p.t.Errorf("stages known %v, since exact %v, want both: it was watched from the beginning", c.StagesKnown, c.SinceExact)
	}
	p.near("held", c.Held, w.held, 0)
	// A timer of the kernel may be late by an eighth, an event and a stamp may not.
	late := time.Duration(0)
	if w.end == events.KernelTimeout {
		late = w.limit / 8
	}
	p.near("orphaned", c.Orphaned, w.orphaned, late)
	if c.EndExact || w.end == events.KernelTimeout {
		p.near("minisock", c.Minisock, w.minisock, late)
	} else if c.Minisock > w.minisock.most+exact {
		p.t.Errorf("minisock for at least %s, though for no more than %s", c.Minisock, w.minisock.most)
	}
	if sum := c.Held + c.Orphaned + c.Minisock; sum != c.Duration {
		p.t.Errorf("the stages are %s together, the duration is %s", sum, c.Duration)
	}
	if c.Side != side {
		p.t.Errorf("the side is %s, want %s", c.Side, side)
	}
	if c.Limit.Duration != w.limit || c.Limit.Source() != w.source {
		p.t.Errorf("the limit is %s by %q, want %s by %q", c.Limit.Duration, c.Limit.Source(), w.limit, w.source)
	}
	if c.ClosedBy != w.closedBy {
		p.t.Errorf("closed by %q, want %q", c.ClosedBy, w.closedBy)
	}
	if w.pid == 0 {
		w.pid = os.Getpid()
	}
	if int(c.Process.PID) != w.pid {
		p.t.Errorf("the pid is %d, want %d", c.Process.PID, w.pid)
	}
	if c.Process.Name() != ownName() {
		p.t.Errorf("the process is %q, want %q", c.Process.Name(), ownName())
	}
	return c
}

func (p *pair) near(what string, got time.Duration, want span, late time.Duration) {
	p.t.Helper()
	if got < want.least-exact || got > want.most+exact+late {
		p.t.Errorf("%s for %s, want %s to %s", what, got, want.least, want.most+late)
	}
}

func ownName() string {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		panic(err)
	}
	return strings.TrimSuffix(string(comm), "\n")
}

// finTimeout sets the namespace's tcp_fin_timeout, in seconds.
func finTimeout(t *testing.T, ns *kerneltest.Namespace, seconds int) {
	ns.Sysctl(t, "net.ipv4.tcp_fin_timeout", fmt.Sprint(seconds))
}

// destroy is ss -K for the pair's subject.
func (p *pair) destroy() {
	p.t.Helper()
	forking.Lock()
	defer forking.Unlock()
	out, err := exec.Command("nsenter", "--net="+p.ns.Path(), "ss", "-K", "-tn", "state", "fin-wait-2",
		"src", p.flow.Local.String(), "dst", p.flow.Remote.String()).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(p.flow.Remote.String())) {
		p.t.Fatalf("ss -K: %v: %s", err, out)
	}
}

// TestKernel is every ending and stage, a scenario each, on real sockets in a
// namespace of its own, all watched by one loop as on a real host. The witness
// of what really happened is the test's own clock.
func TestKernel(t *testing.T) {
	kerneltest.Require(t)
	r := record(t, probe.Options{Instants: true}, limits.Rules{})

	const default60 = "net.ipv4.tcp_fin_timeout 60s"
	sides := map[string]events.Side{"inbound": events.Inbound, "outbound": events.Outbound}
	for name, side := range sides {
		scenario(t, "held, peer's FIN, "+name, func(t *testing.T, ns *kerneltest.Namespace) {
			p := connect(t, ns, side, ipv4)
			p.shutdown()
			pause(300 * time.Millisecond)
			end := at(func() { p.closeFD(&p.peer) })
			p.check(r, side, soon, want{end: events.PeerFIN, held: end.since(p.shut), limit: 60 * time.Second,
				source: default60, closedBy: events.ByShutdown})
		})
	}
	for name, f := range map[string]family{"IPv6": ipv6, "v4-mapped": v4mapped} {
		scenario(t, "held, peer's FIN, "+name, func(t *testing.T, ns *kerneltest.Namespace) {
			p := connect(t, ns, events.Inbound, f)
			p.shutdown()
			pause(100 * time.Millisecond)
			end := at(func() { p.closeFD(&p.peer) })
			p.check(r, events.Inbound, soon, want{end: events.PeerFIN, held: end.since(p.shut), limit: 60 * time.Second,
				source: default60, closedBy: events.ByShutdown})
		})
	}
	scenario(t, "held by shutdown of both directions", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shut = at(func() { p.must(unix.Shutdown(p.subject, unix.SHUT_RDWR)) })
		pause(100 * time.Millisecond)
		end := at(func() { p.closeFD(&p.peer) })
		p.check(r, events.Inbound, soon, want{end: events.PeerFIN, held: end.since(p.shut), limit: 60 * time.Second,
			source: default60, closedBy: events.ByShutdown})
	})
	scenario(t, "held, then closed, then the timer", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 5)
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(400 * time.Millisecond)
		p.close()
		moved := r.await(t, ns.Inode, p.flow, track.Moved, soon)
		if moved.Conn.Stage != events.Minisock {
			t.Errorf("closing it made it %s, want minisock", moved.Conn.Stage)
		}
		p.check(r, events.Inbound, soon+10*time.Second, want{end: events.KernelTimeout, held: p.closed.since(p.shut),
			minisock: about(5 * time.Second), limit: 5 * time.Second, source: "net.ipv4.tcp_fin_timeout 5s", closedBy: events.ByClose})
	})
	scenario(t, "held, owner killed", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 5)
		p := connect(t, ns, events.Inbound, ipv4)
		self, err := os.Executable()
		p.must(err)
		child := exec.Command(self)
		child.Env = append(os.Environ(), childEnv+"=1")
		child.ExtraFiles = []*os.File{os.NewFile(uintptr(p.subject), "subject")}
		forking.Lock()
		err = child.Start()
		child.ExtraFiles[0].Close() // The child has it now, and nobody else.
		p.subject = -1
		opened := r.find(ns.Inode, p.flow, track.Opened, soon)
		forking.Unlock()
		if p.must(err); opened == nil {
			t.Fatal("the child did not shut down the socket")
		}
		pause(300 * time.Millisecond)
		// It is dead, and the socket closed, once it has been waited for.
		killed := at(func() {
			p.must(child.Process.Kill())
			err = child.Wait()
		})
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
			t.Fatalf("the child ended before it was killed: %v", err)
		}
		p.check(r, events.Inbound, soon+10*time.Second, want{end: events.KernelTimeout, held: killed.since(instant(opened.Conn.Since)),
			minisock: about(5 * time.Second), limit: 5 * time.Second, source: "net.ipv4.tcp_fin_timeout 5s",
			closedBy: events.ByClose, pid: child.Process.Pid})
	})
	scenario(t, "closed, fin timeout 5", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 5)
		p := connect(t, ns, events.Outbound, ipv4)
		p.close()
		p.check(r, events.Outbound, soon+10*time.Second, want{end: events.KernelTimeout, minisock: about(5 * time.Second),
			limit: 5 * time.Second, source: "net.ipv4.tcp_fin_timeout 5s", closedBy: events.ByClose})
	})
	scenario(t, "closed, another fin timeout in another namespace", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 7)
		p := connect(t, ns, events.Inbound, ipv6)
		p.close()
		p.check(r, events.Inbound, soon+10*time.Second, want{end: events.KernelTimeout, minisock: about(7 * time.Second),
			limit: 7 * time.Second, source: "net.ipv4.tcp_fin_timeout 7s", closedBy: events.ByClose})
	})
	scenario(t, "closed, fin timeout 65: orphan, then minisock", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 65)
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		if opened := r.await(t, ns.Inode, p.flow, track.Opened, soon); opened.Conn.Stage != events.Orphaned {
			t.Errorf("closing it made it %s, want orphaned", opened.Conn.Stage)
		}
		p.check(r, events.Inbound, soon+10*time.Second, want{end: events.KernelTimeout, orphaned: about(5 * time.Second),
			minisock: about(5 * time.Second), limit: 10 * time.Second,
			source: "net.ipv4.tcp_fin_timeout 65s: 2 × (65s − 60s)", closedBy: events.ByClose})
	})
	scenario(t, "held, then closed with fin timeout 65", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 65)
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(200 * time.Millisecond)
		p.close()
		if moved := r.await(t, ns.Inode, p.flow, track.Moved, soon); moved.Conn.Stage != events.Orphaned {
			t.Errorf("closing it made it %s, want orphaned", moved.Conn.Stage)
		}
		pause(300 * time.Millisecond)
		end := at(func() { p.closeFD(&p.peer) })
		p.check(r, events.Inbound, soon, want{end: events.PeerFIN, held: p.closed.since(p.shut), orphaned: end.since(p.closed),
			limit: 10 * time.Second, source: "net.ipv4.tcp_fin_timeout 65s: 2 × (65s − 60s)", closedBy: events.ByClose})
	})
	scenario(t, "orphan reset by data that nobody will read", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 65)
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		r.await(t, ns.Inode, p.flow, track.Opened, soon)
		pause(100 * time.Millisecond)
		end := at(p.writeLate)
		closed := r.await(t, ns.Inode, p.flow, track.Closed, soon)
		if closed.Conn.End != events.Reset || !closed.Conn.EndExact {
			t.Errorf("it ended by %s (exact %v), want reset, exactly", closed.Conn.End, closed.Conn.EndExact)
		}
		p.near("orphaned", closed.Conn.Orphaned, end.since(p.closed), 0)
	})
	scenario(t, "TCP_LINGER2 3", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.must(unix.SetsockoptInt(p.subject, unix.IPPROTO_TCP, unix.TCP_LINGER2, 3))
		p.close()
		p.check(r, events.Inbound, soon+10*time.Second, want{end: events.KernelTimeout, minisock: about(3 * time.Second),
			limit: 3 * time.Second, source: "TCP_LINGER2 3s", closedBy: events.ByClose})
	})
	scenario(t, "TCP_LINGER2 -1", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.must(unix.SetsockoptInt(p.subject, unix.IPPROTO_TCP, unix.TCP_LINGER2, -1))
		p.close()
		closed := r.await(t, p.ns.Inode, p.flow, track.Closed, soon).Conn
		if closed.End != events.LocalReset || closed.Duration > exact {
			t.Errorf("it ended by %s after %s, want local_reset at once", closed.End, closed.Duration)
		}
	})
	scenario(t, "held, then closed with TCP_LINGER2 -1", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.must(unix.SetsockoptInt(p.subject, unix.IPPROTO_TCP, unix.TCP_LINGER2, -1))
		p.shutdown()
		pause(200 * time.Millisecond)
		p.close()
		closed := r.await(t, p.ns.Inode, p.flow, track.Closed, soon).Conn
		if closed.End != events.LocalReset {
			t.Errorf("it ended by %s, want local_reset", closed.End)
		}
		p.near("held", closed.Held, p.closed.since(p.shut), 0)
	})
	for name, timestamps := range map[string]string{"by its stamp": "1", "by its timer": "0"} {
		scenario(t, "peer's FIN to a minisock, dated "+name, func(t *testing.T, ns *kerneltest.Namespace) {
			ns.Sysctl(t, "net.ipv4.tcp_timestamps", timestamps)
			p := connect(t, ns, events.Outbound, ipv4)
			p.close()
			pause(400 * time.Millisecond)
			end := at(func() { p.closeFD(&p.peer) })
			p.check(r, events.Outbound, soon, want{end: events.PeerFIN, minisock: end.since(p.closed), limit: 60 * time.Second,
				source: default60, closedBy: events.ByClose})
		})
	}
	scenario(t, "RST to a held socket", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(200 * time.Millisecond)
		end := at(func() { p.resetPeer() })
		p.check(r, events.Inbound, soon, want{end: events.PeerReset, held: end.since(p.shut), limit: 60 * time.Second,
			source: default60, closedBy: events.ByShutdown})
	})
	scenario(t, "RST to a minisock", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		r.await(t, p.ns.Inode, p.flow, track.Opened, soon)
		pause(100 * time.Millisecond)
		end := at(func() { p.resetPeer() })
		p.check(r, events.Inbound, soon, want{end: events.Reset, minisock: end.since(p.closed), limit: 60 * time.Second,
			source: default60, closedBy: events.ByClose})
	})
	scenario(t, "data to a minisock", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		r.await(t, p.ns.Inode, p.flow, track.Opened, soon)
		pause(100 * time.Millisecond)
		end := at(p.writeLate)
		p.check(r, events.Inbound, soon, want{end: events.Reset, minisock: end.since(p.closed), limit: 60 * time.Second,
			source: default60, closedBy: events.ByClose})
	})
	scenario(t, "closed with unread data", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(200 * time.Millisecond)
		_, err := unix.Write(p.peer, []byte("unread"))
		p.must(err)
		p.close()
		p.check(r, events.Inbound, soon, want{end: events.LocalReset, held: p.closed.since(p.shut), limit: 60 * time.Second,
			source: default60, closedBy: events.ByShutdown})
	})
	scenario(t, "closed with SO_LINGER 0", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(200 * time.Millisecond)
		p.must(unix.SetsockoptLinger(p.subject, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		p.close()
		p.check(r, events.Inbound, soon, want{end: events.LocalReset, held: p.closed.since(p.shut), limit: 60 * time.Second,
			source: default60, closedBy: events.ByShutdown})
	})
	scenario(t, "held, destroyed", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		r.await(t, p.ns.Inode, p.flow, track.Opened, soon)
		p.destroy()
		closed := r.await(t, p.ns.Inode, p.flow, track.Closed, soon).Conn
		if closed.End != events.Destroyed || !closed.EndExact {
			t.Errorf("it ended by %s (exact %v), want destroyed, exactly", closed.End, closed.EndExact)
		}
	})
	scenario(t, "no room for a minisock", func(t *testing.T, ns *kerneltest.Namespace) {
		r.nextSnapshot(t, ns) // The counter of the namespace has been read before it rises.
		ns.Sysctl(t, "net.ipv4.tcp_max_tw_buckets", "0")
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		r.await(t, ns.Inode, p.flow, track.Opened, soon)
		closed := r.await(t, ns.Inode, p.flow, track.Closed, soon).Conn
		if closed.End != events.TableFull || closed.Duration > exact {
			t.Errorf("it ended by %s after %s, want table_full at once", closed.End, closed.Duration)
		}
	})
	scenarioDelayingACKs(t, "FIN and ACK in one segment", func(t *testing.T, ns *kerneltest.Namespace) {
		for range 20 {
			p := connect(t, ns, events.Outbound, ipv4)
			// The peer's ACK waits for its answer, which is its FIN: 40 ms at most (delayed ACK).
			answered := make(chan moment, 1)
			go func() {
				if err := awaitFIN(p.peer); err != nil {
					t.Error(err)
				}
				answered <- at(func() { p.closeFD(&p.peer) })
			}()
			p.close()
			if (<-answered).since(p.closed).most > 20*time.Millisecond {
				continue // Too late: the peer had to wait for a processor.
			}
			p.check(r, events.Outbound, soon, want{end: events.PeerFIN, limit: 60 * time.Second, source: default60,
				closedBy: events.ByClose})
			return
		}
		t.Fatal("the peer never answered in time")
	})
	scenario(t, "only the end that closed first", func(t *testing.T, ns *kerneltest.Namespace) {
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		pause(100 * time.Millisecond)
		p.closeFD(&p.peer)
		r.await(t, p.ns.Inode, p.flow, track.Closed, soon)
		mirrored := events.Flow{Local: p.flow.Remote, Remote: p.flow.Local}
		if kinds := r.about(p.ns.Inode, mirrored); kinds != nil {
			t.Errorf("the other end had %v, though it was never in FIN_WAIT2", kinds)
		}
	})
	scenario(t, "past its limit while held", func(t *testing.T, ns *kerneltest.Namespace) {
		finTimeout(t, ns, 1)
		p := connect(t, ns, events.Inbound, ipv4)
		p.shutdown()
		overdue := r.await(t, ns.Inode, p.flow, track.Overdue, soon)
		p.near("overdue after", overdue.Conn.Duration, about(time.Second+track.Grace), time.Second)
		if !overdue.Conn.Overdue || overdue.Conn.End != 0 {
			t.Errorf("overdue %v, end %s in the notice", overdue.Conn.Overdue, overdue.Conn.End)
		}
		// Its kernel timer runs from the close on: no longer overdue.
		p.close()
		r.await(t, ns.Inode, p.flow, track.Recovered, soon)
	})
}

// scenario runs a test beside the others, in a namespace of its own, where the
// peer acknowledges at once.
func scenario(t *testing.T, name string, fn func(*testing.T, *kerneltest.Namespace)) {
	scenarioDelayingACKs(t, name, fn, quickACK)
}

// scenarioDelayingACKs runs a test beside the others, in a namespace of its own.
func scenarioDelayingACKs(t *testing.T, name string, fn func(*testing.T, *kerneltest.Namespace),
	setUp ...func(*testing.T, *kerneltest.Namespace)) {
	t.Run(name, func(t *testing.T) {
		// These fork: before any other scenario goes on.
		ns := kerneltest.NewNamespace(t)
		for _, prepare := range setUp {
			prepare(t, ns)
		}
		t.Parallel()
		fn(t, ns)
	})
}

// quickACK switches delayed ACKs off, so that a FIN is acknowledged at once and
// the test's clock knows the entry into FIN_WAIT2.
func quickACK(t *testing.T, ns *kerneltest.Namespace) {
	t.Helper()
	for _, args := range []string{
		"route replace local 127.0.0.1 dev lo table local proto kernel scope host src 127.0.0.1 quickack 1",
		"-6 route del local ::1 dev lo table local",
		"-6 route add local ::1 dev lo table local quickack 1",
	} {
		cmd := exec.Command("nsenter", append([]string{"--net=" + ns.Path(), "ip"}, strings.Fields(args)...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
}

// nextSnapshot awaits a snapshot that begins after the call.
func (r *recorder) nextSnapshot(t *testing.T, ns *kerneltest.Namespace) {
	t.Helper()
	// No event shows the end of a minisock: the loop must have looked.
	p := connect(t, ns, events.Inbound, ipv4)
	p.must(unix.SetsockoptInt(p.subject, unix.IPPROTO_TCP, unix.TCP_LINGER2, 1))
	p.close()
	r.await(t, ns.Inode, p.flow, track.Closed, soon+10*time.Second)
}
