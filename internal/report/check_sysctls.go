// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
)

// space is a network namespace and the processes in it.
type space struct {
	inode     uint32
	processes []*haproxy.Process // of HAProxy
	owner     string             // of one that is in it; "" if none is known
	pid       int
	sysctls   events.Sysctls
}

func (in *Checked) sysctls() (findings []Finding) {
	for _, s := range in.spaces() {
		findings = append(findings, in.finTimeout(s)...)
		findings = append(findings, in.tables(s)...)
		findings = append(findings, in.conntrack(s)...)
	}
	return findings
}

// spaces are the network namespaces of the processes.
func (in *Checked) spaces() (spaces []*space) {
	for i := range in.Processes {
		p := &in.Processes[i]
		at := slices.IndexFunc(spaces, func(s *space) bool { return s.inode == p.Netns })
		if at < 0 {
			at = len(spaces)
			spaces = append(spaces, &space{inode: p.Netns, owner: processLabel(p), pid: p.PID, sysctls: in.Sysctls[p.Netns]})
		}
		spaces[at].processes = append(spaces[at].processes, p)
	}
	return spaces
}

// place is a sysctl with its value, and whose namespace it is of.
func (in *Checked) place(s *space, name string) Location {
	text := fmt.Sprintf("%s = %d", name, s.sysctls[name])
	if in.isOwn(s) {
		return Location{Text: text}
	}
	where := fmt.Sprint(s.inode)
	if called := in.Netns(s.inode); called != "" {
		where = called
	}
	text += " in network namespace " + where
	if s.owner != "" {
		text += ", of " + s.owner
	}
	return Location{Text: text}
}

func (in *Checked) isOwn(s *space) bool { return s.inode == 0 || s.inode == in.OwnNetns }

// set is how a sysctl gets a value.
func (in *Checked) set(s *space, name string, value int) Edit {
	if !in.isOwn(s) && name != events.SysctlMaxOrphans {
		line := fmt.Sprintf("sysctl -w %s=%d", name, value)
		if s.pid != 0 {
			line = fmt.Sprintf("nsenter -t %d -n %s", s.pid, line)
		}
		return Edit{Text: "in that namespace, and where it is made", Lines: []string{line}}
	}
	return Edit{Text: "in /etc/sysctl.d/90-tcp.conf, then run sysctl --system",
		Lines: []string{fmt.Sprintf("%s = %d", name, value)}}
}

func (in *Checked) finTimeout(s *space) []Finding {
	seconds, ok := s.sysctls[events.SysctlFinTimeout]
	if !ok || seconds == 60 {
		return nil
	}
	value := time.Duration(seconds) * time.Second
	life := span(limits.Closed(events.Timers{FinTimeout: value}).Duration)
	half := span(value - limits.TimeWaitLen)
	const held = "Connections that HAProxy holds are not touched by it: their timers are its own."
	f := Finding{Where: []Location{in.place(s, events.SysctlFinTimeout)},
		Fix:    []Edit{in.set(s, events.SysctlFinTimeout, 60)},
		Verify: "`fintrace list --stage minisock` has nothing older than a minute."}
	switch {
	case value < limits.TimeWaitLen:
		f.ID = "tcp-fin-timeout-changed"
		f.Title = fmt.Sprintf("tcp_fin_timeout is %d, not 60: closed connections leave FIN_WAIT2 after %s", seconds, life)
		f.Why = "That saves little: a closed one is some 250 bytes and no slot of maxconn. " + held
	case value < 2*limits.TimeWaitLen:
		f.ID, f.Severity = "tcp-fin-timeout-trap", Warning
		f.Title = fmt.Sprintf("tcp_fin_timeout %d gives closed connections %s in FIN_WAIT2, not %ds", seconds, life, seconds)
		f.Why = fmt.Sprintf("Above 60 the kernel waits %s with the full socket and %s more without: twice what is above 60. %s", half, half, held)
	case value == 2*limits.TimeWaitLen:
		f.ID = "tcp-fin-timeout-changed"
		f.Title = fmt.Sprintf("tcp_fin_timeout is %d, not 60: closed connections leave FIN_WAIT2 after %s", seconds, life)
		f.Why = fmt.Sprintf("For the first %s each is an orphan with a full socket's memory. %s", half, held)
	default:
		f.ID, f.Severity = "tcp-fin-timeout-long", Warning
		f.Title = fmt.Sprintf("tcp_fin_timeout %d keeps closed connections in FIN_WAIT2 for %s", seconds, life)
		f.Why = fmt.Sprintf("For the first %s each is an orphan: a full socket's memory, counted in tcp_max_orphans. %s", half, held)
	}
	return []Finding{f}
}

// tables compares the kernel's tables with what HAProxy may close at once.
func (in *Checked) tables(s *space) (findings []Finding) {
	sessions, severity := 0, Warning
	for _, p := range s.processes {
		if p.Config == nil || p.Old {
			continue
		}
		k := &checker{process: p, config: p.Config}
		n, known := k.maxconnGlobal()
		if fe := k.frontends(); len(fe.none)+len(fe.undecided) == 0 && (!known || fe.sum < n) {
			n = fe.sum
		} else if !known {
			continue
		} else if p.Config.Global.Maxconn.Value <= 0 {
			severity = Info // Computed from the descriptors, whose limit may be out of all proportion.
		}
		sessions += n // Each process has its own; they share the tables.
	}
	// If all clients go silent at once and HAProxy's timers end the sessions,
	// each leaves one closed connection on the client's side: a minisock for up
	// to 60 s, and then or before it, while data or a FIN is not acknowledged,
	// an orphan. (Towards servers HAProxy resets.) So as many of either as there
	// can be sessions have to fit.
	for _, table := range []struct{ id, name, why string }{
		{"tcp-max-tw-buckets-too-small", events.SysctlMaxTWBuckets,
			"If that many sessions end together, the table is full: the kernel then drops connections that still wait for the peer's FIN (TCPTimeWaitOverflow counts them)."},
		{"tcp-max-orphans-too-small", events.SysctlMaxOrphans,
			"If that many clients vanish together, the kernel resets what is above the limit and loses the data not acknowledged yet (\"too many orphaned sockets\" in its log)."},
	} {
		value, ok := s.sysctls[table.name]
		if !ok || value >= sessions {
			continue
		}
		_, short, _ := strings.Cut(table.name, "ipv4.")
		findings = append(findings, Finding{ID: table.id, Severity: severity,
			Title:  fmt.Sprintf("%s %d is less than the %d sessions that HAProxy may have", short, value, sessions),
			Where:  []Location{in.place(s, table.name)},
			Why:    table.why,
			Fix:    []Edit{in.set(s, table.name, roomy(sessions))},
			Verify: "`ss -s` has the numbers of orphaned and timewait sockets."})
	}
	return findings
}

// conntrack compares its memory with how long HAProxy waits for a FIN.
//
// To conntrack our FIN, acknowledged, is CLOSE_WAIT; before, FIN_WAIT
// (tcp_conntracks of net/netfilter/nf_conntrack_proto_tcp.c). A FIN without an
// entry is INVALID.
func (in *Checked) conntrack(s *space) []Finding {
	if n, ok := s.sysctls[events.SysctlConntrackCount]; ok && n == 0 {
		return nil // Loaded, but nothing makes it follow connections here.
	}
	var longest *waiting
	length := func(w *waiting) time.Duration {
		if w.fin.Duration == 0 {
			return math.MaxInt64
		}
		return w.fin.Duration
	}
	for _, p := range s.processes {
		if p.Config == nil {
			continue
		}
		k := &checker{process: p, config: p.Config}
		for _, w := range k.waits() {
			if w.http || w.proxy.Undecided {
				continue // In mode http half-closed connections are rare.
			}
			if longest == nil || cmp.Compare(length(&w), length(longest)) > 0 {
				longest = &w
			}
		}
	}
	if longest == nil {
		return nil
	}
	f := Finding{ID: "conntrack-forgets-first", Severity: Warning}
	var shown []string
	closeWait, both := false, time.Duration(0)
	for _, name := range []string{events.SysctlConntrackCloseWait, events.SysctlConntrackFinWait} {
		seconds, ok := s.sysctls[name]
		d := time.Duration(seconds) * time.Second
		if !ok || d >= length(longest) {
			continue
		}
		closeWait = closeWait || name == events.SysctlConntrackCloseWait
		both = max(both, d)
		f.Where = append(f.Where, in.place(s, name))
		shown = append(shown, fmt.Sprintf("%s after %s", strings.TrimPrefix(name, "net.netfilter.nf_conntrack_tcp_timeout_"), span(d)))
	}
	if len(f.Where) == 0 {
		return nil
	}
	waits := "for ever"
	if longest.fin.Duration > 0 {
		waits = span(longest.fin.Duration)
	}
	f.Title = fmt.Sprintf("conntrack forgets half-closed connections sooner (%s) than HAProxy does (%s)", listed(shown), waits)
	f.Why = "A FIN that the peer sends after that belongs to no connection, and a stateful firewall drops it as INVALID. HAProxy then waits all of its own timeout."
	if !closeWait {
		f.Severity = Info
		f.Why = "This one counts until our FIN is acknowledged, or where conntrack sees one direction only. After it a stateful firewall drops the peer's packets as INVALID."
	}
	place := Location{Pos: longest.proxy.Pos, Text: longest.proxy.String()}
	if longest.fin.By.IsSet() {
		place = Location{Pos: longest.fin.By.Pos, Text: longest.fin.By.Section + ": " + longest.fin.By.Text}
	}
	f.Where = append(f.Where, place)
	if d := longest.fin.Duration; d > 0 && d <= finLong {
		for i := range f.Where[:len(shown)] {
			name, _, _ := strings.Cut(f.Where[i].Text, " ")
			f.Fix = append(f.Fix, in.set(s, name, int((d+time.Second-1)/time.Second)+10))
		}
	} else {
		text := fmt.Sprintf("as in %s-unset: with timeout %s 60s HAProxy is the first to let go", longest.option(), longest.option())
		if longest.fin.Explicit() {
			text = fmt.Sprintf("as in %s-long: with 60s HAProxy is the first to let go", longest.option())
		}
		f.Fix = []Edit{{Text: text}}
	}
	f.Verify = "`conntrack -L -p tcp --state CLOSE_WAIT` goes on showing what `fintrace list --stage held` shows."
	return []Finding{f}
}
