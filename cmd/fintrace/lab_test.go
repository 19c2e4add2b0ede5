// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/fintrace/fintrace/internal/haproxytest"
	"github.com/fintrace/fintrace/internal/kerneltest"
	"github.com/fintrace/fintrace/internal/report"
)

var labMatrix = flag.Bool("lab.matrix", false, "print which scenario of the lab has which finding")

// A labScenario is a host in trouble, or one that only looks like it, and what
// an expert says about it.
type labScenario struct {
	name   string
	stage  func(*world)                       // makes it, and returns once it is there
	during func(*world) func(context.Context) // goes on while the diagnosis looks
	as     string                             // a command that diagnoses instead of fintrace
	args   []string                           // of the diagnosis

	must []string // findings
	not  []string // findings that are close, and wrong
	may  []string // findings that are true here, and not what it is about
	exit []int    // one of these
	says []string // words of the verdict
}

// labFindings are all that a diagnosis can find, in the order of the matrix.
var labFindings = []string{
	"held-pile-up", "closed-harmless", "peer-is-client", "peer-is-one",
	"client-fin-unset", "server-fin-unset", "maxconn-pressure", "global-maxconn-too-small", "global-maxconn-no-room",
	"fin-timeout-no-help", "tcp-fin-timeout-trap", "tcp-fin-timeout-long", "tcp-fin-timeout-changed",
	"old-workers", "local-peer", "close-wait-twins", "age-cliff", "bursts", "growing", "tables", "not-seen",
}

// A labDiagnosis is what `fintrace diagnose -o json` prints.
type labDiagnosis struct {
	Verdict  []string
	Exit     int
	Findings []struct{ ID, Severity, Title string }
	Evidence struct {
		Unlooked []string `json:"not_looked_at"`
	}

	code   int // with which it exits
	stderr string
}

func (d *labDiagnosis) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "exit %d: %s\n", d.code, strings.Join(d.Verdict, " "))
	for _, f := range d.Findings {
		fmt.Fprintf(&b, "\t%-8s %s: %s\n", f.Severity, f.ID, f.Title)
	}
	for _, line := range d.Evidence.Unlooked {
		fmt.Fprintf(&b, "\tnot looked at: %s\n", line)
	}
	b.WriteString(d.stderr)
	return b.String()
}

// TestLab has every scenario diagnosed, each on a host of its own.
func TestLab(t *testing.T) {
	kerneltest.Require(t)
	haproxytest.System(t)
	results := &labResults{rows: map[string]map[string]byte{}}
	// As many at a time as the machine can watch without delay.
	places := make(chan struct{}, 6*runtime.NumCPU())
	t.Run("scenarios", func(t *testing.T) {
		for _, s := range labScenarios {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				places <- struct{}{}
				t.Cleanup(func() { <-places })
				results.judge(t, &s, s.run(t))
			})
		}
	})
	if *labMatrix {
		results.print()
	}
}

// TestLabIsWhole looks for findings that no scenario asks for, or refuses.
func TestLabIsWhole(t *testing.T) {
	for _, id := range labFindings {
		var asked, refused bool
		for _, s := range labScenarios {
			asked = asked || slices.Contains(s.must, id)
			refused = refused || slices.Contains(s.not, id)
		}
		if !asked || !refused {
			t.Errorf("%s: asked for %v, refused %v", id, asked, refused)
		}
	}
	names := map[string]bool{}
	for _, s := range labScenarios {
		if names[s.name] {
			t.Errorf("two scenarios are called %q", s.name)
		}
		names[s.name] = true
		all := slices.Concat(s.must, s.not, s.may)
		slices.Sort(all)
		if len(slices.Compact(slices.Clone(all))) != len(all) {
			t.Errorf("%s: a finding is named twice: %s", s.name, all)
		}
	}
}

// run makes the scenario and has it diagnosed.
func (s *labScenario) run(t *testing.T) *labDiagnosis {
	w := newWorld(t)
	if s.stage != nil {
		s.stage(w)
	}
	var goingOn sync.WaitGroup
	ctx, end := context.WithCancel(t.Context())
	if s.during != nil {
		goingOn.Go(func() { s.during(w)(ctx) })
	}
	d := diagnose(t, append([]string{cmp.Or(s.as, "fintrace"), "diagnose", "-o", "json", "--netns", inode(w.host), "--duration", "5s"}, s.args...))
	end()
	goingOn.Wait()
	return d
}

// diagnose runs a command that prints a diagnosis in JSON.
func diagnose(t *testing.T, command []string) *labDiagnosis {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	d := &labDiagnosis{}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		d.code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if stdout.Len() == 0 && d.code == report.ExitUnknown {
		d.Exit, d.Verdict = d.code, []string{stderr.String()} // It could not look.
		return d
	}
	if err := json.Unmarshal(stdout.Bytes(), d); err != nil {
		t.Fatalf("%s: exit code %d, %v:\n%.1000s\n%s", strings.Join(command, " "), d.code, err, &stdout, &stderr)
	}
	d.stderr = stderr.String()
	return d
}

// The cells of the matrix.
const (
	labHit     = '+' // asked for, and there
	labMiss    = '!' // asked for, and not there
	labFalse   = 'X' // there, and wrong
	labRefused = '-' // not there, where it would be easy to be wrong
	labOther   = 'o' // there, true, and not what it is about
	labNone    = ' '
)

// labResults are what the scenarios came to.
type labResults struct {
	mu     sync.Mutex
	rows   map[string]map[string]byte
	others []string // exit codes and verdicts that are wrong
}

func (r *labResults) judge(t *testing.T, s *labScenario, d *labDiagnosis) {
	t.Helper()
	found := map[string]bool{}
	for _, f := range d.Findings {
		found[f.ID] = true
	}
	row := map[string]byte{}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(s.must, s.not, slices.Collect(maps.Keys(found)))))) {
		switch must := slices.Contains(s.must, id); {
		case must && found[id]:
			row[id] = labHit
		case must:
			row[id] = labMiss
			t.Errorf("it misses %s", id)
		case !found[id]:
			row[id] = labRefused
		case slices.Contains(s.may, id):
			row[id] = labOther
		default:
			row[id] = labFalse
			t.Errorf("it finds %s, which is wrong", id)
		}
	}
	other := func(format string, args ...any) {
		t.Errorf(format, args...)
		r.mu.Lock()
		r.others = append(r.others, s.name+": "+fmt.Sprintf(format, args...))
		r.mu.Unlock()
	}
	if !slices.Contains(s.exit, d.code) || d.Exit != d.code {
		other("exit code %d (%d in the output), want one of %v", d.code, d.Exit, s.exit)
	}
	verdict := strings.ToLower(strings.Join(d.Verdict, " "))
	for _, word := range s.says {
		if !strings.Contains(verdict, strings.ToLower(word)) {
			other("the verdict has no %q: %s", word, verdict)
		}
	}
	if t.Failed() || *labMatrix && testing.Verbose() {
		t.Log(d)
	}
	r.mu.Lock()
	r.rows[s.name] = row
	r.mu.Unlock()
}

// print prints the matrix of scenarios and findings.
func (r *labResults) print() {
	var b strings.Builder
	columns := slices.Clone(labFindings)
	for _, row := range r.rows {
		for _, id := range slices.Sorted(maps.Keys(row)) {
			if !slices.Contains(columns, id) {
				columns = append(columns, id)
			}
		}
	}
	const name = 42
	b.WriteString("\n")
	for i, id := range columns {
		fmt.Fprintf(&b, "%*s%s ┌ %s\n", name, "", strings.Repeat(" │", i), id)
	}
	count := map[byte]int{}
	for _, s := range labScenarios {
		row, ran := r.rows[s.name]
		if !ran {
			continue
		}
		fmt.Fprintf(&b, "%-*s", name, s.name)
		for _, id := range columns {
			cell, ok := row[id]
			if !ok {
				cell = labNone
			}
			count[cell]++
			fmt.Fprintf(&b, " %c", cell)
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "\n%c hit   %c miss   %c false alarm   %c rightly silent, though close   %c also true\n\n",
		labHit, labMiss, labFalse, labRefused, labOther)
	for _, line := range r.others {
		b.WriteString(line + "\n")
	}
	fmt.Fprintf(&b, "%d scenarios: %d hits, %d misses, %d false alarms, %d wrong exit codes or verdicts\n",
		len(r.rows), count[labHit], count[labMiss], count[labFalse], len(r.others))
	fmt.Fprint(os.Stdout, b.String())
}
