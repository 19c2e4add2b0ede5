// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

// The timeouts of the configurations. What may happen and what must not are
// further apart than late.
const (
	plainTimeout = 9 * time.Second  // timeout client, timeout server
	finOnly      = 3 * time.Second  // timeout client-fin, timeout server-fin
	tunnelled    = 15 * time.Second // timeout tunnel
	keptAlive    = 3 * time.Second  // timeout http-keep-alive
	hardStop     = 3 * time.Second  // hard-stop-after
	kernelsOwn   = 2 * time.Second  // tcp_fin_timeout
)

// The silence before the FIN.
const (
	shortly = 2 * time.Second // less than all timeouts
	idle    = 5 * time.Second // more than the -fin timeouts
)

const (
	// early is for HAProxy's clock, which has milliseconds, and for the kernel's
	// and the test's, which are compared.
	early = 10 * time.Millisecond
	// late is how long a process may wait for a processor.
	late = 1500 * time.Millisecond
)

// A haproxyCase is a proxy and what happens on one connection through it.
type haproxyCase struct {
	name        string
	proxy       string      // the frontend; its backend is proxy-servers, with the server origin
	side        events.Side // towards the client inbound, towards the server outbound
	mode        string
	bind        string   // what the bind line says beside the address
	front, back []string // lines of the frontend and of the backend
	play        func(*play) error
	want        func(haproxytest.Version) outcome
}

func (c *haproxyCase) backend() string { return c.proxy + "-servers" }

// An outcome is what HAProxy does with its socket.
type outcome struct {
	fin   time.Duration // its FIN, after what made it send one
	held  time.Duration // how long its timer is
	from  epoch
	reset bool // ended by its RST, and not as a minisock by the kernel's timer
}

// An epoch is what the timer of a held socket counts from.
type epoch uint8

const (
	theFIN  epoch = iota
	theLast       // activity
	theReload
)

// atOnce is no stage held at all.
var atOnce = outcome{}

func fromFIN(held time.Duration) outcome    { return outcome{held: held} }
func fromLast(held time.Duration) outcome   { return outcome{held: held, from: theLast} }
func fromReload(held time.Duration) outcome { return outcome{held: held, from: theReload} }

func (o outcome) andReset() outcome {
	o.reset = true
	return o
}

func always(o outcome) func(haproxytest.Version) outcome {
	return func(haproxytest.Version) outcome { return o }
}

// since is one outcome before a version, and another from it on.
func since(major, minor int, before, after outcome) func(haproxytest.Version) outcome {
	return func(v haproxytest.Version) outcome {
		if v.AtLeast(major, minor) {
			return after
		}
		return before
	}
}

// finTimer is the -fin timeout where it acts: it begins with the FIN, and from
// 3.0 on with the last activity.
var finTimer = since(3, 0, fromFIN(finOnly), fromLast(finOnly))

// uploadFIN is client-fin in mode http, where it does not act from 3.0 on.
var uploadFIN = since(3, 0, fromFIN(finOnly), fromLast(plainTimeout))

var (
	clientFIN = fmt.Sprint("timeout client-fin ", finOnly)
	serverFIN = fmt.Sprint("timeout server-fin ", finOnly)
	tunnel    = fmt.Sprint("timeout tunnel ", tunnelled)
	keepAlive = fmt.Sprint("timeout http-keep-alive ", keptAlive)
	hardStops = fmt.Sprint("hard-stop-after ", hardStop)
)

const (
	httpClose    = "option httpclose"
	noLinger     = "option nolinger"
	terminateTLS = "ssl crt CERTIFICATE"
)

// haproxyCases is what one HAProxy is to do, all at the same time.
var haproxyCases = []haproxyCase{
	{name: "tcp, server closes, client-fin", proxy: "tcp-fin", side: events.Inbound, mode: "tcp",
		front: []string{clientFIN}, play: serverCloses(0), want: finTimer},
	{name: "tcp, server closes, client-fin and tunnel", proxy: "tcp-fin-tunnel", side: events.Inbound, mode: "tcp",
		front: []string{clientFIN}, back: []string{tunnel}, play: serverCloses(0), want: finTimer},
	{name: "TLS, server closes, client-fin", proxy: "tls-fin", side: events.Inbound, mode: "tcp", bind: terminateTLS,
		front: []string{clientFIN}, play: serverCloses(0), want: finTimer},
	{name: "TLS, server closes, client-fin and tunnel", proxy: "tls-fin-tunnel", side: events.Inbound, mode: "tcp", bind: terminateTLS,
		front: []string{clientFIN}, back: []string{tunnel}, play: serverCloses(0), want: finTimer},
	{name: "tcp, idle, server closes, client-fin", proxy: "tcp-idle-fin", side: events.Inbound, mode: "tcp",
		front: []string{clientFIN}, play: serverCloses(idle), want: since(3, 0, fromFIN(finOnly), atOnce)},
	{name: "tcp, server closes, no client-fin", proxy: "tcp", side: events.Inbound, mode: "tcp",
		play: serverCloses(0), want: always(fromLast(plainTimeout))},
	{name: "tcp, idle, server closes, no client-fin", proxy: "tcp-idle", side: events.Inbound, mode: "tcp",
		play: serverCloses(idle), want: always(fromLast(plainTimeout))},
	{name: "http, answer without a length", proxy: "http-no-length", side: events.Inbound, mode: "http",
		play: answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n", withoutLength, withIt), want: always(atOnce)},
	{name: "http, httpclose", proxy: "http-close", side: events.Inbound, mode: "http", front: []string{httpClose},
		play: answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n", withLength, never), want: always(atOnce)},
	{name: "http, server says Connection: close, client stays", proxy: "http-server-close", side: events.Inbound, mode: "http",
		play: answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n", withLengthAndClose, withIt), want: always(outcome{fin: plainTimeout})},
	{name: "http, client says Connection: close, client stays", proxy: "http-client-close", side: events.Inbound, mode: "http",
		play: answers("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", withLength, never), want: always(atOnce)},
	{name: "http, kept alive and idle", proxy: "http-keep-alive", side: events.Inbound, mode: "http", front: []string{keepAlive},
		play: answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n", withLength, never), want: always(outcome{fin: keptAlive})},
	{name: "http, upload stalls, no client-fin", proxy: "http-upload", side: events.Inbound, mode: "http",
		play: answers(stalledUpload, withoutLength, withIt), want: always(fromLast(plainTimeout))},
	{name: "http, upload stalls, client-fin", proxy: "http-upload-fin", side: events.Inbound, mode: "http", front: []string{clientFIN},
		play: answers(stalledUpload, withoutLength, withIt), want: uploadFIN},
	// 2.2 does not pass on a FIN that comes later.
	{name: "http, upload stalls, server closes later, client-fin", proxy: "http-upload-later-fin", side: events.Inbound, mode: "http",
		front: []string{clientFIN}, play: answers(stalledUpload, withoutLength, later),
		want: func(v haproxytest.Version) outcome {
			if !v.AtLeast(2, 6) {
				return outcome{fin: plainTimeout}
			}
			return uploadFIN(v)
		}},
	{name: "WebSocket, server closes", proxy: "websocket", side: events.Inbound, mode: "http", back: []string{tunnel},
		play: webSocket(func(p *play) error { return p.serverCloses(idle) }), want: since(3, 2, atOnce, fromLast(tunnelled))},
	{name: "WebSocket, server closes, client-fin", proxy: "websocket-fin", side: events.Inbound, mode: "http",
		front: []string{clientFIN}, back: []string{tunnel},
		play: webSocket(func(p *play) error { return p.serverCloses(idle) }), want: since(3, 2, atOnce, fromLast(tunnelled))},
	{name: "tcp, client shuts down, server-fin", proxy: "tcp-server-fin", side: events.Outbound, mode: "tcp",
		back: []string{serverFIN}, play: clientShutsDown(shortly),
		want: since(3, 0, fromFIN(finOnly).andReset(), fromLast(finOnly).andReset())},
	{name: "WebSocket, client shuts down, server-fin", proxy: "websocket-server-fin", side: events.Outbound, mode: "http",
		back: []string{tunnel, serverFIN}, play: webSocket(func(p *play) error { return p.clientShutsDown(idle) }),
		want: since(3, 0, fromFIN(finOnly).andReset(), fromLast(tunnelled).andReset())},
	{name: "tcp, client-fin, nolinger", proxy: "tcp-nolinger", side: events.Inbound, mode: "tcp", front: []string{clientFIN, noLinger},
		play: serverCloses(0), want: since(3, 0, fromFIN(finOnly).andReset(), fromLast(finOnly).andReset())},
	{name: "tcp, client-fin, client goes on", proxy: "tcp-trickle", side: events.Inbound, mode: "tcp", front: []string{clientFIN},
		play: clientGoesOn, want: always(fromLast(finOnly))},
}

const (
	withLength         = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	withLengthAndClose = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
	withoutLength      = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok"
	stalledUpload      = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nthe first of it"
	upgrade            = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	upgraded = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)

func serverCloses(idle time.Duration) func(*play) error {
	return func(p *play) error {
		if err := p.exchange("hello", "world"); err != nil {
			return err
		}
		return p.serverCloses(idle)
	}
}

func clientShutsDown(idle time.Duration) func(*play) error {
	return func(p *play) error {
		if err := p.exchange("hello", "world"); err != nil {
			return err
		}
		return p.clientShutsDown(idle)
	}
}

// clientGoesOn has the client talk for longer than client-fin after the server
// has shut down its side, and then be silent.
func clientGoesOn(p *play) error {
	if err := p.exchange("hello", "world"); err != nil {
		return err
	}
	var err error
	p.cause = during(func() { err = p.server.CloseWrite() })
	if err != nil {
		return err
	}
	for range 6 {
		pause(finOnly * 3 / 10)
		p.last = during(func() { err = p.say("more") })
		if err != nil {
			return err
		}
	}
	return nil
}

// A hangup is when a server closes that has answered.
type hangup uint8

const (
	never  hangup = iota
	withIt        // its FIN is in the answer's segment
	later         // when the client has the answer
)

// answers is a request and its answer.
func answers(request, response string, closes hangup) func(*play) error {
	return func(p *play) (err error) {
		p.last = during(func() {
			if err = p.say(request); err != nil {
				return
			}
			if closes == withIt {
				err = errors.Join(p.cork(), p.answer(response), p.server.Close(), p.hear("ok"))
				return
			}
			err = errors.Join(p.answer(response), p.hear("ok"))
			if closes == later {
				err = errors.Join(err, p.server.Close())
			}
		})
		// HAProxy may send its FIN before the client has read all.
		p.cause = p.last
		return err
	}
}

// webSocket upgrades the connection before what happens.
func webSocket(what func(*play) error) func(*play) error {
	return func(p *play) error {
		if err := p.say(upgrade); err != nil {
			return err
		}
		if err := p.answer(upgraded); err != nil {
			return err
		}
		if err := p.hear("\r\n\r\n"); err != nil {
			return err
		}
		if err := p.exchange("hello", "world"); err != nil {
			return err
		}
		return what(p)
	}
}

// A reload is a HAProxy that is reloaded while it holds a connection.
type reload struct {
	name   string
	mode   haproxytest.Mode
	global string
	want   outcome
}

var reloads = []reload{
	{"reload by -sf", haproxytest.Foreground, "", fromLast(plainTimeout)},
	{"reload by SIGUSR2", haproxytest.MasterWorker, "", fromLast(plainTimeout)},
	{"reload by -sf, hard-stop-after", haproxytest.Foreground, hardStops, fromReload(hardStop)},
	{"reload by SIGUSR2, hard-stop-after", haproxytest.MasterWorker, hardStops, fromReload(hardStop)},
}

// A scene is a part of the test that has a HAProxy and a namespace for itself.
type scene func(*testing.T, *jsonTrace, *kerneltest.Namespace, haproxytest.Version)

// TestHAProxy is what real HAProxys do with a silent peer, as one trace of them
// all shows it, and the test's own clock.
func TestHAProxy(t *testing.T) {
	kerneltest.Require(t)
	versions := haproxytest.Versions(t)
	scenes := map[string]scene{"cases": runCases, "slot": runSlot}
	for _, r := range reloads {
		scenes[r.name] = r.run
	}
	type stage struct {
		name string
		v    haproxytest.Version
		ns   *kerneltest.Namespace
		run  scene
	}
	var stages []stage
	var spaces []*kerneltest.Namespace
	for _, v := range versions {
		for name, run := range scenes {
			ns := kerneltest.NewNamespace(t)
			quickACK(t, ns)
			finTimeout(t, ns, int(kernelsOwn.Seconds()))
			spaces = append(spaces, ns)
			stages = append(stages, stage{v.Name + "/" + name, v, ns, run})
		}
	}
	tr := traceJSON(t, spaces)
	t.Run("all", func(t *testing.T) {
		for _, s := range stages {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				s.run(t, tr, s.ns, s.v)
			})
		}
	})
	if lost := tr.end(t); lost != 0 {
		t.Errorf("the trace lost %d records", lost)
	}
}

func runCases(t *testing.T, tr *jsonTrace, ns *kerneltest.Namespace, v haproxytest.Version) {
	plays := make([]*play, len(haproxyCases))
	for i := range haproxyCases {
		plays[i] = newPlay(t, ns, &haproxyCases[i], i)
	}
	h := haproxytest.Start(t, ns, v, haproxytest.Foreground, haproxyConfig(t, v, "", plays))
	for _, p := range plays {
		p.start()
	}
	for _, p := range plays {
		t.Run(p.c.name, func(t *testing.T) {
			if err := p.wait(); err != nil {
				t.Fatal(err)
			}
			p.check(t, tr, h.PID(), p.c.want(v))
		})
	}
}

func (r reload) run(t *testing.T, tr *jsonTrace, ns *kerneltest.Namespace, v haproxytest.Version) {
	p := newPlay(t, ns, &haproxyCase{proxy: "www", side: events.Inbound, mode: "tcp", play: serverCloses(0)}, 0)
	h := haproxytest.Start(t, ns, v, r.mode, haproxyConfig(t, v, r.global, []*play{p}))
	old := h.Worker()
	p.start()
	if err := p.wait(); err != nil {
		t.Fatal(err)
	}
	tr.await(t, p.key(), "opened")
	p.reloaded = during(h.Reload)
	if n := currConns(t, h.Ask("show info")); n != 0 {
		t.Errorf("the new worker has %d connections, want none", n)
	}
	if r.mode == haproxytest.MasterWorker {
		if n := currConns(t, h.AskMaster(fmt.Sprintf("@!%d show info", old))); n != 1 {
			t.Errorf("the old worker has %d connections, want the one that is held", n)
		}
	}
	p.check(t, tr, old, r.want)
	if r.mode == haproxytest.MasterWorker && r.want.from != theReload {
		if c := tr.await(t, p.key(), "closed"); !c.HAProxy.Old {
			t.Error("nothing says that it is of a worker that the reload has replaced")
		}
	}
}

// runSlot is about what a connection occupies: a slot while it is held, and none
// as a minisock.
func runSlot(t *testing.T, tr *jsonTrace, ns *kerneltest.Namespace, v haproxytest.Version) {
	finTimeout(t, ns, 60)
	p := newPlay(t, ns, &haproxyCase{proxy: "www", side: events.Inbound, mode: "tcp", front: []string{clientFIN}, play: serverCloses(0)}, 0)
	h := haproxytest.Start(t, ns, v, haproxytest.Foreground, haproxyConfig(t, v, "", []*play{p}))
	p.start()
	if err := p.wait(); err != nil {
		t.Fatal(err)
	}
	tr.await(t, p.key(), "opened")
	held := currConns(t, h.Ask("show info"))
	if moved := tr.about(p.key(), "moved"); moved == nil && held != 1 {
		t.Errorf("%d connections while it is held, want 1", held)
	}
	if moved := tr.await(t, p.key(), "moved"); moved.Stage != events.Minisock.String() {
		t.Errorf("it became %s, want a minisock", moved.Stage)
	}
	err := await("the slot", func() bool { return currConns(t, h.Ask("show info")) == 0 })
	if err != nil {
		t.Error(err)
	}
	if closed := tr.about(p.key(), "closed"); closed != nil {
		t.Errorf("it is gone: %+v", closed)
	}
}

// currConns is the number of connections that an answer to show info tells.
func currConns(t *testing.T, info string) int {
	t.Helper()
	_, rest, _ := strings.Cut(info, "\nCurrConns: ")
	text, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("no CurrConns in %q", info)
	}
	return n
}

// haproxyConfig is a configuration with a frontend and a backend for each play.
func haproxyConfig(t *testing.T, v haproxytest.Version, global string, plays []*play) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "global\n\t%s\ndefaults\n\ttimeout connect 30s\n\ttimeout client %s\n\ttimeout server %[2]s\n",
		global, plainTimeout)
	certificate := ""
	for _, p := range plays {
		if strings.Contains(p.c.bind, "CERTIFICATE") && certificate == "" {
			certificate = v.Inside(writeCertificate(t, v.TempDir(t)))
		}
		section := func(head string, lines ...string) {
			fmt.Fprintf(&b, "%s\n\tmode %s\n", head, p.c.mode)
			for _, line := range lines {
				fmt.Fprintf(&b, "\t%s\n", line)
			}
		}
		section("frontend "+p.c.proxy, append(p.c.front,
			fmt.Sprintf("bind %s %s", p.front, strings.ReplaceAll(p.c.bind, "CERTIFICATE", certificate)),
			"default_backend "+p.c.backend())...)
		section("backend "+p.c.backend(), append(p.c.back, fmt.Sprintf("server origin %s", p.origin.Addr()))...)
	}
	return b.String()
}

// check compares what became of the play's connection with what was expected.
func (p *play) check(t *testing.T, tr *jsonTrace, pid int, want outcome) {
	t.Helper()
	c := tr.await(t, p.key(), "closed")
	if c.Held == nil || c.Minisock == nil || !c.SinceExact {
		t.Fatalf("it was watched from the beginning, and not known: %+v", c)
	}
	held, minisock := seconds(*c.Held), seconds(*c.Minisock)
	within := func(what string, at time.Time, from interval, d time.Duration) {
		t.Helper()
		if least, most := from.before.Add(d-early), from.after.Add(d+late); at.Before(least) || at.After(most) {
			t.Errorf("%s at %s, want %s to %s", what, clock(at), clock(least), clock(most))
		}
	}
	within("its FIN came", c.Since, p.cause, want.fin)
	// HAProxy learns of the cause before it sends the FIN.
	from := interval{p.cause.before.Add(want.fin), c.Since}
	switch want.from {
	case theLast:
		from = p.last
	case theReload:
		from = p.reloaded
	}
	within("it was no longer held", c.Since.Add(held), from, want.held)
	end := events.KernelTimeout
	switch {
	case want.reset:
		end = events.LocalReset
		if minisock != 0 {
			t.Errorf("in the minisock for %s, want a RST at once", minisock)
		}
	case minisock < kernelsOwn-early || minisock > kernelsOwn*9/8+early:
		t.Errorf("in the minisock for %s, want %s", minisock, kernelsOwn)
	}
	if c.End != end.String() {
		t.Errorf("it ended by %s, want %s", c.End, end)
	}
	if side := p.c.side; c.Side != side.String() || c.Comm != "haproxy" || int(c.PID) != pid {
		t.Errorf("side %s of %s[%d], want %s of haproxy[%d]", c.Side, c.Comm, c.PID, side, pid)
	}
	p.checkPlace(t, tr.about(p.key(), ""), want)
	if t.Failed() {
		t.Logf("held for %s, in the minisock for %s, FIN at %s; cause %s, last activity %s, reload %s",
			held, minisock, clock(c.Since), p.cause, p.last, p.reloaded)
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// checkPlace looks at what the records say of HAProxy, once it is known to the
// trace: which proxy and server, and the timeout that will end the connection.
func (p *play) checkPlace(t *testing.T, records []report.Record, want outcome) {
	t.Helper()
	last := records[len(records)-1].HAProxy
	proxy, server, base := p.c.proxy, "", "client"
	if p.c.side == events.Outbound {
		proxy, server, base = p.c.backend(), "origin", "server"
	}
	if last == nil || last.Proxy != proxy || last.Server != server || last.Side != base {
		t.Errorf("of %+v, want %s %q on the %s's side", last, proxy, server, base)
		return
	}
	if want.held == 0 || want.from == theReload {
		return
	}
	if last.Timeout == nil || *last.Timeout != want.held.Seconds() {
		t.Errorf("HAProxy is said to end it after %v s, and does after %s", last.Timeout, want.held)
	}
	name := map[time.Duration]string{finOnly: base + "-fin", plainTimeout: base, tunnelled: "tunnel"}[want.held]
	words := fmt.Sprintf("timeout %s %s", name, want.held)
	for _, r := range records {
		if r.HAProxy != nil && r.Stage == events.Held.String() && !strings.Contains(r.LimitSource, words) {
			t.Errorf("%s, while held: its limit is by %q, want %s", r.Kind, r.LimitSource, words)
		}
	}
}
