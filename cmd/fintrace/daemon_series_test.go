// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// series is one of an exposition, without its value.
type series struct {
	name   string
	labels map[string]string
}

// key is its name and those of its labels.
func (s series) key() string {
	return s.name + "{" + strings.Join(slices.Sorted(maps.Keys(s.labels)), ",") + "}"
}

// exposed are the series of an exposition in Prometheus's text.
func exposed(t *testing.T, text []byte) (all []series) {
	t.Helper()
	line := regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? \S+\n$`)
	label := regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"`)
	for l := range strings.Lines(string(text)) {
		if strings.HasPrefix(l, "#") {
			continue
		}
		m := line.FindStringSubmatch(l)
		if m == nil {
			t.Fatalf("no series: %q", l)
		}
		s := series{m[1], map[string]string{}}
		for _, m := range label.FindAllStringSubmatch(m[2], -1) {
			s.labels[m[1]] = m[2]
		}
		all = append(all, s)
	}
	return all
}

// What a series is counted as in the README's table.
const (
	ofHistograms = "histograms"
	ofPort       = "a port"
	ofLimit      = "a limit"
	ofHAProxy    = "a configuration"
	ofFrontend   = "a frontend"
	ofNetns      = "a network namespace"
	ofOrphans    = "the orphans"
	ofSink       = "a sink"
	ofRuntime    = "Go and the process"
	ofItself     = "its own"
)

func (s series) row() string {
	has := func(label string) bool { _, has := s.labels[label]; return has }
	switch {
	case !strings.HasPrefix(s.name, "fintrace_"):
		return ofRuntime
	case strings.Contains(s.name, "_duration_seconds_"):
		return ofHistograms
	case has("limit"):
		return ofLimit
	case has("port"):
		return ofPort
	case has("haproxy") && has("proxy"):
		return ofFrontend
	case has("haproxy"):
		return ofHAProxy
	case has("netns"):
		return ofNetns
	case has("sink"):
		return ofSink
	case strings.HasPrefix(s.name, "fintrace_orphans"):
		return ofOrphans
	}
	return ofItself
}

// rows are the figures of the README's table, of one of each.
func rows(t *testing.T) (of map[string]int, native int) {
	t.Helper()
	text, err := os.ReadFile("../../deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	of = map[string]int{}
	says := func(expr string, names ...string) {
		m := regexp.MustCompile(expr).FindSubmatch(text)
		if m == nil {
			t.Fatalf("deploy/README.md does not say %s", expr)
		}
		for i, name := range names {
			if of[name], err = strconv.Atoi(string(m[i+1])); err != nil {
				t.Fatal(err)
			}
		}
	}
	says(`(?m)^\| fixed: (\d+) of histograms .*, (\d+) of its own, (\d+) of Go and the process \| (\d+) \|$`, ofHistograms, ofItself, ofRuntime, "fixed")
	says(`(?m)^\| each port, .* \| (\d+) \|$`, ofPort)
	says(`(?m)^\| \.\.\. and of each stage and limit .* \| (\d+) \|$`, ofLimit)
	says(`(?m)^\| each HAProxy configuration; each of its frontends .* \| (\d+); (\d+) \|$`, ofHAProxy, ofFrontend)
	says(`(?m)^\| each network namespace; the orphans \| (\d+); (\d+) \|$`, ofNetns, ofOrphans)
	says(`(?m)^\| each sink \| (\d+) \|$`, ofSink)
	says(`make (\d+) of the (\d+):`, "native", "classic")
	if sum := of[ofHistograms] + of[ofItself] + of[ofRuntime]; sum != of["fixed"] || of["classic"] != of[ofHistograms] {
		t.Errorf("deploy/README.md adds up wrong: %v", of)
	}
	native = of["native"]
	delete(of, "native")
	delete(of, "classic")
	delete(of, "fixed")
	return of, native
}

// checkExposition compares what the daemon exposes with what others say of it:
// promtool, the golden file that the rules and dashboards are held to, and the
// README, which says how many series there are.
func checkExposition(t *testing.T, promtool string, d *daemonProcess, p prometheus, config, proxy, netns string) {
	t.Helper()
	scrape := func() []byte {
		code, body := d.get("/metrics")
		if code != http.StatusOK {
			t.Fatalf("/metrics: %d %s", code, body)
		}
		return body
	}
	body := scrape()
	lint := exec.Command(promtool, "check", "metrics")
	lint.Stdin = bytes.NewReader(body)
	if out, err := lint.CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}

	all := exposed(t, body)
	golden, err := os.ReadFile("../../internal/metrics/testdata/busy.prom")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, s := range all {
		there[s.key()] = true
	}
	for _, s := range exposed(t, golden) {
		if !there[s.key()] {
			t.Errorf("there is no %s, which the golden file has", s.key())
			there[s.key()] = true // said
		}
	}

	// Those of this test alone: of others on the host not all may be known.
	want, native := rows(t)
	count := map[string]int{}
	for _, s := range all {
		mine := true
		switch row := s.row(); row {
		case ofPort:
			mine = s.labels["port"] == "443" && s.labels["proxy"] == proxy
		case ofLimit, ofFrontend:
			mine = s.labels["proxy"] == proxy && s.labels["side"] != "outbound"
		case ofHAProxy:
			mine = s.labels["haproxy"] == config
		case ofNetns:
			mine = s.labels["netns"] == netns
		case ofSink:
			mine = s.labels["sink"] == "log"
		}
		if mine {
			count[s.row()]++
		}
	}
	for row, want := range want {
		if count[row] != want {
			t.Errorf("%s: %d series, and deploy/README.md says %d", row, count[row], want)
		}
	}

	// What Prometheus takes in, with native histograms. Others on the host may
	// come and go between the two.
	total, samples, ok := 0, 0.0, false
	err = await("Prometheus to take in what is exposed", func() bool {
		total = len(exposed(t, scrape())) - want[ofHistograms] + native
		samples, ok = p.value(`scrape_samples_scraped{job="fintrace"}`)
		return ok && int(samples) == total
	})
	if err != nil {
		t.Errorf("%v: it takes %v samples of %d, %v", err, samples, total, ok)
	}
	took, _ := p.value(`max_over_time(scrape_duration_seconds{job="fintrace"}[1m])`)
	t.Logf("%v samples with native histograms, %d series without; the longest scrape took %.3f s", samples, total+want[ofHistograms]-native, took)
}
