// SPDX-License-Identifier: Apache-2.0

// Package alert makes alerts of connections that are past their limit: a Book
// groups them and decides what fires, is updated and resolves; an Outbox
// delivers that to sinks.
package alert

import (
	"time"

	"github.com/fintrace/fintrace/internal/report"
)

// Labels identify an alert: what its connections have in common. There is a
// bounded number of each, whatever peers do.
type Labels struct {
	Limit   string `json:"limit"` // limits.Limit.Kind
	Stage   string `json:"stage"`
	Side    string `json:"side"`
	Proxy   string `json:"proxy,omitempty"`  // of HAProxy
	Server  string `json:"server,omitempty"` // of HAProxy, towards servers
	Port    uint16 `json:"port,omitempty"`   // that is listened on, or that we connect to; 0 where Proxy says it
	Peer    string `json:"peer"`             // an address, a /64 of IPv6, or Others
	Process string `json:"process,omitempty"`
	Netns   string `json:"netns,omitempty"` // its name, else its inode; "" for the host's own
}

// Others stands for the peers that have no alert of their own, and in all labels
// for the connections of more kinds than are told apart.
const Others = "other"

// Event is what has happened to an alert.
type Event string

// An alert fires, is updated when it has changed much, is repeated when nobody
// has heard of it for long, and resolves.
const (
	Fired    Event = "fired"
	Updated  Event = "updated"
	Repeated Event = "repeated"
	Resolved Event = "resolved"
)

// Alert is a group of connections that are past their limit, as of a moment.
type Alert struct {
	ID     string `json:"id"` // of its labels: the same after a restart
	Event  Event  `json:"event"`
	Labels Labels `json:"labels"`

	StartsAt  time.Time  `json:"starts_at"`
	UpdatedAt time.Time  `json:"updated_at"` // the moment
	EndsAt    *time.Time `json:"ends_at,omitempty"`

	Count       int     `json:"count"` // 0 once it is resolved
	Peak        int     `json:"peak"`
	Oldest      float64 `json:"oldest_seconds"` // the oldest connection's time in FIN_WAIT2, when there was one last
	OldestExact bool    `json:"oldest_exact"`
	LimitSource string  `json:"limit_source"` // of the oldest, in words
	LimitSec    float64 `json:"limit_seconds"`
	// Maxconn is that of the proxy, 0 unknown or none.
	Maxconn int `json:"maxconn,omitempty"`

	Summary  string           `json:"summary"`            // the sentence one would say on the phone
	Examples []report.Record  `json:"examples,omitempty"` // the oldest
	Advice   []report.Finding `json:"advice,omitempty"`   // as diagnose gives it
}

// Firing says whether it has not resolved.
func (a *Alert) Firing() bool { return a.EndsAt == nil }

// grave says whether half of the proxy's slots were taken at its worst, so that
// it does not go back and forth.
func (a *Alert) grave() bool { return a.Maxconn > 0 && 2*a.Peak >= a.Maxconn }

// SinkStats are totals of one sink since it was made.
type SinkStats struct {
	Name      string
	Queued    int // alerts that wait now
	Capacity  int
	Delivered uint64 // alerts
	Failed    uint64 // attempts
	Shed      uint64 // alerts that were given up: for want of room, refused for good, or at the end
	Healthy   bool   // the last attempt succeeded, or there was none
}
