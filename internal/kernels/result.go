// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A result is what came of one guest.
type result struct {
	kernel kernel
	rows   []row
	errors []string // what went wrong beside the tests
	failed []string // the outputs of steps that failed
}

// A row is a line of the table: a test, or a step that is none.
type row struct {
	name    string
	outcome string // ok, FAIL, skipped
	seconds float64
}

const (
	passed  = "ok"
	failed  = "FAIL"
	skipped = "skipped"
	notRun  = "–"
)

var (
	// testLine is what -test.v says of a test, subtests left aside.
	testLine = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+)s\)`)
	outcomes = map[string]string{"PASS": passed, "FAIL": failed, "SKIP": skipped}
)

// read makes sense of what a guest wrote.
func read(k kernel, steps []step, out []byte, why string) *result {
	r := &result{kernel: k}
	if why != "" {
		r.errors = append(r.errors, why)
	}
	var (
		running string
		text    bytes.Buffer
		done    = map[string]bool{}
		isDown  bool
	)
	for line := range strings.Lines(strings.ReplaceAll(string(out), "\r\n", "\n")) {
		// What a program prints need not end with a line.
		before, marked, isMark := strings.Cut(line, mark)
		text.WriteString(before)
		if m := testLine.FindStringSubmatch(before); m != nil {
			seconds, _ := strconv.ParseFloat(m[3], 64) // of digits
			r.rows = append(r.rows, row{name: m[2], outcome: outcomes[m[1]], seconds: seconds})
		}
		if !isMark {
			continue
		}
		words := strings.Fields(marked)
		switch {
		case len(words) == 2 && words[0] == "run":
			running = words[1]
			text.Reset()
		case len(words) == 4 && words[0] == "exit" && words[1] == running:
			r.exit(words, text.String())
			done[running], running = true, ""
		case len(words) > 0 && words[0] == "error":
			r.errors = append(r.errors, strings.Join(words[1:], " "))
		case len(words) == 1 && words[0] == "down":
			isDown = true
		}
	}
	if running != "" {
		r.failed = append(r.failed, running+" did not end:\n"+text.String())
	}
	for _, s := range steps {
		if !done[s.Name] {
			r.rows = append(r.rows, row{name: s.Name, outcome: failed})
		}
	}
	if !isDown && len(r.errors) == 0 {
		r.errors = append(r.errors, "it ended before its steps did")
	}
	return r
}

// exit is a step's "exit NAME CODE SECONDS".
func (r *result) exit(words []string, text string) {
	name, code := words[1], words[2]
	seconds, _ := strconv.ParseFloat(words[3], 64)
	why := ""
	if code != "0" {
		why = "exited with " + code
	} else if check := outputs[name]; check != nil {
		why = check(r.kernel, text)
	}
	outcome := passed
	if why != "" {
		outcome = failed
		r.failed = append(r.failed, fmt.Sprintf("%s %s:\n%s", name, why, text))
	}
	if !strings.Contains(name, "/") {
		r.rows = append(r.rows, row{name: "fintrace " + name, outcome: outcome, seconds: seconds})
	}
}

// outputs are checks of what fintrace prints on a kernel that has just been
// started: "" or what is wrong.
var outputs = map[string]func(k kernel, text string) string{
	"version": checkFeatures,
	"list": func(_ kernel, text string) string {
		if text != "No connection is in FIN_WAIT2.\n" {
			return "does not say that there is no connection, and nothing else"
		}
		return ""
	},
	"diagnose": func(_ kernel, text string) string {
		if !strings.HasPrefix(text, "Nothing is stuck: no connection is in FIN_WAIT2.\n") {
			return "does not say that nothing is stuck, and that it has seen all"
		}
		return ""
	},
	"list-locked": func(_ kernel, text string) string {
		if !lockedDown.MatchString(text) || !strings.HasSuffix(text, "\nNo connection is in FIN_WAIT2.\n") {
			return "does not say what is missing, and that there is no connection"
		}
		return ""
	},
	"diagnose-locked": func(_ kernel, text string) string {
		if !lockedDown.MatchString(text) || !strings.HasPrefix(text, "Nothing that could be seen is stuck: no connection is in FIN_WAIT2.\n") {
			return "does not say what is missing, and that nothing that could be seen is stuck"
		}
		return ""
	},
}

// lockedDown is why there is no BPF, in lines of any width.
var lockedDown = regexp.MustCompile(`what\s+only\s+BPF\s+shows:[^:]*:\s+this\s+kernel\s+is\s+locked\s+down`)

// featureLine is one of `fintrace version --features`.
var featureLine = regexp.MustCompile(`(?m)^(\S.*?) {2,}(yes|no|unknown) {2,}\S`)

// checkFeatures: what a kernel is known to have is there, and what it is known to
// lack is not.
func checkFeatures(k kernel, text string) string {
	there := map[string]string{}
	for _, m := range featureLine.FindAllStringSubmatch(text, -1) {
		there[m[1]] = m[2]
	}
	for _, name := range k.lacks {
		if there[name] != "no" {
			return fmt.Sprintf("says %q of %s, which this kernel lacks", there[name], name)
		}
		delete(there, name)
	}
	for name, is := range there {
		if is != "yes" {
			return fmt.Sprintf("says %q of %s, which this kernel has", is, name)
		}
	}
	if len(there) == 0 {
		return "names no feature"
	}
	return ""
}

func (r *result) passed() bool {
	return len(r.errors) == 0 && len(r.failed) == 0 &&
		!slices.ContainsFunc(r.rows, func(row row) bool { return row.outcome != passed })
}

func (r *result) verdict() string {
	if r.passed() {
		return passed
	}
	return failed
}

// explain is why it did not pass.
func (r *result) explain() string {
	var b strings.Builder
	for _, why := range r.errors {
		fmt.Fprintf(&b, "%s: %s\n", r.kernel.name, why)
	}
	for _, row := range r.rows {
		if row.outcome == skipped {
			fmt.Fprintf(&b, "%s: %s was skipped: what should be there is not\n", r.kernel.name, row.name)
		}
	}
	for _, text := range r.failed {
		fmt.Fprintf(&b, "%s: %s\n", r.kernel.name, strings.TrimRight(text, "\n"))
	}
	return b.String()
}

// table has a line for each test and a column for each kernel, in Markdown.
func table(results []*result) string {
	var names []string
	for _, r := range results {
		for _, row := range r.rows {
			if !slices.Contains(names, row.name) {
				names = append(names, row.name)
			}
		}
	}
	var b strings.Builder
	b.WriteString("| |")
	for _, r := range results {
		fmt.Fprintf(&b, " %s |", r.kernel.release())
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(results)) + "\n")
	for _, name := range names {
		fmt.Fprintf(&b, "| %s |", name)
		for _, r := range results {
			cell := notRun
			if i := slices.IndexFunc(r.rows, func(row row) bool { return row.name == name }); i >= 0 {
				cell = r.rows[i].outcome
				if s := r.rows[i].seconds; s >= 1 {
					cell += fmt.Sprintf(", %.0fs", s)
				}
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteByte('\n')
	}
	return b.String()
}
