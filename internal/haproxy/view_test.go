// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"net/netip"
	"testing"
)

const (
	home, blue = 100, 200 // network namespaces
	eth0, eth1 = 2, 3     // interfaces
)

const mapped = `
global
defaults
	timeout client 1h
	timeout server 1h
frontend https
	bind *:443
	bind :8000-8010
frontend special
	bind 192.0.2.1:443,192.0.2.2:80
frontend v6
	bind :::443 v6only
	bind [2001:db8::1]:9443
frontend both
	bind :::7000 v4v6
frontend zero
	bind :5000 interface eth0
frontend one
	bind :5000 interface eth1
frontend any
	bind :5000
frontend blue
	bind :443 namespace blue
frontend local
	bind /run/x.sock
	bind udp@:9999
frontend off
	disabled
	bind :6000
listen both-sides
	bind :4000
	server db 192.0.2.50:5432
backend app
	server web1 192.0.2.10:8080
	server web2 192.0.2.11:8080
	server same 192.0.2.12
	server named app.example.com:80
	server blue 192.0.2.10:8080 namespace blue
	server far 203.0.113.1:80 socks4 192.0.2.99:1080
backend api
	timeout server-fin 5s
	server web2 192.0.2.11:8080
	server-template t 1-3 198.51.100.7:90
backend twice
	server a 192.0.2.60:80
	server b 192.0.2.60:80
backend transparent
	server origin 0.0.0.0:3128
`

func testView(t *testing.T) *View {
	c := parseText(t, mapped)
	other := parseText(t, "frontend theirs\nbind :443\n")
	return NewView([]Process{
		{PID: 9, Netns: home, Old: true, Config: c, Version: version(t, "2.6")},
		{PID: 10, Netns: home, Config: c, Version: version(t, "2.6"),
			Interfaces: map[string]uint32{"eth0": eth0, "eth1": eth1},
			Namespaces: map[string]uint32{"blue": blue},
			Servers: []ServerAddr{
				{"app", "named", netip.MustParseAddrPort("198.51.100.80:80")},
				{"app", "web1", netip.MustParseAddrPort("192.0.2.20:8080")}, // moved by set server addr
			}},
		{PID: 11, Netns: 300, Config: other},
		{PID: 12, Netns: home}, // its configuration cannot be read
	})
}

func TestFind(t *testing.T) {
	v := testView(t)
	client := netip.MustParseAddrPort("198.51.100.1:33000")
	for _, test := range []struct {
		name   string
		local  string
		netns  uint32
		device uint32
		pid    int
		want   string
	}{
		{"any address", "192.0.2.9:443", home, 0, 10, "https"},
		{"as v4-mapped", "[::ffff:192.0.2.9]:443", home, 0, 10, "https"},
		{"the address itself comes first", "192.0.2.1:443", home, 0, 10, "special"},
		{"second address of a bind", "192.0.2.2:80", home, 0, 10, "special"},
		{"no such address", "192.0.2.3:80", home, 0, 10, ""},
		{"first of a range", "192.0.2.9:8000", home, 0, 10, "https"},
		{"last of a range", "192.0.2.9:8010", home, 0, 10, "https"},
		{"past the range", "192.0.2.9:8011", home, 0, 10, ""},
		{"v6", "[2001:db8::9]:443", home, 0, 10, "v6"},
		{"v6 address", "[2001:db8::1]:9443", home, 0, 10, "v6"},
		{"v4 on a v6 listener", "192.0.2.9:7000", home, 0, 10, "both"},
		{"v6 on it", "[2001:db8::9]:7000", home, 0, 10, "both"},
		{"interface", "192.0.2.9:5000", home, eth1, 10, "one"},
		{"other interface", "192.0.2.9:5000", home, eth0, 10, "zero"},
		{"no interface", "192.0.2.9:5000", home, 0, 10, "any"},
		{"namespace of the bind", "192.0.2.9:443", blue, 0, 10, "blue"},
		{"not TCP", "192.0.2.9:9999", home, 0, 10, ""},
		{"disabled", "192.0.2.9:6000", home, 0, 10, ""},
		{"process not known", "192.0.2.9:443", home, 0, 0, "https"},
		{"of another namespace", "192.0.2.9:443", 300, 0, 0, "theirs"},
		{"of no HAProxy's namespace", "192.0.2.9:443", 400, 0, 0, ""},
		{"another process", "192.0.2.9:443", home, 0, 77, ""},
		{"no configuration", "192.0.2.9:443", home, 0, 12, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := v.Find(Socket{Netns: test.netns, Local: netip.MustParseAddrPort(test.local), Remote: client,
				Device: test.device, Side: ClientSide, PID: test.pid})
			got := ""
			if n != 0 {
				got = v.Place(n).Name()
			}
			if got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

func TestFindServer(t *testing.T) {
	v := testView(t)
	local := netip.MustParseAddrPort("192.0.2.9:40000")
	for _, test := range []struct {
		name, remote string
		netns        uint32
		want         string // backend/server
	}{
		{"where the runtime says", "192.0.2.20:8080", home, "app/web1"},
		{"where it was", "192.0.2.10:8080", home, ""},
		{"two backends", "192.0.2.11:8080", home, "app or api/"},
		{"any port", "192.0.2.12:1234", home, "app/same"},
		{"a name", "198.51.100.80:80", home, "app/named"},
		{"a listen section", "192.0.2.50:5432", home, "both-sides/db"},
		{"namespace of the server", "192.0.2.10:8080", blue, "app/blue"},
		{"SOCKS4", "192.0.2.99:1080", home, "app/far"},
		{"behind SOCKS4", "203.0.113.1:80", home, ""},
		{"template", "198.51.100.7:90", home, "api/"},
		{"two servers of one address", "192.0.2.60:80", home, "twice/"},
		{"where the client was going", "203.0.113.77:3128", home, "transparent/origin"},
		{"nobody's", "203.0.113.77:3129", home, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := v.Find(Socket{Netns: test.netns, Local: local, Remote: netip.MustParseAddrPort(test.remote), Side: ServerSide, PID: 10})
			got := ""
			if n != 0 {
				got = v.Place(n).Name() + "/" + v.Place(n).Server
			}
			if got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// TestPlace: the current worker is named where it is not known which, the
// longest timeout where it is not known whose, and nothing of a configuration
// that a process may not run with.
func TestPlace(t *testing.T) {
	v := testView(t)
	find := func(s Socket) *Place { return v.Place(v.Find(s)) }
	https := Socket{Netns: home, Local: netip.MustParseAddrPort("192.0.2.9:443"), Side: ClientSide}
	if p := find(https); p.Process.PID != 10 || !p.Certain() {
		t.Errorf("of an unknown process: %d", p.Process.PID)
	}
	https.PID = 9
	if p := find(https); p.Process.PID != 9 || !p.Process.Old {
		t.Errorf("of the old worker: %d", p.Process.PID)
	}
	shared := Socket{Netns: home, Remote: netip.MustParseAddrPort("192.0.2.11:8080"), Side: ServerSide, PID: 10}
	if p := find(shared); p.Certain() || p.Timeout.Name != "server" || !p.Timeout.Uncertain || !p.Has("app") || !p.Has("api") || p.Has("twice") {
		t.Errorf("of two backends: %+v", p.Timeout)
	}
	changed := NewView([]Process{{PID: 1, Netns: home, Changed: true, Config: parseText(t, mapped)}})
	if _, known := changed.Place(changed.Find(Socket{Netns: home, Local: https.Local, Side: ClientSide})).Ends(); known {
		t.Error("the timeout of a configuration that has changed since is taken for known")
	}
	if a, b := v.Find(https), v.Find(https); a != b {
		t.Errorf("one place has the numbers %d and %d", a, b)
	}
}

func BenchmarkFind(b *testing.B) {
	c, err := Parse([]Source{{Name: "haproxy.cfg", Text: []byte(mapped)}}, Options{EnvComplete: true})
	if err != nil {
		b.Fatal(err)
	}
	v := NewView([]Process{{PID: 10, Netns: home, Config: c}})
	s := Socket{Netns: home, Local: netip.MustParseAddrPort("192.0.2.9:443"), Side: ClientSide, PID: 10}
	b.ReportAllocs()
	for b.Loop() {
		v.Find(s)
	}
}
