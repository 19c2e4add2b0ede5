// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
)

// TestBare holds what sock_diag shows of connections in each stage against what
// BPF does.
func TestBare(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	quickACK(t, ns)
	finTimeout(t, ns, 90)
	orphan := connect(t, ns, events.Inbound, ipv4)
	orphan.close()
	finTimeout(t, ns, 50)
	var pairs []*pair
	for _, f := range []family{ipv4, ipv6, v4mapped} {
		held := connect(t, ns, events.Inbound, f)
		held.shutdown()
		minisock := connect(t, ns, events.Outbound, f)
		minisock.close()
		established := connect(t, ns, events.Inbound, f)
		pairs = append(pairs, held, minisock, established)
	}
	pairs = append(pairs, orphan)

	snapshot := func(p *probe.Probe, err error) (sockets []events.Socket) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		nothing := func(func(uint64)) {}
		// It gives cookies to those that have none, and shows the others of their namespace twice.
		if _, err := p.Snapshot(nothing, func([]events.Socket) {}); err != nil {
			t.Fatal(err)
		}
		cov, err := p.Snapshot(nothing, func(some []events.Socket) {
			for _, s := range some {
				if s.Netns == ns.Inode {
					sockets = append(sockets, s)
				}
			}
		})
		if _, covered := cov.Netns[ns.Inode]; err != nil || !covered {
			t.Fatalf("the namespace was not looked at: %v, %q", err, cov.Skipped)
		}
		return sockets
	}
	whole, bare := snapshot(probe.Open(probe.Options{})), snapshot(probe.OpenBare())
	if len(whole) < 7 || len(bare) != len(whole) {
		t.Errorf("%d sockets by sock_diag, %d by BPF", len(bare), len(whole))
	}
	near := func(a, b time.Duration, apart time.Duration) bool { return (a - b).Abs() <= apart+2*tick }
	for _, b := range bare {
		i := slices.IndexFunc(whole, func(w events.Socket) bool {
			return w.Flow == b.Flow && w.State == b.State &&
				(b.State == events.Listen || w.Cookie == b.Cookie || !events.IsCookie(w.Cookie))
		})
		if i < 0 {
			t.Errorf("BPF does not show %+v", b)
			continue
		}
		w, apart := whole[i], b.Time.Sub(whole[i].Time)
		if b.State == events.Listen {
			continue
		}
		if b.Stage != w.Stage || b.Inode != w.Inode || b.HasTimer != w.HasTimer || b.Timers.FinTimeout != w.Timers.FinTimeout ||
			!near(b.Timers.RTO, w.Timers.RTO, 0) ||
			w.Stage != events.Minisock && !near(b.LastAck, w.LastAck, apart) ||
			w.HasTimer && !near(b.Timer, w.Timer, apart) {
			t.Errorf("sock_diag shows\n%+v, BPF\n%+v", b, w)
		}
	}
	for _, p := range pairs {
		p.closeFD(&p.peer)
		p.closeFD(&p.subject)
	}
}
