// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// A Feature is something of the kernel that makes a difference to fintrace.
type Feature struct {
	Name  string
	There bool
	Err   error  // why it is not known whether it is there
	Means string // what is done with it, or what is done without it
}

// noBPF is what is done without something that nothing else can take the place of.
const noBPF = "no BPF: list and diagnose ask sock_diag and /proc, trace and daemon cannot run"

// Features asks the kernel that runs what it has. What it may not be asked has
// an error.
func Features() []Feature {
	type question struct {
		name          string
		ask           func() (bool, error)
		with, without string
	}
	var found []Feature
	for _, q := range []question{
		{"types of the kernel (BTF)", hasTypes, "one program for every kernel", noBPF},
		{"tracing programs", has(hasTracing),
			"events of inet_sock_set_state, and the socket tables by iter/tcp", noBPF},
		{"ring buffer", has(func() error { return features.HaveMapType(ebpf.RingBuf) }),
			"events in order, over all processors", noBPF},
		{"socket cookie in tracing programs", tracingHasCookie,
			"a connection is known by its cookie", "a connection is known by network namespace, both ends and device"},
		{"walk of the socket tables", func() (bool, error) { return canWalk(btf.NewCache()) },
			"socket tables are read without a lock, by iter/tcp only for what has no cookie yet", "socket tables are read by iter/tcp alone"},
		{"owners of sockets by iterator", func() (bool, error) { return showsOwners(btf.NewCache()) },
			"who holds a connection, by the files of all processes in the kernel", "who holds a connection, by /proc/PID/fd"},
		{"entry stamp of minisocks", hasEntryStamp,
			"minisocks that were there before are dated exactly", "minisocks that were there before are dated by their timer: a lower bound"},
		{"count of skipped events", countsMisses,
			"events that the kernel skips are counted", "events that the kernel skips are not counted, and found missing by the next look"},
	} {
		there, err := q.ask()
		f := Feature{Name: q.name, There: there, Means: q.without}
		switch {
		case err != nil:
			f.Err = thisHost().explain(err)
		case there:
			f.Means = q.with
		}
		found = append(found, f)
	}
	return found
}

// Release is that of the running kernel, as uname -r has it.
func Release() string { return thisHost().release }

// has turns what cilium/ebpf answers into yes, no, or why that is not known.
func has(ask func() error) func() (bool, error) {
	return func() (bool, error) {
		err := ask()
		if errors.Is(err, ebpf.ErrNotSupported) {
			return false, nil
		}
		return err == nil, err
	}
}

func hasTypes() (bool, error) {
	_, err := btf.LoadKernelSpec()
	if errors.Is(err, ebpf.ErrNotSupported) {
		return false, nil
	}
	return err == nil, err
}

// hasTracing loads a program for the tracepoint that fintrace's is for. What
// cilium/ebpf asks is whether there is fentry, which may be refused by itself.
func hasTracing() error {
	_, err := loads()
	return err
}

// tracingHasCookie loads a program that asks for the cookie.
func tracingHasCookie() (bool, error) {
	return loads(asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord), asm.FnGetSocketCookie.Call())
}

// loads says whether the kernel has the helpers that these instructions call in
// a program for the tracepoint.
func loads(instructions ...asm.Instruction) (bool, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state", License: "Dual BSD/GPL",
		Instructions: append(instructions, asm.Mov.Imm(asm.R0, 0), asm.Return()),
	})
	if errors.Is(err, unix.EINVAL) { // unknown func
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, prog.Close()
}

// showsOwners says whether the kernel has bpf_sock_from_file(), which came with Linux 5.11.
func showsOwners(kernel *btf.Cache) (bool, error) {
	types, err := kernel.Kernel()
	if err != nil {
		return false, err
	}
	var helpers *btf.Enum
	if err := types.TypeByName("bpf_func_id", &helpers); err != nil {
		return false, fmt.Errorf("find the helpers of BPF: %w", err)
	}
	return slices.ContainsFunc(helpers.Values, func(v btf.EnumValue) bool { return v.Name == "BPF_FUNC_sock_from_file" }), nil
}

func hasEntryStamp() (bool, error) { return hasMember("inet_timewait_sock", "tw_entry_stamp") }

// countsMisses is about bpf_prog_info.recursion_misses.
func countsMisses() (bool, error) { return hasMember("bpf_prog_info", "recursion_misses") }

func hasMember(structure, member string) (bool, error) {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return false, err
	}
	var s *btf.Struct
	if err := types.TypeByName(structure, &s); err != nil {
		return false, fmt.Errorf("find the type %s: %w", structure, err)
	}
	for _, m := range s.Members {
		if m.Name == member {
			return true, nil
		}
	}
	return false, nil
}
