// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// TestCrowdedBucket has very many listeners at one port, which are in one bucket: a
// snapshot shows each.
func TestCrowdedBucket(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	const n = 1900
	ns.Do(func() {
		for range n {
			fd, _ := newSocket(t)
			t.Cleanup(func() { unix.Close(fd) })
			if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.Bind(fd, &unix.SockaddrInet4{Port: 8080}), unix.Listen(fd, 1)); err != nil {
				t.Fatal(err)
			}
		}
	})
	p, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	found := 0
	cov, err := p.Snapshot(func(func(uint64)) {}, func(sockets []events.Socket) {
		for _, s := range sockets {
			if s.Netns == ns.Inode && s.State == events.Listen {
				found++
			}
		}
	})
	if err != nil || len(cov.Skipped) > 0 {
		t.Fatalf("not looked at: %v %v", err, cov.Skipped)
	}
	if found != n {
		t.Errorf("%d listeners are shown, want %d", found, n)
	}
}
