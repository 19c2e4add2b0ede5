// SPDX-License-Identifier: Apache-2.0

// Package report renders what fintrace knows, as text for people and as JSON
// for programs.
package report

import (
	"strconv"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

// Names turns what the kernel says in numbers into what people say.
type Names struct {
	Wall   func(events.Time) time.Time
	Cgroup func(id uint64) string    // "" if unknown
	Netns  func(inode uint32) string // "" if it has no name
}

// Record is a connection as JSON. The names are a contract with scripts; what
// is not known is absent.
type Record struct {
	Time        time.Time `json:"time"`
	Kind        string    `json:"kind,omitempty"`
	Cookie      string    `json:"cookie,omitempty"`
	Netns       uint32    `json:"netns"`
	NetnsName   string    `json:"netns_name,omitempty"`
	Local       string    `json:"local"`
	Remote      string    `json:"remote"`
	Side        string    `json:"side"`
	Stage       string    `json:"stage"`
	Since       time.Time `json:"since"`
	SinceExact  bool      `json:"since_exact"`
	Duration    float64   `json:"duration_seconds"`
	Held        *float64  `json:"held_seconds,omitempty"`
	Orphaned    *float64  `json:"orphaned_seconds,omitempty"`
	Minisock    *float64  `json:"minisock_seconds,omitempty"`
	Limit       float64   `json:"limit_seconds"`
	LimitSource string    `json:"limit_source"`
	Overdue     bool      `json:"overdue"`
	End         string    `json:"end,omitempty"`
	EndExact    *bool     `json:"end_exact,omitempty"`
	PID         uint32    `json:"pid,omitempty"`
	Comm        string    `json:"comm,omitempty"`
	ClosedBy    string    `json:"closed_by,omitempty"`
	Cgroup      string    `json:"cgroup,omitempty"`
	HAProxy     *Place    `json:"haproxy,omitempty"`
}

// Unlooked is something that could not be looked at, as JSON, where nothing else
// says that something may be missing.
type Unlooked struct {
	Kind string `json:"kind"` // "not_looked_at"
	Text string `json:"text"`
}

// NewUnlooked is the record of what could not be looked at, and why.
func NewUnlooked(err error) Unlooked { return Unlooked{"not_looked_at", err.Error()} }

// Place is where in HAProxy a connection belongs, as JSON.
type Place struct {
	Proxy   string   `json:"proxy,omitempty"`
	Proxies []string `json:"proxies,omitempty"` // in place of Proxy, where it may be any of several
	Side    string   `json:"side"`              // client, server
	Server  string   `json:"server,omitempty"`
	// Old: its process has been told to finish by a reload.
	Old bool `json:"old_worker"`
	// Timeout is when HAProxy ends it if it is held and its peer silent; absent
	// where nothing does, or it is not known what.
	Timeout *float64 `json:"timeout_seconds,omitempty"`
}

func newPlace(p *haproxy.Place) *Place {
	if p == nil {
		return nil
	}
	place := &Place{Proxy: p.Name(), Side: p.Side.String(), Server: p.Server, Old: p.Process.Old}
	if !p.Certain() {
		place.Proxy = ""
		for _, px := range p.Proxies {
			place.Proxies = append(place.Proxies, px.Name)
		}
	}
	if timeout, known := p.Ends(); known && timeout.Duration > 0 {
		seconds := timeout.Duration.Seconds()
		place.Timeout = &seconds
	}
	return place
}

// NewRecord is the record of a connection at a time; kind is "" where nothing
// has happened to it.
func NewRecord(kind string, at events.Time, c *track.Conn, names *Names) Record {
	r := Record{
		Time:        names.Wall(at),
		Kind:        kind,
		Cookie:      cookieText(c.Cookie),
		Netns:       c.Netns,
		NetnsName:   names.Netns(c.Netns),
		Local:       c.Flow.Local.String(),
		Remote:      c.Flow.Remote.String(),
		Side:        c.Side.String(),
		Stage:       c.Stage.String(),
		Since:       names.Wall(c.Since),
		SinceExact:  c.SinceExact,
		Duration:    c.Duration.Seconds(),
		Limit:       c.Limit.Duration.Seconds(),
		LimitSource: c.Limit.Source(),
		Overdue:     c.Overdue,
		PID:         c.Process.PID,
		Comm:        c.Process.Name(),
		ClosedBy:    c.ClosedBy.String(),
		Cgroup:      names.Cgroup(c.Process.Cgroup),
		HAProxy:     newPlace(c.Place),
	}
	if c.StagesKnown {
		held, orphaned, minisock := c.Held.Seconds(), c.Orphaned.Seconds(), c.Minisock.Seconds()
		r.Held, r.Orphaned, r.Minisock = &held, &orphaned, &minisock
	}
	if c.End != 0 {
		exact := c.EndExact
		r.End, r.EndExact = c.End.String(), &exact
	}
	return r
}

// cookieText is "" where the kernel does not show the cookie.
func cookieText(cookie uint64) string {
	if !events.IsCookie(cookie) {
		return ""
	}
	return strconv.FormatUint(cookie, 16)
}

// Transition is one state change of one socket as JSON, for --all-states.
type Transition struct {
	Time     time.Time `json:"time"`
	Kind     string    `json:"kind"` // "transition"
	Cookie   string    `json:"cookie,omitempty"`
	Netns    uint32    `json:"netns"`
	Local    string    `json:"local"`
	Remote   string    `json:"remote"`
	OldState string    `json:"old_state"`
	NewState string    `json:"new_state"`
	Seconds  *float64  `json:"old_state_seconds,omitempty"`
	PID      uint32    `json:"pid,omitempty"`
	Comm     string    `json:"comm,omitempty"`
}

// NewTransition is the record of a state change. Spent is the time in the old
// state, negative if unknown.
func NewTransition(at events.Time, cookie uint64, netns uint32, flow events.Flow, from, to string,
	spent time.Duration, p events.Process, names *Names) Transition {
	t := Transition{
		Time:     names.Wall(at),
		Kind:     "transition",
		Cookie:   cookieText(cookie),
		Netns:    netns,
		Local:    flow.Local.String(),
		Remote:   flow.Remote.String(),
		OldState: from,
		NewState: to,
		PID:      p.PID,
		Comm:     p.Name(),
	}
	if spent >= 0 {
		seconds := spent.Seconds()
		t.Seconds = &seconds
	}
	return t
}
