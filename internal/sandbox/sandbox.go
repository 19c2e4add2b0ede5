// SPDX-License-Identifier: Apache-2.0

// Package sandbox takes from the process what it needs no longer: capabilities,
// the way to new privileges, and system calls, in all threads and for good.
package sandbox

import (
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Needs is what the process goes on to do, beside what is the same for all.
type Needs struct {
	// Capabilities that it keeps, of those that it has (unix.CAP_...).
	Capabilities []int
	// Spare are those of them that it keeps only where Works fails without them.
	Spare []int
	Works func() error
	// OpenHow is where the struct open_how is with which all files are opened by
	// openat2(2), which must be in read-only memory.
	OpenHow uintptr
}

// Protection is what is in force.
type Protection struct {
	Capabilities []string // that are left, as capabilities(7) names them
	Filtered     bool     // system calls are
	Missing      []string // what could not be had, each with why
}

// Confine takes all but what is needed. It is for a process whose threads wait
// for no file: each of them has to take part. What cannot be had is Missing, and
// the rest is in force nevertheless.
func Confine(n Needs) (p Protection) {
	missing := func(what string, err error) {
		p.Missing = append(p.Missing, what+": "+err.Error())
	}
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		missing("no new privileges", errno)
	}
	if err := reduce(n); err != nil {
		missing("fewer capabilities", err)
	}
	if held, err := capabilities(); err != nil {
		missing("the capabilities that are left", err)
	} else {
		p.Capabilities = held.names()
	}
	if err := filter(n.OpenHow); err != nil {
		missing("a filter of system calls", err)
	} else {
		p.Filtered = true
	}
	return p
}

// set is a set of capabilities.
type set uint64

func setOf(numbers []int) (s set) {
	for _, n := range numbers {
		s |= 1 << n
	}
	return s
}

// names are as capabilities(7) has them.
func (s set) names() (names []string) {
	for n, name := range capabilityNames {
		if s&(1<<n) != 0 {
			names = append(names, name)
		}
	}
	for n := len(capabilityNames); n < 64; n++ {
		if s&(1<<n) != 0 {
			names = append(names, fmt.Sprintf("capability %d", n))
		}
	}
	return names
}

// capabilityNames are in the order of include/uapi/linux/capability.h.
var capabilityNames = strings.Fields(`
	CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID CAP_SETUID
	CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW
	CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT
	CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD
	CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG
	CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)

// capabilities are the permitted ones of this thread; those of a process are
// the same in all of its threads.
func capabilities() (set, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, err
	}
	return set(data[0].Permitted) | set(data[1].Permitted)<<32, nil
}

// reduce leaves the process the capabilities that it needs of those that it has.
func reduce(n Needs) error {
	held, err := capabilities()
	if err != nil {
		return err
	}
	keep := held & setOf(n.Capabilities)
	if spare := keep & setOf(n.Spare); spare != 0 && worksWith(keep&^spare, held, n.Works) {
		keep &^= spare
	}
	// What a file might give that is executed. Without CAP_SETPCAP it stays, and
	// is of no use: there are no new privileges, and nothing is executed.
	for c := range len(capabilityNames) {
		if keep&(1<<c) == 0 && held&(1<<unix.CAP_SETPCAP) != 0 {
			psx.Syscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0, 0)
		}
	}
	psx.Syscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0)
	header, data := request(keep, keep)
	_, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0)
	runtime.KeepAlive(header)
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}

// request is what capset(2) takes, with none to inherit.
func request(effective, permitted set) (*unix.CapUserHeader, *[2]unix.CapUserData) {
	return &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &[2]unix.CapUserData{
		{Effective: uint32(effective), Permitted: uint32(permitted)},
		{Effective: uint32(effective >> 32), Permitted: uint32(permitted >> 32)},
	}
}

// worksWith tries something on a thread on which, meanwhile, only some of the
// capabilities that are held are in effect.
func worksWith(effective, held set, works func() error) (does bool) {
	runtime.LockOSThread()
	header, data := request(effective, held)
	does = unix.Capset(header, &data[0]) == nil && works() == nil
	header, data = request(held, held)
	if unix.Capset(header, &data[0]) == nil { // which may always be had again
		runtime.UnlockOSThread()
	}
	return does
}
