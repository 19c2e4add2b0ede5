// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"cmp"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

// family is a metric with its labels, of values as of a scrape.
type family struct {
	desc   *prometheus.Desc
	values prometheus.ValueType
}

func gauge(name, help string, labels ...string) family {
	return family{prometheus.NewDesc(prefix+name, help, labels, nil), prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) family {
	return family{prometheus.NewDesc(prefix+name, help, labels, nil), prometheus.CounterValue}
}

const prefix = "fintrace_"

var (
	connections = gauge("fin_wait2_connections",
		"Connections in FIN_WAIT2. The port is the one that is listened on, or that is connected to; the proxy is HAProxy's, or empty. What has been seen once stays, as 0 while there is none; what comes after the first 100 of proxies and 50 of others on a side is counted as port \"other\".",
		"stage", "side", "proxy", "port")
	oldest = gauge("fin_wait2_oldest_seconds",
		"Time in FIN_WAIT2 of the oldest connection, at least; 0 while there is none.",
		"stage", "side", "proxy", "port")
	overdue = gauge("overdue_connections",
		"Connections past their limit, by the setting that limits them. What has been seen once stays, as 0 while there is none; what comes after the first 1000 is counted as port \"other\".",
		"stage", "side", "proxy", "port", "limit")
	entered = counter("fin_wait2_entered_total",
		"Connections that entered FIN_WAIT2 or were found in it, but for those that left at once (see instants) or soon (see unfollowed).")
	left = counter("fin_wait2_left_total",
		"Connections that left FIN_WAIT2, but for those that left at once (see instants) or soon (see unfollowed).")
	unfollowed = counter("fin_wait2_unfollowed_total",
		"Connections that were closed and left FIN_WAIT2 before the next look, where so many were closed that they are not followed one by one.")
	instants = counter("fin_wait2_instants_total",
		"Connections that entered FIN_WAIT2 and left at once, as a healthy close does.")

	firing      = gauge("alerts_firing", "Alerts that fire.")
	alertEvents = counter("alert_events_total", "What happened to alerts.", "event")

	haproxyHeld = gauge("haproxy_held_connections",
		"Clients' connections in FIN_WAIT2 that HAProxy holds: each takes a slot of its frontend's maxconn, in a current worker or in one that a reload has told to finish (old).",
		"haproxy", "proxy", "worker")
	haproxyFrontendMaxconn = gauge("haproxy_frontend_maxconn",
		"Connections that a frontend takes at a time, in all current workers of a configuration.",
		"haproxy", "proxy")
	haproxyFrontendConnections = gauge("haproxy_frontend_connections",
		"Connections of a frontend, in all current workers of a configuration.",
		"haproxy", "proxy")
	haproxyMaxconn = gauge("haproxy_maxconn",
		"Connections that the current workers of a configuration take at a time.", "haproxy")
	haproxyConnections = gauge("haproxy_connections",
		"Connections of the current workers of a configuration.", "haproxy")
	haproxyOldWorkers = gauge("haproxy_old_workers",
		"Workers that a reload has told to finish and that still run.", "haproxy")
	haproxyConfigRead = gauge("haproxy_config_read",
		"Whether it is known what the current workers run with: 0 if the configuration could not be read, or was changed since they started.",
		"haproxy")

	finTimeout = gauge("tcp_fin_timeout_seconds",
		"The sysctl net.ipv4.tcp_fin_timeout of a network namespace. Of more than 50 namespaces some are left out.", "netns")
	orphans      = gauge("orphans", "Closed connections of the host that are still full sockets, in all states.")
	orphansLimit = gauge("orphans_limit", "The sysctl net.ipv4.tcp_max_orphans: above it the kernel resets closed connections.")
	timewait     = gauge("timewait_sockets",
		"Timewait sockets of a network namespace, closed connections in FIN_WAIT2 included.", "netns")
	timewaitLimit = gauge("timewait_limit",
		"The sysctl net.ipv4.tcp_max_tw_buckets of a network namespace.", "netns")
	timewaitOverflows = counter("timewait_overflows_total",
		"Closed connections that the kernel dropped because there were too many timewait sockets (TCPTimeWaitOverflow).", "netns")
	abortsOnMemory = counter("aborts_on_memory_total",
		"Closed connections that the kernel reset for want of memory or because there were too many orphans (TCPAbortOnMemory).", "netns")
	listenOverflows = counter("listen_overflows_total",
		"Connections that found a full accept queue (ListenOverflows).", "netns")
	listenDrops = counter("listen_drops_total",
		"Connections that a listener dropped (ListenDrops).", "netns")

	records       = counter("records_total", "Records of the kernel side that were read.")
	recordsLost   = counter("records_lost_total", "Records that the kernel side had no room for. A snapshot repairs what they would have said.")
	eventsMissed  = counter("events_missed_total", "Events that the kernel did not run the program on. A snapshot repairs what they would have said.")
	corrections   = counter("snapshot_corrections_total", "Connections of the table that a snapshot put right.")
	snapshotAt    = gauge("snapshot_last_timestamp_seconds", "When the table was last compared with all sockets.")
	tableLen      = gauge("table_connections", "Connections in the table.")
	tableCapacity = gauge("table_capacity", "Connections that the table takes.")
	tableShed     = counter("table_shed_total", "Records and sockets turned away because the table was full.")
	sinkQueued    = gauge("sink_queued", "Alerts that wait to be delivered.", "sink")
	sinkCapacity  = gauge("sink_queue_capacity", "Alerts that may wait to be delivered.", "sink")
	sinkDelivered = counter("sink_delivered_total", "Alerts delivered.", "sink")
	sinkFailures  = counter("sink_failures_total", "Attempts to deliver alerts that failed.", "sink")
	sinkShed      = counter("sink_shed_total", "Alerts given up, for want of room or after too many attempts.", "sink")
	sinkUp        = gauge("sink_up", "Whether the last attempt to deliver an alert succeeded; 1 if there was none.", "sink")
	logLost       = counter("log_lines_lost_total", "Lines of fintrace's log, alerts apart, that could not be written, or not fast enough.")
	reloadOK      = gauge("config_last_reload_successful", "Whether fintrace's configuration could be read when it was last tried.")
	reloadedAt    = gauge("config_last_reload_success_timestamp_seconds", "When fintrace's configuration was last read with success.")
	buildInfo     = gauge("build_info", "What this is.", "version", "revision", "goversion")
)

// collection is one collecting of metrics: a State and what goes out for it.
type collection struct {
	*State
	metrics *Metrics
	to      chan<- prometheus.Metric
}

func (c *collection) put(f family, value float64, labels ...string) {
	c.to <- prometheus.MustNewConstMetric(f.desc, f.values, value, labels...)
}

// Describe says nothing, which leaves it to Collect which metrics there are.
func (*collector) Describe(chan<- *prometheus.Desc) {}

// Collect sends all that there is but the histograms.
func (own *collector) Collect(to chan<- prometheus.Metric) {
	c := collection{State: own.state, metrics: own.metrics, to: to}
	c.itself()
	if c.State == nil {
		return
	}
	c.table()
	c.places()
	c.haproxies()
	c.netns()
	c.sinks()
}

func (c *collection) itself() {
	m := c.metrics
	c.put(buildInfo, 1, clean(m.build.Version), clean(m.build.Revision), runtime.Version())
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.snapshotAt.IsZero() {
		c.put(snapshotAt, unix(m.snapshotAt))
	}
	if m.reloaded {
		c.put(reloadOK, number(m.reloadOK))
	}
	if !m.reloadedAt.IsZero() {
		c.put(reloadedAt, unix(m.reloadedAt))
	}
}

func (c *collection) table() {
	c.put(entered, float64(c.Counters.Entered))
	c.put(left, float64(c.Counters.Left))
	c.put(instants, float64(c.Instants))
	c.put(unfollowed, float64(c.Unfollowed))
	c.put(records, float64(c.Records))
	c.put(recordsLost, float64(c.Lost))
	c.put(eventsMissed, float64(c.Missed))
	c.put(corrections, float64(c.Counters.Corrected))
	c.put(tableShed, float64(c.Counters.Shed))
	c.put(tableLen, float64(c.Connections))
	c.put(tableCapacity, float64(c.Capacity))
	c.put(firing, float64(c.Firing))
	for _, e := range []alert.Event{alert.Fired, alert.Updated, alert.Repeated, alert.Resolved} {
		c.put(alertEvents, float64(c.Alerts[e]), string(e))
	}
}

func (c *collection) places() {
	// In this order: whoever gathers too late for its scrape may still add some,
	// and what is numbered last names the others.
	over, kinds, places := c.known.excesses.all(), c.known.kinds.all(), c.known.places.all()
	for i, p := range places {
		var now stages
		if i < len(c.stages) {
			now = c.stages[i]
		}
		for stage := events.Held; stage <= events.Minisock; stage++ {
			labels := []string{stage.String(), events.Side(p.side).String(), p.proxy, p.port.String()}
			c.put(connections, float64(now[stage].count), labels...)
			c.put(oldest, now[stage].oldest.Seconds(), labels...)
		}
	}
	for i, e := range over {
		n := 0
		if i < len(c.overdue) {
			n = c.overdue[i]
		}
		p := places[e.place]
		c.put(overdue, float64(n), events.Stage(e.stage).String(), events.Side(p.side).String(), p.proxy, p.port.String(), kinds[e.kind])
	}
}

// total is a sum that is known if all of its parts are.
type total struct {
	sum          int
	some, hidden bool
}

// add adds a part, which is not known if it is negative.
func (t *total) add(n int) {
	t.some = true
	if n < 0 {
		t.hidden = true
		return
	}
	t.sum += n
}

func (c *collection) total(f family, t total, labels ...string) {
	if t.some && !t.hidden {
		c.put(f, float64(t.sum), labels...)
	}
}

// workers are the processes of a configuration of HAProxy.
type workers struct {
	current, old         int
	changed              bool // what a current one runs with is not known
	maxconn, connections total
}

// frontendName is what a frontend is told apart by.
type frontendName struct{ haproxy, name string }

// frontend is one in the processes of a configuration.
type frontend struct {
	inCurrent, inOld     bool
	held, heldOld        int
	maxconn, connections total
}

func (c *collection) haproxies() {
	all, fronts := map[string]*workers{}, map[frontendName]*frontend{}
	front := func(haproxy, proxy string) *frontend {
		name := frontendName{haproxy, proxy}
		if !c.metrics.frontends.admit(name, frontends) {
			name.name = other
		}
		if fronts[name] == nil {
			fronts[name] = &frontend{}
		}
		return fronts[name]
	}
	for i := range c.HAProxy {
		p := &c.HAProxy[i]
		name := c.configuration(configOf(p))
		w := all[name]
		if w == nil {
			w = &workers{}
			all[name] = w
		}
		if p.Old {
			w.old++
			for _, px := range accepting(p) {
				front(name, clean(px.Name)).inOld = true
			}
			continue
		}
		w.current++
		w.changed = w.changed || p.Config == nil || p.Changed
		info := haproxy.Info{Maxconn: -1, CurrConns: -1}
		if p.Info != nil {
			info = *p.Info
		}
		w.maxconn.add(info.Maxconn)
		w.connections.add(info.CurrConns)
		for proxy, f := range frontendsOf(p) {
			to := front(name, clean(proxy))
			to.inCurrent = true
			to.maxconn.add(f.maxconn)
			to.connections.add(f.connections)
		}
	}
	for _, p := range c.proxies {
		if !p.clients {
			continue
		}
		f := front(c.configuration(p.haproxy), p.name)
		if p.old {
			f.inOld = true
			f.heldOld += p.held
		} else {
			f.inCurrent = true
			f.held += p.held
		}
	}
	for name, w := range all {
		c.put(haproxyOldWorkers, float64(w.old), name)
		c.total(haproxyMaxconn, w.maxconn, name)
		c.total(haproxyConnections, w.connections, name)
		if w.current > 0 {
			c.put(haproxyConfigRead, number(!w.changed), name)
		}
	}
	for name, f := range fronts {
		if f.inCurrent {
			c.put(haproxyHeld, float64(f.held), name.haproxy, name.name, "current")
		}
		if f.inOld {
			c.put(haproxyHeld, float64(f.heldOld), name.haproxy, name.name, "old")
		}
		c.total(haproxyFrontendMaxconn, f.maxconn, name.haproxy, name.name)
		c.total(haproxyFrontendConnections, f.connections, name.haproxy, name.name)
	}
}

// configuration is the label of a configuration.
func (c *collection) configuration(name string) string {
	if !c.metrics.configurations.admit(name, configurations) {
		return other
	}
	return name
}

// accepting are the proxies of a process that clients connect to, as far as it
// is known what it runs with.
func accepting(p *haproxy.Process) []*haproxy.Proxy {
	if p.Config == nil || p.Changed {
		return nil
	}
	var proxies []*haproxy.Proxy
	for _, px := range p.Config.Proxies {
		if px.Accepts() && !px.Disabled.Value && !px.Undecided {
			proxies = append(proxies, px)
		}
	}
	return proxies
}

// slots are those of a frontend of one process; -1 is not known.
type slots struct{ maxconn, connections int }

// frontendsOf are the frontends of a process by name, as HAProxy says, else as
// its configuration does.
func frontendsOf(p *haproxy.Process) map[string]slots {
	found := map[string]slots{}
	for i := range p.Stats {
		if row := &p.Stats[i]; row.Server == "FRONTEND" {
			found[row.Proxy] = slots{cmp.Or(max(row.Slim, 0), -1), row.Scur}
		}
	}
	for _, px := range accepting(p) {
		s, told := found[px.Name]
		if !told {
			s.connections = -1
		}
		if s.maxconn <= 0 {
			s.maxconn = -1
			if px.Maxconn.Value > 0 && !px.Maxconn.Undecided {
				s.maxconn = px.Maxconn.Value
			}
		}
		found[px.Name] = s
	}
	return found
}

func (c *collection) netns() {
	shown := c.shownNamespaces()
	if at := slices.IndexFunc(shown, func(n Namespace) bool { _, ok := n.Statistics["TCP orphan"]; return ok }); at >= 0 {
		c.put(orphans, float64(shown[at].Statistics["TCP orphan"]))
	}
	if at := slices.IndexFunc(shown, func(n Namespace) bool { _, ok := n.Sysctls[events.SysctlMaxOrphans]; return ok }); at >= 0 {
		c.put(orphansLimit, float64(shown[at].Sysctls[events.SysctlMaxOrphans]))
	}
	for _, n := range shown {
		for name, f := range map[string]family{
			events.SysctlFinTimeout:   finTimeout,
			events.SysctlMaxTWBuckets: timewaitLimit,
		} {
			if value, known := n.Sysctls[name]; known {
				c.put(f, float64(value), n.Name)
			}
		}
		for name, f := range map[string]family{
			"TCP tw":                     timewait,
			"TcpExt TCPTimeWaitOverflow": timewaitOverflows,
			"TcpExt TCPAbortOnMemory":    abortsOnMemory,
			"TcpExt ListenOverflows":     listenOverflows,
			"TcpExt ListenDrops":         listenDrops,
		} {
			if value, known := n.Statistics[name]; known {
				c.put(f, float64(value), n.Name)
			}
		}
	}
}

// shownNamespaces are those with series: the host's own, then those that had
// them before, then others. The names of those that are gone are given up: a
// host that runs containers has new ones for ever.
func (c *collection) shownNamespaces() []Namespace {
	all := slices.Clone(c.Namespaces)
	for i := range all {
		all[i].Name = clean(all[i].Name)
	}
	rank := func(n Namespace) int {
		if n.Name == Host {
			return 0
		}
		if _, before := c.metrics.namespaces[n.Name]; before {
			return 1
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b Namespace) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Name, b.Name))
	})
	all = slices.CompactFunc(all, func(a, b Namespace) bool { return a.Name == b.Name })
	all = all[:min(len(all), namespaces)]
	clear(c.metrics.namespaces)
	for _, n := range all {
		c.metrics.namespaces[n.Name] = struct{}{}
	}
	return all
}

func (c *collection) sinks() {
	seen := map[string]bool{}
	for _, s := range c.Sinks {
		name := clean(s.Name)
		for i := 2; seen[name]; i++ {
			name = clean(s.Name) + " " + strconv.Itoa(i)
		}
		seen[name] = true
		c.put(sinkQueued, float64(s.Queued), name)
		c.put(sinkCapacity, float64(s.Capacity), name)
		c.put(sinkDelivered, float64(s.Delivered), name)
		c.put(sinkFailures, float64(s.Failed), name)
		c.put(sinkShed, float64(s.Shed), name)
		c.put(sinkUp, number(s.Healthy), name)
	}
	c.put(logLost, float64(c.LogLost))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// unix is a time as Prometheus has them.
func unix(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
