// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/fintrace/fintrace/internal/kerneltest"
)

// A process is a program that runs while the test looks on.
type process struct {
	*exec.Cmd
	stdin  io.Writer
	stdout *bufio.Reader
	closes io.Closer // the reading end of its stdout
	stderr bytes.Buffer
}

// start runs a command for no longer than a minute: whatever the test waits for,
// it does not wait for ever.
func start(t *testing.T, name string, args ...string) *process {
	t.Helper()
	p := started(t, exec.Command(name, args...))
	watchdog := time.AfterFunc(time.Minute, func() { p.Process.Kill() })
	t.Cleanup(func() { watchdog.Stop() })
	return p
}

// started has a command run until the test ends, at the latest.
func started(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd}
	p.Stderr = &p.stderr
	stdin, err := p.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdin = stdin
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout, p.closes = bufio.NewReader(stdout), stdout
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })
	return p
}

// until reads stdout up to the line that has text in it.
func (p *process) until(t *testing.T, text string) (read string) {
	t.Helper()
	for {
		line, err := p.stdout.ReadString('\n')
		read += line
		if err != nil {
			p.Wait()
			t.Fatalf("no %q in\n%s%s", text, read, &p.stderr)
		}
		if strings.Contains(line, text) {
			return read
		}
	}
}

// TestEnd ends a trace in every way and looks for what it leaves in the kernel.
func TestEnd(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	tracing := func(t *testing.T) (*process, map[string][]uint32) {
		p := start(t, "fintrace", "trace", "--netns", strconv.FormatUint(uint64(ns.Inode), 10))
		p.until(t, "EVENT")
		ids := kernelObjects(t, p.Process.Pid)
		for kind, exists := range kinds {
			if len(ids[kind]) == 0 {
				t.Errorf("the trace has no %s", kind)
			}
			for _, id := range ids[kind] {
				if err := exists(id); err != nil {
					t.Errorf("%s %d: %v", kind, id, err)
				}
			}
		}
		return p, ids
	}

	t.Run("interrupted", func(t *testing.T) {
		p, ids := tracing(t)
		if err := p.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		p.until(t, "Traced for")
		if rest, err := io.ReadAll(p.stdout); err != nil || !bytes.Contains(rest, []byte("Records lost: 0")) {
			t.Errorf("the summary ends early: %v\n%s", err, rest)
		}
		if err := p.Wait(); err != nil {
			t.Error(err)
		}
		checkGone(t, ids)
	})

	t.Run("killed", func(t *testing.T) {
		p, ids := tracing(t)
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.Wait()
		checkGone(t, ids)
	})

	t.Run("no reader", func(t *testing.T) {
		p, ids := tracing(t)
		p.closes.Close()
		var exit *exec.ExitError
		if err := p.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGPIPE {
			t.Errorf("ends with %v, want SIGPIPE as others do", err)
		}
		if strings.Contains(p.stderr.String(), "fintrace:") {
			t.Errorf("is not quiet:\n%s", &p.stderr)
		}
		checkGone(t, ids)
	})
}

// kinds are the objects of BPF, as /proc/PID/fdinfo names them, each with how
// to find whether one exists.
var kinds = map[string]func(id uint32) error{
	"prog_id": func(id uint32) error { return found(ebpf.NewProgramFromID(ebpf.ProgramID(id))) },
	"map_id":  func(id uint32) error { return found(ebpf.NewMapFromID(ebpf.MapID(id))) },
	"link_id": func(id uint32) error { return found(link.NewFromID(link.ID(id))) },
	"btf_id":  func(id uint32) error { return found(btf.NewHandleFromID(btf.ID(id))) },
}

func found(object io.Closer, err error) error {
	if err != nil {
		return err
	}
	return object.Close()
}

// kernelObjects are the ids of the BPF objects that a process has open.
func kernelObjects(t *testing.T, pid int) map[string][]uint32 {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string][]uint32{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // Closed since.
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			kind, value, _ := strings.Cut(line, ":")
			if kinds[kind] == nil {
				continue
			}
			id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			ids[kind] = append(ids[kind], uint32(id))
		}
	}
	return ids
}

// checkGone waits until the kernel has let go of all, which it does soon after
// the last descriptor is closed.
func checkGone(t *testing.T, ids map[string][]uint32) {
	t.Helper()
	for kind, exists := range kinds {
		for _, id := range ids[kind] {
			err := await(fmt.Sprintf("%s %d to go", kind, id), func() bool {
				return errors.Is(exists(id), os.ErrNotExist)
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
}

// TestTerminal traces on terminals from narrow to wide, up to Ctrl-C.
func TestTerminal(t *testing.T) {
	kerneltest.Require(t)
	for _, width := range []int{60, 80, 100, 120, 160} {
		t.Run(strconv.Itoa(width), func(t *testing.T) {
			ns := kerneltest.NewNamespace(t)
			command := fmt.Sprintf("stty cols %d; exec fintrace trace --min-duration 0 --netns %d", width, ns.Inode)
			p := start(t, "script", "-qec", command, "/dev/null")
			p.until(t, "EVENT")
			h, err := hold(ns)
			if err != nil {
				t.Fatal(err)
			}
			defer h.close()
			lines := p.until(t, "opened")
			h.peer.Close()
			lines += p.until(t, "closed")
			if err := checkWidth(lines, width); err != nil {
				t.Error(err)
			}
			for _, end := range []net.Addr{h.subject.LocalAddr(), h.subject.RemoteAddr()} {
				_, port, _ := net.SplitHostPort(end.String())
				if n := strings.Count(lines, port); n < 2 {
					t.Errorf("port %s is in %d of 2 lines:\n%s", port, n, lines)
				}
			}
			if _, err := io.WriteString(p.stdin, "\x03"); err != nil {
				t.Fatal(err)
			}
			summary := p.until(t, "Records lost")
			if err := checkWidth(summary, width); err != nil {
				t.Errorf("%v, in\n%s", err, summary)
			}
			if err := p.Wait(); err != nil {
				t.Error("Ctrl-C ends with", err)
			}
		})
	}
}
