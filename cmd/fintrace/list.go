// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

func listCommand(e env) *cobra.Command {
	var (
		rules limits.Rules
		keys  []string
	)
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the connections in FIN_WAIT2 now, the oldest first",
		Args:  noArguments,
	}
	filter := filterFlags(cmd, 0)
	asJSON := outputFlag(cmd)
	limitFlag(cmd, &rules.Held)
	haproxies := haproxyFlags(cmd)
	cmd.Flags().Var(&parsed{kind: strings.Join(report.Keys, ","), parse: each(func(key string) error {
		if !slices.Contains(report.Keys, key) {
			return fmt.Errorf("connections are grouped by %s, not by %q", strings.Join(report.Keys, ", "), key)
		}
		keys = append(keys, key)
		return nil
	})}, "group-by", "count them by one or more of these")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		haproxies.netns = filter.Netns
		buffered := bufio.NewWriter(e.stdout)
		out := json.NewEncoder(report.JSONWriter(buffered))
		listing := report.NewListing(e.style())
		asText := !*asJSON && len(keys) == 0
		found, err := listConnections(cmd.Context(), rules, haproxies, func(c *track.Conn) bool {
			selected := filter.Selects(c)
			if selected && asText {
				listing.Add(c)
			}
			return selected
		}, func(err error) {
			e.notLookedAt(err)
			if *asJSON {
				// Were stdout closed, the connections would say so too.
				_ = out.Encode(report.NewUnlooked(err))
			}
		})
		if err := errors.Join(err, buffered.Flush()); err != nil {
			return err
		}
		if found.Len() == 0 && !*asJSON {
			if found.total == 0 {
				fmt.Fprintln(e.stderr, "No connection is in FIN_WAIT2.")
			} else {
				fmt.Fprintf(e.stderr, "No connection in FIN_WAIT2 matches the filters; %d do not.\n", found.total)
			}
			return nil
		}
		switch {
		case len(keys) > 0:
			return printGroups(e, keys, report.GroupBy(found.All(), keys), *asJSON)
		case *asJSON:
			names, now := names(), probe.Now()
			for c := range found.All() {
				if err := out.Encode(report.NewRecord("", now, c, names)); err != nil {
					return err
				}
			}
			return buffered.Flush()
		}
		return listing.Print(e.stdout, found.All())
	}
	return cmd
}

// listed is what listConnections has found.
type listed struct {
	track.Order
	total int // also of what is not selected
}

// listConnections finds the connections that selected takes. Unlooked is told what
// could not be looked at.
func listConnections(ctx context.Context, rules limits.Rules, haproxies *haproxies, selected func(*track.Conn) bool, unlooked func(error)) (_ listed, err error) {
	p, err := openOrBare(unlooked)
	if err != nil {
		return listed{}, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	w := &watch{
		probe:     p,
		tracker:   track.New(rules, track.DefaultCapacity, hugePages()),
		rules:     rules,
		haproxies: haproxies,
		warn:      unlooked,
	}
	w.tracker.Silence()
	if err := w.seed(ctx); err != nil {
		return listed{}, err
	}
	w.catchUp()
	return listed{w.tracker.Oldest(probe.Now(), selected), w.tracker.Len()}, nil
}

func printGroups(e env, keys []string, groups []report.Group, asJSON bool) error {
	if !asJSON {
		return report.Groups(e.stdout, keys, groups, e.style())
	}
	out := json.NewEncoder(report.JSONWriter(e.stdout))
	for _, g := range groups {
		if err := out.Encode(report.GroupRecord(keys, g)); err != nil {
			return err
		}
	}
	return nil
}
