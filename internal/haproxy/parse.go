// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Parse reads configuration files in their order. What HAProxy would refuse is
// an error, of type Errors, as far as it concerns what is read; words that are
// not known are passed over.
func Parse(sources []Source, o Options) (*Config, error) {
	p := newParser(o)
	// From 3.1 on a first reading has only an eye for what global says, setenv
	// and the like included; the second one begins with the environment that the
	// first one leaves, but in a worker of a master.
	changesEnv := func(s Source) bool {
		return bytes.Contains(s.Text, []byte("setenv")) || bytes.Contains(s.Text, []byte("resetenv"))
	}
	if (!o.Version.Known() || o.Version.AtLeast(3, 1)) && slices.ContainsFunc(sources, changesEnv) {
		first := newParser(o)
		first.files(sources)
		p.env.other = &first.env
	}
	p.files(sources)
	p.behead()
	p.open = false
	if !p.stopped {
		p.checkReferences()
		p.checkServers()
	}
	if len(p.errors) > 0 {
		return nil, p.errors
	}
	return p.config, nil
}

func newParser(o Options) *parser {
	p := &parser{
		config:   &Config{},
		version:  o.Version,
		defaults: map[string]*Proxy{}, referenced: map[string]bool{}, ambiguous: map[string]Pos{},
		env: environment{vars: map[string]string{}, unset: map[string]bool{}, complete: o.EnvComplete},
	}
	maps.Copy(p.env.vars, o.Env)
	p.last = newDefaults()
	return p
}

func (p *parser) files(sources []Source) {
	for _, source := range sources {
		p.config.Files = append(p.config.Files, source.Name)
		p.file(source)
		if p.stopped {
			break
		}
	}
}

// maxErrors is after how many HAProxy gives up too.
const maxErrors = 50

type parser struct {
	config  *Config
	version Version
	env     environment
	errors  Errors
	stopped bool // after what HAProxy does not read on after

	defaults   map[string]*Proxy // by name
	referenced map[string]bool   // of them, those that a from has named
	ambiguous  map[string]Pos    // of them, those of a name that another had, and where
	last       *Proxy            // the defaults section that proxies inherit without from

	pos  Pos
	raw  string // the line itself
	open bool   // the line has a variable in it whose value is not known here
	// openName: so has the name of a section.
	openName bool
	section  string // as HAProxy names it in $.SECTION
	keyword  string // of the section that lines belong to; "" before the first
	current  *Proxy // of a proxy's or defaults section
	conds    []branch
	// headless is what is wrong with the head of the section, which is an error
	// once something stands in it.
	headless *Error

	lines    int  // of the section so far
	indented bool // all of them are
}

// newDefaults is what a proxy has that inherits nothing.
func newDefaults() *Proxy {
	return &Proxy{Kind: Defaults, Timeouts: map[string]Setting[time.Duration]{}, Options: map[string]Setting[bool]{}}
}

// branch is one .if that is open.
type branch struct {
	state truth // of the part that is being read
	taken truth // whether a part before it was taken
	outer truth // of what the .if stands in
	other bool  // in .else
	pos   Pos
}

// state is whether the line being read counts.
func (p *parser) state() truth {
	if len(p.conds) == 0 {
		return yes
	}
	return p.conds[len(p.conds)-1].state
}

// fail is for what HAProxy refuses, at a column. In a part that may not be
// there it may never see it, and a variable that is not known here may stand
// for something that it accepts.
func (p *parser) fail(column int, format string, args ...any) {
	pos := p.pos
	pos.Column = column
	text := fmt.Sprintf(format, args...)
	if p.state() == undecided || p.open {
		p.config.Notes = append(p.config.Notes, Note{pos, text})
		return
	}
	p.errors = append(p.errors, &Error{pos, text})
	p.stopped = p.stopped || len(p.errors) >= maxErrors
}

// abort is fail for what HAProxy does not read on after.
func (p *parser) abort(column int, format string, args ...any) {
	p.fail(column, format, args...)
	p.stopped = p.stopped || p.state() == yes && !p.open
}

// refuse is fail, but for what 3.4 has an alert for and then accepts.
func (p *parser) refuse(column int, format string, args ...any) {
	if p.version.AtLeast(3, 4) {
		p.note(column, format, args...)
		return
	}
	p.fail(column, format, args...)
}

func (p *parser) note(column int, format string, args ...any) {
	pos := p.pos
	pos.Column = column
	p.config.Notes = append(p.config.Notes, Note{pos, fmt.Sprintf(format, args...)})
}

func (p *parser) file(s Source) {
	p.keyword, p.section, p.current = "", "", nil
	p.conds = nil
	p.pos, p.open = Pos{File: s.Name}, false
	if i := bytes.IndexByte(s.Text, 0); i >= 0 {
		before := s.Text[:i]
		p.pos.Line = 1 + bytes.Count(before, []byte("\n"))
		p.fail(i-bytes.LastIndexByte(before, '\n'), "a NUL byte in the configuration")
		p.stopped = true
		return
	}
	for rest := string(s.Text); rest != "" && !p.stopped; {
		line, after, ended := strings.Cut(rest, "\n")
		p.pos.Line++
		p.line(line)
		if rest = after; !ended && !p.stopped {
			p.conds, p.open = nil, false
			p.fail(len(line)+1, "the last line does not end in a newline: the file may have been cut off")
		}
	}
	if n := len(p.conds); n > 0 && !p.stopped {
		p.pos = p.conds[n-1].pos
		p.conds, p.open = nil, false
		p.fail(p.pos.Column, "this .if has no .endif")
	}
}

func (p *parser) line(line string) {
	trimmed := strings.TrimLeft(line, " \t\v\f\r")
	if strings.HasPrefix(trimmed, "[") {
		return // a scope, which HAProxy reads and uses for nothing
	}
	p.raw, p.open = line, false
	words, err := lex(line, &p.env, p.local, rulesOf(p.version))
	if err != nil {
		// HAProxy splits lines into words before it looks at conditions.
		conds := p.conds
		p.conds = nil
		p.fail(err.(*lexError).column, "%s", err)
		p.conds = conds
		return
	}
	if len(words) == 0 {
		return
	}
	p.open = slices.ContainsFunc(words, func(w word) bool { return w.open })
	if strings.HasPrefix(words[0].text, ".") && p.conditional(words) {
		return
	}
	if p.state() == no {
		return
	}
	if strings.HasPrefix(words[0].text, ".") {
		p.message(words)
		return
	}
	p.directive(words, trimmed != line)
}

// local is what the variables of the reader itself stand for.
func (p *parser) local(name string) (string, bool) {
	switch name {
	case ".FILE":
		return p.pos.File, true
	case ".LINE":
		return strconv.Itoa(p.pos.Line), true
	case ".SECTION":
		return p.section, true
	}
	return "", false
}

// maxNested is MAXNESTEDCONDS (include/haproxy/cfgcond-t.h).
const maxNested = 100

// conditional takes .if and its kind; false: it is another word.
func (p *parser) conditional(words []word) bool {
	name, column := words[0].text, words[0].column
	n := len(p.conds) - 1
	if name != ".if" && name != ".elif" && name != ".else" && name != ".endif" {
		return false
	}
	// What is wrong with conditions is so whatever they come to.
	abort := func(column int, format string, args ...any) bool {
		p.conds, p.open = nil, false
		p.fail(column, format, args...)
		p.stopped = true
		return true
	}
	if name != ".if" && n < 0 {
		return abort(column, "%s without a .if before it", name)
	}
	if (name == ".else" || name == ".endif") && len(words) > 1 {
		return abort(words[1].column, "%s takes no argument", name)
	}
	if (name == ".elif" || name == ".else") && p.conds[n].other {
		return abort(column, "%s after .else", name)
	}
	switch name {
	case ".endif":
		p.conds = p.conds[:n]
		return true
	case ".if":
		if len(p.conds)+1 >= maxNested {
			return abort(column, "more than %d .if in one another", maxNested-1)
		}
		pos := p.pos
		pos.Column = column
		p.conds = append(p.conds, branch{outer: p.state(), pos: pos})
		n++
	}
	b := &p.conds[n]
	b.other = name == ".else"
	if b.outer == no || b.taken == yes {
		b.state = no
		return true
	}
	value := yes
	if !b.other {
		var texts []string
		open := false
		for _, w := range words[1:] {
			texts = append(texts, w.text)
			open = open || w.open
		}
		c := &condition{text: strings.Join(texts, " "), version: p.version, env: &p.env, open: open}
		var err error
		if value, err = c.evaluate(); err != nil {
			if b.outer == undecided || open {
				p.note(column, "%s", err)
				value = undecided
			} else {
				return abort(words[min(1, len(words)-1)].column, "%s", err)
			}
		}
		if value == undecided {
			p.note(column, "only HAProxy can decide %s: what it guards may or may not hold", strings.TrimSpace(p.raw))
		}
	}
	b.state = value
	if value == yes && (b.taken == undecided || b.outer == undecided) {
		b.state = undecided
	}
	b.taken = max(b.taken, value)
	return true
}

// message takes .notice and its kind.
func (p *parser) message(words []word) {
	name := words[0].text
	switch name {
	case ".alert", ".warning", ".notice", ".diag":
	default:
		p.fail(words[0].column, "%s is none of .if, .elif, .else, .endif, .notice, .warning, .alert and .diag", name)
		return
	}
	if len(words) > 2 {
		p.fail(words[2].column, "%s takes one argument: put quotes around it", name)
		return
	}
	text := ""
	if len(words) > 1 {
		text = words[1].text
	}
	switch name {
	case ".alert":
		p.open = false // whatever it says
		p.abort(words[0].column, ".alert ends the reading here: %s", text)
	case ".warning":
		p.note(words[0].column, ".warning: %s", text)
	}
}

// sections are those that are passed over; the others are cases of enter.
var sections = words("acme aggregations cache crt-store dynamic-update fcgi-app haterm healthcheck http-errors log-forward log-profile mailers " +
	"peers program resolvers ring shm-stats-file spoe-agent spoe-group spoe-message traces userlist")

func words(s string) map[string]bool {
	m := map[string]bool{}
	for _, w := range strings.Fields(s) {
		m[w] = true
	}
	return m
}

// proxyWords begin the lines of proxies; with them a section that is not known
// is told from a line that happens not to be indented.
var proxyWords = words("acl backlog balance bind bind-process block capture clitcpka-cnt clitcpka-idle clitcpka-intvl compression cookie " +
	"declare default default-server default_backend description disabled dispatch dynamic-cookie-key email-alert enabled errorfile errorfiles " +
	"errorloc errorloc302 errorloc303 error-log-format external-check filter force-persist fullconn grace guid hash-balance-factor hash-preserve-affinity " +
	"hash-type http-after-response http-check http-error http-request http-response http-reuse http-send-name-header id ignore-persist " +
	"load-server-state-from-file log log-format log-format-sd log-steps log-tag max-keep-alive-queue max-session-srv-conns maxconn mode monitor " +
	"monitor-net monitor-uri no option persist quic-initial rate-limit redirect retries retry-on server server-state-file-name server-template source " +
	"srvtcpka-cnt srvtcpka-idle srvtcpka-intvl stats stick stick-table tcp-check tcp-request tcp-response timeout transparent unique-id-format " +
	"unique-id-header use-fcgi-app use-server use_backend")

// directive takes a line that is in force.
func (p *parser) directive(w []word, indented bool) {
	keyword := w[0].text
	switch {
	case keyword == "global" || keyword == "frontend" || keyword == "backend" || keyword == "listen" || keyword == "defaults":
		p.enter(w)
		return
	case sections[keyword]:
		p.pass(w)
		return
	case p.keyword == "":
		p.fail(w[0].column, "%q stands before the first section: expected global, defaults, frontend, backend or listen", keyword)
		return
	case !indented && p.indented && p.lines > 0 && p.current != nil && len(w) <= 3 && !proxyWords[keyword]:
		p.pass(w)
		p.note(w[0].column, "%q is taken for a section that is not known, and passed over", keyword)
		return
	}
	if p.headless != nil {
		p.errors, p.headless = append(p.errors, p.headless), nil
		return
	}
	p.lines++
	p.indented = p.indented && indented
	negated, reset := false, false
	if (keyword == "no" || keyword == "default") && len(w) > 1 {
		negated, reset = keyword == "no", keyword == "default"
		first := w[0].column
		w = w[1:]
		keyword = w[0].text
		if p.current != nil && (keyword == "maxconn" || keyword == "timeout" || keyword == "mode" || keyword == "bind" || keyword == "server") {
			p.fail(first, "only options can be negated or reset, not %s", keyword)
			return
		}
	}
	switch {
	case p.keyword == "global":
		p.global(w)
	case p.current != nil:
		p.proxy(w, negated, reset)
	}
}

// pass begins a section that is of no interest.
func (p *parser) pass(w []word) {
	p.begin(w)
	p.current = nil
}

// behead ends a section.
func (p *parser) behead() {
	if p.headless != nil {
		p.config.Notes = append(p.config.Notes, Note{p.headless.Pos, p.headless.Text})
		p.headless = nil
	}
}

func (p *parser) begin(w []word) {
	p.behead()
	p.keyword, p.section = w[0].text, w[0].text
	if len(w) > 1 {
		p.section = w[1].text
	}
	p.lines, p.indented = 0, true
}

// enter begins a section.
func (p *parser) enter(w []word) {
	p.begin(w)
	p.current = nil
	kind := map[string]Kind{"defaults": Defaults, "frontend": Frontend, "backend": Backend, "listen": Listen}[p.keyword]
	if kind == 0 {
		if len(w) > 1 {
			p.fail(w[1].column, "global takes no argument")
		}
		return
	}
	name, rest := word{column: w[0].end}, w[1:]
	if len(rest) > 0 && !(kind == Defaults && rest[0].text == "from" && len(rest) == 2) {
		name, rest = rest[0], rest[1:]
	}
	if kind != Defaults {
		if name.text == "" && !name.open {
			p.abort(name.column, "%s needs a name", kind)
			return
		}
	}
	if c := invalidInName(name.text); c != 0 && kind != Defaults {
		p.refuse(name.column, "%q is not permitted in the name %q: only letters, digits, and . : _ -", c, name.text)
	}
	p.openName = p.openName || name.open
	var from word
	if len(rest) > 1 && rest[0].text == "from" {
		from = rest[1]
	}
	if extra := len(rest) - 1; kind == Defaults && (extra == 0 || extra > 1 || extra == 1 && from.column == 0) {
		p.note(rest[extra].column, "HAProxy passes over %q", rest[extra].text)
	}
	if kind != Defaults && len(rest) > 0 && (from.column == 0 || len(rest) != 2) {
		at := rest[0]
		if at.text == "from" && len(rest) > 2 {
			at = rest[2]
		}
		hint := ""
		if kind != Backend {
			hint = "; addresses are given by bind"
		}
		p.fail(at.column, "unexpected %q after the name: only from and the name of a defaults section can follow%s", at.text, hint)
		if wrong := len(p.errors) - 1; wrong >= 0 && p.errors[wrong].Pos.Line == p.pos.Line && (len(rest) == 1 || rest[0].text != "from") {
			// An alert that HAProxy does not count: there is no such section,
			// and only what stands in it is an error.
			p.headless = p.errors[wrong]
			p.errors = p.errors[:wrong]
		}
		return
	}
	pos := p.pos
	pos.Column = w[0].column
	first := p.defaults[name.text]
	if kind == Defaults {
		if first != nil && !p.redefine(name) {
			return
		}
	} else {
		for _, other := range p.config.Proxies {
			same := other.Accepts() && kind != Backend || other.Connects() && kind != Frontend
			if other.Name == name.text && same && !other.Undecided && p.state() == yes {
				p.fail(name.column, "%s %s has the name of %s at %s", kind, name.text, other, other.Pos)
				break
			}
		}
	}
	parent := p.last
	if kind == Defaults {
		parent = newDefaults()
	}
	if from.text != "" || from.open {
		if parent = p.inherit(from); parent == nil {
			return
		}
	}
	p.current = parent.child(kind, name.text, pos)
	p.current.Undecided = p.state() == undecided || from.open
	if kind != Defaults {
		p.config.Proxies = append(p.config.Proxies, p.current)
		return
	}
	p.last = p.current
	if name.text != "" {
		p.defaults[name.text] = p.current
	}
	if first != nil {
		p.ambiguous[name.text] = first.Pos
	}
}

// redefine takes a second defaults section of a name. It says whether HAProxy
// reads on.
func (p *parser) redefine(name word) bool {
	first := p.defaults[name.text]
	if p.referenced[name.text] {
		switch text := fmt.Sprintf("defaults %q was named by a from before and cannot be defined again (first at %s)", name.text, first.Pos); {
		case !p.version.Known():
			p.note(name.column, "from 3.1 on HAProxy refuses it: %s", text)
		case p.version.AtLeast(3, 1):
			p.abort(name.column, "%s", text)
			return false
		}
	}
	if p.version.AtLeast(3, 1) {
		delete(p.defaults, name.text)
	}
	return true
}

// inherit returns the defaults section that a from names, nil if there is none.
func (p *parser) inherit(from word) *Proxy {
	if from.open {
		p.note(from.column, "which defaults section it is depends on a variable that is not known here")
		return newDefaults()
	}
	named := p.defaults[from.text]
	if named == nil {
		p.abort(from.column, "no defaults section before is named %q", from.text)
		return nil
	}
	if first, is := p.ambiguous[from.text]; is {
		p.refuse(from.column, "two defaults sections are named %q: at %s and at %s", from.text, first, named.Pos)
	}
	if c := invalidInName(from.text); c != 0 {
		p.refuse(from.column, "%q is not permitted in the name %q of a defaults section that is used by name", c, from.text)
	}
	p.referenced[from.text] = true
	return named
}

// invalidInName returns the first byte that a name cannot have, 0 if there is none.
func invalidInName(name string) byte {
	for i := range len(name) {
		if c := name[i]; !isAlpha(c) && !isDigit(c) && !strings.ContainsRune(".:_-", rune(c)) {
			return c
		}
	}
	return 0
}

// The timeouts by which kind of proxy has a use for them (proxy_defproxy_cpy()
// of src/proxy.c).
var (
	frontTimeouts = words("client client-hs client-fin tarpit http-request http-keep-alive")
	backTimeouts  = words("server server-fin connect check queue tunnel tarpit http-request http-keep-alive")
)

// child is a section that inherits from the defaults section p what its kind
// can have.
func (p *Proxy) child(kind Kind, name string, pos Pos) *Proxy {
	c := &Proxy{Kind: kind, Name: name, Pos: pos, Mode: p.Mode, Disabled: p.Disabled,
		Timeouts: map[string]Setting[time.Duration]{}, Options: maps.Clone(p.Options)}
	front, back := kind != Backend, kind != Frontend
	if front {
		c.Maxconn, c.DefaultBackend = p.Maxconn, p.DefaultBackend
	}
	if back {
		c.Fullconn, c.defaultServer = p.Fullconn, p.defaultServer
	}
	for name, t := range p.Timeouts {
		if front && frontTimeouts[name] || back && backTimeouts[name] {
			c.Timeouts[name] = t
		}
	}
	return c
}

// set is the setting that the words of a line make.
func set[T any](p *parser, w []word, value T) Setting[T] {
	texts := make([]string, len(w))
	open := p.state() == undecided
	for i := range w {
		texts[i] = w[i].text
		open = open || w[i].open
	}
	section := p.keyword
	if p.current != nil {
		section = p.current.String()
	}
	if slices.ContainsFunc(w, func(w word) bool { return w.open }) {
		p.note(w[0].column, "%s depends on a variable that is not known here", w[0].text)
	}
	pos := p.pos
	pos.Column = w[0].column
	return Setting[T]{Value: value, Text: strings.Join(texts, " "), Pos: pos, Section: section, Undecided: open}
}

// number reads the one number that a keyword takes. ok is false after an error.
func (p *parser) number(w []word, within func(int64) int64) (n int, ok bool) {
	if len(w) < 2 {
		p.fail(w[0].end, "%s needs a number", w[0].text)
		return 0, false
	}
	if !p.atMost(w, 2) {
		return 0, false
	}
	return p.atol(w[1], within), true
}

// How HAProxy stores numbers, which it does not check.
func asInt(n int64) int64      { return int64(int32(n)) }
func asUnsigned(n int64) int64 { return int64(uint32(n)) }

// atol reads a number as atol(3) does and as it is stored: HAProxy takes "10k"
// for 10, without a word.
func (p *parser) atol(w word, within func(int64) int64) int {
	text, i := w.text, 0
	if text != "" && (text[0] == '-' || text[0] == '+') {
		i++
	}
	for i < len(text) && isDigit(text[i]) {
		i++
	}
	v, _ := strconv.ParseInt(text[:i], 10, 64) // the nearest it can hold, as atol
	if n := within(v); n != v || i < len(text) || text == "" {
		if v = n; !w.open {
			p.note(w.column, "%q is not a number that HAProxy can hold: it reads it as %d", text, v)
		}
	}
	return int(v)
}

// atMost refuses more words than n.
func (p *parser) atMost(w []word, n int) bool {
	if len(w) > n {
		p.fail(w[n].column, "unexpected %q: %s takes %s", w[n].text, w[0].text, plural(n-1, "argument"))
		return false
	}
	return true
}

func plural(n int, what string) string {
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "one " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// maxTimer is the longest a timer can be, in milliseconds; times are 31 bits.
const maxTimer = 1<<31 - 1

// duration reads a time as parse_time_err() of src/tools.c does: milliseconds
// without a unit, and rounded up to them.
func (p *parser) duration(w word) (d time.Duration, ok bool) {
	fail := p.fail
	if w.open {
		fail, ok = func(int, string, ...any) {}, true
	}
	expected := "a number with us, ms, s, m, h or d after it, such as 60s"
	i := 0
	for i < len(w.text) && isDigit(w.text[i]) {
		i++
	}
	if i == 0 {
		fail(w.column, "%q is not a time: expected %s", w.text, expected)
		return 0, ok
	}
	unit, unitLength := time.Millisecond, 1
	switch rest := w.text[i:]; {
	case rest == "":
		unitLength = 0
	case strings.HasPrefix(rest, "us"):
		unit, unitLength = time.Microsecond, 2
	case strings.HasPrefix(rest, "ms"):
		unitLength = 2
	case rest[0] == 's':
		unit = time.Second
	case rest[0] == 'm':
		unit = time.Minute
	case rest[0] == 'h':
		unit = time.Hour
	case rest[0] == 'd':
		unit = 24 * time.Hour
	default:
		fail(min(w.column+i, w.end), "%q is not a unit of time: expected %s", rest, expected)
		return 0, ok
	}
	if i+unitLength < len(w.text) && !w.open {
		p.note(w.column, "%q has more after the unit, which HAProxy warns of", w.text)
	}
	n, err := strconv.ParseInt(w.text[:i], 10, 64)
	if err != nil || n > int64(maxTimer*time.Millisecond/unit) {
		fail(w.column, "%q is too long: HAProxy's timers end at 24d20h31m", w.text)
		return 0, ok
	}
	d = time.Duration(n) * unit
	d = (d + time.Millisecond - 1).Truncate(time.Millisecond)
	return d, true
}

func (p *parser) global(w []word) {
	g := &p.config.Global
	// A second time is refused with an alert that is not fatal: the first holds.
	number := func(s *Setting[int]) {
		if s.IsSet() && s.Value != 0 && !s.Undecided {
			if p.atMost(w, 2) {
				p.note(w[0].column, "%s was set before at %s, which holds", w[0].text, s.Pos)
			}
			return
		}
		if n, ok := p.number(w, asInt); ok {
			perhapsSet := s.Undecided
			*s = set(p, w, n)
			s.Undecided = s.Undecided || perhapsSet
		}
	}
	switch w[0].text {
	case "maxconn":
		isSet := g.Maxconn.Value != 0 || g.Maxconn.Undecided
		if len(w) == 2 && !w[1].open && leadingNumber(w[1].text) != w[1].text && p.version.AtLeast(2, 7) && !isSet {
			p.fail(w[1].column, "expected maxconn and a number, not %q", w[1].text)
			return
		}
		number(&g.Maxconn)
	case "ulimit-n":
		number(&g.UlimitN)
	case "fd-hard-limit":
		number(&g.FDHardLimit)
	case "nbthread":
		if len(w) == 2 && !w[1].open && (leadingNumber(w[1].text) != w[1].text || leadingInt(strings.TrimPrefix(w[1].text, "+")) < 1) {
			p.fail(w[1].column, "expected a number of threads from 1, not %q", w[1].text)
			return
		}
		if n, ok := p.number(w, asInt); ok {
			g.Nbthread = set(p, w, n)
		}
	case "nbproc":
		if p.version.Known() && p.version.AtLeast(2, 5) {
			p.fail(w[0].column, "nbproc is not supported since HAProxy 2.5: use nbthread")
			return
		}
		if n, ok := p.number(w, asInt); ok {
			g.Nbproc = set(p, w, n)
		}
	case "hard-stop-after":
		if len(w) < 2 {
			p.fail(w[0].end, "hard-stop-after needs a time such as 30s")
			return
		}
		if d, ok := p.duration(w[1]); ok {
			g.HardStopAfter = set(p, w, d)
		}
	case "stats":
		if len(w) > 1 && w[1].text == "socket" {
			if len(w) < 3 {
				p.fail(w[1].end, "stats socket needs an address such as /run/haproxy/admin.sock")
				return
			}
			s := set(p, w, w[2].text)
			s.Value, _ = p.env.expand(s.Value)
			g.StatsSockets = append(g.StatsSockets, s)
		}
	case "setenv", "presetenv", "unsetenv", "resetenv":
		p.environment(w)
	}
}

// environment takes the keywords that change it for the lines that follow.
func (p *parser) environment(w []word) {
	args := w[1:]
	switch w[0].text {
	case "setenv", "presetenv":
		if len(args) < 2 {
			p.fail(w[0].end, "%s needs a name and a value", w[0].text)
			return
		}
	case "unsetenv":
		if len(args) == 0 {
			p.fail(w[0].end, "unsetenv needs a name")
		}
	}
	for e := &p.env; e != nil; e = e.other {
		if p.state() == undecided {
			e.doubt(args)
		} else {
			e.change(w[0].text, args)
		}
	}
}

// ineffective notes a keyword that this kind of section has no use for.
func (p *parser) ineffective(w []word, useful bool, kind string) bool {
	if !useful {
		p.note(w[0].column, "%s has no effect in %s: it belongs to a %s", w[0].text, p.current, kind)
	}
	return !useful
}

func (p *parser) proxy(w []word, negated, reset bool) {
	px := p.current
	front, back := px.Kind != Backend, px.Kind != Frontend
	value := func() (word, bool) {
		if len(w) < 2 {
			p.fail(w[0].end, "%s needs a value", w[0].text)
			return word{}, false
		}
		return w[1], p.atMost(w, 2)
	}
	switch w[0].text {
	case "mode":
		p.mode(w)
	case "disabled", "enabled":
		if p.atMost(w, 1) {
			px.Disabled = set(p, w, w[0].text == "disabled")
		}
	case "maxconn":
		if n, ok := p.number(w, asUnsigned); ok && !p.ineffective(w, front, "frontend") {
			px.Maxconn = set(p, w, n)
		}
	case "fullconn":
		if n, ok := p.number(w, asUnsigned); ok && !p.ineffective(w, back, "backend") {
			px.Fullconn = set(p, w, n)
		}
	case "timeout":
		p.timeout(w)
	case "clitimeout", "srvtimeout", "contimeout":
		p.fail(w[0].column, "%s is not supported since HAProxy 2.1: use timeout client, timeout server or timeout connect", w[0].text)
	case "option":
		p.option(w, negated, reset)
	case "default_backend":
		if v, ok := value(); ok && !p.ineffective(w, front, "frontend") {
			px.DefaultBackend = set(p, w, v.text)
		}
	case "use_backend":
		if px.Kind == Defaults {
			p.fail(w[0].column, "use_backend is not allowed in defaults")
			return
		}
		if len(w) < 2 {
			p.fail(w[0].end, "use_backend needs the name of a backend")
			return
		}
		px.UseBackends = append(px.UseBackends, set(p, w, w[1].text))
	case "bind":
		p.bind(w)
	case "server", "server-template", "default-server":
		p.serverLine(w)
	}
}

func (p *parser) mode(w []word) {
	if !p.atMost(w, 2) {
		return
	}
	name, column := "", w[0].end
	if len(w) > 1 {
		name, column = w[1].text, w[1].column
	}
	switch name {
	case "tcp":
		p.current.Mode = set(p, w, TCP)
	case "http":
		p.current.Mode = set(p, w, HTTP)
	case "log", "spop", "haterm", "healthcheck":
		p.current.Mode = set(p, w, OtherMode)
	default:
		if len(w) > 1 && w[1].open {
			p.current.Mode = set(p, w, TCP)
			return
		}
		p.fail(column, "expected mode tcp or mode http, not %q", name)
	}
}

func (p *parser) timeout(w []word) {
	if len(w) > 1 && w[1].open {
		p.note(w[1].column, "which timeout it is depends on a variable that is not known here")
		return
	}
	if len(w) < 2 || !frontTimeouts[w[1].text] && !backTimeouts[w[1].text] {
		at, got := w[0].end, ""
		if len(w) > 1 {
			at, got = w[1].column, w[1].text
		}
		names := maps.Clone(frontTimeouts)
		maps.Copy(names, backTimeouts)
		p.fail(at, "expected the name of a timeout (%s), not %q", strings.Join(slices.Sorted(maps.Keys(names)), ", "), got)
		return
	}
	name := w[1].text
	if len(w) < 3 {
		p.fail(w[1].end, "timeout %s needs a time such as 60s", name)
		return
	}
	d, ok := p.duration(w[2])
	if !ok {
		return
	}
	if len(w) > 3 {
		p.fail(w[3].column, "unexpected %q after the time", w[3].text)
		return
	}
	front, back := p.current.Kind != Backend, p.current.Kind != Frontend
	if !(front && frontTimeouts[name] || back && backTimeouts[name]) {
		kind := "backend"
		if frontTimeouts[name] {
			kind = "frontend"
		}
		p.note(w[0].column, "timeout %s has no effect in %s: it belongs to a %s", name, p.current, kind)
		return
	}
	if last := w[2].text; d > 0 && d < 100*time.Millisecond && isDigit(last[len(last)-1]) && !w[2].open {
		p.note(w[2].column, "timeout %s %s is %s: without a unit it is milliseconds", name, last, d)
	}
	p.current.Timeouts[name] = set(p, w, d)
}

// flagOptions are those that are on or off and take no argument.
var flagOptions = words("abortonclose allbackups checkcache clitcpka contstats dontlognull http-buffer-request http-ignore-probes idle-close-on-response " +
	"prefer-last-server logasap nolinger persist srvtcpka splice-request splice-response splice-auto accept-invalid-http-request " +
	"accept-invalid-http-response dontlog-normal log-separate-errors log-health-checks socket-stats tcp-smart-accept tcp-smart-connect " +
	"independent-streams http-use-proxy-header http-pretend-keepalive http-no-delay disable-h2-upgrade h1-case-adjust-bogus-client " +
	"h1-case-adjust-bogus-server")

func (p *parser) option(w []word, negated, reset bool) {
	if len(w) < 2 {
		p.fail(w[0].end, "option needs a name")
		return
	}
	name := w[1].text
	if flagOptions[name] && len(w) > 2 {
		p.fail(w[2].column, "unexpected %q: option %s takes no argument", w[2].text, name)
		return
	}
	if reset {
		delete(p.current.Options, name)
		return
	}
	s := set(p, w, !negated)
	if negated {
		s.Text = "no " + s.Text
	}
	p.current.Options[name] = s
}

// checkReferences looks for backends that are used and not there.
func (p *parser) checkReferences() {
	if p.openName {
		return
	}
	backends := map[string]bool{}
	for _, px := range p.config.Proxies {
		if px.Connects() {
			backends[px.Name] = true
		}
	}
	for _, px := range p.config.Proxies {
		if !px.Accepts() || px.Disabled.Value || px.Undecided {
			continue
		}
		uses := slices.Clone(px.UseBackends)
		if px.DefaultBackend.IsSet() {
			uses = append(uses, px.DefaultBackend)
		}
		for _, use := range uses {
			if use.Undecided || strings.Contains(use.Value, "%[") || backends[use.Value] {
				continue
			}
			p.pos = use.Pos
			p.fail(use.Pos.Column, "%s uses backend %q, which is not there", px, use.Value)
		}
	}
}

// checkServers looks for servers of one name.
func (p *parser) checkServers() {
	for _, px := range p.config.Proxies {
		if px.Disabled.Value || px.Undecided {
			continue
		}
		first := map[string]Pos{}
		for _, s := range px.Servers {
			if s.Undecided || s.Count != 1 {
				continue
			}
			if pos, is := first[s.Name]; is {
				p.pos = s.Pos
				p.fail(s.Pos.Column, "server %s has the name of the one at %s", s.Name, pos)
			}
			first[s.Name] = s.Pos
		}
	}
}
