// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"

	"github.com/fintrace/fintrace/internal/config"
	"github.com/fintrace/fintrace/internal/web"
)

// server is the web listener, which another configuration may move. Its methods
// are for one goroutine at a time, but for wait.
type server struct {
	handler http.Handler
	log     *slog.Logger
	failed  chan error // of a listener that was there

	web  config.Web
	stop func() // ends the one that listens, and waits for it; nil if none does
}

// listen listens as a configuration says. If that fails all is as before.
func (s *server) listen(c *config.Config) error {
	before, listened := s.web, s.stop != nil
	if listened && slices.Equal(c.Web.Listen, before.Listen) && c.Web.ConfigFile == before.ConfigFile {
		return nil
	}
	s.end()
	err := s.start(c.Web)
	if err != nil && listened {
		err = errors.Join(err, s.start(before))
	}
	return err
}

func (s *server) end() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

func (s *server) start(w config.Web) error {
	s.web = w
	if len(w.Listen) == 0 {
		s.stop = func() {}
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- web.Serve(ctx, w.Listen, w.ConfigFile, s.handler, s.log, func([]net.Addr) { close(up) })
	}()
	select {
	case err := <-ended:
		cancel()
		return err
	case <-up:
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := <-ended; err != nil {
			s.failed <- err
		}
	}()
	s.stop = func() { cancel(); <-done }
	return nil
}

// wait waits for a listener to fail.
func (s *server) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.failed:
		return err
	}
}
