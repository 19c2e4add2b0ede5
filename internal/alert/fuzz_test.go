// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"strings"
	"testing"
)

// FuzzParsePeer: a peer of the state file is one that was written there.
func FuzzParsePeer(f *testing.F) {
	for _, s := range []string{"192.0.2.7", "2001:db8::/64", "2001:db8::1/64", "::ffff:192.0.2.7", "fe80::%eth0/64", "", "10.0.0.0/8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, ok := parsePeer(s)
		if again, known := parsePeer(p.String()); !known || again != p {
			t.Errorf("%q is %s, which is %s, %v", s, p, again, known)
		}
		if ok != (p.String() == s) {
			t.Errorf("%q is %s, %v", s, p, ok)
		}
	})
}

// FuzzParseURL: an error about a URL, which may hold a secret, does not hold it.
func FuzzParseURL(f *testing.F) {
	for _, s := range []string{"https://example.net/hook/T0KEN", "http://", "ftp://a/b", " http://a b/\x00", "http://u:p@[::1", "//host"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		const secret = "s3cr3t"
		u, err := parseURL(s + secret)
		switch {
		case err == nil && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https"):
			t.Errorf("%q is %s", s, u)
		case err != nil && strings.Contains(err.Error(), secret):
			t.Errorf("%q quotes what was read", err)
		}
	})
}
