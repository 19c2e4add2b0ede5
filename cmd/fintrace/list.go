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
		conns, total, err := listConnections(cmd.Context(), rules, haproxies, filter, func(err error) {
			e.notLookedAt(err)
			if *asJSON {
				// Were stdout closed, the connections would say so too.
				_ = out.Encode(report.NewUnlooked(err))
			}
		})
		if err := errors.Join(err, buffered.Flush()); err != nil {
			return err
		}
		if len(conns) == 0 && !*asJSON {
			if total == 0 {
				fmt.Fprintln(e.stderr, "No connection is in FIN_WAIT2.")
			} else {
				fmt.Fprintf(e.stderr, "No connection in FIN_WAIT2 matches the filters; %d do not.\n", total)
			}
			return nil
		}
		switch {
		case len(keys) > 0:
			return printGroups(e, keys, report.GroupBy(conns, keys), *asJSON)
		case *asJSON:
			names, now := names(), probe.Now()
			for i := range conns {
				if err := out.Encode(report.NewRecord("", now, &conns[i], names)); err != nil {
					return err
				}
			}
			return buffered.Flush()
		}
		return report.List(e.stdout, conns, e.style())
	}
	return cmd
}

// listConnections returns the selected connections, the oldest first, and how
// many there are in all. Unlooked is told what could not be looked at.
func listConnections(ctx context.Context, rules limits.Rules, haproxies *haproxies, filter *track.Filter, unlooked func(error)) (conns []track.Conn, total int, err error) {
	p, err := openOrBare(unlooked)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	w := &watch{
		probe:     p,
		tracker:   track.New(rules, track.DefaultCapacity, hugePages()),
		rules:     rules,
		haproxies: haproxies,
		notify:    func(*track.Notice) {},
		warn:      unlooked,
	}
	if err := w.seed(ctx); err != nil {
		return nil, 0, err
	}
	w.catchUp()
	now := probe.Now()
	conns = make([]track.Conn, 0, w.tracker.Len())
	w.tracker.All(now, func(c *track.Conn) {
		if filter.Selects(c) {
			conns = append(conns, *c)
		}
	})
	report.SortOldest(conns)
	return conns, w.tracker.Len(), nil
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
