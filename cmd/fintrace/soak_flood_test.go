// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

const (
	// soakWorkers is more than the processors, so that none ever waits for a peer.
	soakWorkers = 4
	// heldFor and closedFor are how long connections get stuck: beyond the limit
	// of a second and the grace; and beyond the snapshot that shows the second
	// sort, within ten seconds and as long as it takes.
	heldFor, closedFor = 5 * time.Second, 45 * time.Second
	// perPeer of them come from one peer, so that it has alerts of its own.
	perPeer = 16 // half of them at either end
)

// soakNamespace is a namespace in which very many addresses are its own.
func soakNamespace(t *testing.T) *kerneltest.Namespace {
	t.Helper()
	ns := kerneltest.NewNamespace(t)
	ns.Sysctl(t, "net.ipv6.ip_nonlocal_bind", "1")
	for name, value := range map[string]string{
		"net.ipv4.ip_local_port_range": "1024 65535",
		"net.ipv4.tcp_max_tw_buckets":  "2000000",
	} {
		ns.Sysctl(t, name, value)
	}
	for _, route := range [][]string{{"-4", "10.0.0.0/8"}, {"-6", "fd00::/8"}} {
		out, err := exec.Command("nsenter", "--net="+ns.Path(), "ip", route[0], "route", "add", "local", route[1], "dev", "lo").CombinedOutput()
		if err != nil {
			t.Fatalf("ip route: %v: %s", err, out)
		}
	}
	return ns
}

// soaked is what a load has done.
type soaked struct {
	churn
	peers int
}

// soakFlood is a load that can be switched on and off.
type soakFlood struct {
	ports []int
	on    atomic.Bool
	made  atomic.Int64 // connections of which both ends are closed
	wait  func() soaked
}

// startFlood makes connections in a namespace while it is on, until stop is closed.
func startFlood(t *testing.T, ns *kerneltest.Namespace, stop <-chan struct{}) *soakFlood {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// Three for each pair of a held and a closed one; half is for all else.
	stuck := min(int(limit.Cur)/2/3/soakWorkers, 2000)
	run := &soakFlood{}
	results := make(chan soaked, soakWorkers)
	for id := range soakWorkers {
		w := &soakWorker{flood: run, id: byte(id), most: stuck}
		var err error
		ns.Do(func() { err = w.listen() })
		if err != nil {
			t.Fatal(err)
		}
		run.ports = append(run.ports, w.port)
		go ns.Do(func() {
			w.done.failed = errors.Join(w.done.failed, w.run(stop))
			results <- w.done
		})
	}
	run.wait = func() (total soaked) {
		for range soakWorkers {
			w := <-results
			total.peers += w.peers
			total.failed = errors.Join(total.failed, w.failed)
		}
		total.made = int(run.made.Load())
		return total
	}
	return run
}

// unseen is a series that this load must make and that is not there yet.
func (r *soakFlood) unseen(s soakScrape) string {
	seen := slices.Collect(maps.Keys(s.series))
	for _, port := range r.ports {
		for _, side := range []events.Side{events.Inbound, events.Outbound} {
			for stage, limit := range map[events.Stage]string{events.Held: "held", events.Minisock: "closed"} {
				want := []string{"fintrace_overdue_connections{", fmt.Sprintf(`port="%d"`, port), fmt.Sprintf("side=%q", side), fmt.Sprintf("stage=%q", stage), limit}
				if !slices.ContainsFunc(seen, func(series string) bool {
					return !slices.ContainsFunc(want, func(part string) bool { return !strings.Contains(series, part) })
				}) {
					return fmt.Sprint(want)
				}
			}
		}
	}
	return ""
}

var portLabel = regexp.MustCompile(`[{,](port|haproxy|netns)="([^"]*)"`)

// own says whether a series is of this load or of the daemon itself, and not of
// what else runs on this host.
func (r *soakFlood) own(series string) bool {
	m := portLabel.FindStringSubmatch(series)
	if m == nil {
		return true
	}
	port, err := strconv.Atoi(m[2])
	return m[1] == "port" && err == nil && slices.Contains(r.ports, port)
}

// soakWorker is one thread that is both ends of its connections, each of which
// comes from an address that has not been there, and goes to the same.
type soakWorker struct {
	flood    *soakFlood
	id       byte
	most     int // stuck ones of either sort
	listener int
	port     int
	n        int // of the next peer

	held, closed stuckPairs
	done         soaked
}

// stuckPairs are the connections that are stuck in one way, oldest first.
type stuckPairs struct {
	pairs []stuckPair
	peer  unix.Sockaddr // of the next
	left  int           // that this peer has yet to make
}

// stuckPair is a connection that gets stuck; where the first end is closed it is -1.
type stuckPair struct {
	first, second int
	until         time.Time
}

func (w *soakWorker) family() int {
	if w.id%2 == 1 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// listen is to be called in the namespace.
func (w *soakWorker) listen() (err error) {
	if w.listener, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{}
	if w.family() == unix.AF_INET6 {
		to = &unix.SockaddrInet6{}
	}
	if err := errors.Join(unix.Bind(w.listener, to), unix.Listen(w.listener, 128)); err != nil {
		return err
	}
	bound, err := unix.Getsockname(w.listener)
	if err == nil {
		w.port = int(endpoint(bound).Port)
	}
	return err
}

// next is an address of a peer that has not been there, with a port. With IPv6
// each has a network of its own, of which there are no more than networks: Linux
// remembers each address on lo as a neighbour, and stalls with a million.
func (w *soakWorker) next() unix.Sockaddr {
	w.n++
	if w.family() == unix.AF_INET || w.n <= networks {
		w.done.peers++
	}
	if w.family() == unix.AF_INET {
		// Of 10/8, a quarter for each worker.
		n := w.n%(1<<22) | int(w.id)<<22
		return &unix.SockaddrInet4{Addr: [4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}}
	}
	n := w.n % networks
	return &unix.SockaddrInet6{Addr: [16]byte{0: 0xfd, 1: w.id, 6: byte(n >> 8), 7: byte(n), 15: 1}}
}

// networks are those of a worker's peers with IPv6.
const networks = 1 << 16

// withPort is the same address with another port.
func withPort(sa unix.Sockaddr, port int) unix.Sockaddr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &unix.SockaddrInet4{Addr: sa.Addr, Port: port}
	case *unix.SockaddrInet6:
		return &unix.SockaddrInet6{Addr: sa.Addr, Port: port}
	}
	return nil
}

func (w *soakWorker) run(stop <-chan struct{}) error {
	defer unix.Close(w.listener)
	defer func() {
		w.release(&w.held, time.Time{})
		w.release(&w.closed, time.Time{})
	}()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		on := w.flood.on.Load()
		if !on || n%64 == 0 {
			now := time.Now()
			w.release(&w.held, now)
			w.release(&w.closed, now)
		}
		if !on {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err := w.one(n); err != nil {
			return err
		}
	}
}

// one makes a connection. Most close as healthy ones do, either end first; of
// each hundred some are half-closed first, and some get stuck if not enough are.
func (w *soakWorker) one(n int) error {
	kind := n / 2 % 50
	var stuck *stuckPairs
	switch {
	case kind == 7 && len(w.held.pairs) < w.most:
		stuck = &w.held
	case kind == 11 && len(w.closed.pairs) < w.most:
		stuck = &w.closed
	}
	var peer unix.Sockaddr
	if stuck == nil {
		peer = w.next()
	} else {
		if stuck.left == 0 {
			stuck.peer, stuck.left = w.next(), perPeer
		}
		stuck.left--
		peer = stuck.peer
	}
	client, server, err := w.connect(peer)
	if err != nil {
		return err
	}
	first, second := client, server
	if n%2 == 0 {
		first, second = server, client
	}
	switch {
	case stuck == &w.held:
		stuck.pairs = append(stuck.pairs, stuckPair{first, second, time.Now().Add(heldFor)})
		return unix.Shutdown(first, unix.SHUT_WR)
	case stuck == &w.closed:
		stuck.pairs = append(stuck.pairs, stuckPair{-1, second, time.Now().Add(closedFor)})
		return unix.Close(first)
	case kind < 3:
		err = errors.Join(unix.Shutdown(first, unix.SHUT_WR), awaitFIN(second), unix.Close(second), unix.Close(first))
	default:
		err = errors.Join(unix.Close(first), awaitFIN(second), unix.Close(second))
	}
	w.flood.made.Add(1)
	return err
}

func (w *soakWorker) connect(peer unix.Sockaddr) (client, server int, err error) {
	if client, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return 0, 0, err
	}
	// The port is chosen by connect, for that destination alone.
	err = errors.Join(unix.SetsockoptInt(client, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.Bind(client, peer), unix.Connect(client, withPort(peer, w.port)))
	if err == nil {
		server, _, err = unix.Accept4(w.listener, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		return 0, 0, errors.Join(err, unix.Close(client))
	}
	return client, server, nil
}

// release ends those that have been stuck for long enough; with no time, all.
func (w *soakWorker) release(stuck *stuckPairs, now time.Time) {
	for len(stuck.pairs) > 0 && (now.IsZero() || !stuck.pairs[0].until.After(now)) {
		p := stuck.pairs[0]
		stuck.pairs = stuck.pairs[1:]
		unix.Close(p.second)
		if p.first >= 0 {
			unix.Close(p.first)
		}
		w.flood.made.Add(1)
	}
}
