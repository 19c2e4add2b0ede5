// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/track"
)

var (
	demoProxy   = netip.MustParseAddr("127.0.0.1")
	demoBackend = netip.MustParseAddrPort("127.0.0.3:8080")
	silent      = netip.MustParseAddr("127.0.0.2")
	mixed       = netip.MustParseAddr("127.0.0.4")
	healthy     = netip.MustParseAddr("127.0.0.5")
)

// A frontend is a port of the proxy, with what it does once it has sent its FIN
// to a client that does not close.
type frontend struct {
	port    uint16
	timeout time.Duration // until it gives up and closes; 0 at once, negative never
	about   string
}

// demoFrontends are in the order in which the proxy inherits their sockets.
var demoFrontends = []frontend{
	{mistaken, -1, "it waits for the client to close, for ever: the classic mistake"},
	{cured, 3 * time.Second, "it waits 3s, then closes, and the kernel waits another 5s: the cure"},
	{closing, 0, "it closes at once, and the kernel waits 5s"},
}

const (
	mistaken = 443
	cured    = 8443
	closing  = 80
)

// firstInherited is the descriptor of the first of exec.Cmd's ExtraFiles.
const firstInherited = 3

// exchangeTimeout is how long anything takes that should take microseconds.
const exchangeTimeout = 10 * time.Second

// runProxy accepts on the sockets of demoFrontends.
func runProxy(ctx context.Context) error {
	ended := make(chan error, len(demoFrontends))
	for i, f := range demoFrontends {
		go func() {
			ended <- accept(firstInherited+i, func(client *net.TCPConn) { f.serve(ctx, client) })
		}()
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// serve answers a client with what the backend answers.
func (f frontend) serve(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	request, err := bufio.NewReader(client).ReadString('\n')
	if err != nil {
		return
	}
	upstream, err := dial(ctx, demoProxy, demoBackend)
	if err != nil {
		return
	}
	_, err = io.WriteString(upstream, request)
	if err == nil {
		_, err = io.Copy(client, upstream)
	}
	upstream.Close()
	if err != nil || f.timeout == 0 {
		return
	}
	if client.CloseWrite() != nil {
		return
	}
	if f.timeout > 0 && client.SetReadDeadline(time.Now().Add(f.timeout)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, client) // However it ends, the connection is closed.
}

// runBackend answers and closes, as an HTTP/1.0 server does.
func runBackend() error {
	return accept(firstInherited, func(c *net.TCPConn) {
		defer c.Close()
		if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nhello\n") // A client that is gone needs none.
		}
	})
}

// accept serves the connections of an inherited listening socket.
func accept(fd int, serve func(*net.TCPConn)) error {
	f := os.NewFile(uintptr(fd), "listener")
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		// An answered probe would look like a sign of life: without, the age of
		// a connection that was there before fintrace is all of it.
		tcp := c.(*net.TCPConn)
		if err := tcp.SetKeepAlive(false); err != nil {
			return err
		}
		go serve(tcp)
	}
}

// listen makes a listening socket for a part to inherit.
func listen(ctx context.Context, at netip.AddrPort) (*os.File, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp4", at.String())
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.(*net.TCPListener).File()
}

func dial(ctx context.Context, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
		Timeout:   exchangeTimeout,
		KeepAlive: -1,
	}
	c, err := d.DialContext(ctx, "tcp4", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// runClients sets the stage, and then is the clients.
func (d *demo) runClients(ctx context.Context) error {
	if err := setStage(); err != nil {
		return err
	}
	var toProxy []*os.File
	for _, f := range demoFrontends {
		l, err := listen(ctx, netip.AddrPortFrom(demoProxy, f.port))
		if err != nil {
			return err
		}
		toProxy = append(toProxy, l)
	}
	toBackend, err := listen(ctx, demoBackend)
	if err != nil {
		return err
	}

	acting, end := context.WithCancelCause(ctx)
	var parts sync.WaitGroup
	start := func(name string, sockets ...*os.File) {
		part := d.part(acting, name)
		part.ExtraFiles = sockets
		part.Stdout, part.Stderr = os.Stdout, os.Stderr
		parts.Go(func() {
			if err := supervise(acting, part); err != nil {
				end(fmt.Errorf("demo-%s: %w", name, err))
			}
			end(fmt.Errorf("demo-%s has ended before its time", name))
		})
	}
	start("proxy", toProxy...)
	start("backend", toBackend)
	act := func(err error) {
		if err != nil {
			// If that is because a part has died, its end says more.
			_ = wait(acting, time.Second)
		}
		end(err)
	}
	parts.Go(func() { act(trickle(acting)) })
	act((&script{demo: d, ctx: acting, began: time.Now()}).play())
	parts.Wait()
	if cause := context.Cause(acting); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// setStage makes the namespace ready: loopback up, and a short fin timeout.
func setStage() error {
	if own, err := inNamespaceOfParent(); err != nil || own {
		return errors.Join(err, errors.New("this part of fintrace demo changes the settings of its network namespace: fintrace demo runs it in one of its own"))
	}
	value := strconv.Itoa(int(demoFinTimeout / time.Second))
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_fin_timeout", []byte(value), 0); err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

func inNamespaceOfParent() (bool, error) {
	var own, parents unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return false, err
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", os.Getppid()), &parents); err != nil {
		return false, err
	}
	return own.Ino == parents.Ino, nil
}

// request asks one thing of the proxy and reads the answer to its end; the
// connection is then in CLOSE_WAIT, and for the proxy in FIN_WAIT2.
func request(ctx context.Context, from netip.Addr, port uint16) (*net.TCPConn, error) {
	c, err := dial(ctx, from, netip.AddrPortFrom(demoProxy, port))
	if err != nil {
		return nil, err
	}
	err = c.SetDeadline(time.Now().Add(exchangeTimeout))
	if err == nil {
		_, err = io.WriteString(c, "GET / HTTP/1.0\n")
	}
	if err == nil {
		_, err = io.Copy(io.Discard, c)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// trickle is the clients that close as they should.
func trickle(ctx context.Context) error {
	const every = 200 * time.Millisecond
	for {
		c, err := request(ctx, healthy, mistaken)
		if err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
		if err := wait(ctx, every); err != nil {
			return err
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

const (
	firstWave = time.Second
	waves     = 3
	// overdueAfter is how long fintrace lets a held connection be.
	overdueAfter = demoFinTimeout + track.Grace
	// recoveryTakes is what the closing of the clients is spread over.
	recoveryTakes = 2 * time.Second
)

// script is what the silent clients do, and when.
type script struct {
	demo  *demo
	ctx   context.Context
	began time.Time

	waiting   []*net.TCPConn // until they close in the recovery
	resetting *net.TCPConn
	// given are left for the proxy and the kernel to end; unreferenced, the
	// garbage collector would close them.
	given []*net.TCPConn
}

// step is one thing that happens.
type step struct {
	at time.Duration // since the beginning
	do func() error
}

func (s *script) play() error {
	if err := s.introduce(); err != nil {
		return err
	}
	for _, step := range s.steps() {
		if err := wait(s.ctx, time.Until(s.began.Add(step.at))); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

func (s *script) steps() []step {
	recovery := s.demo.duration - demoTail
	apart := (recovery - firstWave - overdueAfter - time.Second) / waves
	var steps []step
	overdue := firstWave
	for wave := range min(waves, s.demo.clients) {
		at := firstWave + time.Duration(wave)*apart
		overdue = at + overdueAfter
		steps = append(steps,
			step{at, func() error { return s.wave(wave) }},
			step{overdue, func() error { return s.say("wave %d on :443 is past its limit: overdue", wave+1) }})
	}
	steps = append(steps,
		step{(overdue + recovery) / 2, s.reset},
		step{recovery, s.recover},
		step{s.demo.duration, s.leave})
	slices.SortStableFunc(steps, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	return steps
}

func (s *script) introduce() error {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &ns); err != nil {
		return err
	}
	text := fmt.Sprintf(`A pile-up for %s in network namespace %d, gone with this command (Ctrl-C).
Clients %s (silent), %s (mixed) and %s (healthy, not shown) ask demo-proxy,
which asks demo-backend %s and passes its answer and its end on. Then, on port
`, s.demo.duration, ns.Ino, silent, mixed, healthy, demoBackend)
	for _, f := range demoFrontends {
		text += fmt.Sprintf("  %-5d %s\n", f.port, f.about)
	}
	text += fmt.Sprintf(`net.ipv4.tcp_fin_timeout is %s in there, not 60s, so that limits pass quickly.
Watch it from another terminal, as root:
  %[2]s trace
  %[2]s list --group-by peer,port,process,stage
  nsenter -t %[3]d -n ss -tano state fin-wait-2

`, demoFinTimeout, os.Args[0], os.Getpid())
	_, err := io.WriteString(os.Stdout, text)
	return err
}

// share is how many of the silent clients come with a wave, with the first not none.
func (s *script) share(wave int) int {
	upTo := func(wave int) int { return (s.demo.clients*wave + waves - 1) / waves }
	return upTo(wave+1) - upTo(wave)
}

// wave opens connections that stay.
func (s *script) wave(wave int) error {
	for range s.share(wave) {
		c, err := request(s.ctx, silent, mistaken)
		if err != nil {
			return err
		}
		s.waiting = append(s.waiting, c)
	}
	for _, port := range []uint16{cured, closing, closing} {
		c, err := request(s.ctx, mixed, port)
		if err != nil {
			return err
		}
		s.given = append(s.given, c)
	}
	also := ""
	if wave == 0 {
		var err error
		if s.resetting, err = request(s.ctx, mixed, mistaken); err != nil {
			return err
		}
		also = ", 1 to :443"
	}
	return s.say("wave %d, silent after the answer: %d from %s to :443; from %s 1 to :8443, 2 to :80%s",
		wave+1, s.share(wave), silent, mixed, also)
}

// reset makes a client give up without another word.
func (s *script) reset() error {
	if err := s.resetting.SetLinger(0); err != nil {
		return err
	}
	if err := s.resetting.Close(); err != nil {
		return err
	}
	return s.say("%s resets its connection to :443: closed by peer_reset", mixed)
}

// recover makes the silent clients close at last.
func (s *script) recover() error {
	if err := s.say("recovery, %s closes its connections at last: closed by peer_fin", silent); err != nil {
		return err
	}
	for _, c := range s.waiting {
		if err := c.Close(); err != nil {
			return err
		}
		if err := wait(s.ctx, recoveryTakes/time.Duration(len(s.waiting))); err != nil {
			return err
		}
	}
	return nil
}

// leave is at the end, when those left have been ended.
func (s *script) leave() error {
	for _, c := range s.given {
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

// say prints a line of the story, with the time since the beginning.
func (s *script) say(format string, args ...any) error {
	at := time.Since(s.began).Round(time.Second)
	_, err := fmt.Printf("%2d:%02d  %s\n", at/time.Minute, at%time.Minute/time.Second, fmt.Sprintf(format, args...))
	return err
}
