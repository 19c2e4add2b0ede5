// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
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
	host := func(name string, err error) *tracedHost {
		return &tracedHost{contender: &contender{name: name, err: err}, latencies: []float64{50}}
	}
	hosts := []*tracedHost{host("no tracer", nil), host("fintrace", nil), host("other", errors.New("cannot\nrun"))}
	for _, tt := range []struct {
		name string
		lost []float64
		want verdict
	}{
		{"little", []float64{0.5, 0.6, 0.4}, met},
		{"much", []float64{2, 3, 4}, notMet},
		{"either", []float64{0.5, 0.6, 2}, unknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rows := hostRows("a load", toggledCosts{Rates: []float64{1000}, Lost: [toggledPrograms][]float64{withFintrace: tt.lost}}, hosts)
			if got := rows[0].met; got != tt.want {
				t.Errorf("verdict %v, want %v", got, tt.want)
			}
			if got, want := rows[2].beside, "other cannot run"; !strings.HasSuffix(got, want) {
				t.Errorf("not measured: %q, want %q", got, want)
			}
		})
	}
	for _, tt := range []struct {
		lost losses
		want verdict
	}{{losses{}, unknown}, {losses{connections: 10}, met}, {losses{connections: 10, lost: 1}, notMet}, {losses{connections: 10, missed: 1}, notMet}} {
		if got := tt.lost.row().met; got != tt.want {
			t.Errorf("%+v: verdict %v, want %v", tt.lost, got, tt.want)
		}
	}
}

// Two threads, of which one ends a connection each 100 µs and the other none while
// the program is attached: half is lost, whichever slot is longer.
func TestCompare(t *testing.T) {
	group := []int{withNone, withFintrace, withFintrace, withNone}
	slots := []slot{
		{1000, 3000}, {3500, 4500}, {5000, 8000}, {8500, 9500},
		{10_000, 11_000}, {11_000, 12_000}, {12_000, 13_000}, {13_000, 14_000},
		{14_000, 15_000}, // of a group that was not finished
	}
	var always, without work
	for at := uint32(0); at < 15_000; at += 100 {
		always.lives = append(always.lives, life{end: at})
		if !slices.ContainsFunc([]int{1, 2, 5, 6}, func(i int) bool { return at >= slots[i].from && at < slots[i].to }) {
			without.lives = append(without.lives, life{end: at})
		}
	}
	costs := compare(group, slots, []work{always, without})
	if want := []float64{20_000, 20_000}; !slices.Equal(costs.Rates, want) {
		t.Errorf("rates %v, want %v", costs.Rates, want)
	}
	if got, want := costs.Lost, ([toggledPrograms][]float64{withNone: {0, 0}, withFintrace: {50, 50}}); !reflect.DeepEqual(got, want) {
		t.Errorf("lost %v, want %v", got, want)
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
