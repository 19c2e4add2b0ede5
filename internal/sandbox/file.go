// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// door is where the names have to be of a file that a confined process opens for
// writing: the filter compares addresses, as it cannot read what is there.
var door struct {
	sync.Mutex
	file, temporary [unix.PathMax]byte
}

// doorFlags are those with which a file is opened there: a new one.
const doorFlags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC

// ReplaceFile puts a file in the place of another, which only its owner may read:
// there is always the one or the other, whole. In a confined process nothing else
// can open a file for writing, or create, rename or remove one; a socket can be
// bound to a new name.
func ReplaceFile(path string, content []byte) (err error) {
	temporary := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid()))
	defer func() {
		if err != nil {
			err = &fs.PathError{Op: "replace", Path: path, Err: err}
		}
	}()
	door.Lock()
	defer door.Unlock()
	if err := errors.Join(put(&door.file, path), put(&door.temporary, temporary)); err != nil {
		return err
	}
	file, temp := address(&door.file), address(&door.temporary)
	const cwd = -100 // AT_FDCWD
	at := uintptr(cwd & (1<<64 - 1))
	unix.Syscall(unix.SYS_UNLINKAT, at, temp, 0) // of one of that number that was killed
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, at, temp, doorFlags, 0o600, 0, 0)
	if errno != 0 {
		return errno
	}
	f := os.NewFile(fd, temporary)
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		if _, _, errno := unix.Syscall6(unix.SYS_RENAMEAT2, at, temp, at, file, 0, 0); errno != 0 {
			err = errno
		}
	}
	if err != nil {
		unix.Syscall(unix.SYS_UNLINKAT, at, temp, 0)
	}
	return err
}

func address(name *[unix.PathMax]byte) uintptr { return uintptr(unsafe.Pointer(name)) }

// put makes a C string of a path.
func put(name *[unix.PathMax]byte, path string) error {
	if len(path) >= len(name) {
		return unix.ENAMETOOLONG
	}
	name[copy(name[:], path)] = 0
	return nil
}
