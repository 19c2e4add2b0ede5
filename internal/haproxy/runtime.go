// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Limits on what is asked of a runtime socket: HAProxy answers within
// milliseconds, and tells of ten thousand servers in some megabytes.
const (
	askTime        = 2 * time.Second
	maxAnswerBytes = 32 << 20
)

// Ask sends a line to a runtime socket and returns all of its answer. Address
// is as HAProxy writes it: /run/haproxy/admin.sock, abns@name, ipv4@127.0.0.1:9999.
func Ask(ctx context.Context, address, line string) ([]byte, error) {
	return endpoint{address: address}.ask(ctx, line)
}

// An endpoint is a runtime socket as the process sees it that opened it.
type endpoint struct {
	view    view
	address string
}

func (e endpoint) ask(ctx context.Context, line string) (answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	deadline, _ := ctx.Deadline()
	limit := time.Until(deadline)
	defer func() {
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.EAGAIN) {
			if limit = limit.Round(100 * time.Millisecond); limit > 0 {
				err = fmt.Errorf("no answer in %v: is haproxy stopped, or overloaded?", limit)
			} else {
				err = errors.New("not asked, as others before it took all the time")
			}
		}
		if err != nil {
			err = e.explain(err)
		}
	}()
	conn, err := e.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return nil, err
	}
	// A master waits for more commands until it is told that there are none.
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		if err := c.CloseWrite(); err != nil {
			return nil, err
		}
	}
	answer, err = io.ReadAll(io.LimitReader(conn, maxAnswerBytes+1))
	if err == nil && len(answer) > maxAnswerBytes {
		err = errAnswerTooLong
	}
	return answer, err
}

var (
	errAnswerTooLong = fmt.Errorf("its answer is longer than %d MB", maxAnswerBytes>>20)
	errNoSocket      = errors.New("that is not a socket: give the address of `stats socket` in haproxy's global section")
	errNoAddress     = errors.New("that is not an address that can be connected to: use one such as /run/haproxy/admin.sock or ipv4@127.0.0.1:9999")
	errMasterSocket  = errors.New("that is a master's socket (-S): give the address of `stats socket` in haproxy's global section")
)

// explain makes one line of what went wrong, with how to mend it.
func (e endpoint) explain(err error) error {
	text := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		text = "it does not exist: is haproxy running, with that `stats socket` in its global section?"
	case errors.Is(err, fs.ErrPermission):
		text = "permission denied: run as root, or as a user whom the mode of `stats socket` lets in"
	case errors.Is(err, syscall.ECONNREFUSED):
		text = "nobody listens there: haproxy has ended, or has opened another since"
	default:
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		text = err.Error()
	}
	return fmt.Errorf("haproxy runtime socket %s: %s", e.address, text)
}

func (e endpoint) dial(ctx context.Context) (net.Conn, error) {
	var dialer net.Dialer
	where := strings.TrimPrefix(e.address, "stream+")
	kind, name, _ := strings.Cut(where, "@")
	switch {
	case strings.HasPrefix(where, "/"):
		return e.dialPath(ctx, where)
	case kind == "unix" || kind == "uxst":
		return e.dialPath(ctx, name)
	case kind == "abns":
		// HAProxy's name is as long as names can be.
		if len(name) >= abstractName {
			return nil, errNoAddress
		}
		return dialer.DialContext(ctx, "unix", "@"+name+strings.Repeat("\x00", abstractName-1-len(name)))
	case kind == "abnsz":
		return dialer.DialContext(ctx, "unix", "@"+name)
	}
	a, wrong := parseAddress(where, portNeeded)
	if wrong != "" || !a.tcp || a.first != a.last {
		return nil, errNoAddress
	}
	host := strings.Trim(a.host, "[]")
	switch {
	case a.ip.IsValid() && a.ip.IsUnspecified() && a.ip.Is4():
		host = "127.0.0.1"
	case a.ip.IsValid() && a.ip.IsUnspecified():
		host = "::1"
	case a.ip.IsValid():
		host = a.ip.String()
	}
	return dialer.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(a.first)))
}

// abstractName is sizeof(sun_path), whose first byte is 0 in abstract names.
const abstractName = 108

// dialPath connects to what has that name in the view, through a handle on
// it: that way its path is never too long, and no link leads out of the view.
func (e endpoint) dialPath(ctx context.Context, name string) (net.Conn, error) {
	at, info, err := e.view.find(name)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if info.Mode().Type() != fs.ModeSocket {
		return nil, errNoSocket
	}
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", handle(at))
}

// isLocal says whether the address means something in one network namespace alone.
func (e endpoint) isLocal() bool {
	where := strings.TrimPrefix(e.address, "stream+")
	kind, _, _ := strings.Cut(where, "@")
	return !strings.HasPrefix(where, "/") && kind != "unix" && kind != "uxst"
}

// isInherited says whether it is a descriptor that only HAProxy's own have.
func (e endpoint) isInherited() bool {
	kind, _, _ := strings.Cut(e.address, "@")
	return kind == "fd" || kind == "sockpair"
}

// An account is what a process says of itself.
type account struct {
	info    *Info
	stats   []ProxyStat
	servers []ServerAddr
}

// query asks for all of an account in one connection, so that it is of one
// process. Before each question stands prefix, "@!PID " for a master to pass it on.
func (e endpoint) query(ctx context.Context, prefix string) (account, error) {
	answer, err := e.ask(ctx, prefix+"show info;"+prefix+"show stat;"+prefix+"show servers state")
	if err != nil {
		return account{}, err
	}
	a := parseAccount(answer)
	if a.info == nil {
		err := fmt.Errorf("what answers is not haproxy: %q", beginning(answer))
		if bytes.HasPrefix(answer, []byte("Unknown command")) && bytes.Contains(answer, []byte("show proc")) {
			err = errMasterSocket
		}
		return account{}, e.explain(err)
	}
	return a, nil
}

func beginning(answer []byte) []byte {
	line, _, _ := bytes.Cut(answer, []byte("\n"))
	return line[:min(len(line), 60)]
}

// parseAccount reads the answers, of which each ends with an empty line. One
// that HAProxy refuses or does not know is absent. The plain forms are read:
// all versions have them, columns have names, and the typed ones are several
// times as long.
func parseAccount(answer []byte) account {
	var a account
	for len(answer) > 0 {
		var part []byte
		part, answer, _ = bytes.Cut(answer, []byte("\n\n"))
		part = bytes.TrimLeft(part, "\n")
		switch {
		case bytes.HasPrefix(part, []byte("Name: ")) && a.info == nil:
			a.info = parseInfo(string(part))
		case bytes.HasPrefix(part, []byte("# pxname,")) && a.stats == nil:
			a.stats = parseStats(part[len("# "):])
		case bytes.Contains(part[:min(len(part), 20)], []byte("\n# be_id ")) && a.servers == nil:
			a.servers = parseServers(string(part))
		}
	}
	return a
}

// parseInfo reads "show info", nil if it is none.
func parseInfo(text string) *Info {
	values := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		if name, value, ok := strings.Cut(line, ": "); ok && values[name] == "" {
			values[name] = strings.TrimSpace(value)
		}
	}
	number := func(name string) int { return numberOr(values[name], -1) }
	info := &Info{
		Version:     versionOf(values["Version"]),
		PID:         number("Pid"),
		Maxconn:     number("Maxconn"),
		HardMaxconn: number("Hard_maxconn"),
		UlimitN:     number("Ulimit-n"),
		CurrConns:   number("CurrConns"),
		Nbthread:    number("Nbthread"),
		Stopping:    number("Stopping") > 0,
		UptimeSec:   number("Uptime_sec"),
	}
	if info.PID <= 0 {
		return nil
	}
	return info
}

// parseStats reads "show stat", a table in CSV.
func parseStats(text []byte) []ProxyStat {
	r := csv.NewReader(bytes.NewReader(text))
	r.FieldsPerRecord = -1
	r.LazyQuotes = true
	r.ReuseRecord = true
	header, err := r.Read()
	if err != nil {
		return nil
	}
	column := columns(header)
	stats := []ProxyStat{}
	for {
		row, err := r.Read()
		if err != nil {
			return stats // cut off, or done
		}
		field := func(name string) string {
			if i, ok := column[name]; ok && i < len(row) {
				return strings.Clone(row[i])
			}
			return ""
		}
		s := ProxyStat{
			Proxy: field("pxname"), Server: field("svname"), Addr: field("addr"), Status: field("status"),
			Scur: numberOr(field("scur"), -1), Smax: numberOr(field("smax"), -1), Slim: numberOr(field("slim"), -1),
		}
		if s.Proxy != "" && s.Server != "" {
			stats = append(stats, s)
		}
	}
}

// parseServers reads "show servers state": a version, the names of its
// columns, and a line for each server.
func parseServers(text string) []ServerAddr {
	_, text, _ = strings.Cut(text, "\n")
	header, text, _ := strings.Cut(text, "\n")
	column := columns(strings.Fields(strings.TrimPrefix(header, "#")))
	servers := []ServerAddr{}
	for line := range strings.SplitSeq(text, "\n") {
		fields := strings.Fields(line)
		field := func(name string) string {
			if i, ok := column[name]; ok && i < len(fields) {
				return fields[i]
			}
			return ""
		}
		ip, err := netip.ParseAddr(field("srv_addr"))
		port, portErr := strconv.ParseUint(field("srv_port"), 10, 16)
		if err != nil || portErr != nil || strings.HasPrefix(line, "#") {
			continue // "-": it has no Internet address
		}
		servers = append(servers, ServerAddr{
			Backend: field("be_name"), Server: field("srv_name"), Addr: netip.AddrPortFrom(ip, uint16(port)),
		})
	}
	return servers
}

func columns(names []string) map[string]int {
	column := make(map[string]int, len(names))
	for i, name := range names {
		if _, ok := column[name]; !ok {
			column[strings.Clone(name)] = i
		}
	}
	return column
}

func numberOr(text string, otherwise int) int {
	if n, err := strconv.Atoi(text); err == nil {
		return n
	}
	return otherwise
}
