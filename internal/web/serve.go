// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	toolkit "github.com/prometheus/exporter-toolkit/web"
)

const (
	// headersWithin is for a request's first line and headers: a scraper sends
	// them in one packet.
	headersWithin = 5 * time.Second
	// requestWithin is for all of it; there is nothing after the headers.
	requestWithin = 10 * time.Second
	// writtenWithin is for the longest answer over the slowest line.
	writtenWithin = 30 * time.Second
	// idleAtMost is longer than the usual times between scrapes.
	idleAtMost = 2 * time.Minute
	// headerBytes is what a browser sends, several times.
	headerBytes = 16 << 10
	// connectionsAtMost are open at a time, of all listeners.
	connectionsAtMost = 256
	// streamsAtMost bounds what one of them may ask at a time with HTTP/2.
	streamsAtMost = 16
	// stopWithin is for what is being answered when the daemon ends.
	stopWithin = 2 * time.Second
)

// Serve listens on the addresses, each host:port, and answers with h until ctx
// ends; that is no error. ConfigFile, if it is not "", is a web configuration
// file of the exporter toolkit, which has TLS and the users; it is read anew as
// it changes. Ready is told what is listened on once all is.
func Serve(ctx context.Context, addresses []string, configFile string, h http.Handler, logger *slog.Logger, ready func([]net.Addr)) error {
	if err := Validate(configFile); err != nil {
		return err
	}
	var (
		listeners []net.Listener
		listening []net.Addr
		slots     = make(chan struct{}, connectionsAtMost)
	)
	defer func() {
		for _, l := range listeners {
			l.Close() // closed already, if it was served
		}
	}()
	for _, address := range addresses {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err != nil {
			return fmt.Errorf("web listener %s: %s", address, whyNot(err))
		}
		listeners = append(listeners, &listener{l, slots})
		listening = append(listening, l.Addr())
	}
	ready(listening)
	return serve(ctx, listeners, configFile, h, logger)
}

// serve answers until ctx ends or a listener fails, and closes the listeners.
func serve(ctx context.Context, listeners []net.Listener, configFile string, h http.Handler, logger *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, len(listeners))
	var running sync.WaitGroup
	for _, l := range listeners {
		// One each: the toolkit changes the server that it is given.
		server := &http.Server{
			Handler:           h,
			BaseContext:       func(net.Listener) context.Context { return ctx },
			ReadHeaderTimeout: headersWithin,
			ReadTimeout:       requestWithin,
			WriteTimeout:      writtenWithin,
			IdleTimeout:       idleAtMost,
			MaxHeaderBytes:    headerBytes,
			HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: streamsAtMost},
			ErrorLog:          slog.NewLogLogger(complaints{logger.Handler()}, slog.LevelWarn),
		}
		running.Go(func() {
			noSystemd := false
			err := toolkit.Serve(l, server, &toolkit.FlagConfig{
				WebSystemdSocket: &noSystemd, WebConfigFile: &configFile,
			}, logger)
			if !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("web listener %s: %s", l.Addr(), oneLine(err))
				cancel()
			}
		})
		running.Go(func() {
			<-ctx.Done()
			bound, done := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
			defer done()
			if server.Shutdown(bound) != nil {
				server.Close()
			}
		})
	}
	running.Wait()
	close(failed)
	return <-failed // nil if none has
}

// Validate says what is wrong with a web configuration file, and nothing of "".
func Validate(configFile string) error {
	if err := toolkit.Validate(configFile); err != nil {
		return fmt.Errorf("web configuration %s: %s", configFile, oneLine(err))
	}
	return nil
}

// whyNot is why an address cannot be listened on.
func whyNot(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var number syscall.Errno
	if !errors.As(err, &number) {
		return oneLine(err)
	}
	switch number {
	case syscall.EADDRINUSE:
		return "another process listens there (ss -ltnp shows which)"
	case syscall.EADDRNOTAVAIL:
		return "this host does not have that address"
	}
	return number.Error()
}

func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}

// listener closes what is beyond its slots, which it shares with others.
type listener struct {
	net.Listener
	slots chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &conn{Conn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			c.Close()
		}
	}
}

type conn struct {
	net.Conn
	free func()
}

func (c *conn) Close() error {
	defer c.free()
	return c.Conn.Close()
}

// complaints makes those of the HTTP server about its clients ones of interest
// only to who looks for them: whoever checks a port by connecting to it breaks a
// TLS handshake each time.
type complaints struct{ slog.Handler }

func (c complaints) Handle(ctx context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "http: TLS handshake error") {
		if r.Level = slog.LevelDebug; !c.Enabled(ctx, r.Level) {
			return nil
		}
	}
	return c.Handler.Handle(ctx, r)
}
