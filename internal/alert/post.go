// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/report"
)

// Origin says to receivers whom an alert is from.
type Origin struct {
	Host    string // the name of this host
	Version string // of fintrace
	URL     string // the daemon's page, "" if nobody else can reach it
}

const (
	// maxAnswer bounds what is read of an answer, in bytes: its first line is logged.
	maxAnswer = 4 << 10
	// maxSaid bounds a line of it in the log, in runes.
	maxSaid = 200
	// maxSecret bounds a file that holds a secret, in bytes.
	maxSecret = 64 << 10
	// minSecret is how long a part of a URL's path is that may be a secret; what
	// is shorter is a word, and removing it would make errors unreadable.
	minSecret = 6
)

// poster posts JSON to a URL that may hold secrets, with secrets in headers. No
// error of it holds any.
type poster struct {
	target  func() (*url.URL, error) // asked for each attempt
	http    promconfig.HTTPClientConfig
	client  *http.Client
	headers map[string]string
	agent   string
}

// newPoster returns a poster without a target. It reads the files of TLS, to
// say at once what is wrong with them; all secrets are read for each attempt.
func newPoster(name string, settings promconfig.HTTPClientConfig, headers map[string]string, version string,
	options ...promconfig.HTTPClientOption) (*poster, error) {
	if settings.OAuth2 != nil {
		return nil, fmt.Errorf("%s: oauth2 is not supported", name)
	}
	if err := settings.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if settings.ProxyURL.URL == nil {
		settings.ProxyFromEnvironment = true
	}
	// A connection for each attempt: they are minutes apart, and one that is
	// kept is one that may have died meanwhile.
	options = append(options, promconfig.WithKeepAlivesDisabled(), promconfig.WithHTTP2Disabled())
	transport, err := promconfig.NewRoundTripperFromConfig(settings, name, options...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return &poster{
		http:    settings,
		headers: headers,
		agent:   "fintrace/" + cmp.Or(version, "unknown"),
		client: &http.Client{
			Transport: transport,
			// A redirect would lead alerts and secrets to whom nobody has named.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// parseURL parses a URL of a receiver. Its errors do not hold it.
func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSpace(text))
	switch {
	case err != nil: // which quotes it
		return nil, errors.New("the URL cannot be parsed")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("the URL does not begin with https:// or http://")
	case u.Host == "":
		return nil, errors.New("the URL has no host")
	}
	return u, nil
}

// readSecret reads a file that holds a secret. Its errors name the file.
func readSecret(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSecret))
	return strings.TrimSpace(string(text)), err
}

// post makes one attempt.
func (p *poster) post(ctx context.Context, body []byte) error {
	u, err := p.target()
	if err != nil {
		return err
	}
	// All that is said of an attempt says where it went, and no more of the URL.
	where := u.Scheme + "://" + u.Host
	// Before the attempt, for the files may be others after it.
	secrets := p.secrets(u)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: no request can be made of the URL", where)
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", p.agent)
	for name, value := range p.headers {
		request.Header.Set(name, value)
	}
	began := time.Now()
	response, err := p.client.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%s: no answer within %s", where, report.Duration(time.Since(began)))
		}
		if quoted := (*url.Error)(nil); errors.As(err, &quoted) { // the URL
			err = quoted.Err
		}
		return fmt.Errorf("%s: %s", where, redact(err.Error(), secrets))
	}
	defer response.Body.Close()
	return answer(where, response, secrets)
}

// answer is the error that an answer means, nil if it is a success.
func answer(where string, response *http.Response, secrets []string) error {
	code := response.StatusCode
	if code/100 == 2 {
		return nil // whatever follows, and however slowly
	}
	text := fmt.Sprintf("%s: answered %d %s", where, code, http.StatusText(code))
	if code/100 == 3 {
		return errors.New(text + ", and redirects are not followed")
	}
	said, _ := io.ReadAll(io.LimitReader(response.Body, maxAnswer)) // what there is of it
	if line, _, _ := strings.Cut(strings.TrimSpace(string(said)), "\n"); line != "" {
		text += ": " + redact(line, secrets)
	}
	err := errors.New(text)
	switch code {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return err // until a file has the right secret
	case http.StatusRequestTimeout, http.StatusTooEarly:
		return err
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return &retryLater{retryAfter(response.Header.Get("Retry-After"), time.Now()), err}
	}
	if code/100 == 4 {
		return backoff.Permanent(err)
	}
	return err
}

// retryAfter reads the header of that name, 0 if there is none.
//
// RFC 9110, 10.2.3: Retry-After = HTTP-date / delay-seconds
func retryAfter(header string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(at.Sub(now), 0)
	}
	return 0
}

// secrets are what nobody may read in the log: an answer, or an error of the
// standard library, may quote any of it.
func (p *poster) secrets(u *url.URL) []string {
	secrets := []string{u.String(), u.RequestURI(), u.EscapedPath(), u.Path, u.RawQuery, u.Fragment}
	userinfo := func(user *url.Userinfo) {
		if user != nil { // tokens stand in the place of names, too
			password, _ := user.Password()
			secrets = append(secrets, user.String(), user.Username(), password, basicAuth(user.Username(), password))
		}
	}
	file := func(path string) string {
		if path == "" {
			return ""
		}
		text, _ := readSecret(path) // who needs it says what is wrong
		secrets = append(secrets, text)
		return text
	}
	userinfo(u.User)
	for _, part := range strings.Split(u.EscapedPath()+"/"+u.Path, "/") {
		if len(part) >= minSecret {
			secrets = append(secrets, part)
		}
	}
	for _, values := range u.Query() {
		secrets = append(secrets, values...)
	}
	for _, value := range p.headers {
		secrets = append(secrets, value)
	}
	if h := p.http.HTTPHeaders; h != nil {
		for _, header := range h.Headers {
			secrets = append(secrets, header.Values...)
			for _, value := range header.Secrets {
				secrets = append(secrets, string(value))
			}
			for _, path := range header.Files {
				file(path)
			}
		}
	}
	if a := p.http.Authorization; a != nil {
		secrets = append(secrets, string(a.Credentials))
		file(a.CredentialsFile)
	}
	if a := p.http.BasicAuth; a != nil {
		user, password := cmp.Or(a.Username, file(a.UsernameFile)), cmp.Or(string(a.Password), file(a.PasswordFile))
		secrets = append(secrets, password, basicAuth(user, password))
	}
	if proxy := p.http.ProxyURL.URL; proxy != nil {
		secrets = append(secrets, proxy.String())
		userinfo(proxy.User)
	}
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		if value := os.Getenv(name); strings.Contains(value, "@") {
			if proxy, err := url.Parse(value); err == nil {
				userinfo(proxy.User)
			}
		}
	}
	return secrets
}

func basicAuth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

// redact makes text from outside fit for a line of the log: without secrets,
// control characters, and much length.
func redact(text string, secrets []string) string {
	// The longest first: others may be part of it.
	secrets = slices.SortedFunc(slices.Values(secrets), func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	for _, s := range secrets {
		// What has less than four bytes cannot be kept secret, and is part of any text.
		if len(s) > 3 {
			text = strings.ReplaceAll(text, s, "[redacted]")
			text = strings.ReplaceAll(text, url.QueryEscape(s), "[redacted]")
		}
	}
	text = report.Clean(strings.TrimSpace(text))
	if runes := []rune(text); len(runes) > maxSaid {
		text = string(runes[:maxSaid]) + "…"
	}
	return text
}
