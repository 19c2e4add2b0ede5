// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

// daemonProcess is a daemon that runs while the test looks on.
type daemonProcess struct {
	*exec.Cmd
	t      *testing.T
	dir    string
	under  []string        // the command that starts it, if there is one
	config string          // the path of its configuration
	at     string          // the address it listens on
	log    func(*exec.Cmd) // sends its log elsewhere; at has to be known then
	exited chan error

	mu    sync.Mutex
	lines []logLine
}

// logLine is a line of its log, as JSON.
type logLine struct {
	Read    time.Time       `json:"-"`
	Time    time.Time       `json:"time"`
	Level   string          `json:"level"`
	Message string          `json:"msg"`
	Alert   string          `json:"alert"` // the id
	Event   alert.Event     `json:"event"`
	Labels  alert.Labels    `json:"labels"`
	Count   int             `json:"count"`
	Error   string          `json:"error"`
	Address string          `json:"address"`
	What    string          `json:"what"`
	Text    string          `json:"-"`
	Raw     json.RawMessage `json:"-"`
}

// startDaemon starts a daemon with a configuration, in which DIR is a directory of
// its own. It listens on loopback, logs as JSON, and keeps its state in DIR.
func startDaemon(t *testing.T, config string) *daemonProcess {
	t.Helper()
	d := newDaemon(t, config)
	d.start()
	return d
}

// newDaemon is startDaemon without the start.
func newDaemon(t *testing.T, config string) *daemonProcess {
	t.Helper()
	dir := t.TempDir()
	d := &daemonProcess{t: t, dir: dir, config: filepath.Join(dir, "fintrace.yaml")}
	d.write(config)
	return d
}

// write replaces the configuration.
func (d *daemonProcess) write(config string) {
	d.t.Helper()
	text := strings.ReplaceAll(config, "DIR", d.dir)
	if !strings.Contains(text, "state_file:") {
		if !strings.Contains(text, "alerts: {") {
			text += "\nalerts: {}\n"
		}
		text = strings.Replace(text, "alerts: {", "alerts: {state_file: "+d.dir+"/alerts.json, ", 1)
		text = strings.Replace(text, ", }", "}", 1)
	}
	for _, part := range []string{"log: {format: json}", `web: {listen: "127.0.0.1:0"}`} {
		if key, _, _ := strings.Cut(part, " "); !strings.Contains(text, "\n"+key) {
			text += "\n" + part + "\n"
		}
	}
	if err := os.WriteFile(d.config, []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// start starts it, for the first time or again, and waits until it is ready.
func (d *daemonProcess) start() {
	d.t.Helper()
	command := slices.Concat(d.under, []string{"fintrace", "daemon", "--config", d.config})
	d.Cmd = exec.Command(command[0], command[1:]...)
	var stderr io.ReadCloser
	var err error
	if d.log != nil {
		stderr = io.NopCloser(strings.NewReader(""))
		d.log(d.Cmd)
	} else if stderr, err = d.StderrPipe(); err != nil {
		d.t.Fatal(err)
	}
	// It ends with the test's process, however that ends.
	d.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := d.Start(); err != nil {
		d.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		d.read(stderr)
	}()
	exited := make(chan error, 1)
	d.exited = exited
	cmd := d.Cmd
	go func() { <-read; exited <- cmd.Wait() }()
	d.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
		}
		<-read
		if d.t.Failed() {
			lines := strings.SplitAfter(d.text(), "\n")
			d.t.Logf("the daemon's log ends:\n%s", strings.Join(lines[max(0, len(lines)-50):], ""))
		}
	})
	began := time.Now()
	if d.log == nil {
		d.at = d.await("it to listen", func(l *logLine) bool { return l.Message == "Listening on" && l.Read.After(began) }).Address
		d.await("it to watch", func(l *logLine) bool { return l.Message == "watching" && l.Read.After(began) })
	}
	if err := await("it to be ready", func() bool { code, _ := d.get("/readyz"); return code == http.StatusOK }); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemonProcess) read(from io.Reader) {
	lines := bufio.NewReader(from)
	for {
		text, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		l := logLine{Read: time.Now(), Text: text}
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			l.Message = "not JSON"
		}
		d.mu.Lock()
		d.lines = append(d.lines, l)
		d.mu.Unlock()
	}
}

// text is its log so far.
func (d *daemonProcess) text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var b strings.Builder
	for _, l := range d.lines {
		b.WriteString(l.Text)
	}
	return b.String()
}

// logged are the lines so far that fit.
func (d *daemonProcess) logged(fits func(*logLine) bool) (lines []logLine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.lines {
		if fits(&d.lines[i]) {
			lines = append(lines, d.lines[i])
		}
	}
	return lines
}

// await waits for a line that fits, and returns the first.
func (d *daemonProcess) await(what string, fits func(*logLine) bool) (line logLine) {
	d.t.Helper()
	// What the kernel skips while another test's program is attached is found by
	// the next look at all sockets.
	err := awaitFor(soon, what, func() bool {
		lines := d.logged(fits)
		if len(lines) > 0 {
			line = lines[0]
		}
		return len(lines) > 0
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return line
}

// spoken fits what is said of alerts of a network namespace.
func spoken(netns string, events ...alert.Event) func(*logLine) bool {
	return func(l *logLine) bool {
		return l.Alert != "" && l.Labels.Netns == netns && (len(events) == 0 || slices.Contains(events, l.Event))
	}
}

// get asks it for a page.
func (d *daemonProcess) get(path string) (code int, body []byte) {
	client := http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	response, err := client.Get("http://" + d.at + path)
	if err != nil {
		return 0, []byte(err.Error())
	}
	defer response.Body.Close()
	body, err = io.ReadAll(response.Body)
	if err != nil {
		return 0, []byte(err.Error())
	}
	return response.StatusCode, body
}

// alerts are those that fire in a network namespace, as its API says.
func (d *daemonProcess) alerts(netns string) (alerts []alertRecord) {
	d.t.Helper()
	var answer struct{ Alerts []alertRecord }
	d.ask("/api/v1/alerts", &answer)
	for _, a := range answer.Alerts {
		if a.Labels.Netns == netns {
			alerts = append(alerts, a)
		}
	}
	return alerts
}

// alertRecord is what a script reads of an alert.
type alertRecord struct {
	ID          string
	Event       alert.Event
	Labels      alert.Labels
	StartsAt    time.Time  `json:"starts_at"`
	EndsAt      *time.Time `json:"ends_at"`
	Count, Peak int
	Oldest      float64 `json:"oldest_seconds"`
	OldestExact bool    `json:"oldest_exact"`
	LimitSource string  `json:"limit_source"`
	Maxconn     int
	Summary     string
	Examples    []report.Record
	Advice      []struct {
		ID  string
		Fix []struct{ Lines []string }
	}
}

// connections are those that its API lists for a query.
func (d *daemonProcess) connections(query string) (records []report.Record) {
	d.t.Helper()
	var answer struct{ Connections []report.Record }
	d.ask("/api/v1/connections?"+query, &answer)
	return answer.Connections
}

func (d *daemonProcess) ask(path string, answer any) {
	d.t.Helper()
	code, body := d.get(path)
	if code != http.StatusOK {
		d.t.Fatalf("%s: %d %s", path, code, body)
	}
	if err := json.Unmarshal(body, answer); err != nil {
		d.t.Fatalf("%s: %v: %s", path, err, body)
	}
}

// metric is the sum of the series of a name that have these labels, each as
// name=value; ok is false where there is none.
func (d *daemonProcess) metric(name string, labels ...string) (value float64, ok bool) {
	d.t.Helper()
	code, body := d.get("/metrics")
	if code != http.StatusOK {
		d.t.Fatalf("/metrics: %d %s", code, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, m := range families[name].GetMetric() {
		if hasLabels(m, labels) {
			ok = true
			value += m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return value, ok
}

func hasLabels(m *dto.Metric, labels []string) bool {
	return !slices.ContainsFunc(labels, func(want string) bool {
		return !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool {
			return l.GetName()+"="+l.GetValue() == want
		})
	})
}

// awaitMetric waits until the sum of series is a value.
func (d *daemonProcess) awaitMetric(want float64, name string, labels ...string) {
	d.t.Helper()
	var got float64
	err := await(fmt.Sprintf("%s%v to be %v", name, labels, want), func() bool {
		got, _ = d.metric(name, labels...)
		return got == want
	})
	if err != nil {
		d.t.Fatalf("%v: it is %v", err, got)
	}
}

// end ends it as systemd does, and returns how it exits.
func (d *daemonProcess) end() error {
	d.t.Helper()
	d.signal(unix.SIGTERM)
	return d.gone()
}

// gone waits for its exit.
func (d *daemonProcess) gone() error {
	d.t.Helper()
	select {
	case err := <-d.exited:
		return err
	case <-time.After(30 * time.Second):
		d.t.Fatal("the daemon does not end")
		return nil
	}
}

func (d *daemonProcess) signal(s os.Signal) {
	d.t.Helper()
	if err := d.Process.Signal(s); err != nil {
		d.t.Fatal(err)
	}
}

// holdSome makes connections of one peer at one listener of a namespace, which the
// test's process holds in FIN_WAIT2.
func holdSome(t *testing.T, ns *kerneltest.Namespace, n int) []held {
	t.Helper()
	return holdAt(t, ns, anyPort, n)
}

// anyPort is where connections are held that may be anywhere.
var anyPort = &net.TCPAddr{IP: net.IPv4(127, 200, 200, 200)}

// holdAt is holdSome at an address.
func holdAt(t *testing.T, ns *kerneltest.Namespace, at *net.TCPAddr, n int) []held {
	t.Helper()
	all, err := holdAll(ns, at, n)
	for _, h := range all {
		t.Cleanup(h.close)
	}
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// holdAll is holdAt for any goroutine. What it returns is to be closed, where
// it fails too.
func holdAll(ns *kerneltest.Namespace, at *net.TCPAddr, n int) (all []held, err error) {
	var l *net.TCPListener
	ns.Do(func() { l, err = net.ListenTCP("tcp4", at) })
	if err != nil {
		return nil, err
	}
	defer l.Close()
	for range n {
		var h held
		ns.Do(func() {
			h.peer, err = net.DialTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 200, 200, 201)}, l.Addr().(*net.TCPAddr))
		})
		if err != nil {
			return all, err
		}
		h.subject, err = l.AcceptTCP()
		if err != nil {
			return all, errors.Join(err, h.peer.Close())
		}
		all = append(all, h)
		if err := h.shutdown(); err != nil {
			return all, err
		}
	}
	return all, nil
}
