// SPDX-License-Identifier: Apache-2.0

package report

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
)

const (
	second = time.Second
	minute = time.Minute
	hour   = time.Hour
	// opening is when the watches of these tests begin.
	opening = events.Time(1000 * hour)
)

// trials is how often each case is tried. With 1000, no case has false alarms in more
// than 0.3%.
var trials = flag.Int("trials", 100, "how often each case of the tests of timing is tried")

// A draw is a random duration.
type draw func(*rand.Rand) time.Duration

func exactly(d time.Duration) draw { return func(*rand.Rand) time.Duration { return d } }

func after(d time.Duration, more draw) draw {
	return func(r *rand.Rand) time.Duration { return d + more(r) }
}

func uniform(from, to time.Duration) draw {
	return func(r *rand.Rand) time.Duration { return from + time.Duration(r.Float64()*float64(to-from)) }
}

func exponential(mean time.Duration) draw {
	return func(r *rand.Rand) time.Duration { return time.Duration(r.ExpFloat64() * float64(mean)) }
}

func lognormal(median time.Duration, sigma float64) draw {
	return func(r *rand.Rand) time.Duration {
		return time.Duration(float64(median) * math.Exp(sigma*r.NormFloat64()))
	}
}

// timer ends at length, late by up to a part of it, what has not ended by itself.
func timer(length time.Duration, late float64, otherwise draw) draw {
	return func(r *rand.Rand) time.Duration {
		return min(otherwise(r), time.Duration(float64(length)*(1+late*r.Float64())))
	}
}

func either(share float64, a, b draw) draw {
	return func(r *rand.Rand) time.Duration {
		if r.Float64() < share {
			return a(r)
		}
		return b(r)
	}
}

var never = exactly(1 << 60)

// An arrivals is when connections enter, from some time before the watch until its end.
type arrivals func(r *rand.Rand, ended events.Time) []events.Time

// steadily enters at random times, so many a second.
func steadily(rate float64, since time.Duration) arrivals {
	return func(r *rand.Rand, ended events.Time) (entries []events.Time) {
		at := opening.Add(-since)
		for {
			if at = at.Add(time.Duration(r.ExpFloat64() / rate * 1e9)); at > ended {
				return entries
			}
			entries = append(entries, at)
		}
	}
}

// inBursts enters so many at once, after each gap.
func inBursts(gap draw, count func(*rand.Rand) int, within draw, since time.Duration) arrivals {
	return func(r *rand.Rand, ended events.Time) (entries []events.Time) {
		for at := opening.Add(-since).Add(uniform(0, gap(r))(r)); at <= ended; at = at.Add(gap(r)) {
			for range count(r) {
				if e := at.Add(within(r)); e <= ended {
					entries = append(entries, e)
				}
			}
		}
		return entries
	}
}

// once enters so many, some time before the watch or into it.
func once(n int, within draw, since time.Duration) arrivals {
	return func(r *rand.Rand, ended events.Time) (entries []events.Time) {
		for range n {
			entries = append(entries, opening.Add(-since).Add(within(r)))
		}
		return entries
	}
}

func always(n int) func(*rand.Rand) int { return func(*rand.Rand) int { return n } }

func both(a, b arrivals) arrivals {
	return func(r *rand.Rand, ended events.Time) []events.Time { return append(a(r, ended), b(r, ended)...) }
}

// watching is what a watch sees of connections that last for so long.
func watching(r *rand.Rand, in arrivals, lasting draw, watched time.Duration) (lives []Lifetime, began, ended events.Time) {
	ended = opening.Add(watched)
	for _, at := range in(r, ended) {
		// Of those that are held already, the kernel tells bounds only.
		l := Lifetime{Entered: at, Lasted: lasting(r), AtLeast: at < opening}
		switch end := at.Add(l.Lasted); {
		case end <= opening:
			continue
		case end <= ended:
			l.Left = true
		default:
			l.Lasted = ended.Sub(at)
		}
		lives = append(lives, l)
	}
	return lives, opening, ended
}

// A twist is what else happens.
type twist func(r *rand.Rand, lives []Lifetime, ended events.Time) []Lifetime

// killed ends all that are there at one moment of the watch.
func killed(r *rand.Rand, lives []Lifetime, ended events.Time) []Lifetime {
	at := opening.Add(ended.Sub(opening) / 2)
	for i := range lives {
		if l := &lives[i]; l.Entered < at && l.end() > at {
			l.Lasted, l.Left = at.Sub(l.Entered)+uniform(0, 20*time.Millisecond)(r), true
		}
	}
	return lives
}

// talkative has peers that send something at an interval: that is what bounds are from.
func talkative(interval time.Duration) twist {
	return func(r *rand.Rand, lives []Lifetime, _ events.Time) []Lifetime {
		for i := range lives {
			if l := &lives[i]; l.AtLeast {
				age := opening.Sub(l.Entered)
				silent := min(age, uniform(0, interval)(r))
				l.Entered, l.Lasted = l.Entered.Add(age-silent), l.Lasted-age+silent
			}
		}
		return lives
	}
}

// exact is where the kernel tells since when each is there.
func exact(_ *rand.Rand, lives []Lifetime, _ events.Time) []Lifetime {
	for i := range lives {
		lives[i].AtLeast = false
	}
	return lives
}

// often is the share of trials in which something is found.
func often(trials int, seed uint64, found func(r *rand.Rand) bool) float64 {
	n := 0
	for i := range trials {
		if found(rand.New(rand.NewPCG(seed, uint64(i)))) {
			n++
		}
	}
	return float64(n) / float64(trials)
}

func TestCliffs(t *testing.T) {
	fiveBursts := func(every, within time.Duration) arrivals {
		return inBursts(exactly(every), always(200), uniform(0, within), 5*every)
	}
	for _, test := range []struct {
		name    string
		in      arrivals
		lasting draw
		watched time.Duration
		want    time.Duration // the timer, 0: none
		late    time.Duration
		least   float64 // found in so many cases; or at most so many where there is none
		twist   twist
	}{
		{"program's timer 60s", steadily(5, 10*minute), timer(minute, 0.0002, never), 10 * second, minute, 0, 0.99, nil},
		{"program's timer 60s, slow", steadily(1, 10*minute), timer(minute, 0.0002, never), 10 * second, minute, 0, 0.9, nil},
		{"program's timer 1h", steadily(3, 3*hour), timer(hour, 0.00001, never), 10 * second, hour, 0, 0.99, nil},
		{"kernel's timer 60s", steadily(5, 10*minute), timer(minute, 0.033, never), 10 * second, minute, 2 * second, 0.95, nil},
		{"kernel's timer 60s, longer", steadily(5, 10*minute), timer(minute, 0.033, never), minute, minute, 2 * second, 0.99, nil},
		{"timer late by an eighth", steadily(10, 10*minute), timer(8*second, 0.125, never), 30 * second, 8 * second, second, 0.99, nil},
		{"timer of 1s", steadily(20, 10*minute), timer(second, 0.01, never), 10 * second, second, 0, 0.99, nil},
		{"timer ends what peers leave", steadily(10, 10*minute), timer(30*second, 0.001, exponential(30*second)), 10 * second, 30 * second, 0, 0.99, nil},
		{"timer of half of them", steadily(10, 10*minute), either(0.5, timer(30*second, 0.001, never), exponential(20*second)), 10 * second, 30 * second, 0, 0.95, nil},
		{"timer, one burst", once(300, uniform(0, second), 25*second), timer(30*second, 0.001, never), 10 * second, 30 * second, 0, 0.99, nil},
		{"timer, bursts", fiveBursts(minute, second), timer(30*second, 0.001, never), 2 * minute, 30 * second, 0, 0.99, nil},
		{"exponential", steadily(50, 4*minute), exponential(30 * second), 10 * second, 0, 0, 0.01, nil},
		{"exponential, long", steadily(10, 4*minute), exponential(30 * second), 10 * minute, 0, 0, 0.01, nil},
		{"exponential, an hour", steadily(1, 10*hour), exponential(hour), minute, 0, 0, 0.01, nil},
		{"uniform", steadily(50, minute), uniform(0, minute), 10 * second, 0, 0, 0.01, nil},
		{"uniform, long", steadily(10, minute), uniform(0, minute), 10 * minute, 0, 0, 0.01, nil},
		{"uniform, an hour", steadily(1, 10*hour), uniform(0, hour), 10 * second, 0, 0, 0.01, nil},
		{"lognormal", steadily(50, 4*minute), lognormal(30*second, 0.5), minute, 0, 0, 0.01, nil},
		{"few", steadily(0.05, hour), timer(minute, 0.0002, never), 10 * second, 0, 0, 0.01, nil},
		{"one burst that fades", once(500, uniform(0, 5*second), 30*minute), exponential(10 * minute), 10 * second, 0, 0, 0.01, nil},
		{"one short burst that fades", once(500, uniform(0, second/10), 30*minute), exponential(10 * minute), 10 * second, 0, 0, 0.01, nil},
		{"bursts that fade", fiveBursts(minute, second/10), exponential(3 * minute), 10 * second, 0, 0, 0.01, nil},
		{"bursts that fade, long", fiveBursts(minute, second), exponential(3 * minute), 10 * minute, 0, 0, 0.01, nil},
		{"timer of one in ten", steadily(20, 3*minute), either(0.1, timer(30*second, 0.001, never), exponential(10*minute)), minute, 0, 0, 0.01, nil},
		{"exponential, short", steadily(200, second), after(second/4, exponential(second/20)), minute, 0, 0, 0.01, nil},
		{"killed", steadily(20, 3*minute), never, 10 * second, 0, 0, 0.01, killed},
		{"one burst that is killed", once(300, uniform(0, second), minute), never, 10 * second, 0, 0, 0.01, killed},
		{"one short burst that is killed", once(300, uniform(0, second/50), minute), never, 10 * second, 0, 0, 0.01, killed},
		{"bursts that are killed", fiveBursts(minute, second), never, 10 * second, 0, 0, 0.01, killed},
		{"talkative peers", steadily(5, hour), exponential(10 * minute), 10 * second, 0, 0, 0.01, talkative(minute)},
		{"talkative peers, few leave", steadily(0.1, hour), exponential(100 * hour), 10 * second, 0, 0, 0.01, talkative(minute)},
		{"rarely talkative peers", steadily(0.01, 10*hour), never, 10 * second, 0, 0, 0.01, talkative(2 * hour)},
		{"timer of 1h, few reach it", steadily(0.3, 2*hour), timer(hour, 0.00001, never), 10 * second, hour, 0, 0.9, nil},
		{"began an hour ago", steadily(0.3, hour), never, 10 * second, 0, 0, 0.01, nil},
		{"began an hour ago, some leave", steadily(0.3, hour), exponential(10 * hour), 30 * second, 0, 0, 0.01, exact},
		{"nothing leaves", steadily(5, 10*minute), never, 10 * second, 0, 0, 0.01, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			wrong := 0
			rate := often(*trials, 1, func(r *rand.Rand) bool {
				lives, began, ended := watching(r, test.in, test.lasting, test.watched)
				if test.twist != nil {
					lives = test.twist(r, lives, ended)
				}
				cliffs := Cliffs(lives, began, ended)
				right := false
				for _, c := range cliffs {
					if test.want == 0 || c.EndedBy(test.want, test.late) {
						right = true
					} else {
						wrong++
					}
				}
				return right
			})
			t.Logf("%-30s found in %5.1f%%, others %d", test.name, 100*rate, wrong)
			switch {
			case test.want == 0 && rate > test.least:
				t.Errorf("false alarm in %.1f%% of the cases", 100*rate)
			case test.want != 0 && rate < test.least:
				t.Errorf("found in %.1f%% of the cases, want %.1f%%", 100*rate, 100*test.least)
			}
			if float64(wrong) > 0.01*float64(*trials) {
				t.Errorf("%d cliffs at other ages", wrong)
			}
		})
	}
}

func TestBursts(t *testing.T) {
	sized := func(mean float64) func(*rand.Rand) int {
		return func(r *rand.Rand) int { return int(mean * (0.5 + r.Float64())) }
	}
	missing := func(n int, share float64) func(*rand.Rand) int {
		return func(r *rand.Rand) int {
			if r.Float64() < share {
				return 0
			}
			return n
		}
	}
	for _, test := range []struct {
		name    string
		in      arrivals
		lasting draw
		watched time.Duration
		want    time.Duration // the period, 0: none
		least   float64       // found in so many cases; or at most so many where there is none
	}{
		{"every 5s", inBursts(exactly(5*second), sized(20), uniform(0, second/5), minute), never, 10 * second, 5 * second, 0.99},
		{"every 60s", inBursts(exactly(minute), sized(20), uniform(0, second), 20*minute), never, 10 * second, minute, 0.99},
		{"every 60s, the last 5", inBursts(exactly(minute), sized(20), uniform(0, second), 5*minute), never, 10 * second, minute, 0.95},
		{"every 60s, the last 3", inBursts(exactly(minute), sized(20), uniform(0, second/5), 3*minute), never, 0, minute, 0.5},
		{"every 60s, jitter 5s", inBursts(uniform(55*second, 65*second), sized(20), uniform(0, 2*second), 20*minute), never, 10 * second, minute, 0.95},
		{"every 60s, a third missing", inBursts(exactly(minute), missing(20, 0.33), uniform(0, second), 30*minute), never, 10 * second, minute, 0.9},
		{"every 60s, noise as much", both(inBursts(exactly(minute), always(20), uniform(0, second), 20*minute), steadily(1/3., 20*minute)), never, 10 * second, minute, 0.99},
		{"every 60s, noise five times as much", both(inBursts(exactly(minute), always(40), uniform(0, second), 20*minute), steadily(10/3., 20*minute)), never, 10 * second, minute, 0.99},
		{"every 60s, thinning", inBursts(exactly(minute), always(100), uniform(0, second), hour), exponential(3 * minute), 10 * second, minute, 0.95},
		{"every 60s, watched for 30m", inBursts(exactly(minute), always(20), uniform(0, second), 5*minute), exponential(10 * second), 30 * minute, minute, 0.99},
		{"every 10m for 2h", inBursts(exactly(10*minute), always(50), uniform(0, 20*second), 2*hour), never, 10 * second, 10 * minute, 0.99},
		{"every hour for a day", inBursts(exactly(hour), always(50), uniform(0, 2*minute), 24*hour), never, 10 * second, hour, 0.99},
		{"every day for a week", inBursts(exactly(24*hour), always(50), uniform(0, 10*minute), 7*24*hour), never, 10 * second, 24 * hour, 0.95},
		{"every 60s, wide and few", inBursts(exactly(minute), always(7), uniform(0, 7*second), 20*minute), never, 10 * second, minute, 0.9},
		{"every 10s, small", both(inBursts(exactly(10*second), always(5), uniform(0, second), 5*minute), steadily(0.3, 5*minute)), never, 10 * second, 10 * second, 0.75},
		{"one at a time every 10s", inBursts(exactly(10*second), always(1), uniform(0, second/2), 5*minute), never, 10 * second, 10 * second, 0.99},
		{"Poisson, few", steadily(0.1, 10*minute), never, 10 * second, 0, 0.01},
		{"Poisson, very few", steadily(0.01, 10*minute), never, 10 * second, 0, 0.01},
		{"Poisson", steadily(1, 10*minute), never, 10 * second, 0, 0.01},
		{"Poisson, many", steadily(50, 10*minute), never, 10 * second, 0, 0.01},
		{"Poisson, thinning", steadily(10, hour), exponential(5 * minute), 10 * second, 0, 0.01},
		{"Poisson, watched for 30m", steadily(3, hour), exponential(10 * second), 30 * minute, 0, 0.01},
		{"bursts at random", inBursts(exponential(minute), always(20), uniform(0, second), 20*minute), never, 10 * second, 0, 0.01},
		{"bursts at random, few", inBursts(exponential(minute), always(20), uniform(0, second), 4*minute), never, 10 * second, 0, 0.01},
		{"bursts at random, wide", inBursts(exponential(minute), always(20), uniform(0, 10*second), 20*minute), never, 10 * second, 0, 0.01},
		{"two bursts", inBursts(exactly(minute), always(50), uniform(0, second), 100*second), never, 0, 0, 0.01},
	} {
		t.Run(test.name, func(t *testing.T) {
			wrong := 0
			rate := often(*trials, 2, func(r *rand.Rand) bool {
				p, ok := Bursts(watching(r, test.in, test.lasting, test.watched))
				if !ok || test.want == 0 {
					return ok
				}
				if math.Abs(float64(p.Every-test.want)) > 0.05*float64(test.want) {
					if wrong++; wrong < 4 {
						t.Logf("%+v", p)
					}
					return false
				}
				return true
			})
			t.Logf("%-30s found in %5.1f%%, other periods %d", test.name, 100*rate, wrong)
			switch {
			case test.want == 0 && rate > test.least:
				t.Errorf("false alarm in %.1f%% of the cases", 100*rate)
			case test.want != 0 && rate < test.least:
				t.Errorf("found in %.1f%% of the cases, want %.1f%%", 100*rate, 100*test.least)
			}
			if float64(wrong) > 0.01*float64(*trials) {
				t.Errorf("%d other periods", wrong)
			}
		})
	}
}

func TestGrowth(t *testing.T) {
	for _, test := range []struct {
		name    string
		in      arrivals
		lasting draw
		watched time.Duration
		rate    float64 // of the growth; 0: not steady
		least   float64
	}{
		{"nothing leaves", steadily(10, minute), never, 10 * second, 10, 0.99},
		{"nothing leaves, slow", steadily(4, minute), never, 10 * second, 4, 0.5},
		{"half leave", steadily(20, 10*minute), either(0.5, exponential(second), never), 10 * second, 10, 0.7},
		{"half leave, longer", steadily(20, 10*minute), either(0.5, exponential(second), never), minute, 10, 0.99},
		{"balance", steadily(20, 10*minute), exponential(20 * second), 10 * second, 0, 0.01},
		{"balance, longer", steadily(20, 10*minute), exponential(20 * second), 5 * minute, 0, 0.01},
		{"balance, a timer", steadily(20, 10*minute), timer(20*second, 0.001, never), minute, 0, 0.01},
		{"a burst", once(100, uniform(0, second), -5*second), never, 10 * second, 0, 0.01},
		{"two bursts", inBursts(exactly(30*second), always(100), uniform(0, second), 0), never, minute, 0, 0.01},
		{"a burst and balance", both(once(50, uniform(0, second), -7*second), steadily(10, minute)), exponential(2 * second), 20 * second, 0, 0.01},
		{"a burst that fades", once(200, exponential(3*second), 0), never, 10 * second, 0, 0.01},
		{"it shrinks", once(1000, uniform(0, second), minute), exponential(minute), 10 * second, 0, 0.01},
		{"few", steadily(0.5, minute), never, 10 * second, 0, 0.01},
	} {
		t.Run(test.name, func(t *testing.T) {
			covered, known := 0, 0
			rate := often(*trials, 3, func(r *rand.Rand) bool {
				g := GrowthOf(watching(r, test.in, test.lasting, test.watched))
				if g.Known {
					known++
					if g.Least <= test.rate && test.rate <= g.Most {
						covered++
					}
				}
				return g.Steady
			})
			t.Logf("%-30s steady in %5.1f%%, of %d the rate within its bounds in %5.1f%%", test.name, 100*rate, known, 100*float64(covered)/float64(max(known, 1)))
			switch {
			case test.rate == 0 && rate > test.least:
				t.Errorf("false alarm in %.1f%% of the cases", 100*rate)
			case test.rate != 0 && rate < test.least:
				t.Errorf("found in %.1f%% of the cases, want %.1f%%", 100*rate, 100*test.least)
			}
		})
	}
}

// TestPeriodsByChance has few random times, where regular ones are the likeliest.
func TestPeriodsByChance(t *testing.T) {
	for _, n := range []int{3, 4, 5, 6, 8, 12, 20, 50, 128, 129, 300, 1000} {
		rate := often(5**trials, uint64(n), func(r *rand.Rand) bool {
			_, ok := Bursts(watching(r, once(n, uniform(0, 10*minute), 10*minute), never, 0))
			return ok
		})
		t.Logf("%4d random entries: a period in %.2f%%", n, 100*rate)
		if rate > 0.01 {
			t.Errorf("false alarm in %.2f%% of the cases with %d entries", 100*rate, n)
		}
	}
}

// TestPeriodsFound is how far from regular bursts may be. The last column has as
// many at random times.
func TestPeriodsFound(t *testing.T) {
	jitters := []float64{0, 0.01, 0.02, 0.05, 0.1, 0.2}
	t.Logf("found in %% of the cases, by jitter in %% of the interval\nbursts %5.0f random", jitters)
	for _, n := range []int{3, 4, 5, 8, 12, 20} {
		found := func(times int, gap draw) float64 {
			return often(times, uint64(n), func(r *rand.Rand) bool {
				var entries []events.Time
				at := opening
				for range n {
					at = at.Add(-gap(r))
					for range 20 {
						entries = append(entries, at.Add(uniform(0, second/5)(r)))
					}
				}
				_, ok := Bursts(watching(r, func(*rand.Rand, events.Time) []events.Time { return entries }, never, 0))
				return ok
			})
		}
		rates := make([]float64, len(jitters))
		for i, jitter := range jitters {
			rates[i] = 100 * found(*trials, func(r *rand.Rand) time.Duration {
				return minute + time.Duration(jitter*r.NormFloat64()*float64(minute))
			})
		}
		random := 100 * found(*trials*10, exponential(minute))
		t.Logf("%6d %5.0f %5.2f", n, rates, random)
		if random > 1 {
			t.Errorf("%d bursts: false alarm in %.2f%% of the cases", n, random)
		}
		if n >= 4 && rates[2] < 90 {
			t.Errorf("%d bursts with a jitter of 2%% are found in %.0f%% of the cases", n, rates[2])
		}
		if n >= 8 && rates[4] < 70 {
			t.Errorf("%d bursts with a jitter of 10%% are found in %.0f%% of the cases", n, rates[4])
		}
	}
}

func TestCliffFigures(t *testing.T) {
	began, ended := opening, opening.Add(10*second)
	var lives []Lifetime
	for i := range 10 { // entered a second apart, left at 60s and up to 9 ms
		late := time.Duration(i) * time.Millisecond
		lives = append(lives, Lifetime{Entered: began.Add(-minute + time.Duration(i)*second), Lasted: minute + late, Left: true, AtLeast: i < 6})
	}
	lives = append(lives,
		Lifetime{Entered: began.Add(-minute + second), Lasted: 69 * second},         // went past
		Lifetime{Entered: began.Add(-2 * minute), Lasted: 2*minute + 10*second},     // had gone past before
		Lifetime{Entered: began.Add(-30 * second), Lasted: 40 * second},             // is not there yet
		Lifetime{Entered: began.Add(-20 * second), Lasted: 25 * second, Left: true}) // left before
	cliffs := Cliffs(lives, began, ended)
	if len(cliffs) != 1 {
		t.Fatalf("cliffs: %+v", cliffs)
	}
	c := cliffs[0]
	if c.Confidence < 0.999 || c.Confidence > 1 {
		t.Errorf("confidence %v", c.Confidence)
	}
	c.Confidence = 0
	want := Cliff{Age: minute + time.Millisecond, Spread: 7 * time.Millisecond, Left: 10, Of: 11, Older: 2, AtLeast: true}
	if c != want {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestCliffEndedBy(t *testing.T) {
	program := Cliff{Age: minute, Spread: 5 * time.Millisecond}
	kernel := Cliff{Age: 60200 * time.Millisecond, Spread: 1600 * time.Millisecond}
	for _, test := range []struct {
		cliff       Cliff
		timer, late time.Duration
		want        bool
	}{
		{program, minute, 0, true},
		{program, 59 * second, 0, false},
		{program, 59 * second, 2 * second, true},
		{program, 61 * second, 2 * second, false}, // never early
		{kernel, minute, 0, true},
		{kernel, minute, 7500 * time.Millisecond, true},
		{kernel, 30 * second, 4 * second, false},
		{kernel, hour, 0, false},
	} {
		if got := test.cliff.EndedBy(test.timer, test.late); got != test.want {
			t.Errorf("%v to %v ended by a timer of %v that is up to %v late: %v",
				test.cliff.Age, test.cliff.Age+test.cliff.Spread, test.timer, test.late, got)
		}
	}
}

// TestCliffOfThoseThere has none that left to tell the cliff by.
func TestCliffOfThoseThere(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	lives, began, ended := watching(r, steadily(0.1, 2*hour), timer(hour, 0, never), 0)
	if cliffs := Cliffs(lives, began, ended); len(cliffs) != 0 {
		t.Errorf("from bounds: %+v", cliffs)
	}
	cliffs := Cliffs(exact(r, lives, ended), began, ended)
	if len(cliffs) != 1 || !cliffs[0].EndedBy(hour, 0) || cliffs[0].Left != 0 || cliffs[0].Confidence != 0.5 {
		t.Errorf("from exact ages: %+v", cliffs)
	}
}

func TestBurstFigures(t *testing.T) {
	var lives []Lifetime
	for i := range 8 {
		if i == 3 {
			continue // missing
		}
		for j := range 10 {
			lives = append(lives, Lifetime{Entered: opening.Add(time.Duration(i-8)*minute + time.Duration(j)*time.Millisecond), Lasted: hour, AtLeast: true})
		}
	}
	p, ok := Bursts(lives, opening, opening)
	if !ok || p.Confidence < 0.999 || p.Confidence > 1 {
		t.Fatalf("period %+v, %v", p, ok)
	}
	p.Confidence = 0
	want := Period{Every: minute, Bursts: 7, Missed: 1, Share: 1, Last: opening.Add(-minute + 4*time.Millisecond), AtLeast: true}
	if p != want {
		t.Errorf("got  %+v\nwant %+v", p, want)
	}
	for i := range lives {
		lives[i].AtLeast = false
	}
	if p, _ := Bursts(lives, opening, opening); p.Every != minute || p.AtLeast {
		t.Errorf("with exact entries %+v", p)
	}
}

func TestGrowthFigures(t *testing.T) {
	began, ended := opening, opening.Add(10*second)
	var lives []Lifetime
	for i := range 100 { // ten a second enter, and one in four leaves at once
		lives = append(lives, Lifetime{Entered: began.Add(time.Duration(i)*second/10 + 1), Lasted: second / 50, Left: i%4 == 0})
	}
	g := GrowthOf(lives, began, ended)
	if !g.Known || !g.Steady || g.Entering != 10 || g.Leaving != 2.5 || g.Rate != 7.5 || g.Least >= 7.5 || g.Most <= 7.5 {
		t.Errorf("%+v", g)
	}
	g.Least, g.Most = 5, 10
	if earliest, latest, ok := g.FullAt(1000, 2000); !ok || earliest != 100*second || latest != 200*second {
		t.Errorf("full in %v to %v, %v", earliest, latest, ok)
	}
	if earliest, latest, ok := g.FullAt(2001, 2000); !ok || earliest != 0 || latest != 0 {
		t.Errorf("full already: in %v to %v, %v", earliest, latest, ok)
	}
	if _, latest, ok := g.FullAt(0, math.MaxInt); !ok || latest <= 0 {
		t.Errorf("never full: in %v, %v", latest, ok)
	}
	if got := g.AtMost(minute); got != 600 {
		t.Errorf("at most %v", got)
	}
	g.Steady = false
	if earliest, latest, ok := g.FullAt(1000, 2000); ok {
		t.Errorf("unsteady, full in %v to %v", earliest, latest)
	}
	if g := GrowthOf(lives, began, began); g.Known {
		t.Errorf("nothing watched: %+v", g)
	}
}

// TestTimingOfAnything holds what is true of all lives: the order that they come in
// does not matter, nor when it was, and the figures fit together.
func TestTimingOfAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		watched := rapid.SampledFrom([]time.Duration{0, second, 10 * second, hour}).Draw(t, "watched")
		began, ended := opening, opening.Add(watched)
		duration := rapid.OneOf(rapid.Int64Range(0, int64(2*hour)), rapid.Map(rapid.Int64Range(0, 100), func(n int64) int64 { return n * int64(second) }))
		length := time.Duration(rapid.Int64Range(int64(second), int64(hour)).Draw(t, "timer"))
		lives := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Lifetime {
			if rapid.Bool().Draw(t, "timer ends it") {
				l := Lifetime{Lasted: length + time.Duration(rapid.IntRange(0, 1000).Draw(t, "late")), Left: true}
				l.Entered = ended.Add(-l.Lasted - time.Duration(rapid.Int64Range(0, int64(watched)).Draw(t, "fired before")))
				return l
			}
			l := Lifetime{
				Entered: ended.Add(-time.Duration(duration.Draw(t, "before"))),
				Left:    rapid.Bool().Draw(t, "left"), AtLeast: rapid.Bool().Draw(t, "at least"),
			}
			if l.Lasted = ended.Sub(l.Entered); l.Left {
				l.Lasted -= min(l.Lasted, time.Duration(duration.Draw(t, "left before"))%(watched+1))
			}
			return l
		}), 0, 400).Draw(t, "lives")

		type result struct {
			Cliffs []Cliff
			Period Period
			Found  bool
			Growth Growth
		}
		look := func(lives []Lifetime, began, ended events.Time) (r result) {
			r.Cliffs = Cliffs(lives, began, ended)
			r.Period, r.Found = Bursts(lives, began, ended)
			r.Growth = GrowthOf(lives, began, ended)
			return r
		}
		got := look(lives, began, ended)
		left := 0
		for _, l := range lives {
			if l.Left {
				left++
			}
		}
		for _, c := range got.Cliffs {
			if c.Left > left || c.Of < c.Left || c.Of > len(lives) || c.Older > len(lives)-left || c.Age <= 0 || c.Spread < 0 ||
				c.Confidence < 0.5 || c.Confidence > 1 {
				t.Errorf("cliff %+v of %d, of which %d left", c, len(lives), left)
			}
		}
		if p := got.Period; got.Found && (p.Every < shortestPeriod || p.Bursts < fewestBursts || p.Share <= 0 || p.Share > 1 ||
			p.Missed < 0 || p.Jitter < 0 || p.Last > ended || p.Confidence < 1-periodDoubt || p.Confidence > 1) {
			t.Errorf("period %+v", p)
		}
		if g := got.Growth; g.Known && !(g.Least <= g.Rate && g.Rate <= g.Most) || g.Steady && g.Least <= 0 {
			t.Errorf("growth %+v", g)
		}

		const shift = 12345 * time.Hour
		other := rapid.Permutation(lives).Draw(t, "in another order")
		for i := range other {
			other[i].Entered = other[i].Entered.Add(shift)
		}
		later := look(other, began.Add(shift), ended.Add(shift))
		if later.Found {
			later.Period.Last = later.Period.Last.Add(-shift)
		}
		if diff := cmp.Diff(got, later); diff != "" {
			t.Errorf("later and in another order:\n%s", diff)
		}
	})
}

func BenchmarkTiming(b *testing.B) {
	r := rand.New(rand.NewPCG(4, 4))
	for _, in := range []struct {
		name string
		in   arrivals
		last draw
	}{
		{"steady", steadily(100, 1000*second), timer(500*second, 0.01, exponential(200*second))},
		{"bursts", inBursts(exactly(minute), always(3000), uniform(0, second), 30*minute), never},
		{"leaving", steadily(100, minute), timer(30*second, 0.01, never)},
	} {
		watched := 10 * second
		if in.name == "leaving" {
			watched = 1000 * second
		}
		lives, began, ended := watching(r, in.in, in.last, watched)
		b.Run(fmt.Sprintf("%s/%d", in.name, len(lives)), func(b *testing.B) {
			for b.Loop() {
				Cliffs(lives, began, ended)
				Bursts(lives, began, ended)
				GrowthOf(lives, began, ended)
			}
		})
	}
}
