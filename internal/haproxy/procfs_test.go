// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/fintrace/fintrace/internal/haproxytest"
)

func TestParseCommandLine(t *testing.T) {
	for line, want := range map[string]commandLine{
		"haproxy -f a.cfg -f b.d":                                       {files: []string{"a.cfg", "b.d"}},
		"haproxy -f a -- b -f c":                                        {files: []string{"a", "b", "-f", "c"}},
		"haproxy -D -p /run/h.pid -f a -sf 12 34 -db":                   {files: []string{"a"}, finish: []int{12, 34}, takesOver: true},
		"haproxy -f a -st 12":                                           {files: []string{"a"}, finish: []int{12}, takesOver: true},
		"haproxy -f a -sf":                                              {files: []string{"a"}, takesOver: true},
		"haproxy -sf 7 -x sockpair@3 -Ws -f a -S /run/m,level,operator": {files: []string{"a"}, finish: []int{7}, takesOver: true, master: true, masterSockets: []string{"/run/m"}},
		"haproxy -W -S /run/m -S /run/n -f a":                           {files: []string{"a"}, master: true, masterSockets: []string{"/run/m", "/run/n"}},
		"haproxy -C /etc/haproxy -f a":                                  {files: []string{"a"}, dir: "/etc/haproxy"},
		"haproxy -f -C -dG -dr -q -V -4":                                {files: []string{"-C"}},
		"haproxy -n 10 -N 20 -m 30 -L peer -f a -dMtag -dS -de":         {files: []string{"a"}},
		"haproxy -dt h1 -f a -dt":                                       {files: []string{"a"}},
		"haproxy -Z new -f a -Y":                                        {files: []string{"a"}},
	} {
		got, ok := parseCommandLine(strings.Fields(line))
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(commandLine{})); !ok || diff != "" {
			t.Errorf("%s: ok %v (-want +got):\n%s", line, ok, diff)
		}
	}
	for _, line := range []string{
		"", "haproxy", "haproxy -W", "haproxy -vv", "haproxy -c -f a", "haproxy -f a -cc true",
		"sh /etc/init.d/haproxy reload", "sh /usr/local/bin/haproxy -f a", "haproxy -f a b",
	} {
		if got, ok := parseCommandLine(strings.Fields(line)); ok {
			t.Errorf("%q is taken for a running HAProxy: %+v", line, got)
		}
	}
}

func FuzzParseCommandLine(f *testing.F) {
	f.Add("haproxy\x00-sf\x001\x00-f\x00a\x00-S\x00b,c\x00--\x00d")
	f.Fuzz(func(t *testing.T, line string) {
		if c, ok := parseCommandLine(strings.Split(line, "\x00")); ok && len(c.files) == 0 {
			t.Error("it runs without a file")
		}
	})
}

func FuzzProcFiles(f *testing.F) {
	f.Add("12 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "Name:\tx\nNSpid:\t12\t1\nx", "A=1\x00B\x00A=2\x00=3")
	f.Add("12 (z) Z 1", "Name:\tx\nNSpid:\n", "")
	f.Add("", "Name:\tx\nNSpid:\tx", "\x00\x00")
	f.Fuzz(func(t *testing.T, stat, status, environ string) {
		if _, _, ok := parseStat([]byte(stat)); ok {
			after := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
			if len(after) < 20 || strings.Contains(after[0], "Z") {
				t.Errorf("%q is of a process that runs", stat)
			}
		}
		if inner, nested, ok := parseInnerPID(7, status); ok && !nested && inner != 7 && !strings.Contains(status, "NSpid:") {
			t.Errorf("%q is of %d", status, inner)
		}
		for name, value := range parseEnviron([]byte(environ)) {
			if !strings.Contains(environ, name+"="+value) || strings.ContainsRune(name+value, 0) {
				t.Errorf("%q is %q in %q", name, value, environ)
			}
		}
	})
}

func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"*:443", ":80-90", "[::1]:8080", "ipv6@:443", "stream+ipv4@10.0.0.1:1", "unix@/run/x", "fd@3", "10.0.0.1", "[::1", "a:+1", ":0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, needs := range []portRule{portNeeded, portOffset} {
			if a, wrong := parseAddress(text, needs); wrong == "" && a.tcp && a.ip.IsValid() && a.ip.Zone() == "" && !strings.Contains(text, a.host) {
				t.Errorf("%q is host %q", text, a.host)
			}
		}
		if v, err := ParseVersion(text); err == nil && (v.Major == 0 || v.Text != text) {
			t.Errorf("%q is version %+v", text, v)
		}
	})
}

func TestFindVersion(t *testing.T) {
	const text = "\x00 version 3.0.11-1+deb13u3, released 2026/05/20\x00"
	want := Version{3, 0, "3.0.11-1+deb13u3"}
	for _, before := range []int{0, 1, 256<<10 - len(text), 256<<10 - len(text)/2, 256<<10 - 1, 256 << 10, 1 << 20} {
		program := strings.Repeat("x", before) + text
		if got := findVersion(strings.NewReader(program)); got != want {
			t.Errorf("after %d bytes: %+v", before, got)
		}
		if got := findVersion(iotest.OneByteReader(strings.NewReader(program))); got != want {
			t.Errorf("after %d bytes, read in bits: %+v", before, got)
		}
	}
	for _, text := range []string{
		"", " version ", " version 3.0.11", " version 3.0.11, released 2026/05/20", " version 3.0.11, released some day\x00",
		" version x, released 2026/05/20\x00", " version 3.0\x1b[2J, released 2026/05/20\x00",
	} {
		if got := findVersion(strings.NewReader(text)); got.Known() {
			t.Errorf("%q: %+v", text, got)
		}
	}
	second := " version x, released 2026/05/20\x00" + text
	if got := findVersion(strings.NewReader(second)); got != want {
		t.Errorf("%q: %+v", second, got)
	}
}

func FuzzFindVersion(f *testing.F) {
	f.Add([]byte(" version 3.0.11-1+deb13u3, released 2026/05/20\x00"))
	f.Fuzz(func(t *testing.T, program []byte) {
		if v := findVersion(bytes.NewReader(program)); strings.ContainsAny(v.Text, "\x00\x1b\n") {
			t.Errorf("%q", v.Text)
		}
	})
}

func TestBinaryVersion(t *testing.T) {
	for _, v := range haproxytest.Versions(t) {
		want := Version{v.Major, v.Minor, v.Text}
		if got := BinaryVersion(filepath.Join(v.Root, "/usr/sbin/haproxy")); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	for _, path := range []string{"/bin/cat", "/nowhere", "/proc", os.DevNull} {
		if got := BinaryVersion(path); got.Known() {
			t.Errorf("%s is HAProxy %+v", path, got)
		}
	}
}
