// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// Summary is what a trace has seen from its start to its end.
type Summary struct {
	ends    map[events.End]uint64
	stages  [3]histogram
	peers   map[netip.Addr]*tally
	ports   map[service]*tally
	entered uint64
	seeded  uint64 // entered before we looked
	left    uint64
	overdue uint64
}

// tally is how one peer or port has fared.
type tally struct {
	count   uint64
	total   time.Duration
	longest time.Duration
}

// service is a port and whose it is.
type service struct {
	side events.Side
	port uint16
}

func (s service) String() string { return fmt.Sprintf("%s %d", s.side, s.port) }

func serviceOf(c *track.Conn) service { return service{c.Side, c.ServicePort()} }

// peersKept bounds the tallies: beyond it, the least are dropped when a new one comes.
const peersKept = 10_000

// histogram counts durations by powers of ten.
type histogram [8]uint64

var bucketNames = [len(histogram{})]string{"< 1ms", "1-10ms", "10-100ms", "0.1-1s", "1-10s", "10-100s", "100-1000s", "longer"}

func (h *histogram) add(d time.Duration) {
	bucket := 0
	for bound := time.Millisecond; bucket < len(h)-1 && d >= bound; bound *= 10 {
		bucket++
	}
	h[bucket]++
}

// NewSummary is an empty one.
func NewSummary() *Summary {
	return &Summary{ends: map[events.End]uint64{}, peers: map[netip.Addr]*tally{}, ports: map[service]*tally{}}
}

// Add counts a notice.
func (s *Summary) Add(n *track.Notice) {
	switch n.Kind {
	case track.Overdue:
		s.overdue++
	case track.Opened:
		s.entered++
		if !n.Conn.SinceExact || n.Conn.Duration > 0 {
			s.seeded++
		}
	case track.Closed:
		s.left++
		s.ends[n.Conn.End]++
		s.AddConn(&n.Conn)
	}
}

// AddConn counts the time of one connection: one that has left, or is still there at the end.
func (s *Summary) AddConn(c *track.Conn) {
	if c.StagesKnown {
		for i, d := range []time.Duration{c.Held, c.Orphaned, c.Minisock} {
			if d > 0 {
				s.stages[i].add(d)
			}
		}
	}
	count(s.peers, c.Flow.Remote.IP(), c.Duration)
	count(s.ports, serviceOf(c), c.Duration)
}

// named is what a tally can be of.
type named interface {
	comparable
	fmt.Stringer
}

func count[K named](tallies map[K]*tally, of K, d time.Duration) {
	t := tallies[of]
	if t == nil {
		if len(tallies) >= peersKept {
			for _, least := range worst(tallies)[peersKept/2:] {
				delete(tallies, least)
			}
		}
		t = &tally{}
		tallies[of] = t
	}
	t.count++
	t.total += d
	t.longest = max(t.longest, d)
}

// worst sorts by the total time spent in FIN_WAIT2.
func worst[K named](tallies map[K]*tally) []K {
	return slices.SortedFunc(maps.Keys(tallies), func(a, b K) int {
		return cmp.Or(cmp.Compare(tallies[b].total, tallies[a].total), strings.Compare(a.String(), b.String()))
	})
}

// Totals are the figures of a summary that others have counted.
type Totals struct {
	Traced     time.Duration
	Remaining  int
	Corrected  uint64 // put right by a snapshot
	Shed       uint64 // not tracked, the table being full
	Instants   uint64 // left FIN_WAIT2 as they entered it
	Unfollowed uint64 // were closed and gone before a look, and were too many to follow each
	Lost       uint64 // records the ring buffer had no room for
	Missed     uint64 // events the kernel skipped
}

// Print writes the summary as text.
func (s *Summary) Print(w io.Writer, t Totals, style Style) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\nTraced for %s: %d entered FIN_WAIT2 (%d of them were there before), %d left, %d still there; %d passed their limit.\n",
		Duration(t.Traced), s.entered, s.seeded, s.left, t.Remaining, s.overdue)
	fmt.Fprintf(&b, "%s more left as they entered, as a healthy close does (all namespaces, before filters).\n",
		plural(t.Instants, "connection", "connections"))
	if t.Unfollowed > 0 {
		fmt.Fprintf(&b, "%s more were closed and gone before the next look: too many to follow each (--min-duration 0 does).\n",
			plural(t.Unfollowed, "connection", "connections"))
	}
	if len(s.ends) > 0 {
		b.WriteString("Left by:")
		for _, e := range events.Ends() {
			if s.ends[e] > 0 {
				fmt.Fprintf(&b, "  %s %d", e, s.ends[e])
			}
		}
		b.WriteString("\n")
	}
	s.printHistogram(&b)
	printWorst(&b, "peers", s.peers, style)
	printWorst(&b, "ports", s.ports, style)
	fmt.Fprintf(&b, "Records lost: %d for want of buffer, %d skipped by the kernel; put right by a look at the sockets: %d; table full: %d.\n",
		t.Lost, t.Missed, t.Corrected, t.Shed)
	_, err := io.WriteString(w, b.String())
	return err
}

func (s *Summary) printHistogram(b *strings.Builder) {
	var most uint64
	first, last := len(bucketNames), -1
	for _, h := range s.stages {
		for i, n := range h {
			if n > 0 {
				first, last, most = min(first, i), max(last, i), max(most, n)
			}
		}
	}
	if most == 0 {
		return
	}
	const barWidth = 12
	fmt.Fprintf(b, "\n%-10s", "time in")
	for _, stage := range []events.Stage{events.Held, events.Orphaned, events.Minisock} {
		fmt.Fprintf(b, "  %7s %-*s", stage, barWidth, "")
	}
	b.WriteString("\n")
	for i := first; i <= last; i++ {
		fmt.Fprintf(b, "%-10s", bucketNames[i])
		for _, h := range s.stages {
			bar := strings.Repeat("█", int((h[i]*barWidth+most-1)/most))
			fmt.Fprintf(b, "  %8d %-*s", h[i], barWidth-1, bar)
		}
		b.WriteString("\n")
	}
	b.WriteString("\n")
}

func printWorst[K named](b *strings.Builder, what string, tallies map[K]*tally, style Style) {
	sorted := worst(tallies)
	if len(sorted) == 0 {
		return
	}
	sorted = sorted[:min(len(sorted), 10)]
	rows := make([][]string, len(sorted))
	for i, of := range sorted {
		t := tallies[of]
		rows[i] = []string{of.String(), fmt.Sprint(t.count), Duration(t.longest), Duration(t.total)}
	}
	columns := []column{{title: "worst " + what}, {title: "connections", right: true},
		{title: "longest", right: true}, {title: "together", right: true}}
	b.WriteString(strings.Join(table(columns, rows, style.Width), "\n") + "\n\n")
}

// Record is the summary as JSON.
func (s *Summary) Record(at time.Time, t Totals) map[string]any {
	ends := map[string]uint64{}
	for e, n := range s.ends {
		ends[e.String()] = n
	}
	return map[string]any{
		"time": at, "kind": "summary", "traced_seconds": t.Traced.Seconds(),
		"entered": s.entered, "seeded": s.seeded, "left": s.left, "remaining": t.Remaining,
		"instants": t.Instants, "unfollowed": t.Unfollowed, "overdue": s.overdue, "ends": ends,
		"lost": t.Lost, "missed": t.Missed, "corrected": t.Corrected, "shed": t.Shed,
	}
}
