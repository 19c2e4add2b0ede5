// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A step is one program that runs in the guest.
type step struct {
	Name string   `json:"name"`
	Dir  string   `json:"dir"`
	Argv []string `json:"argv"`
}

// planFile has the steps, as JSON.
const planFile = "/plan.json"

// portEnv names the serial port that the results go to. The kernel gives its
// parameters that it does not know itself to init, as environment.
const portEnv = "fintrace_port"

// What the guest writes on its port: lines of a word and its operands, behind a
// mark that no program prints, and between them what the programs print.
const mark = "\x1e"

// init1 is the guest's /init: it makes the system ready, runs the steps, and
// turns it off. What it says goes to the port.
func init1() {
	err := setUp()
	port, portErr := openPort("/dev/" + os.Getenv(portEnv))
	if portErr != nil {
		// Nobody would read it but on the console.
		fmt.Println("no port for the results:", portErr)
	} else {
		fmt.Fprintf(port, "%sup\n", mark)
		if err == nil {
			err = runSteps(port)
		}
		if err != nil {
			fmt.Fprintf(port, "%serror %v\n", mark, err)
		}
		fmt.Fprintf(port, "%sdown\n", mark)
		// Until the last byte has left: the port ends with the system.
		_ = unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, 1)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func setUp() error {
	for _, m := range []struct{ kind, on, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", "ptmxmode=0666"},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/tmp", "mode=1777"},
		{"tmpfs", "/run", ""},
		{"bpf", "/sys/fs/bpf", ""},
		{"tracefs", "/sys/kernel/tracing", ""},
		{"securityfs", "/sys/kernel/security", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := os.MkdirAll(m.on, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := unix.Mount(m.kind, m.on, m.kind, 0, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.on, err)
		}
	}
	for name, value := range map[string]string{"PATH": "/bin:/usr/bin:/usr/sbin", "HOME": "/tmp", "TMPDIR": "/tmp"} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	for _, name := range []string{"inet_diag", "tcp_diag", "veth"} {
		if err := insertModule(filepath.Join("/modules", name+".ko")); err != nil {
			return err
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("set lo up: %w: %s", err, out)
	}
	return nil
}

// insertModule is for one that may be part of the kernel: then there is no file.
func insertModule(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("insert %s: %w", path, err)
	}
	return nil
}

// openPort opens a serial port that passes on each byte as it is.
func openPort(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

func runSteps(port *os.File) error {
	text, err := os.ReadFile(planFile)
	if err != nil {
		return err
	}
	var steps []step
	if err := json.Unmarshal(text, &steps); err != nil {
		return fmt.Errorf("%s: %w", planFile, err)
	}
	for _, s := range steps {
		fmt.Fprintf(port, "%srun %s\n", mark, s.Name)
		began := time.Now()
		code, err := runStep(port, s)
		if err != nil {
			fmt.Fprintln(port, err)
		}
		fmt.Fprintf(port, "%sexit %s %d %.1f\n", mark, s.Name, code, time.Since(began).Seconds())
	}
	return nil
}

func runStep(port *os.File, s step) (code int, err error) {
	cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
	cmd.Dir = s.Dir
	// As a pipe has it, and not as a terminal, which the port is.
	pipe := struct{ io.Writer }{port}
	cmd.Stdout, cmd.Stderr = pipe, pipe
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	if err != nil {
		return 127, err
	}
	return 0, nil
}
