// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// checkRecord is what the tests look at of check's JSON.
type checkRecord struct {
	Kind, Severity, ID, Title string
	Where                     []struct{ File, Text string }
	Looked                    []string `json:"looked_at"`
	Exit                      int
}

// check runs it and returns its findings by ID and its last record.
func check(t *testing.T, args ...string) (findings map[string]checkRecord, summary checkRecord) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	e := env{stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }}
	code := run(context.Background(), e, append([]string{"check", "-o", "json"}, args...))
	if stderr.Len() > 0 {
		t.Errorf("on stderr: %s", &stderr)
	}
	findings = map[string]checkRecord{}
	for in := json.NewDecoder(&stdout); ; {
		var r checkRecord
		if err := in.Decode(&r); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if r.Kind == "finding" {
			findings[r.ID] = r
		} else {
			summary = r
		}
	}
	if summary.Kind != "check" || summary.Exit != code {
		t.Errorf("exit code %d, and the last record %+v", code, summary)
	}
	return findings, summary
}

// A HAProxy in another namespace, whose maxconn is not that of its file.
func TestCheckRunning(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	ns.Sysctl(t, "net.ipv4.tcp_fin_timeout", "65")
	h := haproxytest.Start(t, ns, haproxytest.System(t), haproxytest.MasterWorker, `
global
    maxconn 300
defaults
    mode tcp
    maxconn 100
    timeout client 1h
    timeout server 30s
    timeout connect 5s
frontend web
    bind 127.0.0.1:8001
`, "-n", "200")

	findings, summary := check(t, "-f", h.ConfigPath(), "--haproxy-socket", h.SocketPath())
	for id, want := range map[string]string{
		"running-configuration-differs": "has maxconn 200 in force, and its file says 300",
		"global-maxconn-no-room":        "global maxconn 200 is exactly twice the 100",
		"client-fin-unset":              "holds its slot for 1h",
		"timeout-client-hours":          "timeout client is 1h",
		"tcp-fin-timeout-trap":          "tcp_fin_timeout 65 gives closed connections 10s",
	} {
		if got := findings[id].Title; !strings.Contains(got, want) {
			t.Errorf("%s: %q, not %q", id, got, want)
		}
	}
	if looked := strings.Join(summary.Looked, "\n"); !strings.Contains(looked, h.ConfigPath()+" of HAProxy "+h.Version.String()) {
		t.Errorf("looked at %q", looked)
	}
	if summary.Exit != 1 {
		t.Errorf("exit code %d: %+v", summary.Exit, findings)
	}

	// Without flags it finds this one among what runs on the host.
	all, summary := check(t)
	found := false
	for _, looked := range summary.Looked {
		found = found || strings.Contains(looked, h.ConfigPath())
	}
	if !found || len(all) == 0 {
		t.Errorf("looked at %q", summary.Looked)
	}
}

// What is fine gets one line, in a namespace with the kernel's defaults.
func TestCheckClean(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	path := t.TempDir() + "/haproxy.cfg"
	text := "global\n maxconn 220\ndefaults\n mode tcp\n maxconn 100\n timeout client 30s\n timeout server 30s\n" +
		" timeout connect 5s\nfrontend web\n bind :8001\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	e := env{stdout: &stdout, stderr: &stderr, getenv: func(string) string { return "" }}
	var code int
	ns.Do(func() {
		code = run(context.Background(), e, []string{"check", "-f", path, "--haproxy-version", "2.6"})
	})
	if want := "Nothing to change in " + path + " of HAProxy 2.6.\n"; code != 0 || strings.Join(strings.Fields(stdout.String()), " ")+"\n" != want || stderr.Len() > 0 {
		t.Errorf("exit code %d\n%s%s", code, &stdout, &stderr)
	}
}
