// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
)

// usualConfig is where distributions have HAProxy's configuration.
const usualConfig = "/etc/haproxy/haproxy.cfg"

func checkCommand(e env) *cobra.Command {
	c := &checking{env: e}
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Show what HAProxy's configuration and the sysctls get wrong",
		Long: `check reads HAProxy's configuration and the kernel's settings, and shows what
lets connections pile up in FIN_WAIT2: each finding with its lines, the reason,
and what to write instead.

Without -f it looks at the HAProxy that is running, else at
` + usualConfig + `. Whoever may read the files can run it.

Exit codes are those of a monitoring plugin: 0 fine, 1 warning, 2 critical,
3 could not look.`,
	}
	pluginExits(cmd)
	cmd.Flags().VarP(&parsed{kind: "file|directory", parse: func(s string) error {
		c.paths = append(c.paths, s)
		return nil
	}}, "haproxy-config", "f", "HAProxy's configuration, as its own -f takes it (repeatable)")
	cmd.Flags().StringVar(&c.socket, "haproxy-socket", "", "address of HAProxy's runtime socket, such as /run/haproxy/admin.sock")
	cmd.Flags().Var(&parsed{kind: "version", parse: func(s string) (err error) {
		c.version, err = haproxy.ParseVersion(s)
		return err
	}}, "haproxy-version", "version of HAProxy that the files are for (default: the one that runs, or is installed)")
	cmd.Flags().VarP(&parsed{kind: "text|json", parse: func(s string) error {
		if s != "text" && s != "json" {
			return fmt.Errorf("the output is text or json, not %q", s)
		}
		c.asJSON = s == "json"
		return nil
	}}, "output", "o", "print text, or one JSON object a line")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return c.run(cmd.Context()) }
	return cmd
}

// pluginExits makes a command that takes no arguments end like a monitoring
// plugin: what is wrong with its command line is no warning about HAProxy.
func pluginExits(cmd *cobra.Command) {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := noArguments(cmd, args); err != nil {
			return &exitError{report.ExitUnknown, err}
		}
		return nil
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &exitError{report.ExitUnknown, flagError(cmd, err)}
	})
}

// checking is one run of check.
type checking struct {
	env     env
	paths   []string
	socket  string
	version haproxy.Version
	asJSON  bool

	unlooked []string
}

func (c *checking) run(ctx context.Context) error {
	processes, err := c.processes(ctx)
	if err != nil {
		return c.refuse(err)
	}
	in := report.Checked{Processes: processes, Sysctls: map[uint32]events.Sysctls{}, Netns: names().Netns}
	if in.OwnNetns, err = probe.OwnNetns(); err != nil {
		c.unlooked = append(c.unlooked, err.Error())
	}
	var lookup probe.Lookup
	defer lookup.Close()
	for i := range processes {
		inode := processes[i].Netns
		if _, done := in.Sysctls[inode]; done {
			continue
		}
		if in.Sysctls[inode], err = lookup.Sysctls(inode); err != nil {
			c.unlooked = append(c.unlooked, err.Error())
		}
		if inode == 0 && processes[i].PID != 0 {
			c.unlooked = append(c.unlooked, fmt.Sprintf(
				"which network namespace haproxy[%d] is in: it takes root; the sysctls are those of fintrace's own", processes[i].PID))
		}
	}
	findings, undecided := report.Check(in)
	summary := report.NewCheckSummary(findings, looked(processes), append(c.unlooked, undecided...))
	if err := c.print(findings, summary); err != nil {
		return &exitError{report.ExitUnknown, err}
	}
	if summary.Exit != report.ExitFine {
		return &exitError{code: summary.Exit}
	}
	return nil
}

func (c *checking) print(findings []report.Finding, summary report.CheckSummary) error {
	if !c.asJSON {
		return report.PrintCheck(c.env.stdout, findings, summary, c.env.style())
	}
	out := json.NewEncoder(report.JSONWriter(c.env.stdout))
	for _, f := range findings {
		if err := out.Encode(f); err != nil {
			return err
		}
	}
	return out.Encode(summary)
}

// refuse says in a line each why there is nothing to check.
func (c *checking) refuse(err error) error {
	var all haproxy.Errors
	var one *haproxy.Error
	switch {
	case errors.As(err, &all):
	case errors.As(err, &one):
		all = haproxy.Errors{one}
	default:
		return &exitError{report.ExitUnknown, err}
	}
	for _, e := range all {
		fmt.Fprintln(c.env.stderr, report.Clean(e.Error()))
	}
	return &exitError{code: report.ExitUnknown}
}

// processes are those to check: what runs, or what the files alone say. All of
// them have a configuration.
func (c *checking) processes(ctx context.Context) ([]haproxy.Process, error) {
	if len(c.paths) == 0 || c.socket != "" {
		if running := c.running(ctx); len(running) > 0 {
			return running, nil
		}
	}
	paths := c.paths
	if len(paths) == 0 {
		if _, err := os.Stat(usualConfig); errors.Is(err, fs.ErrNotExist) {
			return nil, c.nothing()
		}
		paths = []string{usualConfig}
	}
	version := c.version
	if !version.Known() {
		if program, err := exec.LookPath("haproxy"); err == nil {
			version = haproxy.BinaryVersion(program)
		}
	}
	config, err := read(paths, version)
	if err != nil {
		return nil, err
	}
	return []haproxy.Process{{Config: config, Version: version}}, nil
}

func read(paths []string, version haproxy.Version) (*haproxy.Config, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("find the current directory: %w", err)
	}
	sources, err := haproxy.Load("", dir, paths)
	if err != nil {
		return nil, err
	}
	// What is set here is what HAProxy would see if it was started from here.
	env := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		env[name] = value
	}
	return haproxy.Parse(sources, haproxy.Options{Version: version, Env: env})
}

// running are the processes that run, but for those that a reload has told to
// finish where there are others.
func (c *checking) running(ctx context.Context) []haproxy.Process {
	found := haproxy.Discover(ctx, haproxy.DiscoverOptions{Paths: c.paths, Socket: c.socket})
	c.unlooked = append(c.unlooked, found.Problems...)
	for _, p := range found.Processes {
		for _, problem := range p.Problems {
			if !slices.Contains(c.unlooked, problem) {
				c.unlooked = append(c.unlooked, problem)
			}
		}
	}
	processes := slices.DeleteFunc(found.Processes, func(p haproxy.Process) bool {
		// With files named, one is of use only for what its socket says.
		return p.Config == nil || len(c.paths) > 0 && p.Info == nil
	})
	if current := slices.IndexFunc(processes, func(p haproxy.Process) bool { return !p.Old }); current >= 0 {
		processes = slices.DeleteFunc(processes, func(p haproxy.Process) bool { return p.Old })
	}
	for i := range processes {
		if c.version.Known() && !processes[i].Version.Known() {
			processes[i].Version = c.version
		}
	}
	return processes
}

// nothing is the error where there is no configuration.
func (c *checking) nothing() error {
	text := "no HAProxy is running, and there is no " + usualConfig + ": name its configuration with -f"
	if len(c.unlooked) > 0 {
		text = fmt.Sprintf("no configuration of a running HAProxy could be read (%s), and there is no %s: name it with -f",
			strings.Join(c.unlooked, "; "), usualConfig)
	}
	return errors.New(text)
}

// looked names configurations with the processes that they are of.
func looked(processes []haproxy.Process) (words []string) {
	const shown = 3
	type same struct {
		files string
		text  string
		pids  []string
	}
	var all []*same
	for _, p := range processes {
		files := p.Config.Files
		id := strings.Join(files, "\x00")
		i := slices.IndexFunc(all, func(s *same) bool { return s.files == id })
		if i < 0 {
			i = len(all)
			text := strings.Join(files[:min(shown, len(files))], ", ")
			if n := len(files) - shown; n > 0 {
				text += fmt.Sprintf(" and %d more", n)
			}
			if p.Version.Known() {
				text += " of HAProxy " + p.Version.Text
			}
			all = append(all, &same{files: id, text: text})
		}
		if p.PID != 0 {
			all[i].pids = append(all[i].pids, fmt.Sprint(p.PID))
		}
	}
	for _, s := range all {
		switch len(s.pids) {
		case 0:
		case 1:
			s.text += ", pid " + s.pids[0]
		default:
			s.text += ", pids " + strings.Join(s.pids, " and ")
		}
		words = append(words, s.text)
	}
	return words
}
