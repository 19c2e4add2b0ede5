// SPDX-License-Identifier: Apache-2.0

package report

import (
	"time"

	"github.com/fintrace/fintrace/internal/events"
)

// Lifetime is one connection's time in FIN_WAIT2, or in one stage of it, as a
// watch saw it: all that were there at any moment of the watch have one.
type Lifetime struct {
	Entered events.Time
	Lasted  time.Duration // until it left, or until the end of the watch
	Left    bool          // during the watch
	// AtLeast: it entered at Entered or earlier, and so lasted for Lasted or longer.
	AtLeast bool
}

// Cliff is an age at which connections leave together, whenever they entered: a
// timer of that length ends them.
type Cliff struct {
	// The cliff goes from Age to Age+Spread. A timer never fires early and often
	// late, so its length is near Age.
	Age    time.Duration
	Spread time.Duration
	Left   int // left there during the watch; 0 where only the ages of those still there tell
	Of     int // reached that age during the watch
	Older  int // are there now and are older
	// Confidence is 1 less the chance of seeing as much without a timer.
	Confidence float64
}

// EndedBy says whether a timer of that length ends connections at that age.
func (c Cliff) EndedBy(timer time.Duration) bool { return false }

// Cliffs finds ages that end in a cliff, the one where most left first.
func Cliffs(lives []Lifetime, began, ended events.Time) []Cliff { return nil }

// Period is the interval at which connections enter in bursts.
type Period struct {
	Every  time.Duration
	Jitter time.Duration // a typical interval is off by this
	Bursts int           // seen
	Missed int           // that should have been between those seen
	Share  float64       // of the entries since the first burst that came in bursts
	Last   events.Time   // the last burst
	// Confidence is 1 less the chance of bursts as regular if they came at random.
	Confidence float64
}

// Bursts finds the interval at which entries come in bursts. It is false if there
// is none, or not enough to tell.
func Bursts(lives []Lifetime, began, ended events.Time) (Period, bool) { return Period{}, false }

// Growth is how many more entered than left, a second.
type Growth struct {
	Known    bool // there was enough to tell: what follows is set
	Steady   bool // it grew all through the watch, by more than chance
	Entering float64
	Leaving  float64
	// Rate is Entering less Leaving, and with 95% confidence between Least and Most.
	Rate, Least, Most float64
}

// GrowthOf compares entries and departures over the watch.
func GrowthOf(lives []Lifetime, began, ended events.Time) Growth { return Growth{} }

// FullAt is when now many will have become limit, as an interval from now on, if
// the growth goes on. It is false if they do not grow steadily.
func (g Growth) FullAt(now, limit int) (earliest, latest time.Duration, ok bool) {
	return 0, 0, false
}

// AtMost is how many there can be in the long run if each lasts no longer than
// timer: growth ends there.
func (g Growth) AtMost(timer time.Duration) float64 { return 0 }
