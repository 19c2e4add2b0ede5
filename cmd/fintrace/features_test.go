// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

// TestFeatures holds what is said of this kernel against what is seen of it.
func TestFeatures(t *testing.T) {
	kerneltest.Require(t)
	there := map[string]bool{}
	for _, f := range probe.Features() {
		if f.Err != nil {
			t.Errorf("%s: %v", f.Name, f.Err)
		}
		there[f.Name] = f.There
	}
	ns := kerneltest.NewNamespace(t)
	p := connect(t, ns, events.Inbound, ipv4)
	p.close()
	r := record(t, probe.Options{}, limits.Rules{})
	found := r.await(t, ns.Inode, p.flow, track.Opened, time.Second).Conn
	if is := events.IsCookie(found.Cookie); is != there["socket cookie in tracing programs"] {
		t.Errorf("a connection is known by %x, its cookie: %v", found.Cookie, is)
	}
	if found.SinceExact != there["entry stamp of minisocks"] {
		t.Errorf("the beginning of a minisock is exact: %v", found.SinceExact)
	}
	for _, needed := range []string{"types of the kernel (BTF)", "tracing programs", "ring buffer"} {
		if !there[needed] {
			t.Errorf("%s: it runs without", needed)
		}
	}
}
