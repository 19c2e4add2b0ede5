// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
)

const (
	rateRounds = 5
	rateTime   = 2 * time.Second
)

// connectionRate is how many connections per second the host makes with a tool at work.
type connectionRate struct {
	name      string
	perSecond float64
	err       error
}

// losses are of fintrace, over all connections of the rate measure.
type losses struct {
	connections  int
	lost, missed uint64
}

// measureRate makes as many connections as go: without a tool and with each, in turn.
func measureRate(ctx context.Context, binary string) ([]connectionRate, losses, error) {
	var (
		lost  losses
		rates = []connectionRate{{name: "no tracer"}, {name: "fintrace"}, {name: "tcpstates"}}
		runs  = make([][]float64, len(rates))
		full  = load{Close: mixed, Connections: math.MaxInt32, Duration: rateTime}
	)
	measure := []func() (loaded, error){
		func() (loaded, error) { return makeLoad(ctx, full) },
		func() (loaded, error) { return lost.add(ctx, binary, full) },
		func() (loaded, error) {
			r, err := tcpstates.start(ctx, nil)
			if err != nil {
				return loaded{}, err
			}
			made, err := makeLoad(ctx, full)
			return made, errors.Join(err, r.stop())
		},
	}
	for range rateRounds {
		for i := range rates {
			if rates[i].err != nil {
				continue
			}
			made, err := measure[i]()
			if err != nil {
				if ctx.Err() != nil || i == 0 {
					return nil, lost, err
				}
				rates[i].err = err
				continue
			}
			runs[i] = append(runs[i], made.perSecond())
		}
	}
	for i := range rates {
		if rates[i].err == nil {
			rates[i].perSecond = median(runs[i])
		}
	}
	return rates, lost, nil
}

// add makes a load with fintrace at work, and adds what fintrace says it has lost.
func (l *losses) add(ctx context.Context, binary string, full load) (loaded, error) {
	out, err := tempOutput()
	if err != nil {
		return loaded{}, err
	}
	defer out.Close()
	r, err := fintrace(binary, "-o", "json").start(ctx, out)
	if err != nil {
		return loaded{}, err
	}
	made, err := makeLoad(ctx, full)
	if err := errors.Join(err, r.stop()); err != nil {
		return made, err
	}
	text, err := readBack(out)
	if err != nil {
		return made, err
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	var summary struct {
		Kind         string
		Lost, Missed uint64
	}
	if err := json.Unmarshal(lines[len(lines)-1], &summary); err != nil || summary.Kind != "summary" {
		return made, fmt.Errorf("fintrace ended without a summary: %s", firstLine(r.stderr.String()))
	}
	l.connections += made.Connections
	l.lost += summary.Lost
	l.missed += summary.Missed
	return made, nil
}
