// SPDX-License-Identifier: Apache-2.0

// Command fintrace shows which TCP connections sit in FIN_WAIT2, since when,
// who holds them, and which timer should have ended them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/fintrace/fintrace/internal/report"
)

// env is what a command may use of its surroundings.
type env struct {
	stdout, stderr io.Writer
	getenv         func(string) string
}

func main() {
	startHeap()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second Ctrl-C ends at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, env{os.Stdout, os.Stderr, os.Getenv}, os.Args[1:]))
}

// run runs one command line and returns its exit code.
func run(ctx context.Context, e env, args []string) int {
	root := commands(e)
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		exit := &exitError{code: 1, err: err}
		errors.As(err, &exit)
		if exit.err != nil {
			e.say("fintrace:", err)
		}
		return exit.code
	}
	return 0
}

// lastWord is how long the end waits for what reads stderr.
const lastWord = time.Second

// say writes a last line to stderr, which may be a pipe that nobody reads any more.
func (e env) say(words ...any) {
	said := make(chan struct{})
	go func() {
		defer close(said)
		fmt.Fprintln(e.stderr, words...)
	}()
	select {
	case <-said:
	case <-time.After(lastWord):
	}
}

// exitError ends a command with an exit code that is not 1. Where there is
// no err, all has been said.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }

func (e *exitError) Unwrap() error { return e.err }

// commands is the root of all commands.
func commands(e env) *cobra.Command {
	root := &cobra.Command{
		Use:   "fintrace",
		Short: "See which TCP connections sit in FIN_WAIT2, since when, and why",
		Long: `fintrace shows which TCP connections sit in FIN_WAIT2, since when, who holds
them, and which timer should have ended them.

  fintrace diagnose  what is wrong, how it knows, and what to type
  fintrace list      what is there now, the oldest first
  fintrace trace     watch them come, pass their limit, and go
  fintrace check     what HAProxy's configuration and the sysctls get wrong
  fintrace daemon    alerts while they are stuck, metrics, a page
  fintrace demo      a pile-up of its own, to see it all work`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(traceCommand(e), listCommand(e), diagnoseCommand(e), checkCommand(e), daemonCommand(e), demoCommand(e), versionCommand(e))
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	insist(root)
	root.SetFlagErrorFunc(flagError)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	return root
}

// insist makes the commands that only have commands refuse any other word, and
// help one that it does not know; cobra takes both for a success.
func insist(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		insist(c)
	}
	switch {
	case cmd.Name() == "help":
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			about, rest, err := cmd.Root().Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknownCommand(about, rest[0])
			}
			return about.Help()
		}
	case cmd.HasSubCommands() && !cmd.Runnable():
		cmd.Args = cobra.ArbitraryArgs
		cmd.DisableFlagsInUseLine = true
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return cmd.Help()
		}
	}
}

func unknownCommand(parent *cobra.Command, word string) error {
	var names []string
	for _, c := range parent.Commands() {
		if !c.Hidden {
			names = append(names, c.Name())
		}
	}
	if len(names) == 0 {
		return fmt.Errorf("%s has no command %q", parent.CommandPath(), word)
	}
	return fmt.Errorf("the commands of %s are %s, not %q", parent.CommandPath(), strings.Join(names, ", "), word)
}

// noArguments refuses what is left of the command line after the flags.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes flags only, not %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// flagError leads with the flag; what a value has to be, its parser says.
func flagError(cmd *cobra.Command, err error) error {
	var (
		invalid *pflag.InvalidValueError
		unknown *pflag.NotExistError
		bare    *pflag.ValueRequiredError
	)
	text := err.Error()
	switch {
	case errors.As(err, &invalid):
		text = fmt.Sprintf("--%s: %v", invalid.GetFlag().Name, invalid.Unwrap())
	case errors.As(err, &bare):
		text = fmt.Sprintf("--%s needs a value: %s", bare.GetFlag().Name, bare.GetFlag().Value.Type())
	case errors.As(err, &unknown):
		text += "; " + cmd.CommandPath() + " --help lists the flags"
	}
	// What was typed may be in it.
	return errors.New(report.Clean(text))
}

// whenUnread calls stop once nobody reads stdout any more. A trace of a quiet
// host would otherwise outlive the `head` that it was piped to, because a write
// is what ends a program then.
func (e env) whenUnread(stop func()) {
	f, ok := e.stdout.(*os.File)
	if !ok {
		return
	}
	go func() {
		// Asked for nothing, poll(2) tells of errors and hang-ups.
		fds := []unix.PollFd{{Fd: int32(f.Fd())}}
		for {
			if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
				stop()
				return
			}
		}
	}()
}

// notLookedAt warns of what is missing from the output. It may quote what a
// process or a file says.
func (e env) notLookedAt(err error) {
	fmt.Fprintln(e.stderr, "fintrace: not looked at:", report.Clean(err.Error()))
}

// style is how text goes to stdout: a terminal gets colour, unless NO_COLOR
// (no-color.org) is set, and lines that fit; a pipe gets neither.
func (e env) style() report.Style {
	f, ok := e.stdout.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return report.Style{}
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		width = 0
	}
	return report.Style{Width: width, Color: e.getenv("NO_COLOR") == ""}
}
