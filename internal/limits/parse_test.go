// SPDX-License-Identifier: Apache-2.0

package limits

import "testing"

func TestParsePeer(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"192.0.2.7", "192.0.2.7/32"},
		{"10.0.0.0/8", "10.0.0.0/8"},
		{"2001:db8::/32", "2001:db8::/32"},
		{"::1", "::1/128"},
		{"::ffff:192.0.2.7", "192.0.2.7/32"},
		{"::ffff:10.0.0.0/104", "10.0.0.0/8"},
		{"::/0", "::/0"},
		{"fe80::1%eth0", "fe80::1/128"},
		{"10.0.0.0/33", ""},
		{"client.example", ""},
		{"", ""},
	} {
		p, err := ParsePeer(test.in)
		if test.want == "" && err == nil || test.want != "" && (err != nil || p.String() != test.want) {
			t.Errorf("ParsePeer(%q) = %v, %v; want %q", test.in, p, err, test.want)
		}
	}
}

func TestParsePort(t *testing.T) {
	for _, bad := range []string{"", "0", "65536", "-1", "+80", "http", "80 ", "0x50"} {
		if p, err := ParsePort(bad); err == nil {
			t.Errorf("ParsePort(%q) = %d", bad, p)
		}
	}
	if p, err := ParsePort("65535"); p != 65535 || err != nil {
		t.Errorf("65535: %d, %v", p, err)
	}
}

func TestParseDuration(t *testing.T) {
	for _, bad := range []string{"", "5", "-1s", "1 s", "soon", "9999999h"} {
		if d, err := ParseDuration(bad); err == nil {
			t.Errorf("ParseDuration(%q) = %v", bad, d)
		}
	}
	if d, err := ParseDuration("1h30m"); d.Minutes() != 90 || err != nil {
		t.Errorf("1h30m: %v, %v", d, err)
	}
}
