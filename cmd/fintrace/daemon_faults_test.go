// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// anAddress is one that nothing listens on and no client is given: the port is
// below theirs, and the address is this process's own.
func anAddress() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.77.%d.%d:%d", pid>>8&0xff, pid&0xff, 20000+addresses.Add(1))
}

var addresses atomic.Int32

// A receiver is a webhook that works.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	alerts []received
}

type received struct {
	alertRecord
	at time.Time
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		at := time.Now()
		var body struct{ Alerts []alertRecord }
		if err := json.NewDecoder(request.Body).Decode(&body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, a := range body.Alerts {
			r.alerts = append(r.alerts, received{a, at})
		}
	}))
	t.Cleanup(r.Close)
	return r
}

// about are those that it has been told of a namespace.
func (r *receiver) about(ns *kerneltest.Namespace, events ...alert.Event) (alerts []received) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.alerts {
		if a.Labels.Netns == inode(ns) && (len(events) == 0 || slices.Contains(events, a.Event)) {
			alerts = append(alerts, a)
		}
	}
	return alerts
}

// await waits for the nth such alert.
func (r *receiver) await(t *testing.T, n int, ns *kerneltest.Namespace, events ...alert.Event) received {
	t.Helper()
	if err := awaitFor(soon, fmt.Sprintf("the webhook to be told %v %d times", events, n), func() bool { return len(r.about(ns, events...)) >= n }); err != nil {
		t.Fatalf("%v: %+v", err, r.about(ns))
	}
	return r.about(ns, events...)[n-1]
}

// windUp is for all of an end that has its own bound nowhere, on a busy machine:
// the last look at the sockets, and the detaching of the programs. What is told
// apart from it would last for ever.
const windUp = 10 * time.Second

// TestDaemonLog has the log fail in every way: alerts reach others, and the
// daemon answers and ends.
func TestDaemonLog(t *testing.T) {
	kerneltest.Require(t)
	pipe := func(t *testing.T) (reader, writer *os.File) {
		t.Helper()
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			reader.Close()
			writer.Close()
		})
		return reader, writer
	}
	full := func(t *testing.T) (reader, writer *os.File) {
		reader, writer = pipe(t)
		size, err := unix.FcntlInt(writer.Fd(), unix.F_GETPIPE_SZ, 0)
		if err == nil {
			_, err = writer.Write(slices.Repeat([]byte{'\n'}, size))
		}
		if err != nil {
			t.Fatal(err)
		}
		return reader, writer
	}
	for _, test := range []struct {
		name   string
		stderr func(t *testing.T) (reader, writer *os.File)
		// fails: alerts cannot be written; lost: nor can other lines, which is noticed.
		fails, lost bool
		mend        bool // the reader goes on
	}{
		{name: "a full disk", fails: true, lost: true, stderr: func(t *testing.T) (_, writer *os.File) {
			writer, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { writer.Close() })
			return nil, writer
		}},
		{name: "nobody reads", fails: true, stderr: full},
		{name: "nobody reads for a while", fails: true, stderr: full, mend: true},
		{name: "the reader is gone", fails: true, lost: true, stderr: func(t *testing.T) (_, writer *os.File) {
			reader, writer := pipe(t)
			reader.Close()
			return nil, writer
		}},
		{name: "closed", stderr: func(t *testing.T) (reader, writer *os.File) { return nil, nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ns := kerneltest.NewNamespace(t)
			hook := newReceiver(t)
			reader, writer := test.stderr(t)
			at := anAddress()
			d := newDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0")+fmt.Sprintf(`
sinks: {webhooks: [{url: %q}]}
web: {listen: %q}
shutdown_timeout: 1s
`, hook.URL, at))
			d.at = at
			d.log = func(cmd *exec.Cmd) {
				if writer != nil {
					cmd.Stderr = writer
				} else {
					sh := exec.Command("sh", append([]string{"-c", `exec "$0" "$@" 2>&-`}, cmd.Args...)...)
					cmd.Path, cmd.Args = sh.Path, sh.Args
				}
			}
			d.start()

			first := holdSome(t, ns, 1)
			hook.await(t, 1, ns, alert.Fired)
			if test.fails {
				d.awaitMetric(0, "fintrace_sink_up", "sink=log")
				if n, _ := d.metric("fintrace_sink_failures_total", "sink=log"); n == 0 {
					t.Error("no failure of the log is counted")
				}
			} else if failed, _ := d.metric("fintrace_sink_failures_total", "sink=log"); failed > 0 {
				t.Error("the log fails")
			}
			if up, _ := d.metric("fintrace_sink_up", "sink=webhook"); up != 1 {
				t.Error("the webhook is down")
			}
			if n, _ := d.metric("fintrace_log_lines_lost_total"); (n > 0) != test.lost {
				t.Errorf("%v lines of the log are lost", n)
			}
			first[0].close()
			hook.await(t, 1, ns, alert.Resolved)
			if alerts := d.alerts(inode(ns)); len(alerts) != 0 {
				t.Errorf("there are still %+v", alerts)
			}

			var written []byte
			read := make(chan struct{})
			if test.mend {
				writer.Close()
				go func() {
					defer close(read)
					written, _ = io.ReadAll(reader) // up to its end
				}()
				d.awaitMetric(1, "fintrace_sink_up", "sink=log")
			}
			began := time.Now()
			err := d.end()
			if took := time.Since(began); took > time.Second+2*lastWord+windUp {
				t.Errorf("it took %s to end", took)
			}
			exit := (*exec.ExitError)(nil)
			if undelivered := test.fails && !test.mend; !undelivered && err != nil || undelivered && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
				t.Errorf("it ends with %v", err)
			}
			if test.mend {
				<-read
				lines := strings.Split(string(written), "\n")
				for _, want := range [][]string{{`"msg":"watching"`}, {`"msg":"alerts cannot be delivered"`, `"sink":"log"`}, {`"event":"resolved"`, `"netns":"` + inode(ns) + `"`}} {
					has := func(line string) bool {
						return !slices.ContainsFunc(want, func(part string) bool { return !strings.Contains(line, part) })
					}
					if n := len(slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return !has(line) })); n != 1 {
						t.Errorf("%d lines have %s:\n%s", n, want, written)
					}
				}
			}
		})
	}
}

// TestDaemonSinks has every kind of bad webhook beside a good one and the log.
func TestDaemonSinks(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	const secret = "5ecret-t0ken"
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	bad := func(answer http.HandlerFunc) string {
		s := httptest.NewServer(answer)
		t.Cleanup(s.CloseClientConnections)
		return s.URL + "/" + secret
	}
	hangs := bad(func(http.ResponseWriter, *http.Request) { <-ended })
	fails := bad(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no such hook: "+r.URL.Path, http.StatusInternalServerError)
	})
	drips := bad(func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for _, b := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
			select {
			case <-time.After(time.Second):
			case <-ended:
				return
			}
		}
	})
	refuses := "http://" + anAddress() + "/hook?key=" + secret
	good := newReceiver(t)
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0")+fmt.Sprintf(`
sinks:
  webhooks:
    - {name: hangs, url: %q, timeout: 2s}
    - {name: refuses, url: %q, timeout: 2s}
    - {name: fails, url: %q, timeout: 2s}
    - {name: drips, url: %q, timeout: 2s}
    - {name: good, url: %q, timeout: 2s}
shutdown_timeout: 1s
`, hangs, refuses, fails, drips, good.URL))

	// Twice: the second time while they are in trouble.
	for n := 1; n <= 2; n++ {
		h := holdSome(t, ns, 1)
		told := good.await(t, n, ns, alert.Fired)
		if err := await("the log's line", func() bool { return len(d.logged(spoken(inode(ns), alert.Fired))) >= n }); err != nil {
			t.Fatal(err)
		}
		line := d.logged(spoken(inode(ns), alert.Fired))[n-1]
		if apart := told.at.Sub(line.Read).Abs(); apart > time.Second {
			t.Errorf("the log's line and the webhook are %s apart", apart)
		}
		if n == 1 {
			for _, name := range []string{"hangs", "refuses", "fails", "drips"} {
				d.awaitMetric(0, "fintrace_sink_up", "sink="+name)
				d.await("a line about "+name, func(l *logLine) bool {
					return l.Message == "alerts cannot be delivered" && strings.Contains(l.Text, `"sink":"`+name+`"`)
				})
				failures, _ := d.metric("fintrace_sink_failures_total", "sink="+name)
				queued, _ := d.metric("fintrace_sink_queued", "sink="+name)
				shed, known := d.metric("fintrace_sink_shed_total", "sink="+name)
				if failures == 0 || queued == 0 || shed != 0 || !known {
					t.Errorf("%s: %v failures, %v queued, %v shed", name, failures, queued, shed)
				}
			}
		}
		h[0].close()
		good.await(t, n, ns, alert.Resolved)
	}
	for _, name := range []string{"good", "log"} {
		up, _ := d.metric("fintrace_sink_up", "sink="+name)
		failures, known := d.metric("fintrace_sink_failures_total", "sink="+name)
		if up != 1 || failures != 0 || !known {
			t.Errorf("%s: up %v, %v failures", name, up, failures)
		}
	}
	began := time.Now()
	d.signal(unix.SIGTERM)
	// A reload that comes too late, or a terminal that is closed, breaks nothing off.
	hangups := time.NewTicker(20 * time.Millisecond)
	defer hangups.Stop()
	var err error
	for ended := false; !ended; {
		select {
		case err = <-d.exited:
			ended = true
		case <-hangups.C:
			_ = d.Process.Signal(unix.SIGHUP) // it may have ended by now
			if time.Since(began) > 30*time.Second {
				t.Fatal("it does not end")
			}
		}
	}
	if took := time.Since(began); took > time.Second+windUp {
		t.Errorf("it took %s to end", took)
	}
	exit := (*exec.ExitError)(nil)
	last := lastLine(d.text())
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(last, "not delivered: hangs ") {
		t.Errorf("it ends with %v and %q", err, last)
	}
	if text := d.text(); strings.Contains(text, secret) {
		t.Errorf("the secret is in the log:\n%s", text)
	}
}

func lastLine(text string) string {
	text = strings.TrimSuffix(text, "\n")
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// reload has the daemon read a configuration, and returns the line that says
// what it makes of it.
func (d *daemonProcess) reload(config string) logLine {
	d.t.Helper()
	d.write(config)
	return d.hangUp()
}

// hangUp is reload of what the file has.
func (d *daemonProcess) hangUp() logLine {
	d.t.Helper()
	is := func(l *logLine) bool { return strings.HasPrefix(l.Message, "the configuration is ") }
	before := len(d.logged(is))
	d.signal(unix.SIGHUP)
	if err := await("the reload", func() bool { return len(d.logged(is)) > before }); err != nil {
		d.t.Fatal(err)
	}
	return d.logged(is)[before]
}

// TestDaemonReload breaks and mends the configuration of a daemon that runs.
func TestDaemonReload(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	hook := newReceiver(t)
	here, there := anAddress(), anAddress()
	taken, err := net.Listen("tcp", anAddress())
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	config := func(limit, listen, rest string) string {
		text := limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0")
		return strings.Replace(text, "fin_timeout: 1s", "fin_timeout: "+limit, 1) + fmt.Sprintf("\nweb: {listen: %q}\n%s\n", listen, rest)
	}
	d := startDaemon(t, config("1h", here, ""))
	inForce := func(what string, limit, successful float64) {
		t.Helper()
		records := d.connections("netns=" + inode(ns))
		if len(records) != 1 || records[0].Limit != limit {
			t.Errorf("%s: %+v, want one with a limit of %v s", what, records, limit)
		}
		if got, _ := d.metric("fintrace_config_last_reload_successful"); got != successful {
			t.Errorf("%s: fintrace_config_last_reload_successful is %v, want %v", what, got, successful)
		}
	}
	all := holdSome(t, ns, 1)
	if err := await("the connection", func() bool { return len(d.connections("netns="+inode(ns))) == 1 }); err != nil {
		t.Fatal(err)
	}
	inForce("at the start", 3600, 1)

	broken := d.reload(config("soon", here, ""))
	if broken.Level != "ERROR" || !strings.Contains(broken.Error, "fintrace.yaml:5:18: limits[0].fin_timeout: ") || strings.Contains(broken.Error, "\n") {
		t.Errorf("what is broken is said as %s", broken.Text)
	}
	inForce("broken", 3600, 0)
	if err := os.Remove(d.config); err != nil {
		t.Fatal(err)
	}
	if gone := d.hangUp(); gone.Level != "ERROR" || !strings.Contains(gone.Error, "fintrace.yaml: no such file") {
		t.Errorf("a file that is gone is said as %s", gone.Text)
	}
	inForce("gone", 3600, 0)

	if mended := d.reload(config("1s", here, "")); mended.Level != "INFO" {
		t.Error(mended.Text)
	}
	inForce("mended", 1, 1)
	d.await("the alert of what was there", spoken(inode(ns), alert.Fired))

	if moved := d.reload(config("1s", there, "")); moved.Level != "INFO" {
		t.Error(moved.Text)
	}
	if c, err := net.Dial("tcp", here); err == nil {
		c.Close()
		t.Error("it listens still where it did")
	}
	d.at = there
	inForce("moved", 1, 1)
	refused := d.reload(config("1h", taken.Addr().String(), ""))
	if refused.Level != "ERROR" || !strings.Contains(refused.Error, taken.Addr().String()+": another process listens there") {
		t.Error(refused.Text)
	}
	inForce("moved to where another is", 1, 0)

	if added := d.reload(config("1s", there, fmt.Sprintf("sinks: {log: false, webhooks: [{url: %q}]}", hook.URL))); added.Level != "INFO" {
		t.Error(added.Text)
	}
	hook.await(t, 1, ns, alert.Repeated)
	all[0].close()
	hook.await(t, 1, ns, alert.Resolved)
	if resolved := d.logged(spoken(inode(ns), alert.Resolved)); len(resolved) != 0 {
		t.Errorf("the log is no sink any more, and has %s", resolved[0].Text)
	}

	d.write(config("1s", there, fmt.Sprintf("log: {format: json, level: error}\nsinks: {webhooks: [{url: %q}]}", hook.URL)))
	d.signal(unix.SIGHUP) // which that log does not mention
	if err := await("the log to be a sink again", func() bool {
		_, is := d.metric("fintrace_sink_up", "sink=log")
		return is
	}); err != nil {
		t.Fatal(err)
	}
	all = holdSome(t, ns, 1)
	hook.await(t, 1, ns, alert.Fired)
	d.awaitMetric(0, "fintrace_sink_queued", "sink=log")
	if fired := d.logged(spoken(inode(ns), alert.Fired)); len(fired) != 1 {
		t.Errorf("at level error the log has %s", fired[len(fired)-1].Text)
	}
	if removed := d.reload(config("1s", there, "")); removed.Level != "INFO" {
		t.Error(removed.Text)
	}
	all[0].close()
	d.await("the resolution", spoken(inode(ns), alert.Resolved))
	if n := len(hook.about(ns, alert.Resolved)); n != 1 {
		t.Errorf("the webhook is gone, and was told %d times that something has resolved", n)
	}
	if _, is := d.metric("fintrace_sink_up", "sink=webhook"); is {
		t.Error("the webhook is still in the metrics")
	}

	elsewhere := filepath.Join(t.TempDir(), "alerts.json")
	if moved := d.reload(strings.Replace(config("1s", there, ""), "alerts: {", "alerts: {state_file: "+elsewhere+", ", 1)); moved.Level != "INFO" {
		t.Error(moved.Text)
	}
	if err := await("the state to be kept elsewhere", func() bool {
		_, err := os.Stat(elsewhere)
		return err == nil
	}); err != nil {
		t.Error(err)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// descriptors is how many a process has open.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// leaksNothing waits until a daemon has no more goroutines and descriptors than
// before something was done to it.
func (d *daemonProcess) leaksNothing(do func()) {
	d.t.Helper()
	use := func() (goroutines float64, open int) {
		open = descriptors(d.t, d.Process.Pid)
		goroutines, _ = d.metric("go_goroutines")
		return goroutines, open
	}
	// What is open for a moment only is not to count as there before.
	goroutines, open := use()
	for range 10 {
		g, o := use()
		goroutines, open = min(goroutines, g), min(open, o)
	}
	do()
	var g float64
	var o int
	err := await("what was used to be given back", func() bool {
		g, o = use()
		return g <= goroutines && o <= open
	})
	if err != nil {
		d.t.Errorf("%v: there were %v goroutines and %d descriptors, and are %v and %d", err, goroutines, open, g, o)
	}
}

// TestDaemonReloads reloads a hundred times while alerts fire: the sinks of
// before and all else are given back.
func TestDaemonReloads(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	hook := newReceiver(t)
	at := anAddress()
	config := func(n int) string {
		return limited(ns, fmt.Sprintf("min_connections: 1, resolve_after: %ds, peers_per_group: 0", 1+n%2)) + fmt.Sprintf(`
sinks: {webhooks: [{name: hook-%d, url: %q, headers: {X-Round: "%d"}}]}
web: {listen: %q}
`, n%3, hook.URL, n%5, at)
	}
	d := startDaemon(t, config(0))
	holdSome(t, ns, 1)
	first := hook.await(t, 1, ns, alert.Fired)
	d.leaksNothing(func() {
		for n := range 100 {
			if n%20 == 10 {
				holdSome(t, ns, 1)
			}
			if line := d.reload(config(n + 1)); line.Level != "INFO" {
				t.Error(line.Text)
			}
		}
		// And faster than they can be served.
		for range 100 {
			d.signal(unix.SIGHUP)
		}
		hook.await(t, 6, ns, alert.Fired)
	})
	fired := map[string]int{}
	for _, line := range d.logged(spoken(inode(ns), alert.Fired)) {
		fired[line.Alert]++
	}
	if len(fired) != 6 || fired[first.ID] != 1 || len(d.alerts(inode(ns))) != 6 {
		t.Errorf("%v have fired, and there are %d; want six, each once", fired, len(d.alerts(inode(ns))))
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// holdOn is holdSome at a port of one's own.
func holdOn(t *testing.T, ns *kerneltest.Namespace, port, n int) []held {
	t.Helper()
	return holdAt(t, ns, &net.TCPAddr{IP: net.IPv4(127, 200, 200, 200), Port: port}, n)
}

// TestDaemonMeanwhile kills a daemon, and has what it watches go on without it.
func TestDaemonMeanwhile(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	finTimeout(t, ns, 60)
	const ends, stays, comes = 7001, 7002, 7003
	port := func(port uint16, events ...alert.Event) func(*logLine) bool {
		return func(l *logLine) bool { return l.Labels.Port == port && spoken(inode(ns), events...)(l) }
	}
	d := startDaemon(t, limited(ns, "min_connections: 2, resolve_after: 1s"))
	ending := holdOn(t, ns, ends, 2)
	holdOn(t, ns, stays, 2)
	// Closed at once: what was held for longer than its timer is exact to is known to
	// have been held, but not since when.
	var closing moment
	if err := awaitFor(soon, "a connection to be closed at once", func() bool {
		closing.before = probe.Now()
		minisock := holdOn(t, ns, 7004, 1)[0]
		minisock.subject.Close()
		closing.after = probe.Now()
		if closing.after.Sub(closing.before) < 20*time.Millisecond {
			return true
		}
		minisock.peer.Close()
		return false
	}); err != nil {
		t.Fatal(err)
	}
	fired := map[uint16]logLine{}
	for _, p := range []uint16{ends, stays} {
		fired[p] = d.await("the alert", port(p, alert.Fired))
	}
	d.awaitSaved(ns, 2)

	d.signal(unix.SIGKILL)
	d.gone()
	for _, h := range ending {
		h.close()
	}
	holdOn(t, ns, comes, 2)
	// Past the limit and the grace while nobody watches.
	pause(time.Second + track.Grace)
	again := time.Now()
	d.start()
	after := func(fits func(*logLine) bool) func(*logLine) bool {
		return func(l *logLine) bool { return l.Read.After(again) && fits(l) }
	}
	if going := d.await("the alert to go on", after(port(stays))); going.Event != alert.Updated || going.Alert != fired[stays].Alert {
		t.Errorf("what goes on is said as %s", going.Text)
	}
	if came := d.await("the alert that is new", after(port(comes))); came.Event != alert.Fired {
		t.Errorf("what is new is said as %s", came.Text)
	}
	if gone := d.await("the resolution", after(port(ends))); gone.Event != alert.Resolved || gone.Alert != fired[ends].Alert {
		t.Errorf("what has gone is said as %s", gone.Text)
	}
	records := d.connections("stage=minisock&netns=" + inode(ns))
	if len(records) != 1 {
		t.Fatalf("%+v, want one minisock", records)
	}
	r := records[0]
	least := wall(closing.before).Add(-exact)
	most := wall(closing.after).Add(exact)
	if !r.SinceExact || r.Since.Before(least) || r.Since.After(most) {
		t.Errorf("the minisock is there since %v (exact: %t), want %v to %v", r.Since, r.SinceExact, least, most)
	}
	if entered, _ := d.metric("fintrace_fin_wait2_entered_total"); entered < 5 {
		t.Errorf("%v have entered", entered)
	}
	if n := len(d.logged(port(comes))); n != 1 {
		t.Errorf("%d lines are about the new alert", n)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// wall is a time as records have it.
func wall(t events.Time) time.Time { return time.Now().Add(t.Sub(probe.Now())) }

// awaitSaved waits until the state file has so many alerts of a namespace.
func (d *daemonProcess) awaitSaved(ns *kerneltest.Namespace, n int) {
	d.t.Helper()
	var text []byte
	err := await("the state to be kept", func() bool {
		var s alert.Saved
		text, _ = os.ReadFile(filepath.Join(d.dir, "alerts.json"))
		err := json.Unmarshal(text, &s)
		ours := slices.DeleteFunc(s.Alerts, func(a alert.SavedAlert) bool { return a.Labels.Netns != inode(ns) })
		return err == nil && len(ours) == n
	})
	if err != nil {
		d.t.Fatalf("%v: it is %s", err, text)
	}
}

// TestDaemonStateFile starts with state files that are not to be used, or cannot
// be written: that is said once, and all else goes on.
func TestDaemonStateFile(t *testing.T) {
	kerneltest.Require(t)
	const (
		unknown = "alerts that were firing before are not known: they fire anew"
		partly  = "not all alerts that were firing before go on: the others fire anew"
		unkept  = "which alerts fire cannot be kept: after a restart they fire anew"
	)
	const whole = `{"version":1,"alerts":[{"labels":{"limit":"quick","stage":"held","side":"inbound","port":443,"peer":"other"},` +
		`"starts_at":"2026-01-02T03:04:05Z","notified_at":"2026-01-02T03:04:05Z","count":10,"peak":10,"limit_source":"rule \"quick\" 1s","limit_seconds":1}]}`
	for _, test := range []struct {
		name, file string
		text       string
		want, why  string // the one line
	}{
		{name: "whole", text: whole},
		{name: "cut in half", text: whole[:len(whole)/2], want: unknown, why: "unexpected EOF"},
		{name: "empty", want: unknown, why: "EOF"},
		{name: "garbage", text: "\x00\xff\x13 no JSON", want: unknown, why: "invalid character"},
		{name: "of another version", text: strings.Replace(whole, `"version":1`, `"version":2`, 1), want: partly, why: "version 2"},
		{name: "not writable", file: "/proc/fintrace/alerts.json", want: unkept, why: "/proc/fintrace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ns := kerneltest.NewNamespace(t)
			file := "DIR/saved.json"
			if test.file != "" {
				file = test.file
			}
			d := newDaemon(t, limited(ns, fmt.Sprintf("state_file: %s, min_connections: 1, resolve_after: 1s, peers_per_group: 0", file)))
			path := filepath.Join(d.dir, "saved.json")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			d.start()
			for range 2 { // which changes the state four times
				h := holdSome(t, ns, 1)
				began := time.Now()
				d.await("the alert", func(l *logLine) bool { return l.Read.After(began) && spoken(inode(ns), alert.Fired)(l) })
				h[0].close()
				d.await("the resolution", func(l *logLine) bool { return l.Read.After(began) && spoken(inode(ns), alert.Resolved)(l) })
			}
			if err := d.end(); err != nil {
				t.Error(err)
			}
			warnings := d.logged(func(l *logLine) bool {
				return l.Level != "INFO" && l.Alert == "" && l.Message != "not looked at" // on all of the host
			})
			switch {
			case test.want == "" && len(warnings) == 0:
			case test.want == "" || len(warnings) != 1 || warnings[0].Message != test.want || !strings.Contains(warnings[0].Error, test.why):
				t.Errorf("the warnings are %+v, want %q", warnings, test.want)
			}
			if test.file == "" {
				var s alert.Saved
				if text, err := os.ReadFile(path); err != nil || json.Unmarshal(text, &s) != nil || s.Version != 1 {
					t.Errorf("the state at the end is %q, %v", text, err)
				}
			}
		})
	}
}

// TestDaemonTwice starts a daemon beside another with the same configuration.
func TestDaemonTwice(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	at := anAddress()
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0")+fmt.Sprintf("\nweb: {listen: %q}\n", at))
	holdSome(t, ns, 1)
	d.await("the alert", spoken(inode(ns), alert.Fired))
	d.awaitSaved(ns, 1)
	path := filepath.Join(d.dir, "alerts.json")
	stamp := func() (st unix.Stat_t) {
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		st.Atim = unix.Timespec{}
		return st
	}
	// The first writes it whenever an alert changes, on all of the host.
	if err := await("a second daemon to leave the state of the first alone", func() bool {
		then := stamp()
		out, err := exec.Command("fintrace", "daemon", "--config", d.config).CombinedOutput()
		exit := (*exec.ExitError)(nil)
		want := "fintrace: web listener " + at + ": another process listens there (ss -ltnp shows which)\n"
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != want {
			t.Fatalf("the second ends with %v and %q, want %q", err, out, want)
		}
		return stamp() == then
	}); err != nil {
		t.Error(err)
	}
	if alerts := d.alerts(inode(ns)); len(alerts) != 1 {
		t.Errorf("the first has %+v", alerts)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// relay is the configuration of a HAProxy in front of a server at port 20000.
const relay = `
defaults
	mode tcp
	timeout connect 10s
	timeout client 1h
	timeout client-fin FIN
	timeout server 1h
frontend web
	bind 127.0.0.1:7000
	default_backend servers
backend servers
	server origin 127.0.0.1:20000
`

// behind starts the system's HAProxy with a client-fin, and the server behind it.
func behind(t *testing.T, ns *kerneltest.Namespace, mode haproxytest.Mode, fin string) (h *haproxytest.HAProxy, origin net.Listener) {
	t.Helper()
	versions := haproxytest.Versions(t)
	own := slices.IndexFunc(versions, func(v haproxytest.Version) bool { return v.Root == "" })
	if own < 0 {
		t.Skip("not run: haproxy is not installed")
	}
	var err error
	ns.Do(func() { origin, err = net.Listen("tcp4", "127.0.0.1:20000") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { origin.Close() })
	return haproxytest.Start(t, ns, versions[own], mode, strings.Replace(relay, "FIN", fin, 1)), origin
}

// pinned makes a connection through HAProxy that it holds towards the client, and
// waits until the daemon says of it what is wanted.
func (d *daemonProcess) pinned(ns *kerneltest.Namespace, origin net.Listener, want func(*report.Record) bool) {
	d.t.Helper()
	client, server := through(d.t, ns, "", "127.0.0.1:7000", origin)
	if err := server.CloseWrite(); err != nil {
		d.t.Fatal(err)
	}
	var got []report.Record
	err := awaitFor(soon, "the connection", func() bool {
		got = d.connections("side=inbound&netns=" + inode(ns))
		return slices.ContainsFunc(got, func(r report.Record) bool { return r.Remote == client.LocalAddr().String() && want(&r) })
	})
	if err != nil {
		d.t.Fatalf("%v %s: %+v", err, client.LocalAddr(), got)
	}
}

// TestDaemonHAProxyFile changes the file of a HAProxy that runs, and breaks it.
func TestDaemonHAProxyFile(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	h, origin := behind(t, ns, haproxytest.MasterWorker, "30s")
	d := startDaemon(t, "")
	limited := func(fin string) func(*report.Record) bool {
		return func(r *report.Record) bool {
			return r.HAProxy != nil && r.HAProxy.Proxy == "web" && !r.HAProxy.Old &&
				strings.HasPrefix(r.LimitSource, "haproxy.cfg:6 defaults timeout client-fin "+fin)
		}
	}
	known := func() {
		t.Helper()
		if read, is := d.metric("fintrace_haproxy_config_read", "haproxy="+h.Inside(h.ConfigPath())); read != 1 || !is {
			t.Errorf("fintrace_haproxy_config_read is %v (%t)", read, is)
		}
	}
	write := func(fin string) { h.WriteConfig(strings.Replace(relay, "FIN", fin, 1)) }
	d.pinned(ns, origin, limited("30s"))
	known()

	// A worker runs what it was started with, whatever its file says now.
	write("20s")
	pause(2 * checkEvery)
	d.pinned(ns, origin, limited("30s"))
	known()
	h.Reload()
	d.pinned(ns, origin, limited("20s"))
	known()

	write("soon")
	h.Signal(unix.SIGUSR2)
	said := func(l *logLine) bool {
		return l.Level == "WARN" && l.Message == "not looked at" && strings.Contains(l.What, h.ConfigPath()+":6:21: ")
	}
	d.await("a line about the file", said)
	d.pinned(ns, origin, limited("20s"))
	known()
	if n := len(d.logged(said)); n != 1 {
		t.Errorf("it is said %d times", n)
	}

	// Who comes now cannot know what runs.
	if err := d.end(); err != nil {
		t.Error(err)
	}
	again := time.Now()
	d.start()
	d.await("a line about the file", func(l *logLine) bool { return l.Read.After(again) && said(l) })
	d.pinned(ns, origin, func(r *report.Record) bool {
		return r.HAProxy == nil && strings.HasPrefix(r.LimitSource, "net.ipv4.tcp_fin_timeout")
	})
	if read, is := d.metric("fintrace_haproxy_config_read", "haproxy=unknown"); read != 0 || !is {
		t.Errorf("fintrace_haproxy_config_read is %v (%t)", read, is)
	}
	write("10s")
	h.Reload()
	d.pinned(ns, origin, limited("10s"))
	known()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// TestDaemonHAProxyRestart restarts a HAProxy, and then stops it: its alert goes,
// comes back as the same, and goes.
func TestDaemonHAProxyRestart(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	ns := kerneltest.NewNamespace(t)
	finTimeout(t, ns, 1)
	h, origin := behind(t, ns, haproxytest.Foreground, "1h")
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	held := func(*report.Record) bool { return true }
	ours := func(n int, event alert.Event) logLine {
		t.Helper()
		is := func(l *logLine) bool {
			return l.Labels.Proxy == "web" && l.Labels.Side == "inbound" && spoken(inode(ns), event)(l)
		}
		if err := awaitFor(soon, "the alert", func() bool { return len(d.logged(is)) >= n }); err != nil {
			t.Fatal(err)
		}
		return d.logged(is)[n-1]
	}
	d.pinned(ns, origin, held)
	first := ours(1, alert.Fired)
	h.Restart()
	ours(1, alert.Resolved)
	d.pinned(ns, origin, held)
	second := ours(2, alert.Fired)
	if second.Labels != first.Labels || second.Alert != first.Alert {
		t.Errorf("after the restart it is %s of %+v, before it was %s of %+v", second.Alert, second.Labels, first.Alert, first.Labels)
	}
	path := "haproxy=" + h.Inside(h.ConfigPath())
	if n, is := d.metric("fintrace_haproxy_held_connections", path, "worker=current"); !is || n != 1 {
		t.Errorf("%v connections are held (%t)", n, is)
	}
	h.Stop()
	ours(2, alert.Resolved)
	if err := awaitFor(soon, "HAProxy to be forgotten", func() bool {
		_, is := d.metric("fintrace_haproxy_config_read", path)
		return !is
	}); err != nil {
		t.Error(err)
	}
	if alerts := d.alerts(inode(ns)); len(alerts) != 0 {
		t.Errorf("there is still %+v", alerts)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// TestDaemonNamespaces makes and deletes network namespaces while a daemon runs.
func TestDaemonNamespaces(t *testing.T) {
	kerneltest.Require(t)
	t.Parallel()
	const holds, closes = 7070, 7071
	d := startDaemon(t, fmt.Sprintf(`
limits:
  - {name: held, match: {local_port: %d}, fin_timeout: 1s}
  - {name: closed, match: {local_port: %d, stage: minisock}, fin_timeout: 1s}
alerts: {min_connections: 1, resolve_after: 1s, peers_per_group: 0}
`, holds, closes))
	of := func(netns string) string { return fmt.Sprintf("port=%d,%d&netns=%s", holds, closes, netns) }
	var was string // the first
	t.Run("with connections", func(t *testing.T) {
		ns := kerneltest.NewNamespace(t)
		was = inode(ns)
		finTimeout(t, ns, 5)
		fired := func(limit string) bool {
			return len(d.logged(func(l *logLine) bool { return l.Labels.Limit == limit && spoken(was, alert.Fired)(l) })) > 0
		}
		// More than once: the kernel may skip one's event, and who is closed is not
		// there for long.
		var all []held
		if err := awaitFor(soon, "the alerts", func() bool {
			two := slices.Concat(holdOn(t, ns, holds, 1), holdOn(t, ns, closes, 1))
			two[1].subject.Close()
			all = append(all, two...)
			pause(500 * time.Millisecond)
			return fired("held") && fired("closed")
		}); err != nil {
			t.Fatal(err)
		}
		// With their peers gone without a word, what is left ends with the
		// namespace, which no event tells.
		for _, h := range all {
			if err := h.peer.SetLinger(0); err != nil {
				t.Error(err)
			}
		}
		ns.Do(func() {
			if out, err := exec.Command("ip", "link", "set", "lo", "down").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		})
	})
	for _, limit := range []string{"held", "closed"} {
		d.await("the resolution", func(l *logLine) bool { return l.Labels.Limit == limit && spoken(was, alert.Resolved)(l) })
	}
	var left []report.Record
	if err := awaitFor(soon, "the connections to leave", func() bool {
		left = d.byInode(was, holds, closes)
		return len(left) == 0
	}); err != nil {
		t.Errorf("%v: %+v", err, left)
	}
	d.leaksNothing(func() {
		for range 20 {
			t.Run("one of many", func(t *testing.T) {
				ns := kerneltest.NewNamespace(t)
				holdOn(t, ns, holds, 1)
				if err := awaitFor(soon, "the connection", func() bool { return len(d.connections(of(inode(ns)))) == 1 }); err != nil {
					t.Error(err)
				}
			})
		}
	})
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// byInode are the connections in a namespace at some ports, which there may be no
// way to name any more.
func (d *daemonProcess) byInode(netns string, ports ...int) (records []report.Record) {
	d.t.Helper()
	for _, port := range ports {
		for _, r := range d.connections(fmt.Sprintf("port=%d", port)) {
			if fmt.Sprint(r.Netns) == netns {
				records = append(records, r)
			}
		}
	}
	return records
}

// TestDaemonDefaults: without a configuration file the defaults hold, and anybody
// may ask.
func TestDaemonDefaults(t *testing.T) {
	if _, err := os.Stat(defaultConfig); err == nil {
		t.Skip("this host has a", defaultConfig)
	}
	out, err := exec.Command("unprivileged", "daemon", "--check").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "There is no configuration file: the defaults hold.\n") {
		t.Errorf("it ends with %v and says:\n%s", err, out)
	}
}

// stopped is how long TestDaemonStopped stops the daemon. The ring buffer has
// room for some seconds of what two processors make.
var stopped = flag.Duration("daemon.stopped", 5*time.Second, "how long the daemon is stopped under load")

// halfClosing makes connections that are each in FIN_WAIT2 by shutdown for a
// moment, of which the kernel side sends all, until stop is closed.
func halfClosing(t *testing.T, ns *kerneltest.Namespace, workers int) (stop func() (made int)) {
	t.Helper()
	ns.Sysctl(t, "net.ipv4.ip_local_port_range", "1024 65535")
	end := make(chan struct{})
	results := make(chan churn, workers)
	for w := range workers {
		go ns.Do(func() { results <- halfCloser(byte(w+1), end) })
	}
	stop = sync.OnceValue(func() (made int) {
		close(end)
		for range workers {
			c := <-results
			if c.failed != nil {
				t.Error("the load failed:", c.failed)
			}
			made += c.made
		}
		return made
	})
	t.Cleanup(func() { stop() })
	return stop
}

func halfCloser(id byte, end <-chan struct{}) (c churn) {
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return churn{failed: err}
	}
	defer unix.Close(listener)
	if err := errors.Join(unix.Bind(listener, &unix.SockaddrInet4{}), unix.Listen(listener, 1)); err != nil {
		return churn{failed: err}
	}
	bound, err := unix.Getsockname(listener)
	if err != nil {
		return churn{failed: err}
	}
	for port := int(endpoint(bound).Port); ; c.made++ {
		select {
		case <-end:
			return c
		default:
		}
		client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return churn{c.made, err}
		}
		err = unix.Connect(client, &unix.SockaddrInet4{Addr: [4]byte{127, id, byte(c.made / 250 % 250), byte(c.made%250 + 1)}, Port: port})
		server := -1
		if err == nil {
			server, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC)
		}
		if err == nil {
			err = errors.Join(unix.Shutdown(client, unix.SHUT_WR), awaitFIN(server))
		}
		unix.Close(server)
		unix.Close(client)
		if err != nil {
			return churn{c.made, err}
		}
	}
}

// TestDaemonStopped stops a daemon under load, as a debugger or a freezer does.
// What is lost is counted, and put right by a look at the sockets.
func TestDaemonStopped(t *testing.T) {
	kerneltest.Require(t)
	ns, busy := kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	port := func(port uint16, events ...alert.Event) func(*logLine) bool {
		return func(l *logLine) bool { return l.Labels.Port == port && spoken(inode(ns), events...)(l) }
	}
	const ends, stays, comes, later = 7001, 7002, 7003, 7004
	ending := holdOn(t, ns, ends, 2)
	holdOn(t, ns, stays, 2)
	stop := halfClosing(t, busy, 2)
	d.await("an alert", port(ends, alert.Fired))
	d.await("an alert", port(stays, alert.Fired))

	began := time.Now()
	d.signal(unix.SIGSTOP)
	for _, h := range ending {
		h.close()
	}
	pause(*stopped / 2)
	entered := moment{before: probe.Now()}
	coming := holdOn(t, ns, comes, 1)[0]
	entered.after = probe.Now()
	// An answer to a probe would be taken for the last ACK before it was there.
	for _, end := range []*net.TCPConn{coming.subject, coming.peer} {
		if err := end.SetKeepAlive(false); err != nil {
			t.Fatal(err)
		}
	}
	pause(*stopped - time.Since(began))
	goes := time.Now()
	d.signal(unix.SIGCONT)

	if err := await("the daemon to be in health", func() bool { code, _ := d.get("/healthz"); return code == http.StatusOK }); err != nil {
		t.Error(err)
	}
	t.Logf("in health %s after the stop", time.Since(goes))
	const repaired = doubtfulAtMost + time.Second + late
	if resolved := d.await("the resolution", port(ends, alert.Resolved)); resolved.Read.Sub(goes) > repaired {
		t.Errorf("what has ended is said %s after the stop", resolved.Read.Sub(goes))
	}
	if fired := d.await("an alert", port(comes, alert.Fired)); fired.Read.Sub(goes) > repaired {
		t.Errorf("what has come is said %s after the stop", fired.Read.Sub(goes))
	}
	if records := d.connections(fmt.Sprintf("port=%d&netns=%s", comes, inode(ns))); len(records) != 1 {
		t.Errorf("%+v have come, want one", records)
	} else if r := records[0]; r.Since.Before(wall(entered.before).Add(-tick)) || r.Since.After(wall(entered.after).Add(tick)) {
		t.Errorf("what has come is there since %v (exact: %t), want %v to %v", r.Since, r.SinceExact, wall(entered.before), wall(entered.after))
	}
	made := stop()
	took := time.Since(began)
	// It keeps up again.
	holdOn(t, ns, later, 1)
	due := time.Now().Add(time.Second + track.Grace)
	if fired := d.await("an alert", port(later, alert.Fired)); fired.Read.Sub(due) > time.Second+late {
		t.Errorf("the next alert came %s after the limit had passed", fired.Read.Sub(due))
	}
	if n := len(d.logged(port(stays))); n != 1 {
		t.Errorf("%d lines are about the alert that went on", n)
	}
	lost, is := d.metric("fintrace_records_lost_total")
	missed, _ := d.metric("fintrace_events_missed_total")
	corrected, _ := d.metric("fintrace_snapshot_corrections_total")
	t.Logf("%d connections, %.0f a second: %v records lost, %v events missed, %v corrections",
		made, float64(made)/took.Seconds(), lost, missed, corrected)
	// Half of them in the stop, each with two records of some hundred bytes.
	if overrun := made > 200_000; overrun && lost == 0 || !is {
		t.Errorf("%v records are lost (%t)", lost, is)
	}
	var listed, there []string
	spaces := []*kerneltest.Namespace{ns, busy}
	if err := awaitFor(soon, "the table to be as ss has it", func() bool {
		there, listed = ssFinWait2(t, spaces), nil
		for _, ns := range spaces {
			for _, r := range d.connections("netns=" + inode(ns)) {
				listed = append(listed, fmt.Sprintf("%d %s %s", r.Netns, r.Local, r.Remote))
			}
		}
		slices.Sort(listed)
		return slices.Equal(listed, there)
	}); err != nil {
		t.Errorf("%v:\ntable %q\nss    %q", err, listed, there)
	}
	if alerts := d.alerts(inode(ns)); len(alerts) != 3 {
		t.Errorf("%d alerts fire, want 3: %+v", len(alerts), alerts)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// TestDaemonSlowClients has two hundred clients that send slowly or do not read,
// under load: no alert waits for them, nor does who asks how the daemon is.
func TestDaemonSlowClients(t *testing.T) {
	kerneltest.Require(t)
	ns, busy := kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)
	d := startDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0"))
	busy.Do(func() { // for long answers
		for range 1000 {
			h, err := connected()
			if err == nil {
				t.Cleanup(h.close)
				err = h.subject.CloseWrite()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	halfClosing(t, busy, 1)

	ended := make(chan struct{})
	var clients sync.WaitGroup
	t.Cleanup(func() { close(ended); clients.Wait() })
	asks := []string{"", "GET /api/v1/connections?limit=10000 HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /api/v1/alerts HTTP/1.1\r\nHost: localhost\r\n\r\n"}
	var answered atomic.Int32
	for n := range 200 {
		clients.Go(func() {
			for {
				if c, err := net.Dial("tcp", d.at); err == nil {
					slowClient(c.(*net.TCPConn), asks[n%len(asks)], n%3 == 0, n%3 == 1, ended, &answered)
				}
				select {
				case <-ended:
					return
				case <-time.After(100 * time.Millisecond): // it was turned away
				}
			}
		})
	}
	if err := await("answers to begin", func() bool { return answered.Load() > 0 }); err != nil {
		t.Fatal(err)
	}
	// What makes alerts wait for clients does so in each round; what else runs on
	// the machine does not.
	const rounds, each = 3, 8
	for round := range rounds {
		due := map[uint16]time.Time{}
		for n := range each {
			port := uint16(7001 + round*each + n)
			holdOn(t, ns, int(port), 1)
			due[port] = time.Now().Add(time.Second + track.Grace)
			pause(200 * time.Millisecond)
		}
		worst, health := time.Duration(0), time.Duration(0)
		for port, at := range due {
			fired := d.await("the alert", func(l *logLine) bool { return l.Labels.Port == port && spoken(inode(ns), alert.Fired)(l) })
			worst = max(worst, fired.Read.Sub(at))
			asked := time.Now()
			if code, body := d.get("/healthz"); code != http.StatusOK {
				t.Errorf("/healthz: %d %s", code, body)
			}
			health = max(health, time.Since(asked))
		}
		t.Logf("from the limit to the line: %s at most; to the answer of /healthz: %s", worst, health)
		if worst <= time.Second && health <= time.Second {
			break
		}
		if round == rounds-1 {
			t.Errorf("a line came %s after the limit had passed, and /healthz answered after %s", worst, health)
		}
	}
	t.Logf("%d answers have begun", answered.Load())
	began := time.Now()
	if err := d.end(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 2*time.Second+windUp {
		t.Errorf("it took %s to end", took)
	}
}

// slowClient asks, a byte now and then if slowly, reads the beginning of the
// answer, and unless it leaves then some bytes a second, until the connection or
// all ends.
func slowClient(c *net.TCPConn, ask string, slowly, leaves bool, ended <-chan struct{}, answered *atomic.Int32) {
	defer c.Close()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-ended:
			c.Close()
		case <-done:
		}
	}()
	// A refusal, or the end, shows as an error of the next read or write.
	_ = c.SetReadBuffer(4096)
	step := len(ask)
	if slowly {
		step = 1
	}
	for ; len(ask) > 0; ask = ask[step:] {
		if _, err := io.WriteString(c, ask[:step]); err != nil {
			return
		}
		pause(50 * time.Millisecond)
	}
	buf := make([]byte, 16)
	if _, err := io.ReadFull(c, buf); err != nil {
		return
	}
	answered.Add(1)
	for !leaves {
		if _, err := c.Read(buf); err != nil {
			return
		}
		pause(100 * time.Millisecond)
	}
}
