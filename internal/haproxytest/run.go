// SPDX-License-Identifier: Apache-2.0

package haproxytest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/kerneltest"
)

// patience is for what happens at once, however busy the host is.
const patience = 20 * time.Second

// A Mode is how HAProxy runs.
type Mode uint8

const (
	Foreground   Mode = iota // one process (-db)
	MasterWorker             // a master and its workers (-W), with a master socket (-S)
)

func (m Mode) String() string { return [...]string{"foreground", "master-worker"}[m] }

// A HAProxy is one that runs, with all the processes that reloads have made.
type HAProxy struct {
	Version Version
	Mode    Mode
	// Dir is the directory of its files, as the test sees it.
	Dir string

	t        testing.TB
	ns       *kerneltest.Namespace
	args     []string
	started  []*started // by the test; the last is in charge
	answered int        // pid of the last worker known to be ready
}

// started is a process that the test has started.
type started struct {
	*exec.Cmd
	ended chan struct{} // closed after err is set
	err   error
}

const (
	configName = "haproxy.cfg"
	socketName = "haproxy.sock"
	masterName = "master.sock"
	logName    = "haproxy.log"
)

// Start runs a HAProxy in a namespace until the end of the test, and returns
// once it is ready. Its configuration is the text and, after it, a global
// section with a stats socket.
func Start(t testing.TB, ns *kerneltest.Namespace, v Version, mode Mode, config string, args ...string) *HAProxy {
	t.Helper()
	h := &HAProxy{Version: v, Mode: mode, Dir: v.TempDir(t), t: t, ns: ns, args: args}
	h.WriteConfig(config)
	t.Cleanup(h.Stop)
	h.start()
	return h
}

// ConfigPath is the configuration file, as the test sees it.
func (h *HAProxy) ConfigPath() string { return filepath.Join(h.Dir, configName) }

// SocketPath is the stats socket, as the test sees it.
func (h *HAProxy) SocketPath() string { return filepath.Join(h.Dir, socketName) }

// MasterPath is the master's socket, as the test sees it.
func (h *HAProxy) MasterPath() string { return filepath.Join(h.Dir, masterName) }

// Inside is a path of the test as HAProxy sees it.
func (h *HAProxy) Inside(path string) string { return h.Version.Inside(path) }

// WriteConfig replaces the configuration file; Reload makes it effective.
func (h *HAProxy) WriteConfig(config string) {
	h.t.Helper()
	config = fmt.Sprintf("%s\nglobal\n\tstats socket %s mode 600 level admin\n",
		strings.TrimSuffix(config, "\n"), h.Inside(h.SocketPath()))
	if err := os.WriteFile(h.ConfigPath(), []byte(config), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// PID is that of the master, or of the one process without one. After a reload
// without a master it is the new one's.
func (h *HAProxy) PID() int { return h.started[len(h.started)-1].Process.Pid }

// Worker is the pid of the process that takes new connections.
func (h *HAProxy) Worker() int { return h.answered }

// Workers are the pids of all that handle connections, those included that were
// told to finish by a reload.
func (h *HAProxy) Workers() (pids []int) {
	h.t.Helper()
	for _, s := range h.started {
		if s.hasEnded() {
			continue
		}
		if h.Mode == Foreground {
			pids = append(pids, s.Process.Pid)
			continue
		}
		children, err := children(s.Process.Pid)
		if err != nil {
			h.t.Fatal(err)
		}
		pids = append(pids, children...)
	}
	return pids
}

// children are those of all threads of a process.
func children(pid int) (pids []int, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // The thread has ended.
		}
		if err != nil {
			return nil, err
		}
		for _, word := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			pids = append(pids, child)
		}
	}
	return pids, err
}

// start starts another process and waits for its worker.
func (h *HAProxy) start(args ...string) {
	h.t.Helper()
	switch h.Mode {
	case Foreground:
		args = append(args, "-db")
	case MasterWorker:
		args = append(args, "-W", "-S", h.Inside(h.MasterPath()))
	}
	args = slices.Concat([]string{"-f", h.Inside(h.ConfigPath())}, h.args, args)
	log, err := os.OpenFile(filepath.Join(h.Dir, logName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	s := &started{Cmd: h.Version.command(args...), ended: make(chan struct{})}
	s.Stdout, s.Stderr = log, log
	h.ns.Do(func() { err = s.Start() })
	if err != nil {
		h.t.Fatal("start HAProxy:", err)
	}
	h.started = append(h.started, s)
	go func() {
		s.err = s.Wait()
		close(s.ended)
	}()
	h.awaitWorker()
}

func (s *started) hasEnded() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

// awaitWorker waits until a worker answers that did not before, and its master
// can be told to reload: starting, it may not hear a signal.
func (h *HAProxy) awaitWorker() {
	h.t.Helper()
	s := h.started[len(h.started)-1]
	deadline := time.Now().Add(patience)
	for {
		answer, err := ask(h.SocketPath(), "show info")
		if pid := infoPID(answer); pid != 0 && pid != h.answered && h.masterKnows(pid) {
			h.answered = pid
			return
		}
		switch {
		case s.hasEnded():
			h.t.Fatalf("HAProxy %s has ended: %v\n%s", h.Version, s.err, h.Log())
		case time.Now().After(deadline):
			h.t.Fatalf("HAProxy %s is not ready after %s: %v\n%s", h.Version, patience, err, h.Log())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// masterKnows says whether a master calls the worker its current one; there may
// be no master.
func (h *HAProxy) masterKnows(worker int) bool {
	if h.Mode == Foreground {
		return true
	}
	// It answers when it has set up everything else.
	answer, err := ask(h.MasterPath(), "show proc")
	if err != nil {
		return false
	}
	_, answer, _ = strings.Cut(answer, "# workers\n")
	current, _, _ := strings.Cut(answer, "#")
	for line := range strings.Lines(current) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == strconv.Itoa(worker) {
			return true
		}
	}
	return false
}

func infoPID(answer string) int {
	for line := range strings.Lines(answer) {
		if text, ok := strings.CutPrefix(line, "Pid: "); ok {
			pid, _ := strconv.Atoi(strings.TrimSpace(text))
			return pid
		}
	}
	return 0
}

// Reload makes HAProxy read its configuration again and returns once the new
// worker takes connections: by SIGUSR2 to the master, or by another process with
// -sf where there is none. The old worker finishes what it has.
func (h *HAProxy) Reload() {
	h.t.Helper()
	if h.Mode == Foreground {
		h.start("-sf", strconv.Itoa(h.PID()))
		return
	}
	if err := unix.Kill(h.PID(), unix.SIGUSR2); err != nil {
		h.t.Fatal("reload HAProxy:", err)
	}
	h.awaitWorker()
}

// Stop ends all its processes; the end of the test does that too.
func (h *HAProxy) Stop() {
	h.t.Helper()
	workers := h.Workers()
	var fds []int // of processes that are no children of ours
	for _, s := range h.started {
		if h.Mode == MasterWorker && !s.hasEnded() {
			for _, pid := range workers {
				if fd, err := unix.PidfdOpen(pid, 0); err == nil {
					fds = append(fds, fd)
				}
			}
		}
		// It has ended, or this ends it. Its exit is its own business.
		_ = s.Process.Kill()
		<-s.ended
	}
	for _, fd := range fds {
		// A worker ends with its master, or now.
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		if err := awaitEnd(fd); err != nil {
			h.t.Errorf("a worker of HAProxy %s does not end: %v", h.Version, err)
		}
		unix.Close(fd)
	}
}

// awaitEnd waits for the end of the process that a pidfd is of.
func awaitEnd(fd int) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		switch {
		case n == 1:
			return nil
		case err == nil:
			return fmt.Errorf("not in %s", patience)
		case !errors.Is(err, unix.EINTR):
			return err
		}
	}
}

// Restart ends all its processes and starts anew what was started first.
func (h *HAProxy) Restart() {
	h.t.Helper()
	h.Stop()
	h.start()
}

// Signal sends a signal to the process in charge.
func (h *HAProxy) Signal(sig syscall.Signal) {
	h.t.Helper()
	if err := unix.Kill(h.PID(), sig); err != nil {
		h.t.Fatal(err)
	}
}

// Log is what HAProxy has printed.
func (h *HAProxy) Log() string {
	text, err := os.ReadFile(filepath.Join(h.Dir, logName))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Ask gives a command to the stats socket and returns the answer.
func (h *HAProxy) Ask(command string) string {
	h.t.Helper()
	answer, err := ask(h.SocketPath(), command)
	if err != nil {
		h.t.Fatalf("ask HAProxy %s for %q: %v", h.Version, command, err)
	}
	return answer
}

// AskMaster gives a command to the master's socket and returns the answer.
func (h *HAProxy) AskMaster(command string) string {
	h.t.Helper()
	answer, err := ask(h.MasterPath(), command)
	if err != nil {
		h.t.Fatalf("ask the master of HAProxy %s for %q: %v", h.Version, command, err)
	}
	return answer
}

func ask(path, command string) (answer string, err error) {
	// The path may be longer than an address can be.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	defer dir.Close()
	address := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	conn, err := net.Dial("unix", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, command+"\n"); err != nil {
		return "", err
	}
	// The master answers only then.
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return "", err
	}
	all, err := io.ReadAll(conn)
	return string(all), err
}
