// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

const (
	pileConfig = `
global
	maxconn 110
defaults
	mode tcp
	timeout connect 5s
	timeout client 1h
	timeout server 1h
frontend proxy-https
	bind *:443
	maxconn 50
	default_backend app
backend app
	server web1 127.0.0.1:8443
`
	worker2     = "127.0.0.22" // where the silent clients are
	pile        = 40
	pileTimeout = 2 * time.Second // tcp_fin_timeout
	cure        = 3 * time.Second // the client-fin that is added
)

// TestPileUp is the incident that fintrace began with: silent clients of one
// address fill a frontend, and what is to be done about it works.
func TestPileUp(t *testing.T) {
	kerneltest.Require(t)
	versions := haproxytest.Versions(t)
	var spaces []*kerneltest.Namespace // one for each
	for range versions {
		ns := kerneltest.NewNamespace(t)
		finTimeout(t, ns, int(pileTimeout.Seconds()))
		spaces = append(spaces, ns)
	}
	tr := traceJSON(t, spaces)
	t.Run("all", func(t *testing.T) {
		for i, v := range versions {
			t.Run(v.Name, func(t *testing.T) {
				t.Parallel()
				testPileUp(t, tr, v, spaces[i])
			})
		}
	})
}

func testPileUp(t *testing.T, tr *jsonTrace, v haproxytest.Version, ns *kerneltest.Namespace) {
	var origin net.Listener
	var err error
	ns.Do(func() { origin, err = net.Listen("tcp4", "127.0.0.1:8443") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { origin.Close() })
	h := haproxytest.Start(t, ns, v, haproxytest.MasterWorker, pileConfig)
	old := h.Worker()
	// silent makes clients whose server closes, and who never do.
	silent := func(n int) (keys []flowKey) {
		for range n {
			client, server := through(t, ns, worker2, "127.0.0.1:443", origin)
			server.Close()
			keys = append(keys, flowKey{ns.Inode, client.RemoteAddr().String(), client.LocalAddr().String()})
		}
		return keys
	}
	before := time.Now()
	keys := silent(pile)
	after := time.Now()

	const unset = "haproxy.cfg:7 defaults timeout client 1h (client-fin unset)"
	for _, key := range keys {
		r := tr.await(t, key, "overdue")
		if r.Limit != pileTimeout.Seconds() || r.LimitSource != unset+"; net.ipv4.tcp_fin_timeout 2s" {
			t.Fatalf("past %v by %q", r.Limit, r.LimitSource)
		}
	}
	listed := list(t, ns)
	if len(listed) != pile {
		t.Fatalf("%d connections are listed, want %d", len(listed), pile)
	}
	for _, r := range listed {
		peer, _, _ := net.SplitHostPort(r.Remote)
		want := report.Place{Proxy: "proxy-https", Side: "client"}
		got := *r.HAProxy
		if got.Timeout == nil || *got.Timeout != time.Hour.Seconds() {
			t.Fatalf("HAProxy ends it after %v s, want an hour", got.Timeout)
		}
		got.Timeout = nil
		if fmt.Sprint(got) != fmt.Sprint(want) || peer != worker2 || r.Stage != "held" || r.Side != "inbound" || int(r.PID) != old {
			t.Fatalf("%+v, want a client held by %d", r, old)
		}
		if since := r.Since; since.Before(before.Add(-early)) || since.After(after.Add(late)) {
			t.Errorf("since %s, want %s to %s", clock(since), clock(before), clock(after))
		}
		if !strings.HasPrefix(r.LimitSource, unset) || !r.Overdue {
			t.Errorf("limit %q, overdue %v", r.LimitSource, r.Overdue)
		}
	}
	groups := output(t, "list", "--group-by", "proxy,peer,process", "--stage", "held", "--side", "inbound", "--netns", inode(ns))
	want := fmt.Sprintf("proxy-https %s haproxy[%d] %d %d ", worker2, old, pile, pile)
	if !strings.Contains(strings.Join(strings.Fields(groups), " "), want) {
		t.Errorf("want %s in\n%s", want, groups)
	}
	if n := currConns(t, h.Ask("show info")); n != pile {
		t.Errorf("they take %d of the frontend's connections, want %d", n, pile)
	}
	if text := output(t, "check", "--haproxy-config", h.ConfigPath()); !strings.Contains(text, "client-fin-unset") || !strings.Contains(text, "timeout client-fin 60s") {
		t.Errorf("check does not see it:\n%s", text)
	}

	h.WriteConfig(strings.Replace(pileConfig, "timeout client 1h", "timeout client 1h\n\ttimeout client-fin 3s", 1))
	h.Reload()
	for _, key := range silent(5) {
		moved := tr.await(t, key, "moved")
		if moved.HAProxy == nil || moved.HAProxy.Old || moved.HAProxy.Proxy != "proxy-https" || int(moved.PID) != h.Worker() {
			t.Fatalf("it is of %+v", moved)
		}
		closed := tr.await(t, key, "closed")
		if timeout := moved.HAProxy.Timeout; timeout == nil || *timeout != cure.Seconds() {
			t.Errorf("HAProxy is said to end it after %v s, want %v", timeout, cure)
		}
		// HAProxy 3.0 and later count from the last activity, which was just before.
		if held := seconds(*closed.Held); held < cure-late || held > cure+late {
			t.Errorf("held for %v, want %v", held, cure)
		}
		if total, want := seconds(closed.Duration), cure+pileTimeout; total < want-late || total > cure+pileTimeout*9/8+late {
			t.Errorf("gone after %v, want %v", total, want)
		}
	}
	// What the old worker runs with is no longer in its file: it is not guessed.
	listed = list(t, ns)
	if len(listed) != pile {
		t.Errorf("the old worker holds %d, want %d", len(listed), pile)
	}
	for _, r := range listed {
		if int(r.PID) != old || !r.HAProxy.Old || !strings.Contains(r.LimitSource, fmt.Sprintf("changed since haproxy %d started", old)) || r.HAProxy.Timeout != nil {
			t.Fatalf("of the old worker's: %q", r.LimitSource)
		}
	}
}

// list is what `fintrace list` has of a namespace.
func list(t *testing.T, ns *kerneltest.Namespace) (records []report.Record) {
	t.Helper()
	out := json.NewDecoder(strings.NewReader(output(t, "list", "-o", "json", "--stage", "held", "--side", "inbound", "--netns", inode(ns))))
	for out.More() {
		var r report.Record
		if err := out.Decode(&r); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	return records
}

func inode(ns *kerneltest.Namespace) string { return strconv.FormatUint(uint64(ns.Inode), 10) }

// output is what fintrace prints; an exit code is not looked at.
func output(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("fintrace", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("fintrace %s: %v: %s", args, err, &stderr)
	}
	return string(out)
}
