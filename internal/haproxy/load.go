// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// How much is read of one set of files. HAProxy itself has no such limits.
const (
	maxSourceBytes = 32 << 20
	maxDirEntries  = 10_000
)

// Load reads the files that -f names, in HAProxy's order: as given, and of a
// directory those that end in .cfg, sorted. Root is a directory that stands
// for /, with all symbolic links resolved in it; "" is ours. Relative paths
// begin at dir. Sources are named as HAProxy names them.
func Load(root, dir string, paths []string) ([]Source, error) {
	budget := int64(maxSourceBytes)
	return view{root, dir}.load(paths, &budget)
}

// load is Load with a number of bytes that it may read, and takes from it.
func (v view) load(paths []string, budget *int64) ([]Source, error) {
	var sources []Source
	for _, name := range paths {
		f, info, err := v.open(name)
		if err != nil {
			return nil, unreadable(name, err)
		}
		if !info.IsDir() {
			s, err := readSource(f, info, name, budget)
			f.Close()
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
			continue
		}
		entries, err := f.ReadDir(maxDirEntries)
		f.Close()
		if err != nil && err != io.EOF {
			return nil, unreadable(name, err)
		}
		if len(entries) == maxDirEntries {
			return nil, unreadable(name, fmt.Errorf("there are %d files or more in it", maxDirEntries))
		}
		slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
		for _, e := range entries {
			// As HAProxy looks for it: a.cfg.cfg is not one.
			_, after, found := strings.Cut(e.Name(), ".cfg")
			if !found || after != "" || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			file := name + "/" + e.Name()
			if at, info, err := v.find(file); err == nil {
				at.Close()
				if !info.Mode().IsRegular() {
					continue
				}
			}
			f, info, err := v.open(file)
			if err != nil {
				return nil, unreadable(file, err)
			}
			s, err := readSource(f, info, file, budget)
			f.Close()
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
		}
	}
	return sources, nil
}

// readSource reads no more of a regular file than its size: a file of procfs
// has none, and reading some of those waits, or takes what others wait for.
func readSource(f *os.File, info fs.FileInfo, name string, budget *int64) (Source, error) {
	s := Source{Name: name}
	if info.Size() > *budget {
		return s, unreadable(name, errTooLarge)
	}
	limit := *budget + 1
	if info.Mode().IsRegular() {
		s.Modified = info.ModTime()
		limit = info.Size()
	}
	text, err := io.ReadAll(io.LimitReader(f, limit))
	switch {
	case err != nil:
		return s, unreadable(name, err)
	case int64(len(text)) > *budget:
		return s, unreadable(name, errTooLarge)
	}
	*budget -= int64(len(text))
	s.Text = text
	return s, nil
}

var errTooLarge = fmt.Errorf("it is too large to be a configuration: more than %d MB", maxSourceBytes>>20)

func unreadable(name string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return &Error{Pos{File: name}, "permission denied: run as root, or as a user who may read it"}
	}
	if errors.Is(err, syscall.ENOSYS) {
		return &Error{Pos{File: name}, "cannot be read in another root: openat2(2) is missing, which came with Linux 5.6"}
	}
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	return &Error{Pos{File: name}, fmt.Sprintf("cannot be read: %v", err)}
}
