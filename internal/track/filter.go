// SPDX-License-Identifier: Apache-2.0

package track

import (
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

// Filter selects connections.
type Filter struct {
	limits.Match
	MinDuration time.Duration
}

// Selects says whether c is selected.
func (f *Filter) Selects(c *Conn) bool {
	return c.Duration >= f.MinDuration && f.Match.Selects(&limits.Subject{
		Netns: c.Netns, Flow: &c.Flow, Side: c.Side, Stage: c.Stage, Process: &c.Process, Place: c.Place,
	}, limits.Names{})
}

// ServicePort is the port that names the service: ours where the peer is the
// client, else the peer's.
func (c *Conn) ServicePort() uint16 {
	if c.Side == events.Outbound {
		return c.Flow.Remote.Port
	}
	return c.Flow.Local.Port
}
