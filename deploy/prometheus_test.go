// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

type rule struct {
	Alert, Record, Expr, For string
	Labels, Annotations      map[string]string
	file                     string
}

// rules are those of all files.
func rules(t *testing.T) (all []rule) {
	t.Helper()
	for _, path := range glob(t, "prometheus/*.yml") {
		var file struct {
			Groups []struct {
				Name, Interval string
				Rules          []rule
			}
		}
		parse(t, path, &file)
		for _, g := range file.Groups {
			for _, r := range g.Rules {
				r.file = path
				all = append(all, r)
			}
		}
	}
	return all
}

func TestRulesCheck(t *testing.T) {
	run(t, tool(t, "promtool"), append([]string{"check", "rules", "--lint-fatal"}, glob(t, "prometheus/*.yml")...)...)
}

func TestRulesUnits(t *testing.T) {
	run(t, tool(t, "promtool"), append([]string{"test", "rules"}, glob(t, "prometheus/tests/*.yml")...)...)
}

// TestRulesTested: each alert is tested where it fires, and close to where it does.
func TestRulesTested(t *testing.T) {
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, path := range glob(t, "prometheus/tests/*.yml") {
		var file struct {
			RuleFiles          []string `yaml:"rule_files"`
			EvaluationInterval string   `yaml:"evaluation_interval"`
			Tests              []struct {
				Name, Interval string
				InputSeries    []map[string]string `yaml:"input_series"`
				PromqlExprTest []any               `yaml:"promql_expr_test"`
				AlertRuleTest  []struct {
					Alertname string
					EvalTime  string `yaml:"eval_time"`
					ExpAlerts []any  `yaml:"exp_alerts"`
				} `yaml:"alert_rule_test"`
			}
		}
		parse(t, path, &file)
		for _, test := range file.Tests {
			for _, a := range test.AlertRuleTest {
				if len(a.ExpAlerts) > 0 {
					fires[a.Alertname] = true
				} else {
					silent[a.Alertname] = true
				}
			}
		}
	}
	for _, r := range rules(t) {
		if r.Alert == "" {
			continue
		}
		if !fires[r.Alert] {
			t.Errorf("%s: no test in which it fires", r.Alert)
		}
		if !silent[r.Alert] {
			t.Errorf("%s: no test in which it does not fire", r.Alert)
		}
	}
}

func TestRulesSayWhat(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rules(t) {
		name := r.Alert + r.Record
		if seen[name] {
			t.Errorf("there are two rules called %s", name)
		}
		seen[name] = true
		if r.Alert == "" {
			continue
		}
		if want := "https://github.com/fintrace/fintrace/blob/main/deploy/README.md#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s: its runbook is at %s, not %q", r.Alert, want, r.Annotations["runbook_url"])
		}
		if !slices.Contains([]string{"info", "warning", "critical"}, r.Labels["severity"]) {
			t.Errorf("%s: severity %q", r.Alert, r.Labels["severity"])
		}
		for _, annotation := range []string{"summary", "description"} {
			if r.Annotations[annotation] == "" {
				t.Errorf("%s: no %s", r.Alert, annotation)
			}
		}
	}
}

// contract is what the daemon exposes: the labels of each metric.
func contract(t *testing.T) map[string]map[string]bool {
	t.Helper()
	sample := regexp.MustCompile(`(?m)^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? \S+$`)
	label := regexp.MustCompile(`([a-zA-Z_]+)="(?:[^"\\]|\\.)*"`)
	metrics := map[string]map[string]bool{}
	for _, path := range glob(t, "../internal/metrics/testdata/*.prom") {
		for _, m := range sample.FindAllStringSubmatch(read(t, path), -1) {
			// As a native histogram has it, too.
			for _, name := range []string{m[1], strings.TrimSuffix(m[1], "_bucket")} {
				if metrics[name] == nil {
					metrics[name] = map[string]bool{}
				}
				for _, l := range label.FindAllStringSubmatch(m[2], -1) {
					metrics[name][l[1]] = true
				}
			}
		}
	}
	return metrics
}

var (
	quoted    = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
	metric    = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*fintrace_[a-z0-9_:]+|fintrace_[a-z0-9_:]+`)
	selectors = regexp.MustCompile(`([a-zA-Z0-9_:]*fintrace_[a-z0-9_:]+)\{([^}]*)\}`)
	matcher   = regexp.MustCompile(`([a-zA-Z_]+)\s*(?:=~|!~|!=|=)`)
	// Prometheus', and those that targets have by these files.
	targetLabels = []string{"cluster", "instance", "job"}
)

// checkMetrics says which metrics and labels of an expression nobody makes.
func checkMetrics(t *testing.T, where, expr string, recorded map[string]bool, exposed map[string]map[string]bool) {
	t.Helper()
	for _, name := range metric.FindAllString(quoted.ReplaceAllString(expr, `""`), -1) {
		if exposed[name] == nil && !recorded[name] {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
	for _, s := range selectors.FindAllStringSubmatch(expr, -1) {
		labels := exposed[s[1]]
		if labels == nil {
			// By its name, a recorded one has cluster_proxy_side: before it.
			level, _, _ := strings.Cut(s[1], ":")
			labels = map[string]bool{}
			for _, l := range strings.Split(level, "_") {
				labels[l] = true
			}
		}
		for _, m := range matcher.FindAllStringSubmatch(quoted.ReplaceAllString(s[2], `""`), -1) {
			if !labels[m[1]] && !slices.Contains(targetLabels, m[1]) {
				t.Errorf("%s: %s has no label %s", where, s[1], m[1])
			}
		}
	}
}

func recorded(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for _, r := range rules(t) {
		names[r.Record] = true
	}
	return names
}

// TestRulesMetrics: rules name what there is; those of a fleet what is recorded.
func TestRulesMetrics(t *testing.T) {
	exposed, recorded := contract(t), recorded(t)
	used := map[string]bool{}
	for _, r := range rules(t) {
		where := r.file + ": " + r.Alert + r.Record
		if r.file == "prometheus/fleet.yml" {
			checkMetrics(t, where, r.Expr, recorded, nil)
		} else {
			checkMetrics(t, where, r.Expr, nil, exposed)
		}
		for _, name := range metric.FindAllString(r.Expr, -1) {
			used[name] = true
		}
	}
	for _, d := range dashboards {
		for _, e := range loadDashboard(t, d).expressions() {
			for _, name := range metric.FindAllString(e.text, -1) {
				used[name] = true
			}
		}
	}
	for name := range recorded {
		if name != "" && !used[name] {
			t.Errorf("%s is recorded, and nothing reads it", name)
		}
	}
}

// parses says whether Prometheus takes expressions: it reads them from rules alone.
func parses(t *testing.T, expressions []expression) {
	t.Helper()
	promtool := tool(t, "promtool")
	var b strings.Builder
	b.WriteString("groups: [{name: a, rules: [\n")
	for _, e := range expressions {
		// The name says where it is, in what promtool says.
		b.WriteString("{alert: " + quoteYAML(e.where) + ", expr: " + quoteYAML(e.text) + "},\n")
	}
	b.WriteString("]}]\n")
	path := filepath.Join(t.TempDir(), "expressions.yml")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, promtool, "check", "rules", path)
}

func quoteYAML(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
