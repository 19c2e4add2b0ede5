// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"strconv"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
)

// Bounds of what has series of its own, for good: what came first keeps them.
// The peers of a forward proxy choose its ports, and anybody on the host may
// listen on many, or run a HAProxy. Each of these has at most the series that
// collect.go gives it: with all places taken, 1 800 of connections by stage.
const (
	// proxiedPlaces is how many pairs of a proxy of HAProxy and a port there are
	// on either side. They are for the operator's own proxies.
	proxiedPlaces = 100
	// otherPlaces is how many ports of no proxy there are on either side: those
	// have a bound of their own, so that they cannot take the proxies' places.
	otherPlaces = 50
	// limitKinds is some ten that there are, and the user's rules.
	limitKinds = 32
	// excesses is how many series of overdue connections there are, but for those
	// of other places: with all places taken, three for each.
	excesses = 1000
	// configurations is how many HAProxies one host may have, and one more.
	configurations = 20
	// frontends is how many there are of all configurations.
	frontends = 200
	// namespaces is how many are shown at a time.
	namespaces = 50
)

// other stands for all that have no series of their own.
const other = "other"

// port is one on a side: that is listened on, or that we connect to. Like all
// keys that a connection is looked up by it has no padding, which maps are
// faster with.
type port struct {
	side   uint16 // events.Side
	number uint16 // 0: other
}

func (p port) String() string {
	if p.number == 0 {
		return other
	}
	return strconv.Itoa(int(p.number))
}

// place is what the connections are told apart by, beside their stage.
type place struct {
	port
	proxy string
}

// excess is what overdue connections are told apart by.
type excess struct {
	place uint32
	stage uint16 // events.Stage
	kind  uint16 // of limit
}

// known is what has series of its own, since the start. One goroutine adds to
// it, any may list it.
type known struct {
	places   numbers[place]
	kinds    numbers[string]
	excesses numbers[excess]
	ports    map[string]map[port]int // numbers of places, by proxy
	sides    [events.Outbound + 1]side
}

// side is what the places of a side have of the bounds.
type side struct {
	proxied, plain int
	others         int // number of the place of all others, from 1; 0: none yet
}

func newKnown() *known {
	return &known{
		places:   numbers[place]{of: map[place]int{}},
		kinds:    numbers[string]{of: map[string]int{}},
		excesses: numbers[excess]{of: map[excess]int{}},
		ports:    map[string]map[port]int{},
	}
}

// place is the number of the place that a port of a proxy has or gets, or that
// of all others.
func (k *known) place(proxy string, p port) int {
	if n, ok := k.ports[proxy][p]; ok {
		return n
	}
	taken, room := &k.sides[p.side].plain, otherPlaces
	if proxy != "" {
		taken, room = &k.sides[p.side].proxied, proxiedPlaces
	}
	if *taken >= room {
		return k.others(p.side)
	}
	*taken++
	if k.ports[proxy] == nil {
		k.ports[proxy] = map[port]int{}
	}
	n := k.places.number(place{p, proxy})
	k.ports[proxy][p] = n
	return n
}

// others is the number of the place for what has none of its own.
func (k *known) others(of uint16) int {
	s := &k.sides[of]
	if s.others == 0 {
		s.others = 1 + k.places.number(place{port: port{side: of}})
	}
	return s.others - 1
}

func (k *known) excess(e excess) int {
	if n, ok := k.excesses.of[e]; ok {
		return n
	}
	if len(k.excesses.of) >= excesses {
		e.place = uint32(k.others(k.places.all()[e.place].side))
	}
	return k.excesses.number(e)
}

func (k *known) kind(name string) int {
	if n, ok := k.kinds.of[name]; ok {
		return n
	}
	name = clean(name)
	if _, ok := k.kinds.of[name]; !ok && len(k.kinds.of) >= limitKinds {
		name = other
	}
	return k.kinds.number(name)
}

// numbers numbers what it sees from 0, in the order in which it was first seen.
type numbers[K comparable] struct {
	of   map[K]int
	list atomic.Pointer[[]K] // only ever appended to
}

func (n *numbers[K]) number(k K) int {
	i, ok := n.of[k]
	if !ok {
		i = len(n.of)
		n.of[k] = i
		list := append(n.all(), k)
		n.list.Store(&list)
	}
	return i
}

// all is what has a number, by number.
func (n *numbers[K]) all() []K {
	if list := n.list.Load(); list != nil {
		return *list
	}
	return nil
}

// names are the label values that something has had, of which there is a
// bounded number.
type names[K comparable] map[K]struct{}

// admit says whether k may have a series of its own.
func (n names[K]) admit(k K, atMost int) bool {
	if _, known := n[k]; known {
		return true
	}
	if len(n) >= atMost {
		return false
	}
	n[k] = struct{}{}
	return true
}

// configOf is the label of a process of HAProxy.
func configOf(p *haproxy.Process) string {
	if p.Config == nil || len(p.Config.Files) == 0 {
		return "unknown"
	}
	return clean(p.Config.Files[0])
}

// labelBytes bounds a label value: a path may have 4096, a name of a rule any.
const labelBytes = 256

// clean makes a label value of what anybody may have written: valid UTF-8 that
// can be printed on one line.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, s)
	for len(s) > labelBytes {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}
