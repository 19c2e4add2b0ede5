// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestFilter asks the filter for single system calls, in a machine for such
// programs that has no kernel.
func TestFilter(t *testing.T) {
	const how = 0x1234_5678_9abc
	vm, err := bpf.NewVM(program(how))
	if err != nil {
		t.Fatal(err)
	}
	file, temporary := uint64(address(&door.file)), uint64(address(&door.temporary))
	self, negative := uint64(os.Getpid()), ^uint64(0)
	type arguments = [6]uint64
	for _, test := range []struct {
		name   string
		number uint32
		args   arguments
		want   uint32
	}{
		{"read", unix.SYS_READ, arguments{3, 1, 1}, allow},
		{"exit", unix.SYS_EXIT_GROUP, arguments{}, allow},
		{"open for reading", unix.SYS_OPENAT, arguments{negative - 99, 1, unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK}, allow},
		{"open a path", unix.SYS_OPENAT, arguments{5, 1, unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC}, allow},
		{"open for writing", unix.SYS_OPENAT, arguments{5, 1, unix.O_WRONLY}, refuse},
		{"open for both", unix.SYS_OPENAT, arguments{5, 1, unix.O_RDWR | unix.O_CLOEXEC}, refuse},
		{"open with the third access mode", unix.SYS_OPENAT, arguments{5, 1, unix.O_ACCMODE}, refuse},
		{"create", unix.SYS_OPENAT, arguments{5, 1, unix.O_CREAT}, refuse},
		{"truncate", unix.SYS_OPENAT, arguments{5, 1, unix.O_TRUNC}, refuse},
		{"make a file without a name", unix.SYS_OPENAT, arguments{5, 1, unix.O_TMPFILE | unix.O_WRONLY}, refuse},
		{"open for writing with a bit that has no meaning", unix.SYS_OPENAT, arguments{5, 1, unix.O_WRONLY | 1<<30 | 1<<40}, refuse},
		{"open at the door", unix.SYS_OPENAT, arguments{negative - 99, temporary, doorFlags, 0o600}, allow},
		{"open at the door what is there", unix.SYS_OPENAT, arguments{negative - 99, temporary, unix.O_WRONLY}, refuse},
		{"open beside the door", unix.SYS_OPENAT, arguments{negative - 99, temporary + 1, doorFlags}, refuse},
		{"open far from the door", unix.SYS_OPENAT, arguments{negative - 99, temporary + 1<<32, doorFlags}, refuse},
		{"rename at the door", unix.SYS_RENAMEAT2, arguments{negative - 99, temporary, negative - 99, file, 0}, allow},
		{"rename elsewhere", unix.SYS_RENAMEAT2, arguments{negative - 99, temporary, negative - 99, 1, 0}, refuse},
		{"rename something else", unix.SYS_RENAMEAT2, arguments{negative - 99, file, negative - 99, file, 0}, refuse},
		{"exchange", unix.SYS_RENAMEAT2, arguments{negative - 99, temporary, negative - 99, file, unix.RENAME_EXCHANGE}, refuse},
		{"remove at the door", unix.SYS_UNLINKAT, arguments{negative - 99, temporary, 0}, allow},
		{"remove a directory at the door", unix.SYS_UNLINKAT, arguments{negative - 99, temporary, unix.AT_REMOVEDIR}, refuse},
		{"remove", unix.SYS_UNLINKAT, arguments{negative - 99, file, 0}, refuse},
		{"resolve as always", unix.SYS_OPENAT2, arguments{5, 1, how, 24}, allow},
		{"resolve otherwise", unix.SYS_OPENAT2, arguments{5, 1, how + 8, 24}, refuse},
		{"a handle", unix.SYS_OPEN_BY_HANDLE_AT, arguments{5, 1, unix.O_PATH | unix.O_CLOEXEC}, allow},
		{"a handle for writing", unix.SYS_OPEN_BY_HANDLE_AT, arguments{5, 1, unix.O_RDWR}, refuse},
		{"a thread", unix.SYS_CLONE, arguments{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, allow},
		{"a process", unix.SYS_CLONE, arguments{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, refuse},
		{"a thread or a process", unix.SYS_CLONE3, arguments{1, 88}, unknown},
		{"execute", unix.SYS_EXECVE, arguments{1, 1, 1}, refuse},
		{"execute a descriptor", unix.SYS_EXECVEAT, arguments{1, 1, 1}, refuse},
		{"signal itself", unix.SYS_TGKILL, arguments{self, self, uint64(unix.SIGURG)}, allow},
		{"signal another", unix.SYS_KILL, arguments{self + 1, uint64(unix.SIGKILL)}, refuse},
		{"signal all", unix.SYS_KILL, arguments{negative, uint64(unix.SIGKILL)}, refuse},
		{"memory", unix.SYS_MMAP, arguments{0, 1, unix.PROT_READ | unix.PROT_WRITE}, allow},
		{"code", unix.SYS_MMAP, arguments{0, 1, unix.PROT_READ | unix.PROT_EXEC}, refuse},
		{"make code of it", unix.SYS_MPROTECT, arguments{0, 1, unix.PROT_READ | unix.PROT_EXEC}, refuse},
		{"a network namespace", unix.SYS_SETNS, arguments{5, unix.CLONE_NEWNET}, allow},
		{"a namespace of any kind", unix.SYS_SETNS, arguments{5, 0}, refuse},
		{"a mount namespace", unix.SYS_SETNS, arguments{5, unix.CLONE_NEWNS}, refuse},
		{"TCP", unix.SYS_SOCKET, arguments{unix.AF_INET6, unix.SOCK_STREAM}, allow},
		{"packets", unix.SYS_SOCKET, arguments{unix.AF_PACKET, unix.SOCK_RAW}, refuse},
		{"look up", unix.SYS_BPF, arguments{unix.BPF_MAP_LOOKUP_ELEM}, allow},
		{"walk", unix.SYS_BPF, arguments{unix.BPF_ITER_CREATE}, allow},
		{"run", unix.SYS_BPF, arguments{unix.BPF_PROG_TEST_RUN}, allow},
		{"load", unix.SYS_BPF, arguments{unix.BPF_PROG_LOAD}, refuse},
		{"make a map", unix.SYS_BPF, arguments{unix.BPF_MAP_CREATE}, refuse},
		{"attach", unix.SYS_BPF, arguments{unix.BPF_LINK_CREATE}, refuse},
		{"attach as of old", unix.SYS_BPF, arguments{unix.BPF_RAW_TRACEPOINT_OPEN}, refuse},
		{"the programs of others", unix.SYS_BPF, arguments{unix.BPF_PROG_GET_FD_BY_ID}, refuse},
		{"type into a terminal", unix.SYS_IOCTL, arguments{1, unix.TIOCSTI, 1}, refuse},
		{"raise a limit", unix.SYS_PRLIMIT64, arguments{0, unix.RLIMIT_NOFILE, 1, 0}, refuse},
		{"read a limit", unix.SYS_PRLIMIT64, arguments{0, unix.RLIMIT_NOFILE, 0, 1}, allow},
		// A number that is an argument of a call that was allowed before it.
		{"a number of old", unix.SYS_PTRACE, arguments{unix.SYS_READ, unix.SYS_READ, unix.SYS_READ}, refuse},
		{"with an argument that is the number of one that is allowed", unix.SYS_OPENAT, arguments{5, 1, unix.SYS_MMAP | unix.O_WRONLY}, refuse},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := ask(t, vm, architecture, test.number, test.args); got != test.want {
				t.Errorf("%#x, want %#x", got, test.want)
			}
		})
	}
	for _, number := range []uint32{unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD,
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_FSMOUNT, unix.SYS_UNSHARE,
		unix.SYS_SETUID, unix.SYS_SETRESUID, unix.SYS_SETFSUID, unix.SYS_CAPSET, unix.SYS_SECCOMP, unix.SYS_KEYCTL,
		unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT, unix.SYS_PERF_EVENT_OPEN,
		unix.SYS_IO_URING_SETUP, unix.SYS_USERFAULTFD, unix.SYS_MEMFD_CREATE,
		unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_SYMLINKAT, unix.SYS_LINKAT, unix.SYS_FCHMODAT, unix.SYS_FCHMOD, unix.SYS_FCHOWNAT,
		unix.SYS_FCHOWN, unix.SYS_TRUNCATE, unix.SYS_FTRUNCATE, unix.SYS_UTIMENSAT, unix.SYS_SETXATTR, unix.SYS_FSETXATTR,
		unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_SETHOSTNAME, unix.SYS_SWAPON, unix.SYS_QUOTACTL, unix.SYS_SYSLOG} {
		if got := ask(t, vm, architecture, number, arguments0); got != refuse {
			t.Errorf("system call %d: %#x, want it refused", number, got)
		}
	}
	// What is allowed is so by its number in one architecture.
	if got := ask(t, vm, unix.AUDIT_ARCH_I386, unix.SYS_READ, arguments0); got != refuse {
		t.Errorf("in another architecture: %#x", got)
	}
	if got := ask(t, vm, architecture, unix.SYS_READ|0x40000000, arguments0); got != refuse {
		t.Errorf("with another word size: %#x", got)
	}
}

var arguments0 [6]uint64

// ask is what the filter says of a call.
func ask(t *testing.T, vm *bpf.VM, arch, number uint32, args [6]uint64) uint32 {
	t.Helper()
	// The machine loads in the network's order, seccomp in the host's.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[atNumber:], number)
	binary.BigEndian.PutUint32(data[atArchitecture:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[atArguments+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[atArguments+8*i+4:], uint32(a>>32))
	}
	verdict, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(verdict)
}
