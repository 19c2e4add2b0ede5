// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

// pile are n held connections at a frontend of HAProxy from so many peers.
func pile(tb testing.TB, n, peers int) []track.Conn {
	config, err := haproxy.Parse([]haproxy.Source{{Name: "haproxy.cfg", Text: []byte(`
defaults
  mode tcp
  timeout client 1h
  timeout client-fin 60s
frontend https
  bind :443
`)}}, haproxy.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	rules := limits.Rules{HAProxy: haproxy.NewView([]haproxy.Process{{PID: 7, Netns: hostns, Config: config}})}
	conns := make([]track.Conn, n)
	for i := range conns {
		c := &conns[i]
		c.Cookie, c.Netns, c.Side, c.Stage = uint64(i+1), hostns, events.Inbound, events.Held
		c.Process.PID = 7
		copy(c.Process.Comm[:], "haproxy")
		copy(c.Flow.Remote.Addr[:], v4Mapped[:])
		binary.BigEndian.PutUint32(c.Flow.Remote.Addr[12:], uint32(i%peers+1))
		copy(c.Flow.Local.Addr[:], v4Mapped[:])
		c.Flow.Local.Port, c.Flow.Remote.Port = 443, uint16(i)
		c.Duration, c.SinceExact = time.Hour+time.Duration(i*7919%n)*time.Millisecond, true
		place := rules.Place(c.Netns, c.Flow, c.Side, c.Process.PID)
		if place == 0 {
			tb.Fatal("it has no place")
		}
		c.Place = rules.HAProxy.Place(place)
		c.Limit = rules.For(c.Stage, events.Timers{FinTimeout: time.Minute}, place, 0)
	}
	return conns
}

func walk(conns []track.Conn) func(func(*track.Conn)) {
	return func(fn func(*track.Conn)) {
		for i := range conns {
			fn(&conns[i])
		}
	}
}

// BenchmarkEvaluate is an evaluation of 100 000 overdue connections, in which
// nothing changes, or an alert fires.
func BenchmarkEvaluate(b *testing.B) {
	for _, peers := range []int{1, 100, 300, 100_000} {
		conns := pile(b, 100_000, peers)
		names := new(clock).names()
		b.Run(fmt.Sprintf("peers=%d/quiet", peers), func(b *testing.B) {
			book := NewBook(DefaultSettings(), names, hostns)
			book.Evaluate(boot, walk(conns))
			b.ReportAllocs()
			for b.Loop() {
				if n := len(book.Evaluate(boot, walk(conns))); n != 0 {
					b.Fatalf("%d changes", n)
				}
			}
		})
		b.Run(fmt.Sprintf("peers=%d/fires", peers), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if n := len(NewBook(DefaultSettings(), names, hostns).Evaluate(boot, walk(conns))); n == 0 {
					b.Fatal("no change")
				}
			}
		})
	}
}
