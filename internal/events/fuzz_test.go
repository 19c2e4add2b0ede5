// SPDX-License-Identifier: Apache-2.0

package events

import "testing"

// FuzzParseNames: what is read is what is printed, and nothing else.
func FuzzParseNames(f *testing.F) {
	for _, s := range []string{"held", "minisock", "inbound", "unknown", "", "Held", "held "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if stage, err := ParseStage(s); err == nil && (stage == 0 || stage.String() != s) {
			t.Errorf("%q is stage %s", s, stage)
		}
		if side, err := ParseSide(s); err == nil && (side == 0 || side.String() != s) {
			t.Errorf("%q is side %s", s, side)
		}
	})
}
