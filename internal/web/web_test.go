// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestHealth(t *testing.T) {
	s := states()["calm"].source()
	for _, test := range []struct {
		path           string
		healthy, ready error
		code           int
		body           string
	}{
		{"/healthz", nil, errors.New("not yet"), 200, "ok\n"},
		{"/healthz", errors.New("the loop has not turned for 31s"), nil, 503, "the loop has not turned for 31s\n"},
		{"/readyz", errors.New("hangs"), nil, 200, "ok\n"},
		{"/readyz", nil, errors.New("not seeded\nyet\x1b"), 503, "not seeded?yet?\n"},
	} {
		s.Healthy, s.Ready = func() error { return test.healthy }, func() error { return test.ready }
		w := get(t, Handler(s), test.path)
		if w.Code != test.code || w.Body.String() != test.body || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%s: %d %q %v", test.path, w.Code, w.Body, w.Header())
		}
	}
}

func TestMetrics(t *testing.T) {
	s := states()["calm"].source()
	s.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		io.WriteString(w, "fintrace_up 1\n")
	})
	w := get(t, Handler(s), "/metrics")
	if w.Body.String() != "fintrace_up 1\n" || w.Header().Get("Content-Type") != "text/plain; version=0.0.4" {
		t.Errorf("%q %v", w.Body, w.Header())
	}
}

func TestRefusals(t *testing.T) {
	h := Handler(states()["calm"].source())
	for _, test := range []struct {
		method, target string
		code           int
		body           string
	}{
		{"GET", "/favicon.ico", 404, "there are /, /metrics, /api/v1/connections, /api/v1/alerts, /healthz and /readyz\n"},
		{"GET", "/metrics/", 404, "there are /, /metrics, /api/v1/connections, /api/v1/alerts, /healthz and /readyz\n"},
		{"GET", "/api/v2", 404, `{"error":"there are /, /metrics, /api/v1/connections, /api/v1/alerts, /healthz and /readyz"}` + "\n"},
		{"POST", "/", 405, "everything here is only read: GET or HEAD\n"},
		{"OPTIONS", "/nowhere", 405, "everything here is only read: GET or HEAD\n"},
		{"DELETE", "/api/v1/connections", 405, `{"error":"everything here is only read: GET or HEAD"}` + "\n"},
		{"GET", "/api/v1/alerts?all=1", 400, `{"error":"alerts take no parameters"}` + "\n"},
		{"HEAD", "/healthz", 200, "ok\n"}, // what is written to HEAD, the server drops
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(test.method, test.target, nil))
		if w.Code != test.code || w.Body.String() != test.body {
			t.Errorf("%s %s: %d %q, want %d %q", test.method, test.target, w.Code, w.Body, test.code, test.body)
		}
		if allow := w.Header().Get("Allow"); (allow == "GET, HEAD") != (test.code == 405) {
			t.Errorf("%s %s: Allow: %s", test.method, test.target, allow)
		}
	}
}

func TestHeaders(t *testing.T) {
	h := Handler(states()["calm"].source())
	for _, path := range []string{"/", "/metrics", "/api/v1/connections", "/api/v1/alerts", "/healthz", "/nowhere"} {
		header := get(t, h, path).Header()
		for name, want := range map[string]string{
			"Content-Security-Policy":      contentPolicy,
			"X-Content-Type-Options":       "nosniff",
			"X-Frame-Options":              "DENY",
			"Referrer-Policy":              "no-referrer",
			"Cross-Origin-Opener-Policy":   "same-origin",
			"Cross-Origin-Resource-Policy": "same-origin",
			"Cache-Control":                "no-store",
			"Set-Cookie":                   "",
			"Access-Control-Allow-Origin":  "",
		} {
			if got := header.Get(name); got != want {
				t.Errorf("%s: %s: %q, want %q", path, name, got, want)
			}
		}
	}
	// What the web configuration file sets has come first.
	w := httptest.NewRecorder()
	w.Header().Set("X-Frame-Options", "sameorigin")
	h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if got := w.Header().Values("X-Frame-Options"); len(got) != 1 || got[0] != "sameorigin" {
		t.Errorf("X-Frame-Options: %q", got)
	}
}

func TestAPI(t *testing.T) {
	s := states()["one-alert"]
	s.records, s.total = s.records[:2], 42
	hostileOne := states()["hostile"].records[0]
	s.records = append(s.records, hostileOne)
	h := Handler(s.source())
	for name, path := range map[string]string{"connections.json": "/api/v1/connections", "alerts.json": "/api/v1/alerts"} {
		w := get(t, h, path)
		if w.Code != 200 || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %s", path, w.Code, w.Header().Get("Content-Type"))
		}
		var pretty any
		if err := json.Unmarshal(w.Body.Bytes(), &pretty); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		golden.Check(t, "testdata/"+name, w.Body.String())
	}

	empty := state{}.source()
	for path, want := range map[string]string{
		"/api/v1/connections": `{"at":"2026-11-22T21:55:03.25Z","total":0,"connections":[]}` + "\n",
		"/api/v1/alerts":      `{"alerts":[]}` + "\n",
	} {
		if got := get(t, Handler(empty), path).Body.String(); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestQuery(t *testing.T) {
	prefix := netip.MustParsePrefix
	var asked Query
	s := states()["calm"].source()
	s.Connections = func(_ context.Context, q Query) (Connections, error) {
		asked = q
		return Connections{}, nil
	}
	s.Netns = func(name string) (uint32, error) {
		if name == "green" {
			return 0, errors.New("no such file")
		}
		return 4026532245, nil
	}
	for _, test := range []struct {
		query string
		want  Query
		err   string
	}{
		{query: "", want: Query{Limit: 1000}},
		{query: "overdue=1&limit=5", want: Query{Overdue: true, Limit: 5}},
		{query: "overdue=false", want: Query{Limit: 1000}},
		{query: "port=80,443&port=8080&peer=10.0.0.0/8,::1", want: Query{Limit: 1000, Filter: track.Filter{Match: limits.Match{
			Ports: []uint16{80, 443, 8080}, Peers: []netip.Prefix{prefix("10.0.0.0/8"), prefix("::1/128")}}}}},
		{query: "process=haproxy&process=a,b&proxy=www&netns=blue&netns=17", want: Query{Limit: 1000, Filter: track.Filter{Match: limits.Match{
			Processes: []string{"haproxy", "a,b"}, Proxies: []string{"www"}, Netns: []uint32{4026532245, 17}}}}},
		{query: "side=outbound&stage=orphaned&min_duration=1m30s", want: Query{Limit: 1000, Filter: track.Filter{MinDuration: 90 * time.Second,
			Match: limits.Match{Side: events.Outbound, Stage: events.Orphaned}}}},

		{query: "colour=red", err: `the parameters are overdue, port, peer, process, proxy, netns, side, stage, min_duration, limit, not "colour"`},
		{query: "min-duration=1s", err: `the parameters are overdue, port, peer, process, proxy, netns, side, stage, min_duration, limit, not "min-duration"`},
		{query: "port=1%zz", err: `the query is of the form name=value&name=value: invalid URL escape "%zz"`},
		{query: "overdue", err: `overdue: it is 1 or 0, not ""`},
		{query: "overdue=yes", err: `overdue: it is 1 or 0, not "yes"`},
		{query: "overdue=1&overdue=0", err: `overdue: it is given 2 times`},
		{query: "port=0", err: `port: a port is a number from 1 to 65535, not "0"`},
		{query: "port=", err: `port: a port is a number from 1 to 65535, not ""`},
		{query: "port=80,%1b", err: `port: a port is a number from 1 to 65535, not "\x1b"`},
		{query: "peer=example.net", err: `peer: a peer is an address or a block such as 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32, not "example.net"`},
		{query: "process=", err: `process: it is a name, and not empty`},
		{query: "side=left", err: `side: "left" is none of inbound, outbound`},
		{query: "stage=held&stage=held", err: `stage: it is given 2 times`},
		{query: "stage=dead", err: `stage: "dead" is none of held, orphaned, minisock`},
		{query: "min_duration=5", err: `min_duration: a duration is a number and its unit, such as 500ms, 30s or 1h30m, not "5"`},
		{query: "limit=0", err: `limit: a limit is a number from 1 to 10000, not "0"`},
		{query: "limit=10001", err: `limit: a limit is a number from 1 to 10000, not "10001"`},
		{query: "netns=green", err: `netns: a network namespace is a name in /run/netns or an inode number, not "green"`},
		{query: "netns=/proc/1/ns/net", err: `netns: a network namespace is a name in /run/netns or an inode number, not "/proc/1/ns/net"`},
		{query: "port=" + strings.Repeat("1,", 100) + "1", err: `port: 101 values, of at most 100`},
	} {
		asked = Query{}
		w := get(t, Handler(s), "/api/v1/connections?"+test.query)
		if test.err != "" {
			want, err := json.Marshal(map[string]string{"error": test.err})
			if err != nil {
				t.Fatal(err)
			}
			if w.Code != 400 || w.Body.String() != string(want)+"\n" {
				t.Errorf("%s: %d %s, want %s", test.query, w.Code, w.Body, want)
			}
		}
		if diff := cmp.Diff(test.want, asked, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.query, diff)
		}
	}
	s.Netns = nil
	if w := get(t, Handler(s), "/api/v1/connections?netns=blue"); w.Code != 400 {
		t.Errorf("a name where nobody knows names: %d %s", w.Code, w.Body)
	}
}

// A loop that is busy is waited for within a bound, and then not any more.
func TestBusy(t *testing.T) {
	for _, path := range []string{"/", "/api/v1/connections", "/api/v1/alerts"} {
		synctest.Test(t, func(t *testing.T) {
			s := states()["calm"].source()
			hang := func(ctx context.Context) error {
				<-ctx.Done()
				return fmt.Errorf("ask the loop: %w", ctx.Err())
			}
			s.Connections = func(ctx context.Context, _ Query) (Connections, error) { return Connections{}, hang(ctx) }
			s.Alerts = func(ctx context.Context) ([]alert.Alert, error) { return nil, hang(ctx) }
			began := time.Now()
			w := get(t, Handler(s), path)
			if took := time.Since(began); w.Code != 503 || took != answerWithin {
				t.Errorf("%s: %d after %s", path, w.Code, took)
			}
			if !strings.Contains(w.Body.String(), "the loop is busy, and had no time within 2s") {
				t.Errorf("%s: %s", path, w.Body)
			}
		})
	}
}

// What the daemon says of why it cannot answer may quote anything.
func TestBroken(t *testing.T) {
	s := states()["hostile"]
	s.err = errors.New(hostile)
	body := get(t, Handler(s.source()), "/api/v1/alerts").Body.String()
	if strings.Count(body, "\n") != 1 || strings.Contains(body, "<") || strings.Contains(body, "\x1b") {
		t.Errorf("%q", body)
	}
	if body := get(t, Handler(s.source()), "/").Body.String(); !strings.Contains(body, "&lt;script&gt;") || strings.Contains(body, "\x1b") {
		t.Errorf("%q", body)
	}
}

// So many at a time: those who come beyond are told at once, and health always.
func TestAtMost(t *testing.T) {
	for path, most := range map[string]int{"/": requestsAtMost, "/api/v1/connections": listingsAtMost} {
		synctest.Test(t, func(t *testing.T) {
			s := states()["calm"].source()
			var waiting atomic.Int32
			let := make(chan struct{})
			s.Connections = func(context.Context, Query) (Connections, error) {
				waiting.Add(1)
				<-let
				return Connections{}, nil
			}
			s.Status = func(context.Context) (Status, error) {
				if path == "/" {
					waiting.Add(1)
					<-let
				}
				return Status{}, nil
			}
			h := Handler(s)
			for range most {
				go get(t, h, path)
				synctest.Wait()
			}
			if n := int(waiting.Load()); n != most {
				t.Errorf("%s: %d are being answered", path, n)
			}
			if w := get(t, h, path); w.Code != 503 || w.Header().Get("Retry-After") == "" || strings.Count(w.Body.String(), "\n") != 1 {
				t.Errorf("%s: one more: %d %s", path, w.Code, w.Body)
			}
			if w := get(t, h, "/healthz"); w.Code != 200 {
				t.Errorf("%s: health: %d", path, w.Code)
			}
			if w := get(t, h, "/metrics"); (w.Code == 503) != (path == "/") {
				t.Errorf("%s: metrics: %d", path, w.Code)
			}
			close(let)
			synctest.Wait()
			if w := get(t, h, path); w.Code != 200 {
				t.Errorf("%s: afterwards: %d", path, w.Code)
			}
		})
	}
}

func TestRefuseHost(t *testing.T) {
	s := states()["calm"].source()
	s.Hosts = []string{"lb1"}
	h := Handler(s)
	ask := func(local, host, path string) int {
		r := httptest.NewRequest("GET", path, nil)
		r.Host = host
		at := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local))
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(at)))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	for _, host := range []string{"localhost", "localhost:19818", "LocalHost.", "a.localhost:1", "127.0.0.1:19818", "[::1]:19818", "::1", "10.1.2.3", "lb1:19818", "LB1", ""} {
		if code := ask("127.0.0.1:19818", host, "/"); code != 200 {
			t.Errorf("%q on loopback: %d", host, code)
		}
	}
	for _, local := range []string{"127.0.0.1:19818", "[::1]:19818", "[::ffff:127.0.0.1]:19818"} {
		for _, host := range []string{"evil.example", "evil.example:19818", "lb1.evil.example", "localhost.evil.example", "127.0.0.1.evil.example"} {
			if code := ask(local, host, "/metrics"); code != http.StatusMisdirectedRequest {
				t.Errorf("%q at %s: %d", host, local, code)
			}
		}
	}
	if code := ask("127.0.0.1:19818", "evil.example", "/healthz"); code != 200 {
		t.Errorf("health: %d", code)
	}
	if code := ask("10.1.2.3:19818", "fintrace.example", "/"); code != 200 {
		t.Errorf("on another address: %d", code)
	}
}

// As many connections as may be asked for, in a bounded time.
func TestListMost(t *testing.T) {
	s := state{}
	for range listMost {
		s.records = append(s.records, record(time.Minute, true, "192.0.2.1:443", "198.51.100.22:33084"))
	}
	w := get(t, Handler(s.source()), fmt.Sprint("/api/v1/connections?limit=", listMost))
	var got struct{ Connections []report.Record }
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || len(got.Connections) != listMost {
		t.Errorf("%d, %v", len(got.Connections), err)
	}
	t.Logf("%d bytes", w.Body.Len())
}
