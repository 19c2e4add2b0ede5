// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

// many are alerts that change at once, each of connections of a frontend of one
// HAProxy, and a daemon to say so.
func many(t testing.TB, alerts, each int) (*daemon, []alert.Change) {
	t.Helper()
	const proxies = 1000
	var config strings.Builder
	config.WriteString("defaults\n  mode tcp\n  timeout client 1h\n  timeout server 1h\n")
	for i := range proxies {
		fmt.Fprintf(&config, "frontend f%d\n  bind :%d\n  default_backend b%[1]d\nbackend b%[1]d\n  server s 192.0.2.1:80\n", i, 10_000+i)
	}
	v, err := haproxy.ParseVersion("2.6.12")
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := haproxy.Parse([]haproxy.Source{{Name: "haproxy.cfg", Text: []byte(config.String())}}, haproxy.Options{Version: v})
	if err != nil {
		t.Fatal(err)
	}
	own, err := probe.OwnNetns()
	if err != nil {
		t.Fatal(err)
	}
	processes := []haproxy.Process{{PID: 77, Netns: own, Version: v, Config: parsed}}
	log := slog.New(slog.DiscardHandler)
	outbox, err := alert.NewOutbox(nil, log)
	if err != nil {
		t.Fatal(err)
	}
	names := newHostNames()
	d := &daemon{
		log: log, names: names, own: own, outbox: outbox, state: newStateFile("", log),
		watch: &watch{haproxies: &haproxies{found: haproxy.Found{Processes: processes}}},
		book:  alert.NewBook(alert.DefaultSettings(), names.names(), own),
	}

	now := probe.Now()
	table := track.New(limits.Rules{HAProxy: haproxy.NewView(processes)}, alerts*each, nil)
	var changes []alert.Change
	for i := range alerts {
		c := alert.Change{Alert: &alert.Alert{ID: fmt.Sprint(i), Advice: []report.Finding{{ID: "before"}}}}
		for j := range each {
			n := i*each + j + 1
			ev := &events.Event{
				Time: now.Add(-time.Hour), Cookie: uint64(n), Netns: own, Old: events.FinWait1, New: events.FinWait2, Accepted: true,
				Flow: events.Flow{
					Local:  events.Endpoint{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 192, 14: 2, 15: 1}, Port: uint16(10_000 + i%proxies)},
					Remote: events.Endpoint{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 10, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)}, Port: 1},
				},
				Process: events.Process{PID: 77},
			}
			copy(ev.Process.Comm[:], "haproxy")
			table.Apply(ev)
			conn, _ := table.Get(uint64(n), now)
			c.Conns = append(c.Conns, conn)
		}
		changes = append(changes, c)
	}
	return d, changes
}

// TestAdviceBounded: the loop is not held up by what many alerts advise. The
// first have new advice, the last have that of before, and examples all the same.
func TestAdviceBounded(t *testing.T) {
	d, changes := many(t, 1000, 20)
	d.say(changes)
	first, last := changes[0].Alert, changes[len(changes)-1].Alert
	if len(first.Advice) == 0 || first.Advice[0].ID == "before" {
		t.Errorf("the advice of the first is %+v", first.Advice)
	}
	if len(last.Advice) != 1 || last.Advice[0].ID != "before" {
		t.Errorf("the advice of the last of %d is new: %+v", len(changes), last.Advice)
	}
	if len(last.Examples) != examples {
		t.Errorf("the last has %d examples", len(last.Examples))
	}
	changes[0].Conns = nil
	d.say(changes[:1])
	if first.Advice != nil || first.Examples != nil {
		t.Errorf("one that has resolved has advice %+v and examples %+v", first.Advice, first.Examples)
	}
}

func BenchmarkSay(b *testing.B) {
	for _, size := range [][2]int{{1, 1000}, {100, 200}, {2800, 7}} {
		b.Run(fmt.Sprintf("alerts=%d/connections=%d", size[0], size[1]), func(b *testing.B) {
			d, changes := many(b, size[0], size[1])
			for b.Loop() {
				d.say(changes)
			}
		})
	}
}
