// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 2, 3}, 0.5, 2.5},
		{[]float64{7}, 0.99, 7},
		{[]float64{2, 9, 4}, 1, 9},
	} {
		if got := quantile(tt.values, tt.q); got != tt.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", tt.values, tt.q, got, tt.want)
		}
	}
}

// A tool that is missing, or budgets that are not met, must show as such.
func TestBudgetVerdicts(t *testing.T) {
	missing := errors.New("not installed")
	f := figures{
		costs: []kernelCost{{name: "empty program", both: 50}, {name: "fintrace", both: 100},
			{name: "tcpstates", err: missing}},
		users:     []userCost{{name: "fintrace", both: 2}, {name: "tcpstates", err: missing}},
		rates:     []connectionRate{{name: "no tracer", perSecond: 1000}, {name: "fintrace", perSecond: 900}, {name: "tcpstates", err: missing}},
		losses:    losses{connections: 10_000, missed: 1},
		snapshot:  snapshotTimes{Walk: time.Millisecond, List: time.Millisecond, SSError: "not installed"},
		table:     tableCost{BytesPerConnection: 200},
		latencies: latencies{P99: 51 * time.Millisecond},
	}
	for row, want := range map[string]string{
		"kernel cost":         "2.00 × (100 ns)|yes|tcpstates not installed",
		"userspace CPU":       "2.00 µs|**no**|tcpstates not installed",
		"connections per sec": "10.0 %||tcpstates not installed",
		"records lost":        "0 for want of buffer, 1 events skipped by the kernel, of 10000 connections at 900/s|**no**|",
		"snapshot":            "1ms|?|ss not installed",
		"memory":              "200 bytes|yes|",
		"limit and grace":     "51ms p99, 0s at most|**no**|exporters: the scrape interval",
	} {
		found := false
		for _, cells := range f.budgets()[1:] {
			if strings.HasPrefix(cells[0], row) {
				found = true
				if got := strings.Join(cells[2:], "|"); got != want {
					t.Errorf("%s: %q, want %q", row, got, want)
				}
			}
		}
		if !found {
			t.Errorf("no row %q", row)
		}
	}
}
