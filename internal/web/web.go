// SPDX-License-Identifier: Apache-2.0

// Package web is the daemon's listener: its metrics, a page and a JSON API that
// show what is stuck now, and its health. It only ever reads.
package web

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	// answerWithin is how long a request waits for the loop. One turn of it may
	// take some hundred milliseconds, and a health check waits a second or a few.
	answerWithin = 2 * time.Second
	// requestsAtMost are answered at a time: far more than those who scrape one
	// host, and far less than what would take its memory.
	requestsAtMost = 32
	// listingsAtMost are those of them that list connections, up to listMost each.
	listingsAtMost = 4
)

// Source is what the listener asks of the daemon. Each function is called from
// any goroutine. Those with a context wait for the loop no longer than it lasts.
type Source struct {
	Connections func(context.Context, Query) (Connections, error)
	Alerts      func(context.Context) ([]alert.Alert, error) // the worst first
	Status      func(context.Context) (Status, error)
	Healthy     func() error // nil while the loop lives
	Ready       func() error // nil once what was there before is known
	Metrics     http.Handler

	// Netns finds the inode of a network namespace by its name, for queries; nil
	// knows no names.
	Netns func(name string) (inode uint32, err error)
	// Hosts are the names that a listener on loopback answers to, beside localhost
	// and addresses. See refuseHost.
	Hosts []string
}

// Query selects connections.
type Query struct {
	Filter  track.Filter
	Overdue bool // only those
	Limit   int  // at most so many, at least 1
}

// Connections are the answer to a Query.
type Connections struct {
	Records []report.Record // the oldest first
	Total   int             // that the query selects, with those beyond its limit
	At      time.Time
}

// Status is the daemon and what it watches, as of a moment.
type Status struct {
	At      time.Time
	Started time.Time // the daemon
	Version string
	Host    string

	Held, Orphaned, Minisock int
	Overdue                  int
	Oldest                   Age // of all; the zero value if there is none
	Groups                   []Group

	Lost     uint64   // records that the kernel could not hand over, since the start
	Unlooked []string // what could not be looked at, each with why

	groups map[groupKey]int // their indexes
}

// Age is a time in FIN_WAIT2.
type Age struct {
	Duration time.Duration
	AtLeast  bool // it is a lower bound
}

// Group is the connections of one service.
type Group struct {
	Proxy string // of HAProxy; "" none
	Side  events.Side
	Port  uint16 // that is listened on, or that we connect to

	Held, Orphaned, Minisock int
	Overdue                  int
	Oldest                   Age
}

type groupKey struct {
	proxy string
	side  events.Side
	port  uint16
}

// Add counts a connection.
func (s *Status) Add(c *track.Conn) {
	key := groupKey{side: c.Side, port: c.ServicePort()}
	if c.Place != nil {
		key.proxy = c.Place.Name()
	}
	i, known := s.groups[key]
	if !known {
		if s.groups == nil {
			s.groups = map[groupKey]int{}
		}
		i = len(s.Groups)
		s.groups[key] = i
		s.Groups = append(s.Groups, Group{Proxy: key.proxy, Side: key.side, Port: key.port})
	}
	g := &s.Groups[i]
	switch c.Stage {
	case events.Held:
		s.Held++
		g.Held++
	case events.Orphaned:
		s.Orphaned++
		g.Orphaned++
	case events.Minisock:
		s.Minisock++
		g.Minisock++
	}
	if c.Overdue {
		s.Overdue++
		g.Overdue++
	}
	s.Oldest.add(c)
	g.Oldest.add(c)
}

// add makes a the older of itself and c's. One that is only known to be older
// than something may be the oldest of all.
func (a *Age) add(c *track.Conn) {
	a.Duration = max(a.Duration, c.Duration)
	a.AtLeast = a.AtLeast || !c.SinceExact
}

func (s *Status) total() int { return s.Held + s.Orphaned + s.Minisock }

func (g *Group) total() int { return g.Held + g.Orphaned + g.Minisock }

// A refusal is an error with its status code.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string { return r.text }

type handler struct {
	Source
	requests chan struct{} // those that are being answered
	listings chan struct{}
}

// Handler answers all requests.
func Handler(s Source) http.Handler {
	h := &handler{
		Source:   s,
		requests: make(chan struct{}, requestsAtMost),
		listings: make(chan struct{}, listingsAtMost),
	}
	busy := func(answer http.HandlerFunc) http.HandlerFunc { return atMost(h.requests, answer) }
	mux := http.NewServeMux()
	// How the daemon is does not depend on how many ask it for other things.
	mux.HandleFunc("/healthz", h.probe(s.Healthy))
	mux.HandleFunc("/readyz", h.probe(s.Ready))
	mux.HandleFunc("/metrics", busy(s.Metrics.ServeHTTP))
	mux.HandleFunc("/{$}", busy(h.page))
	mux.HandleFunc("/api/v1/connections", busy(atMost(h.listings, h.connections)))
	mux.HandleFunc("/api/v1/alerts", busy(h.alerts))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, r, &refusal{http.StatusNotFound,
			"there are /, /metrics, /api/v1/connections, /api/v1/alerts, /healthz and /readyz"})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		guard(w.Header())
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			refuse(w, r, &refusal{http.StatusMethodNotAllowed, "everything here is only read: GET or HEAD"})
			return
		}
		if err := h.refuseHost(r); err != nil {
			refuse(w, r, err)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// guard sets the headers that keep a browser from doing anything with an answer
// but showing it. What the web configuration file has set already stays.
func guard(header http.Header) {
	for _, h := range [...][2]string{
		{"Content-Security-Policy", contentPolicy},
		{"X-Content-Type-Options", "nosniff"},
		{"X-Frame-Options", "DENY"},
		{"Referrer-Policy", "no-referrer"},
		{"Cross-Origin-Opener-Policy", "same-origin"},
		{"Cross-Origin-Resource-Policy", "same-origin"},
		{"Cache-Control", "no-store"},
	} {
		if header.Get(h[0]) == "" {
			header.Set(h[0], h[1])
		}
	}
}

// refuseHost refuses what a browser was tricked into asking: a page from
// anywhere whose name is suddenly that of 127.0.0.1 could read all that a
// listener on loopback says. Such a request has that name as its host. With TLS
// the certificate is for another name; on other addresses than loopback, whoever
// can reach them can read them.
func (h *handler) refuseHost(r *http.Request) error {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok || r.TLS != nil || r.URL.Path == "/healthz" || r.URL.Path == "/readyz" {
		return nil
	}
	if at, err := netip.ParseAddrPort(local.String()); err != nil || !at.Addr().IsLoopback() {
		return nil
	}
	name := r.Host
	if host, _, err := net.SplitHostPort(name); err == nil {
		name = host
	}
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil || name == "" || name == "localhost" ||
		strings.HasSuffix(name, ".localhost") ||
		slices.ContainsFunc(h.Hosts, func(known string) bool { return strings.EqualFold(known, name) }) {
		return nil
	}
	known := strings.Join(append([]string{"an address", "localhost"}, h.Hosts...), ", ")
	return &refusal{http.StatusMisdirectedRequest, fmt.Sprintf(
		"on loopback the host of a request is one of %s, not %q; a proxy in front has to set it (HAProxy: http-request set-header Host localhost)",
		known, name)}
}

// atMost answers no more requests at a time than slots has room for.
func atMost(slots chan struct{}, answer http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
			answer(w, r)
		default:
			refuse(w, r, &refusal{http.StatusServiceUnavailable,
				fmt.Sprintf("%d such requests are being answered, which is as many as at a time", cap(slots))})
		}
	}
}

// refuse answers with one line: of JSON below /api/, else of text.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	code, line := explain(err)
	if code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	if strings.HasPrefix(r.URL.Path, "/api/") {
		writeJSON(w, code, map[string]string{"error": line})
		return
	}
	writeText(w, code, line)
}

// explain is an error's status code and its line.
func explain(err error) (code int, line string) {
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return refused.code, refused.text
	case errors.Is(err, context.DeadlineExceeded):
		line = fmt.Sprintf("the loop is busy, and had no time within %v", answerWithin)
	case errors.Is(err, context.Canceled):
		line = "the daemon is shutting down"
	default:
		line = report.Clean(err.Error())
	}
	return http.StatusServiceUnavailable, line
}

func writeText(w http.ResponseWriter, code int, line string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	fmt.Fprintln(w, line)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// What fails now is the connection, and nobody is there to be told.
	_ = json.NewEncoder(report.JSONWriter(w)).Encode(v)
}

// probe answers with whether check finds fault.
func (h *handler) probe(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := check(); err != nil {
			writeText(w, http.StatusServiceUnavailable, report.Clean(err.Error()))
			return
		}
		writeText(w, http.StatusOK, "ok")
	}
}

func (h *handler) alerts(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	if r.URL.RawQuery != "" {
		refuse(w, r, &refusal{http.StatusBadRequest, "alerts take no parameters"})
		return
	}
	alerts, err := h.Alerts(ctx)
	if err != nil {
		refuse(w, r, err)
		return
	}
	if alerts == nil {
		alerts = []alert.Alert{}
	}
	writeJSON(w, http.StatusOK, map[string]any{"alerts": alerts})
}

func (h *handler) connections(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	q, err := h.parseQuery(r.URL.RawQuery)
	if err != nil {
		refuse(w, r, &refusal{http.StatusBadRequest, err.Error()})
		return
	}
	found, err := h.Connections(ctx, q)
	if err != nil {
		refuse(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := bufio.NewWriter(w)
	defer out.Flush()
	at, err := json.Marshal(found.At)
	if err != nil {
		panic(http.ErrAbortHandler) // a year beyond 9999
	}
	fmt.Fprintf(out, `{"at":%s,"total":%d,"connections":[`, at, found.Total)
	// Record by record: the whole text need never be in memory.
	for i := range found.Records {
		text, err := json.Marshal(&found.Records[i])
		if err != nil {
			panic(http.ErrAbortHandler) // as above
		}
		if i > 0 {
			out.WriteByte(',')
		}
		out.WriteByte('\n')
		if _, err := out.Write(report.EscapeJSON(text)); err != nil {
			return // the connection
		}
	}
	out.WriteString("]}\n")
}
