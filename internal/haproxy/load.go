// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Load reads the files that -f names, in HAProxy's order: as given, and of a
// directory those that end in .cfg, sorted. Root is put before every path, ""
// for none; relative paths begin at dir. Sources are named as HAProxy names them.
func Load(root, dir string, paths []string) ([]Source, error) {
	var sources []Source
	add := func(name string) error {
		text, err := os.ReadFile(inside(root, dir, name))
		if err != nil {
			return unreadable(name, err)
		}
		sources = append(sources, Source{Name: name, Text: text})
		return nil
	}
	for _, name := range paths {
		info, err := os.Stat(inside(root, dir, name))
		if err != nil {
			return nil, unreadable(name, err)
		}
		if !info.IsDir() {
			if err := add(name); err != nil {
				return nil, err
			}
			continue
		}
		entries, err := os.ReadDir(inside(root, dir, name))
		if err != nil {
			return nil, unreadable(name, err)
		}
		for _, e := range entries { // sorted
			// As HAProxy looks for it: a.cfg.cfg is not one.
			_, after, found := strings.Cut(e.Name(), ".cfg")
			file := name + "/" + e.Name()
			if !found || after != "" || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			if info, err := os.Stat(inside(root, dir, file)); err != nil || !info.Mode().IsRegular() {
				continue
			}
			if err := add(file); err != nil {
				return nil, err
			}
		}
	}
	return sources, nil
}

func inside(root, dir, name string) string {
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	return filepath.Join(root, name)
}

func unreadable(name string, err error) error {
	if os.IsPermission(err) {
		return &Error{Pos{File: name}, "permission denied: run as root, or as a user who may read it"}
	}
	if pathError, ok := err.(*os.PathError); ok {
		err = pathError.Err
	}
	return &Error{Pos{File: name}, fmt.Sprintf("cannot be read: %v", err)}
}
