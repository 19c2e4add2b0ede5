// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/slogtest"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/report"
)

// entry is what journald is sent.
type entry struct {
	message  string
	priority journal.Priority
	fields   map[string]string
}

func toJournal(level slog.Leveler) (slog.Handler, *[]entry) {
	var entries []entry
	return newJournald(level, func(message string, priority journal.Priority, fields map[string]string) error {
		entries = append(entries, entry{message, priority, fields})
		return nil
	}), &entries
}

// toSyslog is what syslog is sent: the level's name, and the line.
type toSyslog []string

func (s *toSyslog) add(level, line string) error {
	*s = append(*s, level+" "+line)
	return nil
}
func (s *toSyslog) Debug(line string) error   { return s.add("debug", line) }
func (s *toSyslog) Info(line string) error    { return s.add("info", line) }
func (s *toSyslog) Warning(line string) error { return s.add("warning", line) }
func (s *toSyslog) Err(line string) error     { return s.add("err", line) }

// quiet is a handler's output without its times.
var quiet = regexp.MustCompile(`(?m)^time=\S+ |"time":"[^"]*",`)

// TestLogSink holds the lines of each format.
func TestLogSink(t *testing.T) {
	var b strings.Builder
	text := func(format string) (slog.Handler, func()) {
		var out bytes.Buffer
		h, err := NewHandler(format, &out, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		return h, func() { b.WriteString(quiet.ReplaceAllString(out.String(), "")) }
	}
	for _, format := range []string{"text", "json", "journald", "syslog"} {
		fmt.Fprintf(&b, "---- %s\n", format)
		var h slog.Handler
		var print func()
		switch format {
		case "journald":
			handler, entries := toJournal(slog.LevelInfo)
			h, print = handler, func() {
				for _, e := range *entries {
					fmt.Fprintf(&b, "PRIORITY=%d\nMESSAGE=%s\n", e.priority, e.message)
					var fields []string
					for name, value := range e.fields {
						fields = append(fields, name+"="+value)
					}
					slices.Sort(fields)
					b.WriteString(strings.Join(fields, "\n") + "\n\n")
				}
			}
		case "syslog":
			var out toSyslog
			h, print = newSyslog(slog.LevelInfo, &out), func() { b.WriteString(strings.Join(out, "\n") + "\n") }
		default:
			h, print = text(format)
		}
		s := NewLog("log", slog.New(h))
		bad := stuck(Updated)
		bad.Labels = Labels{Stage: "orphaned", Process: hostile}
		bad.Summary, bad.LimitSource, bad.Advice = hostile, hostile, nil
		for _, a := range []Alert{stuck(Fired), stuck(Resolved), bad} {
			if err := s.Deliver(t.Context(), []Alert{a}); err != nil {
				t.Fatal(err)
			}
		}
		print()
	}
	got := b.String()
	if strings.ContainsAny(got, "\x1b\u202e") || !utf8.ValidString(got) {
		t.Errorf("%q", got)
	}
	golden.Check(t, "testdata/log.txt", got)
}

// TestLogSinkUnknown: a line has no remarks, and no age that is not known.
func TestLogSinkUnknown(t *testing.T) {
	var out bytes.Buffer
	h, err := NewHandler("json", &out, slog.LevelInfo)
	if err != nil {
		t.Fatal(err)
	}
	a := stuck(Updated)
	a.Count, a.Oldest = 0, 0
	a.Advice = append(a.Advice, report.Finding{Severity: report.Info, Fix: []report.Edit{{Text: "leave it as it is"}}})
	if err := NewLog("log", slog.New(h)).Deliver(t.Context(), []Alert{a}); err != nil {
		t.Fatal(err)
	}
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	if age, has := line["oldest_seconds"]; has {
		t.Errorf("the oldest is said to be %v s old", age)
	}
	if want := "after /etc/haproxy/haproxy.cfg:12: timeout client-fin 30s"; line["advice"] != want {
		t.Errorf("its advice is %q, want %q", line["advice"], want)
	}
	p := (&manager{}).posted(&a, time.Now())
	if age, has := p.Annotations["oldest"]; has {
		t.Errorf("an Alertmanager is told that the oldest is %q old", age)
	}
}

// What is not asked for is not written, and is no failure.
func TestLogSinkLevel(t *testing.T) {
	var out bytes.Buffer
	level := slog.LevelWarn
	h, err := NewHandler("text", &out, level)
	if err != nil {
		t.Fatal(err)
	}
	s := NewLog("log", slog.New(h))
	if err := s.Deliver(t.Context(), []Alert{stuck(Resolved)}); err != nil || out.Len() > 0 {
		t.Errorf("%v, %s", err, out.String())
	}
	if err := s.Deliver(t.Context(), []Alert{stuck(Fired)}); err != nil || out.Len() == 0 {
		t.Errorf("%v, %s", err, out.String())
	}
}

// A disk that is full fails the log, and nothing else; once there is room the
// line is written, once.
func TestLogSinkDiskFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("not run: there is no /dev/full:", err)
	}
	defer full.Close()
	for _, format := range []string{"text", "json"} {
		h, err := NewHandler(format, full, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		if err := NewLog("log", slog.New(h)).Deliver(t.Context(), []Alert{stuck(Fired)}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v", format, err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		disk := &disk{room: 1}
		h, err := NewHandler("text", disk, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		var other receiver
		o := runOutbox(t, NewLog("log", slog.New(h)), other.sink("other"))
		o.Send(event("a", Fired, 1), event("b", Fired, 1), event("c", Fired, 1))
		time.Sleep(time.Minute)
		other.expect(t, "a fired 1", "b fired 1", "c fired 1")
		if s := o.stats(t, "log"); s.Failed == 0 || s.Healthy || s.Queued != 2 {
			t.Errorf("%+v", s)
		}
		disk.mu.Lock()
		disk.room = 100
		disk.mu.Unlock()
		time.Sleep(time.Minute)
		if got := disk.String(); strings.Count(got, "\n") != 3 || strings.Count(got, "alert=a ") != 1 || !strings.Contains(got, "alert=c ") {
			t.Errorf("written:\n%s", got)
		}
		if s := o.stats(t, "log"); !s.Healthy || s.Queued != 0 || s.Shed != 0 {
			t.Errorf("%+v", s)
		}
	})
}

type disk struct {
	lines
	room int // for so many lines
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	d.room--
	full := d.room < 0
	d.mu.Unlock()
	if full {
		return 0, syscall.ENOSPC
	}
	return d.lines.Write(p)
}

func TestNewHandler(t *testing.T) {
	if _, err := NewHandler("xml", io.Discard, slog.LevelInfo); fmt.Sprint(err) != `log format "xml" is not known: auto, text, json, journald or syslog was expected` {
		t.Error(err)
	}
	// Without a journal on stderr auto is text, whatever the variable says.
	for _, stream := range []string{"", "nonsense", "1:1"} {
		t.Setenv("JOURNAL_STREAM", stream)
		h, err := NewHandler("auto", io.Discard, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := h.(*slog.TextHandler); !ok {
			t.Errorf("JOURNAL_STREAM=%q: %T", stream, h)
		}
	}
	info, err := os.Stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino))
	h, err := NewHandler("auto", io.Discard, slog.LevelInfo)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := h.(*journald); !ok {
		t.Errorf("with the journal on stderr: %T", h)
	}
}

func TestLevels(t *testing.T) {
	var level slog.LevelVar
	level.Set(slog.LevelDebug)
	journald, entries := toJournal(&level)
	var lines toSyslog
	syslogd := newSyslog(&level, &lines)
	for _, h := range []slog.Handler{journald, syslogd} {
		log := slog.New(h)
		log.Debug("m")
		log.Info("m")
		log.Warn("m")
		log.Error("m")
		level.Set(slog.LevelError)
		log.Warn("not this")
		level.Set(slog.LevelDebug)
	}
	var priorities []journal.Priority
	for _, e := range *entries {
		priorities = append(priorities, e.priority)
	}
	if diff := cmp.Diff([]journal.Priority{journal.PriDebug, journal.PriInfo, journal.PriWarning, journal.PriErr}, priorities); diff != "" {
		t.Errorf("journald (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(toSyslog{"debug msg=m", "info msg=m", "warning msg=m", "err msg=m"}, lines); diff != "" {
		t.Errorf("syslog (-want +got):\n%s", diff)
	}
}

// Keys from outside make valid names, and cannot be another field.
func TestJournaldNames(t *testing.T) {
	h, entries := toJournal(slog.LevelInfo)
	slog.New(h).WithGroup("a.b").With("MESSAGE=x\nPRIORITY", 1).Info("m", "_é-9", true, "n", "1\nPRIORITY=0", "none", nil)
	want := map[string]string{
		"SYSLOG_IDENTIFIER":               "fintrace",
		"FINTRACE_A_B_MESSAGE_X_PRIORITY": "1",
		"FINTRACE_A_B____9":               "true",
		"FINTRACE_A_B_N":                  "1\nPRIORITY=0", // the protocol has lengths for such
		"FINTRACE_A_B_NONE":               "<nil>",
	}
	if diff := cmp.Diff(want, (*entries)[0].fields); diff != "" {
		t.Errorf("fields (-want +got):\n%s", diff)
	}
}

// Loggers that are made of one do not share what they add.
func TestJournaldWith(t *testing.T) {
	h, entries := toJournal(slog.LevelInfo)
	parent := slog.New(h).With("a", 1)
	one, two := parent.With("b", 2), parent.With("c", 3)
	one.Info("m")
	two.Info("m")
	for i, want := range []map[string]string{
		{"SYSLOG_IDENTIFIER": "fintrace", "FINTRACE_A": "1", "FINTRACE_B": "2"},
		{"SYSLOG_IDENTIFIER": "fintrace", "FINTRACE_A": "1", "FINTRACE_C": "3"},
	} {
		if diff := cmp.Diff(want, (*entries)[i].fields); diff != "" {
			t.Errorf("fields of %d (-want +got):\n%s", i, diff)
		}
	}
}

// Only the time and the level of syslog itself are left out.
func TestSyslogKeys(t *testing.T) {
	var lines toSyslog
	slog.New(newSyslog(slog.LevelInfo, &lines)).WithGroup("g").Info("m", "time", 1, "level", 2)
	if diff := cmp.Diff(toSyslog{"info msg=m g.time=1 g.level=2"}, lines); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The handlers of our own do what slog asks of handlers.
func TestSlogtest(t *testing.T) {
	t.Run("journald", func(t *testing.T) {
		var entries *[]entry
		slogtest.Run(t, func(*testing.T) slog.Handler {
			var h slog.Handler
			h, entries = toJournal(slog.LevelInfo)
			return h
		}, func(t *testing.T) map[string]any {
			e := (*entries)[0]
			out := map[string]any{slog.MessageKey: e.message, slog.LevelKey: e.priority}
			if !strings.HasSuffix(t.Name(), "zero-time") { // journald has the time itself
				out[slog.TimeKey] = time.Now()
			}
			for name, value := range e.fields {
				path, ok := strings.CutPrefix(name, "FINTRACE_")
				if !ok {
					continue
				}
				// slogtest's groups are G and H, its keys lower case.
				at := out
				parts := strings.Split(path, "_")
				for _, group := range parts[:len(parts)-1] {
					if at[group] == nil {
						at[group] = map[string]any{}
					}
					at = at[group].(map[string]any)
				}
				at[strings.ToLower(parts[len(parts)-1])] = value
			}
			return out
		})
	})
	t.Run("syslog", func(t *testing.T) {
		var lines toSyslog
		slogtest.Run(t, func(*testing.T) slog.Handler {
			lines = nil
			return newSyslog(slog.LevelInfo, &lines)
		}, func(t *testing.T) map[string]any {
			level, line, _ := strings.Cut(lines[0], " ")
			out := map[string]any{slog.LevelKey: level}
			if !strings.HasSuffix(t.Name(), "zero-time") { // syslog has the time itself
				out[slog.TimeKey] = time.Now()
			}
			for _, pair := range strings.Fields(line) {
				key, value, _ := strings.Cut(pair, "=")
				at := out
				parts := strings.Split(key, ".")
				for _, group := range parts[:len(parts)-1] {
					if at[group] == nil {
						at[group] = map[string]any{}
					}
					at = at[group].(map[string]any)
				}
				at[parts[len(parts)-1]] = value
			}
			return out
		})
	})
	t.Run("json", func(t *testing.T) {
		var out bytes.Buffer
		slogtest.Run(t, func(t *testing.T) slog.Handler {
			out.Reset()
			h, err := NewHandler("json", &out, slog.LevelInfo)
			if err != nil {
				t.Fatal(err)
			}
			return h
		}, func(t *testing.T) map[string]any {
			var m map[string]any
			if err := json.Unmarshal(out.Bytes(), &m); err != nil {
				t.Fatal(err)
			}
			return m
		})
	})
}

// An attribute's value cannot forge a line in any format of the daemon's log,
// whoever logs it.
func TestNoForgedLines(t *testing.T) {
	var text, js bytes.Buffer
	var sys toSyslog
	handlers := []slog.Handler{newSyslog(slog.LevelInfo, &sys)}
	for format, out := range map[string]*bytes.Buffer{"text": &text, "json": &js} {
		h, err := NewHandler(format, out, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		handlers = append(handlers, h)
	}
	for _, h := range handlers {
		r := slog.NewRecord(time.Now(), slog.LevelWarn, hostile, 0)
		r.AddAttrs(slog.String("comm", hostile), slog.String(hostile, "key"), slog.Any("error", errors.New(hostile)))
		if err := h.Handle(context.Background(), r); err != nil {
			t.Fatal(err)
		}
	}
	for name, out := range map[string]string{"text": text.String(), "json": js.String(), "syslog": strings.Join(sys, "") + "\n"} {
		if strings.Count(out, "\n") != 1 || strings.Contains(out, "\x1b") || strings.Contains(out, "evil\" a=b") {
			t.Errorf("%s: %q", name, out)
		}
	}
}
