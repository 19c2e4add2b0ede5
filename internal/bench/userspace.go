// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"time"
)

const (
	userspaceRounds = 3
	userspaceRate   = 5000             // connections per second
	userspaceTime   = 10 * time.Second // so that a snapshot weighs what it does in the long run
)

// userCost is what a tool's own process costs at userspaceRate.
type userCost struct {
	name                   string
	healthy, waiting, both float64 // µs of CPU per connection
	peakRSS                float64 // bytes
	err                    error
}

// measureUserspace runs each tool as a user would, with its output thrown away.
func measureUserspace(ctx context.Context, binary string) ([]userCost, error) {
	tools := []tool{fintrace(binary), tcpstates}
	costs := make([]userCost, len(tools))
	type runs struct{ healthy, waiting, both, rss []float64 }
	measured := make([]runs, len(tools))
	for range userspaceRounds {
		for i, t := range tools {
			costs[i].name = t.name
			if costs[i].err != nil {
				continue
			}
			healthy, waiting, rss, err := userspaceRound(ctx, t)
			if err != nil {
				if ctx.Err() != nil {
					return nil, err
				}
				costs[i].err = err
				continue
			}
			m := &measured[i]
			m.healthy, m.waiting = append(m.healthy, healthy), append(m.waiting, waiting)
			m.both, m.rss = append(m.both, (healthy+waiting)/2), append(m.rss, rss)
		}
	}
	for i, m := range measured {
		if c := &costs[i]; c.err == nil {
			c.healthy, c.waiting, c.both, c.peakRSS = median(m.healthy), median(m.waiting), median(m.both), median(m.rss)
		}
	}
	return costs, nil
}

// userspaceRound returns a tool's µs of CPU per connection under each load, and its peak RSS.
func userspaceRound(ctx context.Context, t tool) (h, w, rss float64, err error) {
	r, err := t.start(ctx, nil)
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	under := func(how string) (float64, error) {
		before, err := r.cpu()
		if err != nil {
			return 0, err
		}
		made, err := makeLoad(ctx, load{
			Close:       how,
			Connections: int(userspaceRate * userspaceTime.Seconds()),
			Rate:        userspaceRate,
			Duration:    2 * userspaceTime,
		})
		if err != nil {
			return 0, err
		}
		after, err := r.cpu()
		return float64(after-before) / float64(time.Microsecond) / float64(made.Connections), err
	}
	if h, err = under(healthy); err != nil {
		return h, w, rss, err
	}
	if w, err = under(waiting); err != nil {
		return h, w, rss, err
	}
	rss, err = r.peakRSS()
	return h, w, rss, err
}
