// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

var (
	// soakFor makes the soak longer than the tests can wait for, and strict about
	// what the machine must be quiet for.
	soakFor  = flag.Duration("soak.duration", 0, "how long to soak; what depends on the speed of the machine is then asserted too")
	soakSeed = flag.Uint64("soak.seed", 0, "what all that is random in the soak follows from (default: another each time)")
)

// TestSoak runs a daemon and a trace for long, under connections that go every
// way there is, in several network namespaces, while faults happen at random. Two
// witnesses know better: the kernel's own table of sockets, by ss, and the
// generator, which knows what it did. What is said to be exact has to be so
// whatever happens; what is not known, or known late, has to have a reason.
//
// All choices follow from the seed: which connections are made one after the
// other in a namespace, which faults, how long each waits. How far they get, and
// what meets what, is up to the machine.
func TestSoak(t *testing.T) {
	kerneltest.Require(t)
	duration := cmp.Or(*soakFor, 3*time.Minute)
	strict := *soakFor > 0
	seed := cmp.Or(*soakSeed, uint64(time.Now().UnixNano())%1e9)
	tell(t, "the seed is %d", seed)

	shaken := &soakShocks{}
	w := newSoakWitness(t, shaken)
	spaces := []*soakSpace{
		{name: "one", kinds: soakKinds, rate: 40, timestamps: true},
		{name: "two", kinds: soakKinds, rate: 40, timestamps: true},
		{name: "without timestamps", kinds: soakKinds, rate: 40},
		{name: "without minisocks", kinds: soakFullKinds, rate: 2, timestamps: true},
	}
	flooded := soakNamespace(t)
	marked := []*kerneltest.Namespace{kerneltest.NewNamespace(t), kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)}
	quick := []string{inode(flooded)}
	for _, m := range marked {
		quick = append(quick, inode(m))
	}
	hook := newSoakHook(t)
	config := func(n int) string { return soakConfig(quick, hook.at, n) }
	d := newDaemon(t, config(0))
	d.start()
	s := &soak{daemonProcess: d, shaken: shaken, client: &http.Client{Timeout: 10 * time.Second}}
	defer s.client.CloseIdleConnections()
	trace := startSoakTrace(t, w)
	if strict {
		s.idle(time.Minute)
	}
	before, err := s.scrape()
	if err != nil {
		t.Fatal(err)
	}
	// Of either process, what it has open in the kernel.
	open := func() []any {
		return []any{countObjects(kernelObjects(t, d.Process.Pid)), countObjects(kernelObjects(t, trace.Process.Pid)), descriptors(t, trace.Process.Pid)}
	}
	opened := open()

	began := time.Now()
	// The load ends first: what is in FIN_WAIT2 then is still watched.
	stop, ended := make(chan struct{}), make(chan struct{})
	var load, others sync.WaitGroup
	for i, space := range spaces {
		space.number, space.witness = i+1, w
		space.do, space.cut = make(chan func()), make(chan struct{})
		load.Go(func() { space.run(t, seed, stop) })
	}
	flood := startFlood(t, flooded, stop)
	var late latencies
	for _, m := range marked {
		others.Go(func() { s.mark(t, m, stop, &late) })
	}
	others.Go(func() {
		times, err := shaken.watch(ended)
		if err != nil {
			t.Error(err)
		}
		tell(t, "programs came and went %d times", times)
	})
	faults := &soakFaults{t: t, soak: s, trace: trace, flood: flood, spaces: spaces[:3], hook: hook, shaken: shaken, config: config, stop: stop, done: map[string]int{}}
	others.Go(func() { faults.run(rand.New(rand.NewPCG(seed, 0))) })
	compared := 0
	others.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-ended:
				return
			case <-time.After(500 * time.Millisecond):
			}
			if ns := spaces[n%len(spaces)].namespace(); ns != nil {
				compared += w.compare(t, ns, func() ([]report.Record, bool) { return s.table(ns) })
			}
		}
	})

	var warm soakScrape
	for at := time.NewTicker(time.Second); time.Since(began) < duration || warm.series == nil; <-at.C {
		now, err := s.scrape()
		if err != nil {
			t.Error(err)
			break
		}
		s.scrapes = append(s.scrapes, now)
		if since := time.Since(began); warm.series == nil && since >= duration/5 {
			if missing := flood.unseen(now); missing == "" {
				warm = now
				tell(t, "warm after %s", since.Round(time.Second))
			} else if since > 2*duration+time.Minute {
				t.Errorf("there is no series like %s", missing)
				break
			}
		}
		s.look(inode(flooded))
	}
	last := s.scrapes[len(s.scrapes)-1]
	took := time.Since(began)
	close(stop)
	made := flood.wait()
	load.Wait()
	close(ended)
	others.Wait()
	if made.failed != nil {
		t.Fatal("the load failed:", made.failed)
	}
	tell(t, "%s of load, %s until all of it had ended", took.Round(time.Second), (time.Since(began) - took).Round(time.Second))

	w.finish()
	if n := s.left(); n > 0 {
		t.Errorf("%d connections that are gone are still in the daemon's table", n)
	}
	// What the webhook held up is delivered, and then it is as it was before.
	var after soakScrape
	if err := awaitFor(2*time.Minute, "the sinks to have delivered all", func() bool {
		after, err = s.scrape()
		return err == nil && after.get("fintrace_sink_queued") == 0
	}); err != nil {
		t.Errorf("%v: %v wait", err, after.get("fintrace_sink_queued"))
	}
	if err := await("the daemon to be as before", func() bool {
		after, err = s.scrape()
		return err == nil && after.get("go_goroutines") <= before.get("go_goroutines") && after.get("process_open_fds") <= before.get("process_open_fds")
	}); err != nil {
		t.Errorf("%v: %v goroutines, %v before; %v descriptors, %v before", err, after.get("go_goroutines"), before.get("go_goroutines"),
			after.get("process_open_fds"), before.get("process_open_fds"))
	}
	if err := await("both to have open what they had", func() bool { return reflect.DeepEqual(open(), opened) }); err != nil {
		t.Errorf("%v: BPF objects of the daemon and the trace, and its descriptors: %v, before %v", err, open(), opened)
	}
	totals := trace.end(t)
	w.verdict(totals)
	tell(t, "%d comparisons of a connection with ss; faults: %v", compared, faults.done)
	if compared == 0 {
		t.Error("nothing was compared with ss")
	}

	grown := func(name string) uint64 { return uint64(after.get(name) - before.get(name)) }
	seen, instants := grown("fintrace_fin_wait2_entered_total"), grown("fintrace_fin_wait2_instants_total")
	lost, missed := grown("fintrace_records_lost_total"), grown("fintrace_events_missed_total")
	tell(t, "the flood: %d connections of %d peers, %.0f a second of it: %d tracked, %d not sent; lost %d, skipped by the kernel %d, corrected %d",
		made.made, made.peers, float64(faults.made)/faults.took.Seconds(), seen, instants, lost, missed, grown("fintrace_snapshot_corrections_total"))
	// As for churned; those of other tests count too.
	if all := uint64(made.made); seen+instants+lost+all/1000 < all {
		t.Errorf("%d connections were made and closed, %d seen, %d skipped", all, seen+instants, missed)
	}
	for _, now := range append(s.scrapes, after) {
		entered, left, table := now.get("fintrace_fin_wait2_entered_total"), now.get("fintrace_fin_wait2_left_total"), now.get("fintrace_table_connections")
		if entered != left+table {
			t.Errorf("%v entered, %v left, %v are there", entered, left, table)
		}
	}
	if strict && duration >= 5*time.Minute && made.peers < 100_000 {
		t.Errorf("only %d peers", made.peers)
	}
	if warm.series != nil {
		for series := range last.series {
			if _, there := warm.series[series]; !there && flood.own(series) {
				t.Errorf("%s is a new series", series)
			}
		}
		for series := range warm.series {
			if _, there := last.series[series]; !there && flood.own(series) {
				t.Errorf("%s is no longer there", series)
			}
		}
	}
	s.judge(strict)
	tell(t, "%d series when warm, %d at the end", len(warm.series), len(last.series))
	tell(t, "%.2f µs of processor time for each connection of the flood, %.1f %% of one processor",
		float64(faults.used.Microseconds())/float64(faults.made), 100*faults.used.Seconds()/faults.took.Seconds())
	tell(t, "from the limit to the line: %s; to the time in it: %s", quantiles(late.read), quantiles(late.logged))
	if len(late.read) == 0 {
		t.Error("no alert of the marked connections was waited for")
	}
	if strict {
		s.judgeLate(late.read)
	}
	peers := map[string]bool{}
	for _, l := range s.logged(spoken(inode(flooded), alert.Fired)) {
		peers[l.Labels.Peer] = true
	}
	tell(t, "%.0f alerts fired, %.0f changes in all, for %d peers", after.get(`fintrace_alert_events_total{event="fired"}`),
		after.get("fintrace_alert_events_total"), len(peers))
	if len(peers) < soakPeers {
		t.Errorf("alerts were of %d peers: the test shows nothing", len(peers))
	}
	hook.last(t, flooded)
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// tell prints what is no failure in a way that differs from one.
func tell(t *testing.T, format string, args ...any) {
	fmt.Fprintf(t.Output(), format+"\n", args...)
}

func countObjects(ids map[string][]uint32) map[string]int {
	counts := map[string]int{}
	for kind, ids := range ids {
		counts[kind] = len(ids)
	}
	return counts
}
