// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// plain are the system calls that are allowed with any arguments, beside those
// of one architecture: what Go's runtime and its packages for files, time and the
// network make, and C's threads and resolver where cgo is used.
var plain = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_CLOSE, unix.SYS_READLINKAT, unix.SYS_FSTAT, unix.SYS_STATX,
	unix.SYS_LSEEK, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_FSYNC, unix.SYS_FDATASYNC,
	unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_STATFS, unix.SYS_FSTATFS, unix.SYS_GETDENTS64, unix.SYS_GETCWD,
	unix.SYS_FCNTL, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_PIPE2, unix.SYS_EVENTFD2, unix.SYS_FLOCK,
	unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_MADVISE, unix.SYS_BRK, unix.SYS_MINCORE, unix.SYS_MEMBARRIER,
	unix.SYS_FUTEX, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETCPU, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ,
	unix.SYS_SIGALTSTACK, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGPENDING,
	unix.SYS_RT_SIGTIMEDWAIT, unix.SYS_RESTART_SYSCALL,
	unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY,
	unix.SYS_GETITIMER, unix.SYS_SETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_GETTIME, unix.SYS_TIMER_DELETE,
	unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_PPOLL, unix.SYS_PSELECT6,
	unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_SHUTDOWN, unix.SYS_GETSOCKNAME,
	unix.SYS_GETPEERNAME, unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKOPT, unix.SYS_SOCKETPAIR, unix.SYS_SENDTO, unix.SYS_RECVFROM,
	unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_SENDMMSG, unix.SYS_RECVMMSG, unix.SYS_SENDFILE, unix.SYS_SPLICE,
	unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETTID, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID,
	unix.SYS_GETGROUPS, unix.SYS_GETRUSAGE, unix.SYS_GETRLIMIT, unix.SYS_GETRANDOM, unix.SYS_UNAME, unix.SYS_SYSINFO, unix.SYS_CAPGET,
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
}

// A call is a system call that is allowed where all of its conditions hold.
type call struct {
	number     uint32
	conditions []condition
}

// A condition is on an argument of 64 bits: of those in mask, it has value.
type condition struct {
	argument    uint32
	mask, value uint64
}

func when(number uint32, conditions ...condition) call { return call{number, conditions} }

// is of an argument that is an address or a long, isInt of one that is an int, of
// which the kernel takes 32 bits.
func is(argument uint32, value uint64) condition     { return condition{argument, 1<<64 - 1, value} }
func isInt(argument, value uint32) condition         { return condition{argument, 1<<32 - 1, uint64(value)} }
func has(argument uint32, bit uint64) condition      { return condition{argument, bit, bit} }
func hasNone(argument uint32, bits uint64) condition { return condition{argument, bits, 0} }

// writing is what no file is opened with but at the door.
const writing = unix.O_WRONLY | unix.O_RDWR | unix.O_CREAT | unix.O_TRUNC

// conditional are the system calls that are allowed with some arguments.
func conditional(openHow uintptr) []call {
	file, temporary := uint64(address(&door.file)), uint64(address(&door.temporary))
	self := uint32(os.Getpid())
	calls := []call{
		// Files are opened for reading. By openat2 too: its flags are in memory,
		// which a filter cannot read.
		when(unix.SYS_OPENAT, hasNone(2, writing)),
		when(unix.SYS_OPEN_BY_HANDLE_AT, hasNone(2, writing)),
		when(unix.SYS_OPENAT2, is(2, uint64(openHow))),
		when(unix.SYS_OPENAT, is(1, temporary), isInt(2, doorFlags)),
		when(unix.SYS_RENAMEAT2, is(1, temporary), is(3, file), isInt(4, 0)),
		when(unix.SYS_UNLINKAT, is(1, temporary), isInt(2, 0)),

		// Threads, and no processes.
		when(unix.SYS_CLONE, has(0, unix.CLONE_THREAD)),
		when(unix.SYS_KILL, isInt(0, self)),
		when(unix.SYS_TGKILL, isInt(0, self)),
		when(unix.SYS_PRLIMIT64, is(2, 0)), // which reads
		when(unix.SYS_PRCTL, isInt(0, unix.PR_SET_VMA)),

		// No code but the program's.
		when(unix.SYS_MMAP, hasNone(2, unix.PROT_EXEC)),
		when(unix.SYS_MPROTECT, hasNone(2, unix.PROT_EXEC)),

		when(unix.SYS_IOCTL, isInt(1, unix.TCGETS)),
		when(unix.SYS_IOCTL, isInt(1, unix.TIOCGWINSZ)),
		when(unix.SYS_SETNS, isInt(1, unix.CLONE_NEWNET)),
	}
	for _, family := range []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK} {
		calls = append(calls, when(unix.SYS_SOCKET, isInt(0, family)))
	}
	// What is loaded is run and read; nothing is loaded or attached.
	for _, command := range []uint32{
		unix.BPF_MAP_LOOKUP_ELEM, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_MAP_GET_NEXT_KEY,
		unix.BPF_MAP_LOOKUP_BATCH, unix.BPF_MAP_LOOKUP_AND_DELETE_BATCH, unix.BPF_MAP_UPDATE_BATCH, unix.BPF_MAP_DELETE_BATCH,
		unix.BPF_PROG_TEST_RUN, unix.BPF_ITER_CREATE, unix.BPF_OBJ_GET_INFO_BY_FD,
	} {
		calls = append(calls, when(unix.SYS_BPF, isInt(0, command)))
	}
	return calls
}

// Where struct seccomp_data has what: both architectures are little-endian.
const (
	atNumber       = 0
	atArchitecture = 4
	atArguments    = 16
)

const (
	allow   = unix.SECCOMP_RET_ALLOW
	refuse  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	unknown = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// program is the filter: it allows those system calls, and has others fail with
// EPERM.
func program(openHow uintptr) []bpf.Instruction {
	number := bpf.LoadAbsolute{Off: atNumber, Size: 4}
	filter := []bpf.Instruction{
		bpf.LoadAbsolute{Off: atArchitecture, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: architecture, SkipTrue: 1},
		bpf.RetConstant{Val: refuse},
		number,
		// The same numbers with another word size, on amd64.
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: x32, SkipTrue: 1},
		bpf.RetConstant{Val: refuse},
		// Its flags are in memory. C's library takes clone where there is none.
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_CLONE3, SkipTrue: 1},
		bpf.RetConstant{Val: unknown},
	}
	for _, numbers := range [][]uint32{plain, plainHere} {
		for _, n := range numbers {
			filter = append(filter,
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: n, SkipTrue: 1},
				bpf.RetConstant{Val: allow})
		}
	}
	for _, c := range conditional(openHow) {
		// Each half of an argument: load, mask, compare.
		const half = 3
		body := uint8(2*half*len(c.conditions) + 1)
		filter = append(filter, number, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: c.number, SkipTrue: body})
		for _, c := range c.conditions {
			for shift := range uint32(2) {
				body -= half
				filter = append(filter,
					bpf.LoadAbsolute{Off: atArguments + 8*c.argument + 4*shift, Size: 4},
					bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: uint32(c.mask >> (32 * shift))},
					bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(c.value >> (32 * shift)), SkipTrue: body})
			}
		}
		filter = append(filter, bpf.RetConstant{Val: allow})
	}
	return append(filter, bpf.RetConstant{Val: refuse})
}

// filter puts the filter in force in all threads.
func filter(openHow uintptr) error {
	assembled, err := bpf.Assemble(program(openHow))
	if err != nil {
		return err
	}
	raw := make([]unix.SockFilter, len(assembled))
	for i, in := range assembled {
		raw[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	p := unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]}
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&p)))
	runtime.KeepAlive(&p)
	switch {
	case errno != 0:
		return errno
	case tid != 0:
		return fmt.Errorf("thread %d has one of its own", tid)
	}
	return nil
}
