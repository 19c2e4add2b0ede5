// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// soonOverdue is a tcp_fin_timeout, in seconds, by which hours pass in seconds:
// held connections that no timer of HAProxy ends soon are measured by it.
const soonOverdue = 2

// wellKept is a configuration that an expert would leave alone.
const wellKept = `
global
	maxconn 2000
defaults
	mode tcp
	timeout connect 5s
	timeout client 50s
	timeout client-fin 30s
	timeout server 50s
	timeout server-fin 30s
frontend proxy-https
	bind 192.0.2.10:443
	maxconn 500
	default_backend app
backend app
	server web1 203.0.113.80:8443
`

// with is a configuration with some texts replaced, in pairs.
func with(config string, replace ...string) string {
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(config, replace[i]) {
			panic("the configuration has no " + replace[i])
		}
	}
	return strings.NewReplacer(replace...).Replace(config)
}

// unset takes lines out of a configuration.
func unset(config string, lines ...string) string {
	for _, line := range lines {
		config = with(config, "\t"+line+"\n", "")
	}
	return config
}

// noClientFIN is the mistake of the story: a client may say nothing for an hour,
// and nothing else is said about the time after the end.
var noClientFIN = with(unset(wellKept, "timeout client-fin 30s"), "timeout client 50s", "timeout client 1h")

// story is the configuration of the story: 5 × 10 in the frontends, which
// makes 100 connections, and that is what global has.
var story = func() string {
	config := with(unset(noClientFIN, "maxconn 500"), "maxconn 2000", "maxconn 100", "mode tcp", "mode tcp\n\tmaxconn 10")
	for i, name := range []string{"proxy-http", "proxy-imap", "proxy-smtp", "proxy-ldap"} {
		config += fmt.Sprintf("frontend %s\n\tbind 192.0.2.10:%d\n\tdefault_backend app\n", name, 8000+i)
	}
	return config
}()

const https = labHost + ":443"

// proxied starts HAProxy on the host, and its server elsewhere.
func proxied(config string, serve func(*world) func(*net.TCPConn)) func(*world) {
	return func(w *world) {
		w.listen(w.internet, labServer, serve(w))
		w.runs(config)
	}
}

// answering is a server behind the proxy that answers and closes.
func answering(w *world) func(*net.TCPConn) { return w.answers }

// pileUp has clients stuck at the proxy, and time pass fast.
func pileUp(config string, n int, from func(int) string) func(*world) {
	return func(w *world) {
		w.finTimeout(soonOverdue)
		proxied(config, answering)(w)
		w.stuck(n, from, https)
		w.await(fmt.Sprint(n, " held"), func(c counts) bool { return c.held == n && c.closeWait == n })
	}
}

// closes has the host close n connections on which the client then stays silent.
func closes(n int) func(*world) {
	return func(w *world) {
		w.listen(w.host, https, w.answers)
		w.stuck(n, client, https)
		w.await(fmt.Sprint(n, " closed"), func(c counts) bool { return c.minisock+c.orphaned == n })
	}
}

// healthyClients come at random through the proxy.
func healthyClients(mean time.Duration) func(*world) func(context.Context) {
	return func(w *world) func(context.Context) {
		return atRandom(mean, func(i int) { w.healthy(client(i), https) })
	}
}

// hours are what `timeout client 1h` is good for besides.
const hours = "timeout-client-hours"

var labScenarios = []labScenario{
	{
		name: "the story: worker2 fills proxy-https",
		stage: func(w *world) {
			pileUp(story, 9, only(labWorker2))(w)
		},
		must: []string{"held-pile-up", "peer-is-client", "peer-is-one", "client-fin-unset", "maxconn-pressure",
			"global-maxconn-no-room", "fin-timeout-no-help", "close-wait-twins"},
		not:  []string{"global-maxconn-too-small", "server-fin-unset", "old-workers", "local-peer", "closed-harmless", "growing", "bursts", "age-cliff", "not-seen"},
		may:  []string{"tcp-fin-timeout-changed", hours},
		exit: []int{2}, says: []string{labWorker2, "proxy-https", "9"},
	},
	{
		name:  "40 of 50, and life goes on",
		stage: pileUp(with(noClientFIN, "maxconn 500", "maxconn 50", "maxconn 2000", "maxconn 110"), 40, only(labWorker2)),
		during: func(w *world) func(context.Context) {
			return atRandom(100*time.Millisecond, func(i int) { w.healthy(client(i), https) })
		},
		must: []string{"held-pile-up", "peer-is-client", "peer-is-one", "client-fin-unset", "maxconn-pressure",
			"fin-timeout-no-help", "close-wait-twins"},
		not:  []string{"global-maxconn-too-small", "global-maxconn-no-room", "global-maxconn-unset", "growing"},
		may:  []string{"tcp-fin-timeout-changed", hours},
		exit: []int{2}, says: []string{labWorker2, "proxy-https", "40"},
	},
	{
		name:  "many clients stuck, and none stands out",
		stage: pileUp(noClientFIN, 40, client),
		must:  []string{"held-pile-up", "peer-is-client", "client-fin-unset", "fin-timeout-no-help", "close-wait-twins"},
		not:   []string{"peer-is-one", "maxconn-pressure", "global-maxconn-too-small", "server-fin-unset"},
		may:   []string{"tcp-fin-timeout-changed", hours},
		exit:  []int{1, 2}, says: []string{"proxy-https", "40"},
	},
	{
		name: "behind NAT: one address, healthy and stuck",
		stage: func(w *world) {
			pileUp(noClientFIN, 15, only(labWorker2))(w)
		},
		during: func(w *world) func(context.Context) {
			return atRandom(30*time.Millisecond, func(i int) { w.healthy(labWorker2, https) })
		},
		must: []string{"held-pile-up", "peer-is-client", "peer-is-one", "client-fin-unset"},
		not:  []string{"maxconn-pressure", "growing", "bursts", "local-peer"},
		may:  []string{"tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", hours},
		exit: []int{1, 2}, says: []string{labWorker2, "15"},
	},
	{
		name: "a program without a timer holds them",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			w.starts("app", https)
			w.await("app to listen", func(c counts) bool { return c.listening == 1 })
			w.stuck(30, client, https)
			w.await("30 held", func(c counts) bool { return c.held == 30 })
		},
		must: []string{"held-pile-up", "peer-is-client", "fin-timeout-no-help"},
		not:  []string{"client-fin-unset", "peer-is-one", "maxconn-pressure", "close-wait-twins", "closed-harmless", "local-peer"},
		may:  []string{"tcp-fin-timeout-changed"},
		exit: []int{1, 2}, says: []string{"app", "30"},
	},
	{
		name: "two clients with an empty battery",
		stage: func(w *world) {
			pileUp(noClientFIN, 2, client)(w)
		},
		during: healthyClients(50 * time.Millisecond),
		not:    []string{"held-pile-up", "client-fin-unset", "peer-is-client", "peer-is-one", "close-wait-twins", "fin-timeout-no-help"},
		exit:   []int{0},
	},
	{
		name: "mode http: uploads stall",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			w.listen(w.internet, labServer, w.holds)
			w.runs(with(noClientFIN, "mode tcp", "mode http"))
			for i := range 20 {
				if c := w.dial(w.internet, client(i), https); c != nil {
					_, err := io.WriteString(c, stalledUpload)
					w.check(err)
					w.check(readTo(c, "ok"))
				}
			}
			w.await("20 held", func(c counts) bool { return c.held == 20 })
		},
		must: []string{"held-pile-up", "peer-is-client"},
		not:  []string{"maxconn-pressure", "peer-is-one", "server-fin-unset", "closed-harmless"},
		// Which timeout it is depends on the version.
		may:  []string{"client-fin-unset", "client-timeout-long", "fin-timeout-no-help", "close-wait-twins", "timeout-client-hours"},
		exit: []int{1, 2}, says: []string{"proxy-https", "20"},
	},
	{
		name: "servers stuck: the pile is outbound",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(with(unset(wellKept, "timeout server-fin 30s"), "timeout server 50s", "timeout server 1h"),
				func(w *world) func(*net.TCPConn) { return w.silent })(w)
			for i := range 20 {
				if c := w.asks(client(i), https); c != nil {
					if err := readTo(c, withoutLength); err != nil {
						w.t.Error(err)
					}
					w.check(c.CloseWrite())
				}
			}
			w.await("20 held", func(c counts) bool { return c.held == 20 && c.closeWait == 20 })
		},
		must: []string{"held-pile-up", "server-fin-unset", "close-wait-twins"},
		not:  []string{"peer-is-client", "client-fin-unset", "maxconn-pressure"},
		may:  []string{"tcp-fin-timeout-changed", "fin-timeout-no-help", "peer-is-one", "timeout-server-hours"},
		exit: []int{1, 2}, says: []string{"app", "20", "server"},
	},
	{
		name: "orphans only, tcp_fin_timeout 90",
		stage: func(w *world) {
			w.finTimeout(90)
			closes(20)(w)
			w.await("orphans", func(c counts) bool { return c.orphaned == 20 })
		},
		must: []string{"closed-harmless", "tcp-fin-timeout-trap"},
		not:  []string{"held-pile-up", "fin-timeout-no-help", "client-fin-unset", "tcp-fin-timeout-long", "tcp-fin-timeout-changed", "tables"},
		exit: []int{0, 1},
	},
	{
		name: "orphans soon gone, tcp_fin_timeout 65",
		stage: func(w *world) {
			w.finTimeout(65)
			closes(20)(w)
		},
		must: []string{"closed-harmless", "tcp-fin-timeout-trap"},
		not:  []string{"held-pile-up", "tcp-fin-timeout-long"},
		exit: []int{0, 1},
	},
	{
		name: "tcp_fin_timeout 300, and orphans",
		stage: func(w *world) {
			w.finTimeout(300)
			closes(20)(w)
		},
		must: []string{"closed-harmless", "tcp-fin-timeout-long"},
		not:  []string{"held-pile-up", "tcp-fin-timeout-trap", "tcp-fin-timeout-changed"},
		exit: []int{0, 1},
	},
	{
		name: "tcp_fin_timeout 300, and nothing stuck",
		stage: func(w *world) {
			w.finTimeout(300)
			proxied(wellKept, answering)(w)
		},
		during: healthyClients(50 * time.Millisecond),
		not:    []string{"held-pile-up", "closed-harmless", "fin-timeout-no-help", "tcp-fin-timeout-trap", "tcp-fin-timeout-long"},
		exit:   []int{0},
	},
	{
		name: "tcp_fin_timeout 30, and minisocks",
		stage: func(w *world) {
			w.finTimeout(30)
			closes(20)(w)
		},
		must: []string{"tcp-fin-timeout-changed", "closed-harmless"},
		not:  []string{"held-pile-up", "tcp-fin-timeout-trap", "tcp-fin-timeout-long", "fin-timeout-no-help"},
		exit: []int{0},
	},
	{
		name:  "minisocks only",
		stage: closes(200),
		must:  []string{"closed-harmless"},
		not:   []string{"held-pile-up", "tcp-fin-timeout-changed", "fin-timeout-no-help", "maxconn-pressure", "peer-is-client", "tables"},
		exit:  []int{0}, says: []string{"200"},
	},
	{
		name: "a busy and healthy proxy",
		stage: func(w *world) {
			proxied(wellKept, answering)(w)
			for i := range 1000 {
				w.healthy(client(i), https)
			}
		},
		during: func(w *world) func(context.Context) {
			return regularly(5*time.Millisecond, func(i int) { w.healthy(client(i), https) })
		},
		not:  []string{"held-pile-up", "closed-harmless", "client-fin-unset", "growing", "bursts", "age-cliff", "close-wait-twins", "maxconn-pressure", "not-seen"},
		exit: []int{0},
	},
	{
		name: "client-fin unset, and nobody is silent",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(noClientFIN, answering)(w)
		},
		during: healthyClients(50 * time.Millisecond),
		not:    []string{"held-pile-up", "client-fin-unset", "peer-is-client"},
		may:    []string{"tcp-fin-timeout-changed"},
		exit:   []int{0},
	},
	{
		name: "silent clients, ended in time by client-fin",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(wellKept, answering)(w)
			w.stuck(20, client, https)
			w.await("20 held", func(c counts) bool { return c.held == 20 })
		},
		not:  []string{"held-pile-up", "client-fin-unset", "maxconn-pressure", "fin-timeout-no-help"},
		may:  []string{"tcp-fin-timeout-changed", "close-wait-twins", "peer-is-client"},
		exit: []int{0},
	},
	{
		name: "mode http: silent clients are closed",
		stage: func(w *world) {
			w.listen(w.internet, labServer, w.answers)
			w.runs(with(unset(noClientFIN, "timeout server-fin 30s"), "mode tcp", "mode http", "timeout client 1h", "timeout client 50s"))
			for i := range 30 {
				if c := w.asks(client(i), https); c != nil {
					if answer, err := io.ReadAll(c); err != nil || len(answer) == 0 {
						w.t.Errorf("%v after %q", err, answer)
					}
				}
			}
			w.await("30 minisocks", func(c counts) bool { return c.minisock == 30 && c.held == 0 })
		},
		must: []string{"closed-harmless"},
		not:  []string{"held-pile-up", "client-fin-unset", "close-wait-twins", "peer-is-client", "maxconn-pressure"},
		exit: []int{0},
	},
	{
		name: "half closed, and the answer takes seconds",
		stage: func(w *world) {
			w.listen(w.internet, labServer, func(c *net.TCPConn) {
				for {
					if _, err := io.WriteString(c, "some of it\n"); err != nil {
						return
					}
					pause(200 * time.Millisecond)
				}
			})
			for range 5 {
				if c := w.dial(w.host, "", labServer); c != nil {
					w.check(c.CloseWrite())
					go func() { _, _ = io.Copy(io.Discard, c) }()
				}
			}
			w.await("5 held", func(c counts) bool { return c.held == 5 })
		},
		not:  []string{"held-pile-up", "peer-is-client", "close-wait-twins", "server-fin-unset", "growing"},
		exit: []int{0},
	},
	{
		name: "clients that are slow, and alive",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(wellKept, func(w *world) func(*net.TCPConn) { return w.drains })(w)
			w.slow(10, https)
			w.await("10 held", func(c counts) bool { return c.held == 10 })
		},
		not:  []string{"held-pile-up", "client-fin-unset", "growing", "age-cliff"},
		may:  []string{"tcp-fin-timeout-changed"},
		exit: []int{0},
	},
	{
		name: "a pile of TIME_WAIT",
		stage: func(w *world) {
			w.listen(w.host, https, w.answers)
			for i := range 500 {
				w.healthy(client(i), https)
			}
			w.await("500 in TIME_WAIT", func(c counts) bool { return c.timeWait > 480 }) // Some have met a port again.
		},
		not:  []string{"held-pile-up", "closed-harmless", "tables", "peer-is-one"},
		exit: []int{0},
	},
	{
		name: "the old worker holds the pile",
		stage: func(w *world) {
			pileUp(noClientFIN, 20, only(labWorker2))(w)
			// What is written within a second of its start, a process may have read.
			pause(1500 * time.Millisecond)
			w.haproxy.WriteConfig(wellKept)
			w.reloads(false)
		},
		during: healthyClients(100 * time.Millisecond),
		must:   []string{"held-pile-up", "old-workers", "peer-is-client"},
		not:    []string{"local-peer", "maxconn-pressure", "growing"},
		may:    []string{"client-fin-unset", "peer-is-one", "tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", "not-seen", "running-configuration-differs"},
		exit:   []int{1, 2}, says: []string{"20", "old"},
	},
	{
		name: "reloaded, and the old worker is done",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(noClientFIN, answering)(w)
			w.healthy(client(0), https)
			w.reloads(true)
			w.stuck(20, client, https)
			w.await("20 held", func(c counts) bool { return c.held == 20 })
		},
		must: []string{"held-pile-up", "client-fin-unset"},
		not:  []string{"old-workers", "peer-is-one"},
		may:  []string{"peer-is-client", "tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", hours},
		exit: []int{1, 2},
	},
	{
		name: "an old worker with work to do",
		stage: func(w *world) {
			proxied(wellKept, func(w *world) func(*net.TCPConn) { return w.silent })(w)
			for i := range 5 { // connections that are in use
				c := w.asks(client(i), https)
				if err := readTo(c, withoutLength); err != nil {
					w.t.Error(err)
				}
			}
			w.reloads(false)
		},
		not:  []string{"old-workers", "held-pile-up"},
		exit: []int{0},
	},
	{
		name: "both ends are here, and one forgets to close",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			w.starts("app", "127.0.0.1:9000")
			w.starts("importer", "127.0.0.1:9000", "12")
			w.await("12 held", func(c counts) bool { return c.held == 12 && c.closeWait == 12 })
		},
		must: []string{"held-pile-up", "local-peer"},
		not:  []string{"close-wait-twins", "client-fin-unset", "maxconn-pressure"},
		may:  []string{"tcp-fin-timeout-changed", "fin-timeout-no-help", "peer-is-client", "peer-is-one"},
		exit: []int{1, 2}, says: []string{"importer"},
	},
	{
		name: "CLOSE_WAIT, and nothing in FIN_WAIT2",
		stage: func(w *world) {
			w.listen(w.internet, labServer, w.answers)
			w.starts("importer", labServer, "15")
			w.await("15 in CLOSE_WAIT", func(c counts) bool { return c.closeWait == 15 })
		},
		not:  []string{"close-wait-twins", "local-peer", "held-pile-up"},
		exit: []int{0},
	},
	{
		name:  "global maxconn nearly full",
		stage: pileUp(with(noClientFIN, "maxconn 500", "maxconn 60", "maxconn 2000", "maxconn 30"), 27, client),
		must:  []string{"held-pile-up", "maxconn-pressure", "global-maxconn-too-small", "client-fin-unset"},
		not:   []string{"peer-is-one", "global-maxconn-no-room", "global-maxconn-unset"},
		may:   []string{"tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", "peer-is-client", hours},
		exit:  []int{2}, says: []string{"27"},
	},
	{
		// HAProxy says what it has computed, which is plenty.
		name:  "global maxconn unset, and computed",
		stage: pileUp(unset(noClientFIN, "maxconn 2000"), 20, client),
		must:  []string{"held-pile-up", "client-fin-unset"},
		not:   []string{"maxconn-pressure", "global-maxconn-unset", "global-maxconn-too-small", "global-maxconn-no-room"},
		may:   []string{"tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", "peer-is-client", hours},
		exit:  []int{1, 2},
	},
	{
		name: "bursts every 1.5 s",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(noClientFIN, answering)(w)
		},
		during: func(w *world) func(context.Context) {
			return regularly(1500*time.Millisecond, func(int) { w.stuck(5, client, https) })
		},
		args: []string{"--duration", "17s"},
		must: []string{"bursts", "held-pile-up", "client-fin-unset"},
		not:  []string{"age-cliff", "peer-is-one"},
		may:  []string{"growing", "maxconn-pressure", "peer-is-client", "tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", hours},
		exit: []int{1, 2},
	},
	{
		name: "as many at random, and none leaves",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(noClientFIN, answering)(w)
		},
		during: func(w *world) func(context.Context) {
			return atRandom(300*time.Millisecond, func(i int) { w.stuck(1, only(client(i)), https) })
		},
		args: []string{"--duration", "17s"},
		must: []string{"growing", "held-pile-up", "client-fin-unset", "maxconn-pressure"},
		not:  []string{"bursts", "age-cliff"},
		may:  []string{"peer-is-client", "tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins", hours, "peer-is-one"},
		exit: []int{1, 2},
	},
	{
		name: "as many come as go",
		stage: func(w *world) {
			w.finTimeout(soonOverdue)
			proxied(wellKept, answering)(w)
		},
		during: func(w *world) func(context.Context) {
			random := labRandom()
			return atRandom(100*time.Millisecond, func(i int) {
				stays := time.Duration(random.ExpFloat64() * float64(700*time.Millisecond))
				if c := w.hears(client(i), https); c != nil {
					time.AfterFunc(min(stays, 4*time.Second), func() { w.end(c) })
				}
			})
		},
		args: []string{"--duration", "15s"},
		not:  []string{"growing", "bursts", "age-cliff", "held-pile-up"},
		may:  []string{"tcp-fin-timeout-changed"},
		exit: []int{0},
	},
	{
		name: "a cliff at client-fin 3s",
		stage: func(w *world) {
			w.finTimeout(1)
			proxied(with(wellKept, "client-fin 30s", "client-fin 3s"), answering)(w)
		},
		during: func(w *world) func(context.Context) {
			return atRandom(100*time.Millisecond, func(i int) { w.stuck(1, only(client(i)), https) })
		},
		args: []string{"--duration", "15s"},
		must: []string{"age-cliff"},
		not:  []string{"held-pile-up", "growing", "bursts", "client-fin-unset"},
		may:  []string{"tcp-fin-timeout-changed", "closed-harmless", "close-wait-twins", "peer-is-client"},
		exit: []int{0, 1},
	},
	{
		name: "the timewait table is nearly full",
		stage: func(w *world) {
			w.sysctl("net.ipv4.tcp_max_tw_buckets", 100)
			w.listen(w.host, https, w.answers)
			for i := range 96 {
				w.healthy(client(i), https)
			}
			w.await("96 in TIME_WAIT", func(c counts) bool { return c.timeWait == 96 })
		},
		must: []string{"tables"},
		not:  []string{"held-pile-up"},
		exit: []int{1, 2},
	},
	{
		name: "the timewait table overflows",
		stage: func(w *world) {
			w.sysctl("net.ipv4.tcp_max_tw_buckets", 20)
			w.listen(w.host, https, w.answers)
		},
		during: func(w *world) func(context.Context) {
			return atRandom(50*time.Millisecond, func(i int) { w.healthy(client(i), https) })
		},
		must: []string{"tables"},
		not:  []string{"held-pile-up"},
		exit: []int{1, 2},
	},
	{
		name: "HAProxy's configuration is not to be had",
		stage: func(w *world) {
			pileUp(noClientFIN, 20, client)(w)
			w.check(unix.Unlink(w.haproxy.ConfigPath()))
		},
		must: []string{"held-pile-up", "not-seen"},
		not:  []string{"client-fin-unset", "server-fin-unset"},
		may:  []string{"peer-is-client", "tcp-fin-timeout-changed", "fin-timeout-no-help", "close-wait-twins"},
		exit: []int{1, 2}, says: []string{"haproxy", "20", "configuration"},
	},
	{
		name:  "no privileges",
		stage: func(w *world) { pileUp(noClientFIN, 20, client)(w) },
		as:    "unprivileged",
		must:  []string{"not-seen"},
		not:   []string{"held-pile-up", "client-fin-unset"},
		exit:  []int{0}, says: []string{"that could be seen"},
	},
	{
		name: "an empty host",
		not:  []string{"held-pile-up", "closed-harmless", "not-seen", "tables", "tcp-fin-timeout-changed"},
		exit: []int{0},
	},
}
