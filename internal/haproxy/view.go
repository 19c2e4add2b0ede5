// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Socket is what a View needs to know of a connection.
type Socket struct {
	Netns         uint32 // inode of its network namespace
	Local, Remote netip.AddrPort
	Device        uint32 // index of the interface that it is bound to; 0 none
	Side          Side
	PID           int // of who holds or closed it; 0 unknown
}

// Place is where a connection belongs: a proxy of a process.
type Place struct {
	Process *Process
	Side    Side
	// Proxies are those that it may belong to, in their order: one, unless
	// several have the same address.
	Proxies []*Proxy
	Server  string // "" towards clients, and where it is not known which
	Timeout FinTimeout
}

// Name is the proxy's, or those that it may be: "app or api".
func (p *Place) Name() string {
	var names []string
	for _, px := range p.Proxies {
		names = append(names, px.Name)
	}
	return strings.Join(names, " or ")
}

// Ends is the timeout that ends what HAProxy holds there; known is false where
// its value is not.
func (p *Place) Ends() (timeout FinTimeout, known bool) {
	return p.Timeout, !p.Process.Changed && !p.Timeout.By.Undecided
}

// Source says in words what ends it.
func (p *Place) Source() string {
	switch {
	case p.Process.Changed:
		return fmt.Sprintf("the configuration has changed since haproxy %d started, and what it runs with is not known", p.Process.PID)
	case p.Timeout.By.Undecided:
		return p.Timeout.String() + ", as far as it can be told without HAProxy"
	case !p.Certain():
		return p.Timeout.String() + ", or what " + p.Name() + " has"
	}
	return p.Timeout.String()
}

// Has says whether it is, or may be, the proxy of that name.
func (p *Place) Has(name string) bool {
	return slices.ContainsFunc(p.Proxies, func(px *Proxy) bool { return px.Name == name })
}

// Certain says whether it is known which proxy it is.
func (p *Place) Certain() bool { return len(p.Proxies) == 1 }

// Maxconn is how many connections its frontend takes at a time, as HAProxy says,
// else as the configuration does; 0 is not known, or that of the process.
func (p *Place) Maxconn() int {
	if p.Side != ClientSide || !p.Certain() {
		return 0
	}
	proxy := p.Proxies[0]
	for i := range p.Process.Stats {
		if row := &p.Process.Stats[i]; row.Proxy == proxy.Name && row.Server == "FRONTEND" && row.Slim > 0 {
			return row.Slim
		}
	}
	if proxy.Maxconn.Undecided || p.Process.Changed {
		return 0
	}
	return proxy.Maxconn.Value
}

// A View answers which proxy a connection belongs to. It is not safe for
// concurrent use.
type View struct {
	workers []*worker // the current ones first
	byPID   map[int]*worker
	places  []*Place // by number; 0 is none
	kept    map[*Place]uint32
}

// worker is a process with its configuration arranged for look-ups.
type worker struct {
	process   *Process
	listeners []listener
	targets   map[netip.AddrPort][]target // port 0: any; an invalid address: any
	found     []int                       // for reuse by the look-ups
	places    map[placeKey]uint32
}

type placeKey struct {
	side   Side
	proxy  int
	others string // the proxies after the first, where there are several
	server string
}

type listener struct {
	proxy       int // of Config.Proxies
	first, last uint16
	netns       uint32
	ip          netip.Addr // invalid: not known
	v4, v6      bool       // it takes these where ip is unspecified
	bound       bool       // to the interface device
	device      uint32     // 0: not known
}

type target struct {
	proxy  int
	server string
	netns  uint32
}

// NewView arranges what is known of the processes.
func NewView(processes []Process) *View {
	v := &View{byPID: map[int]*worker{}, places: []*Place{nil}, kept: map[*Place]uint32{}}
	for i := range processes {
		p := &processes[i]
		w := &worker{process: p, targets: map[netip.AddrPort][]target{}, places: map[placeKey]uint32{}}
		v.byPID[p.PID] = w
		v.workers = append(v.workers, w)
		if p.Config != nil {
			w.arrange()
		}
	}
	slices.SortStableFunc(v.workers, func(a, b *worker) int {
		switch {
		case a.process.Old == b.process.Old:
			return 0
		case b.process.Old:
			return -1
		}
		return 1
	})
	return v
}

// Knows says whether a process is in the view.
func (v *View) Knows(pid int) bool { return v.byPID[pid] != nil }

// SamePlaces says whether a and b are one process, of which a View would say
// the same. Of one that runs nobody knows what, any configuration is as good.
func SamePlaces(a, b Process) bool {
	return a.PID == b.PID && a.ticks == b.ticks && a.Netns == b.Netns && a.Old == b.Old &&
		(a.Config == b.Config || a.Changed) && a.Changed == b.Changed && a.Version == b.Version && slices.Equal(a.Servers, b.Servers) &&
		maps.Equal(a.Interfaces, b.Interfaces) && maps.Equal(a.Namespaces, b.Namespaces)
}

// Place returns the place of a number that Find returned; nil for 0.
func (v *View) Place(number uint32) *Place { return v.places[number] }

// Keep returns the number here of a place that another view has found.
func (v *View) Keep(p *Place) uint32 {
	n, ok := v.kept[p]
	if !ok {
		n = uint32(len(v.places))
		v.places = append(v.places, p)
		v.kept[p] = n
	}
	return n
}

func (w *worker) arrange() {
	known := map[[2]string]netip.AddrPort{}
	for _, s := range w.process.Servers {
		known[[2]string{s.Backend, s.Server}] = s.Addr
		for i, px := range w.process.Config.Proxies {
			if px.Name != s.Backend || !px.Connects() || !s.Addr.Addr().IsValid() {
				continue
			}
			at, namespace := s.Addr, ""
			for _, written := range px.Servers {
				if written.Name == s.Server {
					namespace = written.Namespace
					if written.Port == 0 { // HAProxy shows an offset as if it was a port.
						at = netip.AddrPortFrom(at.Addr(), 0)
					}
				}
			}
			w.addTarget(at, target{proxy: i, server: s.Server, netns: w.netns(namespace)})
		}
	}
	for i, px := range w.process.Config.Proxies {
		if px.Disabled.Value {
			continue
		}
		for _, b := range px.Binds {
			for _, a := range b.Addrs {
				if a.First == 0 {
					continue
				}
				l := listener{proxy: i, first: a.First, last: a.Last, netns: w.netns(b.Namespace), ip: a.IP.Unmap(),
					bound: b.Interface != "", device: w.process.Interfaces[b.Interface]}
				switch {
				case !a.IP.IsValid():
				case a.IP.IsUnspecified() || b.Transparent:
					// Whether :: takes IPv4 where nothing is said is up to net.ipv6.bindv6only.
					l.v4, l.v6 = a.IP.Is4() || !b.V6Only, a.IP.Is6()
					if b.Transparent {
						l.ip = netip.Addr{}
					}
				}
				w.listeners = append(w.listeners, l)
			}
		}
		for _, s := range px.Servers {
			if _, runtime := known[[2]string{px.Name, s.Name}]; runtime && s.Count == 1 && !s.SOCKS4.IsValid() {
				continue
			}
			t := target{proxy: i, server: s.Name, netns: w.netns(s.Namespace)}
			if s.Count != 1 {
				t.server = ""
			}
			switch {
			case s.SOCKS4.IsValid():
				w.addTarget(s.SOCKS4, t)
			case s.IP.IsValid(), s.AnyDest:
				w.addTarget(netip.AddrPortFrom(s.IP, s.Port), t)
			}
		}
	}
}

func (w *worker) addTarget(a netip.AddrPort, t target) {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	if !slices.Contains(w.targets[a], t) {
		w.targets[a] = append(w.targets[a], t)
	}
}

// netns is the inode of a namespace that the configuration names, else that of
// the process.
func (w *worker) netns(name string) uint32 {
	if name == "" {
		return w.process.Netns
	}
	return w.process.Namespaces[name]
}

// Find returns the number of the place that a socket belongs to, 0 if it is no
// connection of a HAProxy that is known, or of none of its proxies.
func (v *View) Find(s Socket) uint32 {
	s.Local = netip.AddrPortFrom(s.Local.Addr().Unmap(), s.Local.Port())
	s.Remote = netip.AddrPortFrom(s.Remote.Addr().Unmap(), s.Remote.Port())
	if s.PID != 0 {
		w := v.byPID[s.PID]
		if w == nil || w.process.Config == nil {
			return 0
		}
		return v.find(w, s)
	}
	for _, w := range v.workers {
		if w.process.Config == nil {
			continue
		}
		if n := v.find(w, s); n != 0 {
			return n
		}
	}
	return 0
}

func (v *View) find(w *worker, s Socket) uint32 {
	var proxies []int
	server := ""
	if s.Side == ServerSide {
		proxies, server = w.byTarget(s)
	} else {
		proxies = w.byListener(s)
	}
	if len(proxies) == 0 {
		return 0
	}
	return v.intern(w, s.Side, proxies, server)
}

// byListener returns the proxies whose listener has taken the connection. The
// kernel looks for the address first, then for any (inet_lookup_listener()); the
// device is that of the listener.
func (w *worker) byListener(s Socket) []int {
	found := w.found[:0]
	best := 0
	ip := s.Local.Addr()
	for _, l := range w.listeners {
		if s.Local.Port() < l.first || s.Local.Port() > l.last || l.netns != s.Netns {
			continue
		}
		score := 1
		switch {
		case !l.ip.IsValid(): // A name, or any address.
			if l.v4 != l.v6 && l.v4 != ip.Is4() {
				continue
			}
		case l.ip == ip:
			score += 8
		case !l.ip.IsUnspecified() || ip.Is4() && !l.v4 || ip.Is6() && !l.v6:
			continue
		case l.v4 != l.v6:
			score++ // of this family alone
		}
		if l.bound {
			if s.Device == 0 || l.device != 0 && l.device != s.Device {
				continue
			}
			score += 4
		}
		if score > best {
			best, found = score, found[:0]
		}
		if score == best && !slices.Contains(found, l.proxy) {
			found = append(found, l.proxy)
		}
	}
	w.found = found
	return found
}

// byTarget returns the backends with a server at the remote address, and the
// server if there is one.
func (w *worker) byTarget(s Socket) (proxies []int, server string) {
	to := s.Remote
	proxies = w.found[:0]
	for _, key := range []netip.AddrPort{
		to, netip.AddrPortFrom(to.Addr(), 0), netip.AddrPortFrom(netip.Addr{}, to.Port()), {},
	} {
		servers := 0
		for _, t := range w.targets[key] {
			if t.netns != s.Netns {
				continue
			}
			servers++
			server = t.server
			if !slices.Contains(proxies, t.proxy) {
				proxies = append(proxies, t.proxy)
			}
		}
		if servers > 1 {
			server = ""
		}
		if servers > 0 {
			w.found = proxies
			return proxies, server
		}
	}
	return nil, ""
}

func (v *View) intern(w *worker, side Side, proxies []int, server string) uint32 {
	slices.Sort(proxies)
	key := placeKey{side: side, proxy: proxies[0], server: server}
	for _, i := range proxies[1:] {
		key.others += " " + strconv.Itoa(i)
	}
	if n, ok := w.places[key]; ok {
		return n
	}
	p := &Place{Process: w.process, Side: side, Server: server}
	for _, i := range proxies {
		px := w.process.Config.Proxies[i]
		t := w.process.Config.FinTimeout(px, side, w.process.Version)
		if len(p.Proxies) == 0 || longer(t, p.Timeout) {
			p.Timeout = t
		}
		p.Proxies = append(p.Proxies, px)
	}
	if len(proxies) > 1 {
		p.Timeout.Uncertain = true
	}
	n := uint32(len(v.places))
	v.places = append(v.places, p)
	w.places[key] = n
	return n
}

// longer says whether a lasts longer than b; 0 is for ever.
func longer(a, b FinTimeout) bool {
	return cmp.Compare(uint64(a.Duration)-1, uint64(b.Duration)-1) > 0
}
