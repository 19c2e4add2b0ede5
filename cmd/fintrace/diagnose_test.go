// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/fintrace/fintrace/internal/kerneltest"
)

// TestDiagnoseInterrupted: Ctrl-C ends the watch, and the report comes with
// what has been seen; nothing else is printed where nobody looks on.
func TestDiagnoseInterrupted(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	p := start(t, "fintrace", "diagnose", "--duration", "10m", "--netns", inode(ns))
	var ids map[string][]uint32
	if err := await("it to attach", func() bool {
		ids = kernelObjects(t, p.Process.Pid)
		return len(ids["link_id"]) > 0
	}); err != nil {
		t.Fatal(err)
	}
	if err := p.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	p.until(t, "Nothing is stuck: no connection is in FIN_WAIT2.")
	if err := p.Wait(); err != nil {
		t.Errorf("%v: %s", err, &p.stderr)
	}
	if p.stderr.Len() > 0 {
		t.Errorf("it says more than the report: %s", &p.stderr)
	}
	checkGone(t, ids)
}

// TestDiagnoseOutputs: the JSON is one document, and the line for a monitoring
// system one line.
func TestDiagnoseOutputs(t *testing.T) {
	kerneltest.Require(t)
	ns := kerneltest.NewNamespace(t)
	diagnose := func(args ...string) []byte {
		out, err := exec.Command("fintrace", append([]string{"diagnose", "--duration", "0", "--netns", inode(ns)}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var document struct {
		Verdict []string
		Exit    *int
	}
	if text := diagnose("-o", "json"); json.Unmarshal(text, &document) != nil || len(document.Verdict) == 0 ||
		document.Exit == nil || *document.Exit != 0 {
		t.Errorf("the JSON is %s", text)
	}
	if text := diagnose("-o", "nagios"); bytes.Count(text, []byte("\n")) != 1 || !strings.HasPrefix(string(text), "FINTRACE OK - ") {
		t.Errorf("the line is %s", text)
	}
}
