// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// Duration prints d as people read it: 350µs, 12ms, 1.4s, 59.8s, 2m05s, 2h13m, 3d04h.
func Duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%dµs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute-50*time.Millisecond:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Minute:
		return "1m00s" // and not 60.0s
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

// Clean makes text from outside (a process's name) safe for a terminal or log.
func Clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// processName is "haproxy[1234]", "?" if it is not known.
func processName(p events.Process) string {
	if !p.Known() {
		return "?"
	}
	return fmt.Sprintf("%s[%d]", Clean(p.Name()), p.PID)
}

// age is the time in FIN_WAIT2, marked where it is only a lower bound.
func age(c *track.Conn) string {
	if !c.SinceExact || c.End != 0 && !c.EndExact {
		return "≥" + atLeast(c.Duration)
	}
	return Duration(c.Duration)
}

// atLeast is Duration rounded down, for a lower bound.
func atLeast(d time.Duration) string {
	if d >= time.Second {
		d = d.Truncate(100 * time.Millisecond)
	}
	return Duration(d)
}

func plural(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
