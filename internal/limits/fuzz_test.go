// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"strconv"
	"strings"
	"testing"
)

// FuzzValues is about what people write on the command line and in the daemon's
// file: it is read as what it is, or refused in one line.
func FuzzValues(f *testing.F) {
	for _, s := range []string{"443", "0", "65536", "+80", "10.0.0.0/8", "::ffff:10.0.0.0/104", "2001:db8::1%eth0", "1h30m", "-1s", "9223372036854775807ns", "1e9h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := func(err error) {
			if strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Errorf("more than a line: %q", err)
			}
		}
		if port, err := ParsePort(s); err != nil {
			line(err)
		} else if n, _ := strconv.Atoi(s); port == 0 || int(port) != n {
			t.Errorf("%q is port %d", s, port)
		}
		if peer, err := ParsePeer(s); err != nil {
			line(err)
		} else if again, err := ParsePeer(peer.String()); err != nil || again != peer || peer.Addr().Is4In6() && peer.Bits() >= 96 {
			t.Errorf("%q is %s, which is %s, %v", s, peer, again, err)
		}
		if d, err := ParseDuration(s); err != nil {
			line(err)
		} else if again, err := ParseDuration(d.String()); err != nil || again != d || d < 0 {
			t.Errorf("%q is %s, which is %s, %v", s, d, again, err)
		}
	})
}
