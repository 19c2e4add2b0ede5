// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/track"
)

// soakFor makes the soak longer than the tests can wait for, and strict about
// what the machine must be quiet for.
var soakFor = flag.Duration("soak.duration", 0, "how long the daemon is soaked; what depends on the speed of the machine is then asserted too")

const (
	// soakWorkers is more than the processors, so that none ever waits for a peer.
	soakWorkers = 4
	// heldFor and closedFor are how long connections get stuck: beyond the limit
	// of a second and the grace; and beyond the snapshot that shows the second
	// sort, within ten seconds and as long as it takes.
	heldFor, closedFor = 5 * time.Second, 45 * time.Second
	// perPeer of them come from one peer, so that it has alerts of its own.
	perPeer = 16 // half of them at either end
	// soakPeers and soakThreshold are the configuration's.
	soakPeers, soakThreshold = 10, 3
)

// TestDaemonSoak runs the daemon under connections at the full rate of this
// machine, each of a peer that has not been there before. What the daemon uses
// and shows is bounded, and what it counts adds up.
func TestDaemonSoak(t *testing.T) {
	kerneltest.Require(t)
	duration := cmp.Or(*soakFor, 15*time.Second)
	strict := *soakFor > 0
	ns := soakNamespace(t)
	marked := []*kerneltest.Namespace{kerneltest.NewNamespace(t), kerneltest.NewNamespace(t), kerneltest.NewNamespace(t)}
	quick := []string{fmt.Sprint(ns.Inode)}
	for _, m := range marked {
		quick = append(quick, fmt.Sprint(m.Inode))
	}
	d := startDaemon(t, fmt.Sprintf(`
limits:
  - {name: held, match: {netns: [%[1]s]}, fin_timeout: 1s}
  - {name: closed, match: {netns: [%[1]s], stage: minisock}, fin_timeout: 1s}
alerts: {min_connections: %[2]d, peers_per_group: %[3]d, resolve_after: 1s, update_every: 1s}
`, strings.Join(quick, ", "), soakThreshold, soakPeers))
	s := &soak{daemonProcess: d, client: &http.Client{Timeout: 10 * time.Second}}
	defer s.client.CloseIdleConnections()
	if strict {
		s.idle(time.Minute)
	}
	before, err := s.scrape()
	if err != nil {
		t.Fatal(err)
	}
	used := s.processorTime()

	began := time.Now()
	stop := make(chan struct{})
	load := soakLoad(t, ns, stop)
	var late latencies
	var others sync.WaitGroup
	for _, m := range marked {
		others.Go(func() { s.mark(t, m, stop, &late) })
	}
	var warm soakScrape
	for at := time.NewTicker(time.Second); time.Since(began) < duration || warm.series == nil; <-at.C {
		now, err := s.scrape()
		if err != nil {
			t.Error(err)
			break
		}
		s.scrapes = append(s.scrapes, now)
		if since := time.Since(began); warm.series == nil && since >= duration/5 {
			if missing := load.unseen(now); missing == "" {
				warm = now
				t.Logf("warm after %s", since.Round(time.Second))
			} else if since > 2*duration+time.Minute {
				t.Errorf("there is no series like %s", missing)
				break
			}
		}
		s.look(inode(ns))
	}
	last := s.scrapes[len(s.scrapes)-1]
	used = s.processorTime() - used
	took := time.Since(began)
	close(stop)
	made := load.wait()
	others.Wait()
	if made.failed != nil {
		t.Fatal("the load failed:", made.failed)
	}

	// It is as it was before.
	there := func() (n int) {
		var answer struct {
			Connections []struct{ Local, Remote string }
		}
		s.ask("/api/v1/connections?limit=10000&netns="+fmt.Sprint(ns.Inode), &answer)
		real := ssFinWait2(t, []*kerneltest.Namespace{ns})
		for _, c := range answer.Connections {
			if !slices.Contains(real, fmt.Sprintf("%d %s %s", ns.Inode, c.Local, c.Remote)) {
				n++
			}
		}
		return n
	}
	for deadline := time.Now().Add(time.Minute); there() > 0; {
		if time.Now().After(deadline) {
			t.Errorf("%d connections that are gone are still in the table", there())
			break
		}
		time.Sleep(time.Second)
	}
	var after soakScrape
	if err := await("the daemon to be as before", func() bool {
		after, err = s.scrape()
		return err == nil && after.get("go_goroutines") <= before.get("go_goroutines") && after.get("process_open_fds") <= before.get("process_open_fds")
	}); err != nil {
		t.Errorf("%v: %v goroutines, %v before; %v descriptors, %v before", err, after.get("go_goroutines"), before.get("go_goroutines"),
			after.get("process_open_fds"), before.get("process_open_fds"))
	}

	grown := func(name string) uint64 { return uint64(after.get(name) - before.get(name)) }
	seen, instants := grown("fintrace_fin_wait2_entered_total"), grown("fintrace_fin_wait2_instants_total")
	lost, missed := grown("fintrace_records_lost_total"), grown("fintrace_events_missed_total")
	t.Logf("%d connections of %d peers, %.0f a second: %d tracked, %d not sent; lost %d, skipped by the kernel %d, corrected %d",
		made.made, made.peers, float64(made.made)/took.Seconds(), seen, instants, lost, missed, grown("fintrace_snapshot_corrections_total"))
	if lost != 0 {
		t.Errorf("%d records lost", lost)
	}
	// As for churned; those of other tests count too.
	if all := uint64(made.made); seen+instants+all/1000 < all {
		t.Errorf("%d connections were made and closed, %d seen, %d skipped", all, seen+instants, missed)
	}
	for _, now := range append(s.scrapes, after) {
		entered, left, table := now.get("fintrace_fin_wait2_entered_total"), now.get("fintrace_fin_wait2_left_total"), now.get("fintrace_table_connections")
		if entered != left+table {
			t.Errorf("%v entered, %v left, %v are there", entered, left, table)
		}
	}
	if strict && made.peers < 1_000_000 {
		t.Errorf("only %d peers", made.peers)
	}

	if warm.series != nil {
		for series := range last.series {
			if _, there := warm.series[series]; !there && load.own(series) {
				t.Errorf("%s is a new series", series)
			}
		}
		for series := range warm.series {
			if _, there := last.series[series]; !there && load.own(series) {
				t.Errorf("%s is no longer there", series)
			}
		}
	}
	s.judge(strict)
	t.Logf("%d series when warm, %d at the end", len(warm.series), len(last.series))
	t.Logf("%.2f µs of processor time for each connection, %.1f %% of one processor", float64(used.Microseconds())/float64(made.made), 100*used.Seconds()/took.Seconds())
	t.Logf("from the limit to the line: %s; to the time in it: %s", quantiles(late.read), quantiles(late.logged))
	if len(late.read) == 0 {
		t.Error("no alert of the marked connections was waited for")
	}
	if strict {
		s.judgeLate(late.read)
	}
	for _, l := range s.logged(func(l *logLine) bool { return strings.Contains(l.What, "network namespace "+inode(ns)) }) {
		t.Errorf("not looked at: %s", l.What)
	}
	peers := map[string]bool{}
	for _, l := range s.logged(spoken(fmt.Sprint(ns.Inode), alert.Fired)) {
		peers[l.Labels.Peer] = true
	}
	t.Logf("%.0f alerts fired, %.0f changes in all, for %d peers", grownOf(before, after, `fintrace_alert_events_total{event="fired"}`),
		grownOf(before, after, "fintrace_alert_events_total"), len(peers))
	if len(peers) < soakPeers {
		t.Errorf("alerts were of %d peers: the test shows nothing", len(peers))
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

func grownOf(before, after soakScrape, name string) float64 {
	return after.get(name) - before.get(name)
}

// soak is a daemon and what has been seen of it.
type soak struct {
	*daemonProcess
	client  *http.Client
	scrapes []soakScrape
	alerts  int // at most, of one family
	pages   []time.Duration
	busy    int // answers that there was no time
}

// soakScrape is one scrape, as Prometheus does it.
type soakScrape struct {
	took   time.Duration
	bytes  int
	series map[string]float64
}

// get is the sum of the series of a name, or of one with its labels.
func (s soakScrape) get(name string) (sum float64) {
	if value, ok := s.series[name]; ok {
		return value
	}
	for series, value := range s.series {
		if family, _, _ := strings.Cut(series, "{"); family == name {
			sum += value
		}
	}
	return sum
}

func (s *soak) scrape() (scrape soakScrape, err error) {
	began := time.Now()
	response, err := s.client.Get("http://" + s.at + "/metrics")
	if err != nil {
		return scrape, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return scrape, err
	}
	scrape = soakScrape{took: time.Since(began), bytes: len(body), series: map[string]float64{}}
	if response.StatusCode != http.StatusOK {
		return scrape, fmt.Errorf("a scrape is answered %s: %s", response.Status, body)
	}
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		if at < 0 {
			return scrape, fmt.Errorf("a line of a scrape is %q", line)
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			return scrape, fmt.Errorf("a line of a scrape is %q: %w", line, err)
		}
		if _, twice := scrape.series[line[:at]]; twice {
			return scrape, fmt.Errorf("%s is there twice", line[:at])
		}
		scrape.series[line[:at]] = value
	}
	return scrape, nil
}

// look asks for what people look at. Where the machine is busy the answer may be
// that there was no time for one.
func (s *soak) look(netns string) {
	began := time.Now()
	code, body := s.daemonProcess.get("/api/v1/alerts")
	page, text := s.daemonProcess.get("/")
	s.pages = append(s.pages, time.Since(began))
	for _, answer := range []int{code, page} {
		if answer == http.StatusServiceUnavailable {
			s.busy++
		}
	}
	if page != http.StatusOK && page != http.StatusServiceUnavailable {
		s.t.Errorf("the page: %d %s", page, text)
	}
	if code == http.StatusServiceUnavailable {
		return
	}
	var answer struct{ Alerts []alertRecord }
	if err := json.Unmarshal(body, &answer); code != http.StatusOK || err != nil {
		s.t.Errorf("the alerts: %d %s: %v", code, body, err)
	}
	families := map[alert.Labels]int{}
	for _, a := range answer.Alerts {
		if a.Labels.Netns == netns {
			a.Labels.Peer = ""
			families[a.Labels]++
		}
	}
	for f, n := range families {
		s.alerts = max(s.alerts, n)
		if n > soakPeers+1 {
			s.t.Errorf("%d alerts of %+v fire at once, want %d peers and one of the others at most", n, f, soakPeers)
		}
	}
}

// judge compares the first part of the run with the last, and says what it saw.
func (s *soak) judge(strict bool) {
	s.t.Helper()
	most := func(scrapes []soakScrape, name string) (most float64) {
		for _, now := range scrapes {
			most = max(most, now.get(name))
		}
		return most
	}
	n := len(s.scrapes)
	const resident, heap, goroutines = "process_resident_memory_bytes", "go_memstats_heap_inuse_bytes", "go_goroutines"
	early, end := s.scrapes[n/5:max(n*2/5, n/5+1)], s.scrapes[n-max(n/5, 1):]
	table := most(s.scrapes, "fintrace_table_connections")
	bound := soakBase + soakPerConnection*table
	s.t.Logf("at most %.0f connections in the table, %.0f overdue", table, most(s.scrapes, "fintrace_overdue_connections"))
	s.t.Logf("resident %.1f MB from 20 to 40 %% of the time, %.1f MB at the end; heap in use %.1f MB and %.1f MB; bound %.1f MB",
		most(early, resident)/1e6, most(end, resident)/1e6, most(early, heap)/1e6, most(end, heap)/1e6, bound/1e6)
	if all := most(s.scrapes, resident); all > bound {
		s.t.Errorf("%.1f MB are resident, want %.1f MB at most", all/1e6, bound/1e6)
	}
	if strict && most(end, resident) > 1.2*most(early, resident) {
		s.t.Errorf("what is resident grows from %.1f to %.1f MB", most(early, resident)/1e6, most(end, resident)/1e6)
	}
	for _, name := range []string{goroutines, "process_open_fds"} {
		least := func(scrapes []soakScrape) float64 {
			return slices.MinFunc(scrapes, func(a, b soakScrape) int { return cmp.Compare(a.get(name), b.get(name)) }).get(name)
		}
		s.t.Logf("%s: %v to %v from 20 to 40 %% of the time, %v to %v at the end", name, least(early), most(early, name), least(end), most(end, name))
		// A walk of the sockets, a look at HAProxy and a request have one each while
		// they last; with a snapshot after the other a walk is always there.
		if strict && least(end) > most(early, name) {
			s.t.Errorf("%s grows from at most %v to %v", name, most(early, name), least(end))
		}
	}
	var took []time.Duration
	size := 0
	for _, now := range s.scrapes {
		took = append(took, now.took)
		size = max(size, now.bytes)
	}
	s.t.Logf("a scrape took %s, and is %d bytes at most; the alerts and the page %s", quantiles(took), size, quantiles(s.pages))
	if s.busy > 0 {
		s.t.Logf("%d answers were that there was no time", s.busy)
	}
	if strict && s.busy > 0 {
		s.t.Errorf("the loop was held up %d times", s.busy)
	}
	s.t.Logf("a family had %d alerts at most; %.0f fired at a time at most", s.alerts, most(s.scrapes, "fintrace_alerts_firing"))
}

// What may be resident: 45 MB are without a connection, and the book of alerts
// takes 32 MB at the worst, which the garbage collector may let double; and for a
// connection four times the 250 bytes that it takes, as the collector lets the
// table double while that doubles.
const (
	soakBase          = (45 + 2*32) * 1e6
	soakPerConnection = 4 * 250
)

// judgeLate is about how late alerts were. What the kernel skips an event of, one
// in ten thousand, is only found by the next snapshot.
func (s *soak) judgeLate(late []time.Duration) {
	slow := 0
	for _, l := range late {
		switch {
		case l > doubtfulAtMost+5*time.Second:
			s.t.Errorf("a line came %s after the limit had passed", l)
		case l > time.Second:
			slow++
		}
	}
	if slow*50 > len(late) {
		s.t.Errorf("%d of %d lines came more than a second after the limit had passed", slow, len(late))
	}
}

// idle measures what the daemon costs while nothing happens.
func (s *soak) idle(during time.Duration) {
	cpu, wakes := s.processorTime(), s.switches()
	time.Sleep(during)
	cpu, wakes = s.processorTime()-cpu, s.switches()-wakes
	s.t.Logf("idle: %.0f µs of processor time and %.1f wake-ups a second", float64(cpu.Microseconds())/during.Seconds(), float64(wakes)/during.Seconds())
}

// processorTime is what the daemon has had, its threads that ended included.
func (s *soak) processorTime() time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest) // state is the third
	ticks := 0
	for _, field := range []int{14, 15} {
		n, err := strconv.Atoi(fields[field-3])
		if err != nil {
			s.t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick
}

// switches counts how many times the daemon's threads got the processor.
func (s *soak) switches() (sum int) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", s.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // It has ended.
		}
		for line := range strings.Lines(string(text)) {
			if name, value, _ := strings.Cut(line, ":"); strings.HasSuffix(name, "voluntary_ctxt_switches") {
				n, err := strconv.Atoi(strings.TrimSpace(value))
				if err != nil {
					s.t.Fatal(err)
				}
				sum += n
			}
		}
	}
	return sum
}

// latencies are those of alerts.
type latencies struct {
	mu           sync.Mutex
	read, logged []time.Duration // to the moment at which the line was read, and to the line's own time
}

func (l *latencies) add(read, logged time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.read, l.logged = append(l.read, read), append(l.logged, logged)
}

func quantiles(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	all = slices.Clone(all)
	slices.Sort(all)
	at := func(q float64) time.Duration {
		return all[int(q*float64(len(all)-1)+0.5)].Round(100 * time.Microsecond)
	}
	return fmt.Sprintf("p50 %s, p99 %s, max %s of %d", at(0.5), at(0.99), at(1), len(all))
}

// mark has connections of its own get stuck again and again, and measures how
// long after their limit and the grace the log's line can be read.
func (s *soak) mark(t *testing.T, ns *kerneltest.Namespace, stop <-chan struct{}, late *latencies) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		if err := s.markOnce(ns, late); err != nil {
			t.Error(err)
			return
		}
	}
}

func (s *soak) markOnce(ns *kerneltest.Namespace, late *latencies) error {
	all, err := holdAll(ns, anyPort, soakThreshold)
	release := sync.OnceFunc(func() {
		for _, h := range all {
			h.close()
		}
	})
	defer release()
	if err != nil {
		return err
	}
	due := time.Now().Add(time.Second + track.Grace)
	fired, err := s.next("the alert", due.Add(-time.Second), spoken(inode(ns), alert.Fired))
	if err != nil {
		return err
	}
	late.add(fired.Read.Sub(due), fired.Time.Sub(due))
	release()
	_, err = s.next("the resolution", due, spoken(inode(ns), alert.Resolved))
	return err
}

// next waits for a line that fits, read after a time.
func (s *soak) next(what string, after time.Time, fits func(*logLine) bool) (line logLine, err error) {
	err = await(what, func() (ok bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for i := len(s.lines) - 1; i >= 0 && s.lines[i].Read.After(after); i-- {
			if fits(&s.lines[i]) {
				line, ok = s.lines[i], true
			}
		}
		return ok
	})
	return line, err
}

// soakNamespace is a namespace in which very many addresses are its own.
func soakNamespace(t *testing.T) *kerneltest.Namespace {
	t.Helper()
	ns := kerneltest.NewNamespace(t)
	ns.Sysctl(t, "net.ipv6.ip_nonlocal_bind", "1")
	for name, value := range map[string]string{
		"net.ipv4.ip_local_port_range": "1024 65535",
		"net.ipv4.tcp_max_tw_buckets":  "2000000",
	} {
		ns.Sysctl(t, name, value)
	}
	for _, route := range [][]string{{"-4", "10.0.0.0/8"}, {"-6", "fd00::/8"}} {
		out, err := exec.Command("nsenter", "--net="+ns.Path(), "ip", route[0], "route", "add", "local", route[1], "dev", "lo").CombinedOutput()
		if err != nil {
			t.Fatalf("ip route: %v: %s", err, out)
		}
	}
	return ns
}

// soaked is what a load has done.
type soaked struct {
	churn
	peers int
}

type soakRun struct {
	ports []int
	wait  func() soaked
}

// soakLoad makes connections in a namespace until stop is closed.
func soakLoad(t *testing.T, ns *kerneltest.Namespace, stop <-chan struct{}) *soakRun {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// Three for each pair of a held and a closed one; a quarter is for all else.
	stuck := min(int(limit.Cur)*3/4/3/soakWorkers, 2000)
	run := &soakRun{}
	results := make(chan soaked, soakWorkers)
	for id := range soakWorkers {
		w := &soakWorker{id: byte(id), most: stuck}
		var err error
		ns.Do(func() { err = w.listen() })
		if err != nil {
			t.Fatal(err)
		}
		run.ports = append(run.ports, w.port)
		go ns.Do(func() {
			w.done.failed = errors.Join(w.done.failed, w.run(stop))
			results <- w.done
		})
	}
	run.wait = func() (total soaked) {
		for range soakWorkers {
			w := <-results
			total.made += w.made
			total.peers += w.peers
			total.failed = errors.Join(total.failed, w.failed)
		}
		return total
	}
	return run
}

// unseen is a series that this load must make and that is not there yet.
func (r *soakRun) unseen(s soakScrape) string {
	seen := slices.Collect(maps.Keys(s.series))
	for _, port := range r.ports {
		for _, side := range []events.Side{events.Inbound, events.Outbound} {
			for stage, limit := range map[events.Stage]string{events.Held: "held", events.Minisock: "closed"} {
				want := []string{"fintrace_overdue_connections{", fmt.Sprintf(`port="%d"`, port), fmt.Sprintf("side=%q", side), fmt.Sprintf("stage=%q", stage), limit}
				if !slices.ContainsFunc(seen, func(series string) bool {
					return !slices.ContainsFunc(want, func(part string) bool { return !strings.Contains(series, part) })
				}) {
					return fmt.Sprint(want)
				}
			}
		}
	}
	return ""
}

var portLabel = regexp.MustCompile(`[{,](port|haproxy|netns)="([^"]*)"`)

// own says whether a series is of this load or of the daemon itself, and not of
// what else runs on this host.
func (r *soakRun) own(series string) bool {
	m := portLabel.FindStringSubmatch(series)
	if m == nil {
		return true
	}
	port, err := strconv.Atoi(m[2])
	return m[1] == "port" && err == nil && slices.Contains(r.ports, port)
}

// soakWorker is one thread that is both ends of its connections, each of which
// comes from an address that has not been there, and goes to the same.
type soakWorker struct {
	id       byte
	most     int // stuck ones of either sort
	listener int
	port     int
	n        int // of the next peer

	held, closed stuckPairs
	done         soaked
}

// stuckPairs are the connections that are stuck in one way, oldest first.
type stuckPairs struct {
	pairs []stuckPair
	peer  unix.Sockaddr // of the next
	left  int           // that this peer has yet to make
}

// stuckPair is a connection that gets stuck; where the first end is closed it is -1.
type stuckPair struct {
	first, second int
	until         time.Time
}

func (w *soakWorker) family() int {
	if w.id%2 == 1 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// listen is to be called in the namespace.
func (w *soakWorker) listen() (err error) {
	if w.listener, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{}
	if w.family() == unix.AF_INET6 {
		to = &unix.SockaddrInet6{}
	}
	if err := errors.Join(unix.Bind(w.listener, to), unix.Listen(w.listener, 128)); err != nil {
		return err
	}
	bound, err := unix.Getsockname(w.listener)
	if err == nil {
		w.port = int(endpoint(bound).Port)
	}
	return err
}

// next is an address of a peer that has not been there, with a port. With IPv6
// each has a network of its own, of which there are no more than networks: Linux
// remembers each address on lo as a neighbour, and stalls with a million.
func (w *soakWorker) next() unix.Sockaddr {
	w.n++
	if w.family() == unix.AF_INET || w.n <= networks {
		w.done.peers++
	}
	if w.family() == unix.AF_INET {
		// Of 10/8, a quarter for each worker.
		n := w.n%(1<<22) | int(w.id)<<22
		return &unix.SockaddrInet4{Addr: [4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}}
	}
	n := w.n % networks
	return &unix.SockaddrInet6{Addr: [16]byte{0: 0xfd, 1: w.id, 6: byte(n >> 8), 7: byte(n), 15: 1}}
}

// networks are those of a worker's peers with IPv6.
const networks = 1 << 16

// withPort is the same address with another port.
func withPort(sa unix.Sockaddr, port int) unix.Sockaddr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &unix.SockaddrInet4{Addr: sa.Addr, Port: port}
	case *unix.SockaddrInet6:
		return &unix.SockaddrInet6{Addr: sa.Addr, Port: port}
	}
	return nil
}

func (w *soakWorker) run(stop <-chan struct{}) error {
	defer unix.Close(w.listener)
	defer func() {
		w.release(&w.held, time.Time{})
		w.release(&w.closed, time.Time{})
	}()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		if n%64 == 0 {
			now := time.Now()
			w.release(&w.held, now)
			w.release(&w.closed, now)
		}
		if err := w.one(n); err != nil {
			return err
		}
	}
}

// one makes a connection. Most close as healthy ones do, either end first; of
// each hundred some are half-closed first, and some get stuck if not enough are.
func (w *soakWorker) one(n int) error {
	kind := n / 2 % 50
	var stuck *stuckPairs
	switch {
	case kind == 7 && len(w.held.pairs) < w.most:
		stuck = &w.held
	case kind == 11 && len(w.closed.pairs) < w.most:
		stuck = &w.closed
	}
	var peer unix.Sockaddr
	if stuck == nil {
		peer = w.next()
	} else {
		if stuck.left == 0 {
			stuck.peer, stuck.left = w.next(), perPeer
		}
		stuck.left--
		peer = stuck.peer
	}
	client, server, err := w.connect(peer)
	if err != nil {
		return err
	}
	first, second := client, server
	if n%2 == 0 {
		first, second = server, client
	}
	switch {
	case stuck == &w.held:
		stuck.pairs = append(stuck.pairs, stuckPair{first, second, time.Now().Add(heldFor)})
		return unix.Shutdown(first, unix.SHUT_WR)
	case stuck == &w.closed:
		stuck.pairs = append(stuck.pairs, stuckPair{-1, second, time.Now().Add(closedFor)})
		return unix.Close(first)
	case kind < 3:
		err = errors.Join(unix.Shutdown(first, unix.SHUT_WR), awaitFIN(second), unix.Close(second), unix.Close(first))
	default:
		err = errors.Join(unix.Close(first), awaitFIN(second), unix.Close(second))
	}
	w.done.made++
	return err
}

func (w *soakWorker) connect(peer unix.Sockaddr) (client, server int, err error) {
	if client, err = unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return 0, 0, err
	}
	// The port is chosen by connect, for that destination alone.
	err = errors.Join(unix.SetsockoptInt(client, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.Bind(client, peer), unix.Connect(client, withPort(peer, w.port)))
	if err == nil {
		server, _, err = unix.Accept4(w.listener, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		return 0, 0, errors.Join(err, unix.Close(client))
	}
	return client, server, nil
}

// release ends those that have been stuck for long enough; with no time, all.
func (w *soakWorker) release(stuck *stuckPairs, now time.Time) {
	for len(stuck.pairs) > 0 && (now.IsZero() || !stuck.pairs[0].until.After(now)) {
		p := stuck.pairs[0]
		stuck.pairs = stuck.pairs[1:]
		unix.Close(p.second)
		if p.first >= 0 {
			unix.Close(p.first)
		}
		w.done.made++
	}
}
