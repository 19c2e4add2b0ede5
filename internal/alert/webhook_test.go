// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/go-cmp/cmp"
	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/report"
)

// indented is JSON as one reads it.
func indented(t *testing.T, body []byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Indent(&b, body, "", "  "); err != nil {
		t.Fatalf("%s: %s", err, body)
	}
	return b.String() + "\n"
}

// hostile is what a process may call itself.
const hostile = "x\n\x1b[2Jevil\" a=b\u202e\xff"

// stuck is an alert with all that one can have.
func stuck(e Event) Alert {
	starts := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	a := Alert{
		ID: "5f3a", Event: e,
		Labels: Labels{Limit: "tcp_fin_timeout", Stage: "held", Side: "inbound", Proxy: "web", Port: 443,
			Peer: "192.0.2.7", Process: "haproxy"},
		StartsAt: starts, UpdatedAt: starts.Add(time.Minute),
		Count: 120, Peak: 150, Oldest: 312.5, LimitSource: "net.ipv4.tcp_fin_timeout 60s", LimitSec: 60, Maxconn: 2000,
		Summary: "120 connections from 192.0.2.7 to web:443 are held in FIN_WAIT2 by haproxy, the oldest for 5m12s",
		Examples: []report.Record{{Time: starts, Cookie: "1a", Local: "198.51.100.1:443", Remote: "192.0.2.7:40000",
			Side: "inbound", Stage: "held", Since: starts.Add(-time.Minute), Duration: 312.5, Limit: 60,
			LimitSource: "net.ipv4.tcp_fin_timeout 60s", Overdue: true, PID: 77, Comm: "haproxy"}},
		Advice: []report.Finding{{Severity: report.Critical, ID: "client-fin-unset", Title: "timeout client-fin is not set",
			Why: "Then timeout client counts, an hour.", Fix: []report.Edit{{Do: report.After,
				At: []haproxy.Pos{{File: "/etc/haproxy/haproxy.cfg", Line: 12}}, Lines: []string{"    timeout client-fin 30s"}}}}},
	}
	if e == Resolved {
		ends := starts.Add(10 * time.Minute)
		a.EndsAt, a.UpdatedAt, a.Count = &ends, ends, 0
	}
	return a
}

var thisHost = Origin{Host: "lb1", Version: "1.2.3", URL: "https://lb1.example/fintrace/"}

// network is one within a bubble of synctest: real sockets would not count as
// waiting there.
type network struct {
	conns chan net.Conn
	done  chan struct{}
}

func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.done:
		return nil, net.ErrClosed
	}
}

func (n *network) Close() error   { close(n.done); return nil }
func (n *network) Addr() net.Addr { return &net.TCPAddr{} }

// serve serves with a handler whatever is dialled with the option.
func serve(t *testing.T, handler http.HandlerFunc) promconfig.HTTPClientOption {
	n := &network{make(chan net.Conn), make(chan struct{})}
	var handlers sync.WaitGroup
	counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		handler(w, r)
	})
	server := &http.Server{Handler: counted, ErrorLog: log.New(io.Discard, "", 0)}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(n) }()
	t.Cleanup(func() {
		server.Close()
		handlers.Wait()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return promconfig.WithDialContextFunc(func(ctx context.Context, _, _ string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		select {
		case n.conns <- theirs:
			return ours, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
}

// The parts of a webhook that nobody may read in a log.
const (
	secretURL      = "http://user-s3cr3t:pass-s3cr3t@hook.example/T0s3cr3t/B0s3cr3t?token=query-s3cr3t"
	secretPattern  = "s3cr3t"
	withoutSecrets = "http://hook.example"
)

// noProxy keeps the proxies of the environment out of a test.
func noProxy(t *testing.T) {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		t.Setenv(name, "")
	}
}

func TestWebhook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noProxy(t)
		var body []byte
		var header http.Header
		option := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if header = r.Header; !r.Close {
				t.Error("a connection is kept")
			}
			body, _ = io.ReadAll(r.Body)
			w.WriteHeader(http.StatusAccepted)
		})
		s, err := newWebhook(WebhookConfig{Name: "hook", URL: secretURL, Headers: map[string]string{"X-Scope": "a"}}, thisHost, option)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Deliver(t.Context(), []Alert{stuck(Fired), stuck(Resolved)}); err != nil {
			t.Fatal(err)
		}
		golden.Check(t, "testdata/webhook.json", indented(t, body))
		for name, want := range map[string]string{"Content-Type": "application/json", "User-Agent": "fintrace/1.2.3", "X-Scope": "a"} {
			if got := header.Get(name); got != want {
				t.Errorf("%s: %q, not %q", name, got, want)
			}
		}
		if header.Get("Authorization") == "" {
			t.Error("the URL's user is not sent")
		}
		// Whatever a process calls itself, it is JSON.
		a := stuck(Fired)
		a.Labels.Process = hostile
		if err := s.Deliver(t.Context(), []Alert{a}); err != nil {
			t.Fatal(err)
		}
		if bytes.ContainsAny(body, "\n\x1b\xff") || !json.Valid(body) {
			t.Errorf("%q", body)
		}
	})
}

// What a receiver may do, and what becomes of the alert.
func TestWebhookReceivers(t *testing.T) {
	echo := func(w http.ResponseWriter, r *http.Request, code int) {
		w.WriteHeader(code)
		fmt.Fprintf(w, "no \x1b[31msuch hook: %s %s\nsecond line", r.URL, r.Header)
	}
	for _, test := range []struct {
		name    string
		receive func(w http.ResponseWriter, r *http.Request, attempt int)
		took    [2]time.Duration // until it is delivered or given up
		want    SinkStats
		log     string // part of the first line
	}{
		{
			name:    "takes it",
			receive: func(http.ResponseWriter, *http.Request, int) {},
			want:    SinkStats{Delivered: 1, Healthy: true},
		},
		{
			name: "hangs",
			receive: func(_ http.ResponseWriter, r *http.Request, attempt int) {
				if attempt == 1 {
					<-r.Context().Done()
				}
			},
			took: [2]time.Duration{11 * time.Second, 12 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "no answer within 10.0s",
		},
		{
			name: "hangs up",
			receive: func(w http.ResponseWriter, _ *http.Request, attempt int) {
				if attempt == 1 {
					panic(http.ErrAbortHandler)
				}
			},
			took: [2]time.Duration{time.Second, 2 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  withoutSecrets + ": EOF",
		},
		{
			name: "answers 500 at first",
			receive: func(w http.ResponseWriter, r *http.Request, attempt int) {
				if attempt == 1 {
					echo(w, r, 500)
				}
			},
			took: [2]time.Duration{time.Second, 2 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 500 Internal Server Error: no ?[31msuch hook: [redacted] map[",
		},
		{
			name: "is asked too often",
			receive: func(w http.ResponseWriter, _ *http.Request, attempt int) {
				if attempt == 1 {
					w.Header().Set("Retry-After", "90")
					w.WriteHeader(429)
				}
			},
			took: [2]time.Duration{90 * time.Second, 90 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 429 Too Many Requests",
		},
		{
			name: "is down until a date",
			receive: func(w http.ResponseWriter, _ *http.Request, attempt int) {
				if attempt == 1 {
					w.Header().Set("Retry-After", time.Now().Add(100*time.Second).UTC().Format(http.TimeFormat))
					w.WriteHeader(503)
				}
			},
			took: [2]time.Duration{99 * time.Second, 100 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 503 Service Unavailable",
		},
		{
			name:    "does not want it",
			receive: func(w http.ResponseWriter, r *http.Request, _ int) { echo(w, r, 400) },
			want:    SinkStats{Failed: 1, Shed: 1},
			log:     "answered 400 Bad Request: no ?[31msuch hook",
		},
		{
			name: "has been given a new secret",
			receive: func(w http.ResponseWriter, r *http.Request, attempt int) {
				if attempt == 1 {
					echo(w, r, 401)
				}
			},
			took: [2]time.Duration{time.Second, 2 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 401 Unauthorized",
		},
		{
			name: "answers a byte every 1.5 seconds",
			receive: func(w http.ResponseWriter, r *http.Request, attempt int) {
				if attempt == 1 {
					w.WriteHeader(500)
				}
				for range 60 {
					if _, err := w.Write([]byte("x")); err != nil {
						return
					}
					w.(http.Flusher).Flush()
					time.Sleep(1500 * time.Millisecond)
				}
			},
			// Ten seconds of the text of an error; a success needs no text.
			took: [2]time.Duration{11 * time.Second, 12 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 500 Internal Server Error: xxxxxxx\"",
		},
		{
			name: "answers without end",
			receive: func(w http.ResponseWriter, _ *http.Request, attempt int) {
				if attempt > 1 {
					return
				}
				w.WriteHeader(500)
				for {
					if _, err := w.Write(bytes.Repeat([]byte("y"), 1<<20)); err != nil {
						return
					}
				}
			},
			took: [2]time.Duration{time.Second, 2 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 500 Internal Server Error: " + strings.Repeat("y", maxSaid) + "…",
		},
		{
			name: "sends elsewhere",
			receive: func(w http.ResponseWriter, r *http.Request, attempt int) {
				switch {
				case r.URL.Path == "/elsewhere":
					t.Error("a redirect was followed")
				case attempt == 1:
					http.Redirect(w, r, "/elsewhere?"+r.URL.RawQuery, http.StatusPermanentRedirect)
				}
			},
			took: [2]time.Duration{time.Second, 2 * time.Second},
			want: SinkStats{Delivered: 1, Failed: 1, Healthy: true},
			log:  "answered 308 Permanent Redirect, and redirects are not followed",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				noProxy(t)
				var attempts atomic.Int64
				option := serve(t, func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					test.receive(w, r, int(attempts.Add(1)))
				})
				bearer := filepath.Join(t.TempDir(), "token")
				write(t, bearer, "bearer-s3cr3t\n")
				s, err := newWebhook(WebhookConfig{Name: "hook", URL: secretURL, Headers: map[string]string{"X-Key": "header-s3cr3t"},
					HTTP: promconfig.HTTPClientConfig{BearerTokenFile: bearer}}, thisHost, option)
				if err != nil {
					t.Fatal(err)
				}
				o := runOutbox(t, s)
				began := time.Now()
				o.Send(stuck(Fired))
				for synctest.Wait(); o.stats(t, "hook").Queued > 0; synctest.Wait() {
					time.Sleep(100 * time.Millisecond)
				}
				if took := time.Since(began); took < test.took[0] || took > test.took[1]+100*time.Millisecond {
					t.Errorf("it took %s, not %s to %s", took, test.took[0], test.took[1])
				}
				test.want.Name, test.want.Capacity = "hook", capacity
				if diff := cmp.Diff(test.want, o.stats(t, "hook")); diff != "" {
					t.Errorf("stats (-want +got):\n%s", diff)
				}
				first, _, _ := strings.Cut(o.log.String(), "\n")
				if !strings.Contains(first, test.log) || test.log != "" && !strings.Contains(first, withoutSecrets+":") {
					t.Errorf("the log has not %q:\n%s", test.log, o.log.String())
				}
				if log := o.log.String(); strings.Contains(log, secretPattern) || strings.Contains(log, "\x1b") ||
					strings.Contains(log, "second line") {
					t.Errorf("the log:\n%s", log)
				}
			})
		})
	}
}

// A receiver, or a proxy before it, may answer with all that it was sent.
func TestWebhookSecrets(t *testing.T) {
	noProxy(t)
	echo := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(500)
		fmt.Fprintf(w, "%s %s %s %s %s", r.URL, r.URL.Path, r.Header.Get("Authorization"), r.Header.Get("X-Key"), r.Header.Get("Proxy-Authorization"))
	}))
	defer echo.Close()
	dir := t.TempDir()
	file := func(text string) string {
		path := filepath.Join(dir, text)
		write(t, path, text+"\n")
		return path
	}
	through := func(user string) promconfig.HTTPClientConfig {
		u, err := url.Parse(echo.URL)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(user, "s3cr3t")
		return promconfig.HTTPClientConfig{ProxyConfig: promconfig.ProxyConfig{ProxyURL: promconfig.URL{URL: u}}}
	}
	host := strings.TrimPrefix(echo.URL, "http://")
	for _, test := range []struct {
		name    string
		c       WebhookConfig
		proxy   string // of the environment
		secrets []string
	}{
		{"in the path and the query", WebhookConfig{URL: echo.URL + "/T0s3cr3t/a%20s3cr3t?k=q%20s3cr3t"}, "", []string{"s3cr3t"}},
		{"in the userinfo", WebhookConfig{URL: "http://me:s3cr3t@" + host}, "", []string{basicAuth("me", "s3cr3t")}},
		{"in the place of a name", WebhookConfig{URL: "http://s3cr3t@" + host}, "", []string{basicAuth("s3cr3t", "")}},
		{"in a header", WebhookConfig{URL: echo.URL, Headers: map[string]string{"X-Key": "s3cr3t"}}, "", []string{"s3cr3t"}},
		{"in the file of a header", WebhookConfig{URL: echo.URL, HTTP: promconfig.HTTPClientConfig{HTTPHeaders: &promconfig.Headers{
			Headers: map[string]promconfig.Header{"X-Key": {Files: []string{file("key-s3cr3t")}}}}}}, "", []string{"s3cr3t"}},
		{"among the headers", WebhookConfig{URL: echo.URL, HTTP: promconfig.HTTPClientConfig{HTTPHeaders: &promconfig.Headers{
			Headers: map[string]promconfig.Header{"X-Key": {Values: []string{"s3cr3t"}, Secrets: []promconfig.Secret{"0s3cr3t"}}}}}}, "", []string{"s3cr3t"}},
		{"in the file of a token", WebhookConfig{URL: echo.URL, HTTP: promconfig.HTTPClientConfig{
			BearerTokenFile: file("token-s3cr3t")}}, "", []string{"s3cr3t"}},
		{"as a token", WebhookConfig{URL: echo.URL, HTTP: promconfig.HTTPClientConfig{BearerToken: "s3cr3t"}}, "", []string{"s3cr3t"}},
		{"in the file of a password", WebhookConfig{URL: echo.URL, HTTP: promconfig.HTTPClientConfig{BasicAuth: &promconfig.BasicAuth{
			Username: "me", PasswordFile: file("password-s3cr3t")}}}, "", []string{basicAuth("me", "password-s3cr3t")[4:]}},
		{"of a proxy", WebhookConfig{URL: "http://hook.invalid", HTTP: through("me")}, "", []string{basicAuth("me", "s3cr3t")}},
		{"of a proxy of the environment", WebhookConfig{URL: "http://hook.invalid"}, "http://me:s3cr3t@" + host, []string{basicAuth("me", "s3cr3t")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("HTTP_PROXY", test.proxy)
			test.c.Name = "hook"
			s, err := NewWebhook(test.c, thisHost)
			if err != nil {
				t.Fatal(err)
			}
			err = s.Deliver(t.Context(), []Alert{stuck(Fired)})
			if err == nil || !strings.Contains(err.Error(), "[redacted]") {
				t.Errorf("%v", err)
			}
			for _, secret := range test.secrets {
				if strings.Contains(fmt.Sprint(err), secret) {
					t.Errorf("%v", err)
				}
			}
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A storm is told in requests of a bounded size.
func TestWebhookMaxAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noProxy(t)
		var sizes []int
		option := serve(t, func(_ http.ResponseWriter, r *http.Request) {
			var b struct{ Alerts []struct{} }
			if err := json.NewDecoder(r.Body).Decode(&b); err != nil {
				t.Error(err)
			}
			sizes = append(sizes, len(b.Alerts))
		})
		s, err := newWebhook(WebhookConfig{Name: "hook", URL: secretURL, MaxAlerts: 20}, thisHost, option)
		if err != nil {
			t.Fatal(err)
		}
		o := runOutbox(t, s)
		var all []Alert
		for i := range 50 {
			all = append(all, event(fmt.Sprint(i), Fired, 1))
		}
		o.Send(all...)
		synctest.Wait()
		if diff := cmp.Diff([]int{20, 20, 10}, sizes); diff != "" {
			t.Errorf("alerts of each request (-want +got):\n%s", diff)
		}
	})
}

// Secrets are those that the files hold at the time of each attempt, the URL too.
func TestWebhookRotation(t *testing.T) {
	noProxy(t)
	var got, path string
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		got = strings.Join([]string{r.Header.Get("Authorization"), password, r.Header.Get("X-Key")}, " ")
		path = r.URL.Path
	}))
	defer server.Close()
	dir := t.TempDir()
	file := func(name, text string) string {
		write(t, filepath.Join(dir, name), text)
		return filepath.Join(dir, name)
	}
	bearer := WebhookConfig{Name: "hook", URLFile: file("url", server.URL+"/one\n"), HTTP: promconfig.HTTPClientConfig{
		Authorization: &promconfig.Authorization{CredentialsFile: file("token", "one\n")},
		HTTPHeaders:   &promconfig.Headers{Headers: map[string]promconfig.Header{"X-Key": {Files: []string{file("key", "k1\n")}}}},
	}}
	basic := WebhookConfig{Name: "hook", URL: server.URL, HTTP: promconfig.HTTPClientConfig{
		BasicAuth: &promconfig.BasicAuth{Username: "me", PasswordFile: file("password", "p1\n")}}}
	sinks := map[string]Sink{}
	for name, c := range map[string]WebhookConfig{"bearer": bearer, "basic": basic} {
		s, err := NewWebhook(c, thisHost)
		if err != nil {
			t.Fatal(err)
		}
		sinks[name] = s
	}
	check := func(sink, want, wantPath string) {
		t.Helper()
		if err := sinks[sink].Deliver(t.Context(), []Alert{stuck(Fired)}); err != nil {
			t.Fatal(err)
		}
		if got != want || path != wantPath {
			t.Errorf("%q at %s, not %q at %s", got, path, want, wantPath)
		}
	}
	check("bearer", "Bearer one  k1", "/one")
	check("basic", "Basic "+basicAuth("me", "p1")+" p1 ", "/")
	file("token", "two")
	file("key", "k2")
	file("url", server.URL+"/two")
	file("password", "p2")
	check("bearer", "Bearer two  k2", "/two")
	check("basic", "Basic "+basicAuth("me", "p2")+" p2 ", "/")

	// A file that is gone for a moment is an error that says which, and is mended.
	for _, name := range []string{"token", "url"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		os.Remove(filepath.Join(dir, name))
		err = sinks["bearer"].Deliver(t.Context(), []Alert{stuck(Fired)})
		if permanent := (*backoff.PermanentError)(nil); err == nil || errors.As(err, &permanent) || !strings.Contains(err.Error(), filepath.Join(dir, name)) {
			t.Errorf("without %s: %v", name, err)
		}
		write(t, filepath.Join(dir, name), string(text))
	}
	check("bearer", "Bearer two  k2", "/two")
}

// On real sockets: nobody listens, nobody is known by that name, and TLS.
func TestWebhookTransport(t *testing.T) {
	noProxy(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNoContent)
	}))
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	secure.StartTLS()
	defer secure.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	write(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})))

	const path = "/T0s3cr3t/B0s3cr3t?token=query-s3cr3t"
	for _, test := range []struct {
		name string
		url  string
		tls  promconfig.TLSConfig
		want string // "": no error
	}{
		{"refused", "http://" + closed.Addr().String(), promconfig.TLSConfig{}, "http://" + closed.Addr().String() + ": dial tcp " + closed.Addr().String() + ": connect: connection refused"},
		{"a certificate of nobody", secure.URL, promconfig.TLSConfig{}, secure.URL + ": tls: failed to verify certificate: x509: certificate signed by unknown authority"},
		{"known", secure.URL, promconfig.TLSConfig{CAFile: ca}, ""},
		{"known by another name", secure.URL, promconfig.TLSConfig{CAFile: ca, ServerName: "other.test"}, secure.URL + ": tls: failed to verify certificate: x509: certificate is valid for example.com, *.example.com, not other.test"},
		{"not verified", secure.URL, promconfig.TLSConfig{InsecureSkipVerify: true}, ""},
		{"no TLS there", strings.Replace(plain.URL, "http:", "https:", 1), promconfig.TLSConfig{}, strings.Replace(plain.URL, "http:", "https:", 1) + ": http: server gave HTTP response to HTTPS client"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := NewWebhook(WebhookConfig{Name: "hook", URL: test.url + path, HTTP: promconfig.HTTPClientConfig{TLSConfig: test.tls}}, thisHost)
			if err != nil {
				t.Fatal(err)
			}
			err = s.Deliver(t.Context(), []Alert{stuck(Fired)})
			if got := fmt.Sprint(err); got != test.want && (test.want != "" || err != nil) {
				t.Errorf("%s", got)
			}
			if permanent := (*backoff.PermanentError)(nil); errors.As(err, &permanent) {
				t.Error("it is not tried again")
			}
		})
	}
}

// A proxy is that of the settings, else that of the environment.
func TestWebhookProxy(t *testing.T) {
	noProxy(t)
	var through string
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { through = r.URL.Host }))
	defer proxy.Close()
	u, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]promconfig.HTTPClientConfig{
		"of the environment": {},
		"of its own":         {ProxyConfig: promconfig.ProxyConfig{ProxyURL: promconfig.URL{URL: u}}},
	} {
		t.Setenv("HTTP_PROXY", "")
		if c.ProxyURL.URL == nil {
			t.Setenv("HTTP_PROXY", proxy.URL)
		}
		through = ""
		s, err := NewWebhook(WebhookConfig{Name: "hook", URL: "http://hook.invalid/T0s3cr3t", HTTP: c}, thisHost)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Deliver(t.Context(), []Alert{stuck(Fired)}); err != nil || through != "hook.invalid" {
			t.Errorf("by a proxy %s: %v, through %q", name, err, through)
		}
	}
}

func TestWebhookRefused(t *testing.T) {
	urlFile := filepath.Join(t.TempDir(), "url")
	write(t, urlFile, "https://user:s3cr3t/@hook.example")
	for _, test := range []struct {
		c    WebhookConfig
		want string
	}{
		{WebhookConfig{}, "hook: it has neither a URL nor a file with one"},
		{WebhookConfig{URL: "http://a", URLFile: "b"}, "hook: it has a URL and a file with one; only one of these can be"},
		{WebhookConfig{URL: "hook.example/s3cr3t"}, "hook: the URL does not begin with https:// or http://"},
		{WebhookConfig{URL: "https:///s3cr3t"}, "hook: the URL has no host"},
		{WebhookConfig{URL: "https://user:s3cr3t/@hook.example"}, "hook: the URL cannot be parsed"},
		{WebhookConfig{URL: "http://a", Headers: map[string]string{"a b": "s3cr3t"}}, `hook: "a b" is no name of a header`},
		{WebhookConfig{URL: "http://a", Headers: map[string]string{"A": "s3cr3t\n"}}, "hook: the value of the header A has a control character"},
		{WebhookConfig{URL: "http://a", Headers: map[string]string{"host": "b"}}, "hook: the header host is that of the URL"},
		{WebhookConfig{URL: "http://a", HTTP: promconfig.HTTPClientConfig{OAuth2: &promconfig.OAuth2{}}}, "hook: oauth2 is not supported"},
		{WebhookConfig{URL: "http://a", HTTP: promconfig.HTTPClientConfig{TLSConfig: promconfig.TLSConfig{CAFile: "/nowhere"}}},
			"hook: unable to read CA cert: unable to read file /nowhere: open /nowhere: no such file or directory"},
	} {
		test.c.Name = "hook"
		if _, err := NewWebhook(test.c, thisHost); fmt.Sprint(err) != test.want {
			t.Errorf("%v\n not %s", err, test.want)
		}
	}
	s, err := NewWebhook(WebhookConfig{Name: "hook", URLFile: urlFile}, thisHost)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Deliver(t.Context(), []Alert{stuck(Fired)}); fmt.Sprint(err) != urlFile+": the URL cannot be parsed" {
		t.Error(err)
	}
}

// Two of one configuration are the same; with another setting they are not.
func TestWebhookSettings(t *testing.T) {
	of := func(change func(*WebhookConfig, *Origin)) any {
		c, from := WebhookConfig{Name: "hook", URL: "http://a", Headers: map[string]string{"A": "b"},
			HTTP: promconfig.HTTPClientConfig{Authorization: &promconfig.Authorization{CredentialsFile: "f"}}}, thisHost
		change(&c, &from)
		s, err := NewWebhook(c, from)
		if err != nil {
			t.Fatal(err)
		}
		return s.Settings
	}
	first := of(func(*WebhookConfig, *Origin) {})
	if !sameSettings(first, of(func(*WebhookConfig, *Origin) {})) {
		t.Error("the same settings are others")
	}
	for i, change := range []func(*WebhookConfig, *Origin){
		func(c *WebhookConfig, _ *Origin) { c.URL = "http://b" },
		func(c *WebhookConfig, _ *Origin) { c.Headers["A"] = "c" },
		func(c *WebhookConfig, _ *Origin) { c.HTTP.Authorization.CredentialsFile = "g" },
		func(c *WebhookConfig, _ *Origin) { c.Timeout = 1 },
		func(_ *WebhookConfig, from *Origin) { from.URL = "" },
	} {
		if sameSettings(first, of(change)) {
			t.Errorf("change %d is none", i)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"":                              0,
		"120":                           2 * time.Minute,
		"-1":                            0,
		"1.5":                           0,
		"99999999999999999999":          0,
		"Sun, 22 Nov 2026 10:01:00 GMT": time.Minute,
		"Sun, 22 Nov 2026 09:00:00 GMT": 0,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q: %s", header, got)
		}
	}
}
