// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// The addresses of the lab: one host, and all the others behind a router. None
// of the others is on the host, as far as it can tell.
const (
	labHost    = "192.0.2.10"
	labWorker2 = "198.51.100.22" // the client of the story
	labServer  = "203.0.113.80:8443"
)

// client is the nth of many clients.
func client(n int) string { return fmt.Sprintf("198.51.100.%d", 100+n%100) }

// A world is a host that is to be diagnosed, and the rest of the internet.
type world struct {
	t        *testing.T
	host     *kerneltest.Namespace
	internet *kerneltest.Namespace
	haproxy  *haproxytest.HAProxy // nil where there is none

	mu     sync.Mutex
	closed bool
	open   map[io.Closer]bool // kept by somebody who is silent
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, host: kerneltest.NewNamespace(t), internet: kerneltest.NewNamespace(t), open: map[io.Closer]bool{}}
	t.Cleanup(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.closed = true
		for c := range w.open {
			c.Close()
		}
	})
	w.ip(w.host, `link add lab0 type veth peer name lab1 netns `+w.internet.Path()+`
		addr add `+labHost+`/24 dev lab0
		link set lab0 up`)
	w.ip(w.internet, `addr add 192.0.2.1/24 dev lab1
		link set lab1 up
		route add local 198.51.100.0/24 dev lo
		route add local 203.0.113.0/24 dev lo`)
	w.ip(w.host, `route add default via 192.0.2.1`)
	return w
}

// ip runs lines of ip(8) in a namespace.
func (w *world) ip(ns *kerneltest.Namespace, batch string) {
	w.t.Helper()
	cmd := exec.Command("nsenter", "--net="+ns.Path(), "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("ip -batch: %v: %s", err, out)
	}
}

func (w *world) sysctl(name string, value int) { w.host.Sysctl(w.t, name, strconv.Itoa(value)) }

// finTimeout sets the host's tcp_fin_timeout.
func (w *world) finTimeout(seconds int) { finTimeout(w.t, w.host, seconds) }

// keep keeps something open until the end of the scenario; what is not
// referred to, the garbage collector would close.
func (w *world) keep(c io.Closer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		c.Close()
		return
	}
	w.open[c] = true
}

// end closes what was kept.
func (w *world) end(c io.Closer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, c)
	c.Close()
}

// listen listens in a namespace and has every connection served.
func (w *world) listen(ns *kerneltest.Namespace, at string, serve func(*net.TCPConn)) {
	w.t.Helper()
	config := net.ListenConfig{KeepAlive: -1}
	config.SetMultipathTCP(false)
	var l net.Listener
	var err error
	ns.Do(func() { l, err = config.Listen(context.Background(), "tcp4", at) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.keep(l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.keep(c)
			go serve(c.(*net.TCPConn))
		}
	}()
}

// What servers do with a connection.

// answers takes a line, answers and closes, as an HTTP/1.0 server does.
func (w *world) answers(c *net.TCPConn) {
	defer w.end(c)
	if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
		_, _ = io.WriteString(c, withoutLength)
	}
}

// silent takes a line, answers, and never closes.
func (w *world) silent(c *net.TCPConn) {
	if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
		_, _ = io.WriteString(c, withoutLength)
	}
}

// holds takes a line, answers, says that this was all, and waits.
func (w *world) holds(c *net.TCPConn) {
	w.silent(c)
	_ = c.CloseWrite()
}

// drains takes a line, answers, says that this was all, and reads on.
func (w *world) drains(c *net.TCPConn) {
	w.holds(c)
	_, _ = io.Copy(io.Discard, c)
	w.end(c)
}

// dial connects from an address of the namespace.
func (w *world) dial(ns *kerneltest.Namespace, from, to string) *net.TCPConn {
	dialer := net.Dialer{KeepAlive: -1, Timeout: playTime}
	if from != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	var c net.Conn
	var err error
	ns.Do(func() { c, err = dialer.Dial("tcp4", to) })
	if err != nil {
		w.t.Errorf("from %s: %v", from, err)
		return nil
	}
	w.keep(c)
	_ = c.SetDeadline(time.Now().Add(playTime))
	return c.(*net.TCPConn)
}

// What clients do.

// asks sends a request, and returns the connection where it did.
func (w *world) asks(from, to string) *net.TCPConn {
	c := w.dial(w.internet, from, to)
	if c == nil {
		return nil
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.0\n\n"); err != nil {
		w.t.Errorf("from %s: %v", from, err)
		return nil
	}
	return c
}

// hears reads the answer up to its end, the server's FIN.
func (w *world) hears(from, to string) *net.TCPConn {
	c := w.asks(from, to)
	if c == nil {
		return nil
	}
	if answer, err := io.ReadAll(c); err != nil || len(answer) == 0 {
		w.t.Errorf("from %s: %v after %q", from, err, answer)
	}
	return c
}

// stuck makes clients that hear the answer, and never close.
func (w *world) stuck(n int, from func(int) string, to string) {
	for i := range n {
		w.hears(from(i), to)
	}
}

// healthy is a client that closes once it has the answer.
func (w *world) healthy(from, to string) {
	if c := w.hears(from, to); c != nil {
		w.end(c)
	}
}

func only(from string) func(int) string { return func(int) string { return from } }

// slow makes clients that hear that the answer has ended, and still have something
// to say, byte by byte.
func (w *world) slow(n int, to string) {
	for i := range n {
		c := w.hears(client(i), to)
		if c == nil {
			return
		}
		go func() {
			for {
				if _, err := c.Write([]byte{'x'}); err != nil {
					return
				}
				pause(200 * time.Millisecond)
			}
		}()
	}
}

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Error(err)
	}
}

// regularly does something at an interval until the diagnosis has ended.
func regularly(every time.Duration, do func(int)) func(context.Context) {
	return func(ctx context.Context) {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				do(i)
			}
		}
	}
}

func labRandom() *rand.Rand { return rand.New(rand.NewPCG(4, 2)) }

// atRandom does something at random times (a Poisson process), the same ones
// each time.
func atRandom(mean time.Duration, do func(int)) func(context.Context) {
	return func(ctx context.Context) {
		random := labRandom()
		next := time.Now()
		for i := 0; ; i++ {
			next = next.Add(time.Duration(random.ExpFloat64() * float64(mean)))
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(next)):
				do(i)
			}
		}
	}
}

// counts are a namespace's sockets as /proc/net/tcp has them: the witness that a
// scenario is what it says.
type counts struct {
	held, orphaned, minisock         int // in FIN_WAIT2
	established, closeWait, timeWait int
	listening                        int
}

func (w *world) count() (n counts) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(w.host.Path()), "../net/tcp"))
	if err != nil {
		w.t.Error(err)
	}
	const timeWaitTimer = "03"
	for line := range strings.Lines(string(text)) {
		field := strings.Fields(line)
		if len(field) < 10 {
			continue
		}
		timer, _, _ := strings.Cut(field[5], ":")
		switch state, inode := field[3], field[9]; {
		case state == "05" && inode != "0":
			n.held++
		case state == "05" && timer == timeWaitTimer:
			n.minisock++
		case state == "05":
			n.orphaned++
		case state == "01":
			n.established++
		case state == "08":
			n.closeWait++
		case state == "0A":
			n.listening++
		case state == "06":
			n.timeWait++
		}
	}
	return n
}

// await waits for the sockets of the host.
func (w *world) await(what string, there func(counts) bool) {
	w.t.Helper()
	if err := await(what, func() bool { return there(w.count()) }); err != nil {
		w.t.Fatalf("%v; there are %+v", err, w.count())
	}
}

// runs starts a HAProxy on the host.
func (w *world) runs(config string) {
	w.t.Helper()
	w.haproxy = haproxytest.Start(w.t, w.host, haproxytest.System(w.t), haproxytest.MasterWorker, config)
}

// reloads reloads HAProxy, and waits for the old worker to end if it is to.
func (w *world) reloads(oldEnds bool) {
	w.t.Helper()
	w.haproxy.Reload()
	if !oldEnds {
		return
	}
	if err := await("the old worker to end", func() bool { return len(w.haproxy.Workers()) == 1 }); err != nil {
		w.t.Fatal(err)
	}
}

// starts starts one of the programs below on the host.
func (w *world) starts(program string, args ...string) {
	w.t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	w.host.Do(func() { err = cmd.Start() })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // Killed, it has no more to say.
	})
}

// labPrograms are processes of a host that have a name of their own.
var labPrograms = map[string]func(){
	// app answers, says that this was all, and waits for the client.
	"app": func() {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		l, err := config.Listen(context.Background(), "tcp4", os.Args[1])
		for err == nil {
			var c net.Conn
			if c, err = l.Accept(); err == nil {
				labKept = append(labKept, c)
				go func() {
					if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
						_, _ = io.WriteString(c, withoutLength)
						_ = c.(*net.TCPConn).CloseWrite()
					}
				}()
			}
		}
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	},
	// importer asks a number of times, and forgets to close.
	"importer": func() {
		n, err := strconv.Atoi(os.Args[2])
		for range n {
			var c net.Conn
			for attempt := 0; attempt < 1000; attempt++ { // Its server may still be starting.
				if c, err = net.Dial("tcp4", os.Args[1]); err == nil {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
			if err != nil {
				break
			}
			labKept = append(labKept, c)
			if _, err = io.WriteString(c, "GET / HTTP/1.0\n\n"); err == nil {
				_, err = io.Copy(io.Discard, c)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "importer:", err)
			os.Exit(1)
		}
		for { // A signal ends it.
			unix.Pause()
		}
	},
}

// labKept is what a program does not close.
var labKept []net.Conn
