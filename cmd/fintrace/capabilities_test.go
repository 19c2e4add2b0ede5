// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// capabilityNumbers are those that make a difference to a command.
var capabilityNumbers = map[string]int{
	"CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE,
	"CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE,
	"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
}

// Users who are not root: one who runs fintrace, and one who runs HAProxy.
const (
	nobody   = 65534
	somebody = 4242
)

// A lack is a row of the table of deploy/README.md: without some capabilities,
// and all the others, a command says this.
type lack struct {
	without, commands, says []string
}

func lacks(t *testing.T) (rows []lack) {
	t.Helper()
	text, err := os.ReadFile("../../deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "| without | command | what is lost | it says |\n|---|---|---|---|\n")
	if !found {
		t.Fatal("there is no such table")
	}
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(line, "|\n"), " | ")
		if len(cells) != 4 {
			break
		}
		var says []string
		for _, quoted := range regexp.MustCompile("``?[^`]+(`[^`]+`[^`]+``)?`?").FindAllString(cells[3], -1) {
			says = append(says, strings.TrimSpace(strings.Trim(quoted, "`")))
		}
		rows = append(rows, lack{strings.Fields(strings.ReplaceAll(cells[0], ",", "")), strings.Fields(strings.ReplaceAll(cells[1], ",", "")), says})
	}
	return rows
}

// TestCapabilities runs each command without what the table says, as an ordinary
// user, and once with all of it.
func TestCapabilities(t *testing.T) {
	kerneltest.Require(t)
	haproxytest.System(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	all := holdSome(t, ns, 3)
	own, err := connected() // in the namespace of all these commands
	if err != nil {
		t.Fatal(err)
	}
	defer own.close()
	if err := own.shutdown(); err != nil {
		t.Fatal(err)
	}
	foreignHAProxy(t, ns)
	holder := fmt.Sprintf("[%d]", os.Getpid())
	commands := map[string][]string{
		"list": {"list"}, "trace": {"trace", "--duration", "300ms"}, "diagnose": {"diagnose", "--duration", "100ms", "-o", "json"},
		"check": {"check"}, "daemon": {"daemon", "--config", ordinary(t)}, "demo": {"demo", "--duration", "20s"},
	}
	rows := lacks(t)
	if len(rows) < 8 {
		t.Fatalf("the table has %d rows", len(rows))
	}
	anything := map[string][]string{} // that a command says without something
	for _, row := range rows {
		for _, command := range row.commands {
			anything[command] = append(anything[command], row.says...)
			t.Run(command+" without "+strings.Join(row.without, " "), func(t *testing.T) {
				given := maps.Clone(capabilityNumbers)
				for _, name := range row.without {
					if _, known := given[name]; !known {
						t.Fatalf("%s is not known to this test", name)
					}
					delete(given, name)
				}
				said := runWith(t, given, commands[command])
				for _, want := range row.says {
					if !strings.Contains(said, want) {
						t.Errorf("it does not say %q:\n%s", want, said)
					}
				}
				if command == "list" && !slices.Contains(row.without, "CAP_BPF") && !strings.Contains(said, holder) {
					t.Errorf("of the connections of %s not one is there:\n%s", holder, said)
				}
				if command == "daemon" && !slices.Contains(row.says, "no permission to use BPF") &&
					!(strings.Contains(said, "msg=confined") && strings.Contains(said, "missing=[]") && strings.Contains(said, "msg=watching")) {
					t.Errorf("it does not watch:\n%s", said)
				}
			})
		}
	}
	for command, says := range anything {
		t.Run(command+" with all", func(t *testing.T) {
			said := runWith(t, capabilityNumbers, commands[command])
			for _, line := range says {
				if strings.Contains(said, line) {
					t.Errorf("it says %q:\n%s", line, said)
				}
			}
			if command != "list" {
				return
			}
			for _, h := range append(all, own) {
				// Other tests have some of this process too.
				row := regexp.MustCompile(fmt.Sprintf(`%s +%s .*%s`, h.subject.LocalAddr(), h.subject.RemoteAddr(), regexp.QuoteMeta(holder)))
				if !row.MatchString(said) {
					t.Errorf("%s %s of %s is not there:\n%s", h.subject.LocalAddr(), h.subject.RemoteAddr(), holder, said)
				}
			}
		})
	}
}

// foreignHAProxy starts an HAProxy in a namespace whose configuration and runtime
// socket are its user's alone.
func foreignHAProxy(t *testing.T, ns *kerneltest.Namespace) {
	t.Helper()
	dir, err := os.MkdirTemp("", "haproxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config := filepath.Join(dir, "haproxy.cfg")
	text := fmt.Sprintf(`global
    stats socket %s/stats mode 600
defaults
    mode tcp
    timeout client 10s
    timeout client-fin 1s
    timeout server 10s
    timeout connect 1s
frontend foreign
    maxconn 10
    bind 127.0.0.1:8443
`, dir)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o600), os.Chown(config, somebody, somebody), os.Chown(dir, somebody, somebody)); err != nil {
		t.Fatal(err)
	}
	h := exec.Command("nsenter", "--net="+ns.Path(), "setpriv", fmt.Sprintf("--reuid=%d", somebody), fmt.Sprintf("--regid=%d", somebody),
		"--clear-groups", "haproxy", "-db", "-f", config)
	var said strings.Builder
	h.Stdout, h.Stderr = &said, &said
	h.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := h.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Process.Kill(); h.Wait() })
	if err := await("HAProxy's socket", func() bool {
		_, err := os.Stat(filepath.Join(dir, "stats"))
		return err == nil
	}); err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
}

// runWith runs fintrace as nobody with these capabilities and no others, and
// returns what it says, in one line. Its daemon and demo are ended once they work.
func runWith(t *testing.T, given map[string]int, args []string) string {
	t.Helper()
	mask := uint64(0)
	for _, number := range given {
		mask |= 1 << number
	}
	for {
		cmd := exec.Command("unprivileged", args...)
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", capabilitiesEnv, mask))
		// Where the machine is too busy to look, it is not known what it would see.
		if said := runUntilItWorks(t, cmd); !strings.Contains(said, "took too long") {
			return said
		}
	}
}

// ordinary is the path of a configuration for a daemon that is in nobody's way.
func ordinary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fintrace")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "fintrace.yaml")
	text := "alerts: {state_file: \"\"}\nweb: {listen: []}\nlog: {format: text}\n"
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	return path
}

func runUntilItWorks(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	var said []string
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		said = append(said, strings.Fields(lines.Text())...)
		if strings.Contains(lines.Text(), "msg=watching") || strings.Contains(lines.Text(), "fintrace trace") {
			cmd.Process.Signal(unix.SIGTERM)
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	return strings.Join(said, " ")
}

// TestFileCapabilities runs fintrace as an ordinary user whose capabilities come
// from the file.
func TestFileCapabilities(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	holdSome(t, ns, 3)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "fintrace")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "fintrace")
	program, err := os.ReadFile(self)
	if err := errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(file, program, 0o755)); err != nil {
		t.Fatal(err)
	}
	// struct vfs_cap_data of linux/capability.h, as setcap(8) writes it: =ep.
	const revision2, effective = 0x02000000, 1
	mask := uint64(1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH)
	value := binary.LittleEndian.AppendUint32(nil, revision2|effective)
	for shift := 0; shift < 64; shift += 32 {
		value = binary.LittleEndian.AppendUint32(value, uint32(mask>>shift))
		value = binary.LittleEndian.AppendUint32(value, 0)
	}
	if err := unix.Setxattr(file, "security.capability", value, 0); err != nil {
		t.Fatal(err)
	}
	runs := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("setpriv", append([]string{fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody), "--clear-groups",
			"--inh-caps=-all", file}, args...)...)
		return runUntilItWorks(t, cmd)
	}
	said := runs("list", "--netns", inode(ns))
	if strings.Count(said, fmt.Sprintf("[%d]", os.Getpid())) != 3 || strings.Contains(said, "no permission") {
		t.Errorf("the connections of root's process in another network namespace are not there:\n%s", said)
	}
	if said := runs("trace", "--netns", inode(ns), "--duration", "300ms"); !strings.Contains(said, "In FIN_WAIT2 already: 3 ") || strings.Contains(said, "no permission") {
		t.Errorf("trace does not work:\n%s", said)
	}
	said = runs("daemon", "--config", ordinary(t))
	if !strings.Contains(said, `msg=confined capabilities="[CAP_DAC_READ_SEARCH CAP_SYS_PTRACE CAP_SYS_ADMIN]" system_calls=filtered missing=[]`) ||
		!strings.Contains(said, "msg=watching") || strings.Contains(said, "no permission") {
		t.Errorf("the daemon does not work:\n%s", said)
	}
}
