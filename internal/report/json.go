// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"io"
	"unicode"
	"unicode/utf8"
)

// EscapeJSON writes what acts on a terminal, or turns text round, as escapes:
// package encoding/json does so with the control characters below space alone. It
// is the same JSON.
func EscapeJSON(text []byte) []byte {
	acts := func(r rune) bool { return r != '\n' && r != utf8.RuneError && !unicode.IsPrint(r) }
	var escaped []byte
	done := 0
	for i := 0; i < len(text); {
		if text[i] < utf8.RuneSelf && text[i] != 0x7f { // No string has a control character as it is.
			i++
			continue
		}
		r, size := utf8.DecodeRune(text[i:])
		if acts(r) {
			escaped = append(escaped, text[done:i]...)
			if r > 0xffff {
				r -= 0x10000
				escaped = fmt.Appendf(escaped, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
			} else {
				escaped = fmt.Appendf(escaped, `\u%04x`, r)
			}
			done = i + size
		}
		i += size
	}
	if escaped == nil {
		return text
	}
	return append(escaped, text[done:]...)
}

// JSONWriter is for JSON that is written whole, by an encoder or the log: what
// passes is as EscapeJSON has it.
func JSONWriter(w io.Writer) io.Writer { return jsonWriter{w} }

type jsonWriter struct{ to io.Writer }

func (w jsonWriter) Write(text []byte) (int, error) {
	if _, err := w.to.Write(EscapeJSON(text)); err != nil {
		return 0, err
	}
	return len(text), nil
}
