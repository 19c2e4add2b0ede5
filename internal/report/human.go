// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// Duration prints d as people read it: 350µs, 12ms, 1.4s, 59.8s, 2m05s, 2h13m, 3d04h.
func Duration(d time.Duration) string { return string(appendDuration(nil, d)) }

func appendDuration(b []byte, d time.Duration) []byte {
	two := func(unit, of time.Duration, between, after string) []byte {
		b = append(strconv.AppendInt(b, int64(d/unit), 10), between...)
		part := int64(d % unit / of)
		return append(append(b, byte('0'+part/10), byte('0'+part%10)), after...)
	}
	switch {
	case d < time.Millisecond:
		return append(strconv.AppendInt(b, d.Microseconds(), 10), "µs"...)
	case d < time.Second:
		return append(strconv.AppendInt(b, d.Milliseconds(), 10), "ms"...)
	case d < time.Minute-50*time.Millisecond:
		return append(strconv.AppendFloat(b, d.Seconds(), 'f', 1, 64), 's')
	case d < time.Minute:
		return append(b, "1m00s"...) // and not 60.0s
	case d < time.Hour:
		return two(time.Minute, time.Second, "m", "s")
	case d < 24*time.Hour:
		return two(time.Hour, time.Minute, "h", "m")
	}
	return two(24*time.Hour, time.Hour, "d", "h")
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
func age(c *track.Conn) string { return string(appendAge(nil, c)) }

func appendAge(b []byte, c *track.Conn) []byte {
	if !c.SinceExact || c.End != 0 && !c.EndExact {
		return appendDuration(append(b, "≥"...), roundedDown(c.Duration))
	}
	return appendDuration(b, c.Duration)
}

// atLeast is Duration rounded down, for a lower bound.
func atLeast(d time.Duration) string { return Duration(roundedDown(d)) }

func roundedDown(d time.Duration) time.Duration {
	if d < time.Second {
		return d
	}
	return d.Truncate(100 * time.Millisecond)
}

func plural(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
