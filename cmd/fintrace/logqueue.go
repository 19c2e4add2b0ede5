// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// logQueue writes the lines of a log from a goroutine of its own. What reads
// them may stop reading, and a write then waits for it: nothing else in the
// daemon is to wait too. What there is no room for, or cannot be written, is
// lost and counted.
type logQueue struct {
	to    slog.Handler
	lines chan func()
	lost  atomic.Uint64
	told  uint64 // of those, in the log
}

// logCapacity bounds the lines that wait: more than are written in a burst, and
// some hundred KiB.
const logCapacity = 1000

// newLogQueue starts the goroutine, which lives as long as the process: it may
// be in a write that never ends.
func newLogQueue(to slog.Handler) *logQueue {
	q := &logQueue{to: to, lines: make(chan func(), logCapacity)}
	go func() {
		for write := range q.lines {
			write()
		}
	}()
	return q
}

// flush waits until what is in the queue has been written.
func (q *logQueue) flush(within time.Duration) {
	late := time.NewTimer(within)
	defer late.Stop()
	written := make(chan struct{})
	select {
	case q.lines <- func() { close(written) }:
	case <-late.C:
		return
	}
	select {
	case <-written:
	case <-late.C:
	}
}

// handler returns one that never waits.
func (q *logQueue) handler() slog.Handler { return &queuedHandler{q.to, q} }

// queuedHandler hands a log's lines to a queue.
type queuedHandler struct {
	slog.Handler
	queue *logQueue
}

func (h *queuedHandler) Handle(_ context.Context, r slog.Record) error {
	r = r.Clone()
	select {
	case h.queue.lines <- func() { h.write(r) }:
	default:
		h.queue.lost.Add(1)
	}
	return nil
}

// write is for the queue's goroutine.
func (h *queuedHandler) write(r slog.Record) {
	ctx, q := context.Background(), h.queue
	if h.Handler.Handle(ctx, r) != nil {
		q.lost.Add(1)
		return
	}
	if lost := q.lost.Load(); lost != q.told {
		r := slog.NewRecord(time.Now(), slog.LevelWarn, "lines of the log were lost", 0)
		r.Add("lines", lost-q.told)
		if q.to.Enabled(ctx, r.Level) && q.to.Handle(ctx, r) != nil {
			return
		}
		q.told = lost
	}
}

func (h *queuedHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &queuedHandler{h.Handler.WithAttrs(attrs), h.queue}
}

func (h *queuedHandler) WithGroup(name string) slog.Handler {
	return &queuedHandler{h.Handler.WithGroup(name), h.queue}
}
