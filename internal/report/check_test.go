// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
)

// situation is a configuration, and in comments at its head what is known beside it:
//
//	# version 2.6.12
//	# info pid 123 maxconn 200 ulimit-n 500
//	# changed
//	# netns 4026532245
//	# sysctl net.ipv4.tcp_fin_timeout 65
func situation(t *testing.T, name string) Checked {
	text, err := os.ReadFile(filepath.Join("testdata/check", name+".cfg"))
	if err != nil {
		t.Fatal(err)
	}
	p := haproxy.Process{}
	sysctls := events.Sysctls{}
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if words[0] != "#" {
			break
		}
		switch words[1] {
		case "version":
			if p.Version, err = haproxy.ParseVersion(words[2]); err != nil {
				t.Fatal(err)
			}
		case "changed":
			p.Changed = true
		case "netns":
			p.Netns = uint32(number(words[2]))
		case "sysctl":
			sysctls[words[2]] = number(words[3])
		case "info":
			p.Info = &haproxy.Info{Maxconn: -1, UlimitN: -1, Nbthread: -1}
			for i := 2; i < len(words); i += 2 {
				switch n := number(words[i+1]); words[i] {
				case "pid":
					p.PID = n
				case "maxconn":
					p.Info.Maxconn = n
				case "ulimit-n":
					p.Info.UlimitN = n
				}
			}
		default:
			t.Fatalf("%s: what is %q?", name, line)
		}
	}
	p.Config, err = haproxy.Parse([]haproxy.Source{{Name: "/etc/haproxy/haproxy.cfg", Text: text}}, haproxy.Options{Version: p.Version})
	if err != nil {
		t.Fatal(err)
	}
	return Checked{
		Processes: []haproxy.Process{p},
		Sysctls:   map[uint32]events.Sysctls{p.Netns: sysctls},
		OwnNetns:  1,
		Netns:     names.Netns,
	}
}

// checked is what a check of it prints, as text and as JSON.
func checked(t *testing.T, in Checked) string {
	findings, unlooked := Check(in)
	var b bytes.Buffer
	summary := NewCheckSummary(findings, []string{"haproxy.cfg"}, unlooked)
	if err := PrintCheck(&b, findings, summary, Style{}); err != nil {
		t.Fatal(err)
	}
	b.WriteString("----\n")
	out := json.NewEncoder(&b)
	for _, f := range findings {
		if err := out.Encode(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := out.Encode(summary); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestCheck has a configuration for each rule, and for its edges.
func TestCheck(t *testing.T) {
	files, err := filepath.Glob("testdata/check/*.cfg")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".cfg")
		t.Run(name, func(t *testing.T) {
			got := checked(t, situation(t, name))
			golden.Check(t, "testdata/check/"+name+".txt", got)
			text, _, _ := strings.Cut(got, "----")
			for line := range strings.Lines(text) {
				// What is to be pasted is not wrapped, nor what has no space.
				if n := utf8.RuneCountInString(line) - 1; n > 80 && strings.Contains(strings.TrimSpace(line), " ") {
					t.Errorf("%d columns: %s", n, line)
				}
			}
		})
	}
}

// The forum thread's arithmetic, and the same spelled out.
func TestThreadMaxconn(t *testing.T) {
	var found []Finding
	for _, name := range []string{"thread", "spelled-out"} {
		findings, _ := Check(situation(t, name))
		for _, f := range findings {
			if f.ID == "global-maxconn-no-room" {
				f.Where = nil // which differs
				found = append(found, f)
			}
		}
	}
	if len(found) != 2 {
		t.Fatalf("%d of 2 match without room", len(found))
	}
	if a, b := fmt.Sprint(found[0]), fmt.Sprint(found[1]); a != b {
		t.Errorf("%s\n%s", a, b)
	}
	if got := strings.Join(found[0].Fix[0].Lines, "\n"); got != "    maxconn 110" {
		t.Errorf("suggested %q", got)
	}
}

func TestRoomy(t *testing.T) {
	for _, test := range []struct{ sum, want int }{
		{1, 3}, {5, 11}, {10, 22}, {50, 110}, {60, 132}, {454, 999}, {455, 1010}, {1234, 2720}, {2000, 4400}, {100_000, 220_000},
	} {
		if got := roomy(test.sum); got != test.want {
			t.Errorf("roomy(%d) = %d, want %d", test.sum, got, test.want)
		}
	}
}

func TestSpan(t *testing.T) {
	for _, test := range []struct {
		d    time.Duration
		want string
	}{
		{500 * time.Millisecond, "500ms"}, {time.Second, "1s"}, {time.Minute, "60s"}, {90 * time.Second, "90s"}, {2 * time.Minute, "2m"},
		{5 * time.Minute, "5m"}, {time.Hour, "1h"}, {90 * time.Minute, "1h30m"}, {48 * time.Hour, "2d"}, {61*time.Hour + time.Second, "2d13h1s"},
	} {
		if got := span(test.d); got != test.want {
			t.Errorf("span(%v) = %q, want %q", test.d, got, test.want)
		}
	}
}

func TestExitCode(t *testing.T) {
	for _, test := range []struct {
		severities []Severity
		want       int
	}{
		{nil, 0}, {[]Severity{Info}, 0}, {[]Severity{Warning, Info}, 1}, {[]Severity{Info, Warning, Critical, Warning}, 2},
	} {
		var findings []Finding
		for _, s := range test.severities {
			findings = append(findings, Finding{Severity: s})
		}
		if got := ExitCode(findings); got != test.want {
			t.Errorf("%v: %d, want %d", test.severities, got, test.want)
		}
	}
	if got := NewCheckSummary(nil, nil, []string{"all"}).Exit; got != 3 {
		t.Errorf("nothing looked at: %d, want 3", got)
	}
}

// Workers of one HAProxy say the same once; another configuration speaks for itself.
func TestCheckProcesses(t *testing.T) {
	in := situation(t, "fin-long")
	one, _ := Check(in)
	in.Processes = append(in.Processes, in.Processes[0])
	if two, _ := Check(in); len(two) != len(one) || len(one) == 0 {
		t.Errorf("%d findings, and of two workers %d", len(one), len(two))
	}
	other := situation(t, "fin-never").Processes[0]
	other.Config.Files[0] = "/srv/other.cfg"
	alone, _ := Check(Checked{Processes: []haproxy.Process{other}})
	in.Processes[1] = other
	if two, _ := Check(in); len(two) != len(one)+len(alone) {
		t.Errorf("%d and %d findings, and together %d", len(one), len(alone), len(two))
	}
}

func TestSortFindings(t *testing.T) {
	at := func(s Severity, file string, line int) Finding {
		return Finding{Severity: s, Where: []Location{{Pos: haproxy.Pos{File: file, Line: line}}}}
	}
	findings := []Finding{{ID: "sysctl"}, at(Info, "b", 1), at(Warning, "b", 7), at(Warning, "a", 9), at(Warning, "a", 2), {Severity: Critical}}
	SortFindings(findings, []string{"a", "b"})
	var got []string
	for _, f := range findings {
		pos := haproxy.Pos{}
		if len(f.Where) > 0 {
			pos = f.Where[0].Pos
		}
		got = append(got, fmt.Sprintf("%s %s", f.Severity, pos))
	}
	if want := "critical :0, warning a:2, warning a:9, warning b:7, info b:1, info :0"; strings.Join(got, ", ") != want {
		t.Errorf("got %s", strings.Join(got, ", "))
	}
}

func TestFindingColour(t *testing.T) {
	var plain, colourful bytes.Buffer
	findings, _ := Check(situation(t, "fin-never"))
	for _, err := range []error{Findings(&plain, findings, Style{Width: 60}), Findings(&colourful, findings, Style{Width: 60, Color: true})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(colourful.String(), "\x1b[31;1mCRITICAL\x1b[0m") {
		t.Error("what is critical is not red")
	}
	if got := strings.NewReplacer("\x1b[31;1m", "", "\x1b[0m", "").Replace(colourful.String()); got != plain.String() {
		t.Errorf("colour moves text:\n%s\n%s", got, &plain)
	}
	for line := range strings.Lines(plain.String()) {
		if n := utf8.RuneCountInString(line) - 1; n > 60 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}
