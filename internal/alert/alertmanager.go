// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/report"
)

const (
	defaultResend = time.Minute
	// outlives is for how many resends an alert fires that is heard of no more:
	// as in Prometheus, so that three may be lost.
	outlives = 4
	// resolvedFor is for how long Prometheus tells of what has resolved, so that
	// an Alertmanager that was away hears of it too.
	resolvedFor = 15 * time.Minute
)

// AlertmanagerConfig is a cluster of Alertmanagers: each of them gets each alert.
type AlertmanagerConfig struct {
	Name string
	URLs []string // without /api/v2/alerts
	// HTTP is as that of WebhookConfig.
	HTTP        promconfig.HTTPClientConfig
	ResendEvery time.Duration     // of what fires; 0: 1 min
	Labels      map[string]string // added to each alert
	Timeout     time.Duration     // of one attempt, 0: 10 s
}

// posted is an alert of Alertmanager's API, version 2.
type posted struct {
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations"`
	StartsAt     time.Time         `json:"startsAt"`
	EndsAt       time.Time         `json:"endsAt"`
	GeneratorURL string            `json:"generatorURL,omitempty"`
}

// reserved are the labels that tell alerts apart: others must not be put over them.
var reserved = []string{"alertname", "limit", "stage", "side", "proxy", "server", "port", "peer", "process", "netns"}

var labelName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

// NewAlertmanager returns a sink for each URL. The error says what is wrong with
// c, and holds no secret.
func NewAlertmanager(c AlertmanagerConfig, from Origin) ([]Sink, error) {
	return newAlertmanager(c, from)
}

func newAlertmanager(c AlertmanagerConfig, from Origin, options ...promconfig.HTTPClientOption) ([]Sink, error) {
	if len(c.URLs) == 0 {
		return nil, fmt.Errorf("%s: it has no URL", c.Name)
	}
	for name := range c.Labels {
		switch {
		case !labelName.MatchString(name):
			return nil, fmt.Errorf("%s: %q is no name for a label", c.Name, name)
		case slices.Contains(reserved, name):
			return nil, fmt.Errorf("%s: the label %q is one of those that tell alerts apart", c.Name, name)
		}
	}
	if c.ResendEvery == 0 {
		c.ResendEvery = defaultResend
	}
	var sinks []Sink
	for _, text := range c.URLs {
		u, err := parseURL(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Name, err)
		}
		p, err := newPoster(c.Name, c.HTTP, nil, from.Version, options...)
		if err != nil {
			return nil, err
		}
		u = u.JoinPath("api/v2/alerts")
		p.target = func() (*url.URL, error) { return u, nil }

		// The URL itself may hold secrets, and its place in the list may change.
		name := c.Name + "/" + u.Host
		if slices.ContainsFunc(sinks, func(s Sink) bool { return s.Name == name }) {
			name += "#" + strconv.Itoa(len(sinks)+1)
		}
		each := c
		each.URLs = []string{text}
		m := &manager{config: each, from: from, poster: p, severities: map[string]string{}}
		sinks = append(sinks, Sink{
			Name:        name,
			Settings:    [...]any{each, from},
			Timeout:     c.Timeout,
			Resend:      c.ResendEvery,
			ResolvedFor: resolvedFor,
			Deliver:     m.deliver,
		})
	}
	return sinks, nil
}

// manager is one Alertmanager. Its worker alone uses it.
type manager struct {
	config AlertmanagerConfig
	from   Origin
	poster *poster

	// severities are those of which it was told last, by ID, where they may
	// change: a label that changes makes another alert, and ends the one before.
	severities map[string]string
}

func (m *manager) deliver(ctx context.Context, alerts []Alert) error {
	now := time.Now()
	var all []posted
	for i := range alerts {
		a := &alerts[i]
		p := m.posted(a, now)
		if old, ok := m.severities[a.ID]; ok && old != m.severity(a) {
			before := m.posted(a, now)
			before.Labels["severity"], before.EndsAt = old, now
			all = append(all, before)
		}
		all = append(all, p)
	}
	body, err := json.Marshal(all)
	if err != nil {
		return backoff.Permanent(errors.New("an alert cannot be written as JSON: " + redact(err.Error(), nil)))
	}
	if err := m.poster.post(ctx, report.EscapeJSON(body)); err != nil {
		return err
	}
	for i := range alerts {
		if a := &alerts[i]; !a.Firing() {
			delete(m.severities, a.ID)
		} else if len(m.severities) < capacity {
			m.severities[a.ID] = m.severity(a)
		}
	}
	return nil
}

// severity is that of the alert at its worst.
func (m *manager) severity(a *Alert) string {
	if label, ok := m.config.Labels["severity"]; ok {
		return label
	}
	if a.grave() {
		return "critical"
	}
	return "warning"
}

func (m *manager) posted(a *Alert, now time.Time) posted {
	p := posted{
		Labels: map[string]string{
			"alertname": "FinWait2Stuck",
			"severity":  m.severity(a),
			"instance":  m.from.Host,
			"host":      m.from.Host,
			"limit":     a.Labels.Limit,
			"stage":     a.Labels.Stage,
			"side":      a.Labels.Side,
			"proxy":     a.Labels.Proxy,
			"server":    a.Labels.Server,
			"peer":      a.Labels.Peer,
			"process":   a.Labels.Process,
			"netns":     a.Labels.Netns,
		},
		Annotations: map[string]string{
			"summary":      a.Summary,
			"description":  strings.Join(advice(a.Advice), "\n"),
			"peak":         strconv.Itoa(a.Peak),
			"limit_source": a.LimitSource,
		},
		StartsAt:     a.StartsAt,
		EndsAt:       now.Add(outlives * m.config.ResendEvery),
		GeneratorURL: m.from.URL,
	}
	if a.Labels.Port != 0 {
		p.Labels["port"] = strconv.Itoa(int(a.Labels.Port))
	}
	for name, value := range m.config.Labels {
		p.Labels[name] = value
	}
	if a.Firing() {
		p.Annotations["count"] = strconv.Itoa(a.Count)
		if a.Oldest > 0 { // else none has been seen since a restart
			p.Annotations["oldest"] = oldest(a)
		}
	} else {
		p.EndsAt = *a.EndsAt
		p.Annotations["duration"] = report.Duration(a.EndsAt.Sub(a.StartsAt))
	}
	for name, value := range p.Labels {
		if p.Labels[name] = report.Clean(value); value == "" {
			delete(p.Labels, name)
		}
	}
	for name, value := range p.Annotations {
		lines := strings.Split(value, "\n")
		for i := range lines {
			lines[i] = report.Clean(lines[i])
		}
		if p.Annotations[name] = strings.Join(lines, "\n"); value == "" {
			delete(p.Annotations, name)
		}
	}
	return p
}

// oldest is the age of the oldest connection, marked where it is a lower bound.
func oldest(a *Alert) string {
	text := report.Duration(time.Duration(a.Oldest * float64(time.Second)))
	if !a.OldestExact {
		return "≥" + text
	}
	return text
}

// advice is the text of findings: of each its title, and what to change where.
func advice(findings []report.Finding) []string {
	var lines []string
	for i := range findings {
		lines = append(lines, report.Clean(findings[i].Title))
		lines = append(lines, fixes(findings[i:i+1])...)
	}
	return lines
}

// fixes are the changes that findings ask for, a line each.
func fixes(findings []report.Finding) []string {
	var lines []string
	for i := range findings {
		for _, edit := range findings[i].Fix {
			text := edit.String()
			if len(edit.Lines) > 0 {
				paste := make([]string, len(edit.Lines))
				for i, line := range edit.Lines {
					paste[i] = strings.TrimSpace(line)
				}
				text += ": " + strings.Join(paste, "; ")
			}
			lines = append(lines, report.Clean(text))
		}
	}
	return lines
}
