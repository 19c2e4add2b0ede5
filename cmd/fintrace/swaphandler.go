// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// swapHandler is a log's handler that can be replaced while the log is in use,
// also by loggers that were derived from it.
type swapHandler struct {
	current *atomic.Pointer[slog.Handler]
	derive  func(slog.Handler) slog.Handler
}

func newSwapHandler(h slog.Handler) *swapHandler {
	s := &swapHandler{current: &atomic.Pointer[slog.Handler]{}, derive: func(h slog.Handler) slog.Handler { return h }}
	s.use(h)
	return s
}

func (s *swapHandler) use(h slog.Handler) { s.current.Store(&h) }

func (s *swapHandler) handler() slog.Handler { return s.derive(*s.current.Load()) }

func (s *swapHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return (*s.current.Load()).Enabled(ctx, l)
}

func (s *swapHandler) Handle(ctx context.Context, r slog.Record) error {
	return s.handler().Handle(ctx, r)
}

func (s *swapHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return s.with(func(h slog.Handler) slog.Handler { return h.WithAttrs(attrs) })
}

func (s *swapHandler) WithGroup(name string) slog.Handler {
	return s.with(func(h slog.Handler) slog.Handler { return h.WithGroup(name) })
}

func (s *swapHandler) with(more func(slog.Handler) slog.Handler) slog.Handler {
	return &swapHandler{s.current, func(h slog.Handler) slog.Handler { return more(s.derive(h)) }}
}
