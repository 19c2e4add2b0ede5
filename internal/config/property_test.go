// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	promconfig "github.com/prometheus/common/config"
	"pgregory.net/rapid"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// render writes settings as a file: JSON, which YAML takes.
func render(c *Config) []byte {
	type m = map[string]any
	httpKeys := func(sink m, h *promconfig.HTTPClientConfig) m {
		if h.BearerTokenFile != "" {
			sink["bearer_token_file"] = h.BearerTokenFile
		}
		if h.BasicAuth != nil {
			sink["basic_auth"] = m{"username": h.BasicAuth.Username, "password_file": h.BasicAuth.PasswordFile}
		}
		tls := m{}
		for name, text := range map[string]string{"ca_file": h.TLSConfig.CAFile, "cert_file": h.TLSConfig.CertFile,
			"key_file": h.TLSConfig.KeyFile, "server_name": h.TLSConfig.ServerName} {
			if text != "" {
				tls[name] = text
			}
		}
		if h.TLSConfig.InsecureSkipVerify {
			tls["insecure_skip_verify"] = true
		}
		if len(tls) > 0 {
			sink["tls"] = tls
		}
		return sink
	}
	rules, webhooks, managers := []m{}, []m{}, []m{}
	for i := range c.Limits {
		rules = append(rules, renderRule(&c.Limits[i]))
	}
	for _, w := range c.Sinks.Webhooks {
		sink := m{"name": w.Name, "headers": w.Headers, "timeout": w.Timeout.String()}
		if w.URL != "" {
			sink["url"] = w.URL
		} else {
			sink["url_file"] = w.URLFile
		}
		webhooks = append(webhooks, httpKeys(sink, &w.HTTP))
	}
	for _, a := range c.Sinks.Alertmanagers {
		managers = append(managers, httpKeys(m{"name": a.Name, "urls": a.URLs, "labels": a.Labels,
			"resend_every": a.ResendEvery.String(), "timeout": a.Timeout.String()}, &a.HTTP))
	}
	hap, web := m{}, m{"listen": append([]string{}, c.Web.Listen...)}
	if len(c.HAProxy.Config) > 0 {
		hap["config"] = c.HAProxy.Config
	}
	if c.HAProxy.Socket != "" {
		hap["socket"] = c.HAProxy.Socket
	}
	if c.Web.ConfigFile != "" {
		web["config_file"] = c.Web.ConfigFile
	}
	if c.Web.ExternalURL != "" {
		web["external_url"] = c.Web.ExternalURL
	}
	text, err := json.Marshal(m{
		"haproxy": hap, "limits": rules,
		"alerts": m{
			"min_connections": c.Alerts.MinConnections, "peers_per_group": c.Alerts.PeersPerGroup,
			"maxconn_share": strconv.FormatFloat(100*c.Alerts.MaxconnShare, 'g', -1, 64) + "%",
			"resolve_after": c.Alerts.ResolveAfter.String(), "update_every": c.Alerts.UpdateEvery.String(),
			"repeat_every": c.Alerts.RepeatEvery.String(), "state_file": c.Alerts.StateFile,
		},
		"sinks": m{"log": c.Sinks.Log, "webhooks": webhooks, "alertmanagers": managers},
		"web":   web, "log": m{"level": strings.ToLower(c.Log.Level.String()), "format": c.Log.Format},
		"shutdown_timeout": c.ShutdownTimeout.String(),
	})
	if err != nil {
		panic(err)
	}
	return text
}

func renderRule(r *limits.Rule) map[string]any {
	match := map[string]any{}
	if r.Match.Side != 0 {
		match["side"] = r.Match.Side.String()
	}
	if r.Match.Stage != 0 {
		match["stage"] = r.Match.Stage.String()
	}
	for name, values := range map[string][]string{
		"port": texts(r.Match.Ports), "local_port": texts(r.Match.LocalPorts), "remote_port": texts(r.Match.RemotePorts),
		"peer": texts(r.Match.Peers), "process": r.Match.Processes, "cgroup": r.Match.Cgroups, "proxy": r.Match.Proxies,
		"netns": append(texts(r.Match.Netns), r.Match.NetnsNames...),
	} {
		if len(values) > 0 {
			match[name] = values
		}
	}
	return map[string]any{"name": r.Name, "match": match, "fin_timeout": r.FinTimeout.String()}
}

// The domain in which rules are compared: for each value that a rule may have
// there are connections with it, and some with none of them.
var (
	somePorts   = []uint16{80, 443}
	someBlocks  = []string{"10.0.0.0/8", "10.1.0.0/16", "192.0.2.7/32", "0.0.0.0/0"}
	somePeers   = []string{"10.1.0.1", "10.2.0.1", "192.0.2.7", "203.0.113.1", "2001:db8::1"}
	someNames   = []string{"haproxy", "nginx"}
	someGroups  = []string{"/a", "/a/b", "/c"}
	someProxies = []string{"www", "api"}
)

func someRule(t *rapid.T, name string) limits.Rule {
	m := limits.Match{
		Side:  rapid.SampledFrom([]events.Side{0, 0, events.Inbound, events.Outbound}).Draw(t, "side"),
		Stage: rapid.SampledFrom([]events.Stage{0, 0, events.Held, events.Minisock}).Draw(t, "stage"),
	}
	few := func(name string) bool { return rapid.IntRange(0, 3).Draw(t, "with "+name) == 0 }
	if few("ports") {
		m.Ports = rapid.SliceOfNDistinct(rapid.SampledFrom(somePorts), 1, 2, rapid.ID).Draw(t, "ports")
	}
	if few("local ports") {
		m.LocalPorts = rapid.SliceOfNDistinct(rapid.SampledFrom(somePorts), 1, 2, rapid.ID).Draw(t, "local ports")
	}
	if few("remote ports") {
		m.RemotePorts = rapid.SliceOfNDistinct(rapid.SampledFrom(somePorts), 1, 2, rapid.ID).Draw(t, "remote ports")
	}
	if few("peers") {
		for _, block := range rapid.SliceOfNDistinct(rapid.SampledFrom(someBlocks), 1, 2, rapid.ID).Draw(t, "peers") {
			m.Peers = append(m.Peers, netip.MustParsePrefix(block))
		}
	}
	if few("processes") {
		m.Processes = rapid.SliceOfNDistinct(rapid.SampledFrom(append(someNames, "1")), 1, 2, rapid.ID).Draw(t, "processes")
	}
	if few("cgroups") {
		m.Cgroups = rapid.SliceOfNDistinct(rapid.SampledFrom(someGroups), 1, 2, rapid.ID).Draw(t, "cgroups")
	}
	if few("proxies") {
		m.Proxies = rapid.SliceOfNDistinct(rapid.SampledFrom(someProxies), 1, 2, rapid.ID).Draw(t, "proxies")
	}
	if few("namespaces") {
		m.Netns, m.NetnsNames = []uint32{1}, rapid.SampledFrom([][]string{nil, {"blue"}}).Draw(t, "names")
	}
	return limits.Rule{Name: name, Match: m, FinTimeout: time.Second}
}

// everyone calls use with every connection of the domain.
func everyone(use func(*limits.Subject)) {
	place := map[string]*haproxy.Place{"": nil}
	for _, name := range append(someProxies, "other") {
		place[name] = &haproxy.Place{Proxies: []*haproxy.Proxy{{Name: name}}}
	}
	for _, local := range append(somePorts, 1) {
		for _, remote := range append(somePorts, 2) {
			for _, peer := range somePeers {
				flow := events.Flow{
					Local:  events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), local)),
					Remote: events.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr(peer), remote)),
				}
				for _, name := range append(someNames, "other") {
					for cgroup := range uint64(4) {
						for _, proxy := range append(someProxies, "other", "") {
							if name != "haproxy" && proxy != "" {
								continue
							}
							process := events.Process{PID: uint32(len(name)), Cgroup: cgroup} // none of them is 1
							copy(process.Comm[:], name)
							for _, side := range []events.Side{events.Inbound, events.Outbound} {
								for stage := events.Held; stage <= events.Minisock; stage++ {
									for netns := range uint32(3) {
										use(&limits.Subject{Netns: netns + 1, Flow: &flow, Side: side, Stage: stage, Process: &process, Place: place[proxy]})
									}
								}
							}
						}
					}
				}
			}
		}
	}
}

var domain = limits.Names{
	Cgroup: func(id uint64) string { return []string{"/a", "/a/b", "/c/d", "/e"}[id] },
	Netns:  func(inode uint32) string { return []string{"", "", "blue", ""}[inode] },
}

// TestShadows: a rule that is refused because another leaves it nothing has
// nothing indeed; and what one other rule leaves nothing of is refused.
func TestShadows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := someRule(t, "a"), someRule(t, "b")
		if rapid.Bool().Draw(t, "alike") { // else few pairs of rules have to do with each other
			match := a.Match
			if rapid.Bool().Draw(t, "side too") {
				match.Side = b.Match.Side
			}
			if rapid.Bool().Draw(t, "peers too") {
				match.Peers = b.Match.Peers
			}
			if rapid.Bool().Draw(t, "cgroups too") {
				match.Cgroups = b.Match.Cgroups
			}
			b.Match = match
		}
		rules := limits.Rules{User: []limits.Rule{a, b}, Names: domain}
		alone := limits.Rules{User: []limits.Rule{b}, Names: domain}
		selected, left := false, false
		everyone(func(s *limits.Subject) {
			selected = selected || alone.Choose(s) != 0
			left = left || rules.Choose(s) == 2
		})
		refused := shadows(&a.Match, &b.Match)
		if refused && left {
			t.Fatalf("%+v is said to leave nothing of %+v, and does", a.Match, b.Match)
		}
		// What is one thing by two names, or by two keys, is not seen through.
		simple := len(a.Match.Ports) == 0 && len(a.Match.NetnsNames) == 0 && len(a.Match.Processes) == 0 && len(a.Match.Proxies) == 0 &&
			len(b.Match.Ports) == 0
		if simple && selected && !left && !refused {
			t.Fatalf("%+v leaves nothing of %+v, and is not said to", a.Match, b.Match)
		}
	})
}

// TestRoundTrip: what the good files say is the same when it is written anew.
func TestRoundTrip(t *testing.T) {
	texts := goodTexts(t)
	if len(texts) < 5 {
		t.Fatalf("only %d good files", len(texts))
	}
	for _, text := range texts {
		c, err := Parse("f", text)
		if err != nil {
			t.Fatal(err)
		}
		checkGood(t, c)
	}
}

func checkGood(t *testing.T, c *Config) {
	t.Helper()
	text := render(c)
	again, err := Parse("f", text)
	if err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if diff := cmp.Diff(c, again, same); diff != "" {
		t.Fatalf("(-first +again):\n%s", diff)
	}
	for line := range strings.Lines(printed(t, c)) {
		if line = strings.TrimSuffix(line, "\n"); !printable(line) {
			t.Errorf("it is printed with what does not print: %q", line)
		}
	}
}

// testTexts are those of the files in testdata.
func testTexts(t testing.TB, pattern string) (all [][]byte) {
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("%s: %v", pattern, err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range regexp.MustCompile(`(?ms)^(?:parse|print)\n(.*?)^----$`).FindAllSubmatch(text, -1) {
			all = append(all, unescape(string(found[1])))
		}
	}
	return all
}

func goodTexts(t testing.TB) [][]byte {
	return append(testTexts(t, "testdata/good/*"), DefaultFile(), []byte(strings.Join(uncommented(), "\n")))
}

var errorLine = regexp.MustCompile(`^f:(\d+):(\d+): .+$`)

// FuzzParse: whatever the file is, it is read or refused: with a place in the
// file in each line; and what is read is the same when it is written anew.
func FuzzParse(f *testing.F) {
	for _, text := range append(goodTexts(f), testTexts(f, "testdata/bad/*")...) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("f", text)
		if err == nil {
			checkGood(t, c)
			return
		}
		lines := strings.Split(string(text), "\n")
		for i, said := range strings.Split(err.Error(), "\n") {
			at := errorLine.FindStringSubmatch(said)
			if at == nil || !utf8.ValidString(said) || strings.ContainsFunc(said, unicode.IsControl) {
				t.Fatalf("no line of an error: %q", said)
			}
			line, _ := strconv.Atoi(at[1])
			column, _ := strconv.Atoi(at[2])
			if i > maxProblems || line < 1 || line > len(lines) || column < 1 || column > utf8.RuneCountInString(lines[line-1])+1 {
				t.Fatalf("line %d of the error is of no place in the file: %q", i+1, said)
			}
		}
	})
}
