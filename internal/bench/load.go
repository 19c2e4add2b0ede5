// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The kinds of load. Of the first three it is how they close their connections:
// the client closes first.
const (
	// healthy: the peer closes at once, and its FIN carries the ACK of ours.
	healthy = "healthy"
	// waiting: the peer acknowledges at once and closes peerDelay later; the
	// connection is a minisock in FIN_WAIT2 meanwhile.
	waiting = "waiting"
	// mixed: one of each in turn.
	mixed = "mixed"
	// https is requests to a real HAProxy: see beginProxied.
	https = "https"
)

const (
	peerDelay = 5 * time.Millisecond
	port      = 7777
)

// A load is connections over loopback, made and closed by some threads per CPU in
// a network namespace of its own. It ends by count or by time, whichever is first.
type load struct {
	Kind        string
	Connections int
	Duration    time.Duration
	Rate        int  // connections per second; 0: as many as go
	Latency     bool // measure each
}

type loaded struct {
	Connections int
	Took        time.Duration
	// P99 is of each connection's time from connect() to its last close(), without
	// what the peer waits; 0: not measured.
	P99 time.Duration
}

func (l loaded) perSecond() float64 { return float64(l.Connections) / l.Took.Seconds() }

// A life is a connection's.
type life struct {
	end  uint32 // µs, since the load began
	took uint32 // ns
}

func lifeOf(start, began time.Time) life {
	now := time.Now()
	return life{uint32(now.Sub(start).Microseconds()), uint32(min(now.Sub(began), math.MaxUint32))}
}

// work is what one thread has done of a load.
type work struct {
	made  int
	lives []life // the earliest end first; nil: not measured
}

// A running load.
type running struct {
	start   time.Time
	threads int
	done    chan done
	stop    func() error
}

type done struct {
	work
	err error
}

// begin makes room in the namespace of this process, which is its own, and begins.
func (l load) begin() (*running, error) {
	if err := prepareNamespace(); err != nil {
		return nil, err
	}
	if l.Kind == https {
		return l.beginProxied()
	}
	threads := runtime.NumCPU()
	r := &running{start: time.Now(), threads: threads, done: make(chan done, threads), stop: func() error { return nil }}
	for n := range threads {
		w := worker{
			load:        l,
			number:      n,
			connections: (l.Connections + n) / threads,
			start:       r.start,
		}
		if l.Rate > 0 {
			w.interval = time.Duration(threads) * time.Second / time.Duration(l.Rate)
		}
		go func() {
			err := w.run()
			r.done <- done{w.work, err}
		}()
	}
	return r, nil
}

// end waits until the load has ended.
func (r *running) end() (all []work, took time.Duration, err error) {
	for range r.threads {
		d := <-r.done
		took = time.Since(r.start)
		all = append(all, d.work)
		err = errors.Join(err, d.err)
	}
	return all, took, errors.Join(err, r.stop())
}

// runLoad is the part of the program that makes the load.
func runLoad(l load) (loaded, error) {
	r, err := l.begin()
	if err != nil {
		return loaded{}, err
	}
	all, took, err := r.end()
	sum := loaded{Took: took}
	var latencies []float64
	for _, w := range all {
		sum.Connections += w.made
		for _, life := range w.lives {
			latencies = append(latencies, float64(life.took))
		}
	}
	if l.Latency && err == nil {
		sum.P99 = time.Duration(quantile(latencies, 0.99))
	}
	return sum, err
}

// prepareNamespace makes room in the namespace of this process, which is its own.
func prepareNamespace() error {
	for file, value := range map[string]string{
		"/proc/sys/net/ipv4/ip_local_port_range": "10000 65535", // above our own ports
		// TIME_WAIT lasts for 60 s; nothing is to be cut short meanwhile.
		"/proc/sys/net/ipv4/tcp_max_tw_buckets": "4000000",
		"/proc/sys/net/core/somaxconn":          "4096",
	} {
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return fmt.Errorf("prepare the network namespace: %w", err)
		}
	}
	return bringUpLoopback()
}

func bringUpLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// A connector makes connections, both ends of them. Each goes to another
// address of 127/8, so that port pairs do not run out.
type connector struct {
	listener int
	to       unix.SockaddrInet4
	made     int
}

func newConnector(number int) (*connector, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrInet4{Port: port + number}),
		unix.Listen(fd, 4096),
	); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), unix.Close(fd))
	}
	return &connector{
		listener: fd,
		to:       unix.SockaddrInet4{Port: port + number, Addr: [4]byte{127, byte(1 + number)}},
	}, nil
}

// connect returns both ends. Loopback delivers within the call, so accept finds
// the connection that connect has just made.
func (c *connector) connect() (client, server int, err error) {
	client, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("socket: %w", err)
	}
	c.made++
	c.to.Addr[2], c.to.Addr[3] = byte(c.made>>8), byte(c.made)
	for err = unix.EINTR; err == unix.EINTR; {
		err = unix.Connect(client, &c.to)
	}
	if err != nil {
		return 0, 0, errors.Join(fmt.Errorf("connect: %w", err), unix.Close(client))
	}
	for {
		// unix.Accept4 makes garbage of each peer's address.
		fd, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(c.listener), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, 0, errors.Join(fmt.Errorf("accept: %w", errno), unix.Close(client))
		}
		return client, int(fd), nil
	}
}

func (c *connector) close() error { return unix.Close(c.listener) }

// acknowledge sends the ACK of the peer's FIN now, which is else delayed: only
// the ACK of what has been read can be had at once.
func acknowledge(fd int) error {
	if n, err := unix.Read(fd, make([]byte, 1)); err != nil || n != 0 {
		return fmt.Errorf("the peer's FIN is not there: %d bytes, error %v", n, err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1); err != nil {
		return fmt.Errorf("TCP_QUICKACK: %w", err)
	}
	return nil
}

type worker struct {
	load        load
	number      int
	connections int
	start       time.Time
	interval    time.Duration // between connections; 0: none

	silent []silentPeer // the oldest first
	work
}

// A silentPeer has had our FIN and has yet to send its own.
type silentPeer struct {
	fd    int
	until time.Duration
}

func (w *worker) run() (err error) {
	runtime.LockOSThread()
	c, err := newConnector(w.number)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.closePeers(w.load.Duration+peerDelay), c.close()) }()
	for w.made < w.connections {
		now := time.Since(w.start)
		if now >= w.load.Duration {
			break
		}
		if err := w.closePeers(now); err != nil {
			return err
		}
		if due := time.Duration(w.made) * w.interval; due > now {
			// Not each by itself: a millisecond's worth at a time.
			time.Sleep(max(due-now, time.Millisecond))
			continue
		}
		began := time.Now()
		client, server, err := c.connect()
		if err != nil {
			return err
		}
		w.made++
		if err := unix.Close(client); err != nil {
			return err
		}
		if w.load.Kind == healthy || w.load.Kind == mixed && w.made%2 == 0 {
			if err := unix.Close(server); err != nil {
				return err
			}
		} else {
			if err := acknowledge(server); err != nil {
				return err
			}
			w.silent = append(w.silent, silentPeer{server, now + peerDelay})
		}
		if w.load.Latency {
			w.lives = append(w.lives, lifeOf(w.start, began))
		}
	}
	return nil
}

// closePeers closes the peers that have been silent for long enough.
func (w *worker) closePeers(now time.Duration) error {
	n := 0
	var errs []error
	for n < len(w.silent) && w.silent[n].until <= now {
		errs = append(errs, unix.Close(w.silent[n].fd))
		n++
	}
	w.silent = append(w.silent[:0], w.silent[n:]...)
	return errors.Join(errs...)
}

// cpuName is the processor's name and how many of it there are.
func cpuName() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown CPU"
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return fmt.Sprintf("%d × %s", runtime.NumCPU(), strings.TrimSpace(value))
		}
	}
	return fmt.Sprintf("%d × unknown CPU", runtime.NumCPU())
}
