// SPDX-License-Identifier: Apache-2.0

package web

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/selfsigned"
)

// A served is a Serve that is under way.
type served struct {
	addrs []string
	stop  context.CancelFunc
	done  chan error
	log   *logged
}

// logged is what was logged so far.
type logged struct {
	sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.Lock()
	defer l.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.Lock()
	defer l.Unlock()
	return l.text.String()
}

// start serves on some addresses until the test ends.
func start(t *testing.T, configFile string, h http.Handler, addresses ...string) *served {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s := &served{stop: cancel, done: make(chan error, 1), log: new(logged)}
	ready := make(chan []net.Addr, 1)
	go func() {
		s.done <- Serve(ctx, addresses, configFile, h, slog.New(slog.NewTextHandler(s.log, nil)), func(a []net.Addr) { ready <- a })
	}()
	select {
	case addrs := <-ready:
		for _, a := range addrs {
			s.addrs = append(s.addrs, a.String())
		}
	case err := <-s.done:
		t.Fatal("serve:", err)
	}
	t.Cleanup(func() {
		cancel()
		<-s.done
	})
	return s
}

// ended waits for the end of Serve.
func (s *served) ended(t *testing.T) (took time.Duration) {
	t.Helper()
	began := time.Now()
	s.stop()
	err := <-s.done
	if err != nil {
		t.Error("the end:", err)
	}
	s.done <- nil // for the cleanup
	return time.Since(began)
}

// client is one that keeps no connections.
func client(t *testing.T, trusted *x509.CertPool) *http.Client {
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: trusted}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

func fetch(t *testing.T, c *http.Client, url, user, password string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		r.SetBasicAuth(user, password)
	}
	response, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

func TestServe(t *testing.T) {
	s := start(t, "", Handler(states()["calm"].source()), "127.0.0.1:0", "127.0.0.2:0", "[::1]:0")
	if len(s.addrs) != 3 {
		t.Fatal(s.addrs)
	}
	c := client(t, nil)
	for _, addr := range s.addrs {
		if r, body := fetch(t, c, "http://"+addr+"/healthz", "", ""); r.StatusCode != 200 || body != "ok\n" {
			t.Errorf("%s: %d %s", addr, r.StatusCode, body)
		}
		r, err := http.NewRequest("GET", "http://"+addr+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = "evil.example"
		response, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusMisdirectedRequest {
			t.Errorf("%s under another name: %d", addr, response.StatusCode)
		}
	}
	if took := s.ended(t); took > time.Second {
		t.Errorf("with nothing to wait for, it ended after %s", took)
	}
	for _, addr := range s.addrs {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			t.Errorf("%s is still listened on", addr)
		}
	}
}

func TestServeRefusals(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	unknown := file("unknown.yml", "tls_server_config:\n  cert_fiel: a\n  key_fiel: b\n")
	missing := file("missing.yml", "tls_server_config:\n  cert_file: a.pem\n  key_file: b.pem\n")
	password := file("password.yml", "basic_auth_users:\n  anna: secret\n")
	for _, test := range []struct{ address, config, want string }{
		{taken.Addr().String(), "", "web listener " + taken.Addr().String() + ": another process listens there (ss -ltnp shows which)"},
		{"192.0.2.1:0", "", "web listener 192.0.2.1:0: this host does not have that address"},
		{"127.0.0.1", "", "web listener 127.0.0.1: address 127.0.0.1: missing port in address"},
		{"127.0.0.1:70000", "", "web listener 127.0.0.1:70000: address 70000: invalid port"},
		{"127.0.0.1:0", unknown, "web configuration " + unknown + ": yaml: unmarshal errors: line 2: field cert_fiel not found in type web.TLSConfig line 3: field key_fiel not found in type web.TLSConfig"},
		{"127.0.0.1:0", missing, "web configuration " + missing + ": failed to read cert_file (" + filepath.Join(dir, "a.pem") + "): open " + filepath.Join(dir, "a.pem") + ": no such file or directory"},
		{"127.0.0.1:0", password, "web configuration " + password + ": crypto/bcrypt: hashedSecret too short to be a bcrypted password"},
		{"127.0.0.1:0", filepath.Join(dir, "none"), "web configuration " + filepath.Join(dir, "none") + ": open " + filepath.Join(dir, "none") + ": no such file or directory"},
	} {
		// The first address can be had each time: it is let go again.
		err := Serve(t.Context(), []string{free.Addr().String(), test.address}, test.config, http.NotFoundHandler(), slog.New(slog.DiscardHandler),
			func(addrs []net.Addr) { t.Errorf("%s is listened on", addrs) })
		if err == nil || err.Error() != test.want {
			t.Errorf("%s %s:\n%v\nwant\n%s", test.address, test.config, err, test.want)
		}
	}
}

// certificate writes one for 127.0.0.1, and returns who trusts it.
func certificate(t *testing.T, dir, serial string) *x509.CertPool {
	t.Helper()
	number, _ := new(big.Int).SetString(serial, 10)
	certificate, key, err := selfsigned.PEM(x509.Certificate{
		SerialNumber: number,
		IPAddresses:  []net.IP{netip.MustParseAddr("127.0.0.1").AsSlice()},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"cert.pem": certificate, "key.pem": key} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(certificate) {
		t.Fatal("no certificate in PEM")
	}
	return pool
}

// TLS, users, and both anew while it serves.
func TestServeTLS(t *testing.T) {
	dir := t.TempDir()
	trusted := certificate(t, dir, "1")
	// The bcrypt hashes of "right" and of "newer", of the least cost.
	const right, newer = "$2a$04$UNNutPcgvCdQF.bVXnchTeZkhzDBfjOuL.a7i3FxkbcQd/gsamN6a", "$2a$04$KWKmr1kts6e.9IzVw5yJd./tIRdYtUydIpdfAg4ekl8bWYrWQdu1."
	config := filepath.Join(dir, "web.yml")
	write := func(hash string) {
		if err := os.WriteFile(config, fmt.Appendf(nil, "tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\nbasic_auth_users:\n  anna: %s\n", hash), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(right)
	s := start(t, config, Handler(states()["one-alert"].source()), "127.0.0.1:0", "127.0.0.1:0")
	for _, addr := range s.addrs {
		c := client(t, trusted)
		for _, test := range []struct {
			user, password string
			code           int
		}{{"anna", "right", 200}, {"anna", "wrong", 401}, {"otto", "right", 401}, {"", "", 401}} {
			r, body := fetch(t, c, "https://"+addr+"/", test.user, test.password)
			if r.StatusCode != test.code || strings.Contains(body, "198.51.100.22") != (test.code == 200) || r.ProtoMajor != 2 {
				t.Errorf("%s as %q with %q: %s %d", addr, test.user, test.password, r.Proto, r.StatusCode)
			}
		}
		if r, _ := fetch(t, client(t, nil), "http://"+addr+"/", "anna", "right"); r.StatusCode != 400 {
			t.Errorf("%s without TLS: %d", addr, r.StatusCode)
		}
		if _, err := client(t, nil).Get("https://" + addr + "/"); err == nil {
			t.Error("who trusts nobody trusts the certificate")
		}
	}
	if strings.Contains(s.log.String(), "TLS handshake error") {
		t.Errorf("broken handshakes are logged:\n%s", s.log)
	}

	write(newer)
	trusted = certificate(t, dir, "2")
	c := client(t, trusted)
	if r, _ := fetch(t, c, "https://"+s.addrs[0]+"/", "anna", "right"); r.StatusCode != 401 {
		t.Errorf("the old password: %d", r.StatusCode)
	}
	if r, _ := fetch(t, c, "https://"+s.addrs[0]+"/", "anna", "newer"); r.StatusCode != 200 {
		t.Errorf("the new password: %d", r.StatusCode)
	}
	if took := s.ended(t); took > time.Second {
		t.Errorf("it ended after %s", took)
	}
}

// Clients that hang, in whatever part of a request, delay the end by the bound and no more.
func TestServeHanging(t *testing.T) {
	answering, written := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/endless": // its reader reads nothing
			answering <- struct{}{}
			chunk := make([]byte, 1<<16)
			for {
				if _, err := w.Write(chunk); err != nil {
					close(written)
					return
				}
			}
		case "/loop": // it waits for a loop that will not answer any more
			answering <- struct{}{}
			<-r.Context().Done()
			refuse(w, r, r.Context().Err())
		}
	})
	s := start(t, "", h, "127.0.0.1:0")
	say := func(text string) net.Conn {
		c, err := net.Dial("tcp", s.addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		return c
	}
	waits := say("GET /loop HTTP/1.1\r\nHost: localhost\r\n\r\n")
	<-answering
	say("")
	say("GET / HTTP/1.1\r\nHo")
	say("GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
	<-answering
	if took := s.ended(t); took < stopWithin-time.Second || took > stopWithin+2*time.Second {
		t.Errorf("it ended after %s", took)
	}
	select {
	case <-written: // though its reader is still there
	case <-time.After(writtenWithin / 2):
		t.Error("an answer goes on after the end")
	}
	answer, err := io.ReadAll(waits)
	if err != nil || !bytes.Contains(answer, []byte("503 Service Unavailable")) || !bytes.Contains(answer, []byte("the daemon is shutting down\n")) {
		t.Errorf("%v: %s", err, answer)
	}
}

// More connections than there are slots are closed, and have slots once others are gone.
func TestServeConnectionsAtMost(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	limited := &listener{l, make(chan struct{}, 2)}
	defer limited.Close()
	accepted := make(chan net.Conn)
	go func() {
		defer close(accepted)
		for {
			c, err := limited.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	second := <-accepted
	defer second.Close()
	if _, err := dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one more: %v", err)
	}
	first.Close()
	first.Close() // as the HTTP server may: one slot all the same
	dial()
	third := <-accepted
	defer third.Close()
	if _, err := dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one more again: %v", err)
	}
	limited.Close()
	<-accepted
}

// broken is a listener that takes no connection.
type broken struct{ net.Listener }

func (b broken) Accept() (net.Conn, error) { return nil, errors.New("accept: out\nof order") }

// A listener that fails ends the others, and says which it was.
func TestServeBrokenListener(t *testing.T) {
	var listeners []net.Listener
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	listeners[1] = broken{listeners[1]}
	err := serve(t.Context(), listeners, "", http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	if want := fmt.Sprintf("web listener %s: accept: out of order", listeners[1].Addr()); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	for _, l := range listeners {
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Errorf("%s is still listened on", l.Addr())
		}
	}
}

func TestComplaints(t *testing.T) {
	var log bytes.Buffer
	for _, level := range []slog.Level{slog.LevelInfo, slog.LevelDebug} {
		log.Reset()
		to := slog.NewLogLogger(complaints{slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level})}, slog.LevelWarn)
		to.Print("http: TLS handshake error from 192.0.2.1:5: EOF")
		to.Print("http: Accept error: too many open files; retrying in 5ms")
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || strings.Contains(log.String(), "level=DEBUG") != (level == slog.LevelDebug) {
			t.Errorf("at %s:\n%s", level, &log)
		}
	}
}
