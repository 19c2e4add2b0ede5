// SPDX-License-Identifier: Apache-2.0

package events

// Sysctls are settings of the kernel by name, as a network namespace has them.
// One that is not there, or could not be read, is absent.
type Sysctls map[string]int

// The sysctls that matter to the end of a connection. Times are in seconds.
const (
	// How long a closed connection may stay in FIN_WAIT2.
	SysctlFinTimeout = "net.ipv4.tcp_fin_timeout"
	// How many minisocks and TIME_WAITs a namespace may have.
	SysctlMaxTWBuckets = "net.ipv4.tcp_max_tw_buckets"
	// How many closed connections that are still full sockets the host may have.
	SysctlMaxOrphans = "net.ipv4.tcp_max_orphans"
	// How many connections conntrack follows; absent where it is not loaded.
	SysctlConntrackCount = "net.netfilter.nf_conntrack_count"
	// How long conntrack remembers a connection with one FIN, not acknowledged yet.
	SysctlConntrackFinWait = "net.netfilter.nf_conntrack_tcp_timeout_fin_wait"
	// How long conntrack remembers a connection with one FIN, acknowledged.
	SysctlConntrackCloseWait = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
)

// SysctlNames are all of them.
func SysctlNames() []string {
	return []string{SysctlFinTimeout, SysctlMaxTWBuckets, SysctlMaxOrphans,
		SysctlConntrackCount, SysctlConntrackFinWait, SysctlConntrackCloseWait}
}
