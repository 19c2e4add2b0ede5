// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// trespasses are what a daemon has no business to do. Root may do all of them:
// each returns nil then, and leaves nothing behind. Dir is for files, and has one
// called "there"; other is a process of the same user.
var trespasses = []struct {
	name string
	do   func(dir string, other int) error
}{
	{"create a file", func(dir string, _ int) error {
		path := filepath.Join(dir, "new")
		err := os.WriteFile(path, nil, 0o600)
		os.Remove(path)
		return err
	}},
	{"open a file for writing", func(dir string, _ int) error {
		return closed(unix.Open(filepath.Join(dir, "there"), unix.O_WRONLY, 0))
	}},
	{"open a file for writing with bits that have no meaning", func(dir string, _ int) error {
		return closed(unix.Open(filepath.Join(dir, "there"), unix.O_RDWR|1<<3|1<<30, 0))
	}},
	{"open a file for writing by openat2", func(dir string, _ int) error {
		return closed(unix.Openat2(unix.AT_FDCWD, filepath.Join(dir, "there"), &unix.OpenHow{Flags: unix.O_WRONLY}))
	}},
	{"truncate a file", func(dir string, _ int) error { return unix.Truncate(filepath.Join(dir, "there"), 0) }},
	{"chmod a file that is open", func(dir string, _ int) error {
		f, err := os.Open(filepath.Join(dir, "there"))
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Chmod(0o600)
	}},
	{"rename a file", func(dir string, _ int) error {
		from, to := filepath.Join(dir, "there"), filepath.Join(dir, "elsewhere")
		return errors.Join(os.Rename(from, to), os.Rename(to, from))
	}},
	{"make a directory", func(dir string, _ int) error {
		return errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o700), unix.Rmdir(filepath.Join(dir, "d")))
	}},
	{"make a link", func(dir string, _ int) error {
		return errors.Join(os.Symlink("there", filepath.Join(dir, "link")), unix.Unlink(filepath.Join(dir, "link")))
	}},
	{"write a sysctl", func(string, int) error {
		return closed(unix.Open("/proc/sys/kernel/hostname", unix.O_WRONLY, 0))
	}},
	{"execute", func(string, int) error { return exec.Command("/bin/true").Run() }},
	{"fork", func(string, int) error {
		// That it is no thread is what counts: with flags that the kernel takes for nobody.
		_, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWNS|unix.CLONE_FS, 0, 0, 0, 0, 0)
		if errno == unix.EINVAL {
			return nil
		}
		return errno
	}},
	{"trace a process", func(_ string, other int) error {
		// Of a thread that ends, so that the process goes on.
		runtime.LockOSThread()
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(other), 0, 0, 0, 0)
		if errno != 0 {
			runtime.UnlockOSThread()
			return errno
		}
		return nil
	}},
	{"read a process's memory", func(_ string, other int) error {
		var b byte
		here := unix.Iovec{Base: &b, Len: 1}
		_, err := unix.ProcessVMReadv(other, []unix.Iovec{here}, []unix.RemoteIovec{{Base: 1, Len: 1}}, 0)
		if errors.Is(err, unix.EFAULT) { // nothing is there, which one may know
			return nil
		}
		return err
	}},
	{"signal a process", func(_ string, other int) error { return unix.Kill(other, 0) }},
	{"load a BPF program", func(string, int) error {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
		if err != nil {
			return err
		}
		return p.Close()
	}},
	{"make a BPF map", func(string, int) error {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			return err
		}
		return m.Close()
	}},
	{"mount", func(dir string, _ int) error {
		return errors.Join(unix.Mount("none", dir, "tmpfs", 0, ""), unix.Unmount(dir, 0))
	}},
	{"enter another namespace", func(_ string, other int) error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/uts", other), unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Setns(fd, 0)
	}},
	{"become another user, and root again", func(string, int) error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_, _, first := unix.Syscall(unix.SYS_SETRESUID, 65534, 65534, 0)
		_, _, then := unix.Syscall(unix.SYS_SETRESUID, 0, 0, 0)
		return firstOf(first, then)
	}},
	{"listen to packets", func(string, int) error { return closed(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)) }},
	{"map code", func(string, int) error {
		page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return err
		}
		return unix.Munmap(page)
	}},
	{"have io_uring do it", func(string, int) error {
		var params [120]byte
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
		if errno == unix.ENOSYS { // a kernel without
			return nil
		}
		return closed(int(fd), firstOf(errno))
	}},
}

func closed(fd int, err error) error {
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func firstOf(errnos ...syscall.Errno) error {
	for _, e := range errnos {
		if e != 0 {
			return e
		}
	}
	return nil
}

// A trespass is what one thread of a daemon was told.
type trespass struct {
	Thread, Name, Error string
}

// trespassing is a program that runs the daemon, has all of its threads trespass
// before and after it watches, and says what came of it.
func trespassing() {
	runtime.GOMAXPROCS(4)
	// The other process goes with the thread that starts it: with one that ends for
	// having traced it, were it that.
	runtime.LockOSThread()
	dir := os.Args[1]
	other, err := os.StartProcess("/bin/sleep", []string{"sleep", "60"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var all []trespass
	try := func(thread string) (done []trespass) {
		for _, t := range trespasses {
			told := trespass{Thread: thread, Name: t.name}
			var err error
			ended := make(chan error)
			if t.name == "trace a process" && thread == "before" {
				go func() { ended <- t.do(dir, other.Pid) }() // It keeps its thread.
				err = <-ended
			} else {
				err = t.do(dir, other.Pid)
			}
			if err != nil {
				told.Error = err.Error()
			}
			done = append(done, told)
		}
		return done
	}
	all = try("before")

	// Threads that are there already, with nothing to do until the daemon watches.
	const threads = 5
	watching, old := make(chan struct{}), make(chan []trespass)
	for range threads {
		go func() {
			runtime.LockOSThread()
			<-watching
			old <- try(fmt.Sprintf("old %d", unix.Gettid()))
		}()
	}
	log, into := io.Pipe()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan int)
	go func() { ended <- run(ctx, env{os.Stdout, into, os.Getenv}, []string{"daemon", "--config", os.Args[2]}) }()
	lines := bufio.NewScanner(log)
	for lines.Scan() && !strings.Contains(lines.Text(), `"msg":"watching"`) {
		fmt.Fprintln(os.Stderr, lines.Text())
	}
	go io.Copy(io.Discard, log)
	close(watching)
	for range threads {
		all = append(all, <-old...)
	}
	for range threads { // Each ends with its thread, so that the next has a new one.
		go func() {
			runtime.LockOSThread()
			old <- try(fmt.Sprintf("new %d", unix.Gettid()))
		}()
		all = append(all, <-old...)
	}
	// What it has to do, it can.
	if _, err := haproxy.Load(fmt.Sprintf("/proc/%d/root", other.Pid), "/", []string{os.Args[2]}); err != nil {
		all = append(all, trespass{"needed", "read a file in the root of another", err.Error()})
	}
	// Before it ends, all threads that there are.
	statuses, _ := filepath.Glob("/proc/self/task/*/status")
	for _, path := range statuses {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // ended
		}
		for _, key := range []string{"CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"} {
			_, value, _ := strings.Cut(string(text), "\n"+key+":\t")
			value, _, _ = strings.Cut(value, "\n")
			all = append(all, trespass{"status", key, value})
		}
	}
	stop()
	if code := <-ended; code != 0 {
		os.Exit(code)
	}
	json.NewEncoder(os.Stdout).Encode(all)
}

// TestConfined runs the daemon, and has its threads try what it has given up.
func TestConfined(t *testing.T) {
	kerneltest.Require(t)
	dir, config := t.TempDir(), t.TempDir()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("alerts: {state_file: %s/alerts.json}\nweb: {listen: []}\nlog: {format: json}\n", config)
	if err := os.WriteFile(config+"/fintrace.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("trespassing", dir, config+"/fintrace.yaml")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr.String())
	}
	var all []trespass
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	threads := map[string]int{}
	for _, tried := range all {
		switch kind, _, _ := strings.Cut(tried.Thread, " "); kind {
		case "status":
			threads["status "+tried.Name]++
			want := map[string]string{
				// CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE, CAP_SYS_ADMIN
				"CapPrm": "0000000000280406", "CapEff": "0000000000280406", "CapBnd": "0000000000280406",
				"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
			}[tried.Name]
			if tried.Error != want {
				t.Errorf("a thread's %s is %s, want %s", tried.Name, tried.Error, want)
			}
		case "before":
			threads[kind]++
			if tried.Error != "" {
				t.Errorf("%s: %s, before it is confined", tried.Name, tried.Error)
			}
		case "old", "new":
			threads[kind]++
			if !strings.Contains(tried.Error, unix.EPERM.Error()) {
				t.Errorf("%s thread: %s: %q, want it not to be permitted", kind, tried.Name, tried.Error)
			}
		default:
			t.Errorf("%s: %s", tried.Name, tried.Error)
		}
	}
	for kind, want := range map[string]int{"before": len(trespasses), "old": 5 * len(trespasses), "new": 5 * len(trespasses)} {
		if threads[kind] != want {
			t.Errorf("%d were tried by %s threads, want %d", threads[kind], kind, want)
		}
	}
	if threads["status Seccomp"] < 6 {
		t.Errorf("the status of %d threads is known", threads["status Seccomp"])
	}
	entries, err := os.ReadDir(dir)
	if content, readErr := os.ReadFile(there); err != nil || readErr != nil || len(entries) != 1 || len(content) != 0 {
		t.Errorf("what is left is %v, %q, %v", entries, content, errors.Join(err, readErr))
	}
	// Confined, it has written what it is to write, and nothing beside.
	left, err := os.ReadDir(config)
	names := make([]string, 0, len(left))
	for _, e := range left {
		names = append(names, e.Name())
	}
	if want := []string{"alerts.json", "fintrace.yaml"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("beside its configuration are %v, %v; want %v", names, err, want)
	}
}
