// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"testing"
)

// FuzzFlags: a command line is taken, or refused in one line.
func FuzzFlags(f *testing.F) {
	for _, s := range []string{
		"list --port 443 --peer 10.0.0.0/8 --side inbound --stage held --min-duration 1m -o json --group-by peer,port",
		"trace --all-states --duration 5s --ring-bytes 4096 --limit 10s", "diagnose -o nagios --duration 0 --anonymize",
		"list --port", "list --port 0", "list -o yaml", "list --group-by who", "trace --ring-bytes 4097", "check -f a -f b",
		"daemon --check --config", "version --features=x", "demo --duration -1s", "frobnicate", "", "-", "--",
	} {
		f.Add(s)
	}
	e := env{stdout: io.Discard, stderr: io.Discard, getenv: func(string) string { return "" }}
	f.Fuzz(func(t *testing.T, line string) {
		if strings.Contains(line, "netns") {
			t.Skip("it opens what it names")
		}
		cmd, rest, err := commands(e).Find(strings.Fields(line))
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err == nil {
			return
		}
		if text := flagError(cmd, err).Error(); strings.ContainsAny(text, "\x1b\x00") || strings.Count(text, "\n") > 0 {
			t.Errorf("%q is refused with %q", line, text)
		}
	})
}
