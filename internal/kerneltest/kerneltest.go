// SPDX-License-Identifier: Apache-2.0

// Package kerneltest is what tests on the real kernel need: the permission to
// use it, and network namespaces that come and go with the test.
package kerneltest

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// required names the variable that makes a test that cannot use the kernel fail.
const required = "FINTRACE_REQUIRE_KERNEL_TESTS"

// Require skips the test unless it may load BPF programs that need the kernel's
// types; with FINTRACE_REQUIRE_KERNEL_TESTS set it fails instead.
func Require(t testing.TB) {
	t.Helper()
	why := unusable()
	switch {
	case why == "":
	case os.Getenv(required) != "":
		t.Fatalf("%s is set, but %s", required, why)
	default:
		t.Skipf("not run: %s", why)
	}
}

// unusable says why BPF cannot be used, "" if it can.
func unusable() string {
	if os.Geteuid() != 0 {
		return "tests on the kernel need root"
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); errors.Is(err, fs.ErrNotExist) {
		return "the kernel was built without CONFIG_DEBUG_INFO_BTF=y"
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return "BPF cannot be used: " + err.Error()
	}
	m.Close()
	return ""
}

// A Namespace is a network namespace with nothing in it but lo, which is up. A
// process is in it, so it can be found as those of containers are.
type Namespace struct {
	Inode uint32
	t     testing.TB
	pid   int
}

// NewNamespace makes a Namespace that is gone after the test.
func NewNamespace(t testing.TB) *Namespace {
	t.Helper()
	// cat ends with its input, that is with the test's process, however that ends.
	holder := exec.Command("cat")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	input, err := holder.StdinPipe()
	if err != nil {
		t.Fatal("hold a network namespace:", err)
	}
	output, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal("hold a network namespace:", err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal("make a network namespace:", err)
	}
	// Its answer shows that it no longer has copies of the test's descriptors.
	if _, err := input.Write([]byte{0}); err != nil {
		t.Fatal("hold a network namespace:", err)
	}
	if _, err := output.Read(make([]byte, 1)); err != nil {
		t.Fatal("hold a network namespace:", err)
	}
	t.Cleanup(func() {
		input.Close()
		if err := holder.Wait(); err != nil {
			t.Error("leave the network namespace:", err)
		}
	})
	n := &Namespace{t: t, pid: holder.Process.Pid}
	var st unix.Stat_t
	if err := unix.Stat(n.Path(), &st); err != nil {
		t.Fatal("find the network namespace:", err)
	}
	n.Inode = uint32(st.Ino)
	n.Do(func() {
		if err := loopbackUp(); err != nil {
			t.Fatal("set lo up:", err)
		}
	})
	return n
}

// Path is a file that enters the namespace.
func (n *Namespace) Path() string {
	return filepath.Join("/proc", strconv.Itoa(n.pid), "ns/net")
}

// Do runs fn in the namespace, on the caller's goroutine. Goroutines that fn
// starts are not in it; sockets stay in it wherever they are used later.
func (n *Namespace) Do(fn func()) {
	n.t.Helper()
	there, err := os.Open(n.Path())
	if err != nil {
		n.t.Fatal("enter the network namespace:", err)
	}
	defer there.Close()
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		n.t.Fatal("remember the own network namespace:", err)
	}
	defer back.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		n.t.Fatal("enter the network namespace:", err)
	}
	defer func() {
		// The thread stays locked on failure, so that nothing else runs in there.
		if err := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); err != nil {
			n.t.Fatal("leave the network namespace:", err)
		}
		runtime.UnlockOSThread()
	}()
	fn()
}

// Sysctl sets a value below net, such as net.ipv4.tcp_fin_timeout, in the namespace.
func (n *Namespace) Sysctl(t testing.TB, name, value string) {
	t.Helper()
	path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
	n.Do(func() {
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			t.Fatal("set the sysctl:", err)
		}
	})
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}
