// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	// soakPeers and soakThreshold are the configuration's.
	soakPeers, soakThreshold = 10, 3
)

// soak is a daemon and what has been seen of it.
type soak struct {
	*daemonProcess
	client  *http.Client
	frozen  sync.RWMutex // held while it is stopped, and answers nobody
	shaken  *soakShocks
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
	s.frozen.RLock()
	defer s.frozen.RUnlock()
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
	s.frozen.RLock()
	defer s.frozen.RUnlock()
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

// table is what the daemon has of a namespace; ok is false where it had no time.
func (s *soak) table(ns *kerneltest.Namespace) (records []report.Record, ok bool) {
	s.frozen.RLock()
	defer s.frozen.RUnlock()
	code, body := s.daemonProcess.get("/api/v1/connections?limit=10000&netns=" + inode(ns))
	var answer struct{ Connections []report.Record }
	if code == http.StatusOK {
		if err := json.Unmarshal(body, &answer); err != nil {
			s.t.Errorf("the connections: %v: %s", err, body)
		}
	}
	return answer.Connections, code == http.StatusOK
}

// left waits for the daemon to have none of the kinds' connections any more, and
// returns how many it still has. Of those whose namespace went before it looked the
// timer is the end.
func (s *soak) left() (n int) {
	_ = awaitFor(soakTimerMost+soon, "", func() bool {
		n = 0
		for i := range len(soakKinds) + 1 {
			n += len(s.connections(fmt.Sprintf("port=%d&peer=%s", soakPort+i, soakAddresses)))
		}
		return n == 0
	})
	return n
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
	tell(s.t, "at most %.0f connections in the table, %.0f overdue", table, most(s.scrapes, "fintrace_overdue_connections"))
	tell(s.t, "resident %.1f MB from 20 to 40 %% of the time, %.1f MB at the end; heap in use %.1f MB and %.1f MB; bound %.1f MB",
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
		tell(s.t, "%s: %v to %v from 20 to 40 %% of the time, %v to %v at the end", name, least(early), most(early, name), least(end), most(end, name))
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
	tell(s.t, "a scrape took %s, and is %d bytes at most; the alerts and the page %s", quantiles(took), size, quantiles(s.pages))
	if s.busy > 0 {
		tell(s.t, "%d answers were that there was no time", s.busy)
	}
	if strict && s.busy > 0 {
		s.t.Errorf("the loop was held up %d times", s.busy)
	}
	tell(s.t, "a family had %d alerts at most; %.0f fired at a time at most", s.alerts, most(s.scrapes, "fintrace_alerts_firing"))
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
	tell(s.t, "idle: %.0f µs of processor time and %.1f wake-ups a second", float64(cpu.Microseconds())/during.Seconds(), float64(wakes)/during.Seconds())
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
	if !s.shaken.during(probe.Now().Add(-time.Since(due)-time.Second-track.Grace), probe.Now()) {
		late.add(fired.Read.Sub(due), fired.Time.Sub(due))
	}
	release()
	_, err = s.next("the resolution", due, spoken(inode(ns), alert.Resolved))
	return err
}

// next waits for a line that fits, read after a time.
func (s *soak) next(what string, after time.Time, fits func(*logLine) bool) (line logLine, err error) {
	err = awaitFor(soon, what, func() (ok bool) {
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
