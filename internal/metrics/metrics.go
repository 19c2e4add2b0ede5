// SPDX-License-Identifier: Apache-2.0

// Package metrics shows Prometheus what the daemon knows. There is a bounded
// number of series, whatever peers do; what is not known is absent, never 0.
package metrics

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sync/singleflight"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/track"
)

// scrapeAtMost is how long gathering may take: less than Prometheus's default
// scrape_timeout of 10 s, so that it hears why there is nothing.
const scrapeAtMost = 9 * time.Second

// BuildInfo says what is running.
type BuildInfo struct {
	Version, Revision string
}

// Metrics are counted as things happen, and gathered at a scrape.
type Metrics struct {
	build    BuildInfo
	registry *prometheus.Registry
	known    *known
	scrapes  singleflight.Group

	durations [events.Outbound + 1][events.Unseen + 1]prometheus.Observer
	snapshots prometheus.Observer

	mu         sync.Mutex // of the following
	snapshotAt time.Time
	reloaded   bool // it was tried
	reloadOK   bool
	reloadedAt time.Time // with success

	// Of the labels of scrapes, of which there is one at a time.
	collector      *collector
	configurations names[string]
	frontends      names[frontendName]
	namespaces     names[string]
}

// collector is what is registered for all that is gathered at a scrape.
type collector struct {
	metrics *Metrics
	state   *State // of the scrape that runs, else nil
}

// nativeBuckets bounds those of a native histogram: some eight for each doubling,
// as OpenTelemetry has it.
const nativeBuckets = 160

// New makes metrics in a registry of their own.
func New(build BuildInfo) *Metrics {
	m := &Metrics{
		build:          build,
		registry:       prometheus.NewRegistry(),
		known:          newKnown(),
		configurations: names[string]{},
		frontends:      names[frontendName]{},
		namespaces:     names[string]{},
	}
	m.collector = &collector{metrics: m}
	durations := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: prefix + "fin_wait2_duration_seconds",
		Help: "Time in FIN_WAIT2 of the connections that left it, by how; of what was there before fintrace, at least. Those that left at once are not among them (see instants).",
		// Timers end a connection at their setting or up to an eighth later: it
		// is above the bucket of the setting. What tcp_fin_timeout ends by
		// default is between 60 and 75 s.
		Buckets: []float64{0.01, 0.1, 1, 5, 10, 15, 30, 60, 75, 120,
			(5 * time.Minute).Seconds(), (15 * time.Minute).Seconds(), time.Hour.Seconds(), (4 * time.Hour).Seconds(), (24 * time.Hour).Seconds()},
		NativeHistogramBucketFactor:    1.1,
		NativeHistogramMaxBucketNumber: nativeBuckets,
	}, []string{"side", "end"})
	for side := events.Inbound; side <= events.Outbound; side++ {
		for _, end := range events.Ends() {
			m.durations[side][end] = durations.WithLabelValues(side.String(), end.String())
		}
	}
	snapshots := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: prefix + "snapshot_duration_seconds",
		Help: "Time that a comparison of the table with all sockets took.",
		// From an idle host to a million sockets on a busy one.
		Buckets:                        []float64{0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30},
		NativeHistogramBucketFactor:    1.1,
		NativeHistogramMaxBucketNumber: nativeBuckets,
	})
	m.snapshots = snapshots
	m.registry.MustRegister(m.collector, durations, snapshots,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Closed counts a connection that has left.
func (m *Metrics) Closed(c *track.Conn) {
	m.durations[c.Side][c.End].Observe(c.Duration.Seconds())
}

// Snapshot counts a comparison of the table with all sockets, which ended at at.
func (m *Metrics) Snapshot(took time.Duration, at time.Time) {
	m.snapshots.Observe(took.Seconds())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.snapshotAt = at
}

// Reloaded notes that the daemon's configuration was read, at its start too, or
// could not be.
func (m *Metrics) Reloaded(ok bool, at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reloaded, m.reloadOK = true, ok
	if ok {
		m.reloadedAt = at
	}
}

// Handler answers scrapes: in Prometheus's text, in OpenMetrics, and with native
// histograms in protobuf. gather fills a State, and returns with an error when
// its context ends before it could: the answer is 503 then, with one line. Those
// who ask while it runs share the answer.
func (m *Metrics) Handler(gather func(context.Context, *State) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := m.scrapes.DoChan("", func() (any, error) {
			// Not the context of one who asks: others may wait for it too.
			ctx, cancel := context.WithTimeout(context.Background(), scrapeAtMost)
			defer cancel()
			return m.scrape(ctx, gather)
		})
		select {
		case <-r.Context().Done():
		case a := <-answer:
			if a.Err != nil {
				line := strings.Join(strings.Fields(a.Err.Error()), " ")
				http.Error(w, line, http.StatusServiceUnavailable)
				return
			}
			families := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return a.Val.([]*dto.MetricFamily), nil })
			promhttp.HandlerFor(families, promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(w, r)
		}
	})
}

func (m *Metrics) scrape(ctx context.Context, gather func(context.Context, *State) error) ([]*dto.MetricFamily, error) {
	s := newState(m.known)
	if err := gather(ctx, s); err != nil {
		return nil, fmt.Errorf("the table could not be looked at: %w", err)
	}
	m.collector.state = s
	defer func() { m.collector.state = nil }()
	return m.registry.Gather()
}
