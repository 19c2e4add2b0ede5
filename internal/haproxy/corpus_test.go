// SPDX-License-Identifier: Apache-2.0

package haproxy_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/haproxytest"
)

const corpus = "testdata/config"

// variables are what the corpus may use: HAProxy is started with them.
var variables = map[string]string{
	"ADDR":        "127.0.0.1",
	"LIMIT":       "42",
	"CLIENT":      "15",
	"ZEROES":      "000",
	"EMPTY":       "",
	"CLIENTWORDS": "client 25s",
	"SERVERWORDS": "192.0.2.1:80  maxconn 4",
	"SPACEWORDS":  " 192.0.2.1:80  maxconn 4",
	"LONGWORD":    "client-fin",
	"HTTP_PORT":   "8080",
	"HTTPS_PORT":  "8443",
	"POD_IP":      "192.0.2.15",
}

// files are the corpus: a file each, or a directory of several, which are given
// as first.cfg, conf.d and last.cfg.
func files(t testing.TB) map[string][]string {
	t.Helper()
	entries, err := os.ReadDir(corpus)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for _, e := range entries {
		switch name, isConfig := strings.CutSuffix(e.Name(), ".cfg"); {
		case e.IsDir():
			all[e.Name()] = []string{e.Name() + "/first.cfg", e.Name() + "/conf.d", e.Name() + "/last.cfg"}
		case isConfig:
			all[name] = []string{e.Name()}
		}
	}
	return all
}

// load reads the files of one case, named relative to the corpus.
func load(t testing.TB, paths []string) []haproxy.Source {
	t.Helper()
	dir, err := filepath.Abs(corpus)
	if err != nil {
		t.Fatal(err)
	}
	sources, err := haproxy.Load("", dir, paths)
	if err != nil {
		t.Fatal(err)
	}
	return sources
}

// debian12 is the version that the goldens are read for.
var debian12 = haproxy.Version{Major: 2, Minor: 6, Text: "2.6.12"}

// What the reader says of each file is in NAME.golden. NAME.unknown.golden is
// what it says without knowing HAProxy's version and environment, where that
// differs.
func TestCorpus(t *testing.T) {
	all := files(t)
	if len(all) < 60 {
		t.Fatalf("%d files, which cannot be all", len(all))
	}
	goldens := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			sources := load(t, all[name])
			got := dump(haproxy.Parse(sources, haproxy.Options{Version: debian12, Env: variables, EnvComplete: true}))
			unknown := dump(haproxy.Parse(sources, haproxy.Options{}))
			path, unknownPath := filepath.Join(corpus, name+".golden"), filepath.Join(corpus, name+".unknown.golden")
			goldens[path] = true
			if unknown != got {
				goldens[unknownPath] = true
				golden.Check(t, unknownPath, unknown)
			}
			golden.Check(t, path, got)
		})
	}
	written, err := filepath.Glob(filepath.Join(corpus, "*.golden"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range written {
		if !goldens[path] {
			t.Errorf("%s is of no use", path)
		}
	}
}

// dump is the text form of what Parse returns: every setting with its line,
// its section and its words.
func dump(c *haproxy.Config, err error) string {
	b := &strings.Builder{}
	var several haproxy.Errors
	if errors.As(err, &several) {
		for _, e := range several {
			fmt.Fprintf(b, "error %v\n", e)
		}
		return b.String()
	}
	if err != nil {
		return fmt.Sprintf("error %v\n", err)
	}
	g := c.Global
	b.WriteString("global\n")
	line(b, "maxconn", g.Maxconn)
	line(b, "ulimit-n", g.UlimitN)
	line(b, "fd-hard-limit", g.FDHardLimit)
	line(b, "nbproc", g.Nbproc)
	line(b, "nbthread", g.Nbthread)
	line(b, "hard-stop-after", g.HardStopAfter)
	for _, s := range g.StatsSockets {
		line(b, "stats socket", s)
	}
	for _, px := range c.Proxies {
		fmt.Fprintf(b, "\n%s @ %s:%d%s\n", px, px.Pos, px.Pos.Column, undecided(px.Undecided))
		line(b, "mode", px.Mode)
		line(b, "disabled", px.Disabled)
		line(b, "maxconn", px.Maxconn)
		line(b, "fullconn", px.Fullconn)
		for _, name := range slices.Sorted(maps.Keys(px.Timeouts)) {
			line(b, "timeout "+name, px.Timeouts[name])
		}
		for _, name := range slices.Sorted(maps.Keys(px.Options)) {
			line(b, "option "+name, px.Options[name])
		}
		line(b, "default_backend", px.DefaultBackend)
		for _, use := range px.UseBackends {
			line(b, "use_backend", use)
		}
		for _, bind := range px.Binds {
			dumpBind(b, bind)
		}
		for _, server := range px.Servers {
			dumpServer(b, server)
		}
	}
	if len(c.Notes) > 0 {
		b.WriteString("\n")
	}
	for _, n := range c.Notes {
		fmt.Fprintf(b, "note %s:%d: %s\n", n.Pos, n.Pos.Column, n.Text)
	}
	return b.String()
}

func undecided(is bool) string {
	if is {
		return " (undecided)"
	}
	return ""
}

func line[T any](b *strings.Builder, name string, s haproxy.Setting[T]) {
	if !s.IsSet() {
		return
	}
	fmt.Fprintf(b, "    %s = %v%s @ %s:%d %s: %q\n", name, s.Value, undecided(s.Undecided), s.Pos, s.Pos.Column, s.Section, s.Text)
}

func dumpBind(b *strings.Builder, bind haproxy.Bind) {
	fmt.Fprintf(b, "    bind @ %s:%d%s", bind.Pos, bind.Pos.Column, undecided(bind.Undecided))
	flags(b, map[string]bool{"v4v6": bind.V4V6, "v6only": bind.V6Only, "transparent": bind.Transparent, "ssl": bind.SSL, "accept-proxy": bind.AcceptProxy})
	if bind.Interface != "" {
		fmt.Fprintf(b, " interface=%s", bind.Interface)
	}
	if bind.Namespace != "" {
		fmt.Fprintf(b, " namespace=%s", bind.Namespace)
	}
	b.WriteString("\n")
	for _, a := range bind.Addrs {
		fmt.Fprintf(b, "        %s: %v %d-%d\n", a.Text, a.IP, a.First, a.Last)
	}
	if bind.Maxconn.IsSet() {
		b.WriteString("    ")
		line(b, "maxconn", bind.Maxconn)
	}
}

func dumpServer(b *strings.Builder, s haproxy.Server) {
	fmt.Fprintf(b, "    server %s @ %s:%d%s", s.Name, s.Pos, s.Pos.Column, undecided(s.Undecided))
	if s.Count != 1 {
		fmt.Fprintf(b, " count=%d", s.Count)
	}
	fmt.Fprintf(b, " host=%q ip=%v port=%d", s.Host, s.IP, s.Port)
	flags(b, map[string]bool{"any-destination": s.AnyDest, "disabled": s.Disabled, "send-proxy": s.SendProxy, "ssl": s.SSL})
	if s.Namespace != "" {
		fmt.Fprintf(b, " namespace=%s", s.Namespace)
	}
	if s.SOCKS4.IsValid() {
		fmt.Fprintf(b, " socks4=%v", s.SOCKS4)
	}
	b.WriteString("\n")
	if s.Maxconn.IsSet() {
		b.WriteString("    ")
		line(b, "maxconn", s.Maxconn)
	}
}

func flags(b *strings.Builder, all map[string]bool) {
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if all[name] {
			b.WriteString(" " + name)
		}
	}
}

// A disagreement is where HAProxy's verdict is not the reader's, for a reason.
type disagreement struct {
	from, before string // versions of HAProxy; "" is without end
	why          string
}

// disagreements are what HAProxy refuses and the reader does not: what lies
// outside the files, or outside what is read. The reader is never the stricter
// one.
var disagreements = map[string]disagreement{
	"backend-unknown-of-backend":      {why: "a backend's default_backend has no effect"},
	"bind-bad-address":                {why: "names are not resolved"},
	"bind-port-trailing":              {from: "2.7", why: "which digits of a port count has changed"},
	"bind-quic":                       {why: "there is no certificate"},
	"bind-space-after-comma":          {why: "words of bind that are not known are passed over"},
	"bind-ssl":                        {why: "certificates are not looked at"},
	"bind-udp":                        {why: "an address that is not TCP's is not looked at"},
	"bind-unknown-word":               {why: "words of bind that are not known are passed over"},
	"default-option":                  {before: "3.2", why: "older versions mistake the option for an argument of itself"},
	"env-unset-only":                  {from: "2.9", why: "words of bind that are not known are passed over"},
	"env-unset-ends":                  {from: "3.3", why: "an empty word was permitted before"},
	"frontend-address-alone":          {from: "3.2", why: "older versions have an alert and go on"},
	"if-enabled":                      {before: "2.8", why: "conditions of all versions are known"},
	"keyword-unknown":                 {why: "keywords that are not known are passed over"},
	"names-same-frontend-and-backend": {from: "3.3", why: "it was permitted before"},
	"namespace":                       {why: "there are no such network namespaces"},
	"option-in-wrong-section":         {from: "3.2", why: "options of the other side are passed over"},
	"option-unknown":                  {why: "options that are not known are passed over"},
	"quote-empty-word-ends":           {from: "3.3", why: "it was permitted before"},
	"section-program":                 {why: "programs need a master process"},
	"section-unknown-later":           {why: "keywords that are not known are passed over"},
	"server-unknown-word":             {why: "words of server that are not known are passed over"},
}

// elsewhere are the errors for which HAProxy names another line.
var elsewhere = map[string]string{
	"if-missing-endif": "HAProxy names the last line of the file, the reader the .if",
}

// The reader accepts what HAProxy accepts, and refuses what it refuses on a line
// that it names too.
func TestCorpusAgainstHAProxy(t *testing.T) {
	for name, value := range variables {
		t.Setenv(name, value)
	}
	for _, name := range []string{"UNSET", "FRESH", "FRESH2", "LATER", "ROUTER_MAX", "ROUTER_LOG", "ROUTER_LOG_LEVEL", "ROUTER_CLIENT_TIMEOUT", "ROUTER_TUNNEL"} {
		if _, set := os.LookupEnv(name); set {
			t.Fatalf("%s is set, which the corpus takes for unset", name)
		}
	}
	all := files(t)
	for _, v := range haproxytest.Versions(t) {
		if !v.AtLeast(2, 4) {
			continue // older than the grammar that is read
		}
		t.Run(v.Name, func(t *testing.T) {
			dir := place(t, v)
			names := slices.Sorted(maps.Keys(all))
			outputs := make([]verdict, len(names))
			inParallel(len(names), func(i int) {
				var paths []string
				for _, path := range all[names[i]] {
					paths = append(paths, dir+"/"+path)
				}
				outputs[i] = check(t, v, paths...)
			})
			for i, name := range names {
				t.Run(name, func(t *testing.T) { agree(t, v, name, load(t, all[name]), outputs[i]) })
			}
		})
	}
}

func agree(t *testing.T, v haproxytest.Version, name string, sources []haproxy.Source, theirs verdict) {
	version, err := haproxy.ParseVersion(v.Text)
	if err != nil {
		t.Fatal(err)
	}
	_, err = haproxy.Parse(sources, haproxy.Options{Version: version, Env: variables, EnvComplete: true})
	d, differs := disagreements[name]
	differs = differs && (d.from == "" || v.AtLeast(numbers(t, d.from))) && (d.before == "" || !v.AtLeast(numbers(t, d.before)))
	switch {
	case theirs.ok == (err == nil):
		if differs {
			t.Errorf("no disagreement any more: %s", d.why)
		}
	case theirs.ok:
		t.Errorf("HAProxy accepts what the reader refuses: %v", err)
	case !differs:
		t.Errorf("the reader accepts what HAProxy refuses: %s", theirs.output)
	}
	if theirs.ok || err == nil || elsewhere[name] != "" {
		return
	}
	for _, e := range err.(haproxy.Errors) {
		if e.Pos.Line == 0 || e.Pos.Column == 0 {
			t.Errorf("%v is without a place", e)
		}
		if lines := theirs.lines(e.Pos.File); len(lines) > 0 && !slices.Contains(lines, e.Pos.Line) {
			t.Errorf("%v: HAProxy names lines %d: %s", e, lines, theirs.output)
		}
	}
}

func numbers(t *testing.T, version string) (major, minor int) {
	v, err := haproxy.ParseVersion(version)
	if err != nil {
		t.Fatal(err)
	}
	return v.Major, v.Minor
}

// place puts the corpus where a version sees it, and returns the directory as
// the version sees it.
func place(t *testing.T, v haproxytest.Version) string {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Join(v.Root, "/tmp"), "haproxy-corpus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.CopyFS(dir, os.DirFS(corpus)); err != nil {
		t.Fatal(err)
	}
	return v.Inside(dir)
}

// verdict is what haproxy -c says.
type verdict struct {
	ok     bool
	output string
}

func check(t testing.TB, v haproxytest.Version, paths ...string) verdict {
	ok, output := v.CheckFiles(t, paths...)
	// Not to start for want of an address is no fault of the file's.
	return verdict{ok || strings.Contains(output, "Configuration file has no error but will not start"), output}
}

var alertLine = regexp.MustCompile(`(?m)^\[ALERT\].*?\[([^\]]*):(\d+)\]`)

// lines are those of a file that alerts name.
func (v verdict) lines(file string) (lines []int) {
	for _, m := range alertLine.FindAllStringSubmatch(v.output, -1) {
		if n, err := strconv.Atoi(m[2]); err == nil && strings.HasSuffix(m[1], "/"+file) {
			lines = append(lines, n)
		}
	}
	return lines
}

// inParallel calls fn for 0 to n-1, two at a time: the waiting is for processes.
func inParallel(n int, fn func(int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				fn(int(i))
			}
		})
	}
	wg.Wait()
}
