// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

// hostileNames are what processes may call themselves: 15 bytes, of any kind but 0.
var hostileNames = []string{
	`"; rm -rf / #`,
	"a\nheld 1.1.1.1",
	"a\r\tb\v",
	"\x1b[31mred\x1b[2J",
	"\u009b2Jx\x7f", // a control sequence of one byte, as UTF-8
	"ééééééé\xc3",   // cut in half
	"\xff\xfe\x80",  // no UTF-8
	"\u202egnp.exe", // turned round
	"</script><b>",
	"a'b`id`${HOME}",
	"%s%n{{.}}",
	`a","pid":1,"x`,
	"a level=INFO b=",
	"  ",
}

// nameEnv is the name of the process that the program "named" is.
const nameEnv = "FINTRACE_TEST_NAME"

// named holds a connection in FIN_WAIT2 under a name until its stdin ends.
func named() {
	runtime.LockOSThread()
	name := append([]byte(os.Getenv(nameEnv)), 0)
	err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
	if err == nil {
		err = os.WriteFile("/proc/self/comm", name[:len(name)-1], 0) // The first thread may be another.
	}
	var h held
	if err == nil {
		h, err = connected()
	}
	if err == nil {
		err = h.shutdown()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "named:", err)
		os.Exit(1)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	h.close()
}

// holdNamed starts such a process in a namespace.
func holdNamed(t *testing.T, ns *kerneltest.Namespace, name string, args ...string) {
	t.Helper()
	cmd := exec.Command("named", args...)
	cmd.Env = append(os.Environ(), nameEnv+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	ns.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); cmd.Wait() })
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q does not hold its connection: %q, %v", name, line, err)
	}
}

// harmless checks that text has nothing in it that acts on a terminal or ends a
// line. Only the program's own lines end.
func harmless(t *testing.T, what, text string) {
	t.Helper()
	if text == "" {
		t.Errorf("%s: nothing", what)
	}
	if !utf8.ValidString(text) {
		t.Errorf("%s is no UTF-8", what)
	}
	for line := range strings.Lines(text) {
		if bad := strings.IndexFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return !unicode.IsPrint(r) && r != unicode.ReplacementChar }); bad >= 0 {
			t.Errorf("%s: %q at %d of %q", what, line[bad:min(len(line), bad+10)], bad, line[max(0, bad-60):bad])
			return
		}
	}
}

// said checks that each of the names is in text, as made harmless.
func said(t *testing.T, what, text string, names []string) {
	t.Helper()
	harmless(t, what, text)
	for _, name := range names {
		if !strings.Contains(text, report.Clean(name)+"[") {
			t.Errorf("%s: %q is not there", what, name)
		}
	}
}

// encoded checks that each line is JSON, and that a field at any depth has each
// of the names, as JSON can.
func encoded(t *testing.T, what, text, field string, names []string) {
	t.Helper()
	harmless(t, what, text)
	found := map[string]bool{}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if s, ok := v[field].(string); ok {
				found[s] = true
			}
			for _, inner := range v {
				walk(inner)
			}
		case []any:
			for _, inner := range v {
				walk(inner)
			}
		}
	}
	for decoder := json.NewDecoder(strings.NewReader(text)); ; {
		var v any
		err := decoder.Decode(&v)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		walk(v)
	}
	for _, name := range names {
		if !found[string([]rune(name))] {
			t.Errorf("%s: no %s is %q", what, field, name)
		}
	}
}

// TestHostileNames has processes of every hostile name hold connections, one of
// which seems to be HAProxy with a configuration whose path is hostile too, and
// looks at all that there is to see of them.
func TestHostileNames(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	fintrace := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("fintrace", args...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if exit := (*exec.ExitError)(nil); err != nil && (!errors.As(err, &exit) || args[0] == "list") {
			t.Fatalf("fintrace %q: %v\n%s", args, err, stderr.String())
		}
		if stderr.Len() > 0 {
			harmless(t, strings.Join(args, " ")+", stderr", stderr.String())
		}
		return string(out)
	}

	// What is watched as it comes.
	traces := map[string]*strings.Builder{}
	var watching sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	for _, args := range []string{"trace --min-duration 0", "trace --min-duration 0 -o json", "trace --all-states", "trace --all-states -o json"} {
		cmd := exec.CommandContext(ctx, "fintrace", append(strings.Fields(args), "--netns", inode(ns))...)
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		out := &strings.Builder{}
		traces[args] = out
		cmd.Stdout = out
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		there := make(chan struct{})
		watching.Go(func() {
			lines := bufio.NewScanner(stderr)
			for lines.Scan() {
				harmless(t, args+", stderr", lines.Text()+"\n")
				if strings.HasPrefix(lines.Text(), "In FIN_WAIT2 already") || strings.HasPrefix(lines.Text(), "Tracing") {
					select {
					case <-there:
					default:
						close(there)
					}
				}
			}
			// An exit of 0 after the interrupt is the context's error to os/exec.
			if err := cmd.Wait(); err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", args, err)
			}
		})
		<-there
	}

	for _, name := range hostileNames {
		holdNamed(t, ns, name)
	}
	path := filepath.Join(t.TempDir(), "a\nb\x1b[31m\u009bm\xc3.cfg")
	config := "defaults\n\tmode tcp\n\ttimeout client 1h\n\ttimeout server 1h\nfrontend www\n\tmaxconn 5\n\tbind :1-65535\nglobal\n\tstats socket /nowhere\x1b[31m\n"
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	holdNamed(t, ns, "haproxy", "-f", path)

	said(t, "list", fintrace("list", "--netns", inode(ns)), hostileNames)
	encoded(t, "list -o json", fintrace("list", "--netns", inode(ns), "-o", "json"), "comm", hostileNames)
	for _, by := range []string{"process", "process,stage,port"} {
		said(t, "list --group-by "+by, fintrace("list", "--netns", inode(ns), "--group-by", by), hostileNames)
		harmless(t, "list -o json --group-by "+by, fintrace("list", "--netns", inode(ns), "-o", "json", "--group-by", by))
	}
	terminal := exec.Command("script", "-qec", "stty cols 200; fintrace list --netns "+inode(ns), "/dev/null")
	if out, err := terminal.Output(); err != nil {
		t.Error(err)
	} else {
		said(t, "list on a terminal", strings.ReplaceAll(colour.ReplaceAllString(string(out), ""), "\r\n", "\n"), hostileNames)
	}
	for _, args := range [][]string{{}, {"-o", "json"}, {"-o", "nagios"}, {"--anonymize"}} {
		what := slices.Concat([]string{"diagnose", "--duration", "100ms", "--netns", inode(ns)}, args)
		harmless(t, strings.Join(what, " "), fintrace(what...))
	}
	for _, args := range [][]string{{}, {"-o", "json"}} {
		what := slices.Concat([]string{"check", "-f", path}, args)
		harmless(t, strings.Join(what, " "), fintrace(what...))
	}

	stop()
	watching.Wait()
	for args, out := range traces {
		switch {
		case strings.Contains(args, "json"):
			encoded(t, args, out.String(), "comm", hostileNames)
		default:
			said(t, args, out.String(), hostileNames)
		}
	}
}

// TestHostileNamesOfDaemon is TestHostileNames for all that a daemon says.
func TestHostileNamesOfDaemon(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	for _, name := range hostileNames {
		holdNamed(t, ns, name)
	}
	var mu sync.Mutex
	bodies := map[string]string{}
	sink := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		bodies[r.URL.Path] += string(body) + "\n"
	}))
	t.Cleanup(sink.Close)
	config := limited(ns, "min_connections: 1, peers_per_group: 0") + fmt.Sprintf(`
sinks:
  webhooks: [{name: hook, url: "%s/hook"}]
  alertmanagers: [{name: manager, urls: [%q]}]
`, sink.URL, sink.URL)
	d := startDaemon(t, config)
	if err := awaitFor(soon, "alerts of all", func() bool {
		return len(d.logged(spoken(inode(ns), alert.Fired))) >= len(hostileNames)
	}); err != nil {
		t.Fatal(err)
	}
	d.awaitSaved(ns, len(hostileNames))
	d.awaitMetric(0, "fintrace_sink_queued")
	labels := make([]string, len(hostileNames)) // in which names are as for people
	for i, name := range hostileNames {
		labels[i] = report.Clean(name)
	}
	encoded(t, "the log as JSON", d.text(), "process", labels)
	_, body := d.get("/api/v1/connections?netns=" + inode(ns))
	encoded(t, "the connections", string(body), "comm", hostileNames)
	_, body = d.get("/api/v1/alerts")
	encoded(t, "the alerts", string(body), "process", labels)
	for _, path := range []string{"/", "/metrics"} {
		_, body := d.get(path)
		harmless(t, path, strings.ReplaceAll(string(body), "\t", ""))
		if strings.Contains(string(body), hostileNames[8]) {
			t.Errorf("%s has %s", path, hostileNames[8])
		}
	}
	saved, err := os.ReadFile(filepath.Join(d.dir, "alerts.json"))
	if err != nil {
		t.Fatal(err)
	}
	encoded(t, "the state file", string(saved), "process", labels)
	mu.Lock()
	encoded(t, "the webhook", bodies["/hook"], "process", labels)
	encoded(t, "the Alertmanager", bodies["/api/v2/alerts"], "process", labels)
	mu.Unlock()
	if err := d.end(); err != nil {
		t.Error(err)
	}

	// As text, where a line is an alert.
	d.write(strings.Replace(config, "min_connections: 1", `min_connections: 1, state_file: ""`, 1) + "log: {format: text}\nweb: {listen: []}\n")
	cmd := exec.Command("fintrace", "daemon", "--config", d.config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fired := 0
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		line := lines.Text()
		harmless(t, "the log as text", line+"\n")
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("a line of the log is %q", line)
		}
		if strings.Contains(line, "event=fired") && strings.Contains(line, inode(ns)) {
			if fired++; fired == len(hostileNames) {
				cmd.Process.Signal(unix.SIGTERM)
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if fired != len(hostileNames) {
		t.Errorf("%d lines say that an alert has fired, want %d", fired, len(hostileNames))
	}
}
