// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/report"
)

// savedVersion is that of Saved. One that reads another meaning from the same
// fields has another number.
const savedVersion = 1

// Saved is what a Book has to know of its alerts after a restart, as JSON. When
// they were last spoken of is no part of it, as the first word after a restart
// does not depend on that.
type Saved struct {
	Version int          `json:"version"`
	Alerts  []SavedAlert `json:"alerts"` // those with most connections first
}

// SavedAlert is an alert that fires.
type SavedAlert struct {
	Labels      Labels     `json:"labels"`
	StartsAt    time.Time  `json:"starts_at"`
	EndsAt      *time.Time `json:"ends_at,omitempty"` // if it resolves; absent while it is above its threshold
	Peak        int        `json:"peak"`
	LimitSource string     `json:"limit_source"`
	LimitSec    float64    `json:"limit_seconds"`
}

// Save returns what Restore takes.
func (b *Book) Save() Saved {
	s := Saved{Version: savedVersion, Alerts: []SavedAlert{}}
	for _, a := range b.Active() {
		l := b.firing[a.Labels]
		saved := SavedAlert{Labels: a.Labels, StartsAt: a.StartsAt, Peak: a.Peak, LimitSource: a.LimitSource, LimitSec: a.LimitSec}
		if l.low {
			ends := b.wall(l.ended)
			saved.EndsAt = &ends
		}
		s.Alerts = append(s.Alerts, saved)
	}
	return s
}

// Restore takes up the alerts of an empty Book, as of now. They go on as they
// were: with the first connections that Evaluate finds of one it is updated,
// whatever was said of it before, as that may not have been delivered; and where
// there are none, it resolves after ResolveAfter. The error says what could not
// be restored; the rest is.
func (b *Book) Restore(s Saved, now events.Time) error {
	if s.Version != savedVersion {
		return fmt.Errorf("the saved alerts are of version %d, not %d: all that fire will be new", s.Version, savedVersion)
	}
	wall := b.wall(now)
	// back is a saved time as it is on our clock. One in the future shows that the
	// wall clock was set back; it cannot have been after now.
	back := func(t time.Time) events.Time {
		return now.Add(-max(wall.Sub(t), 0))
	}
	families := map[Labels]bool{} // overflow is no part of them
	var refused []error
	for i := range s.Alerts {
		saved := &s.Alerts[i]
		labels := saved.Labels
		l := &life{
			alert:    Alert{ID: labels.id(), Event: Updated, Labels: labels, UpdatedAt: wall, Peak: min(max(saved.Peak, 0), math.MaxInt32)},
			low:      true, // until some of its connections are seen
			below:    now,
			ended:    now,
			restored: true,
		}
		if err := b.check(labels, &l.peer, families); err != nil {
			refused = append(refused, fmt.Errorf("saved alert %d: %w", i+1, err))
			if len(refused) == refusedSaid {
				refused = append(refused, errors.New("and perhaps more"))
				break
			}
			continue
		}
		if saved.EndsAt != nil {
			l.ended = back(*saved.EndsAt)
		}
		l.started, l.alert.StartsAt = back(saved.StartsAt), saved.StartsAt.Round(0)
		if age := wall.Sub(saved.StartsAt); age < 0 || age > longest {
			l.started, l.alert.StartsAt = now, wall
		}
		l.alert.LimitSource = report.Clean(saved.LimitSource)
		if sec := saved.LimitSec; sec >= 0 && sec <= longest.Seconds() {
			l.alert.LimitSec = sec
		}
		l.alert.Summary = summary(l, nil)
		if family := labels.family(); family != overflow {
			families[family] = true
		}
		b.firing[labels] = l
	}
	return errors.Join(refused...)
}

const (
	// longest is what no alert fires for: a saved time that is longer ago was
	// written before the clock was set.
	longest = 10 * 365 * 24 * time.Hour
	// refusedSaid bounds the errors of one Restore.
	refusedSaid = 10
)

// check says why there can be no alert of these labels.
func (b *Book) check(l Labels, p *peer, families map[Labels]bool) error {
	for _, text := range []string{l.Limit, l.Stage, l.Side, l.Proxy, l.Server, l.Peer, l.Process, l.Netns} {
		if report.Clean(text) != text {
			return fmt.Errorf("%q is no label", text)
		}
	}
	family := l.family()
	if family != overflow {
		if _, err := events.ParseStage(l.Stage); err != nil {
			return fmt.Errorf("stage: %w", err)
		}
		if _, err := events.ParseSide(l.Side); err != nil {
			return fmt.Errorf("side: %w", err)
		}
	}
	if l.Peer != Others {
		var ok bool
		if *p, ok = parsePeer(l.Peer); !ok {
			return fmt.Errorf("%q is neither an address nor a /64 of IPv6", l.Peer)
		}
	}
	if b.firing[l] != nil {
		return errors.New("there is one with the same labels")
	}
	if family != overflow && !families[family] && len(families) >= b.bounds.families-1 || len(b.firing) >= b.bounds.families*(b.settings.PeersPerGroup+1) {
		return errors.New("there are more than there can be")
	}
	return nil
}
