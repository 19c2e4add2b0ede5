// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// scrape asks a handler for a format.
func scrape(t testing.TB, h http.Handler, accept string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// The formats that are asked for.
const (
	text        = "text/plain;version=0.0.4"
	openMetrics = "application/openmetrics-text;version=1.0.0"
	protobuf    = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
)

// showing is a handler of what fill says.
func showing(m *Metrics, fill func(*State)) http.Handler {
	return m.Handler(func(_ context.Context, s *State) error {
		fill(s)
		return nil
	})
}

// families are what a scrape shows, by name, those of the client library left
// aside.
func families(t testing.TB, h http.Handler) map[string]*dto.MetricFamily {
	t.Helper()
	w := scrape(t, h, protobuf)
	if w.Code != http.StatusOK {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	found := map[string]*dto.MetricFamily{}
	decoder := expfmt.NewDecoder(w.Body, expfmt.NewFormat(expfmt.TypeProtoDelim))
	for {
		var f dto.MetricFamily
		if err := decoder.Decode(&f); err != nil {
			break
		}
		if strings.HasPrefix(f.GetName(), prefix) {
			found[f.GetName()] = &f
		}
	}
	if len(found) == 0 {
		t.Fatal("nothing in protobuf")
	}
	return found
}

// series are the values of all series but the histograms', as text has them:
// name{label="value"}.
func series(t testing.TB, h http.Handler) map[string]float64 {
	t.Helper()
	found := map[string]float64{}
	for name, f := range families(t, h) {
		for _, m := range f.GetMetric() {
			if m.Histogram != nil {
				continue
			}
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			if len(labels) > 0 {
				name = f.GetName() + "{" + strings.Join(labels, ",") + "}"
			}
			found[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return found
}

// of are the series of a metric, without its name.
func of(all map[string]float64, metric string) map[string]float64 {
	found := map[string]float64{}
	for name, value := range all {
		if rest, ok := strings.CutPrefix(name, prefix+metric); ok && (rest == "" || rest[0] == '{') {
			found[rest] = value
		}
	}
	return found
}

func wantSeries(t *testing.T, all map[string]float64, metric string, want map[string]float64) {
	t.Helper()
	if diff := cmp.Diff(want, of(all, metric)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", metric, diff)
	}
}

const path = "/etc/haproxy/haproxy.cfg"

func config(path string, proxies ...*haproxy.Proxy) *haproxy.Config {
	return &haproxy.Config{Files: []string{path, "/etc/haproxy/more.cfg"}, Proxies: proxies}
}

func section(kind haproxy.Kind, name string) *haproxy.Proxy {
	return &haproxy.Proxy{Kind: kind, Name: name}
}

func at(process *haproxy.Process, side haproxy.Side, proxies ...*haproxy.Proxy) *haproxy.Place {
	return &haproxy.Place{Process: process, Side: side, Proxies: proxies}
}

func inbound(stage events.Stage, port uint16, place *haproxy.Place, age time.Duration) *track.Conn {
	return &track.Conn{
		Side: events.Inbound, Stage: stage, Place: place, Duration: age,
		Flow: events.Flow{
			Local:  events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)),
			Remote: events.EndpointFrom(netip.MustParseAddrPort("198.51.100.7:50000")),
		},
	}
}

func outbound(stage events.Stage, port uint16, place *haproxy.Place, age time.Duration) *track.Conn {
	c := inbound(stage, port, place, age)
	c.Side = events.Outbound
	c.Flow.Local, c.Flow.Remote = c.Flow.Remote, c.Flow.Local
	return c
}

// past is c past its limit.
func past(c *track.Conn, l limits.Limit) *track.Conn {
	c.Limit, c.Overdue = l, true
	return c
}

var (
	minute   = events.Timers{FinTimeout: time.Minute}
	byKernel = limits.Closed(minute)
	byRule   = (&limits.Rules{User: []limits.Rule{{Name: "api", FinTimeout: time.Second}}}).For(events.Held, minute, 0, 1)
)

// byHAProxy is the limit of a held connection of a real configuration.
func byHAProxy(t testing.TB) limits.Limit {
	t.Helper()
	c, err := haproxy.Parse([]haproxy.Source{{Name: path, Text: []byte("listen www\nbind :443\ntimeout client 1m\ntimeout client-fin 3s\n")}}, haproxy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	rules := limits.Rules{HAProxy: haproxy.NewView([]haproxy.Process{{PID: 7, Netns: 1, Config: c}})}
	place := rules.Place(1, inbound(events.Held, 443, nil, 0).Flow, events.Inbound, 7)
	l := rules.For(events.Held, minute, place, 0)
	if l.Kind() != "haproxy timeout client-fin" {
		t.Fatalf("a limit by %s", l.Kind())
	}
	return l
}

// busy is a host on which everything has a value.
func busy(t testing.TB, m *Metrics) func(*State) {
	start := time.Unix(1_800_000_000, 250_000_000)
	m.Reloaded(true, start)
	m.Reloaded(false, start.Add(time.Minute))
	m.Snapshot(3*time.Millisecond, start.Add(30*time.Second))
	m.Snapshot(40*time.Millisecond, start.Add(time.Minute))
	for d, end := range map[time.Duration]events.End{
		200 * time.Millisecond:  events.PeerFIN,
		3 * time.Second:         events.PeerFIN,
		62 * time.Second:        events.KernelTimeout,
		25 * time.Hour:          events.LocalReset,
		1500 * time.Millisecond: events.Unseen,
	} {
		c := inbound(events.Held, 443, nil, d)
		c.End = end
		m.Closed(c)
	}
	c := outbound(events.Minisock, 8080, nil, 5*time.Second)
	c.End = events.PeerReset
	m.Closed(c)

	www, app, old := section(haproxy.Frontend, "www"), section(haproxy.Listen, "app"), section(haproxy.Frontend, "www")
	www.Maxconn.Value, app.Maxconn.Value = 4000, 500
	servers := section(haproxy.Backend, "servers")
	processes := []haproxy.Process{
		{
			PID: 7, Config: config(path, www, app, servers),
			Info: &haproxy.Info{Maxconn: 10_000, CurrConns: 321},
			Stats: []haproxy.ProxyStat{
				{Proxy: "www", Server: "FRONTEND", Scur: 300, Slim: 2000},
				{Proxy: "servers", Server: "BACKEND", Scur: 250, Slim: 200},
				{Proxy: "app", Server: "FRONTEND", Scur: 21, Slim: -1},
			},
		},
		{PID: 5, Old: true, Config: config(path, old), Info: &haproxy.Info{Maxconn: 10_000, CurrConns: 9}},
	}
	return func(s *State) {
		s.Counters = track.Counters{Entered: 23, Left: 11, Shed: 3, Corrected: 2}
		s.Connections, s.Capacity = 7, 1<<20
		s.Records, s.Lost, s.Missed = 1009, 13, 17
		s.Instants, s.Unfollowed = 100_003, 701
		s.HAProxy = processes
		s.Namespaces = []Namespace{
			{Name: "blue", Sysctls: events.Sysctls{events.SysctlFinTimeout: 30, events.SysctlMaxTWBuckets: 4096},
				Statistics: map[string]int64{"TCP tw": 5, "TCP orphan": 3, "TcpExt TCPTimeWaitOverflow": 1, "TcpExt TCPAbortOnMemory": 2, "TcpExt ListenOverflows": 3, "TcpExt ListenDrops": 4}},
			{Name: Host, Sysctls: events.Sysctls{events.SysctlFinTimeout: 60, events.SysctlMaxTWBuckets: 262144, events.SysctlMaxOrphans: 65536},
				Statistics: map[string]int64{"TCP tw": 50, "TCP orphan": 3, "TcpExt TCPTimeWaitOverflow": 10, "TcpExt TCPAbortOnMemory": 20, "TcpExt ListenOverflows": 30, "TcpExt ListenDrops": 40}},
		}
		s.Firing = 2
		s.Alerts = map[alert.Event]uint64{alert.Fired: 5, alert.Updated: 7, alert.Resolved: 3}
		s.Sinks = []alert.SinkStats{
			{Name: "log", Capacity: 1000, Delivered: 15, Healthy: true},
			{Name: "ops", Queued: 4, Capacity: 1000, Delivered: 9, Failed: 6, Shed: 1},
		}
		current, before := &processes[0], &processes[1]
		s.Add(past(inbound(events.Held, 443, at(current, haproxy.ClientSide, www), 90*time.Second), byHAProxy(t)))
		s.Add(past(inbound(events.Held, 443, at(current, haproxy.ClientSide, www), 100*time.Second), byRule))
		s.Add(inbound(events.Minisock, 443, at(current, haproxy.ClientSide, www), 10*time.Second))
		s.Add(inbound(events.Held, 443, at(before, haproxy.ClientSide, old), 2500*time.Millisecond))
		s.Add(outbound(events.Held, 8080, at(current, haproxy.ServerSide, servers), 4*time.Second))
		s.Add(past(inbound(events.Orphaned, 22, nil, 70*time.Second), byKernel))
		s.Add(outbound(events.Minisock, 25, nil, time.Second))
	}
}

// itsOwn is the part of an exposition that fintrace names.
func itsOwn(exposition string) string {
	var lines []string
	for line := range strings.Lines(exposition) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if strings.HasPrefix(name, prefix) {
			lines = append(lines, line)
		}
	}
	return strings.ReplaceAll(strings.Join(lines, ""), runtime.Version(), "go1.x")
}

func metrics() *Metrics { return New(BuildInfo{Version: "1.2.3", Revision: "abcdef0"}) }

// What is shown of a host on which everything has a value, and of one where
// nothing is known yet: what is not known is absent.
func TestExposition(t *testing.T) {
	m := metrics()
	h := showing(m, busy(t, m))
	start := metrics()
	for _, test := range []struct {
		name    string
		handler http.Handler
	}{
		{"busy", h},
		{"start", showing(start, func(*State) {})},
	} {
		t.Run(test.name, func(t *testing.T) {
			golden.Check(t, "testdata/"+test.name+".prom", itsOwn(scrape(t, test.handler, text).Body.String()))
			w := scrape(t, test.handler, openMetrics)
			if got := w.Header().Get("Content-Type"); !strings.HasPrefix(got, "application/openmetrics-text") {
				t.Errorf("asked for OpenMetrics, and got %s", got)
			}
			checkOpenMetrics(t, w.Body.String())
		})
	}
}

var sample = regexp.MustCompile(`^([a-z_0-9]+)(\{[a-z_]+="(?:[^"\\\n]|\\["\\n])*"(?:,[a-z_]+="(?:[^"\\\n]|\\["\\n])*")*\})? (\S+)$`)

// checkOpenMetrics holds the rules of OpenMetrics that Prometheus's text has not.
func checkOpenMetrics(t *testing.T, exposition string) {
	t.Helper()
	body, ended := strings.CutSuffix(exposition, "# EOF\n")
	if !ended {
		t.Error("no # EOF at the end")
	}
	family, kind := "", ""
	for line := range strings.Lines(body) {
		line = strings.TrimSuffix(line, "\n")
		if declared, ok := strings.CutPrefix(line, "# TYPE "); ok {
			family, kind, _ = strings.Cut(declared, " ")
			continue
		}
		if strings.HasPrefix(line, "# HELP ") || strings.HasPrefix(line, "# UNIT ") {
			continue
		}
		found := sample.FindStringSubmatch(line)
		if found == nil {
			t.Errorf("%q is no sample", line)
			continue
		}
		suffix, ok := strings.CutPrefix(found[1], family)
		suffixes := map[string][]string{
			"gauge": {""}, "unknown": {""}, "counter": {"_total"}, "histogram": {"_bucket", "_sum", "_count"}, "summary": {"", "_sum", "_count"},
		}[kind]
		if !ok || !slices.Contains(suffixes, suffix) {
			t.Errorf("%q is below a %s %s", line, kind, family)
		}
	}
}

// The linters of Prometheus have nothing to say.
func TestLint(t *testing.T) {
	m := metrics()
	exposition := scrape(t, showing(m, busy(t, m)), text).Body.Bytes()
	problems, err := promlint.New(bytes.NewReader(exposition)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	if _, err := parser.TextToMetricFamilies(bytes.NewReader(exposition)); err != nil {
		t.Error(err)
	}
}

func TestPromtool(t *testing.T) {
	const promtool = "/usr/bin/promtool"
	if _, err := os.Stat(promtool); err != nil {
		const required = "FINTRACE_REQUIRE_KERNEL_TESTS"
		if os.Getenv(required) != "" {
			t.Fatalf("%s is set, but there is no %s (Debian: apt install prometheus)", required, promtool)
		}
		t.Skipf("not run: there is no %s (Debian: apt install prometheus)", promtool)
	}
	m := metrics()
	check := exec.CommandContext(t.Context(), promtool, "check", "metrics")
	check.Stdin = scrape(t, showing(m, busy(t, m)), text).Body
	if said, err := check.CombinedOutput(); err != nil || len(said) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, said)
	}
}

// Both histograms are native ones too, for those who ask for protobuf.
func TestNativeHistograms(t *testing.T) {
	m := metrics()
	all := families(t, showing(m, busy(t, m)))
	for _, name := range []string{"fin_wait2_duration_seconds", "snapshot_duration_seconds"} {
		buckets, counted := 0, uint64(0)
		for _, m := range all[prefix+name].GetMetric() {
			h := m.GetHistogram()
			if h.Schema == nil || len(h.GetBucket()) < 10 {
				t.Fatalf("%s: schema %v, and %d classic buckets", name, h.Schema, len(h.GetBucket()))
			}
			buckets += len(h.GetPositiveDelta())
			counted += h.GetSampleCount()
		}
		if buckets < 2 || uint64(buckets) != counted {
			t.Errorf("%s: %d observations, all different, in %d native buckets", name, counted, buckets)
		}
	}
}

// Which bucket a connection is in that a timer has ended, on time or as late as
// the kernel's timers are.
func TestTimersHaveBuckets(t *testing.T) {
	for _, timer := range []time.Duration{5, 10, 15, 30, 60, 120} {
		timer *= time.Second
		m := metrics()
		for _, d := range []time.Duration{timer - time.Millisecond, timer + time.Millisecond, timer * 9 / 8} {
			c := inbound(events.Held, 80, nil, d)
			c.End = events.KernelTimeout
			m.Closed(c)
		}
		for _, metric := range families(t, showing(m, func(*State) {}))[prefix+"fin_wait2_duration_seconds"].GetMetric() {
			h := metric.GetHistogram()
			if h.GetSampleCount() == 0 {
				continue
			}
			i := slices.IndexFunc(h.GetBucket(), func(b *dto.Bucket) bool { return b.GetUpperBound() == timer.Seconds() })
			if i < 0 || h.GetBucket()[i].GetCumulativeCount() != 1 || h.GetBucket()[i+1].GetCumulativeCount() != 3 {
				t.Errorf("timer of %v: %v", timer, h.GetBucket())
			}
		}
	}
}

// Once it has been seen, a place of connections stays, as 0.
func TestSeriesStay(t *testing.T) {
	m := metrics()
	conns := []*track.Conn{
		past(inbound(events.Held, 80, nil, time.Hour), byRule),
		inbound(events.Minisock, 80, nil, time.Second),
		inbound(events.Minisock, 80, nil, 2*time.Second),
	}
	h := showing(m, func(s *State) {
		for _, c := range conns {
			s.Add(c)
		}
	})
	label := func(stage string) string { return `{port="80",proxy="",side="inbound",stage="` + stage + `"}` }
	all := series(t, h)
	wantSeries(t, all, "fin_wait2_connections", map[string]float64{label("held"): 1, label("orphaned"): 0, label("minisock"): 2})
	wantSeries(t, all, "fin_wait2_oldest_seconds", map[string]float64{label("held"): 3600, label("orphaned"): 0, label("minisock"): 2})
	wantSeries(t, all, "overdue_connections", map[string]float64{`{limit="api",port="80",proxy="",side="inbound",stage="held"}`: 1})
	conns = nil
	all = series(t, h)
	wantSeries(t, all, "fin_wait2_connections", map[string]float64{label("held"): 0, label("orphaned"): 0, label("minisock"): 0})
	wantSeries(t, all, "fin_wait2_oldest_seconds", map[string]float64{label("held"): 0, label("orphaned"): 0, label("minisock"): 0})
	wantSeries(t, all, "overdue_connections", map[string]float64{`{limit="api",port="80",proxy="",side="inbound",stage="held"}`: 0})
}

// What is not known is absent.
func TestUnknown(t *testing.T) {
	www := section(haproxy.Frontend, "www")
	limited := section(haproxy.Frontend, "limited")
	limited.Maxconn.Value = 100
	both := func(processes ...haproxy.Process) func(*State) {
		return func(s *State) { s.HAProxy = processes }
	}
	row := haproxy.ProxyStat{Proxy: "www", Server: "FRONTEND", Scur: 3, Slim: 50}
	const labels, proxy = `{haproxy="` + path + `"}`, `{haproxy="` + path + `",proxy="www"}`
	for _, test := range []struct {
		name   string
		fill   func(*State)
		metric string
		want   map[string]float64
	}{
		{"no answer: maxconn", both(haproxy.Process{Config: config(path, www)}), "haproxy_maxconn", map[string]float64{}},
		{"no answer: connections", both(haproxy.Process{Config: config(path, www)}), "haproxy_connections", map[string]float64{}},
		{"not said", both(haproxy.Process{Config: config(path, www), Info: &haproxy.Info{Maxconn: -1, CurrConns: 0}}), "haproxy_maxconn", map[string]float64{}},
		{"none", both(haproxy.Process{Config: config(path, www), Info: &haproxy.Info{Maxconn: -1, CurrConns: 0}}), "haproxy_connections", map[string]float64{labels: 0}},
		{"one of two does not answer", both(haproxy.Process{Config: config(path), Info: &haproxy.Info{Maxconn: 5}}, haproxy.Process{Config: config(path)}),
			"haproxy_maxconn", map[string]float64{}},
		{"both answer", both(haproxy.Process{Config: config(path), Info: &haproxy.Info{Maxconn: 5}}, haproxy.Process{Config: config(path), Info: &haproxy.Info{Maxconn: 6}}),
			"haproxy_maxconn", map[string]float64{labels: 11}},
		{"an old one does not answer", both(haproxy.Process{Config: config(path), Info: &haproxy.Info{Maxconn: 5}}, haproxy.Process{Config: config(path), Old: true}),
			"haproxy_maxconn", map[string]float64{labels: 5}},

		{"frontend: no limit of its own", both(haproxy.Process{Config: config(path, www)}), "haproxy_frontend_maxconn", map[string]float64{}},
		{"frontend: limit written", both(haproxy.Process{Config: config(path, limited)}), "haproxy_frontend_maxconn",
			map[string]float64{`{haproxy="` + path + `",proxy="limited"}`: 100}},
		{"frontend: limit written, but changed", both(haproxy.Process{Config: config(path, limited), Changed: true}), "haproxy_frontend_maxconn", map[string]float64{}},
		{"frontend: not asked", both(haproxy.Process{Config: config(path, limited)}), "haproxy_frontend_connections", map[string]float64{}},
		{"frontend: answered", both(haproxy.Process{Config: config(path, www), Stats: []haproxy.ProxyStat{row}}), "haproxy_frontend_maxconn", map[string]float64{proxy: 50}},
		{"frontend: no configuration", both(haproxy.Process{Stats: []haproxy.ProxyStat{row}}), "haproxy_frontend_connections",
			map[string]float64{`{haproxy="unknown",proxy="www"}`: 3}},
		{"frontend: no configuration, no limit", both(haproxy.Process{Stats: []haproxy.ProxyStat{{Proxy: "www", Server: "FRONTEND"}}}), "haproxy_frontend_maxconn", map[string]float64{}},
		{"frontend: one of two does not answer", both(haproxy.Process{Config: config(path, www), Stats: []haproxy.ProxyStat{row}}, haproxy.Process{Config: config(path, www)}),
			"haproxy_frontend_connections", map[string]float64{}},
		{"frontend: not said", both(haproxy.Process{Config: config(path, www), Stats: []haproxy.ProxyStat{{Proxy: "www", Server: "FRONTEND", Scur: -1, Slim: -1}}}),
			"haproxy_frontend_connections", map[string]float64{}},

		{"held: none", both(haproxy.Process{Config: config(path, www)}), "haproxy_held_connections",
			map[string]float64{`{haproxy="` + path + `",proxy="www",worker="current"}`: 0}},
		{"configuration read", both(haproxy.Process{Config: config(path)}), "haproxy_config_read", map[string]float64{labels: 1}},
		{"configuration changed", both(haproxy.Process{Config: config(path), Changed: true}), "haproxy_config_read", map[string]float64{labels: 0}},
		{"configuration not read", both(haproxy.Process{}), "haproxy_config_read", map[string]float64{`{haproxy="unknown"}`: 0}},
		{"configuration of an old one", both(haproxy.Process{Config: config(path), Changed: true, Old: true}, haproxy.Process{Config: config(path)}),
			"haproxy_config_read", map[string]float64{labels: 1}},
		{"only old ones", both(haproxy.Process{Config: config(path), Old: true}), "haproxy_config_read", map[string]float64{}},
		{"only old ones: maxconn", both(haproxy.Process{Config: config(path), Old: true, Info: &haproxy.Info{Maxconn: 5}}), "haproxy_maxconn", map[string]float64{}},
		{"old ones", both(haproxy.Process{Config: config(path), Old: true}), "haproxy_old_workers", map[string]float64{labels: 1}},

		{"namespace: nothing", func(s *State) { s.Namespaces = []Namespace{{Name: Host}} }, "tcp_fin_timeout_seconds", map[string]float64{}},
		{"namespace: no timewait", func(s *State) {
			s.Namespaces = []Namespace{{Name: Host, Statistics: map[string]int64{"TCP orphan": 0}}}
		},
			"timewait_sockets", map[string]float64{}},
		{"namespace: no orphans are some", func(s *State) {
			s.Namespaces = []Namespace{{Name: Host, Statistics: map[string]int64{"TCP orphan": 0}}}
		},
			"orphans", map[string]float64{"": 0}},
		{"namespace: orphans not known", func(s *State) { s.Namespaces = []Namespace{{Name: Host, Statistics: map[string]int64{"TCP tw": 1}}} },
			"orphans", map[string]float64{}},
		{"namespace: orphans of the host", func(s *State) {
			s.Namespaces = []Namespace{{Name: "a", Sysctls: events.Sysctls{events.SysctlMaxOrphans: 1}}, {Name: Host, Sysctls: events.Sysctls{events.SysctlMaxOrphans: 2}}}
		}, "orphans_limit", map[string]float64{"": 2}},
		{"namespace: the same twice", func(s *State) {
			s.Namespaces = []Namespace{{Name: "a", Statistics: map[string]int64{"TCP tw": 1}}, {Name: "a", Statistics: map[string]int64{"TCP tw": 2}}}
		}, "timewait_sockets", map[string]float64{`{netns="a"}`: 1}},
		{"sink: the same twice", func(s *State) { s.Sinks = []alert.SinkStats{{Name: "a", Queued: 1}, {Name: "a", Queued: 2}} },
			"sink_queued", map[string]float64{`{sink="a"}`: 1, `{sink="a 2"}`: 2}},
		{"reload", func(*State) {}, "config_last_reload_successful", map[string]float64{}},
		{"snapshot", func(*State) {}, "snapshot_last_timestamp_seconds", map[string]float64{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantSeries(t, series(t, showing(metrics(), test.fill)), test.metric, test.want)
		})
	}

	t.Run("never read with success", func(t *testing.T) {
		m := metrics()
		m.Reloaded(false, time.Unix(1, 0))
		all := series(t, showing(m, func(*State) {}))
		wantSeries(t, all, "config_last_reload_successful", map[string]float64{"": 0})
		wantSeries(t, all, "config_last_reload_success_timestamp_seconds", map[string]float64{})
	})
}

// Which process, and whose slots, held connections are counted for.
func TestHeld(t *testing.T) {
	www, app, pool := section(haproxy.Frontend, "www"), section(haproxy.Listen, "app"), section(haproxy.Backend, "pool")
	current := haproxy.Process{PID: 1, Config: config(path, www, app, pool)}
	old := haproxy.Process{PID: 2, Old: true, Config: config(path, www)}
	elsewhere := haproxy.Process{PID: 3, Config: config("/srv/other.cfg", www)}
	same := haproxy.Process{PID: 4, Config: config(path, www)}
	all := series(t, showing(metrics(), func(s *State) {
		s.HAProxy = []haproxy.Process{current, old, elsewhere, same}
		for _, c := range []*track.Conn{
			inbound(events.Held, 80, at(&current, haproxy.ClientSide, www), 0),
			inbound(events.Held, 443, at(&current, haproxy.ClientSide, www), 0),
			inbound(events.Held, 80, at(&same, haproxy.ClientSide, www), 0),
			inbound(events.Held, 81, at(&current, haproxy.ClientSide, www, app), 0),
			inbound(events.Minisock, 80, at(&current, haproxy.ClientSide, www), 0),
			inbound(events.Orphaned, 80, at(&current, haproxy.ClientSide, www), 0),
			outbound(events.Held, 80, at(&current, haproxy.ServerSide, app), 0),
			inbound(events.Held, 80, at(&old, haproxy.ClientSide, www), 0),
			inbound(events.Held, 80, nil, 0),
		} {
			s.Add(c)
		}
	}))
	wantSeries(t, all, "haproxy_held_connections", map[string]float64{
		`{haproxy="/etc/haproxy/haproxy.cfg",proxy="www",worker="current"}`:        3,
		`{haproxy="/etc/haproxy/haproxy.cfg",proxy="www or app",worker="current"}`: 1,
		`{haproxy="/etc/haproxy/haproxy.cfg",proxy="app",worker="current"}`:        0,
		`{haproxy="/etc/haproxy/haproxy.cfg",proxy="www",worker="old"}`:            1,
		`{haproxy="/srv/other.cfg",proxy="www",worker="current"}`:                  0,
	})
}

// Whatever anybody writes, a label value is valid UTF-8 on one line, and short.
func TestClean(t *testing.T) {
	for written, want := range map[string]string{
		"www":                          "www",
		"größe 1":                      "größe 1",
		"a\nb\x00c\x7f\u0085":          "a�b�c��",
		"\xff\xfe":                     "��",
		"left\u202eright":              "left�right",
		strings.Repeat("é", 200):       strings.Repeat("é", 128),
		strings.Repeat("a", 255) + "é": strings.Repeat("a", 255),
	} {
		if got := clean(written); got != want {
			t.Errorf("%q became %q, not %q", written, got, want)
		}
	}
	www := section(haproxy.Frontend, "w\x01w\xff")
	process := haproxy.Process{Config: config("/etc/\n.cfg", www), Info: &haproxy.Info{}}
	bad := (&limits.Rules{User: []limits.Rule{{Name: "r\x02", FinTimeout: time.Second}}}).For(events.Held, minute, 0, 1)
	all := series(t, showing(New(BuildInfo{Version: "\xff", Revision: "\n"}), func(s *State) {
		s.HAProxy = []haproxy.Process{process}
		s.Namespaces = []Namespace{{Name: "n\t", Statistics: map[string]int64{"TCP tw": 1}}}
		s.Sinks = []alert.SinkStats{{Name: "s\r"}}
		s.Add(past(inbound(events.Held, 80, at(&process, haproxy.ClientSide, www), 0), bad))
	}))
	for name := range all {
		if strings.Contains(name, `\`) {
			t.Errorf("%s has what cannot be printed", name)
		}
	}
	wantSeries(t, all, "overdue_connections", map[string]float64{`{limit="r�",port="80",proxy="w�w�",side="inbound",stage="held"}`: 1})
}

// A scrape that fails says so in one line, and the next one is as if nothing
// had been.
func TestFailure(t *testing.T) {
	fails := true
	h := metrics().Handler(func(context.Context, *State) error {
		if fails {
			return errors.New("the loop\nhas ended")
		}
		return nil
	})
	w := scrape(t, h, text)
	if w.Code != http.StatusServiceUnavailable || w.Body.String() != "the table could not be looked at: the loop has ended\n" {
		t.Errorf("%d: %q", w.Code, w.Body)
	}
	fails = false
	if w := scrape(t, h, text); w.Code != http.StatusOK {
		t.Errorf("%d: %q", w.Code, w.Body)
	}
}

// The loop may be busy for long: one scrape waits for it, for a bounded time,
// and others with it.
func TestBusyLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gathered := 0
		h := metrics().Handler(func(ctx context.Context, s *State) error {
			gathered++
			<-ctx.Done()
			return ctx.Err()
		})
		answers := make(chan *httptest.ResponseRecorder)
		began := time.Now()
		for range 3 {
			go func() { answers <- scrape(t, h, text) }()
		}
		for range 3 {
			if w := <-answers; w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), context.DeadlineExceeded.Error()) {
				t.Errorf("%d: %q", w.Code, w.Body)
			}
		}
		if took := time.Since(began); took != scrapeAtMost || gathered != 1 {
			t.Errorf("gathered %d times in %v, not once in %v", gathered, took, scrapeAtMost)
		}
	})
}

// Who goes away is not waited for, and takes the answer from nobody.
func TestLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		gathered := 0
		h := metrics().Handler(func(ctx context.Context, s *State) error {
			gathered++
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan struct{})
		go func() {
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/metrics", nil))
			close(left)
		}()
		synctest.Wait()
		answer := make(chan *httptest.ResponseRecorder)
		go func() { answer <- scrape(t, h, text) }()
		synctest.Wait()
		leave()
		<-left
		close(release)
		if w := <-answer; w.Code != http.StatusOK || gathered != 1 {
			t.Errorf("%d, gathered %d times: %q", w.Code, gathered, w.Body)
		}
	})
}

// Closed costs next to nothing, in the loop's time and in garbage.
func TestClosedDoesNotAllocate(t *testing.T) {
	m := metrics()
	ends := closing()
	for i := range ends {
		m.Closed(&ends[i])
	}
	i := 0
	if n := testing.AllocsPerRun(10_000, func() { m.Closed(&ends[i%len(ends)]); i++ }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// closing are connections that end in all ways after all times.
func closing() []track.Conn {
	conns := make([]track.Conn, 4096)
	for i := range conns {
		c := inbound(events.Held, 443, nil, time.Duration(math.Pow(1.007, float64(i))*float64(time.Microsecond)))
		c.Side, c.End = events.Side(1+i%2), events.Ends()[i%len(events.Ends())]
		conns[i] = *c
	}
	return conns
}
