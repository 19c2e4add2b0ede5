// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// ParsePort reads a port of a Match.
func ParsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("a port is a number from 1 to 65535, not %q", s)
	}
	return uint16(n), nil
}

// ParsePeer reads an address, or a block of them, of a Match.
func ParsePeer(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			return netip.PrefixFrom(a.Unmap(), p.Bits()-96), nil // as peers are matched
		}
		return p, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("a peer is an address or a block such as 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32, not %q", s)
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// ParseDuration reads a duration that is not negative.
func ParseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("a duration is a number and its unit, such as 500ms, 30s or 1h30m, not %q", s)
	}
	return d, nil
}
