// SPDX-License-Identifier: Apache-2.0

package main

import (
	"container/heap"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// soakKind is a way for a connection to be in FIN_WAIT2. Each has a port of its
// own, the same in all namespaces.
type soakKind struct {
	name  string
	share int    // of the connections, beside the other kinds'
	does  string // a word for each step, see soakSteps
}

// soakKinds are every ending and stage of them, as the kernel has them.
var soakKinds = []soakKind{
	{"healthy", 20, "close fin"},
	{"half-closed", 10, "shut fin"},
	{"held, peer's FIN", 10, "shut wait fin"},
	{"held, peer's data and FIN", 4, "shut wait data wait fin"},
	{"held, peer's reset", 5, "shut wait reset"},
	{"held, closed with unread data", 3, "shut wait unread close"},
	{"held, closed with SO_LINGER 0", 3, "nolinger shut wait close"},
	{"held, closed with TCP_LINGER2 < 0", 3, "linger2=-1 shut wait close"},
	{"held, destroyed", 1, "shut wait destroy"},
	{"held, closed, timer", 6, "shut wait close timer"},
	{"held, peer's data, closed, timer", 3, "shut wait data wait close timer"},
	{"held, closed, peer's FIN", 6, "shut wait close wait fin"},
	{"held, closed, peer's reset", 3, "linger2=30 shut wait close wait reset"},
	{"closed, timer", 6, "close timer"},
	{"closed, timer by TCP_LINGER2", 3, "linger2=4 close timer"},
	{"closed, peer's FIN", 6, "close wait fin"},
	{"closed, peer's reset", 2, "linger2=30 close wait reset"},
	{"closed, data", 3, "linger2=30 close wait late"},
	{"closed, destroyed", 1, "linger2=30 close wait destroy"},
	{"closed with TCP_LINGER2 < 0", 3, "linger2=-1 close"},
	{"orphan, timer", 3, "linger2=63 close timer"},
	{"orphan, peer's FIN", 3, "linger2=64 close wait fin"},
	{"orphan, data", 2, "linger2=64 close wait late"},
	{"held, orphan, timer", 3, "linger2=63 shut wait close timer"},
}

// soakFullKinds are those of a namespace that has no room for minisocks.
var soakFullKinds = []soakKind{{"no room for a minisock", 1, "close full"}}

// soakPort is the first kind's; the others follow. What is at these ports and has
// these addresses is the soak's.
const (
	soakPort      = 18201
	soakAddresses = "10.192.0.0/10,fd10::/12"
)

func (k *soakKind) port() int {
	for i := range soakKinds {
		if k == &soakKinds[i] {
			return soakPort + i
		}
	}
	return soakPort + len(soakKinds)
}

const (
	// soakFinTimeoutLeast and soakFinTimeoutMost are what tcp_fin_timeout is at
	// first, in seconds: more than what settings above 60 s leave for a minisock,
	// which would look like another's.
	soakFinTimeoutLeast, soakFinTimeoutMost = 5, 8
	// soakTimerMost is the longest that a timer is, with its slack.
	soakTimerMost = 35 * time.Second
	// soakWait is how long a connection waits at most between two steps.
	soakWait = 8 * time.Second
)

// soakSteps are what the words of a kind mean, but for linger2=S, which is the
// option TCP_LINGER2 in seconds. A step that is over at once returns 0, another
// after how long the next one follows.
var soakSteps = map[string]func(*soakLife) time.Duration{
	"shut": func(l *soakLife) time.Duration {
		l.shutdown()
		l.settle(l.subject, &l.shut, events.FinWait2)
		l.tell(func(s *soakStory) { s.entered = l.shut })
		return 0
	},
	"close": func(l *soakLife) time.Duration {
		finTime := l.space.finTime(l)
		l.close()
		// One that is reset may have a copy yet, of a child that is about to run: were
		// the peer closed before it, that would be what ends it.
		resets, peer := finTime < 0 || l.resets, []events.State{events.Close}
		if !resets {
			peer = append(peer, events.CloseWait)
		}
		l.settle(l.peer, &l.closed, peer...)
		l.tell(func(s *soakStory) {
			if s.entered == (moment{}) {
				s.entered = l.closed
			}
			s.closed, s.finTime = l.closed, finTime
			if resets {
				s.leaves(l.closed, events.LocalReset)
			}
		})
		return 0
	},
	"fin": func(l *soakLife) time.Duration {
		left := at(func() {
			// The kernel's timer may have reset it.
			if err := unix.Shutdown(l.peer, unix.SHUT_WR); !errors.Is(err, unix.ENOTCONN) {
				l.must(err)
			}
		})
		l.settle(l.peer, &left, events.Close)
		l.tell(func(s *soakStory) { s.leaves(left, events.PeerFIN) })
		return 0
	},
	"reset": func(l *soakLife) time.Duration {
		left := at(l.resetPeer)
		l.tell(func(s *soakStory) { s.leaves(left, events.PeerReset) })
		return 0
	},
	"late": func(l *soakLife) time.Duration {
		left := at(func() {
			// There may be nobody any more who resets it.
			_, err := unix.Write(l.peer, []byte("late"))
			if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				l.must(err)
			}
		})
		l.settle(l.peer, &left, events.Close)
		l.tell(func(s *soakStory) { s.leaves(left, events.Reset) })
		return 0
	},
	"data": func(l *soakLife) time.Duration {
		sent := at(l.writeLate)
		_, err := unix.Read(l.subject, make([]byte, 16))
		l.must(err)
		l.tell(func(s *soakStory) { s.packet = sent })
		return 0
	},
	"unread": func(l *soakLife) time.Duration {
		l.writeLate()
		fds := []unix.PollFd{{Fd: int32(l.subject), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
				l.must(err)
				break
			}
		}
		l.resets = true
		return 0
	},
	"destroy": func(l *soakLife) time.Duration {
		left := at(l.destroyIfThere)
		l.tell(func(s *soakStory) { s.leaves(left, events.Destroyed) })
		return 0
	},
	"nolinger": func(l *soakLife) time.Duration {
		l.must(unix.SetsockoptLinger(l.subject, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		l.resets = true
		return 0
	},
	"full": func(l *soakLife) time.Duration {
		l.tell(func(s *soakStory) { s.leaves(l.closed, events.TableFull) })
		return 0
	},
	"wait": func(l *soakLife) time.Duration {
		wait := l.waits[0]
		l.waits = l.waits[1:]
		return wait
	},
	// The peer stays until the timer must have fired.
	"timer": func(l *soakLife) time.Duration {
		return (&soakStory{finTime: l.story.finTime}).lifetime().most + 2*time.Second
	},
}

// step does what a word means.
func (l *soakLife) step(word string) time.Duration {
	option, value, ok := strings.Cut(word, "=")
	if !ok {
		return soakSteps[word](l)
	}
	if option != "linger2" {
		l.t.Fatalf("nobody knows what %q is", word)
	}
	seconds, err := strconv.Atoi(value)
	l.must(err)
	l.must(unix.SetsockoptInt(l.subject, unix.IPPROTO_TCP, unix.TCP_LINGER2, seconds))
	l.linger2 = seconds
	return 0
}

// soakLife is a connection of which the generator is both ends.
type soakLife struct {
	*pair
	space   *soakSpace
	steps   []string        // yet to be done
	waits   []time.Duration // yet to come
	due     time.Time
	linger2 int  // s
	resets  bool // its close does
	story   *soakStory
}

// tell tells the witness.
func (l *soakLife) tell(what func(*soakStory)) {
	w := l.space.witness
	w.mu.Lock()
	defer w.mu.Unlock()
	what(l.story)
}

// settle waits until an end is in one of these states, and counts what led there
// as done only then: on a busy machine a segment is processed later than it is sent.
func (l *soakLife) settle(fd int, m *moment, states ...events.State) {
	for {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		l.must(err)
		now := at(func() {})
		for _, s := range states {
			if events.State(info.State) == s {
				m.after = now.after
				return
			}
		}
		if now.after.Sub(m.before) > 10*time.Second {
			l.t.Fatalf("%s → %s: a peer's end is in state %d", l.flow.Local, l.flow.Remote, info.State)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// destroyIfThere is ss -K; a closed connection may have gone by its timer.
func (l *soakLife) destroyIfThere() {
	cmd := exec.Command("nsenter", "--net="+l.ns.Path(), "ss", "-K", "-tn", "state", "fin-wait-2",
		"src", l.flow.Local.String(), "dst", l.flow.Remote.String())
	l.must(startAlone(cmd))
	l.must(cmd.Wait())
}

// startAlone starts a child while nobody closes a socket: it has copies of all
// until it runs, which may be a moment longer.
func startAlone(cmd *exec.Cmd) error {
	forking.Lock()
	defer forking.Unlock()
	err := cmd.Start()
	if err == nil {
		soakChildren.Store(cmd.Process.Pid, true)
	}
	return err
}

// soakChildren are the pids of what startAlone has started: the kernel may say
// that one of them was the last to close a socket.
var soakChildren sync.Map

func newNamespaceAlone(t *testing.T) *kerneltest.Namespace {
	forking.Lock()
	defer forking.Unlock()
	return kerneltest.NewNamespace(t)
}

// soakSpace is a network namespace full of connections, which may be deleted and
// made anew.
type soakSpace struct {
	name       string
	number     int
	kinds      []soakKind
	rate       float64 // connections a second
	timestamps bool    // of TCP
	witness    *soakWitness

	// Of its own thread.
	finTimeout int // s
	made       int // connections, of all its lives
	listeners  []int
	random     *rand.Rand
	lives      soakLives
	t          *testing.T

	// do has things done by that thread.
	do chan func()
	// cut ends a life of it.
	cut chan struct{}

	mu sync.Mutex
	ns *kerneltest.Namespace // nil between two lives
}

func (s *soakSpace) namespace() *kerneltest.Namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ns
}

// finTime is tcp_fin_time() of a connection, as a close would find it now.
func (s *soakSpace) finTime(l *soakLife) time.Duration {
	if l.linger2 != 0 {
		return time.Duration(l.linger2) * time.Second
	}
	return time.Duration(s.finTimeout) * time.Second
}

// run lives one life after the other until stop is closed.
func (s *soakSpace) run(t *testing.T, seed uint64, stop <-chan struct{}) {
	for life := 0; ; life++ {
		s.random = rand.New(rand.NewPCG(seed, uint64(s.number)<<32|uint64(life)))
		t.Run(fmt.Sprintf("%s, life %d", s.name, life+1), func(t *testing.T) { s.live(t, stop) })
		select {
		case <-stop:
			return
		default:
		}
		if t.Failed() {
			return
		}
	}
}

// live makes the namespace and connections in it until stop is closed and all of
// them have ended, or until it is cut off.
func (s *soakSpace) live(t *testing.T, stop <-chan struct{}) {
	ns := newNamespaceAlone(t)
	s.t = t
	s.prepare(ns)
	s.mu.Lock()
	s.ns = ns
	s.mu.Unlock()
	s.witness.know(ns.Inode)
	defer func() {
		s.mu.Lock()
		s.ns = nil
		s.mu.Unlock()
		for _, fd := range s.listeners {
			unix.Close(fd)
		}
		s.listeners = nil
	}()
	ns.Do(func() { s.churn(ns, stop) })
	// It stays until it is known what became of all; with it that would go.
	s.witness.await(ns.Inode, soon)
}

func (s *soakSpace) prepare(ns *kerneltest.Namespace) {
	ns.Sysctl(s.t, "net.ipv6.ip_nonlocal_bind", "1")
	if !s.timestamps {
		ns.Sysctl(s.t, "net.ipv4.tcp_timestamps", "0")
	}
	s.setFinTimeout(ns, soakFinTimeoutLeast+s.random.IntN(soakFinTimeoutMost-soakFinTimeoutLeast+1))
	if &s.kinds[0] == &soakFullKinds[0] {
		ns.Sysctl(s.t, "net.ipv4.tcp_max_tw_buckets", "0")
		// Longer than any look takes: past it the kernel does not show which it was.
		s.setFinTimeout(ns, 60)
	}
	// As quickACK has it.
	for _, route := range []string{"-4 route add local 10.0.0.0/8 dev lo quickack 1", "-6 route add local fd00::/8 dev lo quickack 1"} {
		cmd := exec.Command("nsenter", append([]string{"--net=" + ns.Path(), "ip"}, strings.Fields(route)...)...)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := errors.Join(startAlone(cmd), cmd.Wait()); err != nil {
			s.t.Fatalf("ip %s: %v: %s", route, err, &out)
		}
	}
	ns.Do(func() {
		for i := range s.kinds {
			fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				s.listeners = append(s.listeners, fd)
				err = errors.Join(unix.Bind(fd, &unix.SockaddrInet6{Port: s.kinds[i].port()}), unix.Listen(fd, 128))
			}
			if err != nil {
				s.t.Fatal(err)
			}
		}
	})
}

func (s *soakSpace) setFinTimeout(ns *kerneltest.Namespace, seconds int) {
	ns.Sysctl(s.t, "net.ipv4.tcp_fin_timeout", strconv.Itoa(seconds))
	s.finTimeout = seconds
	// The timer of an orphan reads it again.
	for _, l := range s.lives {
		l.tell(func(story *soakStory) { story.vague = story.vague || story.finTime > time.Minute && l.linger2 == 0 })
	}
}

func (s *soakSpace) churn(ns *kerneltest.Namespace, stop <-chan struct{}) {
	arrival := time.Now()
	for {
		next := arrival
		if len(s.lives) > 0 && (stop == nil || s.lives[0].due.Before(next)) {
			next = s.lives[0].due
		} else if stop == nil {
			return
		}
		select {
		case <-stop:
			stop = nil // No more of them.
			continue
		case <-s.cut:
			s.cutOff(ns)
			return
		case do := <-s.do:
			do()
			continue
		case <-time.After(time.Until(next)):
		}
		now := time.Now()
		for len(s.lives) > 0 && !s.lives[0].due.After(now) {
			s.goOn(s.lives[0])
		}
		if stop != nil && !arrival.After(now) {
			s.goOn(s.begin(ns))
			// As they come from many who do not know each other; none are made up for.
			arrival = arrival.Add(time.Duration(s.random.ExpFloat64() / s.rate * float64(time.Second)))
			if late := time.Now().Add(-time.Second); arrival.Before(late) {
				arrival = late
			}
		}
	}
}

// begin makes a connection, with all that is random of it.
func (s *soakSpace) begin(ns *kerneltest.Namespace) *soakLife {
	all := 0
	for i := range s.kinds {
		all += s.kinds[i].share
	}
	n, k := s.random.IntN(all), 0
	for ; n >= s.kinds[k].share; k++ {
		n -= s.kinds[k].share
	}
	kind := &s.kinds[k]
	side := []events.Side{events.Inbound, events.Outbound}[s.random.IntN(2)]
	ipv6 := s.random.IntN(4) == 0
	l := &soakLife{pair: &pair{t: s.t, ns: ns}, space: s, steps: strings.Fields(kind.does)}
	for range strings.Count(kind.does, "wait") {
		// Milliseconds as often as seconds.
		l.waits = append(l.waits, time.Duration(float64(soakWait)*math.Exp(-8*s.random.Float64())))
	}

	s.made++
	var from, to unix.Sockaddr
	domain := unix.AF_INET
	if ipv6 {
		// Linux remembers each address on lo as a neighbour: there is a bound.
		domain = unix.AF_INET6
		id := s.made % (1 << 14)
		addr := [16]byte{0: 0xfd, 1: 0x10 | byte(s.number), 6: byte(id >> 8), 7: byte(id), 15: 1}
		from, to = &unix.SockaddrInet6{Addr: addr}, &unix.SockaddrInet6{Addr: addr, Port: kind.port()}
	} else {
		id := 0b11<<22 | s.number<<19 | s.made%(1<<19)
		addr := [4]byte{10, byte(id >> 16), byte(id >> 8), byte(id)}
		from, to = &unix.SockaddrInet4{Addr: addr}, &unix.SockaddrInet4{Addr: addr, Port: kind.port()}
	}
	client, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	l.must(err)
	l.must(errors.Join(unix.SetsockoptInt(client, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1), unix.Bind(client, from), unix.Connect(client, to)))
	server, _, err := unix.Accept4(s.listeners[k], unix.SOCK_CLOEXEC)
	l.must(err)
	l.subject, l.peer = server, client
	if side == events.Outbound {
		l.subject, l.peer = client, server
	}
	local, err := unix.Getsockname(l.subject)
	l.must(err)
	remote, err := unix.Getpeername(l.subject)
	l.must(err)
	l.flow = events.Flow{Local: endpoint(local), Remote: endpoint(remote)}
	l.story = s.witness.begin(&soakStory{kind: kind, netns: ns.Inode, flow: l.flow, side: side})
	l.due = time.Now()
	heap.Push(&s.lives, l)
	return l
}

// goOn does a connection's steps up to the next pause.
func (s *soakSpace) goOn(l *soakLife) {
	for len(l.steps) > 0 {
		step := l.steps[0]
		l.steps = l.steps[1:]
		if wait := l.step(step); wait > 0 {
			l.due = time.Now().Add(wait)
			s.lives.moved(l)
			return
		}
	}
	s.lives.remove(l)
	l.closeFD(&l.peer)
	l.closeFD(&l.subject)
	s.witness.over(l.story)
}

// cutOff ends all connections in the namespace, which goes with it: no witness
// can say any more what became of them.
func (s *soakSpace) cutOff(ns *kerneltest.Namespace) {
	cmd := exec.Command("nsenter", "--net="+ns.Path(), "ip", "link", "set", "lo", "down")
	if err := errors.Join(startAlone(cmd), cmd.Wait()); err != nil {
		s.t.Fatal("set lo down:", err)
	}
	s.witness.cutOff(ns.Inode)
	for _, l := range s.lives {
		if l.peer >= 0 {
			l.must(unix.SetsockoptLinger(l.peer, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		}
		l.closeFD(&l.peer)
		l.closeFD(&l.subject)
		s.witness.over(l.story)
	}
	s.lives = nil
}

// soakLives is a heap, with the one that is due next on top.
type soakLives []*soakLife

func (h soakLives) Len() int           { return len(h) }
func (h soakLives) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h soakLives) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *soakLives) Push(l any)        { *h = append(*h, l.(*soakLife)) }
func (h *soakLives) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

func (h soakLives) index(l *soakLife) int {
	for i := range h {
		if h[i] == l {
			return i
		}
	}
	return -1
}

func (h *soakLives) moved(l *soakLife)  { heap.Fix(h, h.index(l)) }
func (h *soakLives) remove(l *soakLife) { heap.Remove(h, h.index(l)) }
