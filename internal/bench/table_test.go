// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the README says of costs is what BENCHMARKS.md says.
func TestReadmeQuotes(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	want := quote(read("BENCHMARKS.md"))
	if want == "" {
		t.Fatal("BENCHMARKS.md has no line with a bar")
	}
	_, rest, begun := strings.Cut(read("README.md"), quoteBegin)
	got, _, ended := strings.Cut(rest, quoteEnd)
	if !begun || !ended {
		t.Fatalf("README.md has no marks %q and %q", quoteBegin, quoteEnd)
	}
	if got != want {
		t.Errorf("README.md quotes\n%s\nwhere BENCHMARKS.md has\n%s", got, want)
	}
}

func TestQuote(t *testing.T) {
	r := results{kernel: "6.18", cpu: "2 × CPU", versions: []string{"ss 6.1"}, sections: []section{
		{name: "one", rows: []row{
			{what: "with a bar", ratio: "2 ×", bar: "≤ 1", met: meets(false), fintrace: "2 ns", beside: "other 1 ns"},
			{what: "without one", fintrace: "3 ns"},
		}},
		{name: "two", rows: []row{{what: "not known", bar: "0", met: unknown, fintrace: "not installed"}}, about: "About it."},
	}}
	path := filepath.Join(t.TempDir(), "README.md")
	if err := os.WriteFile(path, []byte("before\n"+quoteBegin+"old\n"+quoteEnd+"after\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := quoteInto(path, r.markdown()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const want = "before\n" + quoteBegin + `| measure | what       | ratio | bar | met    | fintrace      | beside it  |
|---------|------------|-------|-----|--------|---------------|------------|
| one     | with a bar | 2 ×   | ≤ 1 | **no** | 2 ns          | other 1 ns |
| two     | not known  |       | 0   | ?      | not installed |            |

` + "Written by `make bench` on 0001-01-01 in 0s. Linux 6.18, 2 × CPU.\nBeside it: libbpf-tools' and bcc's tcpstates, ss 6.1.\n" + quoteEnd + "after\n"
	if string(got) != want {
		t.Errorf("quoted\n%s\nwant\n%s", got, want)
	}
}

func TestQuoteNeedsMarks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "README.md")
	const text = "nothing to quote between\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := quoteInto(path, ""); err == nil || !strings.Contains(err.Error(), "no marks") {
		t.Errorf("error %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != text {
		t.Errorf("the file is %q, error %v", got, err)
	}
}

func TestFlags(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"-only snapshots", `not "snapshots"`},
		{"-only host -o x", "for the whole"},
		{"-only host -quote x", "for the whole"},
		{"-quote x", "-quote quotes what -o writes"},
		{"-o x host", `flags only, not "host"`},
		{"nonsense", `no part "nonsense"`},
	} {
		if err := run(t.Context(), strings.Fields(tt.args)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.args, err, tt.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{3, 1, 2}, 0.5, 2},
		{[]float64{4, 1, 2, 3}, 0.5, 2.5},
		{[]float64{7}, 0.99, 7},
		{[]float64{2, 9, 4}, 1, 9},
	} {
		if got := quantile(tt.values, tt.q); got != tt.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", tt.values, tt.q, got, tt.want)
		}
	}
}

// The ranks are those of the tables of the sign test: of 20 values the 6th and
// the 15th have the median between them in 95.9 % of all samples.
func TestInterval(t *testing.T) {
	var twenty []float64
	for i := range 20 {
		twenty = append(twenty, float64(20-i))
	}
	if low, high := interval(twenty); low != 6 || high != 15 {
		t.Errorf("interval %v to %v, want 6 to 15", low, high)
	}
	if low, high := interval([]float64{2, 1}); low != 1 || high != 2 {
		t.Errorf("of two values %v to %v", low, high)
	}
	if low, high := interval(nil); !math.IsNaN(low) || !math.IsNaN(high) {
		t.Errorf("of no value %v to %v", low, high)
	}
}

// A tool that cannot run, or a bar that may or may not be met, must show as such.
func TestHostVerdicts(t *testing.T) {
	host := func(name string, err error, lost ...float64) *tracedHost {
		return &tracedHost{contender: &contender{name: name, err: err}, rates: []float64{1000}, latencies: []float64{50}, lost: lost, slower: lost}
	}
	for _, tt := range []struct {
		name     string
		fintrace *tracedHost
		lost     losses
		want     [2]verdict // of connections per second, of records lost
	}{
		{"little", host("fintrace", nil, 0.5, 0.6, 0.4), losses{connections: 10}, [2]verdict{met, met}},
		{"much", host("fintrace", nil, 2, 3, 4), losses{connections: 10, missed: 1}, [2]verdict{notMet, notMet}},
		{"either", host("fintrace", nil, 0.5, 0.6, 2), losses{connections: 10, lost: 1}, [2]verdict{unknown, notMet}},
		{"not there", host("fintrace", errors.New("not installed")), losses{}, [2]verdict{unknown, unknown}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rows := hostRows([]*tracedHost{host("no tracer", nil, 0), tt.fintrace, host("other", errors.New("cannot\nrun"))}, tt.lost)
			if got := [2]verdict{rows[0].met, rows[2].met}; got != tt.want {
				t.Errorf("verdicts %v, want %v", got, tt.want)
			}
			if got, want := rows[3].beside, "other cannot run"; !strings.HasSuffix(got, want) {
				t.Errorf("not measured: %q, want %q", got, want)
			}
		})
	}
}

func TestWords(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{spaced(7), "7"}, {spaced(50_000), "50 000"}, {spaced(1_000_020), "1 000 020"},
		{times(3, 2), "1.50 ×"}, {times(120, 4), "30 ×"}, {times(1, 0), "?"}, {times(math.NaN(), 1), "?"},
		{nanos(math.NaN()), "?"},
		{list("", "a", "", "b"), "a; b"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}
