// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// A slowWriter waits before each write.
type slowWriter struct {
	bytes.Buffer
	writing, resume chan struct{}
}

func (w *slowWriter) Write(p []byte) (int, error) {
	w.writing <- struct{}{}
	<-w.resume
	return w.Buffer.Write(p)
}

// TestLogQueue logs more than there is room for while a write waits: nothing
// else waits, and the log says how much is lost once it goes on.
func TestLogQueue(t *testing.T) {
	w := &slowWriter{writing: make(chan struct{}), resume: make(chan struct{})}
	q := newLogQueue(slog.NewTextHandler(w, nil))
	log := slog.New(q.handler()).With("sink", "hook").WithGroup("more")
	log.Info("first", "n", 1)
	<-w.writing
	for range logCapacity + 5 {
		log.Info("another")
	}
	if lost := q.lost.Load(); lost != 5 {
		t.Errorf("%d lines are lost, want 5", lost)
	}
	began := time.Now()
	if q.flush(10 * time.Millisecond); time.Since(began) > time.Second {
		t.Error("the flush waits for what does not end")
	}
	go func() {
		for range w.writing {
		}
	}()
	close(w.resume)
	q.flush(time.Minute)
	lines := strings.Split(strings.TrimSuffix(w.String(), "\n"), "\n")
	if len(lines) != logCapacity+2 {
		t.Fatalf("%d lines are written, want %d", len(lines), logCapacity+2)
	}
	for i, want := range []string{"msg=first sink=hook more.n=1", `level=WARN msg="lines of the log were lost" lines=5`, "msg=another sink=hook"} {
		if !strings.Contains(lines[i], want) {
			t.Errorf("line %d is %s, want %s", i+1, lines[i], want)
		}
	}
}
