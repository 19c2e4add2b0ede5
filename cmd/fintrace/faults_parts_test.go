// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// faultPrograms run a command where something is wrong.
var faultPrograms = map[string]func(){
	// refusing COMMAND PROGRAM... has the kernel refuse one command of bpf(2).
	"refusing": func() {
		command, err := strconv.ParseUint(os.Args[1], 10, 32)
		runtime.LockOSThread()
		if err == nil {
			err = refuseBPF(uint32(command))
		}
		execute("refusing", os.Args[2:], err)
	},
	// crowd NUMBER PROGRAM... has so many network namespaces, mounted in a mount
	// namespace that the program is started in.
	"crowd": func() {
		n, err := strconv.Atoi(os.Args[1])
		runtime.LockOSThread()
		if err == nil {
			err = mountNamespaces(n)
		}
		execute("crowd", os.Args[2:], err)
	},
	// keeper NUMBER has its socket, descriptor 3, in FIN_WAIT2, and so many
	// descriptors more. It says so, and holds them.
	"keeper": func() {
		n, err := strconv.Atoi(os.Args[1])
		if err == nil {
			err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n) + 100, Max: uint64(n) + 100})
		}
		for i := 0; i < n && err == nil; i++ {
			_, err = unix.Dup(1)
		}
		if err == nil {
			err = unix.Shutdown(3, unix.SHUT_WR)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "keeper:", err)
			os.Exit(1)
		}
		fmt.Println("holding")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until it is closed
	},
}

// execute becomes a program.
func execute(name string, args []string, err error) {
	var path string
	if err == nil {
		path, err = exec.LookPath(args[0])
	}
	if err == nil {
		err = unix.Exec(path, args, os.Environ())
	}
	fmt.Fprintln(os.Stderr, name+":", err)
	os.Exit(2)
}

// refuseBPF makes a command of bpf(2) fail with EPERM for this thread, and what it
// becomes.
func refuseBPF(command uint32) error {
	// include/uapi/linux/seccomp.h: struct seccomp_data
	const nr, firstArgument = 0, 16
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: firstArgument},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: command, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// mountNamespaces makes network namespaces, and mounts each below /run/netns of a
// mount namespace of this thread's own, which is in the last of them then.
func mountNamespaces(n int) error {
	const dir = "/run/netns"
	err := errors.Join(
		unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		os.MkdirAll(dir, 0o755),
		unix.Mount("crowd", dir, "tmpfs", 0, ""),
	)
	own, e := os.Open("/proc/thread-self/ns/net")
	if err = errors.Join(err, e); err != nil {
		return err
	}
	defer own.Close()
	for i := range n {
		path := filepath.Join(dir, strconv.Itoa(i))
		err := errors.Join(
			unix.Unshare(unix.CLONE_NEWNET),
			os.WriteFile(path, nil, 0o600),
			unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""),
		)
		if err != nil {
			return fmt.Errorf("network namespace %d: %w", i, err)
		}
	}
	return unix.Setns(int(own.Fd()), unix.CLONE_NEWNET)
}

// A leftover is a BPF object of fintrace's that no process has open.
type leftover struct {
	kind string
	id   uint32
	name string
}

// leftovers asks bpftool for fintrace's objects, and /proc for whose they are.
func leftovers(t *testing.T) (left []leftover) {
	t.Helper()
	ours := map[string][]string{
		"prog": {"on_set_state", "snapshot", "walk"},
		"map":  {"ring", "closers", "counts", "batches", "scratches", "known"},
	}
	names := map[uint32]string{} // of programs, by id
	var found []leftover
	for _, kind := range []string{"prog", "map", "link"} {
		out, err := exec.Command("bpftool", "-j", kind, "show").Output()
		if err != nil {
			t.Fatalf("bpftool %s show: %v", kind, err)
		}
		var objects []struct {
			ID      uint32
			Name    string
			Program uint32 `json:"prog_id"`
		}
		if err := json.Unmarshal(out, &objects); err != nil {
			t.Fatalf("bpftool %s show: %v: %s", kind, err, out)
		}
		for _, o := range objects {
			switch {
			case kind == "link" && slices.Contains(ours["prog"], names[o.Program]):
				found = append(found, leftover{kind, o.ID, names[o.Program]})
			case slices.Contains(ours[kind], o.Name):
				found = append(found, leftover{kind, o.ID, o.Name})
			}
			if kind == "prog" {
				names[o.ID] = o.Name
			}
		}
	}
	had := map[string]bool{}
	files, err := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // It may be gone.
		for line := range strings.Lines(string(text)) {
			if kind, value, _ := strings.Cut(line, "_id:"); kind == "prog" || kind == "map" || kind == "link" {
				had[kind+" "+strings.TrimSpace(value)] = true
			}
		}
	}
	for _, o := range found {
		if !had[fmt.Sprintf("%s %d", o.kind, o.id)] {
			left = append(left, o)
		}
	}
	return left
}

// checkNothingLeft waits until no object of fintrace's is without a process. Other
// processes' come and go meanwhile.
func checkNothingLeft(t *testing.T) {
	t.Helper()
	before := leftovers(t)
	if err := await("nothing to be left", func() bool {
		now := leftovers(t)
		before = slices.DeleteFunc(before, func(o leftover) bool { return !slices.Contains(now, o) })
		return len(before) == 0
	}); err != nil {
		t.Errorf("%v: there are still %v", err, before)
	}
}
