// SPDX-License-Identifier: Apache-2.0

package alert

import (
	"crypto/sha256"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/report"
)

// id is a name for the labels that is the same whatever the version: those that
// are empty do not count, so that there may be more of them one day.
func (l *Labels) id() string {
	port := ""
	if l.Port != 0 {
		port = strconv.Itoa(int(l.Port))
	}
	h := sha256.New()
	for _, label := range [][2]string{
		{"limit", l.Limit}, {"stage", l.Stage}, {"side", l.Side}, {"proxy", l.Proxy}, {"server", l.Server},
		{"port", port}, {"peer", l.Peer}, {"process", l.Process}, {"netns", l.Netns},
	} {
		if label[1] != "" {
			fmt.Fprintf(h, "%s=%q\n", label[0], label[1])
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]) // 64 bits are enough for some thousand
}

// summary is the sentence for an alert as it is now. All names in it are Clean
// already.
func summary(l *life, g *group) string {
	a := &l.alert
	where := l.where
	if where == "" { // None of its connections has been seen since the restart.
		where = a.Labels.where()
	}
	switch {
	case a.EndsAt != nil:
		return fmt.Sprintf("resolved after %s: connections%s, %d at the peak",
			report.Duration(a.EndsAt.Sub(a.StartsAt)), where, a.Peak)
	case a.Count == 0:
		return fmt.Sprintf("no longer any connections%s, %d at the peak", where, a.Peak)
	}
	return fmt.Sprintf("%s%s, the oldest for %s; limit %s (%s)", connections(a.Count), where,
		age(g.oldest, g.exact), brief(g.limit.Duration), a.LimitSource)
}

func connections(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

// age rounds a lower bound down.
func age(d time.Duration, exact bool) string {
	if exact {
		return report.Duration(d)
	}
	if d >= time.Second {
		d = d.Truncate(100 * time.Millisecond)
	}
	return "at least " + report.Duration(d)
}

// brief prints a setting as one writes it: 60s, not 1m00s.
func brief(d time.Duration) string {
	if d%time.Second == 0 && d < 10*time.Minute {
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return report.Duration(d)
}

// where is what the connections of a group have in common.
func (f *family) where(g *group) string {
	l := f.labels
	if g != f.rest {
		l.Peer = g.peer.String()
		return l.phrase(l.Peer, f.at(g))
	}
	peers := "many"
	if f.dropped == 0 {
		peers = strconv.Itoa(len(f.counts) - f.promoted + f.folded)
	}
	noun := " peers"
	if peers == "1" {
		noun = " peer"
	}
	if len(f.own) > 0 {
		noun = " other" + noun
	}
	l.Peer = Others
	return l.phrase(peers+noun, f.at(g))
}

// at is where the connections of a group are: " at frontend https (port 443)".
func (f *family) at(g *group) string {
	kind := "proxy"
	if g.place != nil {
		kind = g.place.Proxies[0].Kind.String()
	}
	at := f.labels.at(kind, g == f.rest)
	if f.labels.Proxy != "" && g.first == g.last {
		at += fmt.Sprintf(" (port %d)", g.first)
	}
	return at
}

// where is what the labels alone say.
func (l *Labels) where() string {
	peers := l.Peer
	if peers == Others {
		peers = "other peers"
	}
	return l.phrase(peers, l.at("proxy", l.Peer == Others))
}

func (l *Labels) at(kind string, many bool) string {
	outbound := l.Side == events.Outbound.String()
	var proxies []string
	for _, p := range strings.Split(l.Proxy, " or ") {
		proxies = append(proxies, name(p))
	}
	proxy := strings.Join(proxies, " or ")
	switch {
	case l.family() == overflow:
		return ", of more kinds than are told apart"
	case l.Proxy != "" && l.Server != "":
		return " at server " + proxy + "/" + name(l.Server)
	case l.Proxy != "" && outbound:
		return " at the servers of " + kind + " " + proxy
	case l.Proxy != "":
		return " at " + kind + " " + proxy
	case outbound && many:
		return fmt.Sprintf(" at the servers' port %d", l.Port)
	case outbound:
		return fmt.Sprintf(" at the server's port %d", l.Port)
	}
	return fmt.Sprintf(" at port %d", l.Port)
}

// family are the labels without the peer.
func (l Labels) family() Labels {
	l.Peer = ""
	return l
}

// phrase is what follows the number of connections.
func (l *Labels) phrase(peers, at string) string {
	with := map[string]string{events.Inbound.String(): " from ", events.Outbound.String(): " to "}[l.Side]
	if with == "" {
		with = " with "
	}
	if l.family() == overflow {
		return with + peers + " in FIN_WAIT2" + at
	}
	stage, by := " held in FIN_WAIT2", " by "
	switch l.Stage {
	case events.Orphaned.String():
		stage, by = " orphaned in FIN_WAIT2", ", closed by "
	case events.Minisock.String():
		stage, by = " left in FIN_WAIT2", ", closed by "
	}
	process := "an unknown process"
	if l.Process != "" {
		process = name(l.Process)
	}
	text := with + peers + stage + at + by + process
	if l.Netns != "" {
		text += " in namespace " + name(l.Netns)
	}
	return text
}

// name quotes what might be taken for a part of the sentence.
func name(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_.:/@+", r)
	}) {
		return s
	}
	return strconv.Quote(s)
}
