// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// TestScript runs what needs no kernel; see testscript for the language.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"fails": fails, "exits": exits},
	})
}

// TestKernelScript runs what looks at real sockets: those of $NETNS, a namespace
// that each script has for itself.
func TestKernelScript(t *testing.T) {
	kerneltest.Require(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/kernel",
		Setup: func(e *testscript.Env) error {
			ns := kerneltest.NewNamespace(e.T().(testing.TB))
			e.Values[namespaceKey{}] = ns
			e.Setenv("NETNS", strconv.FormatUint(uint64(ns.Inode), 10))
			e.Setenv("NETNS_PATH", ns.Path())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
			"fails": fails,
			"fits":  fits,
			"hold": func(ts *testscript.TestScript, neg bool, args []string) {
				n, err := strconv.Atoi(strings.Join(args, " "))
				if neg || err != nil {
					ts.Fatalf("usage: hold connections")
				}
				ts.Value(namespaceKey{}).(*kerneltest.Namespace).Do(func() {
					l, err := heldListener()
					ts.Check(err)
					defer l.Close()
					for range n {
						c, err := connectTo(l)
						ts.Check(err)
						ts.Defer(c.close)
						ts.Check(c.shutdown())
					}
				})
			},
		},
	})
}

type namespaceKey struct{}

// fails runs a program that has to end with exit code 1, nothing on stdout and
// one line of fintrace's on stderr.
func fails(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: fails program [args...]")
	}
	err := ts.Exec(args[0], args[1:]...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("want exit code 1, got: %v", err)
	}
	if out := ts.ReadFile("stdout"); out != "" {
		ts.Fatalf("stdout is not empty")
	}
	if text := ts.ReadFile("stderr"); !regexp.MustCompile(`^fintrace: .+\n$`).MatchString(text) {
		ts.Fatalf("stderr is not one line of fintrace's")
	}
}

// exits runs a program that has to end with an exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code program [args...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// fits checks that the lines about IPv4 connections fit a terminal.
func fits(ts *testscript.TestScript, neg bool, args []string) {
	width, err := strconv.Atoi(strings.Join(args, " "))
	if neg || err != nil {
		ts.Fatalf("usage: fits columns")
	}
	if err := checkWidth(ts.ReadFile("stdout"), width); err != nil {
		ts.Fatalf("%v", err)
	}
}

var (
	colour = regexp.MustCompile(`\x1b\[[0-9;]*m`)
	flow   = regexp.MustCompile(`127\.200\.`)
)

func checkWidth(text string, width int) error {
	seen := false
	for line := range strings.Lines(colour.ReplaceAllString(text, "")) {
		line = strings.TrimRight(line, "\r\n")
		if !flow.MatchString(line) {
			continue
		}
		seen = true
		if n := utf8.RuneCountInString(line); n > width {
			return fmt.Errorf("%d columns where there are %d: %s", n, width, line)
		}
	}
	if !seen {
		return errors.New("no line is about a connection")
	}
	return nil
}

// A held is a connection in FIN_WAIT2, by shutdown, and its peer. Its addresses
// are as long as IPv4 has them.
type held struct{ subject, peer *net.TCPConn }

func hold(ns *kerneltest.Namespace) (h held, err error) {
	ns.Do(func() { h, err = connected() })
	if err != nil {
		return h, err
	}
	return h, h.shutdown()
}

// shutdown is the subject's: when it returns the connection is in FIN_WAIT2.
func (h held) shutdown() error {
	if err := h.subject.CloseWrite(); err != nil {
		return err
	}
	raw, err := h.subject.SyscallConn()
	if err != nil {
		return err
	}
	return await("FIN_WAIT2", func() (there bool) {
		err := raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			there = err == nil && events.State(info.State) == events.FinWait2
		})
		return err == nil && there
	})
}

func connected() (held, error) {
	l, err := heldListener()
	if err != nil {
		return held{}, err
	}
	defer l.Close()
	return connectTo(l)
}

func heldListener() (*net.TCPListener, error) {
	return net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 200, 200, 200)})
}

func connectTo(l *net.TCPListener) (h held, err error) {
	from := &net.TCPAddr{IP: net.IPv4(127, 200, 200, 201)}
	if h.peer, err = net.DialTCP("tcp4", from, l.Addr().(*net.TCPAddr)); err != nil {
		return h, err
	}
	h.subject, err = l.AcceptTCP()
	return h, err
}

func (h held) close() {
	h.peer.Close()
	h.subject.Close()
}

// await waits for something that takes milliseconds, on a busy machine seconds.
func await(what string, done func() bool) error { return awaitFor(20*time.Second, what, done) }

func awaitFor(most time.Duration, what string, done func() bool) error {
	for deadline := time.Now().Add(most); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("waited in vain for %s", what)
		}
	}
	return nil
}

// unprivileged is a command that runs fintrace as somebody who is not root and
// cannot look into the directory where the test's binary is. With capabilitiesEnv
// they have those capabilities, and hand them on.
func unprivileged() {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "unprivileged:", err)
		os.Exit(2)
	}
	self, err := os.Executable()
	if err != nil {
		fail(err)
	}
	fd, err := unix.Open(self, unix.O_RDONLY, 0)
	if err != nil {
		fail(err)
	}
	mask, err := strconv.ParseUint("0"+os.Getenv(capabilitiesEnv), 10, 64)
	if err != nil {
		fail(err)
	}
	runtime.LockOSThread() // which is the one that goes on as fintrace
	_, _, groups := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
	_, _, gid := unix.RawSyscall(unix.SYS_SETRESGID, nobody, nobody, nobody)
	keep := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	_, _, uid := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody)
	low, high := uint32(mask), uint32(mask>>32)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: low, Permitted: low, Inheritable: low}, {Effective: high, Permitted: high, Inheritable: high}}
	if err := errors.Join(firstOf(groups, gid, uid), keep, unix.Capset(&header, &data[0])); err != nil {
		fail(err)
	}
	for n := range 64 {
		if mask&(1<<n) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			fail(fmt.Errorf("hand on capability %d: %w", n, err))
		}
	}
	fail(unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), append([]string{"fintrace"}, os.Args[1:]...), os.Environ()))
}

// capabilitiesEnv has a bit for each capability, as a number.
const capabilitiesEnv = "FINTRACE_TEST_CAPABILITIES"

// TestCommands asks every command for its help.
func TestCommands(t *testing.T) {
	var walk func(cmd *cobra.Command)
	walk = func(cmd *cobra.Command) {
		t.Run(cmd.CommandPath(), func(t *testing.T) {
			if cmd.Short == "" {
				t.Error("there is no line about it")
			}
			var stdout, stderr bytes.Buffer
			e := env{stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }}
			args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
			if code := run(context.Background(), e, args); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if !strings.Contains(stdout.String(), "Usage:\n  "+cmd.CommandPath()) || stderr.Len() > 0 {
				t.Errorf("no help on stdout:\n%s%s", &stdout, &stderr)
			}
		})
		for _, c := range cmd.Commands() {
			if !c.Hidden {
				walk(c)
			}
		}
	}
	walk(commands(env{stdout: io.Discard, stderr: io.Discard}))
}
