// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/fintrace/fintrace/internal/report"
)

const (
	// defaultTimeout bounds one attempt: a receiver that answers at all answers sooner.
	defaultTimeout = 10 * time.Second
	// defaultBatch bounds the alerts of one attempt: some hundred KiB.
	defaultBatch = 100
	// maxRetryAfter bounds what a receiver may ask for: an alert that comes
	// later is no alert.
	maxRetryAfter = 5 * time.Minute
	// mercy is how long after its deadline a delivery has to return.
	mercy = time.Second
	// leaveWithin bounds the delivery of what waits for a sink that is no
	// longer wanted.
	leaveWithin = 10 * time.Second
)

// Sink is where alerts go.
type Sink struct {
	Name string // what logs and metrics call it; there is one of each name

	// Settings tell two sinks of one name apart: a pointer is equal to itself
	// alone, anything else to what is deeply equal to it.
	Settings any

	// Deliver hands over alerts, each of another ID, until ctx ends; it must not
	// change them. What fails is tried again, unless the error is a
	// *backoff.PermanentError: then no retry mends it. The error's text is
	// logged, and must hold no secret.
	Deliver func(ctx context.Context, alerts []Alert) error

	MaxAlerts int           // at most, of one delivery; 0: 100
	Timeout   time.Duration // of one delivery; 0: 10 s

	// Resend is how often it wants to hear of what fires, though nothing has
	// changed, 0: never; ResolvedFor is for how long of what has resolved.
	Resend, ResolvedFor time.Duration
}

// Outbox delivers alerts to sinks. Each sink has its own goroutine and queue, so
// that one that is slow or dead delays no other. A queue holds one state of each
// alert, the latest.
type Outbox struct {
	log    *slog.Logger
	closed chan struct{}
	wg     sync.WaitGroup // of what Run waits for

	mu      sync.Mutex
	ctx     context.Context // of Run, nil while it does not run
	workers []*worker
	leaving []*worker // of sinks that are no longer wanted
}

// NewOutbox returns an Outbox that says in the log when a sink begins to fail
// and when that ends. It delivers nothing before Run. The error says what is
// wrong with the sinks.
func NewOutbox(sinks []Sink, log *slog.Logger) (*Outbox, error) {
	o := &Outbox{log: log, closed: make(chan struct{})}
	return o, o.Replace(sinks, nil)
}

// Send queues alerts for each sink. It never waits for one. The alerts are not
// copied, and what they point to must not be changed afterwards.
func (o *Outbox) Send(alerts ...Alert) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, w := range o.workers {
		w.send(alerts)
	}
}

// Run delivers what is sent until ctx ends, or Close has ended; then it returns
// nil. What waits when ctx ends waits for Close.
func (o *Outbox) Run(ctx context.Context) error {
	o.mu.Lock()
	if o.ctx != nil {
		o.mu.Unlock()
		return errors.New("alert: the outbox runs already")
	}
	o.ctx = ctx
	for _, w := range o.workers {
		o.start(w)
	}
	o.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-o.closed:
	}
	o.mu.Lock()
	o.ctx = nil // nothing starts anymore
	o.mu.Unlock()
	o.wg.Wait()
	return nil
}

// start runs a worker if the outbox runs. o.mu is held.
func (o *Outbox) start(w *worker) {
	if ctx := o.ctx; ctx != nil {
		o.wg.Go(func() { w.run(ctx) })
	}
}

// Replace changes the sinks. One whose name and settings are the same as before
// goes on as if nothing had happened. A new one, or one with other settings, is
// sent what fires at the moment, as repeated; and what had been waiting for one
// of its name. What waits for a sink that is gone is still delivered within ten
// seconds, if the outbox runs. With an error nothing has changed.
func (o *Outbox) Replace(sinks []Sink, firing []Alert) error {
	if err := checkSinks(sinks); err != nil {
		return err
	}
	var again []Alert
	for _, a := range firing {
		if a.Firing() {
			a.Event = Repeated
			again = append(again, a)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if isClosed(o.closed) {
		return errors.New("alert: the outbox is closed")
	}
	before := o.workers
	o.workers = nil
	for _, sink := range sinks {
		i := slices.IndexFunc(before, func(w *worker) bool { return w.name == sink.Name })
		if i < 0 {
			w := newWorker(sink, o.log)
			w.send(again)
			o.start(w)
			o.workers = append(o.workers, w)
			continue
		}
		before[i].change(sink, again)
		o.workers = append(o.workers, before[i])
	}
	for _, w := range before {
		if !slices.Contains(o.workers, w) {
			o.leave(w)
		}
	}
	return nil
}

// leave ends a worker, after what waits is delivered or the time is up. o.mu is held.
func (o *Outbox) leave(w *worker) {
	w.finish()
	if o.ctx == nil {
		w.stop()
		w.giveUp()
		return
	}
	o.leaving = append(o.leaving, w)
	ctx, cancel := context.WithTimeout(o.ctx, leaveWithin)
	o.wg.Go(func() {
		defer cancel()
		defer context.AfterFunc(ctx, w.stop)()
		w.run(ctx) // after the run that is under way
		w.giveUp()
		o.mu.Lock()
		defer o.mu.Unlock()
		o.leaving = slices.DeleteFunc(o.leaving, func(other *worker) bool { return other == w })
	})
}

// Close delivers what waits until ctx ends, whether Run has ended or not, and
// gives up the rest. The error says how many alerts that were, and whose. Call
// it before the end of Run's context, so that nothing under way is broken off.
func (o *Outbox) Close(ctx context.Context) error {
	o.mu.Lock()
	if isClosed(o.closed) {
		o.mu.Unlock()
		return nil
	}
	close(o.closed)
	workers := slices.Concat(o.workers, o.leaving)
	o.mu.Unlock()

	lost := make([]int, len(workers))
	var wg sync.WaitGroup
	for i, w := range workers {
		w.finish()
		wg.Go(func() {
			defer context.AfterFunc(ctx, w.stop)()
			w.run(ctx) // after the run that is under way
			lost[i] = w.giveUp()
		})
	}
	wg.Wait()
	var whose []string
	total := 0
	for i, n := range lost {
		if total += n; n > 0 {
			whose = append(whose, fmt.Sprintf("%s %d", workers[i].name, n))
		}
	}
	if total > 0 {
		return fmt.Errorf("%d alerts were not delivered: %s", total, strings.Join(whose, ", "))
	}
	return nil
}

// Stats are those of each sink, in the order in which they were given.
func (o *Outbox) Stats() []SinkStats {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make([]SinkStats, len(o.workers))
	for i, w := range o.workers {
		all[i] = w.statistics()
	}
	return all
}

func checkSinks(sinks []Sink) error {
	names := map[string]bool{}
	for _, s := range sinks {
		switch {
		case s.Name == "":
			return errors.New("alert: a sink has no name")
		case names[s.Name]:
			return fmt.Errorf("alert: two sinks are called %q", s.Name)
		}
		names[s.Name] = true
	}
	return nil
}

// worker delivers to one sink.
type worker struct {
	name    string
	log     *slog.Logger
	turn    chan struct{}   // held by the goroutine in run
	wake    chan struct{}   // there is something new to look at
	stopped context.Context // ends all runs
	stop    context.CancelFunc

	mu       sync.Mutex
	sink     Sink
	replaced chan struct{} // closed when sink is another
	queue    queue
	stats    SinkStats
	closing  bool // ends when nothing waits
	closed   bool // what comes is given up

	retry     *backoff.ExponentialBackOff
	notBefore time.Time
	batch     int // of the next delivery

	failing time.Time // since when, zero: not
	failed  uint64    // attempts since then
	shed    uint64    // alerts for want of room, of which nothing was said yet
	full    bool      // that the queue is full has been said
}

func newWorker(sink Sink, log *slog.Logger) *worker {
	w := &worker{
		name: sink.Name,
		log:  log.With("sink", sink.Name),
		turn: make(chan struct{}, 1),
		wake: make(chan struct{}, 1),
		// Between 1 s and 1 min, so that the sinks of many hosts that failed at
		// once do not come back at once.
		retry: &backoff.ExponentialBackOff{
			InitialInterval:     1500 * time.Millisecond,
			RandomizationFactor: 1. / 3,
			Multiplier:          2,
			MaxInterval:         45 * time.Second,
		},
		queue: newQueue(sink.Resend, sink.ResolvedFor),
		stats: SinkStats{Name: sink.Name, Capacity: capacity, Healthy: true},
	}
	w.stopped, w.stop = context.WithCancel(context.Background())
	w.use(sink)
	return w
}

// use takes a sink. w.mu is held.
func (w *worker) use(sink Sink) {
	sink.Timeout = cmp.Or(sink.Timeout, defaultTimeout)
	// While so many are delivered, half of the queue is there for others.
	sink.MaxAlerts = min(cmp.Or(sink.MaxAlerts, defaultBatch), capacity/2)
	w.sink, w.batch, w.replaced = sink, sink.MaxAlerts, make(chan struct{})
	w.queue.settle(sink.Resend, sink.ResolvedFor)
	w.soon()
}

// soon ends the wait after failures. w.mu is held.
func (w *worker) soon() {
	w.retry.Reset()
	w.notBefore = time.Time{}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// change goes on with another sink, unless it is the same one.
func (w *worker) change(sink Sink, firing []Alert) {
	w.mu.Lock()
	same := sameSettings(w.sink.Settings, sink.Settings)
	if !same {
		close(w.replaced)
		w.use(sink)
	}
	w.mu.Unlock()
	if !same {
		w.send(firing)
	}
}

func sameSettings(a, b any) bool {
	if v := reflect.ValueOf(a); v.IsValid() && v.Kind() == reflect.Pointer {
		return a == b
	}
	return reflect.DeepEqual(a, b)
}

func (w *worker) send(alerts []Alert) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range alerts {
		n := 1
		if !w.closed {
			n = w.queue.put(a)
			w.shed += uint64(n)
		}
		w.stats.Shed += uint64(n)
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// finish lets the worker end as soon as nothing waits.
func (w *worker) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closing = true
	w.soon()
}

// giveUp ends the queue. It returns how many alerts had been waiting.
func (w *worker) giveUp() int {
	w.mu.Lock()
	n := w.queue.clear()
	w.closed = true
	w.stats.Shed += uint64(n)
	w.mu.Unlock()
	if n > 0 {
		w.log.Warn("alerts were not delivered before the end", "alerts", n)
	}
	return n
}

func (w *worker) statistics() SinkStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Queued = w.queue.waiting()
	return w.stats
}

// run delivers until ctx ends, or until nothing waits once the worker is to
// finish. It waits for another run to end first.
func (w *worker) run(ctx context.Context) {
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(w.stopped, cancel)()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		d, wait, ended := w.next(time.Now())
		switch {
		case ended:
			return
		case d != nil:
			w.settle(ctx, d, w.deliver(ctx, d))
			continue
		case wait >= 0:
			timer.Reset(wait)
		default:
			timer.Stop()
		}
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// delivery is what goes to a sink at once.
type delivery struct {
	sink     Sink
	replaced <-chan struct{}
	alerts   []Alert
	hung     bool // it did not return in time, and that has been counted
}

// next is what to deliver now, or else how long to wait; negative: until woken.
func (w *worker) next(now time.Time) (d *delivery, wait time.Duration, ended bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at, ok := w.queue.due(w.closing)
	switch {
	case !ok:
		return nil, -1, w.closing
	case at.Before(w.notBefore):
		at = w.notBefore
	}
	if at.After(now) {
		return nil, at.Sub(now), false
	}
	alerts := w.queue.take(w.batch, w.closing, now)
	if len(alerts) == 0 {
		// What was due had resolved too long ago, and is gone: look again.
		w.queue.done(false, now)
		return nil, 0, false
	}
	return &delivery{sink: w.sink, replaced: w.replaced, alerts: alerts}, 0, false
}

var (
	errReplaced = errors.New("the sink is another now")
	errHung     = errors.New("a delivery does not end")
)

// deliver makes one attempt. A sink that does not heed its context (a write
// that the kernel holds up) is waited for, for another attempt would only hang
// as well, but not longer than ctx lasts.
func (w *worker) deliver(ctx context.Context, d *delivery) error {
	attempt, cancel := context.WithTimeout(ctx, d.sink.Timeout)
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- d.sink.Deliver(attempt, d.alerts) }()
	select {
	case err := <-result:
		return err
	case <-d.replaced:
		cancel()
	case <-attempt.Done():
	}
	late := time.NewTimer(mercy)
	defer late.Stop()
	select {
	case err := <-result:
		return err
	case <-late.C:
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	d.hung = true
	w.fail(errHung)
	select {
	case err := <-result:
		return err
	case <-d.replaced:
		return errReplaced
	case <-ctx.Done():
		return ctx.Err()
	}
}

// settle ends a delivery.
func (w *worker) settle(ctx context.Context, d *delivery, err error) {
	now := time.Now()
	switch {
	case err == nil:
		w.succeed(d, now)
		return
	case ctx.Err() != nil, isClosed(d.replaced):
		// It was broken off, and that is no fault of the sink.
		w.mu.Lock()
		w.queue.done(false, now)
		w.mu.Unlock()
		return
	}
	if !d.hung {
		w.fail(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var permanent *backoff.PermanentError
	if !errors.As(err, &permanent) {
		w.queue.done(false, now)
	} else if n := len(d.alerts); n > 1 {
		// One of them, or their sum, is the reason: the others need not suffer,
		// nor wait.
		w.queue.done(false, now)
		w.batch = n / 2
		return
	} else {
		w.stats.Shed += uint64(w.queue.drop())
	}
	wait := w.retry.NextBackOff()
	if later := (*retryLater)(nil); errors.As(err, &later) {
		wait = max(wait, min(later.after, maxRetryAfter))
	}
	w.notBefore = now.Add(wait)
}

func (w *worker) succeed(d *delivery, now time.Time) {
	w.mu.Lock()
	w.queue.done(true, now)
	w.stats.Delivered += uint64(len(d.alerts))
	w.stats.Healthy = true
	w.batch = min(2*w.batch, w.sink.MaxAlerts)
	w.retry.Reset()
	w.notBefore = time.Time{}
	since, failed, shed := w.failing, w.failed, w.shed
	w.failing, w.failed = time.Time{}, 0
	if w.queue.waiting() == 0 {
		w.shed, w.full = 0, false
	} else {
		shed = 0
	}
	w.mu.Unlock()
	// Outside of the lock: the log may be slow, and Send must not wait for it.
	if !since.IsZero() {
		w.log.Info("alerts are delivered again", "after", report.Duration(now.Sub(since)), "failed_attempts", failed)
	}
	if shed > 0 {
		w.log.Warn("alerts were given up: there were too many for the queue", "alerts", shed)
	}
}

// fail counts a failed attempt, and says so if it is the first.
func (w *worker) fail(err error) {
	w.mu.Lock()
	w.stats.Failed++
	w.stats.Healthy = false
	w.failed++
	first := w.failing.IsZero()
	if first {
		w.failing = time.Now()
	}
	full := w.shed > 0 && !w.full
	w.full = w.full || full
	w.mu.Unlock()
	if first {
		w.log.Warn("alerts cannot be delivered", "error", err)
	}
	if full {
		w.log.Warn("alerts are given up: the queue is full", "capacity", capacity)
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// retryLater is an error of a receiver that says when to try again.
type retryLater struct {
	after time.Duration
	error
}
