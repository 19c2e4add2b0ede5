// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// Style is how text is laid out.
type Style struct {
	Width int  // cells of the terminal, 0: no limit
	Color bool // ANSI colours
}

func (s Style) paint(code, text string) string {
	if !s.Color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// Live prints notices, a line each, as they come.
type Live struct {
	w       io.Writer
	style   Style
	names   *Names
	columns []column
}

// NewLive prints to w. Proxies adds the column for those of HAProxy.
func NewLive(w io.Writer, style Style, names *Names, proxies bool) *Live {
	all := []column{
		{title: "TIME", width: 8, drop: 5},
		{title: "EVENT", width: 9},
		{title: "AGE", width: 7, right: true},
		{title: "STAGE", width: 8, drop: 3},
		{title: "PORT", width: 5, right: true},
		{title: "LOCAL", width: 21, drop: 7},
		{title: "PEER", width: 21},
		{title: "SIDE", width: 8, drop: 6},
		{title: "PROCESS", width: 18, drop: 4},
		{title: "PROXY", width: 12, drop: 2},
		{title: "WHY", width: 33, drop: 1},
	}
	if !proxies {
		all[proxyColumn].drop = dropped
	}
	columns := fit(all, style.Width)
	if columns[localColumn].drop != dropped {
		columns[portColumn].drop = dropped // It is in LOCAL.
	}
	return &Live{w: w, style: style, names: names, columns: columns}
}

const portColumn, localColumn, proxyColumn = 4, 5, 9

// Header prints the names of the columns.
func (l *Live) Header() error {
	_, err := fmt.Fprintln(l.w, l.style.paint("1", line(l.columns, titles(l.columns))))
	return err
}

// Notice prints one notice.
func (l *Live) Notice(n *track.Notice) error {
	c := &n.Conn
	cells := []string{
		l.names.Wall(n.Time).Format(time.TimeOnly),
		n.Kind.String(),
		age(c),
		c.Stage.String(),
		fmt.Sprint(c.ServicePort()),
		c.Flow.Local.String(),
		c.Flow.Remote.String(),
		c.Side.String(),
		processName(c.Process),
		proxyName(c),
		why(n),
	}
	text := l.style.shorten(line(l.columns, cells), cells[len(cells)-1])
	switch {
	case n.Kind == track.Overdue:
		text = l.style.paint("31", text)
	case n.Kind == track.Closed && c.End != events.PeerFIN:
		text = l.style.paint("33", text)
	}
	_, err := fmt.Fprintln(l.w, text)
	return err
}

// shorten makes a line fit the terminal if that takes a part of its last cell
// only: it is better that an address wraps than that it is cut.
func (s Style) shorten(text, last string) string {
	over := utf8.RuneCountInString(text) - s.Width
	if s.Width == 0 || over <= 0 || over >= utf8.RuneCountInString(last) || !strings.HasSuffix(text, last) {
		return text
	}
	return string([]rune(text)[:s.Width-1]) + "…"
}

// why is the sentence at the end of a line: what happened, in the terms of the kind.
func why(n *track.Notice) string {
	c := &n.Conn
	switch n.Kind {
	case track.Overdue:
		return "past " + Clean(c.Limit.String())
	case track.Closed:
		return c.End.String() + stages(c)
	case track.Moved:
		if c.ClosedBy == events.ByClose {
			return "closed, " + Clean(c.Limit.String())
		}
	}
	return "limit " + Clean(c.Limit.String())
}

// stages says how the time was spent, where that was in more than one stage.
func stages(c *track.Conn) string {
	if !c.StagesKnown {
		return ""
	}
	text, parts := "", 0
	for _, part := range []struct {
		stage events.Stage
		time  time.Duration
	}{{events.Held, c.Held}, {events.Orphaned, c.Orphaned}, {events.Minisock, c.Minisock}} {
		if part.time > 0 {
			parts++
			text += fmt.Sprintf(", %s %s", part.stage, Duration(part.time))
		}
	}
	if parts < 2 {
		return ""
	}
	return text
}

// transitionColumns is how state changes are laid out.
var transitionColumns = []column{
	{title: "TIME", width: 12, drop: 3}, {title: "LOCAL", width: 21}, {title: "REMOTE", width: 21},
	{title: "FROM", width: 11}, {title: "TO", width: 11}, {title: "AFTER", width: 7, right: true}, {title: "PROCESS", drop: 4},
}

// TransitionHeader prints the names of the columns of Transition.
func (l *Live) TransitionHeader() error {
	return l.transition(titles(transitionColumns))
}

// Transition prints one state change of one socket. Spent is the time in the
// old state, negative if unknown.
func (l *Live) Transition(at events.Time, flow events.Flow, from, to string, spent time.Duration, p events.Process) error {
	after := "?"
	if spent >= 0 {
		after = Duration(spent)
	}
	return l.transition([]string{l.names.Wall(at).Format("15:04:05.000"), flow.Local.String(), flow.Remote.String(),
		from, to, after, processName(p)})
}

func (l *Live) transition(cells []string) error {
	_, err := fmt.Fprintln(l.w, line(fit(transitionColumns, l.style.Width), cells))
	return err
}
