// SPDX-License-Identifier: Apache-2.0

// Command bench measures fintrace beside the tools that people use today, in
// one run and under the same load, against the budgets of its design. It must
// run as root, at the top of the repository.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 1 && !strings.HasPrefix(args[0], "-") {
		return runPart(args[0])
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	output := flags.String("o", "", "write the tables to this file too, as Markdown")
	binary := flags.String("fintrace", "", "measure this binary (default: built from the sources here)")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("BPF programs and network namespaces need root: try sudo")
	}
	if *binary == "" {
		dir, err := os.MkdirTemp("", "bench")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		*binary = filepath.Join(dir, "fintrace")
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", *binary, "./cmd/fintrace")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build fintrace: %w", err)
		}
	}
	f, err := measure(ctx, *binary)
	if err != nil {
		return err
	}
	text := f.markdown()
	fmt.Print("\n" + text)
	if *output == "" {
		return nil
	}
	return os.WriteFile(*output, []byte(text), 0o644)
}

// measure takes all figures, saying on stderr what it is at.
func measure(ctx context.Context, binary string) (*figures, error) {
	began := time.Now()
	f := &figures{when: began, kernel: kernelRelease(), cpu: cpuName(), versions: versions(ctx)}
	steps := []struct {
		what string
		run  func() error
	}{
		{"kernel time per transition", func() (err error) {
			f.costs, err = measureKernel(ctx, binary)
			return err
		}},
		{"userspace CPU", func() (err error) {
			f.users, err = measureUserspace(ctx, binary)
			return err
		}},
		{"connections per second", func() (err error) {
			f.rates, f.losses, err = measureRate(ctx, binary)
			return err
		}},
		{"snapshot", func() (err error) {
			f.snapshot, err = inNamespace[snapshotTimes](ctx, "snapshot", snapshotRequest{binary, snapshotSockets})
			return err
		}},
		{"table", func() (err error) {
			f.table, err = inNamespace[tableCost](ctx, "memory", memoryRequest{memoryConnections})
			return err
		}},
		{"notices", func() (err error) {
			f.latencies, err = inNamespace[latencies](ctx, "latency", latencyRequest{binary})
			return err
		}},
	}
	for n, s := range steps {
		fmt.Fprintf(os.Stderr, "%d/%d %s\n", n+1, len(steps), s.what)
		if err := s.run(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.what, err)
		}
	}
	f.took = time.Since(began)
	return f, nil
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "of unknown release"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// versions are those of the tools that say theirs.
func versions(ctx context.Context) []string {
	found := []string{"libbpf-tools tcpstates"}
	for _, command := range [][]string{{"bpftrace", "--version"}, {"ss", "-V"}} {
		out, err := exec.CommandContext(ctx, command[0], command[1:]...).Output()
		if err != nil {
			found = append(found, command[0]+" of unknown version")
			continue
		}
		found = append(found, firstLine(string(out)))
	}
	return found
}
