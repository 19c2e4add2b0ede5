// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
	"unicode"

	"github.com/cenkalti/backoff/v5"
	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/report"
)

// WebhookConfig is a URL that alerts are posted to as JSON.
type WebhookConfig struct {
	Name    string
	URL     string // one of these two
	URLFile string // a file that holds it, read for each attempt
	Headers map[string]string
	// HTTP is TLS, proxies (without one those of the environment), and secrets,
	// whose files are read for each attempt. Redirects are never followed, and
	// oauth2 is not supported.
	HTTP      promconfig.HTTPClientConfig
	Timeout   time.Duration // of one attempt, 0: 10 s
	MaxAlerts int           // of one request, 0: 100
}

// webhookBody is what a webhook gets. Its names are a contract.
type webhookBody struct {
	Version string  `json:"version"` // "1"
	Host    string  `json:"host"`
	Alerts  []Alert `json:"alerts"`
}

// RFC 9110, 5.6.2: token = 1*tchar
var headerName = regexp.MustCompile("^[-!#$%&'*+.^_`|~0-9A-Za-z]+$")

// NewWebhook returns the sink. The error says what is wrong with c, and holds no
// secret.
func NewWebhook(c WebhookConfig, from Origin) (Sink, error) { return newWebhook(c, from) }

func newWebhook(c WebhookConfig, from Origin, options ...promconfig.HTTPClientOption) (Sink, error) {
	p, err := newPoster(c.Name, c.HTTP, c.Headers, from.Version, options...)
	if err != nil {
		return Sink{}, err
	}
	switch {
	case c.URL == "" && c.URLFile == "":
		return Sink{}, fmt.Errorf("%s: it has neither a URL nor a file with one", c.Name)
	case c.URL != "" && c.URLFile != "":
		return Sink{}, fmt.Errorf("%s: it has a URL and a file with one; only one of these can be", c.Name)
	}
	for name, value := range c.Headers {
		switch {
		case !headerName.MatchString(name):
			return Sink{}, fmt.Errorf("%s: %q is no name of a header", c.Name, name)
		case strings.ContainsFunc(value, unicode.IsControl):
			return Sink{}, fmt.Errorf("%s: the value of the header %s has a control character", c.Name, name)
		case http.CanonicalHeaderKey(name) == "Host": // which net/http would ignore
			return Sink{}, fmt.Errorf("%s: the header %s is that of the URL", c.Name, name)
		}
	}
	if c.URL != "" {
		u, err := parseURL(c.URL)
		if err != nil {
			return Sink{}, fmt.Errorf("%s: %w", c.Name, err)
		}
		p.target = func() (*url.URL, error) { return u, nil }
	} else {
		p.target = func() (*url.URL, error) {
			text, err := readSecret(c.URLFile)
			if err != nil {
				return nil, err
			}
			u, err := parseURL(text)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.URLFile, err)
			}
			return u, nil
		}
	}
	return Sink{
		Name:      c.Name,
		Settings:  [...]any{c, from},
		Timeout:   c.Timeout,
		MaxAlerts: c.MaxAlerts,
		Deliver: func(ctx context.Context, alerts []Alert) error {
			body, err := json.Marshal(webhookBody{Version: "1", Host: from.Host, Alerts: alerts})
			if err != nil {
				return backoff.Permanent(errors.New("an alert cannot be written as JSON: " + redact(err.Error(), nil)))
			}
			return p.post(ctx, report.EscapeJSON(body))
		},
	}, nil
}
