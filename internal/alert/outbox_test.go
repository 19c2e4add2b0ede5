// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lines is a log that is written to and read at once.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// logger logs into lines, without times.
func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

// receiver is a sink that remembers what it was told.
type receiver struct {
	mu    sync.Mutex
	heard []string    // "id event count"
	at    []time.Time // of each attempt
	// answer is what an attempt is answered with; nil: nothing is wrong.
	answer func(ctx context.Context, attempt int, alerts []Alert) error
}

func (r *receiver) sink(name string) Sink {
	return Sink{Name: name, Settings: r, Deliver: func(ctx context.Context, alerts []Alert) error {
		r.mu.Lock()
		r.at = append(r.at, time.Now())
		answer, attempt := r.answer, len(r.at)
		r.mu.Unlock()
		if answer != nil {
			if err := answer(ctx, attempt, alerts); err != nil {
				return err
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, a := range alerts {
			r.heard = append(r.heard, fmt.Sprint(a.ID, " ", a.Event, " ", a.Count))
		}
		return nil
	}}
}

func (r *receiver) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.heard)
}

func (r *receiver) attempts() []time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.at)
}

func (r *receiver) expect(t *testing.T, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, r.got()); diff != "" {
		t.Errorf("the sink was told (-want +got):\n%s", diff)
	}
}

// hang is an answer that never comes.
func hang(ctx context.Context, _ int, _ []Alert) error {
	<-ctx.Done()
	return ctx.Err()
}

func refuse(context.Context, int, []Alert) error { return errors.New("refused") }

func event(id string, e Event, count int) Alert {
	a := Alert{ID: id, Event: e, Count: count, StartsAt: time.Now()}
	if e == Resolved {
		ends := time.Now()
		a.EndsAt = &ends
	}
	return a
}

// running is an Outbox that runs until the end of the test.
type running struct {
	*Outbox
	log    lines
	cancel context.CancelFunc
	ended  chan error
}

func runOutbox(t *testing.T, sinks ...Sink) *running {
	t.Helper()
	r := &running{ended: make(chan error, 1)}
	o, err := NewOutbox(sinks, r.log.logger())
	if err != nil {
		t.Fatal(err)
	}
	r.Outbox = o
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.ended <- o.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-r.ended; err != nil {
			t.Error("Run:", err)
		}
	})
	return r
}

func (r *running) stats(t *testing.T, name string) SinkStats {
	t.Helper()
	for _, s := range r.Stats() {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("there is no sink %s", name)
	return SinkStats{}
}

func closeTo(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

func TestOneSinkDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var good receiver
		hanging, refusing := receiver{answer: hang}, receiver{answer: refuse}
		// This one does not heed its context: the kernel holds up a write.
		held := make(chan struct{})
		stuck := receiver{answer: func(context.Context, int, []Alert) error { <-held; return nil }}
		o := runOutbox(t, hanging.sink("hanging"), stuck.sink("stuck"), refusing.sink("refusing"), good.sink("good"))
		began := time.Now()
		for i := range 3 {
			o.Send(event("a", Fired, i))
			synctest.Wait()
		}
		if now := time.Now(); now != began {
			t.Errorf("it took %s", now.Sub(began))
		}
		good.expect(t, "a fired 0", "a fired 1", "a fired 2")
		time.Sleep(time.Hour)
		synctest.Wait()
		want := []SinkStats{
			{Name: "hanging", Queued: 1, Capacity: capacity},
			{Name: "stuck", Queued: 1, Capacity: capacity, Failed: 1},
			{Name: "refusing", Queued: 1, Capacity: capacity},
			{Name: "good", Capacity: capacity, Delivered: 3, Healthy: true},
		}
		got := o.Stats()
		for _, i := range []int{0, 2} {
			// At most a minute and the attempt's ten seconds apart.
			if got[i].Failed < 3600/70 || got[i].Failed > 3600/30 {
				t.Errorf("%s: %d attempts in an hour", got[i].Name, got[i].Failed)
			}
			want[i].Failed = got[i].Failed
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("stats (-want +got):\n%s", diff)
		}
		if n := len(stuck.attempts()); n != 1 {
			t.Errorf("%d attempts at a sink that does not return", n)
		}
		close(held)
		synctest.Wait()
		// What was taken is told, and then what came meanwhile.
		stuck.expect(t, "a fired 0", "a fired 2")
		if s := o.stats(t, "stuck"); s.Queued != 0 || !s.Healthy {
			t.Errorf("a sink that went on: %+v", s)
		}
	})
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const failures = 12
		r := receiver{answer: func(_ context.Context, attempt int, _ []Alert) error {
			if attempt <= failures {
				return errors.New("refused")
			}
			return nil
		}}
		o := runOutbox(t, r.sink("hook"))
		o.Send(event("a", Fired, 1))
		time.Sleep(time.Hour)
		r.expect(t, "a fired 1")
		at := r.attempts()
		if len(at) != failures+1 {
			t.Fatalf("%d attempts", len(at))
		}
		for i := range failures {
			wait := at[i+1].Sub(at[i])
			// 1 s to 2 s, doubled each time up to 30 s to 60 s.
			least, most := min(time.Second<<i, 30*time.Second), min(2*time.Second<<i, time.Minute)
			if wait < least || wait > most {
				t.Errorf("after failure %d it waited %s, not %s to %s", i+1, wait, least, most)
			}
		}
		// Once when it begins, once when it ends.
		log := o.log.String()
		if strings.Count(log, "\n") != 2 || !strings.Contains(log, `level=WARN msg="alerts cannot be delivered" sink=hook error=refused`) ||
			!strings.Contains(log, `level=INFO msg="alerts are delivered again" sink=hook`) || !strings.Contains(log, "failed_attempts=12") {
			t.Errorf("the log:\n%s", log)
		}
		// The wait begins anew after a success.
		r.mu.Lock()
		r.at = nil
		r.answer = func(_ context.Context, attempt int, _ []Alert) error {
			if attempt == 1 {
				return errors.New("refused")
			}
			return nil
		}
		r.mu.Unlock()
		o.Send(event("b", Fired, 1))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		r.expect(t, "a fired 1", "b fired 1")
	})
}

func TestRetryWaits(t *testing.T) {
	for _, test := range []struct {
		name        string
		after       time.Duration
		least, most time.Duration
	}{
		{"as long as it is asked to", 40 * time.Second, 40 * time.Second, 40 * time.Second},
		{"but at most five minutes", 24 * time.Hour, maxRetryAfter, maxRetryAfter},
		{"and never less than the backoff", 0, time.Second, 2 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := receiver{answer: func(_ context.Context, attempt int, _ []Alert) error {
					if attempt == 1 {
						return &retryLater{test.after, errors.New("busy")}
					}
					return nil
				}}
				o := runOutbox(t, r.sink("hook"))
				o.Send(event("a", Fired, 1))
				time.Sleep(time.Hour)
				at := r.attempts()
				if len(at) != 2 {
					t.Fatalf("%d attempts", len(at))
				}
				if wait := at[1].Sub(at[0]); wait < test.least || wait > test.most {
					t.Errorf("it waited %s", wait)
				}
			})
		})
	}
}

func TestCoalesced(t *testing.T) {
	type step struct {
		e     Event
		count int
	}
	for _, test := range []struct {
		name   string
		told   []step // before the sink fails
		during []step // while an attempt that fails is under way, and afterwards
		want   string
	}{
		{"fired, never told", nil, []step{{Fired, 1}, {Updated, 2}, {Repeated, 3}}, "a fired 3"},
		{"resolved before it was told", nil, []step{{Fired, 1}, {Updated, 2}, {Resolved, 0}}, "a resolved 0"},
		{"fired anew before it was told", nil, []step{{Fired, 1}, {Resolved, 0}, {Fired, 2}}, "a fired 2"},
		{"updated", []step{{Fired, 1}}, []step{{Updated, 2}, {Repeated, 3}}, "a updated 3"},
		{"repeated", []step{{Fired, 1}}, []step{{Repeated, 2}, {Repeated, 3}}, "a repeated 3"},
		{"resolved after a hundred updates", []step{{Fired, 1}},
			append(slices.Repeat([]step{{Updated, 2}}, 100), step{Resolved, 0}), "a resolved 0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r receiver
				o := runOutbox(t, r.sink("hook"))
				for _, s := range test.told {
					o.Send(event("a", s.e, s.count))
				}
				synctest.Wait()
				r.mu.Lock()
				r.heard, r.answer = nil, refuse
				r.mu.Unlock()
				for _, s := range test.during {
					o.Send(event("a", s.e, s.count))
					synctest.Wait()
				}
				if s := o.stats(t, "hook"); s.Queued != 1 || s.Shed != 0 {
					t.Errorf("%+v", s)
				}
				r.mu.Lock()
				r.answer = nil
				r.mu.Unlock()
				time.Sleep(time.Minute)
				r.expect(t, test.want)
			})
		})
	}
}

// What comes while an attempt is under way is told after it, as what it is then.
func TestCoalescedUnderWay(t *testing.T) {
	for _, succeeds := range []bool{true, false} {
		t.Run(fmt.Sprint("succeeds ", succeeds), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := receiver{answer: func(_ context.Context, attempt int, _ []Alert) error {
					time.Sleep(5 * time.Second)
					if attempt == 1 && !succeeds {
						return errors.New("refused")
					}
					return nil
				}}
				o := runOutbox(t, r.sink("hook"))
				o.Send(event("a", Fired, 1))
				time.Sleep(time.Second)
				o.Send(event("a", Repeated, 2))
				o.Send(event("a", Updated, 3))
				o.Send(event("a", Repeated, 4))
				time.Sleep(time.Minute)
				if succeeds {
					r.expect(t, "a fired 1", "a updated 4")
				} else {
					r.expect(t, "a fired 4")
				}
			})
		})
	}
}

// A hundred thousand alerts while the sink is dead: bounded, counted, and
// another sink has them all at once.
func TestOutboxStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, ids = 100_000, 5000
		dead := receiver{answer: hang}
		var heard int
		last := map[string]int{}
		alive := Sink{Name: "alive", Deliver: func(_ context.Context, alerts []Alert) error {
			for _, a := range alerts {
				heard++
				last[a.ID] = a.Count
			}
			return nil
		}}
		o := runOutbox(t, dead.sink("dead"), alive)
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before, began := heap(), time.Now()
		for i := range total {
			a := event(fmt.Sprint(i%ids), Updated, i)
			a.Summary = strings.Repeat("x", 1000)
			o.Send(a)
			// The other sink keeps up with what comes in the meantime.
			if i%500 == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if grown := int64(heap()) - int64(before); grown > capacity*4000 {
			t.Errorf("the heap has grown by %d bytes", grown)
		}
		if heard != total || len(last) != ids || last["4999"] != total-1 {
			t.Errorf("the other sink was told of %d alerts and %d groups, the last %d", heard, len(last), last["4999"])
		}
		if now := time.Now(); now != began {
			t.Errorf("it took %s", now.Sub(began))
		}
		s := o.stats(t, "dead")
		if s.Queued != capacity {
			t.Errorf("%d wait, not %d", s.Queued, capacity)
		}
		// Every ID comes again before it could be coalesced, but for the first
		// that are under way.
		if want := uint64(total - capacity); s.Shed > want || s.Shed < want-total/ids {
			t.Errorf("%d were given up, not %d", s.Shed, want)
		}
		if s.Delivered != 0 || s.Healthy && s.Failed > 0 {
			t.Errorf("%+v", s)
		}
		time.Sleep(30 * time.Second)
		if log := o.log.String(); strings.Count(log, "\n") != 2 || !strings.Contains(log, `"alerts are given up: the queue is full" sink=dead`) {
			t.Errorf("the log:\n%s", log)
		}
	})
}

// The oldest are given up, and the newest told.
func TestShedOldest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := receiver{answer: refuse}
		s := r.sink("hook")
		s.MaxAlerts = 1
		o := runOutbox(t, s)
		for i := range capacity + 2 {
			o.Send(event(fmt.Sprint(i), Fired, i))
			synctest.Wait() // what is under way is not given up
		}
		time.Sleep(20 * time.Second)
		r.mu.Lock()
		r.answer = nil
		r.mu.Unlock()
		time.Sleep(time.Hour)
		heard := r.got()
		if len(heard) != capacity || heard[0] != "2 fired 2" || heard[len(heard)-1] != "1001 fired 1001" {
			t.Errorf("%d were told, from %q to %q", len(heard), heard[0], heard[len(heard)-1])
		}
		if got := o.stats(t, "hook"); got.Shed != 2 || got.Delivered != capacity {
			t.Errorf("%+v", got)
		}
		if log := o.log.String(); !strings.Contains(log, `"alerts were given up: there were too many for the queue" sink=hook alerts=2`) {
			t.Errorf("the log:\n%s", log)
		}
	})
}

// One alert that is not taken does not take others with it.
func TestPermanent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := receiver{answer: func(_ context.Context, _ int, alerts []Alert) error {
			if slices.ContainsFunc(alerts, func(a Alert) bool { return a.ID == "13" }) {
				return backoff.Permanent(errors.New("no thirteen"))
			}
			return nil
		}}
		o := runOutbox(t)
		var all []Alert
		var want []string
		for i := range 40 {
			a := event(fmt.Sprint(i), Fired, i)
			if all = append(all, a); i != 13 {
				want = append(want, fmt.Sprint(a.ID, " fired ", i))
			}
		}
		if err := o.Replace([]Sink{r.sink("hook")}, nil); err != nil {
			t.Fatal(err)
		}
		o.Send(all...)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		r.expect(t, want...)
		if s := o.stats(t, "hook"); s.Shed != 1 || s.Queued != 0 || s.Delivered != 39 || !s.Healthy {
			t.Errorf("%+v", s)
		}
	})
}

func TestClose(t *testing.T) {
	slow := func(_ context.Context, attempt int, _ []Alert) error {
		if attempt == 1 {
			return errors.New("refused")
		}
		time.Sleep(time.Second)
		return nil
	}
	for _, test := range []struct {
		name   string
		answer func(context.Context, int, []Alert) error
		cancel bool // Run, before Close
		want   string
		took   time.Duration // at most
		heard  int
	}{
		{name: "what waits is delivered", answer: slow, took: 4 * time.Second, heard: 2},
		{name: "after the end of Run as well", answer: slow, cancel: true, took: 4 * time.Second, heard: 2},
		{name: "what hangs is given up", answer: hang, want: "2 alerts were not delivered: hook 2", took: 5 * time.Second},
		{name: "what hangs is given up after the end of Run", answer: hang, cancel: true,
			want: "2 alerts were not delivered: hook 2", took: 5 * time.Second},
		{name: "what does not return either", want: "2 alerts were not delivered: hook 2", took: 5*time.Second + mercy,
			answer: func(context.Context, int, []Alert) error { time.Sleep(time.Hour); return nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := receiver{answer: test.answer}
				o := runOutbox(t, r.sink("hook"))
				o.Send(event("a", Fired, 1), event("b", Fired, 1))
				synctest.Wait()
				if test.cancel {
					o.cancel()
					synctest.Wait()
				}
				began := time.Now()
				ctx, cancel := closeTo(5 * time.Second)
				defer cancel()
				err := o.Close(ctx)
				if got := fmt.Sprint(err); got != test.want && (test.want != "" || err != nil) {
					t.Errorf("Close: %s", got)
				}
				if took := time.Since(began); took > test.took {
					t.Errorf("it took %s", took)
				}
				if n := len(r.got()); n != test.heard {
					t.Errorf("%d were delivered", n)
				}
				s := o.stats(t, "hook")
				if s.Queued != 0 || s.Shed != uint64(2-test.heard) {
					t.Errorf("%+v", s)
				}
				// Run has ended too; what comes now is given up, and counted.
				o.ended <- <-o.ended
				o.Send(event("c", Fired, 1))
				if now := o.stats(t, "hook"); now.Queued != 0 || now.Shed != s.Shed+1 {
					t.Errorf("after Close: %+v", now)
				}
				if err := o.Close(ctx); err != nil {
					t.Error("closed again:", err)
				}
				if err := o.Replace(nil, nil); err == nil {
					t.Error("the sinks of a closed outbox were replaced")
				}
				time.Sleep(2 * time.Hour) // for the goroutine that does not return
			})
		})
	}
}

// An attempt that the end of Run breaks off is no failure.
func TestEndOfRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := receiver{answer: hang}
		o := runOutbox(t, r.sink("hook"))
		o.Send(event("a", Fired, 1))
		synctest.Wait()
		o.cancel()
		o.ended <- <-o.ended
		if s := o.stats(t, "hook"); s.Queued != 1 || s.Failed != 0 || !s.Healthy || o.log.String() != "" {
			t.Errorf("%+v\n%s", s, o.log.String())
		}
	})
}

// What hangs and then fails has failed once.
func TestHungThenFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := receiver{answer: func(_ context.Context, attempt int, _ []Alert) error {
			if attempt > 1 {
				return nil
			}
			time.Sleep(time.Minute)
			return errors.New("refused")
		}}
		o := runOutbox(t, r.sink("hook"))
		o.Send(event("a", Fired, 1))
		time.Sleep(2 * time.Minute)
		r.expect(t, "a fired 1")
		if s := o.stats(t, "hook"); s.Failed != 1 || !s.Healthy {
			t.Errorf("%+v", s)
		}
	})
}

// A sink in the middle of its wait is tried once more at once.
func TestCloseDoesNotWaitForRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := receiver{answer: refuse}
		o := runOutbox(t, r.sink("hook"))
		o.Send(event("a", Fired, 1))
		time.Sleep(10 * time.Minute)
		r.mu.Lock()
		r.answer = nil
		r.mu.Unlock()
		began := time.Now()
		ctx, cancel := closeTo(time.Second)
		defer cancel()
		if err := o.Close(ctx); err != nil || time.Now() != began {
			t.Errorf("Close: %v, after %s", err, time.Since(began))
		}
		r.expect(t, "a fired 1")
	})
}

func TestReplace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var kept, added, mended receiver
		broken, gone, dead := receiver{answer: refuse}, receiver{}, receiver{answer: hang}
		goneAnswer := make(chan struct{})
		gone.answer = func(context.Context, int, []Alert) error { <-goneAnswer; return nil }
		o := runOutbox(t, kept.sink("kept"), broken.sink("changed"), gone.sink("gone"), dead.sink("dead"))
		firing := event("a", Fired, 1)
		o.Send(firing, event("b", Resolved, 0))
		time.Sleep(10 * time.Minute)
		began := time.Now()
		firing.Event, firing.Count = Updated, 2
		over := event("over", Resolved, 0)
		if err := o.Replace([]Sink{added.sink("added"), mended.sink("changed"), kept.sink("kept")}, []Alert{firing, over}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if time.Now() != began {
			t.Errorf("Replace took %s", time.Since(began))
		}
		kept.expect(t, "a fired 1", "b resolved 0") // and nothing again
		added.expect(t, "a repeated 2")
		mended.expect(t, "a fired 2", "b resolved 0") // what waited for its name
		var names []string
		for _, s := range o.Stats() {
			names = append(names, s.Name)
		}
		if diff := cmp.Diff([]string{"added", "changed", "kept"}, names); diff != "" {
			t.Errorf("sinks (-want +got):\n%s", diff)
		}
		// What is gone still gets what waits, for a while.
		time.Sleep(5 * time.Second)
		close(goneAnswer)
		synctest.Wait()
		gone.expect(t, "a fired 1", "b resolved 0")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if log := o.log.String(); !strings.Contains(log, `"alerts were not delivered before the end" sink=dead alerts=2`) ||
			strings.Contains(log, "sink=gone alerts=") {
			t.Errorf("the log:\n%s", log)
		}
		n := len(dead.attempts())
		o.Send(event("c", Fired, 1))
		time.Sleep(time.Hour)
		if len(gone.got()) != 2 || len(dead.attempts()) != n {
			t.Error("a sink that is gone was told of more")
		}
	})
}

// An attempt that hangs does not hold up the sink that takes its place.
func TestReplaceUnderWay(t *testing.T) {
	for name, answer := range map[string]func(context.Context, int, []Alert) error{
		"hangs":           hang,
		"does not return": func(context.Context, int, []Alert) error { time.Sleep(time.Hour); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old, now := receiver{answer: answer}, receiver{}
				o := runOutbox(t, old.sink("hook"))
				o.Send(event("a", Fired, 1))
				synctest.Wait()
				if err := o.Replace([]Sink{now.sink("hook")}, []Alert{event("a", Updated, 2)}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(mercy)
				synctest.Wait()
				now.expect(t, "a fired 2")
				if s := o.stats(t, "hook"); s.Shed != 0 || !s.Healthy {
					t.Errorf("%+v", s)
				}
				time.Sleep(2 * time.Hour) // for the goroutine that does not return
			})
		})
	}
}

func TestSameSettings(t *testing.T) {
	a, b := &receiver{}, &receiver{}
	if !sameSettings(a, a) || sameSettings(a, b) || !sameSettings(nil, nil) || sameSettings(a, nil) {
		t.Error("a pointer is equal to itself alone")
	}
	if !sameSettings([]int{1}, []int{1}) || sameSettings([]int{1}, []int{2}) {
		t.Error("values are equal to what is deeply equal to them")
	}
}

func TestReplaceRefused(t *testing.T) {
	var r receiver
	for _, test := range []struct {
		sinks []Sink
		want  string
	}{
		{[]Sink{r.sink("a"), r.sink("b"), r.sink("a")}, `alert: two sinks are called "a"`},
		{[]Sink{r.sink("")}, "alert: a sink has no name"},
	} {
		if _, err := NewOutbox(test.sinks, slog.New(slog.NewTextHandler(io.Discard, nil))); fmt.Sprint(err) != test.want {
			t.Errorf("%v", err)
		}
	}
}

// A sink that wants to hear again hears again: of what fires without end, of
// what has resolved for a while.
func TestResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r receiver
		s := r.sink("am")
		s.Resend, s.ResolvedFor = time.Minute, 3*time.Minute
		o := runOutbox(t, s)
		o.Send(event("a", Fired, 1), event("b", Fired, 1))
		time.Sleep(30 * time.Second)
		o.Send(event("b", Updated, 2)) // from now on half a minute after a
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		r.expect(t, "a fired 1", "b fired 1", "b updated 2", "a repeated 1", "b repeated 2", "a repeated 1", "b repeated 2")
		r.mu.Lock()
		r.heard = nil
		r.mu.Unlock()
		o.Send(event("b", Resolved, 0))
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		r.expect(t, "b resolved 0", "a repeated 1", "b resolved 0", "a repeated 1", "b resolved 0", "a repeated 1", "a repeated 1")
		if got := o.stats(t, "am"); got.Queued != 0 {
			t.Errorf("%+v", got)
		}

		// While it is down, the state goes on.
		r.mu.Lock()
		r.heard, r.answer = nil, refuse
		r.mu.Unlock()
		time.Sleep(time.Hour)
		o.Send(event("a", Resolved, 0))
		time.Sleep(time.Hour)
		r.mu.Lock()
		r.answer = nil
		r.mu.Unlock()
		time.Sleep(time.Hour)
		r.expect(t, "a resolved 0")

		// Nothing is told again at the end.
		o.Send(event("c", Fired, 1))
		synctest.Wait()
		r.mu.Lock()
		r.heard, r.answer = nil, refuse
		r.mu.Unlock()
		time.Sleep(time.Hour)
		o.Send(event("d", Fired, 1))
		r.mu.Lock()
		r.answer = nil
		r.mu.Unlock()
		began := time.Now()
		ctx, cancel := closeTo(time.Minute)
		defer cancel()
		if err := o.Close(ctx); err != nil || time.Now() != began {
			t.Errorf("Close: %v, after %s", err, time.Since(began))
		}
		r.expect(t, "d fired 1")
	})
}

// slow is a log that does not take a line before it may.
type slow chan struct{}

func (s slow) Write(p []byte) (int, error) {
	<-s
	return len(p), nil
}

// Neither a sink nor the log can make Send wait.
func TestSendDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := make(slow)
		refusing := receiver{answer: refuse}
		o, err := NewOutbox([]Sink{refusing.sink("refusing")}, slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- o.Run(ctx) }()
		o.Send(event("a", Fired, 1))
		synctest.Wait() // the worker is writing to the log
		sent := make(chan struct{})
		go func() {
			o.Send(event("b", Fired, 1))
			o.Stats()
			close(sent)
		}()
		synctest.Wait()
		select {
		case <-sent:
		default:
			t.Error("it waits")
		}
		close(log)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// Run and Send at once from many goroutines, for the race detector.
func TestSendAtOnce(t *testing.T) {
	var r, others receiver
	o := runOutbox(t, r.sink("hook"))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 100 {
				o.Send(event(fmt.Sprint(i), Updated, n))
				o.Stats()
			}
			if err := o.Replace([]Sink{r.sink("hook"), others.sink(fmt.Sprint(i))}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	ctx, cancel := closeTo(10 * time.Second)
	defer cancel()
	if err := o.Close(ctx); err != nil {
		t.Error(err)
	}
	last := map[string]string{}
	for _, line := range r.got() {
		id, _, _ := strings.Cut(line, " ")
		last[id] = line
	}
	for i := range 8 {
		if want := fmt.Sprint(i, " updated 99"); last[fmt.Sprint(i)] != want {
			t.Errorf("told last: %q, not %q", last[fmt.Sprint(i)], want)
		}
	}
}
