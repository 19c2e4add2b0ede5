// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
)

// TestSnapshotLate has a walk of the sockets held up for longer than the age of
// the ends that it is asked for: it shows them all the same.
func TestSnapshotLate(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	quickACK(t, ns)
	p, err := probe.Open(probe.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Attach(); err != nil {
		t.Fatal(err)
	}
	// Some times as many as one read of the walk returns.
	const n = 1500
	var pairs []*pair
	for range n {
		p := connect(t, ns, events.Inbound, ipv4)
		p.close()
		pairs = append(pairs, p)
	}
	for _, p := range pairs {
		p.closeFD(&p.peer)
	}
	ended := 0
	const since = 2 * time.Second
	_, err = p.Snapshot(since, func(sockets []events.Socket) {
		for _, s := range sockets {
			if s.Netns != ns.Inode || s.State != events.TimeWait {
				continue
			}
			if ended == 0 {
				pause(since + since/2)
			}
			ended++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// The kernel may skip an event of some of them.
	if ended < n-n/100 {
		t.Errorf("%d of %d ends are shown", ended, n)
	}
}
