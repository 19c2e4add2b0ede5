// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const (
	// bootTries is how often a guest is booted that never reaches user space:
	// emulation fails so about once in a hundred boots. Once there, it counts.
	bootTries = 3
	// upWithin is how long that may take; it is 10 s on an idle machine.
	upWithin = 5 * time.Minute
	// doneWithin is how long all of a guest's steps may take: they take some two
	// minutes of a processor.
	doneWithin = 20 * time.Minute
)

// test boots a kernel and runs the steps in it.
func test(ctx context.Context, k kernel, programs string, steps []step) (*result, error) {
	initrd, err := pack(k, programs, steps)
	if err != nil {
		return nil, err
	}
	base := filepath.Join(dist, "out", k.name)
	if err := os.MkdirAll(filepath.Dir(base), 0o755); err != nil {
		return nil, err
	}
	image := base + ".initramfs"
	if err := os.WriteFile(image, initrd, 0o644); err != nil {
		return nil, err
	}
	defer os.Remove(image)
	for try := 1; ; try++ {
		out, why, err := boot(ctx, k, image, base+".console", base+".out")
		if err != nil {
			return nil, err
		}
		if bytes.Contains(out, []byte(mark+"up\n")) || try == bootTries {
			return read(k, steps, out, why), nil
		}
		fmt.Fprintf(os.Stderr, "%s: did not reach user space: %s; again\n", k.name, why)
	}
}

// boot runs one guest to its end and returns what it wrote on its port. why says
// how it was ended, "" if it turned itself off.
func boot(ctx context.Context, k kernel, initrd, console, port string) (out []byte, why string, err error) {
	for _, file := range []string{console, port} {
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			return nil, "", err
		}
	}
	args := []string{
		// One processor in one thread: multi-threaded emulation is not reliable.
		"-accel", "tcg,thread=single", "-smp", "1", "-m", "1G",
		// The guest's clocks count its instructions, a nanosecond each, and leap
		// to the next timer while it is idle: it is as fast as a real machine by
		// its own time, however busy this one is, and waits for nothing.
		"-icount", "shift=0,sleep=off",
		"-nodefaults", "-nic", "none", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(k.dir(), "vmlinuz"), "-initrd", initrd,
	}
	parameters := "panic=-1 quiet loglevel=4 mitigations=off cryptomgr.notests=1 no_timer_check "
	program := "qemu-system-x86_64"
	if k.arch() == "arm64" {
		program = "qemu-system-aarch64"
		args = append(args, "-M", "virt", "-cpu", "cortex-a72", "-serial", "file:"+console,
			"-chardev", "file,id=port,path="+port, "-device", "pci-serial,chardev=port")
		parameters += "console=ttyAMA0 " + portEnv + "=ttyS0"
	} else {
		args = append(args, "-cpu", "max", "-serial", "file:"+console, "-serial", "file:"+port)
		parameters += "console=ttyS0 " + portEnv + "=ttyS1"
	}
	ctx, cancel := context.WithTimeoutCause(ctx, doneWithin, fmt.Errorf("it was not done within %s", doneWithin))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	cmd := exec.CommandContext(ctx, program, append(args, "-append", parameters)...)
	var messages bytes.Buffer
	cmd.Stderr = &messages
	if err := cmd.Start(); err != nil {
		return nil, "", fmt.Errorf("%w (Debian: apt install qemu-system-x86 qemu-system-arm)", err)
	}
	notUp := time.AfterFunc(upWithin, func() {
		if out, err := os.ReadFile(port); err != nil || len(out) == 0 {
			fail(fmt.Errorf("it was not up within %s", upWithin))
		}
	})
	defer notUp.Stop()
	if err := cmd.Wait(); err != nil {
		why = err.Error()
		if text := bytes.TrimSpace(messages.Bytes()); len(text) > 0 {
			why = string(text)
		}
		if cause := context.Cause(ctx); cause != nil {
			if errors.Is(cause, context.Canceled) {
				return nil, "", cause
			}
			why = cause.Error()
		}
	}
	out, err = os.ReadFile(port)
	return out, why, err
}
