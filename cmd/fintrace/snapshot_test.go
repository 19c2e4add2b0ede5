// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
)

// everyWay runs a test with both ways to look at the sockets.
func everyWay(t *testing.T, test func(t *testing.T, opts probe.Options)) {
	kerneltest.Require(t)
	for name, opts := range map[string]probe.Options{"walk": {}, "plain": {Plain: true}} {
		t.Run(name, func(t *testing.T) { test(t, opts) })
	}
}

// TestSnapshotLate has a look at the sockets held up for longer than it was since
// the last: it shows all ends that came since then all the same.
func TestSnapshotLate(t *testing.T) {
	everyWay(t, func(t *testing.T, opts probe.Options) {
		ns := kerneltest.NewNamespace(t)
		quickACK(t, ns)
		p, err := probe.Open(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if err := p.Attach(); err != nil {
			t.Fatal(err)
		}
		nothing := func(func(uint64)) {}
		if _, err := p.Snapshot(nothing, func([]events.Socket) {}); err != nil {
			t.Fatal(err)
		}
		// Some times as many as one batch of rows has.
		const n = 5000
		var pairs []*pair
		for range n {
			p := connect(t, ns, events.Inbound, ipv4)
			p.close()
			pairs = append(pairs, p)
		}
		var sent []uint64
		if _, err := p.Drain(func(ev *events.Event) {
			if ev.Netns == ns.Inode && ev.New == events.Close {
				sent = append(sent, ev.Cookie)
			}
		}); err != nil {
			t.Fatal(err)
		}
		for _, p := range pairs {
			p.closeFD(&p.peer)
		}
		known := func(show func(uint64)) {
			for _, cookie := range sent {
				show(cookie)
			}
		}
		ended := map[uint64]bool{}
		if _, err = p.Snapshot(known, func(sockets []events.Socket) {
			for _, s := range sockets {
				if s.Netns != ns.Inode || s.State != events.TimeWait {
					continue
				}
				if len(ended) == 0 {
					pause(3 * time.Second)
				}
				ended[s.Cookie] = true
			}
		}); err != nil {
			t.Fatal(err)
		}
		// The kernel may skip an event of some of them.
		if len(sent) < n-n/100 {
			t.Errorf("%d of %d handovers were sent", len(sent), n)
		}
		for _, cookie := range sent {
			if !ended[cookie] {
				t.Errorf("the end of %x is not shown", cookie)
			}
		}
	})
}

// TestReady: one who has records to read is left alone by those that follow, until a
// CPU has sent so many that the ring buffer might not hold them for long.
func TestReady(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	quickACK(t, ns) // Else the handovers come 40 ms later.
	p, err := probe.Open(probe.Options{EveryHandover: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Attach(); err != nil {
		t.Fatal(err)
	}
	handover := func() { connect(t, ns, events.Inbound, ipv4).close() }
	woken := func(within time.Duration) bool {
		select {
		case <-p.Ready():
			return true
		case <-time.After(within):
			return false
		}
	}
	// The kernel skips some while another program is detached.
	for some, tries := false, 0; !some; tries++ {
		if tries == 100 {
			t.Fatal("there is no record to read")
		}
		handover()
		woken(100 * time.Millisecond)
		if some, err = p.Drain(func(*events.Event) {}); err != nil {
			t.Fatal(err)
		}
	}
	made, most := 0, 600*runtime.NumCPU()
	for ; made < most && !woken(0); made++ {
		handover()
	}
	if made == most && !woken(soon) {
		t.Fatalf("not woken by %d more", made)
	}
	if made < 100 { // the host may have some of its own
		t.Errorf("woken by %d more", made)
	}
}
