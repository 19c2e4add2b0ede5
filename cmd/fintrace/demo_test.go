// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
)

func TestDemoFlags(t *testing.T) {
	for _, c := range []struct{ flag, value, want string }{
		{"--clients", "0", "fintrace: --clients is from 1 to 5000\n"},
		{"--clients", "5001", "fintrace: --clients is from 1 to 5000\n"},
		{"--duration", "19s", "fintrace: --duration is at least 20s, for limits to pass in that time\n"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(context.Background(), env{&stdout, &stderr, os.Getenv}, []string{"demo", c.flag, c.value})
		if code != 1 || stdout.Len() > 0 || stderr.String() != c.want {
			t.Errorf("%s %s: exit %d, stdout %q, stderr %q, want 1, nothing, %q",
				c.flag, c.value, code, &stdout, &stderr, c.want)
		}
	}
}

func TestDemoNeedsRoot(t *testing.T) {
	binary := buildFintrace(t)
	cmd := exec.Command(binary, "demo")
	if os.Geteuid() == 0 {
		if err := os.Chmod(filepath.Join(binary, "../.."), 0o755); err != nil { // TempDir's is for its owner.
			t.Fatal(err)
		}
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // How it ended is in ProcessState.
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit %d, want 1", code)
	}
	if stdout.Len() > 0 {
		t.Errorf("stdout: %q", &stdout)
	}
	if said := stderr.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "run as root, for example with sudo") {
		t.Errorf("stderr is not one line that says how: %q", said)
	}
}

// running is a demo that runs.
type running struct {
	cmd    *exec.Cmd
	lines  *bufio.Scanner
	stderr bytes.Buffer
	netns  uint32
	pid    int // of demo-client, which it tells for nsenter
}

// startDemo returns once the first connections are there.
func startDemo(t *testing.T, binary string, args ...string) *running {
	t.Helper()
	d := &running{cmd: exec.Command(binary, append([]string{"demo"}, args...)...)}
	d.cmd.Stderr = &d.stderr
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// What hangs ends the reading, and the test fails for what is missing.
	watchdog := time.AfterFunc(time.Minute, func() { _ = d.cmd.Process.Kill() })
	t.Cleanup(func() {
		watchdog.Stop()
		_ = d.cmd.Process.Kill() // Most have ended.
	})
	d.lines = bufio.NewScanner(stdout)
	netns := regexp.MustCompile(`network namespace (\d+)`)
	nsenter := regexp.MustCompile(`nsenter -t (\d+) -n`)
	for d.lines.Scan() {
		if m := netns.FindStringSubmatch(d.lines.Text()); m != nil {
			inode, err := strconv.ParseUint(m[1], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			d.netns = uint32(inode)
		}
		if m := nsenter.FindStringSubmatch(d.lines.Text()); m != nil {
			if d.pid, err = strconv.Atoi(m[1]); err != nil {
				t.Fatal(err)
			}
		}
		if strings.Contains(d.lines.Text(), "wave 1,") {
			if d.netns == 0 || d.pid == 0 {
				t.Fatalf("it named no namespace (%d) or no process to enter it by (%d)", d.netns, d.pid)
			}
			return d
		}
	}
	t.Fatalf("it ended before its first wave: %v, %s", d.cmd.Wait(), &d.stderr)
	return nil
}

// end reads on to the end and returns the last line.
func (d *running) end() (last string) {
	for d.lines.Scan() {
		last = d.lines.Text()
	}
	_ = d.cmd.Wait() // How it ended is in ProcessState.
	return last
}

// A witness tells when a demo has gone entirely.
type witness struct {
	links   *netlink.Conn  // of a namespace that has one end of a veth, of which the demo's has the other
	members map[string]int // pidfds by name, of the processes in the namespace
}

func (d *running) witness(t *testing.T) *witness {
	t.Helper()
	w := &witness{members: map[string]int{}}
	namespaces, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range namespaces {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || uint32(st.Ino) != d.netns {
			continue
		}
		proc := strings.TrimSuffix(path, "/ns/net")
		comm, err := os.ReadFile(filepath.Join(proc, "comm"))
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		w.members[strings.TrimSpace(string(comm))] = fd
	}

	const linkGroup = 1 // RTMGRP_LINK, include/uapi/linux/rtnetlink.h
	beside := kerneltest.NewNamespace(t)
	ns, err := os.Open(beside.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	w.links, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: linkGroup, NetNS: int(ns.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.links.Close() })
	out, err := exec.Command("nsenter", "--net="+beside.Path(), "ip", "link", "add", "type", "veth",
		"peer", "netns", strconv.Itoa(d.pid)).CombinedOutput()
	if err != nil {
		t.Fatalf("make a veth: %v: %s", err, out)
	}
	return w
}

// awaitGone fails if a process of the demo or its namespace stays.
func (w *witness) awaitGone(t *testing.T) {
	t.Helper()
	// Before the next line that a demo has to say, which nobody may read any more.
	const within = 5 * time.Second
	for name, pidfd := range w.members {
		// Readable once the process has ended: pidfd_open(2).
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(within.Milliseconds()))
		for err == unix.EINTR {
			n, err = unix.Poll(fds, int(within.Milliseconds()))
		}
		if err != nil || n != 1 {
			t.Errorf("%s is still there (%v)", name, err)
		}
	}
	// A veth goes with the namespace of its peer, and that goes with the last
	// process and socket in it.
	if err := w.links.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	for {
		messages, err := w.links.Receive()
		if err != nil {
			t.Fatal("the namespace is still there:", err)
		}
		for _, m := range messages {
			if m.Header.Type == unix.RTM_DELLINK {
				return
			}
		}
	}
}

func TestDemo(t *testing.T) {
	kerneltest.Require(t)
	binary := buildFintrace(t)
	killed := -1 // what ExitCode says of it
	for _, c := range []struct {
		name   string
		do     func(d *running, w *witness) error
		code   int
		stderr string
	}{
		{"interrupt", func(d *running, _ *witness) error { return d.cmd.Process.Signal(os.Interrupt) }, 0, ""},
		{"terminate", func(d *running, _ *witness) error { return d.cmd.Process.Signal(syscall.SIGTERM) }, 0, ""},
		{"kill", func(d *running, _ *witness) error { return d.cmd.Process.Kill() }, killed, ""},
		{"kill the client", killPart("demo-client"), 1, "fintrace: signal: killed\n"},
		{"kill the proxy", killPart("demo-proxy"), 1, "fintrace: demo-proxy: signal: killed\n"},
		{"kill the backend", killPart("demo-backend"), 1, "fintrace: demo-backend: signal: killed\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, binary)
			w := d.witness(t)
			if err := c.do(d, w); err != nil {
				t.Fatal(err)
			}
			d.end()
			if code := d.cmd.ProcessState.ExitCode(); code != c.code {
				t.Errorf("%s, want exit %d", d.cmd.ProcessState, c.code)
			}
			if got := d.stderr.String(); got != c.stderr {
				t.Errorf("stderr: %q, want %q", got, c.stderr)
			}
			w.awaitGone(t)
		})
	}

	r := record(t, probe.Options{}, limits.Rules{})
	for clients, overdue := range map[int]int{1: 1, 5: 3} {
		t.Run(fmt.Sprintf("to the end, clients %d", clients), func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, binary, "--duration", demoShortest.String(), "--clients", strconv.Itoa(clients))
			w := d.witness(t)
			names := slices.Sorted(maps.Keys(w.members))
			if want := []string{"demo-backend", "demo-client", "demo-proxy"}; !slices.Equal(names, want) {
				t.Errorf("in the namespace are %q, want %q", names, want)
			}
			d.awaitTimeouts(t)
			if last := d.end(); !strings.HasPrefix(last, "The demo is over") || !d.cmd.ProcessState.Success() {
				t.Errorf("%s, last line %q", d.cmd.ProcessState, last)
			}
			w.awaitGone(t)
			d.check(t, r, clients, overdue)
		})
	}
}

// awaitTimeouts fails unless the kernel has ended all minisocks before the demo
// ends. It asks ss, because fintrace looks for the ends of minisocks less often
// the busier the host is.
func (d *running) awaitTimeouts(t *testing.T) {
	t.Helper()
	for d.lines.Scan() && !strings.Contains(d.lines.Text(), "recovery,") {
	}
	// Sooner than the clients close these too, at the very end.
	deadline := time.Now().Add(demoTail - 3*time.Second)
	for {
		out, err := exec.Command("nsenter", "-t", strconv.Itoa(d.pid), "-n", "ss", "-Htan", "state", "fin-wait-2",
			"( sport = :80 or sport = :8443 )").CombinedOutput()
		if err == nil && len(out) == 0 {
			return
		}
		if err != nil || time.Now().After(deadline) {
			t.Errorf("minisocks that have not timed out (%v): %s", err, out)
			return
		}
	}
}

// killPart makes the end of a part that nobody asked for.
func killPart(name string) func(*running, *witness) error {
	return func(_ *running, w *witness) error {
		fd, ok := w.members[name]
		if !ok {
			return fmt.Errorf("there is no %s in %v", name, w.members)
		}
		return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// check compares what fintrace has to say of a demo with what the demo promises.
func (d *running) check(t *testing.T, r *recorder, clients, waves int) {
	t.Helper()
	got := map[string]int{}
	r.mu.Lock()
	for i := range r.notices {
		n := &r.notices[i]
		c := &n.Conn
		if c.Netns != d.netns || c.Flow.Local.IP() != demoProxy {
			continue
		}
		text := fmt.Sprintf("%s %s %s :%d by %s %s", n.Kind, c.Side, c.Flow.Remote.IP(), c.Flow.Local.Port, c.Process.Name(), c.Stage)
		switch port := c.Flow.Local.Port; {
		case n.Kind == track.Overdue:
		case n.Kind == track.Closed && port == mistaken && c.Duration >= time.Second:
			text += " " + c.End.String()
			if c.Held < overdueAfter {
				t.Errorf("%s after %s, before its limit passed", text, c.Held)
			}
		case n.Kind == track.Moved && port == cured:
			text += ", held " + c.Held.Round(time.Second).String()
		case n.Kind == track.Opened && port == closing:
		case n.Kind == track.Closed && port != mistaken && c.End != events.KernelTimeout:
			text += " " + c.End.String()
		default:
			continue
		}
		got[text]++
	}
	r.mu.Unlock()
	want := map[string]int{
		"overdue inbound 127.0.0.2 :443 by demo-proxy held":             clients,
		"overdue inbound 127.0.0.4 :443 by demo-proxy held":             1,
		"closed inbound 127.0.0.2 :443 by demo-proxy held peer_fin":     clients,
		"closed inbound 127.0.0.4 :443 by demo-proxy held peer_reset":   1,
		"moved inbound 127.0.0.4 :8443 by demo-proxy minisock, held 3s": waves,
		"opened inbound 127.0.0.4 :80 by demo-proxy minisock":           2 * waves,
	}
	for text := range got {
		if _, ok := want[text]; !ok {
			t.Errorf("%d × %q: nothing of the kind was made", got[text], text)
		}
	}
	// The kernel may skip an event (ARCHITECTURE.md), and the namespace does not
	// outlive the demo for a snapshot to repair what came of it.
	missing := 0
	for text, n := range want {
		if missing += max(n-got[text], 0); got[text] > n || missing > 1 {
			t.Errorf("%d × %q, want %d", got[text], text, n)
		}
	}
}

// A part that is run by hand must leave the settings of the host alone.
func TestDemoPartByHand(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	ns.Sysctl(t, "net.ipv4.tcp_fin_timeout", "17")
	// The shell is in the namespace too, and is the parent.
	out, err := exec.Command("nsenter", "--net="+ns.Path(), "sh", "-c",
		buildFintrace(t)+" demo part client --duration 1s; echo exit $?; cat /proc/sys/net/ipv4/tcp_fin_timeout").Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(out), "exit 1\n17\n"; got != want {
		t.Errorf("it said %q, want %q", got, want)
	}
}

// buildFintrace builds the program. A test binary will not do: what the demo
// runs again is its own executable.
func buildFintrace(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "fintrace")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return binary
}
