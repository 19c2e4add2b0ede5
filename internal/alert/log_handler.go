// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/fintrace/fintrace/internal/report"
)

// identifier is what journald and syslog know the daemon by.
const identifier = "fintrace"

// NewHandler returns the handler of the daemon's log. Format is text, json,
// journald, syslog, or auto: journald if stderr is read by it, else text. Text
// and JSON are written to w. In no format can a value make up a line or a field.
// The error says which formats there are, or why syslog cannot be reached.
func NewHandler(format string, w io.Writer, level slog.Leveler) (slog.Handler, error) {
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case "auto":
		// An error means that the variable is not the journal's.
		if ours, err := journal.StderrIsJournalStream(); err == nil && ours {
			return newJournald(level, journal.Send), nil
		}
		return slog.NewTextHandler(w, options), nil
	case "text":
		return slog.NewTextHandler(w, options), nil
	case "json":
		return slog.NewJSONHandler(report.JSONWriter(w), options), nil
	case "journald":
		if !journal.Enabled() {
			return nil, fmt.Errorf("log format journald: its socket cannot be reached")
		}
		return newJournald(level, journal.Send), nil
	case "syslog":
		out, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_INFO, identifier)
		if err != nil {
			return nil, fmt.Errorf("log format syslog: %w", err)
		}
		return newSyslog(level, out), nil
	}
	return nil, fmt.Errorf("log format %q is not known: auto, text, json, journald or syslog was expected", format)
}

// journald writes records with their attributes as fields.
type journald struct {
	level  slog.Leveler
	send   func(message string, priority journal.Priority, fields map[string]string) error
	prefix string            // of the groups that are open
	fields map[string]string // of WithAttrs
}

func newJournald(level slog.Leveler, send func(string, journal.Priority, map[string]string) error) *journald {
	return &journald{level: level, send: send, prefix: "FINTRACE_"}
}

func (h *journald) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level.Level() }

func (h *journald) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	inner := *h
	inner.prefix += fieldName(name) + "_"
	return &inner
}

func (h *journald) WithAttrs(attrs []slog.Attr) slog.Handler {
	inner := *h
	inner.fields = map[string]string{}
	for name, value := range h.fields {
		inner.fields[name] = value
	}
	for _, a := range attrs {
		addField(inner.fields, h.prefix, a)
	}
	return &inner
}

func (h *journald) Handle(_ context.Context, r slog.Record) error {
	fields := map[string]string{"SYSLOG_IDENTIFIER": identifier}
	for name, value := range h.fields {
		fields[name] = value
	}
	r.Attrs(func(a slog.Attr) bool {
		addField(fields, h.prefix, a)
		return true
	})
	priority := journal.PriDebug
	switch {
	case r.Level >= slog.LevelError:
		priority = journal.PriErr
	case r.Level >= slog.LevelWarn:
		priority = journal.PriWarning
	case r.Level >= slog.LevelInfo:
		priority = journal.PriInfo
	}
	return h.send(r.Message, priority, fields)
}

// addField adds an attribute, and those of a group, each under its own name.
func addField(fields map[string]string, prefix string, a slog.Attr) {
	value := a.Value.Resolve()
	switch {
	case a.Equal(slog.Attr{}):
	case value.Kind() == slog.KindGroup:
		if a.Key != "" {
			prefix += fieldName(a.Key) + "_"
		}
		for _, inner := range value.Group() {
			addField(fields, prefix, inner)
		}
	case value.Kind() == slog.KindTime:
		fields[prefix+fieldName(a.Key)] = value.Time().Format(time.RFC3339Nano)
	default:
		fields[prefix+fieldName(a.Key)] = value.String()
	}
}

// fieldName makes a part of a field's name of a key.
//
// systemd.journal-fields(7): Fields must be composed of uppercase letters,
// numbers, and underscores, but must not start with an underscore.
func fieldName(key string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z':
			return r - 'a' + 'A'
		case 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
			return r
		}
		return '_'
	}, key)
}

// syslogWriter is what *syslog.Writer has of it.
type syslogWriter interface {
	Debug(string) error
	Info(string) error
	Warning(string) error
	Err(string) error
}

// syslogd writes records as the text handler does, without what syslog has itself.
type syslogd struct {
	slog.Handler // into line
	line         *syslogLine
}

// syslogLine is the line that is being written.
type syslogLine struct {
	mu  sync.Mutex
	buf bytes.Buffer
	out syslogWriter
}

func newSyslog(level slog.Leveler, out syslogWriter) *syslogd {
	line := &syslogLine{out: out}
	return &syslogd{line: line, Handler: slog.NewTextHandler(&line.buf, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		},
	})}
}

func (h *syslogd) WithGroup(name string) slog.Handler {
	return &syslogd{h.Handler.WithGroup(name), h.line}
}

func (h *syslogd) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &syslogd{h.Handler.WithAttrs(attrs), h.line}
}

func (h *syslogd) Handle(ctx context.Context, r slog.Record) error {
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	h.line.buf.Reset()
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	text := strings.TrimSuffix(h.line.buf.String(), "\n")
	switch {
	case r.Level >= slog.LevelError:
		return h.line.out.Err(text)
	case r.Level >= slog.LevelWarn:
		return h.line.out.Warning(text)
	case r.Level >= slog.LevelInfo:
		return h.line.out.Info(text)
	}
	return h.line.out.Debug(text)
}
