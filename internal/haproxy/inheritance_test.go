// SPDX-License-Identifier: Apache-2.0

package haproxy_test

import (
	"encoding/csv"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

var (
	configurations = flag.Int("configurations", 15, "how many configurations to make and run for each version")
	first          = flag.Int("first", 0, "number of the first of them")
)

// A HAProxy that runs has the proxies that are read from its files, of the modes
// and with the limits that are read: configurations made at random of defaults
// that inherit from one another, in several files.
func TestInheritance(t *testing.T) {
	kerneltest.Require(t)
	for name, value := range variables {
		t.Setenv(name, value)
	}
	versions := haproxytest.Versions(t)
	system := haproxytest.System(t)
	for i, v := range versions {
		if v.Name != system.Name && i != len(versions)-1 {
			continue
		}
		t.Run(v.Name, func(t *testing.T) {
			ns := kerneltest.NewNamespace(t)
			proxies := make([]int, *configurations)
			inParallel(*configurations, func(i int) {
				t.Run(strconv.Itoa(*first+i), func(t *testing.T) { proxies[i] = compareRunning(t, ns, v, *first+i) })
			})
			sum := 0
			for _, n := range proxies {
				sum += n
			}
			t.Logf("%d proxies agree", sum)
			if sum < 20**configurations && !t.Failed() {
				t.Error("which is too few to show anything")
			}
		})
	}
}

// compareRunning makes a configuration, runs it, and returns the number of
// proxies compared.
func compareRunning(t *testing.T, ns *kerneltest.Namespace, v haproxytest.Version, number int) int {
	random := rand.New(rand.NewPCG(uint64(number), *seed))
	parts := generate(random, fmt.Sprintf("%s-%d", v.Name, number))

	// The first file is that of haproxytest, then a directory, then one more.
	dir, err := os.MkdirTemp(filepath.Join(v.Root, "/tmp"), "haproxy-inheritance")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}()
	write := func(name, text string) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("conf.d/10-first.cfg", parts[1])
	write("conf.d/20-second.cfg", parts[2])
	write("conf.d/30-no.conf", "this is not read\n")
	write("last.cfg", parts[3])
	more := []string{v.Inside(dir + "/conf.d"), v.Inside(dir + "/last.cfg")}
	h := haproxytest.Start(t, ns, v, haproxytest.Foreground, parts[0], "-f", more[0], "-f", more[1])
	defer h.Stop()

	sources, err := haproxy.Load(v.Root, "/", append([]string{v.Inside(h.ConfigPath())}, more...))
	if err != nil {
		t.Fatal(err)
	}
	agree, undecided := compareWithRunning(t, h, sources)
	// From 3.1 on what is said of variables further down counts too, or not.
	if undecided > 0 && !v.AtLeast(3, 1) || undecided > agree {
		t.Errorf("%d proxies are undecided, %d agree", undecided, agree)
	}
	return agree
}

// compareWithRunning compares what is read from the files of a HAProxy with what
// it says of itself. It returns how many proxies agree, and how many the reader
// leaves undecided.
func compareWithRunning(t *testing.T, h *haproxytest.HAProxy, sources []haproxy.Source) (agree, undecidedProxies int) {
	t.Helper()
	version, err := haproxy.ParseVersion(h.Version.Text)
	if err != nil {
		t.Fatal(err)
	}
	config, err := haproxy.Parse(sources, haproxy.Options{Version: version, Env: variables, EnvComplete: true})
	if err != nil {
		t.Fatalf("%v\n%s", err, text(sources))
	}
	maxconn := number(t, regexp.MustCompile(`\nMaxconn: (\d+)\n`), h.Ask("show info"))
	if read := config.Global.Maxconn; read.Value != 0 && uint32(read.Value) != uint32(maxconn) && !read.Undecided {
		t.Errorf("global maxconn %d as read, %d in force\n%s", read.Value, maxconn, text(sources))
	}
	want, undecided := map[string]string{}, map[string]bool{}
	for _, px := range config.Proxies {
		if px.Disabled.Value {
			continue
		}
		if px.Accepts() {
			limit := px.Maxconn.Value
			if limit == 0 {
				limit = maxconn
			}
			want[px.Name+" FRONTEND"] = fmt.Sprintf("%s %d", px.Mode.Value, limit)
			if px.Maxconn.Undecided {
				undecided[px.Name+" FRONTEND"] = true
			}
		}
		if px.Connects() {
			want[px.Name+" BACKEND"] = px.Mode.Value.String()
			for _, s := range px.Servers {
				want[px.Name+" "+s.Name] = ""
			}
		}
	}
	got := map[string]string{}
	answer := strings.TrimPrefix(h.Ask("show stat"), "# ")
	rows, err := csv.NewReader(strings.NewReader(strings.TrimSpace(answer))).ReadAll()
	if err != nil {
		t.Fatalf("show stat: %v: %s", err, answer)
	}
	column := func(row []string, name string) string { return row[slices.Index(rows[0], name)] }
	for _, row := range rows[1:] {
		name, server := column(row, "pxname"), column(row, "svname")
		says := ""
		switch server {
		case "FRONTEND":
			says = column(row, "mode") + " " + column(row, "slim")
		case "BACKEND":
			says = column(row, "mode")
		}
		got[name+" "+server] = says
	}
	for name := range undecided {
		if _, there := got[name]; there {
			want[name] = got[name]
		}
	}
	if maps.Equal(want, got) {
		return len(config.Proxies) - len(undecided), len(undecided)
	}
	for name := range want {
		if _, there := got[name]; !there {
			t.Errorf("%s is read and does not run", name)
		}
	}
	for name, says := range got {
		if read, there := want[name]; !there {
			t.Errorf("%s runs and is not read", name)
		} else if read != says {
			t.Errorf("%s is %q as read, %q as it runs", name, read, says)
		}
	}
	t.Log(text(sources))
	return 0, len(undecided)
}

func number(t *testing.T, in *regexp.Regexp, answer string) int {
	t.Helper()
	m := in.FindStringSubmatch(answer)
	if m == nil {
		t.Fatalf("no %s in %s", in, answer)
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func text(sources []haproxy.Source) string {
	b := &strings.Builder{}
	for _, s := range sources {
		fmt.Fprintf(b, "==> %s\n%s", s.Name, s.Text)
	}
	return b.String()
}

// generate makes the text of four files. Sockets are in the abstract namespace,
// by names that begin with unique.
func generate(random *rand.Rand, unique string) [4]string {
	g := &generator{random: random, unique: unique}
	var parts [4]string
	for i := range parts {
		g.b.Reset()
		if i == 0 || g.one(4) {
			g.global()
		}
		for range 3 + random.IntN(5) {
			g.defaults()
			for range random.IntN(6) {
				g.proxy()
			}
		}
		parts[i] = g.b.String()
	}
	return parts
}

type generator struct {
	random  *rand.Rand
	unique  string
	b       strings.Builder
	named   []string // defaults sections
	proxies int
}

// one is true in one of n cases.
func (g *generator) one(n int) bool { return g.random.IntN(n) == 0 }

func (g *generator) line(words ...string) {
	g.b.WriteString([]string{"\t", "    ", "  "}[g.random.IntN(3)] + strings.Join(words, " ") + []string{"", "", " # maxconn 3"}[g.random.IntN(3)] + "\n")
}

func (g *generator) pick(from ...string) string { return from[g.random.IntN(len(from))] }

// limit is a number as it may be written.
func (g *generator) limit(most int) string {
	n := strconv.Itoa(1 + g.random.IntN(most))
	return g.pick(n, n, n, n, `"`+n+`"`, "'"+n+"'", "0"+n, "+"+n, `"$LIMIT"`, `"${UNSET-`+n+`}"`)
}

func (g *generator) global() {
	g.b.WriteString("global\n")
	if g.one(3) {
		g.line("maxconn 0")
	}
	if g.one(2) {
		g.line("maxconn", g.limit(2000))
	}
	if g.one(3) {
		g.line("hard-stop-after 10s")
	}
	if g.one(4) {
		g.line("setenv LIMIT", strconv.Itoa(100+g.random.IntN(900)))
	}
}

func (g *generator) from() string {
	if len(g.named) == 0 || g.one(2) {
		return ""
	}
	return " from " + g.pick(g.named...)
}

func (g *generator) defaults() {
	switch {
	case g.one(5):
		return
	case g.one(2):
		g.b.WriteString("defaults" + g.from() + "\n")
	default:
		from, name := g.from(), fmt.Sprintf("d%d", len(g.named))
		g.named = append(g.named, name)
		g.b.WriteString("defaults " + name + from + "\n")
	}
	g.settings()
	g.condition(func() { g.line("maxconn", g.limit(5000)) })
}

func (g *generator) proxy() {
	g.proxies++
	name := fmt.Sprintf("p%d", g.proxies)
	kind := g.pick("frontend", "listen", "backend")
	fmt.Fprintf(&g.b, "%s %s%s\n", kind, name, g.from())
	if kind != "backend" {
		g.line("bind abns@" + g.unique + name)
	}
	g.settings()
	if kind != "frontend" {
		for i := range g.random.IntN(3) {
			g.line("server", fmt.Sprintf("s%d", i), "192.0.2.1:80", g.pick("", "maxconn 7", "disabled"))
		}
	}
	if g.one(8) {
		g.line(g.pick("disabled", "enabled"))
	}
	g.condition(func() { g.line("maxconn", g.limit(5000)) })
}

func (g *generator) settings() {
	if g.one(2) {
		g.line("maxconn", g.limit(5000))
	}
	if g.one(8) {
		g.line("maxconn", g.pick("0", "12x", "x", "-1", "4294967306"))
	}
	if g.one(2) {
		g.line("mode", g.pick("tcp", "http"))
	}
	if g.one(10) {
		g.line("fullconn", g.limit(100))
	}
	if g.one(3) {
		g.line("timeout", g.pick("client", "server", "connect"), g.pick("1s", "10000", "2m"))
	}
	if g.one(30) {
		g.line("disabled")
	}
	g.b.WriteString(g.pick("", "", "\n", "    # a comment with \"\n"))
}

// condition writes now and then a condition with a line in it.
func (g *generator) condition(fn func()) {
	if !g.one(4) {
		return
	}
	condition := func() string {
		return g.pick("", "0", "1", "!0", "defined(LIMIT)", "!defined(UNSET)", "version_atleast(2.6.99)", "version_before(3.1-dev5)", `streq("$LIMIT",42)`,
			"0 || defined(UNSET)", "1 && ( 0 || !0 )", `strneq("${UNSET}",)`, "!( 1 && version_atleast(2.4) )", "-1", "0x10", "!!1")
	}
	g.b.WriteString(".if " + condition() + "\n")
	fn()
	if g.one(2) {
		g.b.WriteString(".elif " + condition() + "\n")
		fn()
		g.b.WriteString("  .if " + condition() + "\n")
		fn()
		g.b.WriteString("  .else\n")
		fn()
		g.b.WriteString("  .endif\n")
	}
	if g.one(2) {
		g.b.WriteString(".else\n")
		fn()
	}
	g.b.WriteString(".endif\n")
}

// unfit are the files of the corpus that do not run in a namespace of their own.
var unfit = []string{"bind-in*", "bind-ipv6*", "bind-unix*", "global-s*", "no-listener*", "server-names*", "real-*", "section-peers*", "server-template"}

// The files of the corpus are read as a HAProxy that runs has read them.
func TestCorpusRunning(t *testing.T) {
	kerneltest.Require(t)
	for name, value := range variables {
		t.Setenv(name, value)
	}
	v := haproxytest.System(t)
	ns := kerneltest.NewNamespace(t)
	all := files(t)
	var names []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		_, differs := disagreements[name]
		isUnfit := slices.ContainsFunc(unfit, func(pattern string) bool { ok, _ := filepath.Match(pattern, name); return ok })
		_, err := haproxy.Parse(load(t, all[name]), haproxy.Options{Version: debian12, Env: variables, EnvComplete: true})
		if err == nil && !isUnfit && !differs && len(all[name]) == 1 {
			names = append(names, name)
		}
	}
	if len(names) < 60 {
		t.Errorf("%d files, which are too few", len(names))
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			sources := load(t, all[name])
			h := haproxytest.Start(t, ns, v, haproxytest.Foreground, string(sources[0].Text))
			defer h.Stop()
			compareWithRunning(t, h, sources)
		})
	}
}
