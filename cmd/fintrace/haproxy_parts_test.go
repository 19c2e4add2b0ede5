// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/selfsigned"
)

// An interval is when something happened, as well as the test can know.
type interval struct{ before, after time.Time }

func (i interval) String() string { return clock(i.before) + " to " + clock(i.after) }

func clock(t time.Time) string { return t.UTC().Format("05.000000") }

func during(call func()) interval {
	before := time.Now()
	call()
	return interval{before, time.Now()}
}

// A play is a client, a server, and what they do.
type play struct {
	c      *haproxyCase
	ns     *kerneltest.Namespace
	front  netip.AddrPort // the proxy's
	origin net.Listener   // the server's

	client  *net.TCPConn
	stream  io.ReadWriter // client, or TLS on it
	server  *net.TCPConn
	service io.ReadWriter // server, or TLS on it

	certificate *tls.Certificate // of the server, where TLS passes through

	cause    interval // of the FIN, or of the wait for it
	last     interval // activity
	reloaded interval

	done chan struct{}
	err  error
}

// newPlay prepares the nth play of a namespace; what it opens is closed at the
// end of the test.
func newPlay(t *testing.T, ns *kerneltest.Namespace, c *haproxyCase, n int) *play {
	t.Helper()
	p := &play{c: c, ns: ns, done: make(chan struct{})}
	// Below the ports that clients get.
	p.front = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(10000+n))
	var err error
	ns.Do(func() { p.origin, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+n)) })
	if err != nil {
		t.Fatal(err)
	}
	if c.passThrough {
		pair := writeCertificate(t, t.TempDir())
		certificate, err := tls.LoadX509KeyPair(pair, pair)
		if err != nil {
			t.Fatal(err)
		}
		p.certificate = &certificate
	}
	t.Cleanup(func() {
		p.origin.Close()
		if p.client != nil {
			p.client.Close()
		}
		if p.server != nil {
			p.server.Close()
		}
	})
	return p
}

// start begins the play, and does not wait for its end.
func (p *play) start() {
	go func() {
		defer close(p.done)
		p.err = errors.New("it did not end")
		p.err = p.run()
	}()
}

// wait waits for the end of what client and server do.
func (p *play) wait() error {
	<-p.done
	return p.err
}

// playTime is how long client and server may take, timeouts included.
const playTime = 40 * time.Second

func (p *play) run() (err error) {
	var conn net.Conn
	p.ns.Do(func() { conn, err = net.Dial("tcp", p.front.String()) })
	if err != nil {
		return err
	}
	p.client = conn.(*net.TCPConn)
	p.stream = p.client
	if err := p.client.SetDeadline(time.Now().Add(playTime)); err != nil {
		return err
	}
	if p.c.bind == "" && p.certificate == nil {
		return p.c.play(p)
	}
	secure := tls.Client(p.client, &tls.Config{InsecureSkipVerify: true})
	p.stream = secure
	shaken := make(chan error, 1)
	go func() { shaken <- secure.Handshake() }()
	if p.certificate != nil {
		if err := p.accept(); err != nil {
			return err
		}
		p.service = tls.Server(p.server, &tls.Config{Certificates: []tls.Certificate{*p.certificate}})
		if err := p.service.(*tls.Conn).Handshake(); err != nil {
			return fmt.Errorf("TLS of the server: %w", err)
		}
	}
	if err := <-shaken; err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	return p.c.play(p)
}

// accept takes the connection to the server.
func (p *play) accept() error {
	if err := p.origin.(*net.TCPListener).SetDeadline(time.Now().Add(playTime)); err != nil {
		return err
	}
	conn, err := p.origin.Accept()
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	p.server = conn.(*net.TCPConn)
	p.service = p.server
	return p.server.SetDeadline(time.Now().Add(playTime))
}

// say has the client say something, and waits until the server has all of it.
func (p *play) say(text string) error {
	if _, err := io.WriteString(p.stream, text); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if p.server == nil {
		if err := p.accept(); err != nil {
			return err
		}
	}
	// HAProxy writes headers anew, but leaves the end as it is.
	if err := readTo(p.service, text[max(0, len(text)-4):]); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	return nil
}

// answer has the server say something.
func (p *play) answer(text string) error {
	if _, err := io.WriteString(p.service, text); err != nil {
		return fmt.Errorf("server: %w", err)
	}
	return nil
}

// cork has the server send what it says with its FIN.
func (p *play) cork() error {
	raw, err := p.server.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_CORK, 1) })
	return errors.Join(err, failed)
}

// hear has the client read up to a text.
func (p *play) hear(text string) error {
	if err := readTo(p.stream, text); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	return nil
}

// exchange is the last traffic on both sides.
func (p *play) exchange(request, response string) (err error) {
	p.last = during(func() { err = errors.Join(p.say(request), p.answer(response), p.hear(response)) })
	return err
}

func (p *play) serverCloses(idle time.Duration) (err error) {
	pause(idle)
	p.cause = during(func() { err = p.server.Close() })
	return err
}

func (p *play) clientShutsDown(idle time.Duration) (err error) {
	pause(idle)
	p.cause = during(func() { err = p.client.CloseWrite() })
	return err
}

// readTo reads up to the end of a text.
func readTo(r io.Reader, text string) error {
	var read []byte
	for !bytes.HasSuffix(read, []byte(text)) {
		buf := make([]byte, 1024)
		n, err := r.Read(buf)
		read = append(read, buf[:n]...)
		if err != nil && !bytes.HasSuffix(read, []byte(text)) {
			return fmt.Errorf("%w instead of %q after %q", err, text, read)
		}
	}
	return nil
}

// A flowKey is a connection as a record names it.
type flowKey struct {
	netns         uint32
	local, remote string
}

// key is HAProxy's socket on the side that the case is about.
func (p *play) key() flowKey {
	peer := p.client
	if p.c.side == events.Outbound {
		peer = p.server
	}
	return flowKey{p.ns.Inode, peer.RemoteAddr().String(), peer.LocalAddr().String()}
}

// A jsonTrace is `fintrace trace -o json` and what it has printed.
type jsonTrace struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer

	mu      sync.Mutex
	news    *sync.Cond
	records map[flowKey][]report.Record
	summary struct{ Lost, Corrected, Remaining int }
	err     error // why nothing more comes
}

// traceJSON traces namespaces until the end of the test, and returns once it is
// attached.
func traceJSON(t *testing.T, spaces []*kerneltest.Namespace) *jsonTrace {
	t.Helper()
	return traceJSONBy(t, spaces, "fintrace")
}

// traceJSONBy is traceJSON with flags, and a command that starts it.
func traceJSONBy(t *testing.T, spaces []*kerneltest.Namespace, command string, flags ...string) *jsonTrace {
	t.Helper()
	args := append(strings.Fields(command), "trace", "-o", "json", "--min-duration", "0")
	for _, ns := range spaces {
		args = append(args, "--netns", strconv.FormatUint(uint64(ns.Inode), 10))
	}
	args = append(args, flags...)
	tr := &jsonTrace{cmd: exec.Command(args[0], args[1:]...), records: map[flowKey][]report.Record{}}
	tr.news = sync.NewCond(&tr.mu)
	stdout, err := tr.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := tr.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.cmd.Process.Kill() })
	said := bufio.NewReader(stderr)
	for {
		line, err := said.ReadString('\n')
		tr.stderr.WriteString(line)
		if err != nil {
			t.Fatalf("the trace ends: %s", &tr.stderr)
		}
		if strings.HasPrefix(line, "In FIN_WAIT2 already") {
			break
		}
	}
	go io.Copy(&tr.stderr, said)
	go tr.read(stdout)
	return tr
}

func (tr *jsonTrace) read(stdout io.Reader) {
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		var kind struct{ Kind string }
		var r report.Record
		err := json.Unmarshal(lines.Bytes(), &kind)
		tr.mu.Lock()
		switch {
		case err != nil:
		case kind.Kind == "summary":
			err = json.Unmarshal(lines.Bytes(), &tr.summary)
		default:
			err = json.Unmarshal(lines.Bytes(), &r)
			key := flowKey{r.Netns, r.Local, r.Remote}
			tr.records[key] = append(tr.records[key], r)
		}
		if err != nil {
			tr.err = errors.Join(tr.err, fmt.Errorf("%w in %s", err, lines.Bytes()))
		}
		tr.news.Broadcast()
		tr.mu.Unlock()
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.err = errors.Join(tr.err, lines.Err(), io.EOF)
	tr.news.Broadcast()
}

// about are the records of a connection so far that are of a kind, "" for all.
func (tr *jsonTrace) about(key flowKey, kind string) (records []report.Record) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, r := range tr.records[key] {
		if kind == "" || r.Kind == kind {
			records = append(records, r)
		}
	}
	return records
}

// await returns the first record of a kind about a connection.
func (tr *jsonTrace) await(t *testing.T, key flowKey, kind string) report.Record {
	t.Helper()
	late := false
	timer := time.AfterFunc(playTime+soon, func() {
		tr.mu.Lock()
		late = true
		tr.news.Broadcast()
		tr.mu.Unlock()
	})
	defer timer.Stop()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for {
		for _, r := range tr.records[key] {
			if r.Kind == kind {
				return r
			}
		}
		if late || tr.err != nil {
			t.Fatalf("nothing %s of %+v (%v); there is %+v", kind, key, tr.err, tr.records[key])
		}
		tr.news.Wait()
	}
}

// end stops the trace and returns how many records it had no buffer for.
func (tr *jsonTrace) end(t *testing.T) (lost int) {
	t.Helper()
	if err := tr.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	tr.mu.Lock()
	for tr.err == nil {
		tr.news.Wait()
	}
	lost = tr.summary.Lost
	err := tr.err
	tr.mu.Unlock()
	if !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if err := tr.cmd.Wait(); err != nil {
		t.Errorf("the trace ends with %v: %s", err, &tr.stderr)
	}
	return lost
}

// writeCertificate writes a certificate and its key into a file.
func writeCertificate(t *testing.T, dir string) (path string) {
	t.Helper()
	certificate, key, err := selfsigned.PEM(x509.Certificate{DNSNames: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "certificate.pem")
	if err := os.WriteFile(path, append(certificate, key...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
