// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"fmt"
	"strconv"
	"strings"
)

// truth is what a condition comes to. Undecided is what only HAProxy can tell.
type truth uint8

const (
	no truth = iota
	undecided
	yes
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

// condition reads the expression of .if and .elif as cfgcond.c does.
type condition struct {
	text    string
	at      int
	depth   int
	version Version
	env     *environment
	open    bool // the text itself has a variable in it that is not known
}

// maxDepth is MAX_CFG_RECURSION, with which an expression of one line cannot
// hit a limit of ours before HAProxy's.
const maxDepth = 1024

// evaluate returns what the expression comes to.
func (c *condition) evaluate() (truth, error) {
	c.spaces()
	if c.at == len(c.text) {
		return min(truthOf(c.open), undecided), nil
	}
	value, err := c.or()
	if err != nil {
		return no, err
	}
	c.spaces()
	if c.at < len(c.text) {
		return no, fmt.Errorf("unexpected %q after the condition", c.text[c.at:])
	}
	if c.open {
		return undecided, nil
	}
	return value, nil
}

func (c *condition) spaces() {
	for c.at < len(c.text) && (c.text[c.at] == ' ' || c.text[c.at] == '\t') {
		c.at++
	}
}

func (c *condition) take(token string) bool {
	c.spaces()
	if !strings.HasPrefix(c.text[c.at:], token) {
		return false
	}
	c.at += len(token)
	return true
}

func (c *condition) or() (truth, error) {
	left, err := c.and()
	for err == nil && c.take("||") {
		var right truth
		right, err = c.and()
		left = max(left, right)
	}
	return left, err
}

func (c *condition) and() (truth, error) {
	left, err := c.term()
	for err == nil && c.take("&&") {
		var right truth
		right, err = c.term()
		left = min(left, right)
	}
	return left, err
}

func (c *condition) term() (truth, error) {
	if c.depth++; c.depth > maxDepth {
		return no, fmt.Errorf("more than %d terms in a condition", maxDepth)
	}
	negate := false
	for c.take("!") {
		negate = !negate
	}
	value, err := c.positive()
	if negate {
		value = yes - value
	}
	return value, err
}

func (c *condition) positive() (truth, error) {
	c.spaces()
	if number := leadingNumber(c.text[c.at:]); number != "" {
		c.at += len(number)
		n, err := strconv.ParseInt(number, 0, 64)
		return truthOf(n != 0 || err != nil), nil
	}
	if c.take("(") {
		value, err := c.or()
		if err == nil && !c.take(")") {
			err = fmt.Errorf("a ) is missing in the condition")
		}
		return value, err
	}
	from := c.at
	end := from + strings.IndexAny(c.text[from:]+" ", " (")
	name := c.text[from:end]
	want, known := predicates[name]
	if !known {
		return no, fmt.Errorf("expected a number, ( or one of the predicates of HAProxy such as defined(NAME), not %q", c.text[from:])
	}
	c.at = end
	args, err := c.arguments()
	if err != nil {
		return no, err
	}
	if args == nil && want == 1 {
		return undecided, nil // accepted, and asked of nothing
	}
	if len(args) != want {
		return no, fmt.Errorf("%s takes %d arguments, not %d", name, want, len(args))
	}
	return c.predicate(name, args), nil
}

// leadingNumber is what strtol(3) would read, base by prefix.
func leadingNumber(s string) string {
	i := 0
	if i < len(s) && (s[i] == '+' || s[i] == '-') {
		i++
	}
	digit := isDigit
	if from := i; len(s) > i+2 && s[i] == '0' && s[i+1]|0x20 == 'x' && isHex(s[i+2]) {
		digit = isHex
		i = from + 2
	}
	from := i
	for i < len(s) && digit(s[i]) {
		i++
	}
	if i == from {
		return ""
	}
	return s[:i]
}

var predicates = map[string]int{ // and how many arguments they take
	"defined":                 1,
	"feature":                 1,
	"streq":                   2,
	"strneq":                  2,
	"strstr":                  2,
	"version_atleast":         1,
	"version_before":          1,
	"openssl_version_atleast": 1,
	"openssl_version_before":  1,
	"awslc_api_atleast":       1,
	"awslc_api_before":        1,
	"ssllib_name_startswith":  1,
	"enabled":                 1,
}

// arguments reads (a,b), where quotes and backslashes protect.
func (c *condition) arguments() ([]string, error) {
	if c.at == len(c.text) || c.text[c.at] != '(' {
		return nil, nil
	}
	var (
		args  []string
		arg   []byte
		quote byte
	)
	for i := c.at + 1; i < len(c.text); i++ {
		ch := c.text[i]
		switch {
		case ch == '\\' && quote != '\'' && i+1 < len(c.text):
			i++
			arg = append(arg, c.text[i])
		case quote == 0 && (ch == '"' || ch == '\''):
			quote = ch
		case ch == quote:
			quote = 0
		case quote == 0 && ch == ',':
			args, arg = append(args, string(arg)), nil
		case quote == 0 && ch == ')':
			c.at = i + 1
			return append(args, string(arg)), nil
		default:
			arg = append(arg, ch)
		}
	}
	return nil, fmt.Errorf("a ) is missing after the arguments in the condition")
}

func (c *condition) predicate(name string, args []string) truth {
	switch name {
	case "defined":
		_, set, known := c.env.lookup(args[0])
		if !known {
			return undecided
		}
		return truthOf(set)
	case "streq":
		return truthOf(args[0] == args[1])
	case "strneq":
		return truthOf(args[0] != args[1])
	case "strstr":
		return truthOf(strings.Contains(args[0], args[1]))
	case "version_atleast":
		return c.version.atLeast(args[0])
	case "version_before":
		return yes - c.version.atLeast(args[0])
	}
	return undecided // what it was built with, or what it was told elsewhere
}

// atLeast compares with a version as conditions write it: 2.4, 2.4-dev19, 2.4.3.
func (v Version) atLeast(text string) truth {
	if !v.Known() {
		return undecided
	}
	ours, theirs := versionNumbers(v.Text), versionNumbers(text)
	if theirs[2] == unknownPatch {
		theirs[2] = 0
	}
	for i := range ours {
		switch {
		case ours[i] == unknownPatch && theirs[i] > 0:
			return undecided
		case ours[i] == unknownPatch:
			return yes
		case ours[i] != theirs[i]:
			return truthOf(ours[i] > theirs[i])
		}
	}
	return yes
}

// unknownPatch stands for the third number of a version known as 2.6.
const unknownPatch = -1 << 31

// versionNumbers are major, minor and patch; a development version -devN
// comes before its .0: as N - 1000.
func versionNumbers(text string) [3]int {
	var n [3]int
	number := func(s string) (int, string) {
		i := 0
		for i < len(s) && isDigit(s[i]) {
			i++
		}
		v, _ := strconv.Atoi(s[:i])
		return v, s[i:]
	}
	n[0], text = number(text)
	n[1], text = number(strings.TrimPrefix(text, "."))
	switch {
	case strings.HasPrefix(text, "-dev"):
		n[2], _ = number(text[len("-dev"):])
		n[2] -= 1000
	case strings.HasPrefix(text, "."):
		n[2], _ = number(text[1:])
	default:
		n[2] = unknownPatch
	}
	return n
}

// ParseVersion reads a version as HAProxy writes it: 2.6, 2.6.12-1+deb12u4, 3.2-dev5.
func ParseVersion(text string) (Version, error) {
	n := versionNumbers(text)
	if n[0] == 0 || !strings.HasPrefix(text, fmt.Sprintf("%d.%d", n[0], n[1])) {
		return Version{}, fmt.Errorf("a version of HAProxy is like 2.6 or 3.0.11, not %q", text)
	}
	return Version{Major: n[0], Minor: n[1], Text: text}, nil
}
