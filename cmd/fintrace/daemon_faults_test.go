// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
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
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
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
	if err := await(fmt.Sprintf("the webhook to be told %v %d times", events, n), func() bool { return len(r.about(ns, events...)) >= n }); err != nil {
		t.Fatalf("%v: %+v", err, r.about(ns))
	}
	return r.about(ns, events...)[n-1]
}

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
			if took := time.Since(began); took > time.Second+2*lastWord+late {
				t.Errorf("it took %s to end", took)
			}
			exit := (*exec.ExitError)(nil)
			if undelivered := test.fails && !test.mend; !undelivered && err != nil || undelivered && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
				t.Errorf("it ends with %v", err)
			}
			if test.mend {
				<-read
				for _, want := range []string{`"msg":"watching"`, `"msg":"alerts cannot be delivered"`, `"event":"resolved"`} {
					if n := strings.Count(string(written), want); n != 1 {
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
	err := d.end()
	if took := time.Since(began); took > time.Second+late {
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
	closing := moment{before: probe.Now()}
	minisock := holdOn(t, ns, 7004, 1)[0]
	minisock.subject.Close()
	closing.after = probe.Now()
	fired := map[uint16]logLine{}
	for _, p := range []uint16{ends, stays} {
		fired[p] = d.await("the alert", port(p, alert.Fired))
	}
	d.awaitSaved(func(s alert.Saved) bool { return len(s.Alerts) == 2 })

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
	if came := d.await("the alert that is new", after(port(comes))); came.Event != alert.Fired || came.Read.Sub(again) > 2*time.Second+late {
		t.Errorf("what is new is said %s after the start as %s", came.Read.Sub(again), came.Text)
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

// awaitSaved waits until the state file is so.
func (d *daemonProcess) awaitSaved(fits func(alert.Saved) bool) (text []byte) {
	d.t.Helper()
	err := await("the state to be kept", func() bool {
		var s alert.Saved
		text, _ = os.ReadFile(filepath.Join(d.dir, "alerts.json"))
		return json.Unmarshal(text, &s) == nil && fits(s)
	})
	if err != nil {
		d.t.Fatalf("%v: it is %s", err, text)
	}
	return text
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
			warnings := d.logged(func(l *logLine) bool { return l.Level != "INFO" && l.Alert == "" })
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
	before := d.awaitSaved(func(s alert.Saved) bool { return len(s.Alerts) == 1 })
	path := filepath.Join(d.dir, "alerts.json")
	stamp := func() (st unix.Stat_t) {
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		st.Atim = unix.Timespec{}
		return st
	}
	then := stamp()
	out, err := exec.Command("fintrace", "daemon", "--config", d.config).CombinedOutput()
	exit := (*exec.ExitError)(nil)
	want := "fintrace: web listener " + at + ": another process listens there (ss -ltnp shows which)\n"
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != want {
		t.Errorf("the second ends with %v and %q, want %q", err, out, want)
	}
	if after, err := os.ReadFile(path); err != nil || stamp() != then || string(after) != string(before) {
		t.Errorf("the state of the first is now %q, %v", after, err)
	}
	if alerts := d.alerts(inode(ns)); len(alerts) != 1 {
		t.Errorf("the first has %+v", alerts)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}
