// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// TestBad: what is wrong with a file is said line by line. With -rewrite the
// outputs are written anew; read the difference.
func TestBad(t *testing.T) {
	datadriven.Walk(t, "testdata/bad", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			c, err := Parse("fintrace.yaml", unescape(d.Input))
			if err == nil {
				d.Fatalf(t, "nothing is wrong with it")
			}
			if c != nil {
				d.Fatalf(t, "there are settings beside the error")
			}
			return err.Error() + "\n"
		})
	})
}

// TestGood: what follows from a file is printed as --check does.
func TestGood(t *testing.T) {
	datadriven.Walk(t, "testdata/good", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			c, err := Parse("/etc/fintrace/fintrace.yaml", unescape(d.Input))
			if err != nil {
				return err.Error() + "\n"
			}
			return printed(t, c)
		})
	})
}

func printed(t interface{ Fatal(...any) }, c *Config) string {
	var b strings.Builder
	if err := c.Print(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// unescape puts in what does not show in a file.
func unescape(s string) []byte {
	return []byte(strings.NewReplacer("<TAB>", "\t", "<NUL>", "\x00", "<BAD>", "\xff", "<BOM>", "\ufeff",
		"<CR>", "\r", "<NBSP>", "\u00a0", "<LS>", "\u2028").Replace(s) + "\n")
}
