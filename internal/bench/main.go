// SPDX-License-Identifier: Apache-2.0

// Command bench measures fintrace beside the tools that people use today, in
// one run and under the same load, against the bar that it has set itself. It
// must run as root; all that it makes is in network namespaces of its own.
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
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A measure is a part of the suite that can be run by itself.
type measure struct {
	name string
	run  func(*suite, context.Context) (section, error)
}

var measures = []measure{
	{"kernel", (*suite).kernel},
	{"user", (*suite).userspace},
	{"host", (*suite).host},
	{"snapshot", (*suite).snapshot},
	{"tracker", (*suite).tracker},
	{"notice", (*suite).notice},
	{"start", (*suite).start},
}

// suite is what the measures have in common.
type suite struct {
	binary string // of fintrace
	idle   time.Duration
	longer int // so many times as long is the host compared with and without it
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) > 1 && args[0] == withTracefs {
		return runWithTracefs(args[1:])
	}
	if len(args) == 1 && !strings.HasPrefix(args[0], "-") {
		return runPart(args[0])
	}
	var s suite
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	output := flags.String("o", "", "write the table to this file too, as Markdown")
	quoted := flags.String("quote", "", "put the lines with a bar into this file, between its marks")
	flags.StringVar(&s.binary, "fintrace", "", "measure this binary (default: built from the sources here)")
	flags.DurationVar(&s.idle, "idle", 15*time.Second, "how long to watch it idle; 10m for what is rare")
	flags.IntVar(&s.longer, "longer", 1, "compare the host with and without it so many times as long; 3 for a certain answer on a busy machine")
	only := flags.String("only", "", "run these of "+names(measures)+" alone")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("flags only, not %q", flags.Arg(0))
	}
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	if *only != "" && *output+*quoted != "" {
		return errors.New("-only is to look at: -o and -quote are for the whole")
	}
	if *quoted != "" && *output == "" {
		return errors.New("-quote quotes what -o writes")
	}
	if os.Geteuid() != 0 {
		return errors.New("BPF programs and network namespaces need root: try sudo")
	}
	if s.binary == "" {
		dir, err := os.MkdirTemp("", "bench")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		if s.binary, err = build(ctx, dir); err != nil {
			return err
		}
	}
	r, err := s.measure(ctx, chosen)
	text := r.markdown()
	fmt.Print("\n" + text)
	if *output == "" || err != nil {
		return err
	}
	if err := os.WriteFile(*output, []byte(text), 0o644); err != nil {
		return err
	}
	if *quoted == "" {
		return nil
	}
	return quoteInto(*quoted, text)
}

func build(ctx context.Context, dir string) (binary string, err error) {
	binary = filepath.Join(dir, "fintrace")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, "./cmd/fintrace")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build fintrace: %w", err)
	}
	return binary, nil
}

func names(of []measure) string {
	var all []string
	for _, m := range of {
		all = append(all, m.name)
	}
	return strings.Join(all, ",")
}

// choose returns the measures of a list of names, all for none.
func choose(list string) ([]measure, error) {
	if list == "" {
		return measures, nil
	}
	wanted := strings.Split(list, ",")
	for _, name := range wanted {
		if !slices.ContainsFunc(measures, func(m measure) bool { return m.name == name }) {
			return nil, fmt.Errorf("the measures are %s, not %q", names(measures), name)
		}
	}
	return slices.DeleteFunc(slices.Clone(measures), func(m measure) bool { return !slices.Contains(wanted, m.name) }), nil
}

// measure runs the measures, saying on stderr what it is at. One that fails does
// not keep the others from being measured.
func (s *suite) measure(ctx context.Context, chosen []measure) (*results, error) {
	r := &results{when: time.Now(), kernel: kernelRelease(), cpu: cpuName(), versions: versions(ctx)}
	var failed error
	for n, m := range chosen {
		began := time.Now()
		fmt.Fprintf(os.Stderr, "%d/%d %s ...", n+1, len(chosen), m.name)
		section, err := m.run(s, ctx)
		fmt.Fprintf(os.Stderr, " %s\n", time.Since(began).Round(time.Second))
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", m.name, err))
			section.rows = append(section.rows, row{what: "**failed**"})
		}
		r.sections = append(r.sections, section)
		if ctx.Err() != nil {
			break
		}
	}
	r.took = time.Since(r.when)
	return r, failed
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
	var found []string
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
