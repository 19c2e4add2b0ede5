// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

var jiffiesWrap = flag.Bool("jiffies.wrap", false, "wait for the wrap of the jiffies, five minutes after the boot")

// TestJiffiesWrap is about connections that are there while the lower half of the
// kernel's jiffies wraps. So that such bugs show it starts five minutes short of
// it (INITIAL_JIFFIES, include/linux/jiffies.h), and once in 49 days it is so
// again where CONFIG_HZ is 1000.
func TestJiffiesWrap(t *testing.T) {
	kerneltest.Require(t)
	if !*jiffiesWrap {
		t.Skip("not run: the jiffies wrap five minutes after the boot: make test-kernels")
	}
	const before = 3 * time.Second
	left := untilWrap(t)
	if left < before+2*time.Second {
		t.Fatalf("the jiffies wrap in %s: it is too late", left)
	}
	r := record(t, probe.Options{Instants: true}, limits.Rules{})
	made := func(seconds int, timestamps string, end func(*pair)) *pair {
		ns := kerneltest.NewNamespace(t)
		quickACK(t, ns)
		finTimeout(t, ns, seconds)
		ns.Sysctl(t, "net.ipv4.tcp_timestamps", timestamps)
		p := connect(t, ns, events.Inbound, ipv4)
		end(p)
		return p
	}
	pause(untilWrap(t) - before)
	var (
		held     = made(60, "1", (*pair).shutdown)
		minisock = made(60, "1", (*pair).close)
		plain    = made(60, "0", (*pair).close) // Its timer dates the peer's FIN.
		timed    = made(5, "1", (*pair).close)
		orphan   = made(70, "1", (*pair).close)
		closing  = made(5, "1", (*pair).shutdown)
	)
	if left := untilWrap(t); left < 0 {
		t.Fatalf("the jiffies wrapped %s ago, while the connections were made", -left)
	}
	pause(untilWrap(t) + time.Second)

	// As one who comes now finds them.
	for _, p := range []*pair{held, minisock, plain, orphan} {
		filter := &track.Filter{Match: limits.Match{Netns: []uint32{p.ns.Inode}}}
		found, err := listConnections(t.Context(), limits.Rules{}, &haproxies{}, filter.Selects, func(err error) { t.Log("not looked at:", err) })
		if err != nil || found.Len() != 1 {
			t.Fatalf("%d connections are listed: %v", found.Len(), err)
		}
		conns := copies(found.All())
		began := conns[0].Since
		if began < p.entry().before.Add(-exact) || began > p.entry().after.Add(exact+p.entry().lag) {
			t.Errorf("%+v\nis listed to have begun %s after the call that made it so, which took %s", conns[0], began.Sub(p.entry().before),
				p.entry().after.Sub(p.entry().before))
		}
	}

	const default60 = "net.ipv4.tcp_fin_timeout 60s"
	ends := map[*pair]moment{}
	for _, p := range []*pair{held, minisock, plain} {
		ends[p] = at(func() { p.closeFD(&p.peer) })
	}
	closing.close()
	held.check(r, events.Inbound, soon, want{end: events.PeerFIN, held: ends[held].since(held.shut), limit: time.Minute,
		source: default60, closedBy: events.ByShutdown})
	for _, p := range []*pair{minisock, plain} {
		p.check(r, events.Inbound, soon, want{end: events.PeerFIN, minisock: ends[p].since(p.closed), limit: time.Minute,
			source: default60, closedBy: events.ByClose})
	}
	timed.check(r, events.Inbound, soon, want{end: events.KernelTimeout, minisock: about(5 * time.Second),
		limit: 5 * time.Second, source: "net.ipv4.tcp_fin_timeout 5s", closedBy: events.ByClose})
	orphan.check(r, events.Inbound, soon, want{end: events.KernelTimeout, orphaned: about(10 * time.Second), minisock: about(10 * time.Second),
		limit: 20 * time.Second, source: "net.ipv4.tcp_fin_timeout 70s: 2 × (70s − 60s)", closedBy: events.ByClose})
	closing.check(r, events.Inbound, soon, want{end: events.KernelTimeout, held: closing.closed.since(closing.shut), minisock: about(5 * time.Second),
		limit: 5 * time.Second, source: "net.ipv4.tcp_fin_timeout 5s", closedBy: events.ByClose})
}

// untilWrap is how long it is until the jiffies are a multiple of 2^32; negative
// for the time since.
func untilWrap(t *testing.T) time.Duration {
	t.Helper()
	text, err := os.ReadFile("/proc/timer_list")
	if err != nil {
		t.Fatal(err)
	}
	var resolution unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &resolution); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var jiffies uint64
		if n, _ := fmt.Sscanf(line, "jiffies: %d", &jiffies); n == 1 {
			return -time.Duration(int32(jiffies)) * time.Duration(resolution.Nano())
		}
	}
	t.Fatal("/proc/timer_list does not have the jiffies")
	return 0
}
