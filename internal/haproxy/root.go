// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

// A view is where a process sees files from.
type view struct {
	root string // a directory that is its /; "" is ours, and trusted
	dir  string // where its relative paths begin
}

func (v view) path(name string) string {
	if strings.HasPrefix(name, "/") || v.dir == "" {
		return name
	}
	return v.dir + "/" + name // not cleaned: what is before .. may be a symbolic link
}

// open opens a regular file or a directory for reading. Any user may start a
// process that names any file, in a root of its own making: nothing but those
// two is opened, for opening a device can act on it and a FIFO can hang.
func (v view) open(name string) (*os.File, fs.FileInfo, error) {
	if v.root == "" { // named by whoever runs us, who may well name a pipe
		f, err := os.Open(v.path(name))
		if err != nil {
			return nil, nil, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, nil, err
		}
		return f, info, nil
	}
	at, info, err := v.find(name)
	if err != nil {
		return nil, nil, err
	}
	defer at.Close()
	if !info.Mode().IsRegular() && !info.IsDir() {
		return nil, nil, errors.New("not a regular file")
	}
	f, err := os.OpenFile(handle(at), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	return f, info, nil
}

// find returns a handle on whatever has that name, without opening it.
func (v view) find(name string) (*os.File, fs.FileInfo, error) {
	fd, err := v.resolve(v.path(name))
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// Of linux/openat2.h and fcntl.h, which package syscall stops short of.
const (
	sysOpenat2            = 437 // everywhere that Go runs Linux
	resolveNoMagicLinks   = 0x02
	resolveInRoot         = 0x10
	oPath                 = 0x200000
	maxResolutionsInARace = 16
)

func (v view) resolve(path string) (int, error) {
	const flags = oPath | syscall.O_CLOEXEC
	if v.root == "" {
		return syscall.Open(path, flags, 0)
	}
	root, err := syscall.Open(v.root, flags|syscall.O_DIRECTORY, 0)
	if err != nil {
		return -1, err
	}
	defer syscall.Close(root)
	name, err := syscall.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	for n := 0; ; n++ {
		fd, _, errno := syscall.Syscall6(sysOpenat2, uintptr(root), uintptr(unsafe.Pointer(name)),
			OpenHow(), uintptr(len(openHow)), 0, 0)
		runtime.KeepAlive(name)
		switch {
		case errno == 0:
			return int(fd), nil
		case (errno == syscall.EAGAIN || errno == syscall.EINTR) && n < maxResolutionsInARace: // a rename came between
		default:
			return -1, errno
		}
	}
}

// openHow is the struct open_how of all that is resolved in a root, flags, mode
// and resolve: O_PATH and O_CLOEXEC; 0; RESOLVE_IN_ROOT and RESOLVE_NO_MAGICLINKS.
// As a string it is in read-only memory.
var openHow = "\x00\x00\x28\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00" + "\x12\x00\x00\x00\x00\x00\x00\x00"

// OpenHow is the address of the only struct open_how that openat2(2) is called
// with here, in memory that cannot be written: a filter of system calls, which
// sees addresses alone, can hold the process to it.
func OpenHow() uintptr { return uintptr(unsafe.Pointer(unsafe.StringData(openHow))) }

// handle is a path to an open file, whatever its name has become.
func handle(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
