// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/tls"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// A key is one of the file: how it is read, and how the default file shows it.
type key struct {
	name string
	help string // what it is and when to set it; lines as in the default file
	// text is the default; an example where example is set.
	text    string
	example bool
	// aside keys are shown, but not as part of the example that they stand in;
	// instead names the key that one takes the place of, if it takes any.
	aside   bool
	instead string

	// One of these: a value, a mapping of keys, a list of such mappings.
	read  func(*reader, value)
	keys  []key
	items func(i int) (keys []key, after func(*reader, value))
}

// keys are all keys, of which each sets its part of c.
func keys(c *Config) []key {
	const day = 24 * time.Hour
	a := &c.Alerts
	return []key{
		{name: "haproxy", help: `Where HAProxy is. Left out, its running processes say so themselves, and a
reload is followed; set it where they cannot be asked.`, keys: []key{
			{name: "config", text: "[/etc/haproxy/haproxy.cfg]", example: true, help: `Files or directories, in the order of HAProxy's -f.`,
				read: some(list(&c.HAProxy.Config, absolute))},
			{name: "socket", text: "/run/haproxy/admin.sock", example: true, help: `The runtime socket.`,
				read: one(&c.HAProxy.Socket, runtimeSocket)},
		}},

		{name: "limits", help: `Limits of your own: a connection that stays in FIN_WAIT2 for longer is
overdue. The first rule that selects a connection has it; those that none
selects have HAProxy's timeouts and net.ipv4.tcp_fin_timeout.`, items: ruleKeys(c)},

		{name: "alerts", help: `When overdue connections make an alert. Those that have the limit, side, port,
peer and process in common make one together.`, keys: []key{
			{name: "min_connections", text: "10", help: `So many of a group are an alert. 1 alerts for each single one.`,
				read: one(&a.MinConnections, count(1, 1_000_000))},
			{name: "maxconn_share", text: "10%", help: `So much of the maxconn of HAProxy's frontend is one too. 0% for never.`,
				read: one(&a.MaxconnShare, share)},
			{name: "peers_per_group", text: "10", help: `So many peers have an alert of their own; the rest have one together.`,
				read: one(&a.PeersPerGroup, count(0, 1000))},
			{name: "resolve_after", text: "2m", help: `An alert resolves once it has been quiet for so long.`,
				read: one(&a.ResolveAfter, duration(time.Second, day))},
			{name: "update_every", text: "1m", help: `An alert that changes much is told of anew, but no more often than this.`,
				read: one(&a.UpdateEvery, duration(time.Second, day))},
			{name: "repeat_every", text: "4h", help: `One that goes on is told of again after so long. 0s for never.`,
				read: one(&a.RepeatEvery, durationOrNone(time.Minute, 30*day))},
			{name: "state_file", text: a.StateFile, help: `Which alerts fire, so that a restart does not fire them as new. "" for none.`,
				read: stateFile(&a.StateFile)},
		}},

		{name: "sinks", help: `Where alerts go, to all of these at once.`, keys: []key{
			{name: "log", text: "true", help: `To the log, which journald or syslog has.`,
				read: one(&c.Sinks.Log, boolean)},
			{name: "webhooks", help: `URLs that alerts are posted to, as JSON.`, items: webhookKeys(c)},
			{name: "alertmanagers", help: `Clusters of Prometheus Alertmanagers.`, items: alertmanagerKeys(c)},
		}},

		{name: "web", help: `Metrics, a page, an API and health over HTTP.`, keys: []key{
			{name: "listen", text: "[" + strconv.Quote(c.Web.listen()) + "]", help: `Addresses, each host:port. [] for none at all. Set config_file before others
than this host can reach it: the page shows addresses of peers.`,
				read: listOf(&c.Web.Listen, address, addressWithin)},
			{name: "config_file", text: "/etc/fintrace/web.yaml", example: true, help: `TLS and basic authentication, in the format of Prometheus' exporters
(https://github.com/prometheus/exporter-toolkit).`,
				read: file(&c.Web.ConfigFile, nil)},
			{name: "external_url", text: "https://lb1.example.org:19818", example: true, help: `How others reach it, for the links in alerts.`,
				read: one(&c.Web.ExternalURL, externalURL)},
		}},

		{name: "log", help: `The daemon's own log, and that of alerts.`, keys: []key{
			{name: "level", text: "info", help: `debug, info, warn or error.`,
				read: one(&c.Log.Level, level)},
			{name: "format", text: "auto", help: `auto (journald under systemd, else text), ` + strings.Join(Formats[1:], ", ") + `.`,
				read: one(&c.Log.Format, choice(Formats...))},
		}},

		{name: "shutdown_timeout", text: "5s", help: `How long the end waits for alerts that are being delivered.`,
			read: one(&c.ShutdownTimeout, duration(100*time.Millisecond, 5*time.Minute))},
	}
}

// listen is the first address, for the default file.
func (w *Web) listen() string {
	if len(w.Listen) == 0 {
		return ""
	}
	return w.Listen[0]
}

// A limit shorter than a busy network takes, or longer than hosts are up, is a slip.
const (
	shortestLimit = 100 * time.Millisecond
	longestLimit  = 30 * 24 * time.Hour
)

func ruleKeys(c *Config) func(int) ([]key, func(*reader, value)) {
	return func(int) ([]key, func(*reader, value)) {
		rule := &limits.Rule{}
		m := &rule.Match
		var namespaces []string
		return []key{
				{name: "name", text: "api", example: true, help: `What alerts and metrics call the limit. Needed.`,
					read: one(&rule.Name, ruleName)},
				{name: "match", help: `Which connections: all that is set must match, by one of its values.
Left out, all that are held.`, keys: []key{
					{name: "side", text: "inbound", example: true, help: `inbound: the peer is a client; outbound: it is a server.`,
						read: one(&m.Side, side)},
					{name: "local_port", text: "[443, 8443]", example: true,
						read: some(list(&m.LocalPorts, port))},
					{name: "remote_port", text: "5432", example: true, aside: true,
						read: some(list(&m.RemotePorts, port))},
					{name: "port", text: "443", example: true, aside: true, help: `Of either end.`,
						read: some(list(&m.Ports, port))},
					{name: "peer", text: `[198.51.100.0/24, "2001:db8::/32"]`, example: true, aside: true, help: `Addresses or blocks.`,
						read: some(listOf(&m.Peers, block, blockWithin))},
					{name: "process", text: "[haproxy]", example: true, aside: true, help: `Who holds or closed it: names as in /proc/PID/comm, or pids.`,
						read: some(list(&m.Processes, process))},
					{name: "cgroup", text: "[/system.slice/haproxy.service]", example: true, aside: true, help: `Paths in cgroup2, with all below them.`,
						read: some(listOf(&m.Cgroups, cgroup, cgroupWithin))},
					{name: "netns", text: "[blue, 4026531840]", example: true, aside: true, help: `Network namespaces: names in /run/netns, or inodes.`,
						read: some(func(r *reader, v value) {
							list(&namespaces, netns)(r, v)
							for _, n := range namespaces {
								if inode, err := strconv.ParseUint(n, 10, 32); err == nil {
									m.Netns = append(m.Netns, uint32(inode))
								} else {
									m.NetnsNames = append(m.NetnsNames, n)
								}
							}
						})},
					{name: "proxy", text: "[https]", example: true, aside: true, help: `Frontends, listens or backends of HAProxy.`,
						read: some(list(&m.Proxies, proxy))},
					{name: "stage", text: "held", example: true, aside: true, help: `held, orphaned or minisock. Left out, held: the kernel ends the others.`,
						read: one(&m.Stage, stage)},
				}},
				{name: "fin_timeout", text: "30s", example: true, help: `The limit. Needed.`,
					read: one(&rule.FinTimeout, duration(shortestLimit, longestLimit))},
			}, func(r *reader, v value) {
				if !r.has(v.path + ".name") {
					r.lacks(v, "the rule has no name; write name: api, or what you call these connections")
				}
				if !r.has(v.path + ".fin_timeout") {
					r.lacks(v, "the rule has no limit; write fin_timeout: 30s, or how long is too long")
				}
				c.Limits = append(c.Limits, *rule)
				c.lines = append(c.lines, v.pos.line)
			}
	}
}

// sinkTimeout is how long an attempt may take where nothing is said.
const sinkTimeout = 10 * time.Second

func webhookKeys(c *Config) func(int) ([]key, func(*reader, value)) {
	return func(i int) ([]key, func(*reader, value)) {
		w := alert.WebhookConfig{Timeout: sinkTimeout}
		w.Name = defaultName("webhook", i)
		hook := &w
		return slices.Concat([]key{
				nameKey(&hook.Name, "webhook"),
				{name: "url", text: "https://hooks.example.org/fintrace", example: true, help: `Needed, or url_file.`,
					read: one(&hook.URL, hookURL)},
				{name: "url_file", text: "/etc/fintrace/webhook.url", example: true, aside: true, instead: "url", help: `A file that holds the URL, where that is a secret.`,
					read: file(&hook.URLFile, aURL)},
				{name: "headers", text: `{X-Team: edge}`, example: true, aside: true, help: `Headers of the request. Not for secrets.`,
					read: pairsOf(&hook.Headers, header)},
				timeoutKey(&hook.Timeout),
			}, httpKeys(&hook.HTTP)), func(r *reader, v value) {
				url, file := v.path+".url", v.path+".url_file"
				switch {
				case r.has(url) && r.has(file):
					r.refuse(r.written[file], "there is a url too; keep one of the two")
				case !r.has(url) && !r.has(file):
					r.lacks(v, "the webhook has no url; write url: https://..., or url_file: with a file that holds it")
				}
				checkHTTP(r, v, &hook.HTTP, []string{hook.URL})
				c.Sinks.Webhooks = append(c.Sinks.Webhooks, *hook)
				c.checkSinkName(r, v, hook.Name)
			}
	}
}

func alertmanagerKeys(c *Config) func(int) ([]key, func(*reader, value)) {
	return func(i int) ([]key, func(*reader, value)) {
		a := alert.AlertmanagerConfig{Timeout: sinkTimeout, ResendEvery: time.Minute}
		a.Name = defaultName("alertmanager", i)
		manager := &a
		return slices.Concat([]key{
				nameKey(&manager.Name, "alertmanager"),
				{name: "urls", text: `["https://am1.example.org:9093", "https://am2.example.org:9093"]`, example: true, help: `Needed. Each gets each alert, as Prometheus does it.`,
					read: some(list(&manager.URLs, alertmanagerURL))},
				{name: "labels", text: "{cluster: edge-1}", example: true, aside: true, help: `Labels for each alert, beside its own.`,
					read: pairsOf(&manager.Labels, label)},
				{name: "resend_every", text: "1m", aside: true, help: `An Alertmanager forgets what it is not told of again (resolve_timeout).`,
					read: one(&manager.ResendEvery, duration(time.Second, time.Hour))},
				timeoutKey(&manager.Timeout),
			}, httpKeys(&manager.HTTP)), func(r *reader, v value) {
				if !r.has(v.path + ".urls") {
					r.lacks(v, `the Alertmanager has no urls; write urls: ["http://host:9093"]`)
				}
				checkHTTP(r, v, &manager.HTTP, manager.URLs)
				c.Sinks.Alertmanagers = append(c.Sinks.Alertmanagers, *manager)
				c.checkSinkName(r, v, manager.Name)
			}
	}
}

// defaultName is the name of a sink that has none.
func defaultName(kind string, i int) string {
	if i == 0 {
		return kind
	}
	return fmt.Sprintf("%s-%d", kind, i+1)
}

func nameKey(to *string, text string) key {
	return key{name: "name", text: text, help: "What the log and metrics call it.", read: one(to, sinkName)}
}

func timeoutKey(to *time.Duration) key {
	return key{name: "timeout", text: "10s", aside: true, help: `How long one attempt may take.`,
		read: one(to, duration(100*time.Millisecond, 5*time.Minute))}
}

// httpKeys are those of a client of HTTP. It takes its proxy from the
// environment (HTTPS_PROXY), as all programs do.
func httpKeys(h *promconfig.HTTPClientConfig) []key {
	auth := func() *promconfig.BasicAuth {
		if h.BasicAuth == nil {
			h.BasicAuth = &promconfig.BasicAuth{}
		}
		return h.BasicAuth
	}
	return []key{
		{name: "bearer_token_file", text: "/etc/fintrace/token", example: true, aside: true, help: `A file that holds a token for Authorization: Bearer.`,
			read: file(&h.BearerTokenFile, aLine)},
		{name: "basic_auth", aside: true, instead: "bearer_token_file", help: `A user, and a file that holds the password.`, keys: []key{
			{name: "username", text: "fintrace", example: true,
				read: func(r *reader, v value) { one(&auth().Username, username)(r, v) }},
			{name: "password_file", text: "/etc/fintrace/password", example: true,
				read: func(r *reader, v value) { file(&auth().PasswordFile, aLine)(r, v) }},
		}},
		{name: "tls", aside: true, help: `For https: whom to trust, and who we are.`, keys: []key{
			{name: "ca_file", text: "/etc/fintrace/ca.pem", example: true,
				read: file(&h.TLSConfig.CAFile, certificates)},
			{name: "cert_file", text: "/etc/fintrace/client.pem", example: true,
				read: file(&h.TLSConfig.CertFile, certificates)},
			{name: "key_file", text: "/etc/fintrace/client.key", example: true,
				read: file(&h.TLSConfig.KeyFile, nil)},
			{name: "server_name", text: "hooks.example.org", example: true, help: `The name that its certificate has to have.`,
				read: one(&h.TLSConfig.ServerName, serverName)},
			{name: "insecure_skip_verify", text: "false", help: `Trust whoever answers.`,
				read: one(&h.TLSConfig.InsecureSkipVerify, boolean)},
		}},
	}
}

func username(s string) (string, error) {
	if s == "" || !printable(s) || strings.Contains(s, ":") {
		return "", fmt.Errorf("%s is no user that basic authentication can have", quote(s))
	}
	return s, nil
}

func serverName(s string) (string, error) {
	if !isHostName(s) {
		return "", fmt.Errorf("%s is no name of a host", quote(s))
	}
	return s, nil
}

// checkHTTP checks what is said of a client as a whole.
func checkHTTP(r *reader, v value, h *promconfig.HTTPClientConfig, urls []string) {
	at := func(name string) value { return r.written[v.path+"."+name] }
	if r.has(v.path+".bearer_token_file") && r.has(v.path+".basic_auth") {
		r.refuse(at("basic_auth"), "there is a bearer_token_file too, and a request has one Authorization; keep one of the two")
	}
	if r.has(v.path+".basic_auth") && r.sound(v.path+".basic_auth") {
		switch {
		case !r.has(v.path + ".basic_auth.username"):
			r.refuse(at("basic_auth"), "there is no username")
		case !r.has(v.path + ".basic_auth.password_file"):
			r.refuse(at("basic_auth"), "there is no password_file")
		}
	}
	cert, key := r.has(v.path+".tls.cert_file"), r.has(v.path+".tls.key_file")
	switch {
	case cert && !key:
		r.refuse(at("tls.cert_file"), "a certificate needs its key_file")
	case key && !cert:
		r.refuse(at("tls.key_file"), "a key needs its cert_file")
	case key && cert && r.files && r.sound(v.path+".tls"):
		if _, err := tls.LoadX509KeyPair(h.TLSConfig.CertFile, h.TLSConfig.KeyFile); err != nil {
			r.refuse(at("tls.key_file"), "it is not the key of the cert_file: %v", err)
		}
	}
	if r.has(v.path+".tls") && r.sound(v.path) && len(urls) > 0 && !slices.ContainsFunc(urls, func(s string) bool {
		u, err := url.Parse(s)
		return err != nil || u.Scheme != "http"
	}) {
		r.refuse(at("tls"), "it has no effect on a URL of http; write https, or leave it out")
	}
	if h.TLSConfig.InsecureSkipVerify {
		for _, name := range []string{"ca_file", "server_name"} {
			if r.has(v.path + ".tls." + name) {
				r.refuse(at("tls."+name), "with insecure_skip_verify it has no effect; leave one of the two out")
			}
		}
	}
}

// checkSinkName refuses a second sink of one name, and that of the log.
func (c *Config) checkSinkName(r *reader, v value, name string) {
	if !r.sound(v.path + ".name") {
		return
	}
	names := []string{"log"}
	paths := []string{"sinks.log"}
	for i := range c.Sinks.Webhooks {
		names, paths = append(names, c.Sinks.Webhooks[i].Name), append(paths, fmt.Sprintf("sinks.webhooks[%d]", i))
	}
	for i := range c.Sinks.Alertmanagers {
		names, paths = append(names, c.Sinks.Alertmanagers[i].Name), append(paths, fmt.Sprintf("sinks.alertmanagers[%d]", i))
	}
	if i := slices.Index(names, name); paths[i] != v.path {
		if written, has := r.written[v.path+".name"]; has {
			v = written
		}
		r.refuse(v, "%s is called %s already; take another name", paths[i], quote(name))
	}
}

// check checks what is said as a whole.
func (c *Config) check(r *reader) {
	c.checkRules(r)
	a := &c.Alerts
	for _, d := range []struct {
		name string
		d    time.Duration
		why  string
	}{
		{"resolve_after", a.ResolveAfter, "an alert would be repeated while it is quiet"},
		{"update_every", a.UpdateEvery, "nothing would be updated between two repeats"},
	} {
		path, repeat := "alerts."+d.name, "alerts.repeat_every"
		if !r.has(path) {
			path = repeat
		}
		if a.RepeatEvery > 0 && d.d > a.RepeatEvery && r.sound(path) && r.sound(repeat) {
			r.refuse(r.written[path], "%s %s is longer than repeat_every %s: %s", d.name, short(d.d), short(a.RepeatEvery), d.why)
		}
	}
	if c.Web.ConfigFile != "" && len(c.Web.Listen) == 0 && r.sound("web") {
		r.refuse(r.written["web.config_file"], "it has no effect without an address to listen on; leave it out, or set web.listen")
	}
}

// checkRules checks each rule that is sound, and against those before it.
func (c *Config) checkRules(r *reader) {
	var sound []int
	for i := range c.Limits {
		if r.sound(rulePath(i)) {
			sound = append(sound, i)
		}
	}
	for n, i := range sound {
		c.checkMatch(r, i)
		rule, earlier := &c.Limits[i], sound[:n]
		if j := slices.IndexFunc(earlier, func(j int) bool { return c.Limits[j].Name == rule.Name }); j >= 0 {
			r.refuse(r.written[rulePath(i)+".name"], "%s is the name of the rule in line %d too; take another", quote(rule.Name), c.lines[earlier[j]])
		}
		if j := slices.IndexFunc(earlier, func(j int) bool { return shadows(&c.Limits[j].Match, &rule.Match) }); j >= 0 {
			v, has := r.written[rulePath(i)+".match"]
			if !has {
				v = r.written[rulePath(i)]
			}
			r.refuse(v, "the rule never applies: %s in line %d is before it and selects all that it does; put this one first, or leave it out",
				quote(c.Limits[earlier[j]].Name), c.lines[earlier[j]])
		}
	}
}

func rulePath(i int) string { return fmt.Sprintf("limits[%d]", i) }

// checkMatch refuses what cannot select anything.
func (c *Config) checkMatch(r *reader, i int) {
	m := &c.Limits[i].Match
	at := func(name string) value { return r.written[rulePath(i)+".match."+name] }
	// HAProxy's proxies have their connections from HAProxy's processes.
	if len(m.Proxies) > 0 && len(m.Processes) > 0 && !slices.ContainsFunc(m.Processes, func(p string) bool {
		return haproxy.IsName(p) || isNumber(p)
	}) {
		r.refuse(at("process"), "no connection of a proxy is of a process that is not HAProxy; leave proxy or process out")
	}
	if len(m.Ports) > 0 && len(m.LocalPorts) > 0 && len(m.RemotePorts) > 0 && !slices.ContainsFunc(m.Ports, func(p uint16) bool {
		return slices.Contains(m.LocalPorts, p) || slices.Contains(m.RemotePorts, p)
	}) {
		r.refuse(at("port"), "it is neither of local_port nor of remote_port, so that nothing matches; leave it out")
	}
}

// shadows says whether a rule of an earlier match leaves a later one nothing.
func shadows(earlier, later *limits.Match) bool {
	a, b := *earlier, *later
	// Where no stage is said, held is meant.
	if a.Stage == 0 {
		a.Stage = events.Held
	}
	if b.Stage == 0 {
		b.Stage = events.Held
	}
	return a.Covers(&b)
}
