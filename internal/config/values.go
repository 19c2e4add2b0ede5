// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
)

// quote is text of the file as an error may show it: on one line, not too much
// of it, and of a URL nothing that may be secret.
func quote(s string) string {
	const most = 60
	if strings.Contains(s, "://") {
		s = shownURL(s)
	}
	if utf8.RuneCountInString(s) > most {
		s = string([]rune(s)[:most]) + "…"
	}
	return strconv.Quote(s)
}

// shownURL is as much of a URL as may be shown: often the rest is a secret.
func shownURL(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		scheme, _, _ := strings.Cut(s, "://")
		return scheme + "://…"
	}
	shown := u.Scheme + "://" + u.Host
	if u.Path != "" || u.RawQuery != "" || u.User != nil {
		shown += "/…"
	}
	return shown
}

// short is a duration as one writes it: 2m, 1h30m.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// duration parses durations between two.
func duration(least, most time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err != nil {
			if f, err := strconv.ParseFloat(s, 64); err == nil && !math.IsNaN(f) && !math.IsInf(f, 0) {
				return 0, fmt.Errorf("%s has no unit; write %ss, if seconds are meant", quote(s), s)
			}
			if days, found := strings.CutSuffix(s, "d"); found {
				if n, err := strconv.ParseUint(days, 10, 16); err == nil {
					return 0, fmt.Errorf("days are not a unit; write %dh", n*24)
				}
			}
			return 0, fmt.Errorf("%s is no duration; write one such as 500ms, 30s or 1h30m", quote(s))
		}
		if d < least || d > most {
			return 0, fmt.Errorf("%s is not between %s and %s", quote(s), short(least), short(most))
		}
		return d, nil
	}
}

// durationOrNone is duration that takes 0 for never.
func durationOrNone(least, most time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		if d, err := time.ParseDuration(s); err == nil && d == 0 {
			return 0, nil
		}
		d, err := duration(least, most)(s)
		if err != nil {
			err = fmt.Errorf("%w (0s: never)", err)
		}
		return d, err
	}
}

// count parses numbers between two.
func count(least, most int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || s != strconv.Itoa(n) || n < least || n > most {
			return 0, fmt.Errorf("%s is no number from %d to %d", quote(s), least, most)
		}
		return n, nil
	}
}

// share parses a percentage.
func share(s string) (float64, error) {
	number, percent := strings.CutSuffix(s, "%")
	f, err := strconv.ParseFloat(number, 64)
	switch {
	case err != nil || math.IsNaN(f):
		return 0, fmt.Errorf("%s is no share; write one such as 10%%", quote(s))
	case !percent && f > 0 && f <= 1:
		return 0, fmt.Errorf("%s has no %%; write %s%%, if that is meant", quote(s), strconv.FormatFloat(math.Round(f*1e8)/1e6, 'f', -1, 64))
	case !percent:
		return 0, fmt.Errorf("%s has no %%; write one such as 10%%", quote(s))
	case f < 0 || f > 100:
		return 0, fmt.Errorf("%s is not between 0%% and 100%%", quote(s))
	}
	return f / 100, nil
}

func boolean(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%s is neither true nor false", quote(s))
}

// choice parses one of some words.
func choice(words ...string) func(string) (string, error) {
	return func(s string) (string, error) {
		if !slices.Contains(words, s) {
			return "", fmt.Errorf("%s is none of %s", quote(s), strings.Join(words, ", "))
		}
		return s, nil
	}
}

func level(s string) (slog.Level, error) {
	levels := []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}
	for _, l := range levels {
		if s == strings.ToLower(l.String()) {
			return l, nil
		}
	}
	return 0, fmt.Errorf("%s is none of debug, info, warn, error", quote(s))
}

func side(s string) (events.Side, error) {
	parsed, err := events.ParseSide(s)
	if err != nil {
		return 0, fmt.Errorf("%s is neither inbound nor outbound", quote(s))
	}
	return parsed, nil
}

func stage(s string) (events.Stage, error) {
	parsed, err := events.ParseStage(s)
	if err != nil {
		return 0, fmt.Errorf("%s is none of held, orphaned, minisock", quote(s))
	}
	return parsed, nil
}

func port(s string) (uint16, error) {
	n, err := count(1, math.MaxUint16)(s)
	if err != nil {
		return 0, fmt.Errorf("%s is no port; write a number from 1 to 65535", quote(s))
	}
	return uint16(n), nil
}

// block parses an address or a block of them. What is IPv4 becomes so, as peers do.
func block(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s is no address block; write one such as 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32", quote(s))
	}
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	if masked := p.Masked(); masked != p {
		return netip.Prefix{}, fmt.Errorf("%s has an address within the block; write %s for the block, or %s for that address", quote(s), masked, p.Addr())
	}
	return p, nil
}

func blockWithin(a, b netip.Prefix) bool { return b.Bits() <= a.Bits() && b.Contains(a.Addr()) }

// netns parses what names a network namespace: its name in /run/netns, or an inode.
func netns(s string) (string, error) {
	if isNumber(s) {
		if n, err := strconv.ParseUint(s, 10, 32); err != nil || n == 0 {
			return "", fmt.Errorf("%s is no inode; write the number that `lsns -t net` shows, or a name", quote(s))
		}
		return s, nil
	}
	if s == "" || s == "." || s == ".." || strings.Contains(s, "/") || !printable(s) {
		return "", fmt.Errorf("%s is no network namespace; write its name in /run/netns, or the number that `lsns -t net` shows", quote(s))
	}
	return s, nil
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// commLength is how much of a process's name the kernel keeps (TASK_COMM_LEN).
const commLength = 15

func process(s string) (string, error) {
	switch {
	case isNumber(s):
		if n, err := strconv.ParseInt(s, 10, 32); err != nil || n == 0 || s[0] == '0' {
			return "", fmt.Errorf("%s is no pid", quote(s))
		}
	case s == "" || !printable(s):
		return "", fmt.Errorf("%s is no process; write its name as in /proc/PID/comm, or its pid", quote(s))
	case len(s) > commLength:
		return "", fmt.Errorf("%s is longer than the %d bytes that the kernel keeps of a name; write %s", quote(s), commLength, quote(s[:commLength]))
	}
	return s, nil
}

func cgroup(s string) (string, error) {
	if !strings.HasPrefix(s, "/") || !printable(s) {
		return "", fmt.Errorf("%s is no path below /sys/fs/cgroup; write one such as /system.slice/haproxy.service", quote(s))
	}
	if clean := path.Clean(s); clean != s {
		return "", fmt.Errorf("%s is no path as the kernel has it; write %s", quote(s), quote(clean))
	}
	if rest, found := strings.CutPrefix(s, "/sys/fs/cgroup"); found && (rest == "" || rest[0] == '/') {
		return "", fmt.Errorf("%s begins at the wrong root; write %s", quote(s), quote(path.Clean("/"+rest)))
	}
	return s, nil
}

func cgroupWithin(a, b string) bool {
	return a == b || strings.HasPrefix(a, strings.TrimSuffix(b, "/")+"/")
}

func proxy(s string) (string, error) {
	if s == "" || !printable(s) || strings.ContainsAny(s, " ") {
		return "", fmt.Errorf("%s is no name of a proxy; write that of a frontend, listen or backend", quote(s))
	}
	return s, nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) })
}

// maxName is the longest name, in bytes: names are labels of metrics.
const maxName = 64

func name(s string) (string, error) {
	if s == "" || len(s) > maxName || !printable(s) || strings.TrimSpace(s) != s || strings.Contains(s, "://") {
		return "", fmt.Errorf("%s is no name; write 1 to %d letters, digits and the like", quote(s), maxName)
	}
	return s, nil
}

// sinkName has no slash: behind it metrics have the host of each Alertmanager.
func sinkName(s string) (string, error) {
	if strings.Contains(s, "/") {
		return "", fmt.Errorf("%s has a /, which names of sinks cannot have", quote(s))
	}
	return name(s)
}

// limitsOwn are the kinds of limit (limits.Limit.Kind) that are no rule's.
var limitsOwn = []string{"TCP_LINGER2", "RTO", "--limit", "timewait timer", "tcp_fin_timeout"}

func ruleName(s string) (string, error) {
	if slices.Contains(limitsOwn, s) || strings.HasPrefix(s, "haproxy timeout") {
		return "", fmt.Errorf("%s is what alerts call a limit that is none of your rules; take another name", quote(s))
	}
	return name(s)
}

// absolute parses a path. It does not quote what is none: it may be the secret
// that the file should have.
func absolute(s string) (string, error) {
	if !strings.HasPrefix(s, "/") {
		return "", errors.New("a path from the root on was expected; begin it with /")
	}
	if strings.ContainsRune(s, 0) || len(s) > 4095 {
		return "", errors.New("no path is like that")
	}
	return s, nil
}

func absoluteOrNone(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	return absolute(s)
}

// webURL parses an http or https URL. Errors do not quote it: it may be secret.
func webURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return nil, errors.New("this is no URL of http or https; write one such as https://host.example/path")
	}
	if u.User != nil {
		return nil, errors.New("the URL has a user or password; use basic_auth")
	}
	if u.Fragment != "" {
		return nil, errors.New("the URL has a #, which no server sees; leave it and what follows out")
	}
	if u.Port() != "" || strings.HasSuffix(u.Host, ":") {
		if _, err := port(u.Port()); err != nil {
			return nil, errors.New("the port of the URL is no number from 1 to 65535")
		}
	}
	return u, nil
}

func hookURL(s string) (string, error) {
	_, err := webURL(s)
	return s, err
}

func externalURL(s string) (string, error) {
	u, err := webURL(s)
	if err == nil && (u.RawQuery != "" || u.ForceQuery) {
		err = errors.New("the URL has a ?; paths are put behind it")
	}
	return strings.TrimSuffix(s, "/"), err
}

func alertmanagerURL(s string) (string, error) {
	s, err := externalURL(s)
	if err == nil && (strings.HasSuffix(s, "/api/v2/alerts") || strings.HasSuffix(s, "/api/v1/alerts") || strings.HasSuffix(s, "/api/v2")) {
		err = errors.New("/api/v2/alerts is put behind the URL; leave it out")
	}
	return s, err
}

// runtimeSocket parses an address of HAProxy's `stats socket`.
func runtimeSocket(s string) (string, error) {
	kind, name, typed := strings.Cut(strings.TrimPrefix(s, "stream+"), "@")
	switch {
	case strings.HasPrefix(s, "/"):
		return absolute(s)
	case typed && name != "" && slices.Contains([]string{"unix", "uxst", "abns", "abnsz", "ipv4", "ipv6", "tcp", "tcp4", "tcp6"}, kind):
		return s, nil
	}
	if _, err := address(s); err != nil || strings.HasSuffix(s, ":0") {
		return "", fmt.Errorf("%s is no address of a runtime socket; write one such as /run/haproxy/admin.sock or 127.0.0.1:9999", quote(s))
	}
	return s, nil
}

var hostLetters = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?$`)

// isHostName leaves the length out of the expression, to compile which each start of
// the program would take milliseconds.
func isHostName(s string) bool { return len(s) <= 253 && hostLetters.MatchString(s) }

// address parses host:port to listen on; port 0 is any that is free.
func address(s string) (string, error) {
	host, service, err := net.SplitHostPort(s)
	if err != nil {
		return "", fmt.Errorf("%s is no address to listen on; write one such as 127.0.0.1:19818, [::1]:19818 or :19818", quote(s))
	}
	if _, err := port(service); err != nil && service != "0" {
		return "", fmt.Errorf("%s has no port from 0 to 65535", quote(s))
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" && (!isHostName(host) || strings.Trim(host, "0123456789.") == "") {
		return "", fmt.Errorf("%s has no address before the port; write one such as 127.0.0.1 or [::1]", quote(s))
	}
	return s, nil
}

// addressWithin says whether listening on b takes a too. What is unspecified
// listens on all addresses, of either family.
func addressWithin(a, b string) bool {
	// Both have been parsed.
	hostA, portA, _ := net.SplitHostPort(a)
	hostB, portB, _ := net.SplitHostPort(b)
	if portA != portB || portA == "0" {
		return false
	}
	ipA, errA := netip.ParseAddr(hostA)
	ipB, errB := netip.ParseAddr(hostB)
	switch {
	case hostB == "" || errB == nil && ipB.IsUnspecified():
		return true
	case errA == nil && errB == nil:
		return ipA.Unmap() == ipB.Unmap()
	}
	return strings.EqualFold(hostA, hostB)
}

var (
	headerName = regexp.MustCompile("^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
	labelName  = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)
)

// ownHeaders are set by who sends, or have keys of their own.
var ownHeaders = map[string]string{
	"authorization":       "use bearer_token_file or basic_auth",
	"proxy-authorization": "leave it out",
	"connection":          "leave it out",
	"content-encoding":    "leave it out",
	"content-length":      "leave it out",
	"content-type":        "leave it out",
	"host":                "leave it out",
	"transfer-encoding":   "leave it out",
}

// header checks a header. The value may be secret.
func header(name, text string) error {
	if !headerName.MatchString(name) {
		return fmt.Errorf("%s is no name of a header", quote(name))
	}
	if instead := ownHeaders[strings.ToLower(name)]; instead != "" {
		return fmt.Errorf("the header is not yours to set; %s", instead)
	}
	if !printable(text) {
		return errors.New("the value has a character that no header can have")
	}
	return nil
}

// ownLabels are those that tell alerts apart.
var ownLabels = []string{"alertname", "limit", "stage", "side", "proxy", "server", "port", "peer", "process", "netns"}

func label(name, text string) error {
	switch {
	case !labelName.MatchString(name) || strings.HasPrefix(name, "__"):
		return fmt.Errorf("%s is no name of a label; write letters, digits and _", quote(name))
	case slices.Contains(ownLabels, name):
		return fmt.Errorf("the label %s tells alerts apart; take another name", name)
	case text == "":
		return errors.New("a label without a value is none; leave it out")
	}
	return nil
}

const (
	// maxFile bounds the files that are named, in bytes: all certificates that a
	// system trusts are a quarter of this.
	maxFile = 1 << 20
	// maxSecret bounds those that hold a secret.
	maxSecret = 64 << 10
)

// file reads the path of a file that has to be there and hold what check, if
// any, expects. Its errors do not quote what it holds.
func file(to *string, check func([]byte) error) func(*reader, value) {
	return func(r *reader, v value) {
		problems := len(r.problems)
		one(to, absolute)(r, v)
		if !r.files || len(r.problems) > problems {
			return
		}
		text, err := readFile(*to, maxFile)
		if err == nil && len(bytes.TrimSpace(text)) == 0 {
			err = errors.New("is empty")
		}
		if err == nil && check != nil {
			err = check(bytes.TrimSpace(text))
		}
		if err != nil {
			r.refuse(v, "%s: %v", quote(*to), err)
		}
	}
}

// stateFile reads the path of a file that the daemon writes.
func stateFile(to *string) func(*reader, value) {
	return func(r *reader, v value) {
		one(to, absoluteOrNone)(r, v)
		if info, err := os.Stat(*to); r.files && err == nil && !info.Mode().IsRegular() {
			r.refuse(v, "%s: is no regular file", quote(*to))
		}
	}
}

// aLine checks that there is one line.
func aLine(text []byte) error {
	if len(text) > maxSecret || !printable(string(text)) {
		return errors.New("one line of text was expected in it")
	}
	return nil
}

func aURL(text []byte) error {
	if err := aLine(text); err != nil {
		return err
	}
	if _, err := webURL(string(text)); err != nil {
		return fmt.Errorf("in it: %w", err)
	}
	return nil
}

func certificates(text []byte) error {
	if !x509.NewCertPool().AppendCertsFromPEM(text) {
		return errors.New("it holds no certificate (PEM)")
	}
	return nil
}
