// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"math"
	"slices"
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
	// The bound is the peer's last packet: of a peer that is silent, the entry itself.
	AtLeast bool
}

func (l *Lifetime) end() events.Time { return l.Entered.Add(l.Lasted) }

// Cliff is an age at which connections leave together, whenever they entered: a
// timer of that length ends them, here or at their peers.
type Cliff struct {
	// The cliff goes from Age to Age+Spread. A timer never fires early and often
	// late, so its length is near Age.
	Age    time.Duration
	Spread time.Duration
	Left   int // left there during the watch; 0 where only the ages of those still there tell
	Of     int // came to the end of the cliff during the watch, those who left included
	Older  int // are there now and are older
	// AtLeast: most ages here are bounds. Where peers are not silent, the cliff
	// is then so long after their last packet.
	AtLeast bool
	// Confidence is 1 less the chance of seeing as much without a timer. It is
	// 0.5 where the ages of those still there could as well tell when they began
	// to come: worth no more than a known timer of that length makes it.
	Confidence float64
}

// EndedBy says whether a timer of that length, which may fire late by some time,
// ends connections at that age.
func (c Cliff) EndedBy(timer, late time.Duration) bool {
	tolerance := max(50*time.Millisecond, timer/100)
	return timer <= c.Age+c.Spread+tolerance && c.Age <= timer+late+tolerance
}

const (
	// youngest is the least age of a cliff: below it, round trips decide how long
	// a close takes.
	youngest = 500 * time.Millisecond
	// fewestLeft is the least number that makes a cliff.
	fewestLeft = 5
	// flanks is how many widths of a cliff are looked at on either side of it.
	flanks = 4
	// The greatest chance of being wrong that a cliff or a period may have.
	cliffDoubt  = 0.001
	periodDoubt = 0.01
)

// cliffWidths are the widths of a cliff that are tried, as parts of its age: from
// that of a program's timer to that of the kernel's timer wheel, which is late by
// up to 1/8.
var cliffWidths = [...]float64{1. / 500, 1. / 100, 1. / 30, 1. / 8}

// Cliffs finds ages that end in a cliff, the one where most left first.
//
// It scans the ages of those who left with windows of several widths: a window
// is a cliff if it holds twice as many as all of the neighbourhood, several
// times as wide, does, by more than chance (a scan statistic with a local
// background; the binomial tail by Chernoff's bound, times the windows tried).
// Smooth lifetimes, exponential or uniform, do not look like this.
//
// Those who came in one burst have about the same age all the time. So the
// entries have to spread several times more than the ages do: a timer ends each
// at its own time, whereas what ends a whole burst at once, or some of it now and
// then, leaves the ages as spread as the entries, or more.
func Cliffs(lives []Lifetime, began, ended events.Time) []Cliff {
	left := make([]departure, 0, len(lives))
	for i := range lives {
		if l := &lives[i]; l.Left && l.Lasted >= youngest/2 { // the flank of the youngest
			left = append(left, departure{l.Lasted, l.Entered, l.AtLeast})
		}
	}
	slices.SortFunc(left, func(a, b departure) int { return cmp.Compare(a.age, b.age) })

	var cliffs []Cliff
	for _, w := range windows(left) {
		c := Cliff{Left: w.to - w.from, Confidence: 1 - math.Exp(w.logDoubt)}
		at := left[w.from:w.to]
		ages, entries := make([]int64, len(at)), make([]int64, len(at))
		bounds := 0
		for i := range at {
			ages[i], entries[i] = int64(at[i].age), int64(at[i].entered)
			if at[i].atLeast {
				bounds++
			}
		}
		c.AtLeast = 2*bounds > len(at)
		slices.Sort(entries)
		const apart = 3
		if spread(entries, 0.25) < apart*spread(ages, 0.25) {
			continue
		}
		// The outermost may be there by chance.
		c.Age, c.Spread = time.Duration(quantile(ages, 0.1)), time.Duration(spread(ages, 0.1))
		past := at[len(at)-1].age
		c.Of = c.Left
		for i := range lives {
			l := &lives[i]
			if l.Lasted <= past {
				continue
			}
			if l.Entered.Add(past) >= began {
				c.Of++
			}
			if !l.Left {
				c.Older++
			}
		}
		if c.Left*4 >= c.Of {
			cliffs = append(cliffs, c)
		}
	}
	if c, ok := edge(lives, left, began, ended); ok && len(cliffs) == 0 {
		cliffs = append(cliffs, c)
	}
	slices.SortStableFunc(cliffs, func(a, b Cliff) int { return cmp.Compare(b.Left, a.Left) })
	return cliffs
}

// departure is one that left.
type departure struct {
	age     time.Duration
	entered events.Time
	atLeast bool
}

// window is left[from:to], where ages are concentrated.
type window struct {
	from, to int
	logDoubt float64
}

// windows finds where the ages of those who left, sorted, are concentrated; none
// overlaps another.
func windows(left []departure) []window {
	tried := math.Log(float64(len(left) * len(cliffWidths)))
	var found []window
	for _, part := range cliffWidths {
		first := len(found)
		var to, low, high int
		for from := range left {
			age := left[from].age
			if age < youngest {
				continue
			}
			width := max(time.Duration(part*float64(age)), 10*time.Millisecond)
			low = advance(left, low, age-flanks*width-1)
			to = advance(left, to, age+width)
			high = advance(left, high, age+(flanks+1)*width)
			in, around := to-from, high-low
			if in < fewestLeft || in < 2*(around-in) {
				continue
			}
			p := tried + logTail(around, in, 1./(2*flanks+1))
			if p > math.Log(cliffDoubt) {
				continue
			}
			// Of those of one width that overlap, the best is enough.
			if i := len(found) - 1; i < first || found[i].to <= from {
				found = append(found, window{from, to, p})
			} else if p < found[i].logDoubt {
				found[i] = window{from, to, p}
			}
		}
	}
	// The most certain first. Of equals, the narrowest was found first.
	slices.SortStableFunc(found, func(a, b window) int { return cmp.Compare(a.logDoubt, b.logDoubt) })
	var best []window
	for _, w := range found {
		if !slices.ContainsFunc(best, func(b window) bool { return w.from < b.to && b.from < w.to }) {
			best = append(best, w)
		}
	}
	return best
}

// advance moves i to the first whose age is greater.
func advance(left []departure, i int, age time.Duration) int {
	for i < len(left) && left[i].age <= age {
		i++
	}
	return i
}

// edge finds a cliff that too few reached for the departures alone to tell: those
// still there are as many at each age up to a certain one, and none is older. If
// the few departures are at that age too, a timer ends them. If there was none,
// and none was to be expected, it may as well be that they began to come then.
func edge(lives []Lifetime, left []departure, began, ended events.Time) (Cliff, bool) {
	const (
		enough = 200
		near   = 0.05 // the part of the ages that is near the edge
	)
	var ages []int64
	bounds := 0
	for i := range lives {
		if l := &lives[i]; !l.Left {
			ages = append(ages, int64(l.Lasted))
			if l.AtLeast {
				bounds++
			}
		}
	}
	if len(ages) < enough {
		return Cliff{}, false
	}
	slices.Sort(ages)
	oldest := time.Duration(ages[len(ages)-1])
	if oldest < max(youngest, ended.Sub(began)) {
		return Cliff{}, false
	}
	n := float64(len(ages))
	// Kolmogorov-Smirnov's distance from a uniform distribution: with 200, above
	// 0.1 once in thirty times; it is 0.25 where lifetimes are uniform.
	for i, age := range ages {
		if math.Abs(float64(age)/float64(oldest)-(float64(i)+0.5)/n) > 0.1 {
			return Cliff{}, false
		}
	}
	for i := range left {
		if left[i].age < oldest-time.Duration(near*float64(oldest)) {
			return Cliff{}, false
		}
	}
	c := Cliff{
		Age: oldest, Spread: time.Duration(3 * float64(oldest) / n),
		Left: len(left), Of: len(left), AtLeast: 2*bounds > len(ages),
	}
	// As many reach the edge as are as young as the watch is long. Peers that send
	// something now and then have no ages above that interval, and do not leave.
	expected := n * float64(ended.Sub(began)) / float64(oldest)
	if logPoisson(c.Left, expected) < math.Log(0.05) || c.Left == 0 && bounds > 0 {
		return Cliff{}, false
	}
	// Each of them would be near the edge by chance once in 1/near times.
	c.Confidence = max(0.5, 1-math.Pow(near, float64(c.Left)))
	return c, true
}

// Period is the interval at which connections enter in bursts.
type Period struct {
	Every  time.Duration
	Jitter time.Duration // half of the intervals are off by no more than this
	Bursts int           // seen
	Missed int           // that should have been between those seen
	Share  float64       // of the entries since the first burst that came in bursts
	Last   events.Time   // the last burst
	// AtLeast: it takes entries to see it of which only bounds are known. Where
	// peers are not silent, it is then the interval of their last packets.
	AtLeast bool
	// Confidence is 1 less the chance of bursts as regular if they came at random.
	Confidence float64
}

const (
	shortestPeriod = time.Second
	shortestBin    = 50 * time.Millisecond
	mostBins       = 1 << 14 // of one width: older entries are left to wider bins
	binsPerPeriod  = 8       // a burst takes no more than a part of the period
	fewestInBurst  = 3
	fewestBursts   = 3
	mostBursts     = 128 // the last ones: more would not make it surer
)

// Bursts finds the interval at which entries come in bursts. It is false if there
// is none, or not enough to tell.
//
// Entries are counted in bins of several widths. Runs of bins with more than the
// bins around them allow by chance are bursts (iterated clipping, as in
// astronomy's search for sources): what comes all the time is no burst, nor does
// it matter that fewer are left of older ones. Then the intervals between bursts
// have to be more even than those of random times would be, see evenness. The
// entries themselves are tried as well, for one at a time at an interval.
// A periodogram would be misled here: a few bursts at random times have peaks too.
func Bursts(lives []Lifetime, _, ended events.Time) (Period, bool) {
	exact, all := make([]int64, 0, len(lives)), make([]int64, 0, len(lives))
	for i := range lives {
		if l := &lives[i]; l.Entered <= ended {
			all = append(all, int64(l.Entered))
			if !l.AtLeast {
				exact = append(exact, int64(l.Entered))
			}
		}
	}
	if p, ok := period(exact); ok || len(exact) == len(all) {
		return p, ok
	}
	p, ok := period(all)
	p.AtLeast = ok
	return p, ok
}

// period is that of entries.
func period(entries []int64) (Period, bool) {
	if len(entries) < fewestBursts {
		return Period{}, false
	}
	slices.Sort(entries)
	best, bestDoubt := Period{}, math.Log(periodDoubt)
	try := func(bursts []burst, bin time.Duration) {
		if p, doubt := regular(bursts, bin); doubt < bestDoubt {
			best, bestDoubt = p, doubt
		}
	}
	if len(entries) <= mostBursts {
		single := make([]burst, len(entries))
		for i, at := range entries {
			single[i] = burst{at, 1, i}
		}
		try(single, 0)
	}
	span := time.Duration(entries[len(entries)-1] - entries[0])
	var c clipper
	for bin := shortestBin; bin*binsPerPeriod*(fewestBursts-1) <= span; bin *= 2 {
		try(c.bursts(entries, bin), bin)
	}
	if best.Every == 0 {
		return Period{}, false
	}
	best.Confidence = 1 - math.Exp(bestDoubt)
	return best, true
}

// burst is many entries in a short time.
type burst struct {
	at    int64 // the middle of its entries
	count int
	first int // its first entry
}

// clipper finds bursts. It keeps the memory for it.
type clipper struct {
	counts []int32
	burst  []bool
	sum    []int32 // of the counts before, bursts left out
	calm   []int32 // bins before that are no burst
}

// bursts finds bursts in sorted entries.
func (c *clipper) bursts(entries []int64, bin time.Duration) []burst {
	last := entries[len(entries)-1]
	n := min(int((last-entries[0])/int64(bin))+1, mostBins)
	start := last - int64(n)*int64(bin) + 1
	skipped, _ := slices.BinarySearch(entries, start)

	c.counts = append(c.counts[:0], make([]int32, n)...)
	c.burst = append(c.burst[:0], make([]bool, n)...)
	c.sum = append(c.sum[:0], make([]int32, n+1)...)
	c.calm = append(c.calm[:0], make([]int32, n+1)...)
	for _, at := range entries[skipped:] {
		c.counts[(at-start)/int64(bin)]++
	}
	limit := math.Log(0.01) // a few by chance do no harm, evenness decides
	const around = 8 * binsPerPeriod
	for range 3 {
		for i, k := range c.counts {
			c.sum[i+1], c.calm[i+1] = c.sum[i], c.calm[i]
			if !c.burst[i] {
				c.sum[i+1], c.calm[i+1] = c.sum[i]+k, c.calm[i]+1
			}
		}
		for i, k := range c.counts {
			if k < fewestInBurst {
				continue
			}
			low, high := max(i-around, 0), min(i+around+1, n)
			// One more than was seen, in one bin more: what never came may still come.
			usual := (float64(c.sum[high]-c.sum[low]) + 0.5) / (float64(c.calm[high]-c.calm[low]) + 1)
			c.burst[i] = logPoissonTail(int(k), usual) <= limit
		}
	}

	var bursts []burst
	first, next := skipped, skipped // the first entry of the run, and of the bin
	from := -1                      // where the run began
	quiet := 0                      // bins since the last of the run
	end := skipped                  // of the entries of the run
	done := func() {
		if from >= 0 {
			bursts = append(bursts, burst{entries[(first+end-1)/2], end - first, first})
		}
		from = -1
	}
	for i, k := range c.counts {
		if c.burst[i] {
			if from < 0 {
				from, first = i, next
			}
			quiet, end = 0, next+int(k)
		} else if quiet++; quiet > 1 {
			done()
		}
		next += int(k)
	}
	done()
	return bursts
}

// regular is the period of bursts that were found with bins of a width, and the
// logarithm of the chance that it is none.
func regular(bursts []burst, bin time.Duration) (Period, float64) {
	bursts = bursts[max(0, len(bursts)-mostBursts):]
	if len(bursts) < fewestBursts {
		return Period{}, 0
	}
	intervals := make([]float64, len(bursts)-1)
	for i := range intervals {
		intervals[i] = float64(bursts[i+1].at - bursts[i].at)
	}
	every, doubt := evenness(intervals, float64(2*bin))
	if every < float64(shortestPeriod) || every < float64(binsPerPeriod*bin) {
		return Period{}, 0
	}
	p := Period{Every: time.Duration(every), Bursts: len(bursts), Last: events.Time(bursts[len(bursts)-1].at)}
	off := make([]int64, len(intervals))
	for i, interval := range intervals {
		k := max(1, math.Round(interval/every))
		off[i] = int64(math.Abs(interval - k*every))
		p.Missed += int(k) - 1
	}
	slices.Sort(off)
	p.Jitter = time.Duration(quantile(off, 0.5))
	in := 0
	for _, b := range bursts {
		in += b.count
	}
	last := bursts[len(bursts)-1]
	p.Share = float64(in) / float64(last.first+last.count-bursts[0].first)
	// Bursts that run into each other are more even than random times are, and a
	// few out of many are not all that matters.
	if p.Jitter > p.Every/8 || p.Share*float64(p.Bursts) < 2 {
		return Period{}, 0
	}
	return p, doubt
}

// evenness is the interval that intervals are multiples of, and the logarithm of
// the chance that those between random times are so even. No two times are
// closer than dead.
//
// Two tests, the better of which counts. If all intervals are within e of their
// mean: between n+1 random times, the n spacings are uniform on a simplex, of
// which that takes a part of (n-1)! (2e/n)^(n-1) at most. This is what few
// intervals are judged by. If some bursts are missing, or some are not of the
// series: j of n intervals are within e of a multiple of one of them, by chance
// one in 1/2e each; the binomial tail, times the n intervals and the n values of
// e that are tried.
func evenness(intervals []float64, dead float64) (every, logDoubt float64) {
	n := float64(len(intervals))
	total := 0.
	for _, i := range intervals {
		total += i
	}
	mean := total / n
	e := 0.
	for _, i := range intervals {
		// Random times that are not closer than dead are the more even for it.
		e = max(e, math.Abs(i-mean)/(mean-min(dead, mean/2)))
	}
	factorial, _ := math.Lgamma(n)
	every, logDoubt = mean, factorial+(n-1)*math.Log(max(2*e, 1e-4)/n)

	off := make([]float64, len(intervals))
	for _, unit := range intervals {
		for i, interval := range intervals {
			off[i] = math.Abs(interval - multiple(interval, unit)*unit)
		}
		slices.Sort(off)
		for j := (2*len(off) + 2) / 3; j <= len(off); j++ {
			e := max(off[j-1]/(unit-min(dead, unit/2)), 1e-4)
			doubt := 2*math.Log(n) + logTail(len(off)-1, j-1, 2*e)
			if doubt >= logDoubt {
				continue
			}
			sum, periods := 0., 0.
			for _, interval := range intervals {
				if k := multiple(interval, unit); math.Abs(interval-k*unit) <= off[j-1] {
					sum, periods = sum+interval, periods+k
				}
			}
			// More that are missing than are there is no series.
			if periods <= 2*float64(j) {
				every, logDoubt = sum/periods, doubt
			}
		}
	}
	// The two tests, and the widths of bins, which find mostly the same bursts.
	return every, logDoubt + math.Log(6)
}

// multiple is how often unit goes into an interval, as far as a few missing bursts explain.
func multiple(interval, unit float64) float64 {
	return min(max(1, math.Round(interval/unit)), 5)
}

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
//
// The watch is cut into ten slices. Growth is steady if the growth per slice is
// above zero by Student's t-test (one-sided, 0.5 %) and none of the first, middle
// and last slices fall far behind: one burst is the growth of one slice, which
// has t = 1, and two have t = 1.5.
func GrowthOf(lives []Lifetime, began, ended events.Time) Growth {
	const (
		slots  = 10
		enough = 20 // entries and departures
		// Quantiles of Student's t with 9 degrees of freedom.
		t995, t975 = 3.250, 2.262
	)
	watched := ended.Sub(began)
	if watched <= 0 {
		return Growth{}
	}
	var net [slots]float64
	slot := func(at events.Time) int {
		return min(int(float64(at.Sub(began))/float64(watched)*slots), slots-1)
	}
	entered, left := 0, 0
	for i := range lives {
		l := &lives[i]
		if l.Entered > began && l.Entered <= ended {
			entered++
			net[slot(l.Entered)]++
		}
		if end := l.end(); l.Left && end > began && end <= ended {
			left++
			net[slot(end)]--
		}
	}
	if entered+left < enough {
		return Growth{}
	}
	seconds := watched.Seconds()
	g := Growth{Known: true, Entering: float64(entered) / seconds, Leaving: float64(left) / seconds}
	g.Rate = g.Entering - g.Leaving
	mean := float64(entered-left) / slots
	squares := 0.
	for _, x := range net {
		squares += (x - mean) * (x - mean)
	}
	// By chance alone it is as uncertain as counts are.
	err := max(math.Sqrt(squares/(slots-1)/slots), math.Sqrt(float64(entered+left))/slots)
	perSecond := slots / seconds
	g.Least, g.Most = (mean-t975*err)*perSecond, (mean+t975*err)*perSecond
	g.Steady = mean >= t995*err
	for _, part := range [][]float64{net[:3], net[3:7], net[7:]} {
		sum := 0.
		for _, x := range part {
			sum += x
		}
		g.Steady = g.Steady && sum/float64(len(part)) >= mean/2
	}
	return g
}

// FullAt is when now many will have become limit, as an interval from now on, if
// the growth goes on. It is false if they do not grow steadily.
func (g Growth) FullAt(now, limit int) (earliest, latest time.Duration, ok bool) {
	if !g.Steady {
		return 0, 0, false
	}
	room := float64(max(limit-now, 0))
	in := func(rate float64) time.Duration {
		return time.Duration(min(room/rate, math.MaxInt64/2/float64(time.Second)) * float64(time.Second))
	}
	return in(g.Most), in(g.Least), true
}

// AtMost is how many there will be in the end if each lasts for no longer than
// timer (Little's law): growth ends there.
func (g Growth) AtMost(timer time.Duration) float64 { return g.Entering * timer.Seconds() }

// quantile of sorted values.
func quantile(sorted []int64, q float64) int64 {
	return sorted[int(math.Round(q*float64(len(sorted)-1)))]
}

// spread is how far sorted values are apart without the outermost on either side.
func spread(sorted []int64, without float64) int64 {
	return quantile(sorted, 1-without) - quantile(sorted, without)
}

// logTail bounds the logarithm of the chance of k or more in n, each with chance p
// (Chernoff: the relative entropy of k/n and p).
func logTail(n, k int, p float64) float64 {
	share := float64(k) / float64(n)
	if k <= 0 || share <= p {
		return 0
	}
	entropy := share * math.Log(share/p)
	if share < 1 {
		entropy += (1 - share) * math.Log((1-share)/(1-p))
	}
	return -float64(n) * entropy
}

// logPoissonTail bounds the logarithm of the chance of k or more where mean are usual.
func logPoissonTail(k int, mean float64) float64 {
	if float64(k) <= mean {
		return 0
	}
	return logPoisson(k, mean)
}

// logPoisson bounds the logarithm of the chance of k or what is farther from the mean
// on that side (Chernoff).
func logPoisson(k int, mean float64) float64 {
	if k == 0 {
		return -mean
	}
	return float64(k) - mean - float64(k)*math.Log(float64(k)/mean)
}
