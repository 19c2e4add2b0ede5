// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// An archive is an initramfs in the making: a cpio archive as the kernel reads
// it (Documentation/driver-api/early-userspace/buffer-format.rst, "newc"). The
// first error sticks.
type archive struct {
	w    *bufio.Writer
	ino  int
	made map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), made: map[string]bool{".": true}}
}

// entry writes one file; its directories come before it.
func (a *archive) entry(name string, mode uint32, size int64, data io.Reader) {
	if dir := filepath.Dir(name); !a.made[dir] {
		a.dir(dir)
	}
	a.raw(name, mode, size, data)
}

func (a *archive) raw(name string, mode uint32, size int64, data io.Reader) {
	if a.err != nil {
		return
	}
	a.ino++
	const owner, links, time, device, check = 0, 1, 0, 0, 0
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", a.ino, mode, owner, owner,
		links, time, size, device, device, device, device, len(name)+1, check, name)
	if _, a.err = a.w.WriteString(header); a.err != nil {
		return
	}
	a.pad(int64(len(header)))
	if size == 0 {
		return
	}
	n, err := io.Copy(a.w, io.LimitReader(data, size))
	if err == nil && n != size {
		err = fmt.Errorf("%s: %d bytes where there were %d", name, n, size)
	}
	a.err = err
	a.pad(size)
}

// pad makes what was written a multiple of 4 bytes.
func (a *archive) pad(written int64) {
	if a.err == nil {
		_, a.err = a.w.Write(make([]byte, -written&3))
	}
}

func (a *archive) dir(name string) {
	if !a.made[name] {
		a.made[name] = true
		a.entry(name, 0o040755, 0, nil)
	}
}

// copy puts a file of the host into the archive.
func (a *archive) copy(name, from string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	a.entry(name, 0o100000|uint32(st.Mode().Perm()), st.Size(), f)
}

// tree puts what is below a directory of the host into one of the archive.
func (a *archive) tree(into, from string) {
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		name := filepath.Join(into, below)
		switch {
		case d.IsDir():
			a.dir(name)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			a.link(name, target)
		case d.Type().IsRegular():
			a.copy(name, path)
		}
		return a.err
	})
	if a.err == nil {
		a.err = err
	}
}

func (a *archive) link(name, target string) {
	a.entry(name, 0o120777, int64(len(target)), strings.NewReader(target))
}

func (a *archive) file(name string, data []byte) {
	a.entry(name, 0o100644, int64(len(data)), bytes.NewReader(data))
}

// close ends the archive.
func (a *archive) close() error {
	a.raw("TRAILER!!!", 0, 0, nil)
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}
