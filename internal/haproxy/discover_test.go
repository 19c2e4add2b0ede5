// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

const proxyText = `
defaults
	mode tcp
	timeout connect 1s
	timeout client 1h
	timeout server 1h
frontend www
	bind 127.0.0.1:8080
	default_backend app
backend app
	server s1 127.0.0.1:8081
`

// one is what was found of a process.
func one(t *testing.T, found Found, pid int) Process {
	t.Helper()
	for _, p := range found.Processes {
		if p.PID == pid {
			return p
		}
	}
	t.Fatalf("process %d was not found among %+v", pid, found)
	return Process{}
}

func knows(found Found, pid int) bool {
	return slices.ContainsFunc(found.Processes, func(p Process) bool { return p.PID == pid })
}

// TestDiscover finds every version, with and without a master, in a network
// namespace, and after a reload while the old worker holds a connection.
func TestDiscover(t *testing.T) {
	for _, v := range haproxytest.Versions(t) {
		for _, mode := range []haproxytest.Mode{haproxytest.Foreground, haproxytest.MasterWorker} {
			t.Run(v.Name+"/"+mode.String(), func(t *testing.T) {
				ns := kerneltest.NewNamespace(t)
				h := haproxytest.Start(t, ns, v, mode, proxyText)
				first := h.Worker()
				check := func(p Process) {
					t.Helper()
					master := 0
					if mode == haproxytest.MasterWorker {
						master = h.PID()
						if knows(Discover(t.Context(), DiscoverOptions{}), master) {
							t.Errorf("the master %d is taken for a worker", master)
						}
					}
					if p.Master != master || p.Netns != ns.Inode || p.Version.Text != v.Text || p.Changed {
						t.Errorf("process %+v: want master %d, netns %d, version %s", p, master, ns.Inode, v.Text)
					}
					if p.Config == nil || !slices.Equal(p.Config.Files, []string{v.Inside(h.ConfigPath())}) || len(p.Config.Proxies) != 2 {
						t.Errorf("configuration %+v, problems %q", p.Config, p.Problems)
					}
				}
				answered := func(p Process) {
					t.Helper()
					switch {
					case len(p.Problems) > 0:
						t.Errorf("problems: %q", p.Problems)
					case p.Info == nil || p.Info.PID != p.PID || p.Info.Version.Text != v.Text || p.Info.Maxconn <= 0 || p.Info.Stopping != p.Old:
						t.Errorf("info: %+v of %+v", p.Info, p)
					case len(p.Stats) != 3 || p.Stats[0].Proxy != "www" || p.Stats[0].Slim <= 0:
						t.Errorf("stats: %+v", p.Stats)
					case !slices.Equal(p.Servers, []ServerAddr{{"app", "s1", netip.MustParseAddrPort("127.0.0.1:8081")}}):
						t.Errorf("servers: %+v", p.Servers)
					}
				}
				p := one(t, Discover(t.Context(), DiscoverOptions{}), first)
				check(p)
				answered(p)
				if p.Old {
					t.Error("it is old")
				}
				if age := time.Since(p.Start); age < 0 || age > time.Minute {
					t.Errorf("it started %v ago", age)
				}

				ns.Do(func() { holdConnection(t) })
				h.Reload()
				found := Discover(t.Context(), DiscoverOptions{})
				check(one(t, found, h.Worker()))
				answered(one(t, found, h.Worker()))
				if one(t, found, h.Worker()).Old {
					t.Error("the new one is old")
				}
				old := one(t, found, first)
				check(old)
				if !old.Old {
					t.Errorf("the old one is not: %+v", old)
				}
				// Only a master can still ask it, and 2.2 only for a moment.
				switch {
				case mode == haproxytest.Foreground && old.Info != nil:
					t.Errorf("who has asked the old one? %+v", old.Info)
				case mode == haproxytest.MasterWorker && v.AtLeast(2, 6):
					answered(old)
				}
			})
		}
	}
}

// holdConnection makes one through the proxy that stays until the test ends.
func holdConnection(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:8081")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	client, err := net.Dial("tcp", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
}

// TestDiscoverChroot: a process that is chrooted does not see its own files.
func TestDiscoverChroot(t *testing.T) {
	for _, mode := range []haproxytest.Mode{haproxytest.Foreground, haproxytest.MasterWorker} {
		t.Run(mode.String(), func(t *testing.T) {
			h := haproxytest.Start(t, kerneltest.NewNamespace(t), haproxytest.System(t), mode,
				"global\n\tchroot "+t.TempDir()+proxyText)
			p := one(t, Discover(t.Context(), DiscoverOptions{}), h.Worker())
			if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", p.PID)); err != nil || root == "/" {
				t.Fatalf("it is not chrooted: %q, %v", root, err)
			}
			if p.Config == nil || len(p.Config.Proxies) != 2 || p.Info == nil || len(p.Problems) > 0 {
				t.Errorf("found %+v", p)
			}
		})
	}
}

// TestDiscoverMoved: relative paths, -C, a directory, symbolic links, variables
// and several files.
func TestDiscoverMoved(t *testing.T) {
	v := haproxytest.System(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := func(target, name string) {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write("conf/d/2.cfg", "backend b\n\tserver s 127.0.0.1:8081\n")
	write("conf/d/1.cfg", "frontend a\n\tbind ${FINTRACE_BIND}\n\tdefault_backend b\n")
	write("conf/d/0.txt", "this is not read")
	write("conf/d/.0.cfg", "nor is this")
	write("conf/d/0.cfg.cfg", "nor this")
	link(write("real/global.cfg", "global\n\tstats socket \"unix@$FINTRACE_DIR/s\"\n\tmaxconn 77\n"), "conf/global.cfg")
	link(write("real/elsewhere/defaults.cfg", proxyText[:strings.Index(proxyText, "frontend")]), "conf/defaults.cfg")
	link(filepath.Join(dir, "real/elsewhere"), "conf/link")

	cmd := exec.Command("/usr/sbin/haproxy", "-db", "-C", "conf", "-f", "global.cfg", "-f", "link/../elsewhere/defaults.cfg", "--", "d")
	cmd.Dir = dir
	cmd.Env = []string{"FINTRACE_DIR=" + dir, "FINTRACE_BIND=127.0.0.1:8080"}
	pid := run(t, cmd, filepath.Join(dir, "s"))
	p := one(t, Discover(t.Context(), DiscoverOptions{}), pid)
	if p.Config == nil || p.Info == nil || len(p.Problems) > 0 {
		t.Fatalf("found %+v", p)
	}
	if want := []string{"global.cfg", "link/../elsewhere/defaults.cfg", "d/1.cfg", "d/2.cfg"}; !slices.Equal(p.Config.Files, want) {
		t.Errorf("files %q, want %q", p.Config.Files, want)
	}
	if p.Config.Global.Maxconn.Value != 77 || len(p.Config.Proxies) != 2 || p.Config.Proxies[0].Binds[0].Addrs[0].First != 8080 {
		t.Errorf("configuration %+v", p.Config)
	}
	if p.Version.Text != v.Text {
		t.Errorf("version %+v", p.Version)
	}
}

// run starts HAProxy in a network namespace and waits until its socket answers.
func run(t *testing.T, cmd *exec.Cmd, socket string) (pid int) {
	t.Helper()
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	kerneltest.NewNamespace(t).Do(func() {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := Ask(t.Context(), socket, "show info")
		if err == nil {
			return cmd.Process.Pid
		}
		select {
		case <-ended:
			t.Fatalf("haproxy has ended:\n%s", output.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestDiscoverChanged: a process runs what was in its files when it started.
func TestDiscoverChanged(t *testing.T) {
	h := haproxytest.Start(t, kerneltest.NewNamespace(t), haproxytest.System(t), haproxytest.Foreground, proxyText)
	before := Discover(t.Context(), DiscoverOptions{})
	pid := h.Worker()
	if one(t, before, pid).Changed {
		t.Error("its files have changed before they did")
	}

	h.WriteConfig(strings.Replace(proxyText, "1h", "1m", 1))
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(h.ConfigPath(), later, later); err != nil {
		t.Fatal(err)
	}
	client := func(p Process) time.Duration { return p.Config.Proxies[0].Timeouts["client"].Value }
	for range 2 { // what was kept is kept again
		after := Discover(t.Context(), DiscoverOptions{Previous: before.Processes})
		if p := one(t, after, pid); p.Changed || client(p) != time.Hour {
			t.Errorf("with what was read before: changed %v, timeout client %v", p.Changed, client(p))
		}
		before = after
	}
	fresh := Discover(t.Context(), DiscoverOptions{})
	if p := one(t, fresh, pid); !p.Changed || client(p) != time.Minute {
		t.Errorf("without what was read before: changed %v, timeout client %v", p.Changed, client(p))
	}
	// What was never known stays unknown.
	if p := one(t, Discover(t.Context(), DiscoverOptions{Previous: fresh.Processes}), pid); !p.Changed {
		t.Error("it was changed when it was first seen, and now it is not")
	}

	h.WriteConfig("not a configuration\n")
	found := Discover(t.Context(), DiscoverOptions{Previous: before.Processes})
	if p := one(t, found, pid); p.Config == nil || client(p) != time.Hour || p.Info == nil || len(p.Problems) != 1 {
		t.Errorf("with a broken file: %+v", p)
	}
}

func TestDiscoverGiven(t *testing.T) {
	h := haproxytest.Start(t, kerneltest.NewNamespace(t), haproxytest.System(t), haproxytest.Foreground, proxyText)
	other := filepath.Join(t.TempDir(), "other.cfg")
	if err := os.WriteFile(other, []byte("global\n\tmaxconn 5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	found := Discover(t.Context(), DiscoverOptions{Paths: []string{other}, Socket: h.SocketPath()})
	p := one(t, found, h.Worker())
	if p.Config == nil || p.Config.Global.Maxconn.Value != 5 || p.Info == nil || len(p.Problems) > 0 {
		t.Errorf("found %+v", p)
	}
	found = Discover(t.Context(), DiscoverOptions{Socket: "/nowhere/haproxy.sock"})
	want := []string{"haproxy runtime socket /nowhere/haproxy.sock: it does not exist: is haproxy running, with that `stats socket` in its global section?"}
	if p := one(t, found, h.Worker()); p.Info != nil || p.Config == nil || !slices.Equal(found.Problems, want) {
		t.Errorf("found %+v, problems %q", p, found.Problems)
	}
}

// fakeProc is a /proc of processes that are not.
type fakeProc struct {
	t   *testing.T
	dir string
}

func newFakeProc(t *testing.T) fakeProc {
	f := fakeProc{t, t.TempDir()}
	f.write("uptime", "1000.00 2000.00\n")
	f.link("mnt:[1]", "self/ns/mnt")
	f.link("net:[2]", "self/ns/net")
	f.link("/", "self/root")
	return f
}

func (f fakeProc) write(name, text string) string {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
	return path
}

func (f fakeProc) writeAt(path, text string) {
	f.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f fakeProc) link(target, name string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		f.t.Fatal(err)
	}
}

// A fakeTask is one of them; what is not set is what is common.
type fakeTask struct {
	pid, ppid, seconds int // when it started, since boot
	comm, args, env    string
	nspid              string
	mnt, net           int
	root               string // "" has none that can be read
}

func (f fakeProc) add(p fakeTask) {
	f.t.Helper()
	name := func(file string) string { return fmt.Sprintf("%d/%s", p.pid, file) }
	if p.comm == "" {
		p.comm = "haproxy"
	}
	if p.nspid == "" {
		p.nspid = fmt.Sprint(p.pid)
	}
	f.write(name("comm"), p.comm+"\n")
	f.write(name("cmdline"), strings.ReplaceAll(p.args, " ", "\x00")+"\x00")
	f.write(name("stat"), fmt.Sprintf("%d (%s) S %d%s %d 0 0\n", p.pid, p.comm, p.ppid, strings.Repeat(" 0", 17), p.seconds*100))
	f.write(name("status"), "Name:\tx\nNSpid:\t"+strings.ReplaceAll(p.nspid, " ", "\t")+"\nThreads:\t1\n")
	f.write(name("environ"), strings.ReplaceAll(p.env, " ", "\x00"))
	f.link(fmt.Sprintf("mnt:[%d]", max(p.mnt, 1)), name("ns/mnt"))
	f.link("pid:[1]", name("ns/pid"))
	f.link(fmt.Sprintf("net:[%d]", max(p.net, 2)), name("ns/net"))
	if p.root != "" {
		f.link(p.root, name("root"))
		f.link(p.root, name("cwd"))
	}
}

func (f fakeProc) discover() Found { return f.discoverAfter(Found{}) }

func (f fakeProc) discoverAfter(before Found) Found {
	ctx, cancel := context.WithTimeout(f.t.Context(), 20*time.Second)
	defer cancel()
	return Discover(ctx, DiscoverOptions{Proc: f.dir, Previous: before.Processes})
}

// TestDiscoverOld tells processes that are finishing from those that took over.
func TestDiscoverOld(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(root+"/h.cfg", []byte(proxyText), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/several.cfg", []byte("global\n\tnbproc 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const run, several = "haproxy -f /h.cfg", "haproxy -f /several.cfg -W"
	type is struct {
		master int
		old    bool
	}
	for name, test := range map[string]struct {
		tasks []fakeTask
		want  map[int]is
	}{
		"one": {
			[]fakeTask{{pid: 10, args: run}},
			map[int]is{10: {}},
		},
		"a master and its workers": {
			[]fakeTask{{pid: 10, args: run + " -W"}, {pid: 11, ppid: 10, seconds: 5, args: run + " -W"}, {pid: 12, ppid: 10, seconds: 9, args: run + " -W"}},
			map[int]is{11: {10, true}, 12: {10, false}},
		},
		"a reload at once": {
			[]fakeTask{{pid: 10, args: run + " -W"}, {pid: 11, ppid: 10, seconds: 5, args: run + " -W"}, {pid: 12, ppid: 10, seconds: 5, args: "haproxy -sf 11 -x sockpair@4 -f /h.cfg -W"}},
			map[int]is{11: {10, true}, 12: {10, false}},
		},
		"processes of nbproc": {
			[]fakeTask{{pid: 10, args: several}, {pid: 11, ppid: 10, seconds: 5, args: several}, {pid: 12, ppid: 10, seconds: 6, args: several}},
			map[int]is{11: {10, false}, 12: {10, false}},
		},
		"a reload within a second": {
			[]fakeTask{{pid: 10, args: run + " -W"}, {pid: 11, ppid: 10, seconds: 5, args: run + " -W"}, {pid: 12, ppid: 10, seconds: 6, args: run + " -W"}},
			map[int]is{11: {10, true}, 12: {10, false}},
		},
		"a reload that failed": { // whose master names its worker ever after
			[]fakeTask{{pid: 10, seconds: 5, args: "haproxy -sf 11 -f /h.cfg -W"}, {pid: 11, ppid: 10, seconds: 5, args: run + " -W"}},
			map[int]is{11: {10, false}},
		},
		"what a worker starts": {
			[]fakeTask{{pid: 10, args: run + " -W"}, {pid: 11, ppid: 10, seconds: 5, args: run + " -W"}, {pid: 12, ppid: 11, seconds: 6, args: run + " -W"}},
			map[int]is{11: {10, false}},
		},
		"a master that loads": {
			[]fakeTask{{pid: 10, args: run + " -W"}},
			map[int]is{},
		},
		"-sf": {
			[]fakeTask{{pid: 10, args: run}, {pid: 11, seconds: 1, args: run + " -sf 10"}},
			map[int]is{10: {0, true}, 11: {}},
		},
		"-st of other files": {
			[]fakeTask{{pid: 10, args: run}, {pid: 11, seconds: 1, args: "haproxy -f /other.cfg -st 10"}},
			map[int]is{10: {0, true}, 11: {}},
		},
		"-sf to a pid that is another's now": {
			[]fakeTask{{pid: 10, seconds: 9, args: "haproxy -f /other.cfg"}, {pid: 11, seconds: 1, args: run + " -sf 10"}},
			map[int]is{10: {}, 11: {}},
		},
		"-x alone": {
			[]fakeTask{{pid: 10, args: run}, {pid: 11, seconds: 5, args: run + " -x /s"}},
			map[int]is{10: {0, true}, 11: {}},
		},
		"two that know nothing of each other": {
			[]fakeTask{{pid: 10, args: run}, {pid: 11, seconds: 5, args: run}},
			map[int]is{10: {}, 11: {}},
		},
		"a master after a master": {
			[]fakeTask{
				{pid: 10, args: run + " -W -D"}, {pid: 11, ppid: 10, args: run + " -W -D"},
				{pid: 20, seconds: 5, args: run + " -W -D -sf 10"}, {pid: 21, seconds: 5, ppid: 20, args: run + " -W -D -sf 10"},
			},
			map[int]is{11: {10, true}, 21: {20, false}},
		},
		"one that is named otherwise, and others that only seem so": {
			[]fakeTask{{pid: 10, comm: "l) b", args: "/opt/haproxy -f /h.cfg"}, {pid: 11, args: "sh /etc/init.d/haproxy -f /h.cfg"}, {pid: 12, args: "haproxy -c -f /h.cfg"}, {pid: 13, comm: "haproxy_exporte", args: "haproxy_exporter -f /h.cfg"}},
			map[int]is{10: {}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeProc(t)
			for _, p := range test.tasks {
				p.root = root
				f.add(p)
			}
			got := map[int]is{}
			for _, p := range f.discover().Processes {
				got[p.PID] = is{p.Master, p.Old}
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(is{})); diff != "" {
				t.Errorf("processes (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDiscoverStopping: what a process says of itself counts for more than what
// others were told. A new one is named to take over before it can.
func TestDiscoverStopping(t *testing.T) {
	for stopping, old := range map[string]bool{"Stopping: 0": false, "Stopping: 1": true} {
		for args, others := range map[string]bool{"haproxy -f /new.cfg": false, "haproxy -f /new.cfg -sf 6154": true} {
			f := newFakeProc(t)
			root := t.TempDir()
			f.writeAt(root+"/h.cfg", "global\n\tstats socket /s\n")
			f.writeAt(root+"/new.cfg", "")
			serve(t, "unix", root+"/s", answer(strings.Replace(infoText, "Stopping: 1", stopping, 1)))
			f.add(fakeTask{pid: 6154, args: "haproxy -f /h.cfg", root: root})
			f.add(fakeTask{pid: 7000, seconds: 5, args: args, root: root})
			if p := one(t, f.discover(), 6154); p.Info == nil || p.Old != old {
				t.Errorf("%s, and another was started with %q: %+v", stopping, args, p)
			}
			os.Remove(root + "/h.cfg")
			if p := one(t, f.discover(), 6154); p.Info != nil || p.Old != others {
				t.Errorf("nothing said, and another was started with %q: %+v", args, p)
			}
		}
	}
}

// TestDiscoverTaken: who answers at the address that two share has taken over.
func TestDiscoverTaken(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	f.writeAt(root+"/h.cfg", "global\n\tstats socket /s\n")
	serve(t, "unix", root+"/s", answer(strings.Replace(infoText, "Stopping: 1", "Stopping: 0", 1)))
	f.add(fakeTask{pid: 10, args: "haproxy -f /h.cfg", root: root})
	f.add(fakeTask{pid: 6154, seconds: 5, args: "haproxy -f /h.cfg", root: root})
	f.add(fakeTask{pid: 7000, seconds: 9, args: "haproxy -f /h.cfg", root: root})
	found := f.discover()
	for pid, old := range map[int]bool{10: true, 6154: false, 7000: false} {
		if p := one(t, found, pid); p.Old != old {
			t.Errorf("process %d: old %v", pid, p.Old)
		}
	}
	if one(t, found, 10).Config != one(t, found, 7000).Config {
		t.Error("the same files were read for each of them")
	}
}

// TestDiscoverVersion: what reads the configuration is the version that the
// process says, where its program cannot be read.
func TestDiscoverVersion(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	f.writeAt(root+"/h.cfg", "global\n\tstats socket /s\n.if version_atleast(2.6)\n\tmaxconn 6\n.else\n\tmaxconn 5\n.endif\n")
	f.add(fakeTask{pid: 6154, args: "haproxy -f /h.cfg", root: root})
	if p := one(t, f.discover(), 6154); p.Version.Known() || p.Config == nil || !p.Config.Global.Maxconn.Undecided {
		t.Errorf("without an answer: %+v", p)
	}
	serve(t, "unix", root+"/s", answer(infoText))
	p := one(t, f.discover(), 6154)
	if p.Version.Text != "2.6.12-1+deb12u4" || p.Config.Global.Maxconn.Value != 6 || p.Config.Global.Maxconn.Undecided {
		t.Errorf("with one: %+v", p)
	}
}

// TestDiscoverVanished: one that ends while it is asked is not there any more.
func TestDiscoverVanished(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	f.writeAt(root+"/h.cfg", "global\n\tstats socket /s\n")
	f.add(fakeTask{pid: 6154, args: "haproxy -f /h.cfg", root: root})
	serve(t, "unix", root+"/s", func(conn net.Conn) {
		os.Remove(f.dir + "/6154/stat")
		answer(infoText)(conn)
	})
	if found := f.discover(); len(found.Processes) > 0 {
		t.Errorf("found %+v", found)
	}
}

// TestDiscoverMovedSocket: a worker that is new is asked where its own file says.
func TestDiscoverMovedSocket(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	const args = "haproxy -W -f /h.cfg"
	f.writeAt(root+"/h.cfg", "global\n\tstats socket /before\n")
	f.add(fakeTask{pid: 10, args: args, root: root})
	f.add(fakeTask{pid: 11, ppid: 10, seconds: 1, args: args, root: root})
	before := f.discover()
	f.writeAt(root+"/h.cfg", "global\n\tstats socket /s\n")
	f.add(fakeTask{pid: 6154, ppid: 10, seconds: 5, args: args, root: root})
	serve(t, "unix", root+"/s", answer(infoText))
	if p := one(t, f.discoverAfter(before), 6154); p.Info == nil || p.Info.PID != 6154 {
		t.Errorf("found %+v", p)
	}
}

// TestDiscoverInReloads looks while a master runs itself again and again, for a
// file that it refuses: its worker is at every look what it was.
func TestDiscoverInReloads(t *testing.T) {
	for _, v := range haproxytest.Versions(t) {
		t.Run(v.Name, func(t *testing.T) {
			h := haproxytest.Start(t, kerneltest.NewNamespace(t), v, haproxytest.MasterWorker, proxyText)
			found := Discover(t.Context(), DiscoverOptions{})
			config := one(t, found, h.Worker()).Config
			h.WriteConfig(strings.Replace(proxyText, "1h", "soon", 1))
			for look := range 100 {
				if look%4 == 0 {
					h.Signal(syscall.SIGUSR2)
				}
				found = Discover(t.Context(), DiscoverOptions{Previous: found.Processes})
				if p := one(t, found, h.Worker()); p.Master != h.PID() || p.Config != config || p.Old {
					t.Fatalf("look %d: %+v", look, found)
				}
				one(t, Discover(t.Context(), DiscoverOptions{}), h.Worker())
			}
		})
	}
}

// TestDiscoverInExec: of a process that has no arguments yet, and of the workers
// of a master that has none, is known what was known before.
func TestDiscoverInExec(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	f.writeAt(root+"/h.cfg", "global\n\tmaster-worker\n")
	const args = "haproxy -f /h.cfg"
	f.add(fakeTask{pid: 10, args: args, root: root})
	f.add(fakeTask{pid: 11, ppid: 10, seconds: 1, args: args, root: root})
	f.add(fakeTask{pid: 12, ppid: 10, seconds: 1, args: args, root: root})
	f.add(fakeTask{pid: 20, args: args, root: root})
	f.add(fakeTask{pid: 30, comm: "kthreadd", args: "", root: root})
	before := f.discover()
	if len(before.Processes) != 3 {
		t.Fatalf("found %+v", before)
	}
	for _, pid := range []int{10, 20, 30} {
		f.write(fmt.Sprintf("%d/cmdline", pid), "")
	}
	if found := f.discover(); len(found.Processes) != 0 {
		t.Errorf("with nothing known before: %+v", found)
	}
	f.write("12/stat", "12 (haproxy) S 10"+strings.Repeat(" 0", 17)+" 500 0 0\n") // another by this pid
	f.writeAt(root+"/h.cfg", "not a configuration\n")
	found := f.discoverAfter(before)
	if len(found.Processes) != 2 {
		t.Errorf("found %+v", found)
	}
	for _, pid := range []int{11, 20} {
		if got, want := one(t, found, pid), one(t, before, pid); !SamePlaces(got, want) || got.Config != want.Config || got.Master != want.Master {
			t.Errorf("process %d is %+v, it was %+v", pid, got, want)
		}
	}
}

// TestDiscoverKeyword: the master-worker mode can be asked for in a file too.
func TestDiscoverKeyword(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	f.writeAt(root+"/master.cfg", "global\n  master-worker no-exit-on-failure\n")
	f.writeAt(root+"/none.cfg", "global\n  maxconn 5 # master-worker\n")
	f.add(fakeTask{pid: 10, args: "haproxy -f /master.cfg", root: root})
	f.add(fakeTask{pid: 11, ppid: 10, seconds: 5, args: "haproxy -f /master.cfg", root: root})
	f.add(fakeTask{pid: 20, args: "haproxy -f /none.cfg", root: root})
	f.add(fakeTask{pid: 21, ppid: 20, seconds: 5, args: "haproxy -f /none.cfg", root: root}) // to be a check
	found := f.discover()
	if len(found.Processes) != 2 || one(t, found, 11).Master != 10 || one(t, found, 20).Master != 0 {
		t.Errorf("found %+v", found)
	}
}

// TestDiscoverNetns: an address of another network namespace is not of ours.
func TestDiscoverNetns(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	port := serve(t, "tcp4", "127.0.0.1:0", answer(infoText)).(*net.TCPAddr).Port
	address := fmt.Sprintf("ipv4@127.0.0.1:%d", port)
	f.writeAt(root+"/h.cfg", "global\n\tstats socket "+address+"\n")
	f.add(fakeTask{pid: 6154, args: "haproxy -f /h.cfg", root: root})
	if p := one(t, f.discover(), 6154); p.Info == nil || len(p.Problems) > 0 {
		t.Errorf("in ours: %+v", p)
	}
	other := newFakeProc(t)
	other.add(fakeTask{pid: 6154, net: 3, args: "haproxy -f /h.cfg", root: root})
	want := []string{"haproxy runtime socket " + address + ": it is in another network namespace: add a `stats socket` that is a path, such as /run/haproxy/admin.sock"}
	if p := one(t, other.discover(), 6154); p.Info != nil || p.Netns != 3 || !slices.Equal(p.Problems, want) {
		t.Errorf("in another: %+v", p)
	}
}

// TestDiscoverRoot finds the files of a process in a chroot where others that
// see the same mounts see them, unless somebody else has made up that root.
func TestDiscoverRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not run: it needs root, to give files to somebody else")
	}
	empty := t.TempDir()
	roots := map[string]string{}
	for _, name := range []string{"parent", "ours", "other", "foreign"} {
		roots[name] = t.TempDir()
		if err := os.WriteFile(roots[name]+"/h.cfg", []byte("global\n\tlog-tag "+name+"\n\tstats socket /"+name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		leader, parent fakeTask
		self           string // our own root
		want           string
	}{
		"its parent's":                          {self: roots["ours"], want: "/parent"},
		"ours":                                  {self: roots["ours"], parent: fakeTask{mnt: 9}, want: "/ours"},
		"any other's":                           {self: empty, parent: fakeTask{mnt: 9}, want: "/other"},
		"any other's of its mounts":             {self: roots["ours"], leader: fakeTask{mnt: 5}, parent: fakeTask{mnt: 9}, want: ""},
		"not the parent's, with a link to ours": {self: roots["ours"], parent: fakeTask{root: empty}, want: "/ours"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFakeProc(t)
			if err := os.Remove(f.dir + "/self/root"); err != nil {
				t.Fatal(err)
			}
			f.link(test.self, "self/root")
			test.leader.pid, test.leader.ppid, test.leader.args, test.leader.root = 10, 9, "haproxy -f /h.cfg", empty
			f.add(test.leader)
			test.parent.pid, test.parent.comm, test.parent.args = 9, "supervisor", "supervisor"
			if test.parent.root == "" {
				test.parent.root = roots["parent"]
			}
			f.add(test.parent)
			f.add(fakeTask{pid: 1000, comm: "evil", args: "evil", root: roots["foreign"]})
			if err := os.Chown(f.dir+"/1000", 1000, 1000); err != nil {
				t.Fatal(err)
			}
			f.add(fakeTask{pid: 2000, comm: "init", args: "init", root: roots["other"]})
			p := one(t, f.discover(), 10)
			got := ""
			if p.Config != nil {
				got = p.Config.Global.StatsSockets[0].Value
			}
			if got != test.want {
				t.Errorf("read from the root of %q, want %q; problems %q", got, test.want, p.Problems)
			}
		})
	}
}

// TestDiscoverContainer: paths, links, sockets and pids are those of a container.
func TestDiscoverContainer(t *testing.T) {
	f := newFakeProc(t)
	root, host := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		root + "/srv/lb.cfg": "global\n\tstats socket /run/haproxy.sock\n\tmaxconn 1\n",
		host + "/lb.cfg":     "global\n\tmaxconn 2\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for target, name := range map[string]string{
		"/srv/lb.cfg":      "h.cfg",     // from its own root
		"../../../../run2": "run",       // no further up than it
		host:               "run2/host", // a path of ours that it does not have
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	serve(t, "unix", root+"/run2/haproxy.sock", answer(strings.Replace(infoText, "Pid: 6154", "Pid: 8", 1)))
	f.add(fakeTask{pid: 500, nspid: "500 7", args: "haproxy -W -f /h.cfg", root: root, mnt: 5})
	f.add(fakeTask{pid: 501, ppid: 500, nspid: "501 8", args: "haproxy -W -f /h.cfg", root: root, mnt: 5})
	// Not in the container: its pid is not the one that answers.
	f.add(fakeTask{pid: 8, args: "haproxy -f /run2/host/lb.cfg", root: root, mnt: 5})

	found := f.discover()
	p := one(t, found, 501)
	if p.Config == nil || p.Config.Global.Maxconn.Value != 1 || p.Info == nil || p.Info.PID != 8 || p.Master != 500 || len(p.Problems) > 0 {
		t.Errorf("found %+v", p)
	}
	escaped := one(t, found, 8)
	want := []string{"/run2/host/lb.cfg: cannot be read: no such file or directory"}
	if escaped.Config != nil || escaped.Info != nil || !slices.Equal(escaped.Problems, want) {
		t.Errorf("a link leads out of the root: %+v", escaped)
	}
}

// TestDiscoverHostile: any user can start a process called haproxy, with what
// arguments and root it likes.
func TestDiscoverHostile(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	if err := syscall.Mkfifo(root+"/fifo", 0o644); err != nil {
		t.Fatal(err)
	}
	serve(t, "unix", root+"/socket", hang)
	if err := os.WriteFile(root+"/huge", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(root+"/huge", 1<<40); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/good.cfg", []byte("global\n\tmaxconn 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", root+"/loop"); err != nil {
		t.Fatal(err)
	}
	want := map[int]string{
		1:  "/fifo: cannot be read: not a regular file",
		2:  "/socket: cannot be read: not a regular file",
		3:  "/huge: cannot be read: it is too large to be a configuration: more than 32 MB",
		4:  "/loop: cannot be read: too many levels of symbolic links",
		5:  "/none: cannot be read: no such file or directory",
		6:  "relative: the directory is not known that it was read from: name it with --haproxy-config",
		7:  "the files of process 7: cannot look into its root: open " + f.dir + "/7/root: no such file or directory",
		8:  "",
		99: "",
	}
	for pid, file := range map[int]string{1: "/fifo", 2: "/socket", 3: "/huge", 4: "/loop", 5: "/none", 6: "relative", 99: "/good.cfg"} {
		f.add(fakeTask{pid: pid, args: "haproxy -f " + file, root: root, mnt: 100 + pid, env: strings.Repeat("HUGE=x ", 1<<20)})
	}
	f.add(fakeTask{pid: 7, args: "haproxy -f /good.cfg", mnt: 107})
	if err := os.Remove(f.dir + "/6/cwd"); err != nil {
		t.Fatal(err)
	}
	// Reading it waits for what the kernel has to say, and takes it from others.
	f.add(fakeTask{pid: 8, args: "haproxy -f /proc/kmsg", root: "/", mnt: 108})
	// These vanish while they are looked at, or are not to be seen.
	f.add(fakeTask{pid: 20, args: "haproxy -f /good.cfg", root: root})
	if err := os.Remove(f.dir + "/20/stat"); err != nil {
		t.Fatal(err)
	}
	f.add(fakeTask{pid: 21, args: "haproxy -f /good.cfg", root: root})
	f.write("21/stat", "21 (ha) proxy) Z 1"+strings.Repeat(" 0", 30))
	f.write("22/comm", "haproxy")

	found := f.discover()
	if len(found.Processes) != len(want) || len(found.Problems) > 0 {
		t.Errorf("found %+v", found)
	}
	for pid, problem := range want {
		p := one(t, found, pid)
		if got := strings.Join(p.Problems, "|"); got != problem || (p.Config == nil) != (problem != "") {
			t.Errorf("process %d: config %v, problems %q, want %q", pid, p.Config, got, problem)
		}
	}
	if c := one(t, found, 99).Config; c == nil || c.Global.Maxconn.Value != 3 {
		t.Errorf("the good one has %+v", c)
	}
}

// TestDiscoverHanging: sockets that hang do not add up.
func TestDiscoverHanging(t *testing.T) {
	f := newFakeProc(t)
	root := t.TempDir()
	var config strings.Builder
	config.WriteString("global\n")
	for i := range 3 {
		path := fmt.Sprintf("%s/hangs%d", root, i)
		serve(t, "unix", path, hang)
		fmt.Fprintf(&config, "\tstats socket /hangs%d\n", i)
	}
	hangs := config.String()
	serve(t, "unix", root+"/answers", answer(infoText))
	for name, text := range map[string]string{"h.cfg": hangs, "good.cfg": hangs + "\tstats socket /answers\n"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		f.add(fakeTask{pid: 100 + i, args: "haproxy -f /h.cfg", root: root, mnt: 10 + i})
	}
	f.add(fakeTask{pid: 6154, args: "haproxy -f /good.cfg", root: root})
	began := time.Now()
	found := f.discover()
	if took := time.Since(began); took > askTime+time.Second {
		t.Errorf("it took %v", took)
	}
	// Although three of its sockets hang, the fourth has its time.
	if p := one(t, found, 6154); p.Info == nil || len(p.Problems) > 0 {
		t.Errorf("the one that answers: %+v", p)
	}
	for i := range 5 {
		if p := one(t, found, 100+i); p.Config == nil || p.Info != nil || len(p.Problems) != 3 {
			t.Errorf("one that hangs: %+v", p)
		}
	}
}

func TestDiscoverNothing(t *testing.T) {
	f := newFakeProc(t)
	if found := f.discover(); len(found.Processes)+len(found.Problems) > 0 {
		t.Errorf("found %+v", found)
	}
	// Where it cannot look, those that were found before are taken to be there.
	before := []Process{{PID: 7}}
	found := Discover(t.Context(), DiscoverOptions{Proc: "/nowhere", Previous: before})
	want := []string{"cannot look for haproxy: open /nowhere/uptime: no such file or directory"}
	if !slices.Equal(found.Problems, want) || len(found.Processes) != 1 || found.Processes[0].PID != 7 {
		t.Errorf("problems %q, want %q, and %+v", found.Problems, want, before)
	}
}
