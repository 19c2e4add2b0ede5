// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
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
		n, err := limits.ParsePort(s)
		f.Ports = append(f.Ports, n)
		return err
	}))
	add("peer", "CIDR", "only connections with a peer of this address or block (repeatable)", each(func(s string) error {
		p, err := limits.ParsePeer(s)
		f.Peers = append(f.Peers, p)
		return err
	}))
	add("process", "name|pid", "only connections of this process (repeatable)", func(s string) error {
		f.Processes = append(f.Processes, s)
		return nil
	})
	add("proxy", "name", "only connections of this proxy of HAProxy (repeatable)", func(s string) error {
		f.Proxies = append(f.Proxies, s)
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
	durationFlag(cmd, &f.MinDuration, "min-duration", minDuration, "only connections in FIN_WAIT2 for at least this long")
	return f
}

func parseNetns(s string) (uint32, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return uint32(n), nil
	}
	path := s
	if !strings.Contains(s, "/") {
		path = "/run/netns/" + s
	}
	inode, err := netnsInode(path)
	if err != nil {
		return 0, fmt.Errorf("a network namespace is a name in /run/netns, an inode number or a file such as /proc/PID/ns/net, not %q: %w", s, err)
	}
	return inode, nil
}

func netnsInode(path string) (uint32, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return 0, errors.New("no such namespace")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return uint32(st.Ino), nil
}

// durationFlag adds a flag for a duration that is not negative.
func durationFlag(cmd *cobra.Command, d *time.Duration, name string, initial time.Duration, usage string) {
	*d = initial
	value := &parsed{kind: "duration", parse: func(s string) (err error) {
		*d, err = limits.ParseDuration(s)
		return err
	}}
	if initial != 0 {
		value.text = []string{initial.String()}
	}
	cmd.Flags().Var(value, name, usage)
}

// ringFlag adds a flag for the size of a ring buffer, which the kernel has rules for.
func ringFlag(cmd *cobra.Command, bytes *int, name, usage string) {
	least, most := os.Getpagesize(), 1<<30
	cmd.Flags().Var(&parsed{kind: "bytes", parse: func(s string) error {
		n, err := strconv.Atoi(s)
		if err != nil || n < least || n > most || n&(n-1) != 0 {
			return fmt.Errorf("a buffer is a power of two from %d to %d bytes, not %q", least, most, s)
		}
		*bytes = n
		return nil
	}}, name, usage)
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
	durationFlag(cmd, held, "limit", 0, "how long a held connection may stay (default: tcp_fin_timeout of its namespace)")
}

// hostNames knows what the kernel has numbers for by name.
type hostNames struct {
	wall    probe.WallClock
	netns   map[uint32]string
	cgroups map[uint64]string
}

// cgroupsKept bounds the paths that are remembered.
const cgroupsKept = 10_000

func newHostNames() *hostNames {
	h := &hostNames{cgroups: map[uint64]string{}}
	h.refresh()
	return h
}

// names looks them up; namespaces that come later than this call go unnamed.
func names() *report.Names { return newHostNames().names() }

// refresh looks up the network namespaces anew.
func (h *hostNames) refresh() {
	netns, err := probe.NamespaceNames()
	if err != nil {
		netns = nil // Names are a courtesy.
	}
	h.netns = netns
}

func (h *hostNames) netnsName(inode uint32) string { return h.netns[inode] }

// netnsLabel is its name, or its inode.
func (h *hostNames) netnsLabel(inode uint32) string {
	return cmp.Or(h.netns[inode], strconv.FormatUint(uint64(inode), 10))
}

func (h *hostNames) cgroupPath(id uint64) string {
	path, known := h.cgroups[id]
	if !known {
		if len(h.cgroups) >= cgroupsKept {
			clear(h.cgroups)
		}
		path = probe.CgroupPath(id)
		h.cgroups[id] = path
	}
	return path
}

func (h *hostNames) names() *report.Names {
	return &report.Names{Wall: h.wall.Time, Cgroup: h.cgroupPath, Netns: h.netnsName}
}
