// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"strconv"
	"strings"
	"syscall"
)

// interfaces are the indices of the interfaces that a configuration names, as
// a process's network namespace has them.
func (p procfs) interfaces(pid int, c *Config) map[string]uint32 {
	var found map[string]uint32
	for _, px := range c.Proxies {
		for _, b := range px.Binds {
			if b.Interface == "" {
				continue
			}
			if found == nil {
				found = map[string]uint32{}
				// No file there lists all. Each of these has the interfaces of
				// a kind: with IPv4, with IPv6, with multicast at the link.
				p.indices(pid, "igmp", 0, 1, 10, found)
				p.indices(pid, "if_inet6", 1, 5, 16, found)
				p.indices(pid, "dev_mcast", 0, 1, 10, found)
			}
		}
	}
	return found
}

// indices reads the lines of /proc/PID/net/FILE that have an index, in the base
// given, and a name at their columns.
func (p procfs) indices(pid int, file string, index, name, base int, found map[string]uint32) {
	text, err := readSome(p.of(pid, "net", file), maxCommandLine)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) <= max(index, name) || isSpace(line[0]) {
			continue // of igmp, the groups of the interface above
		}
		if n, err := strconv.ParseUint(fields[index], base, 32); err == nil {
			found[strings.TrimSuffix(fields[name], ":")] = uint32(n) // igmp leaves no space after a long one
		}
	}
}

// namespaces are the inodes of the network namespaces that a configuration
// names, as HAProxy looks them up.
func (v view) namespaces(c *Config) map[string]uint32 {
	if v.root == "" {
		return nil // It is not known where it looks them up.
	}
	var found map[string]uint32
	look := func(name string) {
		if name == "" || strings.Contains(name, "/") {
			return
		}
		at, info, err := v.find("/var/run/netns/" + name)
		if err != nil {
			return
		}
		at.Close()
		if found == nil {
			found = map[string]uint32{}
		}
		found[name] = uint32(info.Sys().(*syscall.Stat_t).Ino)
	}
	for _, px := range c.Proxies {
		for _, b := range px.Binds {
			look(b.Namespace)
		}
		for _, s := range px.Servers {
			look(s.Namespace)
		}
	}
	return found
}
