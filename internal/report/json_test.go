// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/json"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestEscapeJSON(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"haproxy", `"haproxy"`},
		{"söketé 日本", `"söketé 日本"`},
		{"\u009b31m\x7f", `"\u009b31m\u007f"`},
		{"\u202egnp.exe\u200b", `"\u202egnp.exe\u200b"`},
		{"\U000e0041x", `"\udb40\udc41x"`}, // a tag
		{"a\nb\x1b\xc3", `"a\nb\u001b\ufffd"`},
	} {
		text, err := json.Marshal(test.in)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(EscapeJSON(text)); got != test.want {
			t.Errorf("%q is %s, want %s", test.in, got, test.want)
		}
	}
}

func FuzzEscapeJSON(f *testing.F) {
	for _, s := range []string{"haproxy", "\u009b31m\x7f", "\U000e0041\u202e", "\xc3", "日本", "\ufffd\u2028"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var plain bytes.Buffer
		if err := json.NewEncoder(JSONWriter(&plain)).Encode(map[string]string{s: s}); err != nil {
			t.Fatal(err)
		}
		var back map[string]string
		if err := json.Unmarshal(plain.Bytes(), &back); err != nil {
			t.Fatalf("%q: %v", &plain, err)
		}
		if want := string([]rune(s)); len(back) != 1 || back[want] != want {
			t.Fatalf("%q comes back as %q", s, back)
		}
		for _, r := range plain.String() {
			if r != '\n' && r != utf8.RuneError && !unicode.IsPrint(r) {
				t.Fatalf("%q has %U", &plain, r)
			}
		}
	})
}
