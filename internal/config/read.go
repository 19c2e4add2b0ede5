// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

const (
	// maxValues bounds the values of a file, those behind aliases counted
	// wherever they are used: rules are compared with each other.
	maxValues = 10_000
	// maxTokens bounds the words and signs of a file: for some files the parser
	// takes time that grows with their square. A value comes with a key, a colon, a
	// dash or comma, and perhaps a comment.
	maxTokens = 6 * maxValues
	// maxDepth bounds how deep values are nested, for YAML's parser recurses.
	// No key is deeper than five.
	maxDepth = 32
	// maxProblems is how many are told: more do not help.
	maxProblems = 20
)

// A pos is a place in the file, both from 1. Columns count characters.
type pos struct{ line, column int }

func (p pos) compare(q pos) int {
	return cmp.Or(cmp.Compare(p.line, q.line), cmp.Compare(p.column, q.column))
}

// A problem is something wrong with what is at a path of keys.
type problem struct {
	pos
	path, text string
	unknown    bool // a key
}

// A value is what the file has for a key.
type value struct {
	path string // "limits[1].match.peer"
	node ast.Node
	pos  pos
}

// A reader reads one file.
type reader struct {
	anchors  map[string][]*ast.AnchorNode // in the order of the file
	written  map[string]value             // what has been read, by path
	values   int
	files    bool // look at the files that are named
	problems []problem
	lengths  []int             // of the lines, in characters
	excess   problem           // there are more than maxValues
	paths    map[string]string // of keys, by name; nil until one is needed
}

func parse(name string, text []byte, files bool) (*Config, error) {
	r := &reader{anchors: map[string][]*ast.AnchorNode{}, written: map[string]value{}, files: files}
	c := Default()
	c.name = name
	if root := r.root(text); root != nil {
		v, ok := r.resolve(value{node: root, pos: posOf(root)})
		if ok {
			r.mapping(v, keys(c), nil)
			if r.values <= maxValues {
				c.check(r)
			}
		}
	}
	if r.values > maxValues {
		r.problems = []problem{r.excess}
	}
	if len(r.problems) > 0 {
		return nil, r.errors(name)
	}
	return c, nil
}

// errors is all problems, one a line.
func (r *reader) errors(name string) error {
	for i := range r.problems {
		// Behind quoted text of several lines the parser's columns are too large.
		p := &r.problems[i].pos
		p.line = min(p.line, len(r.lengths))
		p.column = min(p.column, r.lengths[p.line-1]+1)
	}
	slices.SortStableFunc(r.problems, func(a, b problem) int { return a.compare(b.pos) })
	var all []error
	for i, p := range r.problems {
		if i == maxProblems {
			all = append(all, fmt.Errorf("%s:%d:%d: and %d more from here on", name, p.line, p.column, len(r.problems)-i))
			break
		}
		text := p.text
		if p.path != "" {
			text = p.path + ": " + text
		}
		all = append(all, fmt.Errorf("%s:%d:%d: %s", name, p.line, p.column, text))
	}
	return errors.Join(all...)
}

// refuse notes what is wrong with a value.
func (r *reader) refuse(v value, format string, args ...any) {
	r.problems = append(r.problems, problem{pos: v.pos, path: v.path, text: fmt.Sprintf(format, args...)})
}

// sound says whether nothing is wrong at a path and below it.
func (r *reader) sound(path string) bool {
	return !slices.ContainsFunc(r.problems, func(p problem) bool {
		rest, below := strings.CutPrefix(p.path, path)
		return below && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// lacks refuses a mapping without a key that it needs, unless another key, which
// nobody knows, may be meant for it.
func (r *reader) lacks(v value, format string, args ...any) {
	if !slices.ContainsFunc(r.problems, func(p problem) bool { return p.path == v.path && p.unknown }) {
		r.refuse(v, format, args...)
	}
}

// has says whether the file has a value there.
func (r *reader) has(path string) bool {
	_, has := r.written[path]
	return has
}

// root is the value that the file is; nil if it has none, or is not to be read.
func (r *reader) root(text []byte) ast.Node {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	text = bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n"))
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		r.lengths = append(r.lengths, utf8.RuneCount(line))
	}
	if !r.plain(text) {
		return nil
	}
	tokens := lexer.Tokenize(string(text))
	if !r.tame(tokens) {
		return nil
	}
	file, err := parseTokens(tokens)
	if err != nil {
		r.notYAML(err)
		return nil
	}
	var root ast.Node
	for _, doc := range file.Docs {
		switch doc.Body.(type) {
		case nil, *ast.CommentGroupNode:
			continue
		}
		if root != nil {
			r.problems = append(r.problems, problem{pos: posOf(doc.Body), text: "a second document begins; put all into one, without --- between"})
			return nil
		}
		root = doc.Body
	}
	if root != nil {
		ast.Walk(anchorsOf{r}, root)
	}
	return root
}

// parseTokens is the parser's, whose panics are errors: it is not ours, and a
// daemon that runs reads its file again.
func parseTokens(tokens token.Tokens) (file *ast.File, err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("the parser gave up")
		}
	}()
	return parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
}

// plain refuses what is no text for YAML, or looks like indentation and is none.
func (r *reader) plain(text []byte) bool {
	refuse := func(line, column int, format string, args ...any) bool {
		r.problems = append(r.problems, problem{pos: pos{line, column}, text: fmt.Sprintf(format, args...)})
		return false
	}
	if len(text) > maxSize {
		return refuse(1, 1, "the file is larger than %d KiB", maxSize>>10)
	}
	line := 0
	for content := range bytes.SplitSeq(text, []byte("\n")) {
		line++
		column := 0
		for rest := content; len(rest) > 0; {
			column++
			char, size := utf8.DecodeRune(rest)
			switch {
			case char == utf8.RuneError && size == 1:
				return refuse(line, column, "the byte 0x%02x is not UTF-8; save the file as UTF-8", rest[0])
			case char != '\t' && unicode.IsControl(char), char == '\u2028', char == '\u2029', char == '\ufeff':
				return refuse(line, column, "the character %U cannot stand in this file; delete it", char)
			}
			rest = rest[size:]
		}
		indent := len(content) - len(bytes.TrimLeft(content, " \t"))
		tab := bytes.IndexByte(content[:indent], '\t')
		if after := content[indent:]; tab >= 0 && len(after) > 0 && after[0] != '#' {
			return refuse(line, tab+1, "a tab; YAML is indented with spaces")
		}
	}
	return true
}

// tame refuses what would make the parser recurse without bound, and parts of
// YAML that settings have no use for.
func (r *reader) tame(tokens token.Tokens) bool {
	flow, entries, line := 0, 0, 0
	for i, t := range tokens {
		refuse := func(text string) bool {
			r.problems = append(r.problems, problem{pos: at(t), text: text})
			return false
		}
		if i == maxTokens {
			return refuse(fmt.Sprintf("up to here the file has more than %d words and signs; that is too many", maxTokens))
		}
		if t.Position.Line != line {
			line, entries = t.Position.Line, 0
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType:
			entries++
		case token.TagType:
			return refuse("tags (!) have no use here; write the value alone")
		case token.DirectiveType:
			return refuse("directives (%) have no use here; delete the line")
		case token.MappingKeyType:
			return refuse(`keys are plain words here; write them without "?"`)
		case token.MergeKeyType:
			return refuse("keys are not merged (<<) here; write them where they belong")
		}
		if flow > maxDepth || entries > maxDepth || t.Position.IndentNum > 8*maxDepth {
			return refuse("values are nested too deep")
		}
	}
	return true
}

// advice is what is behind some of the parser's words.
var advice = map[string]string{
	"mapping value is not allowed in this context":                       `quote a value that has ": " in it, and write one key a line`,
	"value is not allowed in this context":                               "is it indented like the line before?",
	"value is not allowed in this context. map key-value is pre-defined": "is it indented like the line before?",
	"non-map value is specified":                                         `a key is followed by ":" and a space`,
	"unexpected key name":                                                `a key is followed by ":" and a space`,
	"block sequence entries are not allowed in this context":             `write the first "-" on a line of its own`,
	"',' or ']' must be specified":                                       `a list is written [a, b]`,
	"could not find end character of double-quoted text":                 `it begins with " here`,
	"could not find end character of single-quoted text":                 `it begins with ' here`,
	"found character '\t' that cannot start any token":                   "use spaces",
	"unexpected scalar value type":                                       "a value was expected",
	"could not find flow mapping end token '}'":                          "it begins with { here",
	"sequence end token ']' not found":                                   "it begins with [ here",
	"could not find '[' character corresponding to ']'":                  "quote it if it is part of a value",
	"could not find '{' character corresponding to '}'":                  "quote it if it is part of a value",
	"'@' is a reserved character":                                        "quote the value",
	"'`' is a reserved character":                                        "quote the value",
	"map key definition includes an implicit line break":                 "write the key and its \":\" on one line",
	"',' or '}' must be specified":                                       "a mapping is written {a: 1, b: 2}",
	"anchors cannot be used consecutively":                               "one name is enough",
	"could not find alias value":                                         "name what is meant: *name",
	"could not find anchor value":                                        "name it: &name",
	"unexpected map key":                                                 "is it indented like the line before?",
	"expected sequence element, but found ','":                           "a list is written [a, b]",
}

// notYAML notes what the parser says, without the lines that it quotes: they may
// hold secrets.
func (r *reader) notYAML(err error) {
	p := problem{pos: pos{1, 1}, text: "this is not YAML: " + err.Error()}
	if syntax := yaml.Error(nil); errors.As(err, &syntax) {
		p.pos = at(syntax.GetToken())
		p.text = "this is not YAML: " + oneLine(syntax.GetMessage())
		if more := advice[syntax.GetMessage()]; more != "" {
			p.text += "; " + more
		}
	}
	r.problems = append(r.problems, p)
}

func oneLine(s string) string {
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, s)
}

func at(t *token.Token) pos {
	if t == nil || t.Position == nil {
		return pos{1, 1}
	}
	return pos{max(t.Position.Line, 1), max(t.Position.Column, 1)}
}

// posOf is where a value begins.
func posOf(n ast.Node) pos {
	switch n := n.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return posOf(n.Values[0].Key)
		}
	case *ast.MappingValueNode:
		return posOf(n.Key)
	}
	return at(n.GetToken())
}

// anchorsOf collects the anchors of what it walks.
type anchorsOf struct{ *reader }

func (a anchorsOf) Visit(n ast.Node) ast.Visitor {
	if anchor, ok := n.(*ast.AnchorNode); ok {
		name := anchor.Name.GetToken().Value
		a.anchors[name] = append(a.anchors[name], anchor)
	}
	return a
}

// resolve is what is behind anchors and aliases; ok is false if it has been refused.
func (r *reader) resolve(v value) (_ value, ok bool) {
	if r.values++; r.values > maxValues {
		if r.values == maxValues+1 {
			r.excess = problem{pos: v.pos, path: v.path, text: fmt.Sprintf("up to here the file has more than %d values, those behind aliases counted for each; that is too many", maxValues)}
		}
		return v, false
	}
	// An anchor is there before what uses it, so that this ends.
	for {
		switch n := v.node.(type) {
		case *ast.AnchorNode:
			v.node = n.Value
		case *ast.AliasNode:
			name := n.Value.GetToken().Value
			var named *ast.AnchorNode
			for _, anchor := range r.anchors[name] {
				if posOf(anchor).compare(posOf(n)) < 0 {
					named = anchor
				}
			}
			if named == nil {
				r.refuse(v, "nothing before it is named &%s; write the value itself", oneLine(name))
				return v, false
			}
			if posOf(named.Value).compare(posOf(n)) == 0 {
				r.refuse(v, "*%s is itself", oneLine(name))
				return v, false
			}
			v.node = named.Value
		default:
			v.pos = posOf(n)
			return v, true
		}
	}
}

// kind says what a value is.
func kind(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	case *ast.LiteralNode:
		return "a block of text"
	case *ast.NullNode:
		return "nothing"
	}
	return "a single value"
}

// pairs are the keys of a mapping and their values. It is nil, false if it has
// been refused.
func (r *reader) pairs(v value) ([]*ast.MappingValueNode, bool) {
	switch n := v.node.(type) {
	case *ast.MappingNode:
		return n.Values, true
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, true
	}
	r.refuse(v, "%s where a mapping (key: value) was expected", kind(v.node))
	return nil, false
}

// eachPair calls use for each key and its value. It is false if v is no mapping.
func (r *reader) eachPair(v value, use func(name string, key, v value)) bool {
	pairs, ok := r.pairs(v)
	if !ok {
		return false
	}
	lines := map[string]int{}
	for _, pair := range pairs {
		key := value{path: v.path, node: pair.Key, pos: posOf(pair.Key)}
		switch pair.Key.(type) {
		case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.NullNode, *ast.InfinityNode, *ast.NanNode:
		default:
			r.refuse(key, "a key is a plain word")
			continue
		}
		name := pair.Key.GetToken().Value
		if line, twice := lines[name]; twice {
			r.refuse(key, "%s is there twice, first in line %d; keep one", quote(name), line)
			continue
		}
		lines[name] = key.pos.line
		path := name
		if v.path != "" {
			path = v.path + "." + name
		}
		use(name, key, value{path: path, node: pair.Value, pos: posOf(pair.Value)})
	}
	return true
}

// mapping reads a mapping of known keys, and calls after, if there is one, once
// all of it is read.
func (r *reader) mapping(v value, known []key, after func(*reader, value)) {
	isMapping := r.eachPair(v, func(name string, written, v value) {
		i := slices.IndexFunc(known, func(k key) bool { return k.name == name })
		if i < 0 {
			r.refuse(written, "unknown key %s; %s", quote(name), r.meant(name, known))
			r.problems[len(r.problems)-1].unknown = true
			return
		}
		v, ok := r.resolve(v)
		if _, null := v.node.(*ast.NullNode); null {
			return // A key without a value is as good as none.
		}
		r.written[v.path] = v
		if !ok {
			return
		}
		switch k := known[i]; {
		case k.items != nil:
			r.eachItem(v, func(i int, v value) {
				known, after := k.items(i)
				r.mapping(v, known, after)
			})
		case k.keys != nil:
			r.mapping(v, k.keys, nil)
		default:
			k.read(r, v)
		}
	})
	if isMapping && after != nil {
		after(r, v)
	}
}

// eachItem calls use for each value of a list.
func (r *reader) eachItem(v value, use func(i int, v value)) {
	list, ok := v.node.(*ast.SequenceNode)
	if !ok {
		r.refuse(v, "%s where a list was expected", kind(v.node))
		return
	}
	for i, n := range list.Values {
		item, ok := r.resolve(value{path: fmt.Sprintf("%s[%d]", v.path, i), node: n, pos: posOf(n)})
		if !ok {
			continue
		}
		r.written[item.path] = item
		use(i, item)
	}
}

// scalar is the text of a single value; ok is false if it has been refused.
func (r *reader) scalar(v value) (text string, ok bool) {
	switch n := v.node.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	r.refuse(v, "%s where a single value was expected", kind(v.node))
	return "", false
}

// one reads a single value.
func one[T any](to *T, parse func(string) (T, error)) func(*reader, value) {
	return func(r *reader, v value) {
		text, ok := r.scalar(v)
		if !ok {
			return
		}
		parsed, err := parse(text)
		if err != nil {
			r.refuse(v, "%v", err)
			return
		}
		*to = parsed
	}
}

// list reads a list of values, or one that stands for a list of it.
func list[T comparable](to *[]T, parse func(string) (T, error)) func(*reader, value) {
	return listOf(to, parse, func(a, b T) bool { return a == b })
}

// listOf is list for values of which one may be within another.
func listOf[T any](to *[]T, parse func(string) (T, error), within func(a, b T) bool) func(*reader, value) {
	return func(r *reader, v value) {
		*to = nil
		var texts []string
		item := func(v value) {
			var parsed T
			problems := len(r.problems)
			one(&parsed, parse)(r, v)
			if len(r.problems) > problems {
				return
			}
			text, _ := r.scalar(v)
			for i, other := range *to {
				switch inside, around := within(parsed, other), within(other, parsed); {
				case inside && around:
					r.refuse(v, "%s is there twice; keep one", quote(text))
				case inside:
					r.refuse(v, "%s is within %s already; leave it out", quote(text), quote(texts[i]))
				case around:
					r.refuse(v, "%s is within %s; leave that out", quote(texts[i]), quote(text))
				default:
					continue
				}
				return
			}
			*to, texts = append(*to, parsed), append(texts, text)
		}
		if _, several := v.node.(*ast.SequenceNode); !several {
			item(v)
			return
		}
		r.eachItem(v, func(_ int, v value) { item(v) })
	}
}

// some is for lists that have no meaning without any value.
func some(read func(*reader, value)) func(*reader, value) {
	return func(r *reader, v value) {
		if l, several := v.node.(*ast.SequenceNode); several && len(l.Values) == 0 {
			r.refuse(v, "the list is empty; write a value, or leave the key out")
			return
		}
		read(r, v)
	}
}

// pairsOf reads a mapping of names that are the user's own.
func pairsOf(to *map[string]string, check func(name, text string) error) func(*reader, value) {
	return func(r *reader, v value) {
		m := map[string]string{}
		r.eachPair(v, func(name string, written, v value) {
			v, ok := r.resolve(v)
			if !ok {
				return
			}
			text, ok := r.scalar(v)
			if !ok {
				return
			}
			if err := check(name, text); err != nil {
				written.path = v.path
				r.refuse(written, "%v", err)
				return
			}
			for other := range maps.Keys(m) {
				if strings.EqualFold(other, name) {
					r.refuse(written, "%s and %s are one name; keep one", quote(other), quote(name))
					return
				}
			}
			m[name] = text
		})
		if len(m) > 0 {
			*to = m
		}
	}
}

// meant is the advice for a key that is not known.
func (r *reader) meant(name string, known []key) string {
	const notClose = 1 << 10
	best, closest := "", notClose
	for _, k := range known {
		d := distance(strings.ToLower(name), k.name)
		if strings.HasPrefix(k.name, strings.ToLower(name)+"_") {
			d = 1 // password for password_file
		}
		if d <= 1+len(k.name)/4 && d < closest {
			best, closest = k.name, d
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	if r.paths == nil {
		r.paths = map[string]string{}
		collect(r.paths, keys(Default()), "")
	}
	if path := r.paths[name]; path != "" {
		return "it belongs there: " + path
	}
	var names []string
	for _, k := range known {
		names = append(names, k.name)
	}
	return "the keys here are " + strings.Join(names, ", ")
}

// collect notes the first path of each name of a key.
func collect(paths map[string]string, known []key, above string) {
	for _, k := range known {
		path := above + k.name
		if paths[k.name] == "" {
			paths[k.name] = path
		}
		below := k.keys
		if k.items != nil {
			path += "[]"
			below, _ = k.items(0)
		}
		collect(paths, below, path+".")
	}
}

// distance is how many characters have to be changed, put in, left out or
// swapped with the next to make a of b.
func distance(a, b string) int {
	const longest = 40 // No key is longer.
	if len(a) > longest || len(b) > longest {
		return longest
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
		for j := range rows[i] {
			if i == 0 {
				rows[i][j] = j
				continue
			}
			if j == 0 {
				continue
			}
			d := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				d++
			}
			d = min(d, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
