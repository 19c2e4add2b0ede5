// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

// growing is about places where more come than go, all the time.
func (d *diagnoser) growing() {
	for _, s := range d.spots {
		g := s.growth
		if !g.Known || !g.Steady || g.Rate <= 0 || len(s.held) < pileMany || d.levelsOff(s) {
			continue
		}
		f := Finding{Severity: Warning, ID: "growing",
			Title: fmt.Sprintf("held FIN_WAIT2 at %s grows steadily: %.2g a second come, and %.2g go", s.where(), g.Entering, g.Leaving),
			Where: []Location{{Text: fmt.Sprintf("%d now; by %.2g to %.2g a second, watched for %s", len(s.held), g.Least, g.Most, Duration(d.watched()))}},
			Why:   "As long as fewer leave than come, there is no end to it but that of slots, descriptors or memory.",
			Fix:   []Edit{{Text: "a timeout for them in the program that holds them"}}}
		if s.place != nil {
			f.Fix = []Edit{{Text: "as for held-pile-up: a shorter timeout ends them sooner"}}
			if t, known := s.place.Ends(); known && t.Duration > 0 {
				f.Why = fmt.Sprintf("Only when the first have been there for %s (`%s`) will as many leave as come: at this rate with about %.0f there.",
					span(t.Duration), t.By.Text, g.AtMost(t.Duration))
			}
		}
		if s.isPile {
			f.Severity = max(f.Severity, s.severity())
		}
		f.Verify = "`fintrace diagnose --duration 5m` does not find it any more."
		d.add(f)
	}
}

// levelsOff says whether growth ends by itself, and soon: with a timeout that is
// as it should be, before half of the slots are taken.
func (d *diagnoser) levelsOff(s *spot) bool {
	if s.place == nil {
		return false
	}
	t, known := s.place.Ends()
	if !known || t.Duration == 0 || t.Duration > finLong || s.isPile {
		return false
	}
	for _, l := range s.slots {
		if s.growth.AtMost(t.Duration)*2 > float64(l.limit) {
			return false
		}
	}
	return true
}

// expiry is something that ends connections after a time.
type expiry struct {
	length time.Duration
	late   time.Duration // that it may be
	name   string
	where  Location
}

// timersOf are those that may end what is held at a spot.
func (d *diagnoser) timersOf(s *spot) (timers []expiry) {
	if s.place == nil {
		return nil
	}
	names := []string{"client-fin", "client", "tunnel", "http-keep-alive", "http-request"}
	if s.side == events.Outbound {
		names = []string{"server-fin", "server", "tunnel"}
	}
	if t := s.place.Timeout; t.Duration > 0 && t.By.IsSet() {
		// What ends them is named before others of the same length.
		timers = append(timers, setTimer(t.By))
	}
	for _, px := range s.place.Proxies {
		for _, name := range names {
			if t := px.Timeouts[name]; t.IsSet() && t.Value > 0 {
				timers = append(timers, setTimer(t))
			}
		}
	}
	return timers
}

func setTimer(t haproxy.Setting[time.Duration]) expiry {
	return expiry{t.Value, track.Grace, t.Text, Location{Pos: t.Pos, Text: t.Section + ": " + t.Text}}
}

// cliffs is about ages at which connections leave together.
func (d *diagnoser) cliffs() {
	for _, s := range d.spots {
		if len(s.lives) < pileMany {
			continue
		}
		unknown := "Peers close when they like, and timers when they run out: this is one that is not known here. It is the peers', one on the way (a firewall, a NAT), or the program's own."
		if s.place != nil {
			unknown += " No timeout of HAProxy that matters there is that long."
		}
		for _, c := range Cliffs(s.lives, d.e.Began, d.e.Ended) {
			d.cliff("connections held at "+s.where(), c, d.timersOf(s), unknown,
				"That is the length of this timer: what leaves then was not closed by its peer, but waited for in vain. A shorter one frees slots sooner.")
		}
	}
	d.closedCliffs()
}

func (d *diagnoser) cliff(what string, c Cliff, timers []expiry, unknown, known string) {
	f := Finding{ID: "age-cliff", Why: unknown}
	f.Title = fmt.Sprintf("%d of %d %s left at an age of %s", c.Left, c.Of, what, cliffAge(c))
	if c.Left == 0 {
		f.Title = fmt.Sprintf("the %s go no further than an age of %s", what, cliffAge(c))
	}
	for _, t := range timers {
		if c.EndedBy(t.length, t.late) {
			f.Title += ": " + t.name
			f.Where = append(f.Where, t.where)
			f.Why = known
			break
		}
	}
	if f.Why == unknown && c.Confidence < sureCliff {
		return
	}
	f.Where = append(f.Where, Location{Text: fmt.Sprintf("confidence %.0f%%; %d are older", c.Confidence*100, c.Older)})
	d.add(f)
}

// sureCliff is how sure a cliff has to be that no timer explains.
const sureCliff = 0.99

func cliffAge(c Cliff) string {
	if c.Spread < time.Second {
		return Duration(c.Age)
	}
	return Duration(c.Age) + " to " + Duration(c.Age+c.Spread)
}

// closedCliffs is about the kernel's timer for what is closed, where there is
// enough of that.
func (d *diagnoser) closedCliffs() {
	if len(d.closed) < pileMany {
		return
	}
	lives := map[uint32][]Lifetime{}
	var order []uint32
	timers := map[uint32][]expiry{}
	add := func(netns uint32, l Lifetime) {
		if lives[netns] == nil {
			order = append(order, netns)
		}
		lives[netns] = append(lives[netns], l)
	}
	for _, c := range d.closed {
		if c.StagesKnown {
			add(c.Netns, Lifetime{Entered: c.Since.Add(c.Held), Lasted: c.Orphaned + c.Minisock, AtLeast: !c.SinceExact && c.Held == 0})
		}
		if known := timers[c.Netns]; len(known) == 0 {
			timers[c.Netns] = []expiry{{c.Limit.Duration, c.Limit.Slack, c.Limit.Source(), Location{Text: c.Limit.String()}}}
		}
	}
	for i := range d.e.Departures {
		if c := &d.e.Departures[i]; c.StagesKnown && c.Stage != events.Held {
			add(c.Netns, Lifetime{Entered: c.Since.Add(c.Held), Lasted: c.Orphaned + c.Minisock, Left: true, AtLeast: !c.SinceExact && c.Held == 0})
		}
	}
	for _, netns := range order {
		for _, c := range Cliffs(lives[netns], d.e.Began, d.e.Ended) {
			d.cliff("closed connections", c, timers[netns], "The kernel's timer for them is not that long: peers end them, or what is on the way.",
				"That is the kernel's timer for what no process has any more, and as it should be.")
		}
	}
}

// bursts is about places where connections come at an interval.
func (d *diagnoser) bursts() {
	for _, s := range d.spots {
		p, ok := Bursts(s.lives, d.e.Began, d.e.Ended)
		// Anything regular comes in bursts of one. That is worth a word where it
		// has led to a pile, or to a new pile each time.
		if !ok || !s.isPile && p.Share*float64(len(s.lives)) < float64(pileMany*p.Bursts) {
			continue
		}
		f := Finding{ID: "bursts",
			Title: fmt.Sprintf("FIN_WAIT2 at %s comes in bursts, one every %s", s.where(), Duration(p.Every)),
			Where: []Location{{Text: fmt.Sprintf("%d bursts seen, the last %s ago, give or take %s, with %.0f%% of the connections; confidence %.0f%%",
				p.Bursts, Duration(max(d.e.Ended.Sub(p.Last), 0)), Duration(p.Jitter), p.Share*100, p.Confidence*100)}},
			Why: "Something with a clock does this: a job, a health check, a pool that is renewed, or a timer of HAProxy's that closes what came together. What runs at that interval, on the peers or here, is where to look."}
		if peers := byPeer(s.held); len(peers) > 0 {
			f.Where = append(f.Where, Location{Text: "peers: " + tallied(peers, namesOfAll)})
		}
		if p.AtLeast {
			f.Where = append(f.Where, Location{Text: "as far as they were there before, by when their peers last sent something"})
		}
		if p.Missed > 0 {
			f.Where = append(f.Where, Location{Text: fmt.Sprintf("%d that should have been between them were not there", p.Missed)})
		}
		f.Verify = "`fintrace diagnose --duration 30m` watches longer, and is surer."
		d.add(f)
	}
}
