// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/track"
)

// Anonymize replaces the addresses and the names of hosts in the evidence, so
// that nothing that is made from it has them: each by the same one everywhere,
// and neighbours (a /24, a /64) by neighbours. Private addresses stay private,
// loopback stays as it is, and ports, proxies and all else are kept.
func Anonymize(e Evidence) Evidence {
	a := &anonymizer{originals: map[netip.Prefix]bool{}, nets: map[netip.Prefix]*anonymousNet{}, used: map[int]int{},
		addrs: map[netip.Addr]netip.Addr{}, hosts: map[string]string{}}
	// At first it only notes what is there: nothing may be replaced by what
	// somebody else has.
	a.noting = true
	a.evidence(e)
	a.noting = false
	return a.evidence(e)
}

type anonymizer struct {
	noting    bool
	originals map[netip.Prefix]bool
	nets      map[netip.Prefix]*anonymousNet
	used      map[int]int // networks taken of each pool
	addrs     map[netip.Addr]netip.Addr
	hosts     map[string]string
	copies    map[any]reflect.Value // of what pointers lead to
}

// anonymousNet stands for a network.
type anonymousNet struct {
	prefix netip.Prefix
	hosts  uint64
}

func (a *anonymizer) evidence(e Evidence) Evidence {
	a.copies = map[any]reflect.Value{}
	e.Conns = replaced(e.Conns, a.conn)
	e.Departures = replaced(e.Departures, a.conn)
	e.Arrivals = replaced(e.Arrivals, func(one Arrival) Arrival {
		one.Conn = a.conn(one.Conn)
		return one
	})
	e.CloseWait = replaced(e.CloseWait, func(w CloseWait) CloseWait {
		w.Flow, w.Process, w.Place = a.flow(w.Flow), a.process(w.Process), a.place(w.Place)
		return w
	})
	e.HAProxy = a.value(reflect.ValueOf(e.HAProxy)).Interface().([]haproxy.Process)
	e.Unlooked = replaced(e.Unlooked, a.text)
	if names := e.Netns; names != nil {
		e.Netns = func(inode uint32) string { return a.text(names(inode)) }
	}
	return e
}

func replaced[T any](all []T, replace func(T) T) []T {
	all = slices.Clone(all)
	for i := range all {
		all[i] = replace(all[i])
	}
	return all
}

func (a *anonymizer) conn(c track.Conn) track.Conn {
	c.Flow, c.Process, c.Place = a.flow(c.Flow), a.process(c.Process), a.place(c.Place)
	c.Limit = c.Limit.WithPlace(a.place)
	return c
}

func (a *anonymizer) flow(f events.Flow) events.Flow {
	for _, e := range []*events.Endpoint{&f.Local, &f.Remote} {
		e.Addr = a.addr(e.IP()).As16()
	}
	return f
}

// process replaces an address in the name: daemons show their peers there.
func (a *anonymizer) process(p events.Process) events.Process {
	if name := p.Name(); strings.ContainsAny(name, ".:") {
		p.Comm = [16]byte{}
		copy(p.Comm[:len(p.Comm)-1], a.text(name))
	}
	return p
}

func (a *anonymizer) place(p *haproxy.Place) *haproxy.Place {
	if p == nil {
		return nil
	}
	return a.value(reflect.ValueOf(p)).Interface().(*haproxy.Place)
}

// value copies what is known of HAProxy with all the text and addresses that
// there are in it, whatever is added to it in times to come.
func (a *anonymizer) value(v reflect.Value) reflect.Value {
	switch one := v.Interface().(type) {
	case netip.Addr:
		return reflect.ValueOf(a.addr(one))
	case netip.AddrPort:
		return reflect.ValueOf(netip.AddrPortFrom(a.addr(one.Addr()), one.Port()))
	case time.Time, haproxy.Version:
		return v
	}
	to := reflect.New(v.Type()).Elem()
	switch v.Kind() {
	case reflect.String:
		to.SetString(a.text(v.String()))
	case reflect.Pointer:
		if v.IsNil() {
			return v
		}
		if known, ok := a.copies[v.Interface()]; ok {
			return known
		}
		to.Set(reflect.New(v.Type().Elem()))
		a.copies[v.Interface()] = to
		to.Elem().Set(a.value(v.Elem()))
	case reflect.Slice:
		if v.IsNil() {
			return v
		}
		to.Set(reflect.MakeSlice(v.Type(), v.Len(), v.Len()))
		for i := range v.Len() {
			to.Index(i).Set(a.value(v.Index(i)))
		}
	case reflect.Map:
		if v.IsNil() {
			return v
		}
		to.Set(reflect.MakeMap(v.Type()))
		for at := v.MapRange(); at.Next(); {
			to.SetMapIndex(at.Key(), a.value(at.Value()))
		}
	case reflect.Struct:
		to.Set(v)
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() { // The others are not printed.
				to.Field(i).Set(a.value(v.Field(i)))
			}
		}
		if server, ok := to.Addr().Interface().(*haproxy.Server); ok && !server.IP.IsValid() && !strings.ContainsAny(server.Host, "/@.:") && server.Host != "" {
			server.Host = a.host(server.Host)
		}
	default:
		return v
	}
	return to
}

// A pool is addresses that stand for those of a kind.
type pool struct {
	of   []netip.Prefix
	from []netip.Prefix
}

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

// pools are tried in order. Those for all others begin with the addresses for
// documentation (RFC 5737, RFC 3849), and go on with some that nobody has.
var pools = []pool{
	{prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"), prefixes("10.0.0.0/8", "172.16.0.0/12")},
	{prefixes("100.64.0.0/10"), prefixes("100.64.0.0/10")},
	{prefixes("169.254.0.0/16"), prefixes("169.254.0.0/16")},
	{prefixes("0.0.0.0/0"), prefixes("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15", "240.0.0.0/4")},
	{prefixes("fe80::/10"), prefixes("fe80::/10")},
	{prefixes("fc00::/7"), prefixes("fd00::/8")},
	{prefixes("::/0"), prefixes("2001:db8::/32")},
}

// addr is what stands for an address.
func (a *anonymizer) addr(ip netip.Addr) netip.Addr {
	ip = ip.Unmap().WithZone("")
	if !ip.IsValid() || ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() {
		return ip
	}
	if known, ok := a.addrs[ip]; ok {
		return known
	}
	bits := 24
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits)
	if a.noting {
		a.originals[prefix] = true
		return ip
	}
	net := a.nets[prefix]
	if net == nil {
		net = &anonymousNet{prefix: a.network(ip, bits)}
		a.nets[prefix] = net
	}
	net.hosts++ // There are no more than in the original.
	if ip.Is4() {
		raw := net.prefix.Addr().As4()
		raw[3] = byte(net.hosts)
		a.addrs[ip] = netip.AddrFrom4(raw)
	} else {
		raw := net.prefix.Addr().As16()
		binary.BigEndian.PutUint64(raw[8:], net.hosts)
		a.addrs[ip] = netip.AddrFrom16(raw)
	}
	return a.addrs[ip]
}

// network is the next free one for addresses such as ip. Where all are taken,
// which takes a million of them, one of IPv6 has to do.
func (a *anonymizer) network(ip netip.Addr, bits int) netip.Prefix {
	first := slices.IndexFunc(pools, func(p pool) bool {
		return slices.ContainsFunc(p.of, func(of netip.Prefix) bool { return of.Contains(ip) })
	})
	last := len(pools) - 1
	for _, i := range []int{first, last} {
		if i == last {
			bits = 64
		}
		for {
			prefix, ok := nth(pools[i].from, bits, a.used[i])
			if !ok {
				break
			}
			a.used[i]++
			if !a.originals[prefix] {
				return prefix
			}
		}
	}
	panic("anonymize: there are not four billion networks")
}

// nth is the nth network of that many bits in prefixes.
func nth(from []netip.Prefix, bits, n int) (netip.Prefix, bool) {
	for _, p := range from {
		room := 1 << min(bits-p.Bits(), 32)
		if n >= room {
			n -= room
			continue
		}
		raw := p.Addr().AsSlice()
		for i := bits/8 - 1; n > 0; i-- {
			sum := int(raw[i]) + n&0xff
			raw[i] = byte(sum)
			n = n>>8 + sum>>8
		}
		addr, _ := netip.AddrFromSlice(raw)
		return netip.PrefixFrom(addr, bits), true
	}
	return netip.Prefix{}, false
}

var (
	anAddress = regexp.MustCompile(`[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*|\d+\.\d+\.\d+\.\d+`)
	aHost     = regexp.MustCompile(`[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+`)
)

// text replaces the addresses and names of hosts in text.
func (a *anonymizer) text(text string) string {
	if !strings.ContainsAny(text, ".:") {
		return text
	}
	text = aHost.ReplaceAllStringFunc(text, func(word string) string {
		if name := strings.TrimSuffix(word, fileSuffix(word)); isHost(name) {
			return a.host(name) + fileSuffix(word)
		}
		return word
	})
	return anAddress.ReplaceAllStringFunc(text, func(word string) string {
		// What follows an address may look like a part of it.
		for end := len(word); end > 0; end-- {
			if ip, err := netip.ParseAddr(word[:end]); err == nil {
				return a.addr(ip).String() + word[end:]
			}
		}
		return word
	})
}

// fileSuffix is the ending of what is a file's name.
func fileSuffix(word string) string {
	switch suffix := path.Ext(word); suffix {
	case ".cfg", ".conf", ".sock", ".socket", ".pid", ".service", ".slice", ".scope":
		return suffix
	}
	return ""
}

// isHost says whether a word with dots is a host's name: its last part is a
// domain. Settings of the kernel look similar.
func isHost(word string) bool {
	last := word[strings.LastIndex(word, ".")+1:]
	return strings.Contains(word, ".") && len(last) > 1 && !strings.HasPrefix(word, "net.") &&
		!strings.ContainsFunc(last, func(r rune) bool { return r < 'A' || r > 'z' || r > 'Z' && r < 'a' })
}

// host is what stands for a host's name.
func (a *anonymizer) host(name string) string {
	if a.noting {
		return name
	}
	name = strings.ToLower(name)
	if a.hosts[name] == "" {
		a.hosts[name] = fmt.Sprintf("host%d.example", len(a.hosts)+1)
	}
	return a.hosts[name]
}
