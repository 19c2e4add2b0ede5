// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/golden"
)

// told are the alerts of a request to an Alertmanager.
func told(t *testing.T, body io.Reader) []posted {
	var all []posted
	decoder := json.NewDecoder(body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&all); err != nil {
		t.Error(err)
	}
	return all
}

// line is an alert as Alertmanager tells it from others, and until when it fires.
func (p *posted) line(now time.Time) string {
	return fmt.Sprintf("%s %s %s", p.Labels["severity"], p.Labels["peer"], p.EndsAt.Sub(now))
}

func TestAlertmanager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noProxy(t)
		// Synctest's time begins in 2000, and so does the alert of this test.
		at := func(e Event) Alert {
			a := stuck(e)
			a.StartsAt = time.Now().Add(-time.Minute)
			if e == Resolved {
				ends := time.Now()
				a.EndsAt = &ends
			}
			return a
		}
		var body []byte
		var path string
		option := serve(t, func(_ http.ResponseWriter, r *http.Request) {
			body, _ = io.ReadAll(r.Body)
			path = r.URL.Path
		})
		sinks, err := newAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{"http://am.example/prefix/"},
			Labels: map[string]string{"dc": "fra1", "host": "other"}}, thisHost, option)
		if err != nil {
			t.Fatal(err)
		}
		deliver := sinks[0].Deliver
		if err := deliver(t.Context(), []Alert{at(Fired), at(Resolved)}); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, "testdata/alertmanager.json", indented(t, body))
		if path != "/prefix/api/v2/alerts" {
			t.Errorf("posted to %s", path)
		}
		all := told(t, strings.NewReader(string(body)))
		if diff := cmp.Diff(all[0].Labels, all[1].Labels); diff != "" {
			t.Errorf("the labels of an alert that fires and of one that has resolved (-, +):\n%s", diff)
		}

		a := at(Fired)
		a.Labels = Labels{Process: hostile, Stage: "held\x00"}
		a.Summary = hostile
		if err := deliver(t.Context(), []Alert{a}); err != nil {
			t.Fatal(err)
		}
		for _, p := range told(t, strings.NewReader(string(body))) {
			for name, value := range p.Labels {
				if value == "" || !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("label %s=%q", name, value)
				}
			}
			for name, value := range p.Annotations {
				if value == "" || strings.Contains(value, "\x1b") {
					t.Errorf("annotation %s=%q", name, value)
				}
			}
		}
	})
}

// An Alertmanager hears of what fires each minute, with an end that it would
// reach by itself, and of what has resolved for a quarter of an hour.
func TestAlertmanagerResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noProxy(t)
		began := time.Now()
		var got []string
		option := serve(t, func(_ http.ResponseWriter, r *http.Request) {
			for _, p := range told(t, r.Body) {
				got = append(got, fmt.Sprint(time.Since(began).Round(time.Second), " ", p.line(time.Now())))
			}
		})
		sinks, err := newAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{"http://am.example"}}, thisHost, option)
		if err != nil {
			t.Fatal(err)
		}
		o := runOutbox(t, sinks...)
		a := event("a", Fired, 10)
		a.Labels.Peer, a.Maxconn, a.Peak = "192.0.2.7", 100, 10
		o.Send(a)
		time.Sleep(90 * time.Second)
		// It becomes worse: that is another alert to Alertmanager, and the end of
		// the one before.
		a.Event, a.Count, a.Peak = Updated, 60, 60
		o.Send(a)
		time.Sleep(50 * time.Second)
		a.Count = 10 // less than at its worst
		o.Send(a)
		time.Sleep(40 * time.Second)
		ends := time.Now()
		a.Event, a.Count, a.EndsAt = Resolved, 0, &ends
		o.Send(a)
		time.Sleep(time.Hour)
		synctest.Wait()
		want := []string{
			"0s warning 192.0.2.7 4m0s",
			"1m0s warning 192.0.2.7 4m0s",
			"1m30s warning 192.0.2.7 0s",
			"1m30s critical 192.0.2.7 4m0s",
			"2m20s critical 192.0.2.7 4m0s",
		}
		for i := range 15 {
			now := 3*time.Minute + time.Duration(i)*time.Minute
			want = append(want, fmt.Sprintf("%s critical 192.0.2.7 %s", now, -time.Duration(i)*time.Minute))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	})
}

// Where an Alertmanager was away when an alert became critical, it hears of the
// end of the warning when it is back.
func TestAlertmanagerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noProxy(t)
		var got []string
		var away atomic.Bool
		option := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if away.Load() {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			for _, p := range told(t, r.Body) {
				got = append(got, p.line(time.Now()))
			}
		})
		sinks, err := newAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{"http://am.example"},
			ResendEvery: time.Hour}, thisHost, option)
		if err != nil {
			t.Fatal(err)
		}
		o := runOutbox(t, sinks...)
		a := event("a", Fired, 10)
		a.Maxconn, a.Peak = 100, 10
		o.Send(a)
		synctest.Wait()
		away.Store(true)
		a.Event, a.Peak = Updated, 50
		o.Send(a)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		away.Store(false)
		time.Sleep(time.Minute)
		synctest.Wait()
		if diff := cmp.Diff([]string{"warning  4h0m0s", "warning  0s", "critical  4h0m0s"}, got); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	})
}

// What is critical and ends, and is only a warning when it fires anew, is one
// alert each time; and an operator's own severity is that of all.
func TestAlertmanagerSeverity(t *testing.T) {
	for _, test := range []struct {
		labels map[string]string
		want   []string
	}{
		{nil, []string{"critical  4m0s", "critical  0s", "warning  4m0s", "warning  0s", "critical  4m0s"}},
		{map[string]string{"severity": "page"}, []string{"page  4m0s", "page  0s", "page  4m0s", "page  4m0s"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			noProxy(t)
			var got []string
			option := serve(t, func(_ http.ResponseWriter, r *http.Request) {
				for _, p := range told(t, r.Body) {
					got = append(got, p.line(time.Now()))
				}
			})
			sinks, err := newAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{"http://am.example"}, Labels: test.labels}, thisHost, option)
			if err != nil {
				t.Fatal(err)
			}
			for _, step := range []struct {
				e    Event
				peak int
			}{{Fired, 60}, {Resolved, 60}, {Fired, 10}, {Updated, 60}} {
				a := event("a", step.e, 1)
				a.Maxconn, a.Peak = 100, step.peak
				if err := sinks[0].Deliver(t.Context(), []Alert{a}); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("told (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAlertmanagerSinks(t *testing.T) {
	sinks, err := NewAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{
		"http://u:s3cr3t@one.example:9093", "https://two.example/a", "https://two.example/s3cr3t"}}, thisHost)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range sinks {
		names = append(names, s.Name)
	}
	if diff := cmp.Diff([]string{"am/one.example:9093", "am/two.example", "am/two.example#3"}, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	// One that is added leaves the others as they are.
	more, err := NewAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{
		"http://u:s3cr3t@one.example:9093", "https://two.example/a", "https://three.example"}}, thisHost)
	if err != nil {
		t.Fatal(err)
	}
	if !sameSettings(sinks[0].Settings, more[0].Settings) || !sameSettings(sinks[1].Settings, more[1].Settings) {
		t.Error("an Alertmanager that is the same has other settings")
	}

	for _, test := range []struct {
		c    AlertmanagerConfig
		want string
	}{
		{AlertmanagerConfig{}, "am: it has no URL"},
		{AlertmanagerConfig{URLs: []string{"am.example/s3cr3t"}}, "am: the URL does not begin with https:// or http://"},
		{AlertmanagerConfig{URLs: []string{"http://a"}, Labels: map[string]string{"a-b": "c"}}, `am: "a-b" is no name for a label`},
		{AlertmanagerConfig{URLs: []string{"http://a"}, Labels: map[string]string{"peer": "c"}},
			`am: the label "peer" is one of those that tell alerts apart`},
	} {
		test.c.Name = "am"
		if _, err := NewAlertmanager(test.c, thisHost); fmt.Sprint(err) != test.want {
			t.Errorf("%v\n not %s", err, test.want)
		}
	}
}

// required names the variable that makes an Alertmanager that is not there a failure.
const required = "FINTRACE_REQUIRE_KERNEL_TESTS"

// startAlertmanager runs Debian's Alertmanager until the end of the test, and
// returns its URL. What it notifies of goes to a webhook.
func startAlertmanager(t *testing.T, webhook string) string {
	t.Helper()
	const program = "/usr/bin/prometheus-alertmanager"
	if _, err := os.Stat(program); err != nil {
		if os.Getenv(required) != "" {
			t.Fatalf("%s is set, but there is no Alertmanager: %s", required, err)
		}
		t.Skip("not run: there is no Alertmanager:", err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "alertmanager.yml")
	write(t, config, fmt.Sprintf(`
route: {receiver: hook, group_by: ['...'], group_wait: 10ms, group_interval: 100ms, repeat_interval: 1h}
receivers: [{name: hook, webhook_configs: [{url: %q, send_resolved: true}]}]
`, webhook))
	cmd := exec.Command(program, "--config.file="+config, "--storage.path="+dir,
		"--web.listen-address=127.0.0.1:0", "--cluster.listen-address=")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	read := make(chan struct{})
	var said strings.Builder
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			said.WriteString(lines.Text() + "\n")
			if _, after, ok := strings.Cut(lines.Text(), `msg="Listening on" address=`); ok {
				address <- after
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-read
		cmd.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	select {
	case a := <-address:
		return "http://" + a
	case <-read:
		t.Fatal("Alertmanager has ended")
	case <-time.After(20 * time.Second):
		t.Fatal("Alertmanager does not listen")
	}
	return ""
}

// A real Alertmanager has an alert while it fires, and not once it has
// resolved, and notifies of both; of one that has become critical it has that only.
func TestRealAlertmanager(t *testing.T) {
	noProxy(t)
	type notification struct {
		Status string
		Labels map[string]string `json:"-"`
		Alerts []struct {
			Status       string
			Labels       map[string]string
			Annotations  map[string]string
			GeneratorURL string
		}
	}
	notified := make(chan notification, 100)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var n notification
		if err := json.NewDecoder(r.Body).Decode(&n); err != nil {
			t.Error(err)
		}
		notified <- n
	}))
	defer hook.Close()
	base := startAlertmanager(t, hook.URL)
	sinks, err := NewAlertmanager(AlertmanagerConfig{Name: "am", URLs: []string{base}, Labels: map[string]string{"dc": "fra1"}}, thisHost)
	if err != nil {
		t.Fatal(err)
	}
	o := runOutbox(t, sinks...)

	// has waits for its alerts to be those.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	has := func(want ...map[string]string) {
		t.Helper()
		var got []map[string]string
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			response, err := client.Get(base + "/api/v2/alerts")
			if err != nil {
				t.Fatal(err)
			}
			var all []posted
			err = json.NewDecoder(response.Body).Decode(&all)
			response.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			got = nil
			for _, p := range all {
				got = append(got, p.Labels)
			}
			if cmp.Equal(want, got) {
				return
			}
		}
		t.Fatalf("its alerts (-want +got):\n%s", cmp.Diff(want, got))
	}
	hears := func(status, severity string) {
		t.Helper()
		select {
		case n := <-notified:
			if n.Status != status || len(n.Alerts) != 1 || n.Alerts[0].Labels["severity"] != severity ||
				n.Alerts[0].Annotations["summary"] == "" || n.Alerts[0].GeneratorURL != thisHost.URL {
				t.Errorf("notified of %+v, not that %s is %s", n, severity, status)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("nobody was notified that %s is %s", severity, status)
		}
	}

	a := stuck(Fired)
	a.StartsAt = time.Now().Add(-time.Minute)
	o.Send(a)
	warning := map[string]string{"alertname": "FinWait2Stuck", "severity": "warning", "instance": "lb1", "host": "lb1", "dc": "fra1",
		"limit": "tcp_fin_timeout", "stage": "held", "side": "inbound", "proxy": "web", "port": "443",
		"peer": "192.0.2.7", "process": "haproxy"}
	has(warning)
	hears("firing", "warning")

	a.Event, a.Count, a.Peak = Updated, 1500, 1500
	o.Send(a)
	critical := maps.Clone(warning)
	critical["severity"] = "critical"
	has(critical)
	heard := map[string]bool{}
	for range 2 { // in any order
		select {
		case n := <-notified:
			heard[n.Status+" "+n.Alerts[0].Labels["severity"]] = true
		case <-time.After(20 * time.Second):
			t.Fatalf("notified of %v only", heard)
		}
	}
	if !heard["resolved warning"] || !heard["firing critical"] {
		t.Errorf("notified of %v", heard)
	}

	ends := time.Now()
	a.Event, a.Count, a.EndsAt = Resolved, 0, &ends
	o.Send(a)
	has()
	hears("resolved", "critical")
	ctx, cancel := closeTo(10 * time.Second)
	defer cancel()
	if err := o.Close(ctx); err != nil {
		t.Error(err)
	}
	for _, s := range o.Stats() {
		if s.Delivered != 3 || s.Failed != 0 || !s.Healthy {
			t.Errorf("%+v", s)
		}
	}
}
