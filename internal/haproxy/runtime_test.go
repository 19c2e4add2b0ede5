// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const infoText = `Name: HAProxy
Version: 2.6.12-1+deb12u4
Nbthread: 2
Pid: 6154
Uptime: 0d 0h00m01s
Uptime_sec: 51
Ulimit-n: 20000
Maxconn: 9979
Hard_maxconn: 9980
CurrConns: 3
node: vm
description: "a, b: c"
Stopping: 1
Jobs: 6
Unstoppable Jobs: 1

`

const statText = `# pxname,svname,qcur,qmax,scur,smax,slim,stot,status,addr,
www,FRONTEND,,,4,7,9979,0,OPEN,,
app,s1,0,0,1,2,,0,no check,127.0.0.1:18081,
"a ""b"", c",BACKEND,0,0,0,0,998,0,UP,,

`

const serversText = `1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_fqdn srv_port srvrecord
3 app 1 s1 127.0.0.1 2 - 18081 -
3 app 2 s2 2001:db8::1 2 app.example 0 -
3 app 3 unix - 2 - 0 -

`

func TestParseAccount(t *testing.T) {
	want := account{
		info: &Info{Version: Version{2, 6, "2.6.12-1+deb12u4"}, PID: 6154, Maxconn: 9979, HardMaxconn: 9980, UlimitN: 20000,
			CurrConns: 3, Nbthread: 2, Stopping: true, UptimeSec: 51},
		stats: []ProxyStat{
			{Proxy: "www", Server: "FRONTEND", Scur: 4, Smax: 7, Slim: 9979, Status: "OPEN"},
			{Proxy: "app", Server: "s1", Scur: 1, Smax: 2, Slim: -1, Addr: "127.0.0.1:18081", Status: "no check"},
			{Proxy: `a "b", c`, Server: "BACKEND", Slim: 998, Status: "UP"},
		},
		servers: []ServerAddr{
			{"app", "s1", netip.MustParseAddrPort("127.0.0.1:18081")},
			{"app", "s2", netip.MustParseAddrPort("[2001:db8::1]:0")},
		},
	}
	refused := "Permission denied\n\n"
	unsaid := &Info{PID: 1, Maxconn: -1, HardMaxconn: -1, UlimitN: -1, CurrConns: -1, Nbthread: -1, UptimeSec: -1}
	for name, test := range map[string]struct {
		answer string
		want   account
	}{
		"all":                {infoText + statText + serversText, want},
		"servers refused":    {infoText + statText + refused, account{info: want.info, stats: want.stats}},
		"stats refused":      {infoText + refused + serversText, account{info: want.info, servers: want.servers}},
		"cut off":            {infoText[:len(infoText)-1], account{info: want.info}},
		"numbers not said":   {"Name: HAProxy\nPid: 1\n\n", account{info: unsaid}},
		"no pid":             {"Name: HAProxy\nVersion: 2.6.12\n\n", account{}},
		"nothing":            {"", account{}},
		"something else":     {"HTTP/1.1 400 Bad Request\r\n\r\n", account{}},
		"a terminal's codes": {"Name: HAProxy\nVersion: 2.6\x1b[2J\nPid: 1\n\n", account{info: unsaid}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, parseAccount([]byte(test.answer)), cmp.AllowUnexported(account{}), cmp.Comparer(sameAddrPort)); diff != "" {
				t.Errorf("account (-want +got):\n%s", diff)
			}
		})
	}
}

func sameAddrPort(a, b netip.AddrPort) bool { return a == b }

func FuzzParseAccount(f *testing.F) {
	f.Add([]byte(infoText + statText + serversText))
	f.Add([]byte("1\n# be_id be_name srv_name srv_addr srv_port\n1\n\n"))
	f.Add([]byte("# pxname,svname,\n\"\n\n"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		a := parseAccount(answer)
		if a.info != nil && a.info.PID <= 0 {
			t.Error("an account of no process")
		}
		for _, s := range a.servers {
			if !s.Addr.Addr().IsValid() {
				t.Errorf("server %q has no address", s.Server)
			}
		}
	})
}

// serve is a runtime socket that does as told with each connection.
func serve(t *testing.T, network, address string, handle func(net.Conn)) net.Addr {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
	return l.Addr()
}

// answer reads until the other end has no more to say, as a master does, and
// says its own.
func answer(text string) func(net.Conn) {
	return func(conn net.Conn) {
		if question, _ := io.ReadAll(conn); len(question) > 0 {
			io.WriteString(conn, text)
		}
	}
}

func hang(conn net.Conn) { io.Copy(io.Discard, conn); time.Sleep(time.Minute) }

func TestAskAddresses(t *testing.T) {
	dir := t.TempDir()
	long := filepath.Join(dir, strings.Repeat("long/", 30))
	if err := os.MkdirAll(long, 0o700); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(dir, "s")
	serve(t, "unix", short, answer("yes"))
	if err := os.Rename(short, long+"/haproxy.sock"); err != nil {
		t.Fatal(err)
	}
	serve(t, "unix", short, answer("yes"))
	name := fmt.Sprintf("fintrace-test-%d", os.Getpid())
	serve(t, "unix", "@"+name, answer("yes"))
	// HAProxy's abns@ pads the name with zeros to all of sun_path.
	serve(t, "unix", "@"+name+strings.Repeat("\x00", 107-len(name)), answer("padded"))
	port := serve(t, "tcp4", "127.0.0.1:0", answer("yes")).(*net.TCPAddr).Port

	for address, want := range map[string]string{
		short:                                "yes",
		"unix@" + short:                      "yes",
		"uxst@" + short:                      "yes",
		long + "/haproxy.sock":               "yes",
		"abnsz@" + name:                      "yes",
		"abns@" + name:                       "padded",
		fmt.Sprintf("127.0.0.1:%d", port):    "yes",
		fmt.Sprintf("ipv4@*:%d", port):       "yes",
		fmt.Sprintf("localhost:%d", port):    "yes",
		fmt.Sprintf("stream+ip@:%d", port):   "yes",
		fmt.Sprintf("tcp4@0.0.0.0:%d", port): "yes",
	} {
		got, err := Ask(t.Context(), address, "show info")
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", address, got, err, want)
		}
	}
}

func TestQueryProblems(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	serve(t, "unix", path("hangs"), hang)
	serve(t, "unix", path("web"), answer("HTTP/1.1 400 Bad Request\r\n\r\n"))
	serve(t, "unix", path("silent"), answer(""))
	serve(t, "unix", path("master"), answer("Unknown command, but maybe one of the following ones is a better match:\n  show proc  : x\n\n"))
	serve(t, "unix", path("endless"), func(conn net.Conn) {
		block := make([]byte, 1<<20)
		for {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	})
	l, err := net.Listen("unix", path("closed"))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if err := os.WriteFile(path("file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]string{
		path("hangs"):                      "no answer in 300ms: is haproxy stopped, or overloaded?",
		path("web"):                        `what answers is not haproxy: "HTTP/1.1 400 Bad Request\r"`,
		path("silent"):                     `what answers is not haproxy: ""`,
		path("master"):                     "that is a master's socket (-S): give the address of `stats socket` in haproxy's global section",
		path("endless"):                    "its answer is longer than 32 MB",
		path("closed"):                     "nobody listens there: haproxy has ended, or has opened another since",
		path("file"):                       "that is not a socket: give the address of `stats socket` in haproxy's global section",
		path("none"):                       "it does not exist: is haproxy running, with that `stats socket` in its global section?",
		"fd@3":                             "that is not an address that can be connected to: use one such as /run/haproxy/admin.sock or ipv4@127.0.0.1:9999",
		"abns@" + strings.Repeat("n", 108): "that is not an address that can be connected to: use one such as /run/haproxy/admin.sock or ipv4@127.0.0.1:9999",
	} {
		limit := askTime
		if strings.HasSuffix(address, "hangs") {
			limit = 300 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		began := time.Now()
		_, err := endpoint{address: address}.query(ctx, "")
		cancel()
		if took := time.Since(began); took > askTime+time.Second {
			t.Errorf("%s: took %v", address, took)
		}
		if want := "haproxy runtime socket " + address + ": " + want; err == nil || err.Error() != want {
			t.Errorf("error\n%v, want\n%s", err, want)
		}
	}
}

// TestQueryPermission asks as a user that the socket's mode keeps out.
func TestQueryPermission(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not run: it needs root, to become somebody else")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(dir); d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "s")
	serve(t, "unix", path, answer(infoText))
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	err := asNobody(func() error {
		_, err := Ask(t.Context(), path, "show info")
		return err
	})
	want := "haproxy runtime socket " + path + ": permission denied: run as root, or as a user whom the mode of `stats socket` lets in"
	if err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if _, err := Ask(t.Context(), path, "show info"); err != nil {
		t.Errorf("as root: %v", err)
	}
}

// asNobody calls fn on a thread of its own with the rights to files of nobody.
func asNobody(fn func() error) error {
	const nobody = 65534
	done := make(chan error)
	go func() {
		// The thread ends with the goroutine, which does not unlock it.
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETFSUID, nobody, 0, 0); errno != 0 {
			done <- errors.New("setfsuid: " + errno.Error())
			return
		}
		done <- fn()
	}()
	return <-done
}
