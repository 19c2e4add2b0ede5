// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRead: what a guest writes is what the table has, and nothing that is
// missing counts as passed.
func TestRead(t *testing.T) {
	plan := []step{{Name: "version"}, {Name: "diagnose"}, {Name: "internal/probe"}}
	const good = mark + "up\n" +
		mark + "run version\nfintrace\nring buffer    yes  in order\ncount of skipped events  no  not\n" + mark + "exit version 0 0.3\n" +
		mark + "run diagnose\r\nNothing is stuck: no connection is in FIN_WAIT2.\nno newline at its end" + mark + "exit diagnose 0 2.0\n" +
		mark + "run internal/probe\n--- PASS: TestA (0.10s)\n    --- FAIL: TestA/of_another (1.00s)\n" +
		mark + "exit internal/probe 0 3.0\n" + mark + "down\n"
	for _, test := range []struct {
		name, out, why string
		pass           bool
		says           string
	}{
		{"all pass", good, "", true, ""},
		{"a test fails", strings.Replace(good, "--- PASS: TestA", "--- FAIL: TestA", 1), "", false, ""},
		{"a test is skipped", strings.Replace(good, "--- PASS: TestA", "--- SKIP: TestA", 1), "", false, "TestA was skipped"},
		{"a step exits", strings.Replace(good, "exit version 0", "exit version 1", 1), "", false, "version exited with 1:\nfintrace"},
		{"diagnose could not look", strings.Replace(good, "diagnose 0", "diagnose 3", 1), "", false, "diagnose exited with 3"},
		{"diagnose has not seen all", strings.Replace(good, "Nothing is", "Nothing that could be seen is", 1), "", false, "diagnose does not say that nothing is stuck"},
		{"a feature is not there", strings.Replace(good, "  yes", "  no", 1), "", false, `version says "no" of ring buffer, which this kernel has`},
		{"it is not known whether a feature is there", strings.Replace(good, "  yes", "  unknown", 1), "", false, `says "unknown" of ring buffer`},
		{"a feature is there that cannot be", strings.Replace(good, "events  no", "events  yes", 1), "", false, `says "yes" of count of skipped events, which this kernel lacks`},
		{"no feature is named", strings.Replace(strings.Replace(good, "  yes", " yes", 1), "events  no", "events no", 1), "", false, `says "" of`},
		{"a step hangs", good[:strings.Index(good, mark+"exit internal/probe")], "it was not done", false, "internal/probe did not end:\n--- PASS"},
		{"the kernel panics", good[:strings.Index(good, mark+"run diagnose")], "", false, "it ended before its steps did"},
		{"nothing comes", "", "it was not up", false, "it was not up"},
		{"it cannot set up", mark + "up\n" + mark + "error mount /proc\n" + mark + "down\n", "", false, "mount /proc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := read(kernel{name: "5.10-amd64", lacks: []string{misses}}, plan, []byte(test.out), test.why)
			if r.passed() != test.pass || !strings.Contains(r.explain(), test.says) {
				t.Errorf("passed %v, want %v, and %q in\n%s", r.passed(), test.pass, test.says, r.explain())
			}
		})
	}
	got := table([]*result{read(kernel{name: "a", lacks: []string{misses}}, plan, []byte(good), ""), read(kernel{name: "b"}, plan, nil, "down")})
	const want = "| | unknown | unknown |\n|---|---|---|\n" +
		"| fintrace version | ok | – |\n| fintrace diagnose | ok, 2s | – |\n| TestA | ok | – |\n" +
		"| version | – | FAIL |\n| diagnose | – | FAIL |\n| internal/probe | – | FAIL |\n"
	if got != want {
		t.Errorf("the table is\n%swant\n%s", got, want)
	}
}

// FuzzRead: what a guest writes is not all ours, as a kernel may write there, too.
func FuzzRead(f *testing.F) {
	plan := []step{{Name: "list"}, {Name: "internal/probe"}}
	f.Add(mark + "up\n" + mark + "run list\nNo connection is in FIN_WAIT2.\n" + mark + "exit list 0 0.3\n" +
		mark + "run internal/probe\n--- PASS: TestA (0.10s)\n" + mark + "exit internal/probe 0 3.0\n" + mark + "down\n")
	f.Add(mark + "run list\r\n" + mark + "exit list\n" + mark + "exit list 0 x\n" + mark)
	f.Fuzz(func(t *testing.T, out string) {
		r := read(kernel{name: "x"}, plan, []byte(out), "")
		if r.passed() && !(strings.Contains(out, "exit list 0 ") && strings.Contains(out, "exit internal/probe 0 ") && strings.Contains(out, "down")) {
			t.Error("passed without having done all")
		}
		_ = r.explain() + table([]*result{r})
	})
}

// TestArchive has a real cpio read what is written, where there is one.
func TestArchive(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("not run: cpio is not installed")
	}
	from := t.TempDir()
	if err := os.WriteFile(filepath.Join(from, "odd"), []byte("12345"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("odd", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	a := newArchive(&buf)
	a.tree("a/b", from)
	a.file("a/empty", nil)
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	into := t.TempDir()
	cmd := exec.Command(cpio, "-i", "--quiet")
	cmd.Dir, cmd.Stdin = into, &buf
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	if text, err := os.ReadFile(filepath.Join(into, "a/b/link")); err != nil || string(text) != "12345" {
		t.Errorf("read %q by the link, %v", text, err)
	}
	if st, err := os.Stat(filepath.Join(into, "a/b/odd")); err != nil || st.Mode() != 0o700 {
		t.Errorf("its mode is %v, want 0700; %v", st.Mode(), err)
	}
	if st, err := os.Stat(filepath.Join(into, "a/empty")); err != nil || st.Size() != 0 {
		t.Errorf("the empty file: %v", err)
	}
}
