// SPDX-License-Identifier: Apache-2.0

package probe_test

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
)

// Anybody can read the sysctls of their own namespace: those that are there.
func TestSysctlsOwn(t *testing.T) {
	own, err := probe.OwnNetns()
	if err != nil {
		t.Fatal(err)
	}
	for _, inode := range []uint32{0, own} {
		got, err := new(probe.Lookup).Sysctls(inode)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range events.SysctlNames() {
			text, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
			value, known := got[name]
			switch {
			case name == events.SysctlConntrackCount:
				// It changes while we look.
			case err == nil && strings.TrimSpace(string(text)) != strconv.Itoa(value):
				t.Errorf("%s is %s, not %d (%v)", name, text, value, known)
			case os.IsNotExist(err) && known && name != events.SysctlMaxOrphans:
				t.Errorf("%s is not there, and not %d", name, value)
			}
		}
	}
}

func TestSysctlsElsewhere(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	ns.Sysctl(t, events.SysctlFinTimeout, "65")
	ns.Sysctl(t, events.SysctlMaxTWBuckets, "1234")
	before, err := probe.OwnNetns()
	if err != nil {
		t.Fatal(err)
	}
	got, err := new(probe.Lookup).Sysctls(ns.Inode)
	if err != nil {
		t.Fatal(err)
	}
	if got[events.SysctlFinTimeout] != 65 || got[events.SysctlMaxTWBuckets] != 1234 {
		t.Errorf("not those of the namespace: %v", got)
	}
	// There is one for the host, which this namespace does not show.
	own, err := new(probe.Lookup).Sysctls(0)
	if err != nil {
		t.Fatal(err)
	}
	if n := got[events.SysctlMaxOrphans]; n == 0 || n != own[events.SysctlMaxOrphans] {
		t.Errorf("tcp_max_orphans is %d there and %d here", n, own[events.SysctlMaxOrphans])
	}
	if after, err := probe.OwnNetns(); err != nil || after != before {
		t.Errorf("the namespace was %d and is %d (%v)", before, after, err)
	}
}

func TestSysctlsNowhere(t *testing.T) {
	if _, err := new(probe.Lookup).Sysctls(1); err == nil || !strings.Contains(err.Error(), "network namespace 1: ") {
		t.Errorf("no such namespace, and the error is %v", err)
	}
}
