// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// soakFault is something that happens to the programs or to the host.
type soakFault struct {
	name        string
	least, most time.Duration // how long it lasts
	// do begins it and returns how it ends; n is random.
	do func(f *soakFaults, n int) (end func(), err error)
}

// soakEvery is how long after the other faults begin, on average.
const soakEvery = 5 * time.Second

var soakFaultTable = []soakFault{
	{"connections at the full rate of the machine", 10 * time.Second, 20 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		used, made := f.soak.processorTime(), f.flood.made.Load()
		f.flood.on.Store(true)
		began, end := time.Now(), f.trace.witness.floods.begin("the flood")
		return func() {
			f.flood.on.Store(false)
			end()
			f.mu.Lock()
			defer f.mu.Unlock()
			f.used += f.soak.processorTime() - used
			f.made += f.flood.made.Load() - made
			f.took += time.Since(began)
		}, nil
	}},
	{"the daemon stopped", time.Second, 5 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		f.soak.frozen.Lock()
		goesOn, err := f.freeze("the daemon", f.soak.Process)
		return func() {
			goesOn()
			f.soak.frozen.Unlock()
		}, err
	}},
	{"the trace stopped", time.Second, 5 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		return f.freeze("the trace", f.trace.Process)
	}},
	{"the trace's lines not read", time.Second, 5 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		end := f.shaken.begin("the trace's lines")
		f.trace.reads.Lock()
		return func() {
			f.trace.reads.Unlock()
			end()
		}, nil
	}},
	{"the daemon's log not read", time.Second, 5 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		end := f.shaken.begin("the log")
		f.soak.mu.Lock() // which its reader needs
		return func() {
			f.soak.mu.Unlock()
			end()
		}, nil
	}},
	{"another program at the tracepoint", 100 * time.Millisecond, 3 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		return attachAnother()
	}},
	{"another trace", time.Second, 3 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		other := exec.Command("fintrace", "trace", "--port", "1")
		if err := startAlone(other); err != nil {
			return nil, err
		}
		return func() {
			if err := other.Process.Signal(os.Interrupt); err != nil {
				f.t.Error(err)
			}
			if err := other.Wait(); err != nil {
				f.t.Error("another trace:", err)
			}
		}, nil
	}},
	{"a network namespace deleted and made anew", 0, 0, func(f *soakFaults, n int) (func(), error) {
		select {
		case f.spaces[n%len(f.spaces)].cut <- struct{}{}:
		case <-f.stop:
		}
		return func() {}, nil
	}},
	{"another tcp_fin_timeout", 0, 0, func(f *soakFaults, n int) (func(), error) {
		s := f.spaces[n%len(f.spaces)]
		// None of them gives an orphan and its minisock the 4 s that a kind has by TCP_LINGER2.
		seconds := []int{5, 6, 8, 61, 63, 64}[n/len(f.spaces)%6]
		select {
		case s.do <- func() { s.setFinTimeout(s.namespace(), seconds) }:
		case <-f.stop:
		}
		return func() {}, nil
	}},
	{"another configuration", 0, 0, func(f *soakFaults, n int) (func(), error) {
		f.soak.frozen.RLock()
		defer f.soak.frozen.RUnlock()
		f.soak.write(f.config(n))
		return func() {}, f.soak.Process.Signal(unix.SIGHUP)
	}},
	{"a configuration that is wrong", 0, 0, func(f *soakFaults, n int) (func(), error) {
		f.soak.frozen.RLock()
		defer f.soak.frozen.RUnlock()
		f.soak.write(f.config(n) + "\nlimit: {}\n")
		return func() {}, f.soak.Process.Signal(unix.SIGHUP)
	}},
	{"the webhook hangs", time.Second, 10 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		return f.hook.be(hookHangs), nil
	}},
	{"the webhook fails", time.Second, 10 * time.Second, func(f *soakFaults, _ int) (func(), error) {
		return f.hook.be(hookFails), nil
	}},
}

// soakFaults is what faults are done to.
type soakFaults struct {
	t      *testing.T
	soak   *soak
	trace  *soakTrace
	flood  *soakFlood
	spaces []*soakSpace // those that may be changed
	hook   *soakHook
	shaken *soakShocks
	config func(n int) string
	stop   <-chan struct{}

	mu   sync.Mutex
	done map[string]int
	// Of the daemon during the floods.
	used time.Duration // of a processor
	made int64         // connections
	took time.Duration
}

// run has one fault begin after the other until it is to stop, and returns when
// the last has ended. The first is a flood, so that all series are there soon.
func (f *soakFaults) run(random *rand.Rand) {
	running := make([]atomic.Bool, len(soakFaultTable))
	var ending sync.WaitGroup
	defer ending.Wait()
	began := time.Now()
	for first := true; ; first = false {
		which, n := random.IntN(len(soakFaultTable)), random.IntN(1<<20)
		if first {
			which = 0
		}
		fault := &soakFaultTable[which]
		during := fault.least + time.Duration(random.Float64()*float64(fault.most-fault.least))
		pause := time.Duration(random.ExpFloat64() * float64(soakEvery))
		if running[which].CompareAndSwap(false, true) {
			tell(f.t, "after %s: %s, for %s (%d)", time.Since(began).Round(10*time.Millisecond), fault.name, during.Round(10*time.Millisecond), n)
			ending.Go(func() {
				defer running[which].Store(false)
				end, err := fault.do(f, n)
				if err != nil {
					f.t.Errorf("%s: %v", fault.name, err)
					return
				}
				select {
				case <-f.stop:
				case <-time.After(during):
				}
				end()
				f.mu.Lock()
				defer f.mu.Unlock()
				f.done[fault.name]++
			})
		}
		select {
		case <-f.stop:
			return
		case <-time.After(pause):
		}
	}
}

// freeze stops a process, as a debugger or a freezer does.
func (f *soakFaults) freeze(what string, p *os.Process) (goesOn func(), err error) {
	end := f.shaken.begin(what)
	err = p.Signal(unix.SIGSTOP)
	return func() {
		if err := p.Signal(unix.SIGCONT); err != nil {
			f.t.Error(err)
		}
		end()
	}, err
}

// attachAnother attaches a program that does nothing.
func attachAnother() (detach func(), err error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "inet_sock_set_state", License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return nil, err
	}
	attached, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		prog.Close()
		return nil, err
	}
	return func() {
		attached.Close()
		prog.Close()
	}, nil
}

// soakHook is a webhook that can be made to fail, and knows the last word on each
// alert.
type soakHook struct {
	receiver *receiver
	at       string
	mood     atomic.Int32
	ended    chan struct{}
}

const (
	hookWorks int32 = iota
	hookHangs
	hookFails
)

func newSoakHook(t *testing.T) *soakHook {
	h := &soakHook{receiver: newReceiver(t), ended: make(chan struct{})}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch h.mood.Load() {
		case hookHangs:
			select {
			case <-r.Context().Done():
			case <-h.ended:
			}
		case hookFails:
			http.Error(w, "no", http.StatusInternalServerError)
		default:
			h.receiver.Config.Handler.ServeHTTP(w, r)
		}
	}))
	h.at = s.URL
	t.Cleanup(func() {
		close(h.ended)
		s.Close()
	})
	return h
}

func (h *soakHook) be(mood int32) (end func()) {
	h.mood.Store(mood)
	return func() { h.mood.CompareAndSwap(mood, hookWorks) }
}

// last checks that what was said last of each alert in a namespace is that it
// has resolved.
func (h *soakHook) last(t *testing.T, ns *kerneltest.Namespace) {
	t.Helper()
	unresolved := func() (n int) {
		last := map[string]alert.Event{}
		for _, a := range h.receiver.about(ns) {
			last[a.ID] = a.Event
		}
		for _, event := range last {
			if event != alert.Resolved {
				n++
			}
		}
		return n
	}
	if err := awaitFor(soon, "the webhook's alerts to resolve", func() bool { return unresolved() == 0 }); err != nil {
		t.Errorf("%v: %d have not", err, unresolved())
	}
}

// soakConfig is the n-th configuration of the daemon: what is in it of the
// namespaces that are marked or flooded is always the same.
func soakConfig(quick []string, hook string, n int) string {
	kinds := ""
	if n%2 == 0 {
		kinds = fmt.Sprintf("  - {name: kinds, match: {local_port: %d}, fin_timeout: %ds}\n", soakPort+n%7, 1+n%5)
	}
	return fmt.Sprintf(`
limits:
  - {name: held, match: {netns: [%[1]s]}, fin_timeout: 1s}
  - {name: closed, match: {netns: [%[1]s], stage: minisock}, fin_timeout: 1s}
%[2]salerts: {min_connections: %[3]d, peers_per_group: %[4]d, resolve_after: %[5]ds, update_every: 1s}
sinks: {webhooks: [{name: hook, url: %[6]q, timeout: 2s, headers: {X-Round: "%[7]d"}}]}
`, strings.Join(quick, ", "), kinds, soakThreshold, soakPeers, 1+n%2, hook, n)
}
