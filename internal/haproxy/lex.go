// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"fmt"
	"strings"
)

// A word is one argument of a line, with quotes, escapes and variables resolved.
type word struct {
	text   string
	column int // in bytes from 1
	end    int // the column behind it
	// open: it has a variable in it whose value is not known here.
	open bool
}

// maxWords is MAX_LINE_ARGS (include/haproxy/defaults.h).
const maxWords = 64

// environment is what variables stand for.
type environment struct {
	vars     map[string]string
	unset    map[string]bool // known not to be set
	complete bool            // what is not in vars is not set
	// other is the environment that it may be instead; nil if it cannot.
	other *environment
}

// lookup returns a variable's value. known is false where only HAProxy can tell.
func (e *environment) lookup(name string) (value string, set, known bool) {
	value, set, known = e.own(name)
	if known && e.other != nil {
		otherValue, otherSet, otherKnown := e.other.own(name)
		known = otherKnown && otherSet == set && otherValue == value
	}
	return value, set && known, known
}

func (e *environment) own(name string) (value string, set, known bool) {
	if value, set = e.vars[name]; set {
		return value, true, true
	}
	// HAProxy sets variables of its own: HAPROXY_LOCALPEER, HAPROXY_CFGFILES ...
	if e.unset[name] || e.complete && !strings.HasPrefix(name, "HAPROXY_") {
		return "", false, true
	}
	return "", false, false
}

// doubt is for what may be changed: nothing is known of it any more.
func (e *environment) doubt(names []word) {
	for _, name := range names {
		delete(e.vars, name.text)
		delete(e.unset, name.text)
	}
	e.complete = false
}

// change takes setenv and its kind, with as many arguments as they need.
func (e *environment) change(keyword string, args []word) {
	switch keyword {
	case "setenv", "presetenv":
		_, isSet, known := e.own(args[0].text)
		switch {
		case keyword == "presetenv" && isSet:
		case keyword == "presetenv" && !known, args[1].open:
			e.doubt(args[:1])
		default:
			e.vars[args[0].text] = args[1].text
		}
	case "unsetenv":
		for _, name := range args {
			delete(e.vars, name.text)
			e.unset[name.text] = true
		}
	case "resetenv":
		kept := map[string]string{}
		for _, name := range args {
			if value, isSet := e.vars[name.text]; isSet {
				kept[name.text] = value
			}
		}
		if e.vars = kept; len(args) == 0 {
			e.complete = true
		}
	}
}

func isSpace(c byte) bool { return c == ' ' || '\t' <= c && c <= '\r' }
func isDigit(c byte) bool { return '0' <= c && c <= '9' }
func isAlpha(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
func isHex(c byte) bool   { return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }

// wordRules are where HAProxy's versions split lines into words differently.
type wordRules struct {
	// joins: the quote after a variable that is not set is swallowed with the
	// spaces behind it, so that the next word goes on where that one ended.
	joins bool // 2.9 to 3.2
	// skips: the spaces that an expanded value begins with make no empty word.
	skips bool // from 3.3 on
}

func rulesOf(v Version) wordRules {
	skips := v.AtLeast(3, 3)
	return wordRules{joins: !skips && (!v.Known() || v.AtLeast(2, 9)), skips: skips}
}

// A lexer splits one line into words as parse_line() of src/tools.c does.
type lexer struct {
	line  string
	env   *environment
	local func(name string) (string, bool) // .FILE, .LINE, .SECTION
	rules wordRules
	at    int // of line
	words []word
	text  []byte // of the word being read
	start int    // of it in line; -1 outside words
	open  bool
}

// lexError is a place in the line, and what is wrong there.
type lexError struct {
	column int
	text   string
}

func (e *lexError) Error() string { return e.text }

// peek is the byte n on from the one being read, 0 past the end.
func (l *lexer) peek(n int) byte {
	if l.at+n < len(l.line) {
		return l.line[l.at+n]
	}
	return 0
}

func (l *lexer) begin(at int) {
	if l.start < 0 {
		l.start = at
	}
}

func (l *lexer) emit(c byte) { l.text = append(l.text, c) }

func (l *lexer) finish() {
	if l.start >= 0 {
		l.words = append(l.words, word{string(l.text), l.start + 1, l.at + 1, l.open})
	}
	l.text, l.start, l.open = l.text[:0], -1, false
}

// lex returns the words of a line, up to the first that is empty, which ends
// the list for HAProxy.
func lex(line string, env *environment, local func(string) (string, bool), rules wordRules) ([]word, error) {
	l := &lexer{line: line, env: env, local: local, rules: rules, start: -1}
	quote, quoted := byte(0), 0
	for l.at < len(line) {
		c := line[l.at]
		switch {
		case c == '\n' || c == '\r' || c == 0 || c == '#' && quote == 0:
			l.at = len(line)
			continue
		case (c == '"' || c == '\'') && (quote == 0 || quote == c):
			l.begin(l.at)
			if quote == 0 {
				quote, quoted = c, l.at
			} else {
				quote = 0
			}
			l.at++
		case c == '\\' && quote != '\'':
			l.begin(l.at)
			if err := l.escape(quote); err != nil {
				return nil, err
			}
		case isSpace(c) && quote == 0:
			l.finish()
			l.at++
		case c == '$' && quote == '"':
			l.begin(l.at)
			closed, err := l.variable()
			if err != nil {
				return nil, err
			}
			if closed {
				quote = 0
			}
		default:
			l.begin(l.at)
			l.emit(c)
			l.at++
		}
	}
	l.finish()
	if quote != 0 {
		return nil, &lexError{quoted + 1, fmt.Sprintf("the quote %c opened here is not closed on this line", quote)}
	}
	if len(l.words) > maxWords {
		return nil, &lexError{l.words[maxWords].column, fmt.Sprintf("more than %d words on a line", maxWords)}
	}
	for i, w := range l.words {
		if w.text == "" && !w.open {
			return l.words[:i], nil
		}
	}
	return l.words, nil
}

// escape reads a backslash and what belongs to it. Combinations without a
// meaning stay as they are.
func (l *lexer) escape(quote byte) error {
	c := l.peek(1)
	switch {
	case c == ' ' || c == '\\' || c == '#' || c == '\'' || c == '"' || c == '$' && quote == '"':
		l.emit(c)
	case c == 't':
		l.emit('\t')
	case c == 'n':
		l.emit('\n')
	case c == 'r':
		l.emit('\r')
	case c == 'x':
		if !isHex(l.peek(2)) || !isHex(l.peek(3)) {
			return &lexError{l.at + 1, `\x needs two hexadecimal digits after it`}
		}
		l.emit(hexValue(l.peek(2))<<4 | hexValue(l.peek(3)))
		l.at += 2
	default:
		l.emit('\\')
		l.at--
	}
	l.at += 2
	return nil
}

func hexValue(c byte) byte {
	if isDigit(c) {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// variable reads a $ and what belongs to it. It says whether it swallowed the
// closing quote.
func (l *lexer) variable() (closed bool, err error) {
	dollar := l.at
	l.at++
	brace := l.peek(0) == '{'
	if brace {
		l.at++
	}
	if c := l.peek(0); !isAlpha(c) && c != '_' && c != '.' {
		return false, &lexError{l.at + 1, "a variable's name begins with a letter or an underscore"}
	}
	from := l.at
	l.at++
	for c := l.peek(0); isAlpha(c) || isDigit(c) || c == '_'; c = l.peek(0) {
		l.at++
	}
	name := l.line[from:l.at]
	var (
		value      string
		set, known bool
	)
	if name[0] == '.' {
		if value, set = l.local(name); !set {
			return false, &lexError{from + 1, fmt.Sprintf("%s is none of .FILE, .LINE and .SECTION", name)}
		}
		known = true
	} else {
		value, set, known = l.env.lookup(name)
	}
	split := false
	if brace {
		if l.peek(0) == '[' {
			if l.peek(1) != '*' || l.peek(2) != ']' {
				return false, &lexError{l.at + 1, "[*] is the only thing that can stand here"}
			}
			split = true
			l.at += 3
		}
		unmatched := &lexError{dollar + 2, "the brace opened here is not closed"}
		if l.peek(0) == '-' {
			end := strings.IndexByte(l.line[l.at:], '}')
			if end < 0 {
				return false, unmatched
			}
			if !set {
				value, set = l.line[l.at+1:l.at+end], true
			}
			l.at += end
		}
		if l.peek(0) != '}' {
			return false, unmatched
		}
		l.at++
	}
	l.open = l.open || !known
	if !set {
		if l.rules.joins && known && l.peek(0) == '"' {
			l.at++
			for l.at < len(l.line) && isSpace(l.line[l.at]) {
				l.at++
			}
			return true, nil
		}
		return false, nil
	}
	for i := 0; i < len(value); i++ {
		if split && isSpace(value[i]) {
			if l.rules.skips && len(l.text) == 0 {
				l.start = -1
			}
			l.finish()
			l.open = !known
			continue
		}
		l.begin(dollar)
		l.emit(value[i])
	}
	return false, nil
}

// expand replaces $NAME and ${NAME} in an address, where HAProxy does so
// without quotes too (env_expand() of src/tools.c).
func (e *environment) expand(s string) (text string, open bool) {
	if !strings.Contains(s, "$") {
		return s, false
	}
	var b strings.Builder
	for s != "" {
		i := strings.IndexByte(s, '$')
		if i < 0 {
			break
		}
		b.WriteString(s[:i])
		s = s[i+1:]
		brace := strings.HasPrefix(s, "{")
		if brace {
			s = s[1:]
		}
		n := 0
		for n < len(s) && (isAlpha(s[n]) || isDigit(s[n]) || s[n] == '_') {
			n++
		}
		value, _, known := e.lookup(s[:n])
		b.WriteString(value)
		open = open || !known
		if s = s[n:]; brace {
			s = strings.TrimPrefix(s, "}")
		}
	}
	b.WriteString(s)
	return b.String(), open
}
