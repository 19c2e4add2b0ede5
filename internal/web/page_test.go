// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

var now = time.Date(2026, 11, 22, 21, 55, 3, 250e6, time.UTC)

// state is what a daemon may be asked about.
type state struct {
	status  Status
	alerts  []alert.Alert
	records []report.Record
	total   int
	err     error
	ready   error
}

func (s state) source() Source {
	return Source{
		Connections: func(_ context.Context, q Query) (Connections, error) {
			return Connections{Records: s.records[:min(len(s.records), q.Limit)], Total: max(s.total, len(s.records)), At: now}, s.err
		},
		Alerts:  func(context.Context) ([]alert.Alert, error) { return s.alerts, s.err },
		Status:  func(context.Context) (Status, error) { return s.status, s.err },
		Healthy: func() error { return nil },
		Ready:   func() error { return s.ready },
		Metrics: http.NotFoundHandler(),
	}
}

func quiet() Status {
	return Status{At: now, Started: now.Add(-51*time.Hour - 7*time.Minute), Version: "v0.9.0", Host: "lb1.example.net"}
}

func group(proxy string, side events.Side, port uint16, held, orphaned, minisock, overdue int, oldest time.Duration, atLeast bool) Group {
	return Group{Proxy: proxy, Side: side, Port: port, Held: held, Orphaned: orphaned, Minisock: minisock, Overdue: overdue, Oldest: Age{oldest, atLeast}}
}

// sum makes the totals those of the groups.
func sum(s Status) Status {
	for _, g := range s.Groups {
		s.Held += g.Held
		s.Orphaned += g.Orphaned
		s.Minisock += g.Minisock
		s.Overdue += g.Overdue
		s.Oldest.Duration = max(s.Oldest.Duration, g.Oldest.Duration)
		s.Oldest.AtLeast = s.Oldest.AtLeast || g.Oldest.AtLeast
	}
	return s
}

func record(age time.Duration, exact bool, local, remote string) report.Record {
	held := age.Seconds()
	timeout := 3600.0
	return report.Record{
		Time: now, Cookie: "1a2b", Netns: 4026531840, Local: local, Remote: remote, Side: "inbound", Stage: "held",
		Since: now.Add(-age), SinceExact: exact, Duration: held, Held: &held, Limit: 60,
		LimitSource: "/etc/haproxy/haproxy.cfg:9 defaults timeout client 1h (client-fin unset); net.ipv4.tcp_fin_timeout 60s",
		Overdue:     true, PID: 1234, Comm: "haproxy", ClosedBy: "shutdown", Cgroup: "/system.slice/haproxy.service",
		HAProxy: &report.Place{Proxy: "www", Side: "client", Timeout: &timeout},
	}
}

func pileUp() report.Finding {
	return report.Finding{
		Severity: report.Critical,
		ID:       "held-pile-up",
		Title:    "haproxy[1234] holds 42 connections past their limit at frontend www, for 2h13m or more, all from 198.51.100.22",
		Where: []report.Location{
			{Pos: haproxy.Pos{File: "/etc/haproxy/haproxy.cfg", Line: 9}, Text: "timeout client 1h"},
			{Text: "held by haproxy[1234]"},
		},
		Why: "HAProxy has closed its direction, and the clients have acknowledged that but not closed theirs. While a process holds the sockets no timer of the kernel runs: only HAProxy's own does, which is `timeout client` where client-fin is unset.",
		Fix: []report.Edit{
			{Do: report.After, At: []haproxy.Pos{{File: "/etc/haproxy/haproxy.cfg", Line: 9}}, Lines: []string{"    timeout client-fin 30s"}},
			{Text: "to end them at once, with the young ones there", Lines: []string{"ss -tK state fin-wait-2 'sport = :443 and dst 198.51.100.22'"}},
		},
		Verify: "`fintrace list --stage held --side inbound --proxy www --min-duration 70s` stays empty.",
	}
}

func firing(n, peak int, proxy, peer string) alert.Alert {
	maxconn := 0
	if proxy == "www" {
		maxconn = 2000
	}
	return alert.Alert{
		ID: "3f2a", Event: alert.Fired,
		Labels: alert.Labels{Limit: "tcp_fin_timeout", Stage: "held", Side: "inbound", Proxy: proxy,
			Peer: peer, Process: "haproxy"},
		StartsAt: now.Add(-12*time.Minute - 3*time.Second), UpdatedAt: now,
		Count: n, Peak: peak, Oldest: 7980, OldestExact: false,
		LimitSource: "/etc/haproxy/haproxy.cfg:9 defaults timeout client 1h (client-fin unset); net.ipv4.tcp_fin_timeout 60s",
		LimitSec:    60, Maxconn: maxconn,
		Summary:  fmt.Sprintf("%d connections from %s at frontend %s are past their limit, the oldest for 2h13m or more", n, peer, proxy),
		Examples: []report.Record{record(7980*time.Second, false, "192.0.2.1:443", "198.51.100.22:33084"), record(7100*time.Second, true, "192.0.2.1:443", "198.51.100.22:33077")},
		Advice:   []report.Finding{pileUp()},
	}
}

// hostile is what can be made of a name that others choose.
const hostile = "\"; rm -rf / #<script>alert(1)</script>\n\x1b[31m\u202e\xc3'`${x}{{.}}"

func states() map[string]state {
	all := map[string]state{"nothing": {status: quiet()}}

	s := quiet()
	s.Groups = []Group{
		group("www", events.Inbound, 443, 8, 0, 1, 0, 3100*time.Millisecond, false),
		group("app", events.Outbound, 8080, 2, 0, 0, 0, 240*time.Millisecond, false),
		group("", events.Inbound, 22, 0, 0, 1, 0, 1900*time.Millisecond, false),
	}
	all["calm"] = state{status: sum(s)}

	s = quiet()
	s.Groups = []Group{
		group("www", events.Inbound, 443, 54, 0, 3, 42, 7980*time.Second, true),
		group("app", events.Outbound, 8080, 2, 1, 0, 0, 240*time.Millisecond, false),
		group("bulk", events.Inbound, 8443, 700, 0, 0, 0, 9*time.Second, false),
		group("api", events.Inbound, 8443, 70, 0, 0, 43, 90*time.Second, false),
	}
	one := state{status: sum(s), alerts: []alert.Alert{firing(42, 57, "www", "198.51.100.22")}}
	for i := range 42 {
		one.records = append(one.records, record(time.Duration(7980-180*i)*time.Second, i > 3, "192.0.2.1:443", fmt.Sprintf("198.51.100.22:%d", 33000+17*i)))
	}
	resolved := firing(0, 3, "old", "203.0.113.9")
	resolved.Event, resolved.EndsAt = alert.Resolved, &now
	one.alerts = append(one.alerts, resolved)
	all["one-alert"] = one

	s = quiet()
	s.Lost = 17
	twelve := state{total: 48210}
	for i := range 12 {
		proxy := fmt.Sprintf("customer-portal-%02d.eu-central-1.internal.production.example.net_https_frontend", i)
		n := 9000 - 700*i
		a := firing(n, n+311, proxy, fmt.Sprintf("2001:db8:1234:%x::/64", 0x5670+i))
		if i%4 == 3 {
			a.Labels.Server, a.Labels.Peer, a.Labels.Side = "application-server-with-a-long-name-17", alert.Others, "outbound"
			a.StartsAt = now.Add(-30 * time.Hour)
			f := pileUp()
			f.ID, f.Severity = "server-never-closes", report.Warning
			f.Title = "the servers of " + proxy + " never close what HAProxy has closed, and `timeout server-fin` is unset"
			a.Advice = append(a.Advice, f)
		}
		twelve.alerts = append(twelve.alerts, a)
		s.Groups = append(s.Groups, group(proxy, events.Inbound, 443, n+1500, i*7, 40*i, n, time.Duration(7980-400*i)*time.Second, i%2 == 0))
	}
	for i := range 48 {
		s.Groups = append(s.Groups, group("", events.Inbound, uint16(30000+i), i, 0, 1, 0, time.Duration(i)*time.Second, false))
	}
	for i := range 50 {
		r := record(time.Duration(7980-100*i)*time.Second, i%3 > 0, "192.0.2.1:443", fmt.Sprintf("198.51.100.%d:%d", i, 33000+17*i))
		r.HAProxy = &report.Place{Proxies: []string{s.Groups[i%12].Proxy, s.Groups[(i+1)%12].Proxy}, Side: "client", Old: i%5 == 0}
		twelve.records = append(twelve.records, r)
	}
	twelve.status = sum(s)
	all["twelve-alerts"] = twelve

	s = quiet()
	s.Groups = []Group{group("", events.Outbound, 65535, 50, 0, 0, 50, 26*time.Hour, false)}
	v6 := state{status: sum(s)}
	for i := range 50 {
		r := record(26*time.Hour-time.Duration(i)*time.Minute, true,
			fmt.Sprintf("[2001:db8:1234:5678:9abc:def0:1234:%x]:%d", 0x5678+i, 50000+i), fmt.Sprintf("[fd00:1111:2222:3333:4444:5555:6666:%x]:65535", 0x7777+i))
		r.Side, r.HAProxy, r.Comm, r.PID, r.LimitSource = "outbound", nil, "", 0, "net.ipv4.tcp_fin_timeout 60s"
		r.NetnsName = "tenant-0123456789abcdef"
		v6.records = append(v6.records, r)
	}
	all["ipv6"] = v6

	s = quiet()
	s.Host, s.Version, s.Unlooked = hostile, hostile, []string{hostile, strings.Repeat("x", 300)}
	s.Groups = []Group{group(hostile, events.Inbound, 80, 1, 0, 0, 1, time.Minute, false)}
	a := firing(1, 1, hostile, hostile)
	a.Summary, a.LimitSource = hostile, hostile
	a.Labels = alert.Labels{Limit: hostile, Stage: hostile, Side: hostile, Proxy: hostile, Server: hostile, Peer: hostile, Process: hostile, Netns: hostile}
	a.Advice = []report.Finding{{ID: hostile, Title: hostile, Why: hostile, Verify: hostile,
		Where: []report.Location{{Pos: haproxy.Pos{File: hostile, Line: 1}, Text: hostile}},
		Fix:   []report.Edit{{Text: hostile, Lines: []string{hostile, strings.Repeat("y", 300)}}}}}
	r := record(time.Minute, true, "[2001:db8:1234:5678:9abc:def0:1234:5678]:50000", "[fd00:1111:2222:3333:4444:5555:6666:7777]:65535")
	r.Stage, r.Side, r.Comm, r.LimitSource, r.NetnsName = hostile, hostile, hostile, hostile, hostile
	r.HAProxy = &report.Place{Proxy: hostile, Server: hostile}
	a.Examples = []report.Record{r}
	all["hostile"] = state{status: sum(s), alerts: []alert.Alert{a}, records: []report.Record{r}, ready: errors.New(hostile)}

	s = quiet()
	s.Started = now.Add(-800 * time.Millisecond)
	s.Unlooked = []string{"network namespace 4026532245: no process or mount to enter it by", "haproxy[77]: /etc/haproxy/haproxy.cfg:12:9: unknown keyword \"tiemout\" in defaults"}
	all["partial"] = state{status: s, ready: errors.New("the sockets that were there before have not all been looked at yet")}

	still := firing(0, 57, "www", "198.51.100.22")
	unseen := firing(0, 12, "", "198.51.100.23") // since a restart
	unseen.Labels.Port, unseen.Oldest, unseen.Examples, unseen.Advice = 8080, 0, nil, nil
	unseen.Summary = "no longer any connections from 198.51.100.23 held in FIN_WAIT2 at port 8080 by haproxy, 12 at the peak"
	all["resolving"] = state{status: quiet(), alerts: []alert.Alert{still, unseen}}
	all["busy"] = state{err: context.DeadlineExceeded}
	return all
}

func get(t *testing.T, h http.Handler, url string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, url, nil))
	return w
}

func TestPage(t *testing.T) {
	for name, s := range states() {
		t.Run(name, func(t *testing.T) {
			w := get(t, Handler(s.source()), "/")
			want := http.StatusOK
			if s.err != nil {
				want = http.StatusServiceUnavailable
			}
			if w.Code != want || w.Header().Get("Content-Type") != "text/html; charset=utf-8" {
				t.Errorf("%d %s", w.Code, w.Header().Get("Content-Type"))
			}
			golden.Check(t, "testdata/"+name+".html", strings.Replace(w.Body.String(), style, "", 1))
			for _, r := range w.Body.String() {
				if r == unicode.ReplacementChar || r != '\n' && r != '\t' && !unicode.IsPrint(r) {
					t.Errorf("there is a %U", r)
				}
			}
		})
	}
}

func TestPageHostile(t *testing.T) {
	body := get(t, Handler(states()["hostile"].source()), "/").Body.String()
	if n := strings.Count(body, "&lt;script&gt;"); n < 25 {
		t.Errorf("the name is shown %d times: what hides the others?", n)
	}
	// All elements are those of the template, with attributes that it gives them.
	tag := regexp.MustCompile(`<[^>]*>`)
	_, body, _ = strings.Cut(body, "</style>")
	for _, found := range tag.FindAllString(body, -1) {
		if strings.Contains(found, "rm -rf") || strings.Contains(found, "script") {
			t.Errorf("a name is in %s", found)
		}
	}
}

func TestViewConnections(t *testing.T) {
	r := record(time.Minute, true, hostile, hostile)
	r.HAProxy = &report.Place{Proxies: []string{hostile, hostile}, Server: hostile}
	v := viewConnections([]report.Record{r})[0]
	for _, text := range []string{v.Peer, v.Local, v.Proxy} {
		if text != report.Clean(text) {
			t.Errorf("%q", text)
		}
	}
	known := connectionView{Age: "1m00s", Stage: "held", Peer: v.Peer, Local: v.Local, Side: "inbound", Process: "haproxy[1234]", Limit: "60s"}
	known.Proxy, known.Source = v.Proxy, v.Source
	if diff := cmp.Diff(known, v); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPageRefresh(t *testing.T) {
	h := Handler(states()["calm"].source())
	if body := get(t, h, "/").Body.String(); !strings.Contains(body, `<meta http-equiv="refresh" content="10">`) || !strings.Contains(body, `href="?refresh=0"`) {
		t.Error("it is not refreshed, or that cannot be switched off")
	}
	if body := get(t, h, "/?refresh=0").Body.String(); strings.Contains(body, "http-equiv") || !strings.Contains(body, `href="./"`) {
		t.Error("it is refreshed, or that cannot be switched on again")
	}
	if w := get(t, h, "/?refresh=1"); w.Code != http.StatusBadRequest || w.Body.String() != "the page takes refresh=0, and nothing else\n" {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// The policy must name the style sheet as it is in the page, or no browser uses it.
func TestPageStyle(t *testing.T) {
	w := get(t, Handler(states()["calm"].source()), "/")
	_, sheet, _ := strings.Cut(w.Body.String(), "<style>")
	sheet, _, _ = strings.Cut(sheet, "</style>")
	sum := sha256.Sum256([]byte(sheet))
	want := "style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	if policy := w.Header().Get("Content-Security-Policy"); !strings.Contains(policy, want) || !strings.HasPrefix(policy, "default-src 'none';") {
		t.Errorf("policy %s, style sheet %s", policy, want)
	}
	if strings.Contains(w.Body.String(), " style=") {
		t.Error("a style attribute, which the policy forbids")
	}
}

func TestAge(t *testing.T) {
	for _, test := range []struct {
		seconds float64
		exact   bool
		want    string
	}{
		{3.14, true, "3.1s"},
		{0.0004, true, "400µs"},
		{3.19, false, "≥3.1s"},
		{59.99, false, "≥59.9s"},
		{59.99, true, "1m00s"},
		{0.0129, false, "≥12ms"},
		{7980, false, "≥2h13m"},
	} {
		if got := age(test.seconds, test.exact); got != test.want {
			t.Errorf("age(%v, %v) = %s, want %s", test.seconds, test.exact, got, test.want)
		}
	}
}

func TestSpans(t *testing.T) {
	for _, test := range []struct {
		text string
		want []span
	}{
		{"", nil},
		{"a", []span{{false, "a"}}},
		{"`a`", []span{{true, "a"}}},
		{"see `a` and `b`.", []span{{false, "see "}, {true, "a"}, {false, " and "}, {true, "b"}, {false, "."}}},
		{"a`b", []span{{false, "a`b"}}},
	} {
		if diff := cmp.Diff(test.want, spans(test.text)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.text, diff)
		}
	}
}

func TestStatusAdd(t *testing.T) {
	conn := func(side events.Side, stage events.Stage, local, remote uint16, age time.Duration, exact, overdue bool, proxy string) *track.Conn {
		c := &track.Conn{Side: side, Stage: stage, Duration: age, SinceExact: exact, Overdue: overdue, Limit: limits.Limit{}}
		c.Flow.Local = events.EndpointFrom(netip.AddrPortFrom(netip.IPv4Unspecified(), local))
		c.Flow.Remote = events.EndpointFrom(netip.AddrPortFrom(netip.IPv4Unspecified(), remote))
		if proxy != "" {
			c.Place = &haproxy.Place{Proxies: []*haproxy.Proxy{{Name: proxy}}}
		}
		return c
	}
	var s Status
	s.Add(conn(events.Inbound, events.Held, 443, 5001, time.Minute, true, true, "www"))
	s.Add(conn(events.Inbound, events.Orphaned, 443, 5002, time.Second, false, false, "www"))
	s.Add(conn(events.Inbound, events.Minisock, 443, 5003, time.Second, true, false, ""))
	s.Add(conn(events.Outbound, events.Minisock, 5004, 8080, time.Hour, true, true, ""))
	s.Add(conn(events.Outbound, events.Minisock, 5005, 8080, time.Second, true, false, ""))
	want := Status{Held: 1, Orphaned: 1, Minisock: 3, Overdue: 2, Oldest: Age{time.Hour, true}, Groups: []Group{
		group("www", events.Inbound, 443, 1, 1, 0, 1, time.Minute, true),
		group("", events.Inbound, 443, 0, 0, 1, 0, time.Second, false),
		group("", events.Outbound, 8080, 0, 0, 2, 1, time.Hour, false),
	}}
	s.groups = nil
	if diff := cmp.Diff(want, s, cmp.AllowUnexported(Status{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestContrast computes that all text can be read: WCAG 2.1, 1.4.3, level AA.
func TestContrast(t *testing.T) {
	variable := regexp.MustCompile(`--([a-z-]+): #([0-9a-f]{6});`)
	light, rest, _ := strings.Cut(style, "prefers-color-scheme: dark")
	dark, _, _ := strings.Cut(rest, "* {")
	for scheme, text := range map[string]string{"light": light, "dark": dark} {
		luminance := map[string]float64{}
		for _, m := range variable.FindAllStringSubmatch(text, -1) {
			sum := 0.0
			for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
				n, _ := strconv.ParseUint(m[2][2*i:2*i+2], 16, 8)
				c := float64(n) / 255
				if c <= 0.04045 {
					c /= 12.92
				} else {
					c = math.Pow((c+0.055)/1.055, 2.4)
				}
				sum += weight * c
			}
			luminance[m[1]] = sum
		}
		for _, pair := range strings.Fields("text/paper text/card text/code soft/paper soft/card soft/code link/paper link/card " +
			"calm/calm-bg bad/bad-bg bad/card warn/warn-bg warn/card") {
			front, back, _ := strings.Cut(pair, "/")
			a, okA := luminance[front]
			b, okB := luminance[back]
			if ratio := (max(a, b) + 0.05) / (min(a, b) + 0.05); !okA || !okB || ratio < 4.5 {
				t.Errorf("%s: %s has a contrast of %.2f", scheme, pair, ratio)
			}
		}
	}
}

// overflows is a page that shows each state in a frame of each width, and then
// says as JSON what does not fit into its frame.
const overflows = `<!DOCTYPE html><meta charset="utf-8"><body>%s<script>
onload = () => {
	const found = {};
	for (const frame of document.querySelectorAll("iframe")) {
		const doc = frame.contentDocument, width = doc.documentElement.clientWidth;
		const over = [];
		if (doc.documentElement.scrollWidth > width) over.push("the page is " + doc.documentElement.scrollWidth + " wide");
		for (const e of doc.body.querySelectorAll("*")) {
			const box = e.getBoundingClientRect();
			if (e.closest("thead") || !box.width) continue;
			if (box.right > width + 0.5 || box.left < -0.5 || getComputedStyle(e).display != "inline" && e.scrollWidth > e.clientWidth + 1)
				over.push(e.tagName + "." + e.className + ": " + e.textContent.trim().slice(0, 40));
		}
		found[frame.title] = {
			width, over: over.slice(0, 5),
			styled: getComputedStyle(doc.querySelector(".verdict")).borderTopStyle == "solid",
			stacked: [...doc.querySelectorAll("tbody tr")].every(e => getComputedStyle(e).display != "table-row"),
		};
	}
	document.body.textContent = "found" + JSON.stringify(found) + "end";
};
</script>`

// TestBrowser lays the page out at the widths of desks and of telephones.
func TestBrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium-headless-shell")
	if err != nil {
		if os.Getenv("FINTRACE_REQUIRE_KERNEL_TESTS") != "" {
			t.Fatal("FINTRACE_REQUIRE_KERNEL_TESTS is set, but", err)
		}
		t.Skip("not run:", err)
	}
	widths := []int{1280, 1000, 768, 400, 320}
	var frames strings.Builder
	for name, s := range states() {
		body := get(t, Handler(s.source()), "/?refresh=0").Body.String()
		for _, width := range widths {
			fmt.Fprintf(&frames, `<iframe title="%s/%d" width="%d" height="800" style="border:0" srcdoc="%s"></iframe>`,
				name, width, width, html.EscapeString(body))
		}
	}
	path := filepath.Join(t.TempDir(), "overflows.html")
	if err := os.WriteFile(path, fmt.Appendf(nil, overflows, frames.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--no-sandbox", "--headless", "--disable-gpu", "--hide-scrollbars",
		"--user-data-dir="+t.TempDir(), "--dump-dom", "file://"+path)
	cmd.WaitDelay = time.Second // its children have its output too
	dom, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(dom), "found{")
	text, _, ended := strings.Cut(text, "}end")
	var found map[string]struct {
		Width           int
		Over            []string
		Styled, Stacked bool
	}
	if err := json.Unmarshal([]byte("{"+html.UnescapeString(text)+"}"), &found); err != nil || !ended {
		t.Fatalf("%v: %.300s", err, dom)
	}
	for name := range states() {
		for _, width := range widths {
			f := found[fmt.Sprintf("%s/%d", name, width)]
			rows := strings.Contains(get(t, Handler(states()[name].source()), "/").Body.String(), "<tbody")
			if f.Width != width || len(f.Over) > 0 || !f.Styled || rows && f.Stacked != (width < 960) {
				t.Errorf("%s in %d pixels: %+v", name, width, f)
			}
		}
	}
}
