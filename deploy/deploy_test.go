// SPDX-License-Identifier: Apache-2.0

// Package deploy has nothing but tests: of what is shipped beside the daemon, by
// the tools that will read it, and against each other.
package deploy

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/fintrace/fintrace/internal/config"
)

// required names the variable that makes a tool that is not there a failure.
const required = "FINTRACE_REQUIRE_KERNEL_TESTS"

// tool finds a program, or skips the test; with FINTRACE_REQUIRE_KERNEL_TESTS set
// it fails instead.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
	case os.Getenv(required) != "":
		t.Fatalf("%s is set, but there is no %s", required, name)
	default:
		t.Skipf("not run: there is no %s", name)
	}
	return path
}

// run returns what a program prints, and fails the test where it fails.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("there is no %s", pattern)
	}
	return files
}

// parse reads a file of one YAML document. Keys that v lacks are an error.
func parse(t *testing.T, path string, v any) {
	t.Helper()
	if err := yaml.UnmarshalWithOptions([]byte(read(t, path)), v, yaml.DisallowUnknownField()); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// documents reads a file of several YAML documents.
func documents(t *testing.T, path string) (all []map[string]any) {
	t.Helper()
	d := yaml.NewDecoder(strings.NewReader(read(t, path)))
	for {
		var doc map[string]any
		err := d.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if doc != nil {
			all = append(all, doc)
		}
	}
}

// at walks into a document by keys, or numbers of list items.
func at[T any](t *testing.T, v any, path ...any) T {
	t.Helper()
	for i, step := range path {
		switch step := step.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[step]
		case int:
			l, _ := v.([]any)
			if step >= len(l) {
				t.Fatalf("there is nothing at %v", path[:i+1])
			}
			v = l[step]
		}
	}
	found, ok := v.(T)
	if !ok {
		t.Fatalf("at %v is %v (%T)", path, v, v)
	}
	return found
}

// The README is where the others send people.

var (
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	fenced  = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")
	link    = regexp.MustCompile(`\]\(([^)#]+)\)`)
)

// blocks are the README's examples of a language.
func blocks(t *testing.T, language string) (found []string) {
	t.Helper()
	for _, m := range fenced.FindAllStringSubmatch(read(t, "README.md"), -1) {
		if m[1] == language {
			found = append(found, m[2])
		}
	}
	if len(found) == 0 {
		t.Fatalf("README.md has no example in %s", language)
	}
	return found
}

func TestReadmeLinks(t *testing.T) {
	for _, m := range link.FindAllStringSubmatch(read(t, "README.md"), -1) {
		if _, err := os.Stat(m[1]); err != nil {
			t.Error("README.md links to what is not there:", err)
		}
	}
}

// TestReadmeExamples has each example in YAML read by the program that it is for.
func TestReadmeExamples(t *testing.T) {
	checks := map[string][]string{
		"# prometheus.yml":   {"promtool", "check", "config", "--syntax-only"},
		"# alertmanager.yml": {"amtool", "check-config"},
	}
	seen := map[string]int{}
	for _, text := range blocks(t, "yaml") {
		first, _, _ := strings.Cut(text, "\n")
		seen[first]++
		command := checks[first]
		if strings.HasPrefix(first, "# metric_relabel_configs") {
			command = checks["# prometheus.yml"]
			text = "scrape_configs:\n- job_name: fintrace\n  metric_relabel_configs:\n" + indent(text, "  ")
		}
		if command == nil {
			t.Errorf("README.md has an example that begins with %q: nothing checks it", first)
			continue
		}
		t.Run(strings.TrimLeft(first, "# "), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "example.yml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, tool(t, command[0]), append(command[1:], path)...)
		})
	}
	for first := range checks {
		if seen[first] == 0 {
			t.Errorf("README.md has no example that begins with %q", first)
		}
	}
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(by + line)
	}
	return b.String()
}

// TestReadmeInhibits: an example that silences an alert that does not exist
// silences nothing.
func TestReadmeInhibits(t *testing.T) {
	var names []string
	for _, r := range rules(t) {
		names = append(names, r.Alert)
	}
	for _, text := range blocks(t, "yaml") {
		for _, word := range regexp.MustCompile(`Fintrace[A-Za-z]+(\.\*)?`).FindAllString(text, -1) {
			if !slices.ContainsFunc(names, regexp.MustCompile("^"+word+"$").MatchString) {
				t.Errorf("README.md inhibits %s, which no alert is called", word)
			}
		}
	}
}

// TestReadmeRunbook: each alert has a section, and each section an alert.
func TestReadmeRunbook(t *testing.T) {
	_, runbook, _ := strings.Cut(read(t, "README.md"), "\n# Runbook\n")
	var sections []string
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(runbook, ""), -1) {
		sections = append(sections, m[1])
	}
	var alerts []string
	for _, r := range rules(t) {
		if r.Alert != "" {
			alerts = append(alerts, r.Alert)
		}
	}
	for _, name := range alerts {
		if !slices.Contains(sections, name) {
			t.Errorf("the runbook of README.md lacks %s", name)
		}
	}
	for _, name := range sections {
		if !slices.Contains(alerts, name) {
			t.Errorf("the runbook of README.md has %s, which no alert is called", name)
		}
	}
}

// port is where the daemon listens.
func port(t *testing.T) string {
	t.Helper()
	_, port, err := net.SplitHostPort(config.Default().Web.Listen[0])
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// TestPort: who looks for the daemon looks where it listens.
func TestPort(t *testing.T) {
	for _, path := range []string{"README.md", "Dockerfile", "kubernetes/daemonset.yaml"} {
		if !strings.Contains(read(t, path), port(t)) {
			t.Errorf("%s does not name port %s", path, port(t))
		}
	}
}
