// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// liveConfig is the incident's, with a name for the frontend, which clients fill
// who never close. Its global maxconn is less than twice the frontend's.
func liveConfig(name string) string {
	return `
global
	maxconn 60
defaults
	mode tcp
	timeout connect 5s
	timeout client 1h
	timeout server 1h
listen ` + name + `
	bind *:443
	maxconn 50
	server web1 ` + labServer + `
`
}

// installed finds a program of a package, or skips the test; with
// FINTRACE_REQUIRE_KERNEL_TESTS set it fails instead.
func installed(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("FINTRACE_REQUIRE_KERNEL_TESTS") != "" {
			t.Fatalf("FINTRACE_REQUIRE_KERNEL_TESTS is set, but there is no %s", program)
		}
		t.Skipf("not run: there is no %s", program)
	}
	return path
}

// serves starts a program that logs as Prometheus does until the end of the
// test, and returns the URL at which it listens.
func serves(t *testing.T, program string, args ...string) string {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	file, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(program, append(args, "--web.listen-address=127.0.0.1:0")...)
	cmd.Dir = filepath.Dir(log)
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := func() string {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // Killed, it has no more to say.
		if t.Failed() {
			t.Logf("%s says:\n%s", program, said())
		}
	})
	listens := regexp.MustCompile(`msg="Listening on" address=(\S+)`)
	var at string
	err = await(program+" to listen", func() bool {
		if m := listens.FindStringSubmatch(said()); m != nil {
			at = "http://" + m[1]
		}
		return at != ""
	})
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// fetch asks a program for JSON.
func fetch(from string, answer any) error {
	client := http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	response, err := client.Get(from)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", from, response.Status)
	}
	return json.NewDecoder(response.Body).Decode(answer)
}

// prometheus is one that runs.
type prometheus struct {
	t  *testing.T
	at string
}

// ready says whether it has read what it keeps, and answers.
func (p prometheus) ready() bool {
	var answer any
	return fetch(p.at+"/api/v1/status/runtimeinfo", &answer) == nil
}

// firing are the alerts that fire.
func (p prometheus) firing() []sent {
	p.t.Helper()
	var answer struct{ Data struct{ Alerts []sent } }
	if err := fetch(p.at+"/api/v1/alerts", &answer); err != nil {
		p.t.Fatal(err)
	}
	return slices.DeleteFunc(answer.Data.Alerts, func(s sent) bool { return s.State != "firing" })
}

// value is that of an expression of a single series, or of a scalar; ok is false
// where it has none.
func (p prometheus) value(expr string) (value float64, ok bool) {
	p.t.Helper()
	var answer struct {
		Data struct{ Result []struct{ Value [2]any } }
	}
	if err := fetch(p.at+"/api/v1/query?query="+url.QueryEscape(expr), &answer); err != nil {
		p.t.Fatal(err)
	}
	result := answer.Data.Result
	if len(result) == 0 {
		return 0, false
	}
	text, _ := result[0].Value[1].(string)
	value, err := strconv.ParseFloat(text, 64)
	if len(result) > 1 || err != nil {
		p.t.Fatalf("%s is %v", expr, result)
	}
	return value, true
}

// awaitValue waits for an expression to have a value.
func (p prometheus) awaitValue(expr string, fits func(float64) bool) float64 {
	p.t.Helper()
	var value float64
	var ok bool
	if err := await(expr, func() bool { value, ok = p.value(expr); return ok && fits(value) }); err != nil {
		p.t.Fatalf("%v: it is %v, %v", err, value, ok)
	}
	return value
}

// checkRules: each of the shipped rules has been evaluated without an error.
func (p prometheus) checkRules(atLeast int) {
	p.t.Helper()
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
	}
	n, wrong := 0, ""
	err := await("all rules to be evaluated", func() bool {
		if err := fetch(p.at+"/api/v1/rules", &answer); err != nil {
			p.t.Fatal(err)
		}
		n, wrong = 0, ""
		for _, g := range answer.Data.Groups {
			for _, r := range g.Rules {
				if n++; r.Health != "ok" {
					wrong += fmt.Sprintf("%s is %s: %s\n", r.Name, r.Health, r.LastError)
				}
			}
		}
		return wrong == ""
	})
	if err != nil || n < atLeast {
		p.t.Errorf("%v; %d rules\n%s", err, n, wrong)
	}
}

// hasten copies the shipped rules and makes a minute of them a second: how long
// something has to last, and what is looked back at. It returns the copies, and
// how many rules they have.
func hasten(t *testing.T) (dir string, rules int) {
	t.Helper()
	files, err := filepath.Glob("../../deploy/prometheus/*.yml")
	if err != nil || len(files) < 4 {
		t.Fatalf("the shipped rules: %q (%v)", files, err)
	}
	var (
		// All that has a duration, and those in minutes and hours.
		lasts     = regexp.MustCompile(`(?m)^ *for: |^ *interval: |\[`)
		durations = regexp.MustCompile(`(?m)(^ *for: |\[)(\d+)([mh])(\]|$)`)
		interval  = regexp.MustCompile(`(?m)^( *interval: )30s$`)
		shorter   = map[string]string{"m": "s", "h": "m"}
	)
	dir = t.TempDir()
	hastened := map[string]int{}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all, done := len(lasts.FindAll(text, -1)), 0
		text = durations.ReplaceAllFunc(text, func(found []byte) []byte {
			m := durations.FindSubmatch(found)
			done++
			return slices.Concat(m[1], m[2], []byte(shorter[string(m[3])]), m[4])
		})
		text = interval.ReplaceAllFunc(text, func(found []byte) []byte {
			done++
			return bytes.Replace(found, []byte("30s"), []byte("1s"), 1)
		})
		if done != all {
			t.Fatalf("%s: %d of %d durations are hastened", path, done, all)
		}
		hastened[filepath.Base(path)] = done
		rules += bytes.Count(text, []byte("- alert: ")) + bytes.Count(text, []byte("- record: "))
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"stuck.yml", "rules.yml", "recording.yml", "fleet.yml"} {
		if hastened[name] == 0 {
			t.Errorf("nothing of %s is hastened", name)
		}
	}
	return dir, rules
}

// sent is an alert as Prometheus and Alertmanager tell of it.
type sent struct {
	Labels, Annotations map[string]string
	State               string    // of Prometheus
	StartsAt, EndsAt    time.Time // of Alertmanager
	Status              any       // a string in what Alertmanager sends, and an object in its API
}

func (s sent) named(name string) bool { return s.Labels["alertname"] == name }

// pager is whom an Alertmanager notifies.
type pager struct {
	mu    sync.Mutex
	heard []sent
}

func (p *pager) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var n struct{ Alerts []sent }
	if err := json.NewDecoder(r.Body).Decode(&n); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = append(p.heard, n.Alerts...)
}

// await waits to hear of an alert.
func (p *pager) await(t *testing.T, what string, fits func(sent) bool) (s sent) {
	t.Helper()
	err := await("the pager to hear of "+what, func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		i := slices.IndexFunc(p.heard, fits)
		if i >= 0 {
			s = p.heard[i]
		}
		return i >= 0
	})
	if err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		t.Fatalf("%v; it has heard of %+v", err, p.heard)
	}
	return s
}

// TestDaemonLive is the incident with all that is around it in production: a
// pile-up at a real HAProxy, a Prometheus that scrapes the daemon and has the
// shipped rules, and an Alertmanager that both tell.
func TestDaemonLive(t *testing.T) {
	kerneltest.Require(t)
	alertmanager, server := installed(t, "prometheus-alertmanager"), installed(t, "prometheus")
	promtool := installed(t, "promtool")

	w := newWorld(t)
	w.finTimeout(2)
	w.listen(w.internet, labServer, w.answers)
	netns := inode(w.host)
	// No other on this host has that name.
	proxy := "live-" + netns
	w.runs(liveConfig(proxy))

	// Alertmanager, and who is notified.
	var heard pager
	hook := httptest.NewServer(&heard)
	defer hook.Close()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	manager := serves(t, alertmanager, "--cluster.listen-address=", "--storage.path="+dir+"/alertmanager", "--config.file="+write("alertmanager.yml", `
route: {receiver: hook, group_by: ['...'], group_wait: 10ms, group_interval: 100ms, repeat_interval: 1h}
receivers: [{name: hook, webhook_configs: [{url: "`+hook.URL+`", send_resolved: true}]}]
`))
	d := startDaemon(t, `
alerts: {update_every: 1s, resolve_after: 1s}
sinks:
  alertmanagers: [{name: live, urls: ["`+manager+`"], labels: {cluster: live}}]
`)
	rules, number := hasten(t)
	p := prometheus{t, serves(t, server, "--storage.tsdb.path="+dir+"/prometheus", "--enable-feature=native-histograms",
		"--config.file="+write("prometheus.yml", `
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: ["`+rules+`/*.yml"]
scrape_configs:
  - job_name: fintrace
    static_configs: [{targets: ["`+d.at+`"], labels: {cluster: live}}]
alerting:
  alertmanagers: [{static_configs: [{targets: ["`+strings.TrimPrefix(manager, "http://")+`"]}]}]
`))}
	if err := await("Prometheus to be ready", p.ready); err != nil {
		t.Fatal(err)
	}
	p.awaitValue(`up{job="fintrace"}`, func(up float64) bool { return up == 1 })
	p.checkRules(number)

	before := time.Now()
	var clients []net.Conn
	for range pile {
		clients = append(clients, w.hears(labWorker2, labHost+":443"))
	}

	// The daemon says so, and what to do.
	fired := d.await("the alert", spoken(netns, alert.Fired))
	config := w.haproxy.ConfigPath()
	clientAt, globalAt, listenAt := lineOf(t, config, "timeout client"), lineOf(t, config, "maxconn 60"), lineOf(t, config, "listen ")
	var now alertRecord
	err := await("all of it in one alert", func() bool {
		alerts := d.alerts(netns)
		if len(alerts) != 1 {
			t.Fatalf("there are %d alerts: %+v", len(alerts), alerts)
		}
		now = alerts[0]
		return now.Count == pile
	})
	if err != nil {
		t.Fatalf("%v: %+v", err, now)
	}
	want := alert.Labels{Limit: "tcp_fin_timeout", Stage: "held", Side: "inbound", Proxy: proxy, Peer: labWorker2, Process: "haproxy", Netns: netns}
	if now.ID != fired.Alert || now.Labels != want || now.Maxconn != 50 || now.StartsAt.Before(before) {
		t.Errorf("the alert is %+v, want it to be of %+v", now, want)
	}
	source := fmt.Sprintf("haproxy.cfg:%d defaults timeout client 1h (client-fin unset); net.ipv4.tcp_fin_timeout 2s", clientAt)
	if now.LimitSource != source {
		t.Errorf("the limit is %q, want %q", now.LimitSource, source)
	}
	said := fmt.Sprintf("%d connections from %s held in FIN_WAIT2 at listen %s (port 443) by haproxy", pile, labWorker2, proxy)
	if !strings.HasPrefix(now.Summary, said) || !strings.Contains(now.Summary, source) {
		t.Errorf("it says %q, want %q and %q", now.Summary, said, source)
	}
	for _, r := range now.Examples {
		peer, port, _ := net.SplitHostPort(r.Remote)
		if high, _ := strconv.Atoi(port); peer != labWorker2 || high < 1024 || r.Local != labHost+":443" || int(r.PID) != w.haproxy.Worker() {
			t.Errorf("an example is %+v", r)
		}
	}
	if len(now.Examples) != examples {
		t.Errorf("it has %d examples", len(now.Examples))
	}

	// So it does by Alertmanager. What was the alert's severity when it fired
	// depends on how many connections were in time for that.
	var pushed sent
	active := func(fits func(sent) bool) (found []sent) {
		var all []sent
		if err := fetch(manager+"/api/v2/alerts", &all); err != nil {
			t.Fatal(err)
		}
		return slices.DeleteFunc(all, func(s sent) bool { return !fits(s) })
	}
	mine := func(s sent) bool { return s.named("FinWait2Stuck") && s.Labels["netns"] == netns }
	err = await("Alertmanager to have it, critical", func() bool {
		found := active(mine)
		if len(found) == 1 {
			pushed = found[0]
		}
		return len(found) == 1 && pushed.Labels["severity"] == "critical"
	})
	if err != nil {
		t.Fatalf("%v; it has %+v", err, active(mine))
	}
	host := hostname()
	for name, want := range map[string]string{"alertname": "FinWait2Stuck", "severity": "critical", "instance": host, "host": host, "cluster": "live",
		"limit": want.Limit, "stage": want.Stage, "side": want.Side, "proxy": want.Proxy, "peer": want.Peer, "process": want.Process, "netns": netns} {
		if got := pushed.Labels[name]; got != want {
			t.Errorf("the pushed alert has %s=%q, want %q", name, got, want)
		}
		delete(pushed.Labels, name)
	}
	if len(pushed.Labels) != 0 {
		t.Errorf("the pushed alert also has %v", pushed.Labels)
	}
	if off := pushed.StartsAt.Sub(now.StartsAt).Abs(); off > time.Millisecond || !pushed.EndsAt.After(time.Now()) {
		t.Errorf("it is from %s to %s, and the daemon says since %s", pushed.StartsAt, pushed.EndsAt, now.StartsAt)
	}
	if a := pushed.Annotations; !strings.Contains(a["summary"], said[strings.Index(said, "connections"):]) || a["limit_source"] != source ||
		a["peak"] == "" || a["count"] == "" || a["oldest"] == "" {
		t.Errorf("its annotations are %q", a)
	}
	advice := pushed.Annotations["description"]
	for _, line := range []string{
		fmt.Sprintf("after %s:%d: timeout client-fin 60s", config, clientAt),
		fmt.Sprintf("instead of %s:%d: maxconn 110", config, globalAt),
	} {
		if !strings.Contains(advice, "\n"+line) {
			t.Errorf("its advice is %q, which lacks %q", advice, line)
		}
	}
	if _, page := d.get("/"); !bytes.Contains(page, fmt.Appendf(nil, "%s:%d: listen %s: ", config, listenAt, proxy)) {
		t.Errorf("the page does not say where the frontend is:\n%s", page)
	}

	// Prometheus' rules say it too, and Alertmanager hears it. These may say
	// something as well: the frontend does fill up, and 2 s is not the default.
	piled := []string{"FintraceFrontendSlotsHeld", "FintracePileUp", "FintracePileUpTakesSlots"}
	also := []string{"FintraceFrontendWillBeFull", "FintraceFinTimeoutNotDefault"}
	ofRules := func(s sent) bool {
		return slices.Contains(piled, s.Labels["alertname"]) && s.Labels["proxy"] == proxy
	}
	var alerts []sent
	names := func() (all []string) {
		alerts = p.firing()
		for _, a := range alerts {
			if ofRules(a) {
				all = append(all, a.Labels["alertname"])
			}
		}
		slices.Sort(all)
		return all
	}
	if err := await("the shipped rules to fire", func() bool { return slices.Equal(names(), piled) }); err != nil {
		t.Fatalf("%v; there are %+v", err, alerts)
	}
	for _, a := range alerts {
		switch name, of := a.Labels["alertname"], a.Labels["proxy"]; {
		case ofRules(a):
			if a.Labels["instance"] != d.at || a.Annotations["runbook_url"] == "" {
				t.Errorf("%s is of %v", name, a.Labels)
			}
		case !slices.Contains(also, name) && (of == proxy || of == "" && a.Labels["side"] == ""):
			// Not of another program that has its own troubles on this host.
			t.Errorf("Prometheus says %v: %s", a.Labels, a.Annotations["summary"])
		}
	}
	for _, name := range piled {
		s := heard.await(t, name, func(s sent) bool { return ofRules(s) && s.named(name) && s.Status == "firing" })
		if s.Labels["cluster"] != "live" || s.Labels["severity"] == "" || !strings.Contains(s.Annotations["summary"], d.at) {
			t.Errorf("the pager hears %+v", s)
		}
	}
	for expr, want := range map[string]float64{
		`fintrace_haproxy_held_connections{worker="current",proxy="` + proxy + `"}`: pile,
		`fintrace_haproxy_frontend_maxconn{proxy="` + proxy + `"}`:                  50,
		`cluster:fintrace_piled_up_hosts:count{cluster="live"}`:                     1,
		`cluster:fintrace_targets_up:ratio{cluster="live"}`:                         1,
	} {
		p.awaitValue(expr, func(v float64) bool { return v == want })
	}
	checkExposition(t, promtool, d, p, config, proxy, netns)

	// The clients go.
	gone := time.Now()
	for _, c := range clients {
		w.end(c)
	}
	resolved := d.await("the resolution", spoken(netns, alert.Resolved))
	if resolved.Alert != fired.Alert || len(d.alerts(netns)) != 0 {
		t.Errorf("%s has resolved, and %+v fires", resolved.Alert, d.alerts(netns))
	}
	end := heard.await(t, "the end of the pushed alert", func(s sent) bool {
		return mine(s) && s.Labels["severity"] == "critical" && s.Status == "resolved"
	})
	// When it fell below the threshold is known from an evaluation each 100 ms.
	if end.EndsAt.Before(gone) || end.EndsAt.After(resolved.Read) || end.StartsAt.Sub(now.StartsAt).Abs() > time.Millisecond {
		t.Errorf("it was from %s to %s; the clients went at %s, and it resolved by %s", end.StartsAt, end.EndsAt, gone, resolved.Read)
	}
	for _, name := range piled {
		heard.await(t, "the end of "+name, func(s sent) bool { return ofRules(s) && s.named(name) && s.Status == "resolved" })
	}
	err = await("nothing to be left", func() bool {
		return len(names()) == 0 && len(active(func(s sent) bool { return mine(s) || ofRules(s) })) == 0
	})
	if err != nil {
		t.Errorf("%v; Prometheus has %+v, Alertmanager %+v", err, alerts, active(func(sent) bool { return true }))
	}
	// They are counted, in native histograms; but for those whose entry the kernel has
	// skipped, as while others attach: a look has found them, and cannot tell since when.
	p.awaitValue(`histogram_count(fintrace_fin_wait2_duration_seconds{side="inbound",end="peer_fin"}) + on() fintrace_snapshot_corrections_total`,
		func(n float64) bool { return n >= pile })
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// lineOf is the number of the line of a file that has a text.
func lineOf(t *testing.T, path, text string) int {
	t.Helper()
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(all)) {
		if n++; strings.Contains(line, text) {
			return n
		}
	}
	t.Fatalf("%s has no %q", path, text)
	return 0
}
