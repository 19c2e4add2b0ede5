// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"net/netip"
	"time"
)

// Info is what the runtime socket says of one process ("show info"). A number
// that it does not say is -1.
type Info struct {
	Version     Version
	PID         int
	Maxconn     int // in force, set or computed
	HardMaxconn int
	UlimitN     int
	CurrConns   int
	Nbthread    int
	Stopping    bool
	UptimeSec   int
}

// ProxyStat is a row of "show stat": a frontend, a backend or a server. A
// number that it does not say is -1.
type ProxyStat struct {
	Proxy, Server string // Server is FRONTEND and BACKEND for the proxies themselves
	Scur, Smax    int
	Slim          int
	Addr          string // of a server, where the socket's level shows it
	Status        string
}

// ServerAddr is where a server is at the moment ("show servers state"), which
// for a name is what HAProxy has resolved it to.
type ServerAddr struct {
	Backend, Server string
	Addr            netip.AddrPort // Port 0: that of the client's connection
}

// Process is one process that handles connections: a worker of a master, or
// the one process of a HAProxy without one.
type Process struct {
	PID     int
	Master  int // pid of its master, 0 without one
	Netns   uint32
	Start   time.Time
	Old     bool // told to finish by a reload; a newer one has taken over
	Version Version
	Config  *Config // nil if it could not be read
	// Changed: a file was written after the process started, which therefore
	// may run another configuration than Config.
	Changed bool
	Info    *Info // nil if the runtime socket did not answer for this process
	Stats   []ProxyStat
	// Interfaces are the indices of the interfaces that its configuration names,
	// and Namespaces the inodes of the network namespaces.
	Interfaces, Namespaces map[string]uint32
	Servers                []ServerAddr
	// Problems say in a line each what could not be looked at.
	Problems []string

	ticks uint64 // since boot when it started, which clocks that are set do not change
}
