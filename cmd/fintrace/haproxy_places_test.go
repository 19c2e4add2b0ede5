// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

// places is one HAProxy that listens in every way, and connects in some.
// BLUE is a network namespace with a name, ORIGIN a server's port.
const places = `
defaults
	mode tcp
	timeout connect 10s
	timeout client 1h
	timeout client-fin 30s
	timeout server 1h
	timeout server-fin 30s
	default_backend servers
frontend any
	bind :7000
frontend range
	bind 127.0.0.1:7100-7120
frontend specific
	bind 127.0.0.2:7000,127.0.0.3:7001
frontend v6
	bind [::1]:7200
frontend both
	bind :::7300 v4v6
frontend on-veth
	bind :7400 interface fintrace0
frontend on-lo
	bind :7400 interface lo
frontend elsewhere
	bind :7000 namespace BLUE
frontend named
	bind :7500
	default_backend by-name
frontend shared-one
	bind :7600
	default_backend first
backend servers
	server origin 127.0.0.1:ORIGIN
backend by-name
	server lookup nowhere.invalid:ORIGIN init-addr 127.0.0.5
backend first
	server a 127.0.0.6:ORIGIN
backend second
	server b 127.0.0.6:ORIGIN
`

// TestPlaces makes a connection through each listener, and has the server or
// the client close its side: the records name the proxy, the server and what
// should end it.
func TestPlaces(t *testing.T) {
	kerneltest.Require(t)
	versions := haproxytest.Versions(t)
	var spaces []*kerneltest.Namespace
	for range versions {
		spaces = append(spaces, kerneltest.NewNamespace(t), kerneltest.NewNamespace(t))
	}
	tr := traceJSON(t, spaces)
	for i, v := range versions {
		t.Run(v.Name, func(t *testing.T) { testPlaces(t, tr, v, spaces[2*i], spaces[2*i+1]) })
	}
}

func testPlaces(t *testing.T, tr *jsonTrace, v haproxytest.Version, ns, blue *kerneltest.Namespace) {
	name := nameNetns(t, v, blue)
	var origin net.Listener
	var err error
	ns.Do(func() { origin, err = net.Listen("tcp4", "0.0.0.0:20000") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { origin.Close() })
	ns.Do(func() {
		for _, args := range []string{"link add fintrace0 type veth peer name fintrace1", "link set fintrace0 up"} {
			if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", args, err, out)
			}
		}
	})
	config := strings.NewReplacer("BLUE", name, "ORIGIN", "20000").Replace(places)
	h := haproxytest.Start(t, ns, v, haproxytest.Foreground, config)
	for _, test := range []struct {
		at      string
		in      *kerneltest.Namespace
		proxies []string
		server  string // where the client closes; "?" is not known
	}{
		{at: "127.0.0.1:7000", in: ns, proxies: []string{"any"}},
		{at: "127.0.0.1:7100", in: ns, proxies: []string{"range"}},
		{at: "127.0.0.1:7120", in: ns, proxies: []string{"range"}},
		{at: "127.0.0.2:7000", in: ns, proxies: []string{"specific"}},
		{at: "127.0.0.3:7001", in: ns, proxies: []string{"specific"}},
		{at: "[::1]:7200", in: ns, proxies: []string{"v6"}},
		{at: "[::1]:7300", in: ns, proxies: []string{"both"}},
		{at: "127.0.0.1:7300", in: ns, proxies: []string{"both"}},
		{at: "127.0.0.1:7400", in: ns, proxies: []string{"on-lo"}},
		{at: "127.0.0.1:7000", in: blue, proxies: []string{"elsewhere"}},
		{at: "127.0.0.1:7000", in: ns, proxies: []string{"servers"}, server: "origin"},
		{at: "127.0.0.1:7500", in: ns, proxies: []string{"by-name"}, server: "lookup"},
		{at: "127.0.0.1:7600", in: ns, proxies: []string{"first", "second"}, server: "?"},
	} {
		side := map[bool]string{true: "server", false: "client"}[test.server != ""]
		t.Run(fmt.Sprintf("%s of %s, %s", test.at, strings.Join(test.proxies, " or "), side), func(t *testing.T) {
			var r report.Record
			// A process that is new is looked up while its first connections come;
			// and the kernel skips the event that names the closer now and then,
			// while another test's program is being attached.
			err := await("the trace to know the process", func() bool {
				client, server := through(t, test.in, "", test.at, origin)
				key := flowKey{test.in.Inode, client.RemoteAddr().String(), client.LocalAddr().String()}
				closes := server
				if side == "server" {
					key = flowKey{ns.Inode, server.RemoteAddr().String(), server.LocalAddr().String()}
					closes = client
				}
				if err := closes.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				tr.await(t, key, "opened")
				client.Close()
				server.Close()
				r = tr.await(t, key, "closed")
				return r.HAProxy != nil && r.PID != 0
			})
			if err != nil {
				t.Fatalf("%v: %+v", err, r)
			}
			got := r.HAProxy.Proxies
			if r.HAProxy.Proxy != "" {
				got = []string{r.HAProxy.Proxy}
			}
			wantServer := strings.Trim(test.server, "?")
			if !slices.Equal(got, test.proxies) || r.HAProxy.Side != side || r.HAProxy.Server != wantServer || r.HAProxy.Old {
				t.Errorf("%+v, want %s %q of %s", *r.HAProxy, side, wantServer, test.proxies)
			}
			if want := fmt.Sprintf("haproxy.cfg:%d defaults timeout %s-fin 30s", map[string]int{"client": 6, "server": 8}[side], side); r.Stage == events.Held.String() && !strings.HasPrefix(r.LimitSource, want) {
				t.Errorf("its limit is %q, want %q", r.LimitSource, want)
			}
			if int(r.PID) != h.PID() {
				t.Errorf("it is of process %d, want %d", r.PID, h.PID())
			}
		})
	}
}

// nameNetns gives a namespace a name where a HAProxy looks for it.
func nameNetns(t *testing.T, v haproxytest.Version, ns *kerneltest.Namespace) (name string) {
	t.Helper()
	name = fmt.Sprintf("fintrace-test-%d-%s", os.Getpid(), v.Name)
	dir := filepath.Join(v.Root, "/var/run/netns")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	})
	bindMount(t, ns.Path(), path)
	if v.Root != "" { // where its own namespace is to be found too
		proc := filepath.Join(v.Root, "proc")
		if err := os.MkdirAll(proc, 0o755); err != nil {
			t.Fatal(err)
		}
		bindMount(t, "/proc", proc)
	}
	return name
}

// bindMount shows what is at one path at another until the end of the test.
func bindMount(t *testing.T, from, at string) {
	t.Helper()
	if err := unix.Mount(from, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// through makes a connection through HAProxy, from an address if that is not
// "", and returns both its ends.
func through(t *testing.T, ns *kerneltest.Namespace, from, to string, origin net.Listener) (client, server *net.TCPConn) {
	t.Helper()
	var dialer net.Dialer
	if from != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	var c net.Conn
	var err error
	ns.Do(func() { c, err = dialer.Dial("tcp", to) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	s, err := origin.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := readTo(s, "hello"); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}
