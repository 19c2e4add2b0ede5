// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"strings"
	"testing"
	"time"
)

func parseText(t testing.TB, text string) *Config {
	t.Helper()
	c, err := Parse([]Source{{Name: "haproxy.cfg", Text: []byte(text)}}, Options{EnvComplete: true})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// version is the zero Version for "".
func version(t testing.TB, text string) Version {
	t.Helper()
	if text == "" {
		return Version{}
	}
	v, err := ParseVersion(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestFinTimeout has the rows of what was measured on real HAProxies, which the
// kernel tests repeat, and the fallbacks between them.
func TestFinTimeout(t *testing.T) {
	const (
		plain     = "timeout client 12s\ntimeout server 13s\n"
		fins      = plain + "timeout client-fin 3s\ntimeout server-fin 4s\n"
		tunnel    = "timeout tunnel 30s\n"
		unsetFin  = "haproxy.cfg:3 defaults timeout client 12s (client-fin unset)"
		noEffect  = "haproxy.cfg:3 defaults timeout client 12s (client-fin has no effect in mode http since HAProxy 3.0)"
		finClient = "haproxy.cfg:5 defaults timeout client-fin 3s"
		finServer = "haproxy.cfg:6 defaults timeout server-fin 4s"
	)
	for _, test := range []struct {
		name, mode, settings, version string
		side                          Side
		want                          time.Duration
		source                        string
	}{
		{"tcp", "tcp", fins, "2.6.12", ClientSide, 3 * time.Second, finClient},
		{"tcp", "tcp", fins, "3.2.1", ClientSide, 3 * time.Second, finClient},
		{"tcp, any version", "tcp", fins, "", ClientSide, 3 * time.Second, finClient},
		{"tcp with tunnel", "tcp", fins + tunnel, "3.4.7", ClientSide, 3 * time.Second, finClient},
		{"tcp, unset", "tcp", plain, "2.6.12", ClientSide, 12 * time.Second, unsetFin},
		{"tcp, 0 is unset", "tcp", plain + "timeout client-fin 0\n", "2.6.12", ClientSide, 12 * time.Second, unsetFin},
		{"tcp, unset, tunnel", "tcp", plain + tunnel, "2.6.12", ClientSide, 30 * time.Second,
			"haproxy.cfg:5 defaults timeout tunnel 30s (client-fin unset)"},
		{"tcp, nothing", "tcp", "", "2.6.12", ClientSide, 0, "timeout client and client-fin unset"},
		{"tcp, server", "tcp", fins, "3.0.11", ServerSide, 4 * time.Second, finServer},
		{"http", "http", fins, "2.6.12", ClientSide, 3 * time.Second, finClient},
		{"http, WebSocket not held", "http", fins + tunnel, "2.2.9", ClientSide, 3 * time.Second, finClient},
		{"http 3.0", "http", fins, "3.0.11", ClientSide, 12 * time.Second, noEffect},
		{"http 3.0, WebSocket not held", "http", fins + tunnel, "3.0.11", ClientSide, 12 * time.Second, noEffect},
		{"http 3.2, WebSocket", "http", fins + tunnel, "3.2.1", ClientSide, 30 * time.Second,
			"haproxy.cfg:7 defaults timeout tunnel 30s (client-fin has no effect in mode http since HAProxy 3.0; where it was not upgraded, client 12s)"},
		{"http 2.6, server", "http", fins + tunnel, "2.6.12", ServerSide, 4 * time.Second, finServer},
		{"http 3.0, server, WebSocket", "http", fins + tunnel, "3.0.11", ServerSide, 30 * time.Second,
			"haproxy.cfg:7 defaults timeout tunnel 30s (server-fin has no effect in mode http since HAProxy 3.0; where it was not upgraded, server 13s)"},
		{"http, unknown version", "http", fins, "", ClientSide, 12 * time.Second,
			"haproxy.cfg:3 defaults timeout client 12s (client-fin 3s before HAProxy 3.0, whose version is not known)"},
	} {
		t.Run(test.name+" "+test.version, func(t *testing.T) {
			c := parseText(t, "defaults\nmode "+test.mode+"\n"+test.settings+"listen www\nbind :80\n")
			got := c.FinTimeout(c.Proxies[0], test.side, version(t, test.version))
			if got.Duration != test.want || got.String() != test.source {
				t.Errorf("%v by %s, want %v by %s", got.Duration, got, test.want, test.source)
			}
		})
	}
}

// TestFinTimeoutTunnel: a frontend's connections end with the timeout tunnel of
// the backends that they may go to.
func TestFinTimeoutTunnel(t *testing.T) {
	const backends = `
defaults
	timeout client 10s
	timeout server 10s
frontend www
	bind :80
	USE
backend a
	timeout tunnel 1m
backend b
	timeout tunnel 1h
backend c
`
	for use, want := range map[string]time.Duration{
		"default_backend a":                     time.Minute,
		"default_backend c":                     10 * time.Second,
		"use_backend b if TRUE":                 time.Hour,
		"use_backend %[req.hdr(host)]":          time.Hour,
		"use_backend a if TRUE\nuse_backend c":  time.Minute,
		"default_backend c\nuse_backend b":      time.Hour,
		"default_backend c\nuse_backend a if X": time.Minute,
	} {
		c := parseText(t, strings.Replace(backends, "USE", use, 1))
		if got := c.FinTimeout(c.Proxies[0], ClientSide, Version{}); got.Duration != want {
			t.Errorf("with %s: %v, want %v", use, got.Duration, want)
		}
	}
}
