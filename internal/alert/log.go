// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/report"
)

// NewLog returns a sink that writes each alert as a line of a log: a warning
// while it fires, and for information when it has resolved. Text from outside is
// free of control characters. A line that cannot be written (a disk that is
// full) is a failed delivery, and tried again.
func NewLog(name string, log *slog.Logger) Sink {
	return Sink{
		Name:     name,
		Settings: log,
		// One at a time: what was written before an error would be written again.
		MaxAlerts: 1,
		Deliver: func(ctx context.Context, alerts []Alert) error {
			for i := range alerts {
				if err := writeAlert(ctx, log.Handler(), &alerts[i]); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// writeAlert hands a record to the handler itself: a Logger would hide its error.
func writeAlert(ctx context.Context, handler slog.Handler, a *Alert) error {
	level := slog.LevelWarn
	if !a.Firing() {
		level = slog.LevelInfo
	}
	if !handler.Enabled(ctx, level) {
		return nil
	}
	r := slog.NewRecord(time.Now(), level, report.Clean(a.Summary), 0)
	r.AddAttrs(
		slog.String("alert", report.Clean(a.ID)),
		slog.String("event", string(a.Event)),
		slog.GroupAttrs("labels", labelAttrs(&a.Labels)...),
	)
	if a.Firing() {
		r.AddAttrs(
			slog.Int("count", a.Count),
			slog.Int("peak", a.Peak),
		)
		if a.Oldest > 0 { // else none has been seen since a restart
			r.AddAttrs(slog.Float64("oldest_seconds", a.Oldest), slog.Bool("oldest_exact", a.OldestExact))
		}
	} else {
		r.AddAttrs(
			slog.Int("peak", a.Peak),
			slog.Float64("duration_seconds", a.EndsAt.Sub(a.StartsAt).Seconds()),
		)
	}
	r.AddAttrs(
		slog.String("limit_source", report.Clean(a.LimitSource)),
		slog.Time("starts_at", a.StartsAt),
	)
	if lines := fixes(urgent(a.Advice)); a.Firing() && len(lines) > 0 {
		r.AddAttrs(slog.String("advice", strings.Join(lines, " | ")))
	}
	return handler.Handle(ctx, r)
}

// urgent are the findings that are more than remarks: a line has no room for those.
func urgent(findings []report.Finding) (all []report.Finding) {
	for _, f := range findings {
		if f.Severity > report.Info {
			all = append(all, f)
		}
	}
	return all
}

// labelAttrs are the labels that there are.
func labelAttrs(l *Labels) []slog.Attr {
	var attrs []slog.Attr
	text := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, report.Clean(value)))
		}
	}
	text("limit", l.Limit)
	text("stage", l.Stage)
	text("side", l.Side)
	text("proxy", l.Proxy)
	text("server", l.Server)
	if l.Port != 0 {
		attrs = append(attrs, slog.Int("port", int(l.Port)))
	}
	text("peer", l.Peer)
	text("process", l.Process)
	text("netns", l.Netns)
	return attrs
}
