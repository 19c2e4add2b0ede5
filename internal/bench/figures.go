// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A contender is one of several that are measured in turn.
type contender struct {
	name  string
	round func() error // measures it once more
	err   error        // why it is out; its figures are unknown
}

// compete has each contender measured in each round. Who comes first changes
// from round to round. Who fails has one more chance: the host may have been busy.
func compete(ctx context.Context, rounds int, contenders []*contender) error {
	for r := range rounds {
		for i := range contenders {
			c := contenders[(r+i)%len(contenders)]
			if c.err != nil {
				continue
			}
			if c.err = c.round(); c.err != nil && ctx.Err() == nil {
				c.err = c.round()
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	return nil
}

func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile interpolates between the two nearest; 0.5 is the median, 1 the largest.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (at-float64(below))*(sorted[above]-sorted[below])
}

// interval has the true median of what the values are a sample of with a
// confidence of 95 %: the values whose ranks the binomial distribution, taken
// as a normal one, puts at that distance from the middle.
func interval(values []float64) (low, high float64) {
	if len(values) == 0 {
		return math.NaN(), math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	n := float64(len(values))
	away := 0.98 * math.Sqrt(n)
	rank := func(r float64) int { return min(max(int(math.Ceil(r)), 1), len(values)) }
	return sorted[rank(n/2-away)-1], sorted[rank(n/2+away)-1]
}

// figure renders a value that is unknown where there is an error.
func figure(err error, format string, args ...any) string {
	if err != nil {
		return "?"
	}
	return fmt.Sprintf(format, args...)
}

// unmeasured is a row that says which contenders are out and why, if any are.
func unmeasured(contenders []*contender) []row {
	r := row{what: "not measured"}
	for _, c := range contenders {
		if c.err != nil {
			r.beside = list(r.beside, c.name+" "+strings.Join(strings.FieldsFunc(c.err.Error(), func(r rune) bool { return r == '\n' || r == '|' }), " "))
		}
	}
	if r.beside == "" {
		return nil
	}
	return []row{r}
}

// times renders how many times a is b.
func times(a, b float64) string {
	q := a / b
	switch {
	case math.IsNaN(q) || math.IsInf(q, 0):
		return "?"
	case q < 10:
		return fmt.Sprintf("%.2f ×", q)
	default:
		return fmt.Sprintf("%.0f ×", q)
	}
}

// short has three digits.
func short(d time.Duration) string {
	if d <= 0 {
		return d.String()
	}
	unit := time.Duration(math.Pow(10, math.Floor(math.Log10(float64(d)))-2))
	return d.Round(max(unit, 1)).String()
}

// spaced writes a count in groups of three digits.
func spaced(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s %03d", spaced(n/1000), n%1000)
}

func nanos(x float64) string {
	if math.IsNaN(x) {
		return "?"
	}
	return fmt.Sprintf("%.0f ns", x)
}

func mebibytes(bytes float64) string { return fmt.Sprintf("%.1f MiB", bytes/(1<<20)) }

func list(items ...string) string {
	return strings.Join(slices.DeleteFunc(items, func(s string) bool { return s == "" }), "; ")
}
