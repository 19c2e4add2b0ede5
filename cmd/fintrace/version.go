// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/fintrace/fintrace/internal/probe"
)

func versionCommand(e env) *cobra.Command {
	var features bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(e.stdout, "fintrace %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			if err != nil || !features {
				return err
			}
			return printFeatures(e.stdout)
		},
	}
	cmd.Flags().BoolVar(&features, "features", false, "say what this kernel has of what fintrace uses, and what is done without the rest (as root)")
	return cmd
}

// printFeatures has a line for each feature of the kernel.
func printFeatures(w io.Writer) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(out, "Linux %s\t\t\n", probe.Release())
	for _, f := range probe.Features() {
		there := "no"
		switch {
		case f.Err != nil:
			there = "unknown"
		case f.There:
			there = "yes"
		}
		means := f.Means
		if f.Err != nil {
			means = f.Err.Error()
		}
		fmt.Fprintf(out, "%s\t%s\t%s\n", f.Name, there, means)
	}
	return out.Flush()
}

// version is what the Go toolchain stamped: the module's version, or the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "unknown"
	}
	return info.Main.Version
}

// revision is the commit, "" if the Go toolchain stamped none.
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			return setting.Value
		}
	}
	return ""
}
