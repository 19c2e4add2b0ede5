// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

// oneLine is what a command says of what keeps it from doing its work.
var oneLine = regexp.MustCompile(`^fintrace: [^\n]+\n$`)

// notLookedAt is what it says before of others on this host.
var notLookedAt = regexp.MustCompile(`(?m)^fintrace: not looked at: [^\n]*\n`)

// TestRefused has the kernel refuse each command of bpf(2) in turn: what was
// loaded and attached before is released, and one line says what is wrong.
func TestRefused(t *testing.T) {
	kerneltest.Require(t)
	// include/uapi/linux/bpf.h: enum bpf_cmd; and whether nothing goes without it.
	// Without iterators, or the walk, what there is of sockets is not looked at.
	for _, refused := range []struct {
		name    string
		command int
		needed  bool
	}{
		{"MAP_CREATE", 0, true}, {"MAP_LOOKUP_ELEM", 1, true}, {"MAP_UPDATE_ELEM", 2, true}, {"PROG_LOAD", 5, true},
		{"PROG_TEST_RUN", 10, false}, {"OBJ_GET_INFO_BY_FD", 15, true}, {"RAW_TRACEPOINT_OPEN", 17, true}, {"BTF_LOAD", 18, false},
		{"MAP_FREEZE", 22, true}, {"LINK_CREATE", 28, true}, {"ITER_CREATE", 33, false},
	} {
		t.Run(refused.name, func(t *testing.T) {
			config := filepath.Join(t.TempDir(), "fintrace.yaml")
			text := "web: {listen: \"127.0.0.1:0\"}\nalerts: {state_file: \"\"}\nlog: {level: error}\n"
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, command := range []string{"trace --duration 100ms", "list", "diagnose --duration 100ms", "daemon --config " + config} {
				if strings.HasPrefix(command, "daemon") && !refused.needed {
					continue // It would go on.
				}
				var stderr bytes.Buffer
				cmd := exec.Command("refusing", append([]string{strconv.Itoa(refused.command), "fintrace"}, strings.Fields(command)...)...)
				cmd.Stderr = &stderr
				err := cmd.Run()
				code := cmd.ProcessState.ExitCode()
				lines := notLookedAt.ReplaceAllString(stderr.String(), "")
				watches := strings.HasPrefix(command, "trace") || strings.HasPrefix(command, "daemon")
				if code < 0 || code > report.ExitUnknown || strings.Contains(lines, "goroutine") ||
					watches && refused.needed && (code != 1 || !oneLine.MatchString(lines) || !strings.Contains(lines, "permi")) {
					t.Errorf("%s ends with %v and says %q", command, err, lines)
				}
			}
			checkNothingLeft(t)
		})
	}
}

// TestNothingLeft ends each command in every way.
func TestNothingLeft(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	for _, command := range []struct {
		args  string
		ready string // on stderr, once it is attached
	}{
		{"trace --netns " + inode(ns), "In FIN_WAIT2 already"},
		{"trace --all-states -o json --netns " + inode(ns), "In FIN_WAIT2 already"},
		{"diagnose --duration 1m --netns " + inode(ns), ""},
		{"daemon --config CONFIG", "watching"},
	} {
		for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGSEGV, unix.SIGKILL} {
			name, _, _ := strings.Cut(command.args, " --netns")
			t.Run(name+", "+unix.SignalName(signal), func(t *testing.T) {
				config := filepath.Join(t.TempDir(), "fintrace.yaml")
				if err := os.WriteFile(config, []byte("web: {listen: \"127.0.0.1:0\"}\nalerts: {state_file: \"\"}\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command("fintrace", strings.Fields(strings.Replace(command.args, "CONFIG", config, 1))...)
				stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
				if err != nil {
					t.Fatal(err)
				}
				defer stderr.Close()
				cmd.Stderr = stderr
				cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				exited := make(chan error, 1)
				go func() { exited <- cmd.Wait() }()
				var ids map[string][]uint32
				if err := await("it to be attached", func() bool {
					said, _ := os.ReadFile(stderr.Name())
					ids = kernelObjects(t, cmd.Process.Pid)
					return len(ids["link_id"]) >= 2 && strings.Contains(string(said), command.ready)
				}); err != nil {
					t.Errorf("%v: it has %v", err, ids)
				}
				if err := cmd.Process.Signal(signal); err != nil {
					t.Fatal(err)
				}
				daemonHangs := strings.HasPrefix(command.args, "daemon") && signal == unix.SIGHUP // it reads its configuration anew
				if daemonHangs {
					if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
						t.Fatal(err)
					}
				}
				select {
				case <-exited:
				case <-time.After(30 * time.Second):
					cmd.Process.Kill()
					t.Error("it does not end")
				}
				checkGone(t, ids)
			})
		}
	}
	// Killed wherever they are, loading, attaching or looking.
	for after := range 20 {
		cmd := exec.Command("fintrace", []string{"list", "trace"}[after%2])
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pause(time.Duration(after) * 20 * time.Millisecond)
		_ = cmd.Process.Kill() // It may have ended by now.
		_ = cmd.Wait()
	}
	// These are gone as soon as they are there.
	for _, args := range []string{"list", "diagnose --duration 0", "version --features", "trace --duration 1ms"} {
		if out, err := exec.Command("fintrace", strings.Fields(args)...).CombinedOutput(); err != nil {
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() > report.ExitCritical {
				t.Errorf("%s: %v: %s", args, err, out)
			}
		}
	}
	checkNothingLeft(t)
}

// TestOutputGone has no room for what each command prints: that is an error, in
// one line, and no warning about what is looked at.
func TestOutputGone(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	h, err := hold(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte("defaults\n\ttimeout client 1s\n\ttimeout server 1s\n\ttimeout connect 1s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, code := range map[string]int{
		"list --netns NS":                                           1,
		"list --netns NS -o json":                                   1,
		"list --netns NS --group-by peer":                           1,
		"list --netns NS --group-by peer -o json":                   1,
		"trace --netns NS --duration 100ms":                         1,
		"trace --netns NS --duration 100ms -o json":                 1,
		"trace --netns NS --duration 100ms --all-states":            1,
		"trace --netns NS --duration 1m -o json --min-duration 1ms": 1,
		"diagnose --netns NS --duration 10ms":                       3,
		"diagnose --netns NS --duration 10ms -o json":               3,
		"diagnose --netns NS --duration 10ms -o nagios":             3,
		"check -f FILE":                                             3,
		"check -f FILE -o json":                                     3,
		"version":                                                   1,
		"version --features":                                        1,
		"daemon --check":                                            1,
		"completion bash":                                           1,
	} {
		t.Run(args, func(t *testing.T) {
			words := strings.Fields(strings.NewReplacer("NS", inode(ns), "FILE", file).Replace(args))
			full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer full.Close()
			var stderr bytes.Buffer
			cmd := exec.Command("fintrace", words...)
			cmd.Stdout, cmd.Stderr = full, &stderr
			_ = cmd.Run() // the exit code is looked at
			last := lastLine(stderr.String()) + "\n"
			if cmd.ProcessState.ExitCode() != code || !oneLine.MatchString(last) || !strings.Contains(last, "no space left on device") {
				t.Errorf("it exits with %d and says %q, want %d", cmd.ProcessState.ExitCode(), &stderr, code)
			}
		})
	}
	checkNothingLeft(t)
}

// key is the connection as a trace names it.
func (h held) key(ns *kerneltest.Namespace) flowKey {
	return flowKey{ns.Inode, h.subject.LocalAddr().String(), h.subject.RemoteAddr().String()}
}

// TestTimeNamespace runs in a time namespace whose clocks are not the host's, and
// as far apart as after a suspension: what is dated by the kernel's is right.
func TestTimeNamespace(t *testing.T) {
	kerneltest.Require(t)
	if _, err := os.Stat("/proc/self/ns/time"); err != nil {
		t.Skip("not run: a kernel without time namespaces")
	}
	ns := kerneltest.NewNamespace(t)
	const apart = "unshare --time --boottime 3600 --monotonic 1000 --fork --kill-child fintrace"
	before := time.Now()
	there := holdSome(t, ns, 1)[0]
	after := time.Now()

	words := strings.Fields(apart)
	out, err := exec.Command(words[0], append(words[1:], "list", "-o", "json", "--netns", inode(ns))...).CombinedOutput()
	var listed report.Record
	if err != nil || json.Unmarshal(out, &listed) != nil {
		t.Fatalf("list: %v: %q", err, out)
	}
	between := func(what string, at, from, to time.Time) {
		t.Helper()
		if at.Before(from.Add(-tick)) || at.After(to.Add(tick)) {
			t.Errorf("%s is dated %s, want %s to %s", what, at, from, to)
		}
	}
	between("what list shows", listed.Since, before, after)

	tr := traceJSONBy(t, []*kerneltest.Namespace{ns}, apart, "--limit", "1s")
	between("what was there", tr.await(t, there.key(ns), "opened").Since, before, after)
	if d := tr.await(t, there.key(ns), "overdue").Duration; d < 3 || d > time.Since(before).Seconds() {
		t.Errorf("it is overdue after %v s", d)
	}
	began := time.Now()
	comes := holdSome(t, ns, 1)[0]
	between("what came", tr.await(t, comes.key(ns), "opened").Since, began, time.Now())
	for name, h := range map[string]held{"what came": comes, "what was there": there} {
		key, ends := h.key(ns), time.Now()
		h.close()
		closed := tr.await(t, key, "closed")
		between("the end of "+name, closed.Time, ends, time.Now())
		if closed.End != "peer_fin" {
			t.Errorf("%s ended by %s", name, closed.End)
		}
	}
	// It is unshare's process, which takes its child along.
	tr.cmd.Process.Kill()
}

// TestHidden looks at processes that /proc does not show.
func TestHidden(t *testing.T) {
	kerneltest.Require(t)
	const missing = "fintrace: not looked at: network namespaces of other processes: no permission (CAP_SYS_PTRACE)\n"
	for _, hidepid := range []string{"0", "1", "2", "4"} {
		for user, want := range map[string]string{
			"unprivileged": missing,
			"setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace fintrace": missing,
			"fintrace": "",
		} {
			script := "mount -t proc -o hidepid=" + hidepid + " proc /proc && exec " + user + " list --port 1"
			out, err := exec.Command("unshare", "-m", "sh", "-c", script).CombinedOutput()
			text := string(out)
			if user == "unprivileged" { // It has no BPF either.
				_, text, _ = strings.Cut(text, "\n")
			}
			said := strings.Contains(text, missing)
			if err != nil || said != (want != "") {
				t.Errorf("hidepid=%s, %s: %v, says %q, want %q", hidepid, user, err, out, want)
			}
		}
	}
}

// TestDaemonFiles takes the daemon's descriptors away, and gives them back.
func TestDaemonFiles(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	minisock := holdOn(t, ns, 7001, 1)[0]
	minisock.subject.Close()
	holdOn(t, ns, 7002, 1)
	port := func(port uint16, event alert.Event) func(*logLine) bool {
		return func(l *logLine) bool { return l.Labels.Port == port && spoken(inode(ns), event)(l) }
	}
	d.await("the alert", port(7002, alert.Fired))
	there := func(port int) bool { return len(d.connections(fmt.Sprintf("port=%d&netns=%s", port, inode(ns)))) == 1 }
	if err := awaitFor(soon, "the minisock", func() bool { return there(7001) }); err != nil {
		t.Fatal(err)
	}
	entered, _ := d.metric("fintrace_fin_wait2_entered_total")

	limit := func(n uint64) {
		t.Helper()
		var old unix.Rlimit
		if err := unix.Prlimit(d.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: 4096}, &old); err != nil {
			t.Fatal(err)
		}
	}
	limit(3)
	minisock.peer.Close() // which no event shows
	looked := func(l *logLine) bool {
		return l.Message == "not looked at" && strings.Contains(l.What, "too many open files")
	}
	d.await("a line about it", looked)
	// What events show is shown, and alerts go out.
	late := holdOn(t, ns, 7003, 1)
	d.await("the alert", port(7003, alert.Fired))
	late[0].close()
	d.await("the resolution", port(7003, alert.Resolved))
	select {
	case err := <-d.exited:
		t.Fatal("the daemon has ended:", err)
	default:
	}

	limit(4096)
	if err := awaitFor(soon, "the minisock to leave", func() bool { return !there(7001) }); err != nil {
		t.Error(err)
	}
	if !there(7002) {
		t.Error("what is held is not in the table any more")
	}
	if code, body := d.get("/healthz"); code != 200 {
		t.Errorf("it is not in health: %d %s", code, body)
	}
	if now, _ := d.metric("fintrace_fin_wait2_entered_total"); now < entered+1 {
		t.Errorf("%v had entered, and %v have", entered, now)
	}
	said := map[string]int{}
	for _, l := range d.logged(looked) {
		if said[l.What]++; said[l.What] == 2 {
			t.Errorf("it is said again: %s", l.What)
		}
	}
	// There were too few all along.
	for _, command := range []string{"list", "trace --duration 1ms", "diagnose --duration 0"} {
		out, _ := exec.Command("prlimit", append([]string{"--nofile=20:20", "fintrace"}, strings.Fields(command)...)...).CombinedOutput()
		if !oneLine.Match(out) || !bytes.Contains(out, []byte("no more than 20 files may be open, and fintrace needs 64: raise the limit")) {
			t.Errorf("%s with 20 files says %q", command, out)
		}
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// TestDaemonDiskFull has no room for the state, then some: an alert goes on after
// a restart once it could be kept.
func TestDaemonDiskFull(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	disk := t.TempDir()
	if err := unix.Mount("fintrace-test", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal("the disk is not full:", err)
	}
	d := startDaemon(t, limited(ns, "state_file: "+disk+"/alerts.json, min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	first := holdOn(t, ns, 7001, 1)
	fired := d.await("the alert", spoken(inode(ns), alert.Fired))
	const unkept = "which alerts fire cannot be kept: after a restart they fire anew"
	line := d.await("a line about the disk", func(l *logLine) bool { return l.Message == unkept })
	if !strings.Contains(line.Error, "no space left on device") {
		t.Errorf("the line is %s", line.Text)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	holdOn(t, ns, 7002, 1)
	d.await("the alert", func(l *logLine) bool { return l.Labels.Port == 7002 && spoken(inode(ns), alert.Fired)(l) })
	d.dir = disk
	d.awaitSaved(ns, 2)
	if left, err := filepath.Glob(disk + "/.*"); err != nil || len(left) > 0 {
		t.Errorf("of the attempts there is left %v (%v)", left, err)
	}
	d.signal(unix.SIGKILL)
	d.gone()
	again := time.Now()
	d.start()
	going := d.await("the alert to go on", func(l *logLine) bool {
		return l.Read.After(again) && l.Labels.Port == 7001 && spoken(inode(ns))(l)
	})
	if going.Alert != fired.Alert || going.Event != alert.Updated {
		t.Errorf("it goes on as %s", going.Text)
	}
	first[0].close()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// A memoryGroup is a memory cgroup of the test's own.
type memoryGroup struct {
	t   *testing.T
	dir string
	v1  bool
}

// newMemoryGroup makes one, below that of the test where the host has cgroup2.
func newMemoryGroup(t *testing.T) *memoryGroup {
	t.Helper()
	g := &memoryGroup{t: t}
	name := fmt.Sprintf("fintrace-test-%d-%d", os.Getpid(), addresses.Add(1))
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		g.dir, g.v1 = filepath.Join(root, name), root != "/sys/fs/cgroup"
		if err := os.Mkdir(g.dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			if err := await("the cgroup to be empty", func() bool { return os.Remove(g.dir) == nil }); err != nil {
				t.Error(err)
			}
		})
		if _, err := os.Stat(g.file("memory.max", "memory.limit_in_bytes")); err == nil {
			return g
		}
	}
	t.Skip("not run: there is no memory cgroup to be had")
	return nil
}

func (g *memoryGroup) file(v2, v1 string) string {
	if g.v1 {
		return filepath.Join(g.dir, v1)
	}
	return filepath.Join(g.dir, v2)
}

// enter is a shell command that runs its arguments in it.
func (g *memoryGroup) enter() []string {
	return []string{"sh", "-c", "echo $$ >" + g.dir + `/cgroup.procs && exec "$0" "$@"`}
}

func (g *memoryGroup) limit(bytes int64) {
	g.t.Helper()
	if err := os.WriteFile(g.file("memory.max", "memory.limit_in_bytes"), []byte(strconv.FormatInt(bytes, 10)), 0); err != nil {
		g.t.Fatal(err)
	}
}

func (g *memoryGroup) usage() int64 {
	g.t.Helper()
	text, err := os.ReadFile(g.file("memory.current", "memory.usage_in_bytes"))
	if err != nil {
		g.t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// kills is how many processes it has lost for want of memory.
func (g *memoryGroup) kills() string {
	g.t.Helper()
	text, err := os.ReadFile(g.file("memory.events", "memory.oom_control"))
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n)
		}
	}
	g.t.Fatalf("no oom_kill in %s", text)
	return ""
}

// TestDaemonMemory runs the daemon under load with no more memory than GOMEMLIMIT
// and what the BPF programs take.
func TestDaemonMemory(t *testing.T) {
	kerneltest.Require(t)
	ns, busy := kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)
	g := newMemoryGroup(t)
	d := newDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	d.under = append([]string{"env", "GOMEMLIMIT=16MiB"}, g.enter()...)
	d.start()
	const connections, limit = 5000, 26 << 20
	used := g.usage()
	g.limit(limit)

	all := holdSome(t, ns, connections)
	stop := halfClosing(t, busy, 2)
	d.await("the alert", spoken(inode(ns), alert.Fired))
	// The load outlasts the alert.
	pause(3 * time.Second)
	made := stop()
	for _, h := range all[connections/2:] {
		h.close()
	}
	if err := awaitFor(soon, "what has ended to leave", func() bool {
		return len(d.connections("limit=10000&netns="+inode(ns))) == connections/2
	}); err != nil {
		t.Error(err)
	}
	if code, body := d.get("/healthz"); code != 200 {
		t.Errorf("it is not in health: %d %s", code, body)
	}
	most := int64(0)
	if text, err := os.ReadFile(g.file("memory.peak", "memory.max_usage_in_bytes")); err == nil {
		most, _ = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	}
	t.Logf("%d MiB before, %d MiB at most, of %d MiB; beside %d connections", used>>20, most>>20, limit>>20, made)
	if n := g.kills(); n != "0" {
		t.Errorf("%s processes were killed for want of memory", n)
	}
	for _, h := range all[:connections/2] {
		h.close()
	}
	d.await("the resolution", spoken(inode(ns), alert.Resolved))
	if err := d.end(); err != nil {
		t.Error(err)
	}
}
