// SPDX-License-Identifier: Apache-2.0

// Command kernels boots Debian's kernels in QEMU, by emulation where there is
// no KVM, runs the tests on the kernel and fintrace itself in each, and prints
// what works where. It is its own guests' /init too. It must run at the top of
// the repository; kernels and outputs are in dist/kernels.
package main

import (
	"bytes"
	"context"
	"encoding/json"
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

	"golang.org/x/sync/errgroup"
)

func main() {
	if os.Getpid() == 1 && os.Getenv(portEnv) != "" {
		init1()
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

// dist is where kernels are, and what came of them.
const dist = "dist/kernels"

// A kernel is one that fintrace is tested on; internal/kernels/fetch has the
// packages.
type kernel struct {
	name     string   // series-architecture
	lacks    []string // the features that it does not have, as fintrace calls them
	optional bool     // Debian may no longer have it
}

const (
	cookies = "socket cookie in tracing programs"
	walk    = "walk of the socket tables"
	owners  = "owners of sockets by iterator"
	stamps  = "entry stamp of minisocks"
	misses  = "count of skipped events"
)

var kernels = []kernel{
	{name: "5.10-amd64", lacks: []string{cookies, walk, owners, stamps, misses}},
	{name: "6.1-amd64", lacks: []string{walk, stamps}},
	{name: "6.12-amd64", lacks: []string{stamps}},
	{name: "6.18-amd64", optional: true},
	{name: "7-amd64"},
	{name: "6.1-arm64", lacks: []string{walk, stamps}},
	{name: "7-arm64"},
}

func (k kernel) arch() string { return k.name[strings.LastIndexByte(k.name, '-')+1:] }
func (k kernel) dir() string  { return filepath.Join(dist, k.name) }

func (k kernel) release() string {
	text, err := os.ReadFile(filepath.Join(k.dir(), "release"))
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(text))
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("kernels", flag.ContinueOnError)
	only := flags.String("only", "", "comma-separated names of the kernels to boot, such as 5.10-amd64,7-amd64 (default: all)")
	guests := flags.Int("guests", 1, "how many run at a time")
	tests := flags.String("run", "", "run the tests of cmd/fintrace that match, and nothing else")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	if chosen, err = fetch(ctx, chosen); err != nil {
		return err
	}
	built := map[string]string{}
	for _, k := range chosen {
		if arch := k.arch(); built[arch] == "" {
			if built[arch], err = build(ctx, arch); err != nil {
				return err
			}
		}
	}
	results := make([]*result, len(chosen))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(*guests)
	for i, k := range chosen {
		group.Go(func() error {
			began := time.Now()
			r, err := test(ctx, k, built[k.arch()], steps(*tests))
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			results[i] = r
			fmt.Fprintf(os.Stderr, "%s (%s): %s in %.0fs\n", k.name, k.release(), r.verdict(), time.Since(began).Seconds())
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	fmt.Print(table(results))
	var failed []string
	for _, r := range results {
		if !r.passed() {
			failed = append(failed, r.kernel.name)
			fmt.Fprint(os.Stderr, "\n", r.explain())
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed on %s; %s has the outputs", strings.Join(failed, ", "), dist)
	}
	return nil
}

func choose(only string) ([]kernel, error) {
	if only == "" {
		return kernels, nil
	}
	var chosen []kernel
	for name := range strings.SplitSeq(only, ",") {
		found := false
		for _, k := range kernels {
			if k.name == name {
				chosen, found = append(chosen, k), true
			}
		}
		if !found {
			return nil, fmt.Errorf("no kernel is called %q", name)
		}
	}
	return chosen, nil
}

// fetch returns the kernels that are there, or can be had.
func fetch(ctx context.Context, wanted []kernel) (there []kernel, err error) {
	for _, k := range wanted {
		cmd := exec.CommandContext(ctx, "internal/kernels/fetch", k.name)
		cmd.Stderr = os.Stderr
		err := cmd.Run()
		switch {
		case err == nil:
			there = append(there, k)
		case !k.optional:
			return nil, fmt.Errorf("fetch %s: %w", k.name, err)
		}
	}
	return there, nil
}

// What runs in a guest beside the program itself: the tests that need a kernel
// and nothing else. A test binary runs where its package is.
var testPackages = []string{"internal/kerneltest", "internal/probe", "cmd/fintrace"}

// testsOfCommand are those of cmd/fintrace.
const testsOfCommand = "^(TestKernel|TestFoundAtStart|TestListAgreesWithSS|TestLosses|TestUnsent|TestCgroups|TestCgroupsInTurn|TestChurn|TestKernelScript|TestBare|TestFeatures|TestJiffiesWrap)$"

// steps is what runs in a guest; tests limits it to some of cmd/fintrace.
func steps(tests string) []step {
	of := func(pkg, pattern string, flags ...string) step {
		return step{Name: pkg, Dir: "/src/" + pkg, Argv: append([]string{"/bin/" + filepath.Base(pkg) + ".test",
			"-test.v", "-test.short", "-test.timeout=15m", "-test.run=" + pattern}, flags...)}
	}
	if tests != "" {
		return []step{of("cmd/fintrace", tests, "-jiffies.wrap")}
	}
	all := []step{ // outputs says what they have to print
		{Name: "version", Dir: "/", Argv: []string{"fintrace", "version", "--features"}},
		{Name: "list", Dir: "/", Argv: []string{"fintrace", "list"}},
		{Name: "diagnose", Dir: "/", Argv: []string{"fintrace", "diagnose", "--duration", "1s"}},
	}
	for _, pkg := range testPackages {
		if pkg == "cmd/fintrace" {
			all = append(all, of(pkg, testsOfCommand, "-jiffies.wrap"))
			continue
		}
		all = append(all, of(pkg, "."))
	}
	// What is locked stays so (kernel_lockdown(7)).
	return append(all,
		step{Name: "lockdown", Dir: "/", Argv: []string{"sh", "-c", "echo confidentiality >/sys/kernel/security/lockdown"}},
		step{Name: "list-locked", Dir: "/", Argv: []string{"fintrace", "list"}},
		step{Name: "diagnose-locked", Dir: "/", Argv: []string{"fintrace", "diagnose", "--duration", "1s"}})
}

// build makes the programs for an architecture, and returns their directory.
func build(ctx context.Context, arch string) (string, error) {
	dir := filepath.Join(dist, "programs-"+arch)
	commands := [][]string{
		{"build", "-o", filepath.Join(dir, "init"), "./internal/kernels"},
		{"build", "-o", filepath.Join(dir, "fintrace"), "./cmd/fintrace"},
	}
	for _, pkg := range testPackages {
		commands = append(commands, []string{"test", "-c", "-o", filepath.Join(dir, filepath.Base(pkg)+".test"), "./" + pkg})
	}
	for _, args := range commands {
		last := len(args) - 1
		cmd := exec.CommandContext(ctx, "go", append(args[:last:last], "-ldflags=-s -w", args[last])...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return dir, nil
}

// pack makes a guest's initramfs.
func pack(k kernel, programs string, steps []step) (initrd []byte, err error) {
	plan, err := json.Marshal(steps)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	a := newArchive(&buf)
	a.tree(".", filepath.Join(dist, "userland-"+k.arch()))
	a.copy("init", filepath.Join(programs, "init"))
	a.copy("usr/bin/fintrace", filepath.Join(programs, "fintrace"))
	for _, pkg := range testPackages {
		name := filepath.Base(pkg) + ".test"
		a.copy("usr/bin/"+name, filepath.Join(programs, name))
		a.dir(filepath.Join("src", pkg))
		if data := filepath.Join(pkg, "testdata"); exists(data) {
			a.tree(filepath.Join("src", data), data)
		}
	}
	a.tree("modules", filepath.Join(k.dir(), "modules"))
	a.file(planFile[1:], plan)
	a.file("etc/passwd", []byte("root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"))
	if err := a.close(); err != nil {
		return nil, fmt.Errorf("make the initramfs: %w", err)
	}
	return buf.Bytes(), nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
