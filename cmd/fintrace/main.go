// SPDX-License-Identifier: Apache-2.0

// Command fintrace shows which TCP connections sit in FIN_WAIT2, since when,
// who holds them, and which timer should have ended them.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/fintrace/fintrace/internal/report"
)

// env is what a command may use of its surroundings.
type env struct {
	stdout, stderr io.Writer
	getenv         func(string) string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second Ctrl-C ends at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, env{os.Stdout, os.Stderr, os.Getenv}, os.Args[1:]))
}

// run runs one command line and returns its exit code.
func run(ctx context.Context, e env, args []string) int {
	root := &cobra.Command{
		Use:   "fintrace",
		Short: "See which TCP connections sit in FIN_WAIT2, since when, and why",
		Long: `fintrace shows which TCP connections sit in FIN_WAIT2, since when, who holds
them, and which timer should have ended them.

  fintrace list     what is there now, the oldest first
  fintrace trace    watch them come, pass their limit, and go
  fintrace demo     a pile-up of its own, to see it all work`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(traceCommand(e), listCommand(e), demoCommand(e), versionCommand(e))
	root.SetArgs(args)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(e.stderr, "fintrace:", err)
		return 1
	}
	return 0
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
