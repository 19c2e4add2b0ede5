// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// A parsed is a flag value that is read by a function, which may be called
// several times and says itself what it expected.
type parsed struct {
	kind  string
	text  []string
	parse func(string) error
}

func (p *parsed) Set(s string) error {
	p.text = append(p.text, s)
	return p.parse(s)
}
func (p *parsed) String() string { return strings.Join(p.text, ",") }
func (p *parsed) Type() string   { return p.kind }

// each parses the parts of a comma-separated value.
func each(parse func(string) error) func(string) error {
	return func(s string) error {
		for part := range strings.SplitSeq(s, ",") {
			if err := parse(part); err != nil {
				return err
			}
		}
		return nil
	}
}

// filterFlags adds the flags that select connections.
func filterFlags(cmd *cobra.Command, minDuration time.Duration) *track.Filter {
	f := &track.Filter{}
	add := func(name, kind, usage string, parse func(string) error) {
		cmd.Flags().Var(&parsed{kind: kind, parse: parse}, name, usage)
	}
	add("port", "port", "only connections with this local or remote port (repeatable)", each(func(s string) error {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("a port is a number from 1 to 65535, not %q", s)
		}
		f.Ports = append(f.Ports, uint16(n))
		return nil
	}))
	add("peer", "CIDR", "only connections with a peer of this address or block (repeatable)", each(func(s string) error {
		p, err := parsePrefix(s)
		f.Peers = append(f.Peers, p)
		return err
	}))
	add("process", "name|pid", "only connections of this process (repeatable)", func(s string) error {
		f.Processes = append(f.Processes, s)
		return nil
	})
	add("netns", "name|inode|path", "only connections of this network namespace (repeatable)", func(s string) error {
		inode, err := parseNetns(s)
		f.Netns = append(f.Netns, inode)
		return err
	})
	add("side", "side", "only inbound (the peer is a client) or outbound connections", func(s string) (err error) {
		f.Side, err = events.ParseSide(s)
		return err
	})
	add("stage", "stage", "only connections that are held, orphaned or a minisock", func(s string) (err error) {
		f.Stage, err = events.ParseStage(s)
		return err
	})
	cmd.Flags().DurationVar(&f.MinDuration, "min-duration", minDuration, "only connections in FIN_WAIT2 for at least this long")
	return f
}

func parsePrefix(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("a peer is an address or a block such as 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32, not %q", s)
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), nil
}

func parseNetns(s string) (uint32, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return uint32(n), nil
	}
	path := s
	if !strings.Contains(s, "/") {
		path = "/run/netns/" + s
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("no network namespace %q: %w", s, &os.PathError{Op: "stat", Path: path, Err: err})
	}
	return uint32(st.Ino), nil
}

// outputFlag adds -o and returns whether it is JSON.
func outputFlag(cmd *cobra.Command) *bool {
	asJSON := false
	cmd.Flags().VarP(&parsed{kind: "table|json", text: nil, parse: func(s string) error {
		if s != "table" && s != "json" {
			return fmt.Errorf("the output is table or json, not %q", s)
		}
		asJSON = s == "json"
		return nil
	}}, "output", "o", "print a table, or one JSON object a line")
	return &asJSON
}

// limitFlag adds --limit.
func limitFlag(cmd *cobra.Command, held *time.Duration) {
	cmd.Flags().DurationVar(held, "limit", 0, "how long a held connection may stay (default: tcp_fin_timeout of its namespace)")
}

// names looks up what the kernel has numbers for; namespaces that come later
// than this call go unnamed.
func names() *report.Names {
	netns, err := probe.NamespaceNames()
	if err != nil {
		netns = nil // Names are a courtesy.
	}
	return &report.Names{
		Wall:   probe.Wall,
		Cgroup: probe.CgroupPath,
		Netns:  func(inode uint32) string { return netns[inode] },
	}
}
