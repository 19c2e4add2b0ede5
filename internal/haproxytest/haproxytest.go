// SPDX-License-Identifier: Apache-2.0

// Package haproxytest runs the real HAProxy in tests: the system's, and other
// versions that internal/haproxytest/fetch has put beside it.
package haproxytest

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// required names the variable that makes a version that is not there a failure.
const required = "FINTRACE_REQUIRE_KERNEL_TESTS"

// A Version is a HAProxy that can be run.
type Version struct {
	Name         string // "2.6"
	Text         string // "2.6.12-1+deb12u4"
	Major, Minor int
	Root         string // its root directory, "" for the system's own
}

func (v Version) String() string { return v.Name }

// AtLeast says whether it is that version or a later one.
func (v Version) AtLeast(major, minor int) bool {
	return cmp.Or(cmp.Compare(v.Major, major), cmp.Compare(v.Minor, minor)) >= 0
}

// suites are what fetch fetches; a missing one may be a failure.
var suites = []struct {
	name     string
	optional bool
}{{name: "bullseye"}, {name: "trixie"}, {name: "sid"}, {name: "experimental", optional: true}}

// found are the versions that there are, and what is said of those that are not.
var found = sync.OnceValues(func() (versions []Version, missing []string) {
	add := func(root, absent string) {
		v := Version{Root: root}
		switch err := v.identify(); {
		case errors.Is(err, fs.ErrNotExist):
			if absent != "" {
				missing = append(missing, absent)
			}
		case err != nil:
			missing = append(missing, err.Error())
		case !slices.ContainsFunc(versions, func(other Version) bool { return other.Name == v.Name }):
			versions = append(versions, v)
		}
	}
	add("", "haproxy is not installed")
	module, err := moduleRoot()
	if err != nil {
		return versions, append(missing, err.Error())
	}
	for _, suite := range suites {
		absent := fmt.Sprintf("there is no HAProxy of Debian's %s: `make haproxies` fetches it", suite.name)
		if suite.optional {
			absent = ""
		}
		add(filepath.Join(module, "dist/haproxy", suite.name), absent)
	}
	slices.SortFunc(versions, func(a, b Version) int {
		return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor))
	})
	return versions, missing
})

// Versions are the versions at hand, oldest first. It says which are missing,
// and with FINTRACE_REQUIRE_KERNEL_TESTS set that fails the test. Without any
// the test is skipped.
func Versions(t testing.TB) []Version {
	t.Helper()
	if os.Geteuid() != 0 {
		unusable(t, "HAProxy is run as root, in its own root directory")
	}
	versions, missing := found()
	for _, text := range missing {
		if os.Getenv(required) != "" {
			t.Errorf("%s is set, but %s", required, text)
		} else {
			t.Log("not run on all versions:", text)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	if len(versions) == 0 {
		unusable(t, "there is no HAProxy")
	}
	return versions
}

func unusable(t testing.TB, why string) {
	t.Helper()
	if os.Getenv(required) != "" {
		t.Fatalf("%s is set, but %s", required, why)
	}
	t.Skip("not run: " + why)
}

// System is the system's own HAProxy; without one the test is skipped, or fails
// with FINTRACE_REQUIRE_KERNEL_TESTS set.
func System(t testing.TB) Version {
	t.Helper()
	v := Version{}
	if err := v.identify(); err != nil {
		unusable(t, err.Error())
	}
	return v
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("the test does not run in the module")
		}
		dir = parent
	}
}

var versionLine = regexp.MustCompile(`^HA-?Proxy version ((\d+)\.(\d+)\S*) `)

func (v *Version) identify() error {
	out, err := v.command("-v").Output()
	if err != nil {
		return fmt.Errorf("haproxy -v in %q: %w", v.Root, err)
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("haproxy -v in %q says no version: %s", v.Root, out)
	}
	v.Text = string(m[1])
	v.Major, _ = strconv.Atoi(string(m[2]))
	v.Minor, _ = strconv.Atoi(string(m[3]))
	v.Name = fmt.Sprintf("%d.%d", v.Major, v.Minor)
	return nil
}

// command is the version's haproxy, which lives in its own root directory.
func (v Version) command(args ...string) *exec.Cmd {
	cmd := exec.Command("/usr/sbin/haproxy", args...)
	// A test that is killed leaves nothing running.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if v.Root != "" {
		cmd.SysProcAttr.Chroot = v.Root
		cmd.Dir = "/"
	}
	return cmd
}

// Inside is a path of the test as the version sees it.
func (v Version) Inside(path string) string {
	return strings.TrimPrefix(path, v.Root)
}

// TempDir makes a directory that the version can see, until the end of the test.
func (v Version) TempDir(t testing.TB) string {
	t.Helper()
	// Not the test's own: the paths of Unix sockets have to be short.
	dir, err := os.MkdirTemp(filepath.Join(v.Root, "/tmp"), "haproxytest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Check says whether HAProxy accepts a configuration (haproxy -c), and what it
// prints.
func (v Version) Check(t testing.TB, config string) (ok bool, output string) {
	t.Helper()
	file, err := os.CreateTemp(filepath.Join(v.Root, "/tmp"), "haproxytest*.cfg")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file.Name())
	_, err = file.WriteString(config)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	return v.CheckFiles(t, v.Inside(file.Name()))
}

// CheckFiles is Check for what is at paths as HAProxy sees them, in their order.
// What makes it crash, as some mistakes do, is not accepted.
func (v Version) CheckFiles(t testing.TB, paths ...string) (ok bool, output string) {
	t.Helper()
	args := []string{"-c"}
	for _, path := range paths {
		args = append(args, "-f", path)
	}
	out, err := v.command(args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("haproxy %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return err == nil, string(bytes.TrimSpace(out))
}
