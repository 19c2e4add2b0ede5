// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

var dashboards = []string{"host", "fleet"}

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ H, W, X, Y int }
	FieldConfig              struct {
		Defaults struct {
			Unit  string
			Links []struct{ URL string }
		}
	}
	Datasource struct{ UID string }
	Targets    []struct {
		RefID, Expr string
		Datasource  struct{ UID string }
	}
}

type dashboard struct {
	UID, Title, Description string
	SchemaVersion           int
	Panels                  []panel
	Links                   []struct{ URL string }
	Templating              struct {
		List []struct {
			Name, Type, Definition string
			Query                  any
		}
	}
	Annotations struct{ List []struct{ Name, Expr string } }
}

// expression is a query, with the variables of Grafana replaced.
type expression struct{ where, text string }

func loadDashboard(t *testing.T, name string) *dashboard {
	t.Helper()
	var d dashboard
	if err := json.Unmarshal([]byte(read(t, "grafana/"+name+".json")), &d); err != nil {
		t.Fatalf("grafana/%s.json: %v", name, err)
	}
	return &d
}

var (
	interval = regexp.MustCompile(`\$__(rate_)?interval\b`)
	variable = regexp.MustCompile(`\$\{?([a-zA-Z_]+)`)
)

func (d *dashboard) expressions() (all []expression) {
	add := func(where, text string) {
		text = interval.ReplaceAllString(text, "5m")
		all = append(all, expression{d.UID + " " + where, variable.ReplaceAllString(text, ".*")})
	}
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			add(fmt.Sprintf("panel %d %q %s", p.ID, p.Title, q.RefID), q.Expr)
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			add("annotation "+a.Name, a.Expr)
		}
	}
	return all
}

func TestDashboards(t *testing.T) {
	exposed, recorded := contract(t), recorded(t)
	labelValues := regexp.MustCompile(`^label_values\((.+), ([a-z_]+)\)$`)
	for _, name := range dashboards {
		t.Run(name, func(t *testing.T) {
			d := loadDashboard(t, name)
			if d.UID != "fintrace-"+name || d.Title == "" || d.Description == "" || d.SchemaVersion < 36 {
				t.Errorf("uid %q, title %q, description %q, schema version %d (that of Grafana 9 is 36)", d.UID, d.Title, d.Description, d.SchemaVersion)
			}
			expressions := d.expressions()
			variables := map[string]bool{}
			for _, v := range d.Templating.List {
				variables[v.Name] = true
				if v.Type != "query" {
					continue
				}
				m := labelValues.FindStringSubmatch(v.Definition)
				if m == nil {
					t.Errorf("variable %s: %q is no label_values(metric, label)", v.Name, v.Definition)
					continue
				}
				// That it has the label is checked as if it selected by it.
				text := variable.ReplaceAllString(m[1], ".*")
				if !strings.HasSuffix(text, "}") {
					text += "{}"
				}
				expressions = append(expressions, expression{d.UID + " variable " + v.Name, strings.TrimSuffix(text, "}") + `, ` + m[2] + `!=""}`})
			}
			for i, e := range expressions {
				expressions[i].text = strings.ReplaceAll(e.text, "{, ", "{")
				if name == "fleet" {
					checkMetrics(t, e.where, expressions[i].text, recorded, nil)
				} else {
					checkMetrics(t, e.where, expressions[i].text, nil, exposed)
				}
			}
			for _, m := range variable.FindAllStringSubmatch(read(t, "grafana/"+name+".json"), -1) {
				if v := m[1]; !strings.HasPrefix(v, "__") && !variables[v] {
					t.Errorf("there is no variable $%s", v)
				}
			}
			d.checkPanels(t)
			parses(t, expressions)
		})
	}
}

// TestFleetIsRecorded: with ten thousand hosts, what reads their own series is
// what takes the server down when it is needed.
func TestFleetIsRecorded(t *testing.T) {
	raw := regexp.MustCompile(`\b(fintrace|process|go)_[a-z_]+|\bup\b`)
	for _, e := range loadDashboard(t, "fleet").expressions() {
		for _, name := range regexp.MustCompile(`[a-zA-Z0-9_:]+`).FindAllString(quoted.ReplaceAllString(e.text, ""), -1) {
			if !strings.Contains(name, ":") && raw.MatchString(name) {
				t.Errorf("%s reads %s of each host", e.where, name)
			}
		}
	}
}

func (d *dashboard) checkPanels(t *testing.T) {
	t.Helper()
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 {
			t.Errorf("panel %q: another has id %d, or it has none", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.Title == "" {
			t.Errorf("panel %d has no title", p.ID)
		}
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q is not within the 24 columns: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, is := taken[[2]int{x, y}]; is {
					t.Fatalf("panels %q and %q overlap", other, p.Title)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for _, l := range p.FieldConfig.Defaults.Links {
			checkLink(t, l.URL)
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 {
			t.Errorf("panel %q lacks a description, a unit or a query", p.Title)
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if refs[q.RefID] {
				t.Errorf("panel %q has two queries %s", p.Title, q.RefID)
			}
			refs[q.RefID] = true
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q reads %q, not what is chosen", p.Title, q.Datasource.UID)
			}
		}
	}
	if len(d.Links) == 0 {
		t.Error("it leads to no other dashboard")
	}
	for _, l := range d.Links {
		checkLink(t, l.URL)
	}
}

// checkLink says whether a link leads to one of the dashboards.
func checkLink(t *testing.T, url string) {
	t.Helper()
	uid, _, _ := strings.Cut(strings.TrimPrefix(url, "/d/"), "?")
	for _, name := range dashboards {
		if loadDashboard(t, name).UID == uid {
			return
		}
	}
	t.Errorf("a link leads to %s, which is none of the dashboards", url)
}
