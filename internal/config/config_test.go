// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/x509"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/cockroachdb/datadriven"
	"github.com/goccy/go-yaml/ast"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	promconfig "github.com/prometheus/common/config"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/selfsigned"
)

// same compares settings, wherever they were written.
var same = cmp.Options{
	cmpopts.IgnoreUnexported(Config{}, promconfig.ProxyConfig{}),
	cmpopts.EquateComparable(netip.Prefix{}),
}

// TestBad: what is wrong with a file is said line by line. With -rewrite the
// outputs are written anew; read the difference.
func TestBad(t *testing.T) {
	datadriven.Walk(t, "testdata/bad", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			c, err := Parse("fintrace.yaml", unescape(d.Input))
			if err == nil {
				d.Fatalf(t, "nothing is wrong with it")
			}
			if c != nil {
				d.Fatalf(t, "there are settings beside the error")
			}
			if strings.Contains(err.Error(), "SECRET") {
				d.Fatalf(t, "a secret is told: %v", err)
			}
			return err.Error() + "\n"
		})
	})
}

// TestGood: what follows from a file is printed as --check does.
func TestGood(t *testing.T) {
	datadriven.Walk(t, "testdata/good", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			c, err := Parse("/etc/fintrace/fintrace.yaml", unescape(d.Input))
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			text := printed(t, c)
			if strings.Contains(text, "SECRET") {
				d.Fatalf(t, "a secret is told: %s", text)
			}
			return text
		})
	})
}

func printed(t interface{ Fatal(...any) }, c *Config) string {
	var b strings.Builder
	if err := c.Print(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// unescape puts in what does not show in a file.
func unescape(s string) []byte {
	return []byte(strings.NewReplacer("<TAB>", "\t", "<NUL>", "\x00", "<BAD>", "\xff", "<BOM>", "\ufeff",
		"<CR>", "\r", "<LS>", "\u2028").Replace(s) + "\n")
}

// TestPrintWithoutFile: no file is no error of its own, and said so.
func TestPrintWithoutFile(t *testing.T) {
	if text := printed(t, Default()); !strings.HasPrefix(text, "There is no configuration file: the defaults hold.\n") {
		t.Errorf("it begins otherwise:\n%s", text)
	}
}

// TestTooMuch: what is too large is refused, and soon.
func TestTooMuch(t *testing.T) {
	const excess = "up to here the file has more than 10000 values, those behind aliases counted for each; that is too many"
	ports := "&p [" + strings.TrimSuffix(strings.Repeat("1,", 1000), ",") + "]"
	for _, test := range []struct{ name, text, want string }{
		{"a large file", strings.Repeat("# 6789\n", maxSize/7+1),
			"f:1:1: the file is larger than 1024 KiB"},
		{"many values", "web: {listen: [" + strings.Repeat("x,", 2*maxValues) + "]}",
			"f:1:20010: web.listen[9997]: " + excess},
		{"many words", strings.Repeat("a: |\n b\n", 50_000), // 20 s without a bound
			"f:30001:1: up to here the file has more than 60000 words and signs; that is too many"},
		{"few values, with many aliases", "limits:\n- {match: {port: " + ports + "}}\n" + strings.Repeat("- {match: {port: *p}}\n", 100),
			"f:2:1958: limits[9].match.port[968]: " + excess},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse("f", []byte(test.text))
			if err == nil {
				t.Fatal("nothing is wrong with it")
			}
			if err.Error() != test.want {
				t.Errorf("%v; want %s", err, test.want)
			}
		})
	}
}

// TestLoad: a file that is none is refused in a line, and named.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	fifo, file, large := filepath.Join(dir, "fifo"), filepath.Join(dir, "fintrace.yaml"), filepath.Join(dir, "large")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, file, "log: {level: warn}\n")
	write(t, large, strings.Repeat("#", maxSize+1))
	for path, want := range map[string]string{
		dir:                          "is a directory; a file was expected",
		fifo:                         "is no regular file",
		"/dev/null":                  "is no regular file",
		large:                        "is larger than 1024 KiB",
		filepath.Join(dir, "nobody"): "no such file or directory",
	} {
		if c, err := Load(path); c != nil || err == nil || err.Error() != path+": "+want {
			t.Errorf("%v; want %s: %s", err, path, want)
		}
	}
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Log.Level = slog.LevelWarn
	if diff := cmp.Diff(want, c, same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	write(t, file, "log: {level: 1}\n")
	if _, err := Load(file); err == nil || !strings.HasPrefix(err.Error(), file+":1:14: log.level: ") {
		t.Errorf("the error does not say where: %v", err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFiles: what files should hold is looked for when the settings are loaded,
// since else the first alert finds out. It is not told.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := keyPair(t)
	_, other := keyPair(t)
	for name, text := range map[string]string{
		"secret": "SECRET\n", "empty": " \n", "lines": "SECRET\nSECRET\n", "long": strings.Repeat("S", maxSecret+1),
		"url": "https://hooks.example.org/SECRET\n", "bad.url": "ftp://hooks.example.org/SECRET\n",
		"cert.pem": cert, "cert.key": key, "other.key": other, "large": strings.Repeat("S", maxFile+1),
	} {
		write(t, filepath.Join(dir, name), text)
	}
	for _, test := range []struct{ name, sink, want string }{
		{"a URL", "{url_file: DIR/url}", ""},
		{"a secret", "{url_file: DIR/url, bearer_token_file: DIR/secret}", ""},
		{"a password", "{url_file: DIR/url, basic_auth: {username: u, password_file: DIR/secret}}", ""},
		{"a certificate", "{url_file: DIR/url, tls: {ca_file: DIR/cert.pem, cert_file: DIR/cert.pem, key_file: DIR/cert.key}}", ""},
		{"nothing there", "{url_file: DIR/nobody}", `url_file: "DIR/nobody": no such file or directory`},
		{"a directory", "{url_file: DIR}", `url_file: "DIR": is a directory; a file was expected`},
		{"an empty file", "{url_file: DIR/empty}", `url_file: "DIR/empty": is empty`},
		{"another URL", "{url_file: DIR/bad.url}", `url_file: "DIR/bad.url": in it: this is no URL of http or https; write one such as https://host.example/path`},
		{"lines for a URL", "{url_file: DIR/lines}", `url_file: "DIR/lines": one line of text was expected in it`},
		{"lines", "{url_file: DIR/url, bearer_token_file: DIR/lines}", `bearer_token_file: "DIR/lines": one line of text was expected in it`},
		{"long", "{url_file: DIR/url, bearer_token_file: DIR/long}", `bearer_token_file: "DIR/long": one line of text was expected in it`},
		{"large", "{url_file: DIR/url, bearer_token_file: DIR/large}", `bearer_token_file: "DIR/large": is larger than 1024 KiB`},
		{"no password", "{url_file: DIR/url, basic_auth: {username: u, password_file: DIR/nobody}}", `basic_auth.password_file: "DIR/nobody": no such file or directory`},
		{"no certificate", "{url_file: DIR/url, tls: {ca_file: DIR/secret}}", `tls.ca_file: "DIR/secret": it holds no certificate (PEM)`},
		{"another's key", "{url_file: DIR/url, tls: {cert_file: DIR/cert.pem, key_file: DIR/other.key}}", `tls.key_file: it is not the key of the cert_file: tls: private key does not match public key`},
		{"no key", "{url_file: DIR/url, tls: {cert_file: DIR/cert.pem, key_file: DIR/secret}}", `tls.key_file: it is not the key of the cert_file: tls: failed to find any PEM data in key input`},
	} {
		t.Run(test.name, func(t *testing.T) {
			inDir := strings.NewReplacer("DIR", dir)
			text := inDir.Replace("sinks:\n  webhooks:\n    - " + test.sink + "\n")
			path := filepath.Join(dir, "fintrace.yaml")
			write(t, path, text)
			if _, err := Parse("f", []byte(text)); err != nil {
				t.Errorf("Parse looks at files: %v", err)
			}
			got := ""
			if _, err := Load(path); err != nil {
				// Columns depend on the directory.
				got = regexp.MustCompile(`^.*:3:\d+: sinks\.webhooks\[0\]\.`).ReplaceAllString(err.Error(), "")
			}
			if got != inDir.Replace(test.want) {
				t.Errorf("%q; want %q", got, inDir.Replace(test.want))
			}
			if strings.Contains(got, "SECRET") {
				t.Error("a secret is told")
			}
		})
	}
}

// TestOtherFiles: those that are no sink's.
func TestOtherFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "fintrace.yaml")
	for text, want := range map[string]string{
		"alerts: {state_file: " + dir + "}":          path + ":1:22: alerts.state_file: " + strconv.Quote(dir) + ": is no regular file",
		"alerts: {state_file: " + dir + "/new}":      "",
		"web: {config_file: " + dir + "/nobody}":     path + ":1:20: web.config_file: " + strconv.Quote(dir+"/nobody") + ": no such file or directory",
		"web: {config_file: " + path + "}":           "",
		"haproxy: {config: " + dir + "/not-yet.cfg}": "",
	} {
		write(t, path, text)
		if _, err := Load(path); want == "" && err != nil || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("%s: %v; want %s", text, err, want)
		}
	}
}

// keyPair is a certificate and its key, in PEM.
func keyPair(t *testing.T) (cert, key string) {
	t.Helper()
	c, k, err := selfsigned.PEM(x509.Certificate{})
	if err != nil {
		t.Fatal(err)
	}
	return string(c), string(k)
}

// TestLabels: a label of the user's own is none of those that tell alerts apart.
func TestLabels(t *testing.T) {
	want := []string{"alertname"}
	for f := range reflect.TypeFor[alert.Labels]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		want = append(want, name)
	}
	if diff := cmp.Diff(want, ownLabels); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestFormats: the formats of the log are those that there are.
func TestFormats(t *testing.T) {
	for _, format := range Formats {
		// Some are not to be had everywhere.
		if _, err := alert.NewHandler(format, io.Discard, slog.LevelInfo); err != nil && strings.Contains(err.Error(), "not known") {
			t.Error(err)
		}
	}
}

// TestShippedFile: deploy/ has the default file, and as it stands it changes nothing.
func TestShippedFile(t *testing.T) {
	const path = "../../deploy/fintrace.yaml"
	golden.Check(t, path, string(DefaultFile()))
	text := DefaultFile()
	c, err := Parse(path, text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), c, same); diff != "" {
		t.Errorf("as it is shipped it changes (-default +got):\n%s", diff)
	}
	for i, line := range strings.Split(string(text), "\n") {
		if !strings.HasPrefix(line, "#") && line != "" {
			t.Errorf("line %d is in force: %s", i+1, line)
		}
		if utf8.RuneCountInString(line) > 82 {
			t.Errorf("line %d is wide: %s", i+1, line)
		}
	}
}

// TestUncommented: each block of the file is in order without its first #, and
// so are all of them, with all that stands aside in them.
func TestUncommented(t *testing.T) {
	blocks := uncommented()
	if len(blocks) != len(keys(Default())) {
		t.Fatalf("there are %d blocks", len(blocks))
	}
	for _, text := range blocks {
		c, err := Parse("f", []byte(text))
		if err != nil {
			t.Errorf("%v in\n%s", err, text)
			continue
		}
		first := strings.TrimSuffix(regexp.MustCompile("(?m)^[a-z_]+:").FindString(text), ":")
		if example := slices.Contains([]string{"haproxy", "limits", "sinks", "web"}, first); example != (cmp.Diff(Default(), c, same) != "") {
			t.Errorf("%s has an example, or changes what it says is the default", first)
		}
	}
	// Of two keys that exclude each other, the one or the other.
	for _, instead := range []bool{false, true} {
		var b strings.Builder
		for _, k := range beside(keys(Default()), instead) {
			show(&b, k, "", "", false)
		}
		if _, err := Parse("f", []byte(b.String())); err != nil {
			t.Errorf("%v in\n%s", err, b.String())
		}
	}
}

// uncommented is the blocks of the default file, without the first # of each line.
func uncommented() (blocks []string) {
	for _, block := range strings.Split(string(DefaultFile()), "\n\n")[1:] {
		blocks = append(blocks, regexp.MustCompile("(?m)^#").ReplaceAllString(block, ""))
	}
	return blocks
}

// beside is all keys as if none stood aside, but for those that exclude others,
// or that others exclude.
func beside(known []key, instead bool) []key {
	excluded := map[string]bool{}
	for _, k := range known {
		if k.instead != "" && instead {
			excluded[k.instead] = true
		} else if k.instead != "" {
			excluded[k.name] = true
		}
	}
	var all []key
	for _, k := range known {
		if excluded[k.name] {
			continue
		}
		k.aside = false
		k.keys = beside(k.keys, instead)
		if items := k.items; items != nil {
			k.items = func(i int) ([]key, func(*reader, value)) {
				known, after := items(i)
				return beside(known, instead), after
			}
		}
		all = append(all, k)
	}
	return all
}

// needed is what an item of a list cannot do without.
var needed = map[string]string{
	"limits":              "name: a, fin_timeout: 3s",
	"sinks.webhooks":      "url: https://hooks.example.org",
	"sinks.alertmanagers": `urls: "http://am.example.org"`,
}

// TestKeys: every key is documented; what is shown as the default changes
// nothing, and what is shown as an example something.
func TestKeys(t *testing.T) {
	var walk func(known []key, path string, in func(string) string)
	walk = func(known []key, path string, in func(string) string) {
		for _, k := range known {
			path := strings.TrimPrefix(path+"."+k.name, ".")
			if k.help == "" && k.read == nil {
				t.Errorf("%s is not documented", path)
			}
			if k.help != "" && !strings.HasSuffix(k.help, ".") {
				t.Errorf("what is said of %s does not end: %s", path, k.help)
			}
			switch {
			case k.items != nil:
				below, _ := k.items(0)
				walk(below, path, func(s string) string { return in(k.name + ": [{" + s + "}]") })
			case k.keys != nil:
				walk(k.keys, path, func(s string) string { return in(k.name + ": {" + s + "}") })
			case k.text == "":
				t.Errorf("%s has no value in the default file", path)
			default:
				checkKey(t, path, k, in)
			}
		}
	}
	walk(keys(Default()), "", func(s string) string { return s })
}

func checkKey(t *testing.T, path string, k key, in func(string) string) {
	item, rest := "", ""
	for list, needs := range needed {
		if below, found := strings.CutPrefix(path, list+"."); found {
			item, rest = needs, below
		}
	}
	with := func(s string) *Config {
		s = strings.Trim(s, ", ")
		text := in(s)
		if strings.Contains(rest, ".") { // What is needed is not in the mapping of the key.
			text = strings.Replace(text, "[{", "[{"+item+", ", 1)
		}
		r := &reader{anchors: map[string][]*ast.AnchorNode{}, written: map[string]value{}}
		c := Default()
		if root := r.root([]byte(text)); root != nil {
			r.mapping(value{node: root}, keys(c), nil)
		}
		// Some need another key, which is not the question here.
		if len(r.problems) > 0 && !slices.ContainsFunc(r.problems, func(p problem) bool {
			return regexp.MustCompile("needs its|there is no|there is a url|has no ").MatchString(p.text)
		}) {
			t.Fatalf("%s: %v", text, r.errors("f"))
		}
		return c
	}
	others := ""
	if item != "" && !strings.Contains(rest, ".") {
		for part := range strings.SplitSeq(item, ", ") {
			if !strings.HasPrefix(part, k.name+":") {
				others += part + ", "
			}
		}
	}
	before, after := with(others), with(others+k.name+": "+k.text)
	if changes := cmp.Diff(before, after, same) != ""; changes != k.example {
		t.Errorf("%s: %s is an example: %v; it changes something: %v", path, k.text, k.example, changes)
	}
}

// TestMeant: each key is found again with a slip in it.
func TestMeant(t *testing.T) {
	var walk func(known []key)
	walk = func(known []key) {
		for _, k := range known {
			for _, slip := range []string{k.name[1:], k.name + "s", strings.ReplaceAll(k.name, "_", "-"), strings.ToUpper(k.name), k.name[1:2] + k.name[:1] + k.name[2:]} {
				if slices.ContainsFunc(known, func(k key) bool { return k.name == slip }) {
					continue
				}
				if got := (&reader{}).meant(slip, known); got != "did you mean "+k.name+"?" {
					t.Errorf("%s for %s: %s", slip, k.name, got)
				}
			}
			walk(k.keys)
			if k.items != nil {
				below, _ := k.items(0)
				walk(below)
			}
		}
	}
	walk(keys(Default()))
}
