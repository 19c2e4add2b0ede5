// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"net/netip"
	"strconv"
	"strings"
)

// address is one address as HAProxy writes it.
type address struct {
	host        string     // as written, without the port
	ip          netip.Addr // invalid where host is a name; 0.0.0.0 or :: for "" and *
	first, last int        // ports
	hasPort     bool
	relative    bool // the port is an offset
	tcp         bool // an Internet address for TCP; else nothing above is set
}

// prefixes of addresses, and whether TCP goes over what they name.
var prefixes = []struct {
	text string
	tcp  bool
	v    int // 4 or 6, 0 either
}{
	{"ipv4@", true, 4}, {"ipv6@", true, 6}, {"tcp4@", true, 4}, {"tcp6@", true, 6}, {"tcp@", true, 0}, {"ip@", true, 0},
	{"mptcp4@", true, 4}, {"mptcp6@", true, 6}, {"mptcp@", true, 0},
	{"udp4@", false, 4}, {"udp6@", false, 6}, {"udp@", false, 0}, {"quic4@", false, 4}, {"quic6@", false, 6},
	{"unix@", false, 0}, {"uxst@", false, 0}, {"uxdg@", false, 0}, {"abns@", false, 0}, {"abnsz@", false, 0},
	{"fd@", false, 0}, {"sockpair@", false, 0}, {"rhttp@", false, 0}, {"rev@", false, 0},
}

// parseAddress reads an address as str2sa_range() of src/tools.c does. wrong
// says what is wrong with it, "" if nothing is. Ports are as needs says.
func parseAddress(text string, needs portRule) (a address, wrong string) {
	text, stream := strings.CutPrefix(text, "stream+")
	if !stream {
		if _, datagram := strings.CutPrefix(text, "dgram+"); datagram {
			return address{host: text}, ""
		}
	}
	version := 0
	a.tcp = !strings.HasPrefix(text, "/")
	for _, p := range prefixes {
		if rest, ok := strings.CutPrefix(text, p.text); ok {
			text, a.tcp, version = rest, p.tcp, p.v
			break
		}
	}
	a.host = text
	if !a.tcp {
		return a, ""
	}
	port := ""
	if i := strings.LastIndexAny(text, ":]"); i >= 0 && text[i] == ':' {
		a.host, port = text[:i], text[i+1:]
	} else if needs == portNeeded {
		return a, "a port is missing: write it after a colon, as in *:443"
	}
	if wrong := a.readPort(port, needs); wrong != "" {
		return a, wrong
	}
	host := a.host
	if strings.HasPrefix(host, "[") {
		if !strings.HasSuffix(host, "]") {
			return a, "the bracket of the address is not closed"
		}
		host = host[1 : len(host)-1]
	}
	switch {
	case (host == "" || host == "*") && version != 6:
		a.ip = netip.IPv4Unspecified()
	case host == "" || host == "*":
		a.ip = netip.IPv6Unspecified()
	default:
		if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" && (version == 0 || ip.Is4() == (version == 4)) {
			a.ip = ip
		}
	}
	return a, ""
}

// portRule is what an address may say of ports.
type portRule uint8

const (
	portNeeded portRule = iota // one, or a range
	portOffset                 // one, none, or an offset to that of the client's connection
)

func (a *address) readPort(port string, needs portRule) (wrong string) {
	if port == "" {
		if needs == portNeeded {
			return "a port is missing after the colon"
		}
		return ""
	}
	a.hasPort = true
	if port[0] == '+' || port[0] == '-' {
		if needs != portOffset {
			return "a port cannot be relative here"
		}
		a.relative = true
		return ""
	}
	if !isDigit(port[0]) {
		return strconv.Quote(port) + " is not a port"
	}
	first, last, isRange := strings.Cut(port, "-")
	if isRange && needs != portNeeded {
		return "a range of ports is not permitted here"
	}
	if !isRange {
		last = first
	}
	a.first, a.last = leadingInt(first), leadingInt(last)
	least := 0
	if needs == portNeeded {
		least = 1
	}
	switch {
	case a.first < least || a.first > 65535 || a.last < least || a.last > 65535:
		return strconv.Quote(port) + " is not a port: ports are 1 to 65535"
	case a.first > a.last:
		return "the range of ports " + port + " ends before it begins"
	}
	return ""
}

// leadingInt reads the digits that s begins with, as atoi(3).
func leadingInt(s string) int {
	n := 0
	for i := 0; i < len(s) && isDigit(s[i]) && n < 1<<24; i++ {
		n = n*10 + int(s[i]-'0')
	}
	return n
}

// The keywords of bind and server lines that have an argument, so that none of
// those is taken for a keyword.
var (
	bindArguments = words("accept-netscaler-cip alpn backlog ca-file ca-ignore-err ca-sign-file ca-sign-pass ca-verify-file cc ciphers " +
		"ciphersuites client-sigalgs crl-file crt crt-ignore-err crt-list curves default-crt ecdhe ech expose-fd gid group guid-prefix id " +
		"idle-ping interface label level maxconn mode mss name namespace nbconn nice npn process proto quic-cc-algo quic-socket " +
		"severity-output shards sigalgs ssl-max-ver ssl-min-ver tcp-md5sig tcp-ss tcp-ut thread tls-ticket-keys uid user verify")
	serverArguments = words("addr agent-addr agent-inter agent-port agent-send alpn ca-file cc check-alpn check-pool-conn-name check-proto " +
		"check-sni ciphers ciphersuites client-sigalgs cookie crl-file crt curves downinter ech error-limit fall fastinter guid hash-key id " +
		"idle-ping init-addr init-state inter log-bufsize log-proto max-reuse maxconn maxqueue minconn namespace npn observe on-error " +
		"on-marked-down on-marked-up pool-conn-name pool-low-conn pool-max-conn pool-purge-delay port proto proxy-v2-options redir " +
		"resolve-net resolve-opts resolve-prefer resolvers rise shard sigalgs slowstart sni socks4 source ssl-max-ver ssl-min-ver " +
		"tcp-md5sig tcp-ut track usesrc verify verifyhost weight ws")
	bindRequired   = words("interface maxconn namespace")
	serverRequired = words("namespace socks4")
)

// keywords calls fn for each keyword of a bind or server line, with its
// argument if it has one. An argument that is missing is an error where
// required names the keyword; HAProxy passes over some others, and says so of
// the rest itself.
func (p *parser) keywords(w []word, withArgument, required map[string]bool, fn func(keyword, argument word)) bool {
	for i := 0; i < len(w); i++ {
		var argument word
		keyword := w[i]
		if withArgument[keyword.text] {
			switch i++; {
			case i < len(w):
				argument = w[i]
			case required[keyword.text]:
				p.fail(keyword.end, "%s needs an argument", keyword.text)
				return false
			default:
				argument.column = keyword.end
			}
		}
		fn(keyword, argument)
	}
	return true
}

func (p *parser) bind(w []word) {
	if p.current.Kind == Defaults {
		p.fail(w[0].column, "bind is not allowed in defaults")
		return
	}
	if len(w) < 2 {
		p.fail(w[0].end, "bind needs an address and port such as *:443")
		return
	}
	if p.ineffective(w, p.current.Accepts(), "frontend") {
		return
	}
	b := Bind{Pos: p.pos, Undecided: p.state() == undecided}
	b.Pos.Column = w[0].column
	offset := 0
	for text := range strings.SplitSeq(strings.TrimSuffix(w[1].text, ","), ",") {
		column := min(w[1].column+offset, w[1].end)
		offset += len(text) + 1
		expanded, open := p.env.expand(text)
		if open = open || w[1].open; open {
			b.Undecided = true
			p.note(column, "the address depends on a variable that is not known here")
		}
		if expanded == "" && !open {
			p.fail(column, "the address %q is empty once its variables are replaced", text)
			return
		}
		a, wrong := parseAddress(expanded, portNeeded)
		if wrong != "" {
			if open {
				continue
			}
			p.fail(column, "%s: %s", text, wrong)
			return
		}
		if !a.tcp {
			a.first, a.last = 0, 0
		}
		if open {
			a.ip = netip.Addr{}
		}
		b.Addrs = append(b.Addrs, BindAddr{Text: expanded, IP: a.ip, First: uint16(a.first), Last: uint16(a.last)})
	}
	ok := p.keywords(w[2:], bindArguments, bindRequired, func(keyword, argument word) {
		b.Undecided = b.Undecided || keyword.open
		switch keyword.text {
		case "interface":
			b.Interface = argument.text
		case "namespace":
			b.Namespace = argument.text
		case "v4v6":
			b.V4V6 = true
		case "v6only":
			b.V6Only = true
		case "transparent":
			b.Transparent = true
		case "ssl":
			b.SSL = true
		case "accept-proxy":
			b.AcceptProxy = true
		case "maxconn":
			b.Maxconn = p.keywordNumber(keyword, argument, asInt)
			if b.Maxconn.Value < 0 {
				p.fail(argument.column, "expected a number of 0 or more, not %q", argument.text)
			}
		}
	})
	if ok {
		p.current.Binds = append(p.current.Binds, b)
	}
}

// keywordNumber is a number on a bind or server line.
func (p *parser) keywordNumber(keyword, argument word, within func(int64) int64) Setting[int] {
	w := []word{keyword, argument}
	if argument.text == "" && !argument.open {
		w = w[:1]
	}
	return set(p, w, p.atol(argument, within))
}

func (p *parser) serverLine(w []word) {
	keyword := w[0].text
	if keyword != "default-server" && p.current.Kind == Defaults {
		p.fail(w[0].column, "%s is not allowed in defaults", keyword)
		return
	}
	if p.current.Kind == Frontend {
		p.fail(w[0].column, "%s is not allowed in a frontend", keyword)
		return
	}
	if keyword == "default-server" {
		p.serverKeywords(w[1:], &p.current.defaultServer)
		return
	}
	s := p.current.defaultServer
	s.Pos, s.Count = p.pos, 1
	s.Pos.Column = w[0].column
	s.Undecided = s.Undecided || p.state() == undecided
	rest := w[1:]
	expected := map[string]string{"server": "a name and an address such as web1 192.0.2.1:80",
		"server-template": "a prefix, a number and an address such as web 1-10 example.com:80"}[keyword]
	if len(rest) < 2 || keyword == "server-template" && len(rest) < 3 {
		p.fail(w[len(w)-1].end, "%s needs %s", keyword, expected)
		return
	}
	s.Name = rest[0].text
	if c := invalidInName(s.Name); c != 0 && !rest[0].open {
		p.fail(rest[0].column, "%q is not permitted in the name of a server, %q", c, s.Name)
		return
	}
	if keyword == "server-template" {
		first, last, isRange := strings.Cut(rest[1].text, "-")
		low, high := 1, leadingInt(first)
		if isRange {
			low, high = high, leadingInt(last)
		}
		if high < low && !rest[1].open {
			p.fail(rest[1].column, "expected a number of servers or a range such as 1-10, not %q", rest[1].text)
			return
		}
		s.Count = high - low + 1
		rest = rest[1:]
	}
	text, open := p.env.expand(rest[1].text)
	if open = open || rest[1].open; open {
		s.Undecided = true
		p.note(rest[1].column, "the address depends on a variable that is not known here")
	}
	if text == "" && !open {
		p.fail(rest[1].column, "the address %q is empty once its variables are replaced", rest[1].text)
		return
	}
	a, wrong := parseAddress(text, portOffset)
	if wrong != "" && !open {
		p.fail(rest[1].column, "%s: %s", rest[1].text, wrong)
		return
	}
	s.Host = a.host
	if a.tcp && !open {
		s.IP = a.ip
		if s.AnyDest = a.ip.IsValid() && a.ip.IsUnspecified(); s.AnyDest {
			s.IP = netip.Addr{}
		}
		if !a.relative {
			s.Port = uint16(a.first)
		}
	}
	if p.serverKeywords(rest[2:], &s) {
		p.current.Servers = append(p.current.Servers, s)
	}
}

func (p *parser) serverKeywords(w []word, s *Server) bool {
	return p.keywords(w, serverArguments, serverRequired, func(keyword, argument word) {
		s.Undecided = s.Undecided || keyword.open
		switch keyword.text {
		case "disabled", "enabled":
			s.Disabled = keyword.text == "disabled"
		case "send-proxy", "send-proxy-v2", "send-proxy-v2-ssl", "send-proxy-v2-ssl-cn":
			s.SendProxy = true
		case "no-send-proxy", "no-send-proxy-v2":
			s.SendProxy = false
		case "ssl", "no-ssl":
			s.SSL = keyword.text == "ssl"
		case "namespace":
			s.Namespace = argument.text
		case "maxconn":
			s.Maxconn = p.keywordNumber(keyword, argument, asUnsigned)
		case "socks4":
			if a, wrong := parseAddress(argument.text, portNeeded); wrong == "" && a.ip.IsValid() {
				s.SOCKS4 = netip.AddrPortFrom(a.ip, uint16(a.first))
			}
		}
	})
}
