// SPDX-License-Identifier: Apache-2.0

package track

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
)

// Each origin that a connection has is kept once, and no other for longer.
func TestOrigins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		under := origins{numbers: map[origin]uint32{}}
		var held []origin // by each connection
		var numbers []uint32
		t.Repeat(map[string]func(*rapid.T){
			"hold": func(t *rapid.T) {
				v := origin{netns: rapid.Uint32Range(1, 3).Draw(t, "netns"),
					process: events.Process{PID: rapid.Uint32Range(0, 3).Draw(t, "pid")}}
				held, numbers = append(held, v), append(numbers, under.hold(v))
			},
			"release": func(t *rapid.T) {
				if len(held) == 0 {
					t.Skip()
				}
				i := rapid.IntRange(0, len(held)-1).Draw(t, "which")
				under.release(numbers[i])
				last := len(held) - 1
				held[i], numbers[i] = held[last], numbers[last]
				held, numbers = held[:last], numbers[:last]
			},
			"": func(t *rapid.T) {
				distinct := map[origin]uint32{}
				for i, v := range held {
					if got := *under.at(numbers[i]); got != v {
						t.Fatalf("%d is %+v, want %+v", numbers[i], got, v)
					}
					if n, known := distinct[v]; known && n != numbers[i] {
						t.Fatalf("%+v is kept as %d and as %d", v, n, numbers[i])
					}
					distinct[v] = numbers[i]
				}
				if len(under.numbers) != len(distinct) || len(under.kept)-len(under.free) != len(distinct) {
					t.Fatalf("%d are kept, %d free of %d, want %d", len(under.numbers), len(under.free), len(under.kept), len(distinct))
				}
			},
		})
	})
}
