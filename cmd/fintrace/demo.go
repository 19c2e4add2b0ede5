// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	// demoFinTimeout is net.ipv4.tcp_fin_timeout of the demo's namespace.
	demoFinTimeout = 5 * time.Second
	// demoTail is left after the recovery for the last minisocks to time out.
	demoTail = 8 * time.Second
	// demoShortest still lets the first limits pass before the recovery.
	demoShortest = 20 * time.Second
	// demoMost keeps descriptors and ports within every default.
	demoMost = 5000
)

// demo is one run of it. It consists of this process and its parts, which are
// processes too, each of which ends when the one that started it does, however
// that ends: demo-client is in a network namespace of its own, makes the
// listening sockets there, and starts demo-proxy and demo-backend.
type demo struct {
	env      env
	duration time.Duration
	clients  int
}

func demoCommand(e env) *cobra.Command {
	d := demo{env: e}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Make a pile-up to watch, in a network namespace of its own",
		Long: `Makes connections pile up in FIN_WAIT2, to be watched with fintrace trace and
list from another terminal: silent clients, and a small TCP proxy that waits for
ever for them to close. It all happens on the loopback of a network namespace of
its own, and is gone with the command, however that ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	cmd.PersistentFlags().DurationVar(&d.duration, "duration", 45*time.Second, "how long it lasts, at least "+demoShortest.String())
	cmd.PersistentFlags().IntVar(&d.clients, "clients", 40, "how many silent clients pile up")
	cmd.AddCommand(&cobra.Command{
		Use:    "part NAME",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(cmd *cobra.Command, args []string) error { return d.runPart(cmd.Context(), args[0]) },
	})
	return cmd
}

func (d *demo) run(ctx context.Context) error {
	if d.duration < demoShortest {
		return fmt.Errorf("--duration is at least %s, for limits to pass in that time", demoShortest)
	}
	if d.clients < 1 || d.clients > demoMost {
		return fmt.Errorf("--clients is from 1 to %d", demoMost)
	}
	clients := d.part(ctx, "client")
	clients.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	// Ctrl-C on a terminal is for this process, which ends the others in order.
	clients.SysProcAttr.Setpgid = true
	clients.Cancel = func() error { return clients.Process.Signal(syscall.SIGTERM) }
	clients.WaitDelay = 5 * time.Second
	// Through a pipe, which is at its end only when no part has it any more.
	clients.Stdout = struct{ io.Writer }{d.env.stdout}
	var stderr bytes.Buffer
	clients.Stderr = &stderr
	err := supervise(ctx, clients)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("no permission to make a network namespace: run as root, for example with sudo (%w)", err)
	}
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		return errors.New(strings.TrimPrefix(said, "fintrace: "))
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(d.env.stdout, "The demo is over: its namespace, processes and connections are gone.")
	return err
}

// part is the command that runs a part.
func (d *demo) part(ctx context.Context, name string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "demo", "part", name,
		"--duration", d.duration.String(), "--clients", strconv.Itoa(d.clients))
	cmd.Args[0] = os.Args[0] // for the commands that it tells the user
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// supervise runs a part until it ends or ctx does; the latter is no error.
func supervise(ctx context.Context, part *exec.Cmd) error {
	// Pdeathsig is sent when the thread dies that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := part.Start()
	for _, f := range part.ExtraFiles {
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = part.Wait()
	}
	if ctx.Err() != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	return err
}

func (d *demo) runPart(ctx context.Context, name string) error {
	// The process's name, which is what fintrace and ss show.
	if err := os.WriteFile("/proc/self/comm", []byte("demo-"+name), 0); err != nil {
		return err
	}
	// A write that nobody reads is an error to tell of.
	signal.Ignore(syscall.SIGPIPE)
	switch name {
	case "client":
		return d.runClients(ctx)
	case "proxy":
		return runProxy(ctx)
	case "backend":
		return runBackend()
	}
	return fmt.Errorf("the demo has no part %q", name)
}
