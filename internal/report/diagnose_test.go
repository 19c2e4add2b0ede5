// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/golden"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/track"
)

const (
	lbNetns  = 4026532245 // "lb"
	hostns   = 1          // where the commands are typed
	watchFor = 10 * time.Second
)

// scene makes evidence.
type scene struct {
	t      testing.TB
	e      Evidence
	rules  limits.Rules
	cookie uint64
}

// a is one or more connections that differ in their ports and ages.
type a struct {
	n             int
	local, remote string // host:port; a port 0 counts up
	side          events.Side
	stage         events.Stage
	process       events.Process
	netns         uint32
	age           time.Duration // of the youngest
	step          time.Duration // each is older by it
	bound         bool          // the ages are bounds
}

func worker(t testing.TB, pid int, version, config string) haproxy.Process {
	return workerOf(t, pid, version, "/etc/haproxy/haproxy.cfg", config)
}

func workerOf(t testing.TB, pid int, version, file, config string) haproxy.Process {
	v, err := haproxy.ParseVersion(version)
	if err != nil {
		t.Fatal(err)
	}
	c, err := haproxy.Parse([]haproxy.Source{{Name: file, Text: []byte(config)}}, haproxy.Options{Version: v})
	if err != nil {
		t.Fatal(err)
	}
	return haproxy.Process{PID: pid, Netns: hostns, Version: v, Config: c}
}

func newScene(t testing.TB, processes ...haproxy.Process) *scene {
	s := &scene{t: t}
	s.e = Evidence{
		Began: start, Ended: start.Add(watchFor), Wall: names.Wall, Netns: names.Netns, OwnNetns: hostns,
		HAProxy:  processes,
		Settings: map[uint32]events.Sysctls{hostns: {events.SysctlFinTimeout: 60}, lbNetns: {events.SysctlFinTimeout: 60}},
	}
	if len(processes) > 0 {
		s.rules.HAProxy = haproxy.NewView(processes)
	}
	return s
}

func (s *scene) at(address string, i int) events.Endpoint {
	ap := netip.MustParseAddrPort(address)
	if ap.Port() == 0 {
		ap = netip.AddrPortFrom(ap.Addr(), uint16(33000+i*7%30000))
	}
	return events.EndpointFrom(ap)
}

func (s *scene) conns(c a) (all []track.Conn) {
	if c.netns == 0 {
		c.netns = hostns
	}
	if c.stage == 0 {
		c.stage = events.Held
	}
	if c.side == 0 {
		c.side = events.Inbound
	}
	t := timers
	if seconds, ok := s.e.Settings[c.netns][events.SysctlFinTimeout]; ok {
		t.FinTimeout = time.Duration(seconds) * time.Second
	}
	for i := range c.n {
		s.cookie++
		conn := track.Conn{Cookie: s.cookie, Netns: c.netns, Side: c.side, Stage: c.stage, Process: c.process,
			Flow: events.Flow{Local: s.at(c.local, int(s.cookie)), Remote: s.at(c.remote, int(s.cookie))},
			// Nothing comes as regular as that.
			Duration: c.age + time.Duration(i)*c.step + c.step*time.Duration(i*i*7919%800)/1000, SinceExact: !c.bound, StagesKnown: true, ClosedBy: events.ByShutdown}
		conn.Since = s.e.Ended.Add(-conn.Duration)
		switch c.stage {
		case events.Held:
			conn.Held = conn.Duration
		case events.Orphaned:
			conn.Orphaned = conn.Duration
		default:
			conn.Minisock = conn.Duration
		}
		place := s.rules.Place(conn.Netns, conn.Flow, conn.Side, conn.Process.PID)
		if place != 0 {
			conn.Place = s.rules.HAProxy.Place(place)
		}
		conn.Limit = s.rules.For(conn.Stage, t, place, 0)
		conn.Overdue = conn.Duration >= conn.Limit.Duration+conn.Limit.Slack+track.Grace
		all = append(all, conn)
	}
	return all
}

func (s *scene) add(c a) []track.Conn {
	conns := s.conns(c)
	s.e.Conns = append(s.e.Conns, conns...)
	return conns
}

// others puts the other ends of connections in CLOSE_WAIT.
func (s *scene) others(conns []track.Conn, p events.Process) {
	for _, c := range conns {
		s.e.CloseWait = append(s.e.CloseWait, CloseWait{Netns: c.Netns, Process: p, IdleAtLeast: c.Duration,
			Flow: events.Flow{Local: c.Flow.Remote, Remote: c.Flow.Local}, Side: 3 - c.Side})
	}
}

// twins puts connections to a server in CLOSE_WAIT.
func (s *scene) twins(n int, server string, p events.Process, idle time.Duration) {
	for i := range n {
		s.e.CloseWait = append(s.e.CloseWait, CloseWait{Netns: hostns, Process: p, Side: events.Outbound, IdleAtLeast: idle,
			Flow: events.Flow{Local: s.at("192.0.2.1:0", i), Remote: s.at(server, i)}})
	}
}

func (s *scene) diagnose() Diagnosis { return Diagnose(s.e) }

// threadConfig is the forum thread's.
func threadConfig(t testing.TB) string {
	text, err := os.ReadFile("testdata/check/thread.cfg")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	lb     = proc(1234, "haproxy")
	oldLB  = proc(77, "haproxy")
	nobody = events.Process{}
)

// thread is the forum thread: clients of one address fill a frontend.
func thread(t testing.TB) *scene {
	p := worker(t, 1234, "2.6.12", threadConfig(t))
	p.Info = &haproxy.Info{PID: 1234, Maxconn: 100, CurrConns: 12, UlimitN: 300, Nbthread: 2}
	p.Stats = []haproxy.ProxyStat{{Proxy: "proxy-https", Server: "FRONTEND", Scur: 10, Slim: 10}, {Proxy: "app", Server: "app1", Scur: 10, Slim: -1}}
	s := newScene(t, p)
	s.add(a{n: 10, local: "192.0.2.1:443", remote: "10.0.0.22:0", process: lb, age: 2 * time.Minute, step: 5 * time.Minute})
	s.twins(10, "192.0.2.10:443", lb, 47*time.Minute)
	s.e.States = map[events.State]int{events.Established: 4, events.FinWait2: 10, events.CloseWait: 10, events.Listen: 6}
	return s
}

const tidyConfig = `global
    maxconn 4400
    stats socket /run/haproxy/admin.sock mode 660 level admin
    hard-stop-after 10m
defaults
    mode tcp
    maxconn 1000
    timeout connect 5s
    timeout client 60s
    timeout client-fin 30s
    timeout server 60s
    timeout server-fin 30s
frontend www
    bind :443
    default_backend app
listen mail
    bind :993
    server m1 10.0.0.6:993
backend app
    server app1 10.0.0.5:8080
    server app2 10.0.0.7:8080
`

func tidy(t testing.TB) *scene { return newScene(t, worker(t, 1234, "2.6.12", tidyConfig)) }

// slow is tidyConfig without the timeouts for half-closed connections.
func slow(t testing.TB) *scene {
	return newScene(t, worker(t, 1234, "2.6.12", strings.NewReplacer("    timeout client-fin 30s\n", "", "    timeout server-fin 30s\n", "",
		"client 60s", "client 1h", "server 60s", "server 1h").Replace(tidyConfig)))
}

func healthy(t testing.TB) *scene {
	s := tidy(t)
	s.add(a{n: 3, local: "192.0.2.1:443", remote: "198.51.100.7:0", process: lb, age: 800 * time.Millisecond, step: time.Second})
	s.add(a{n: 4, local: "192.0.2.1:443", remote: "198.51.100.8:0", stage: events.Minisock, age: 9 * time.Second, step: 5 * time.Second})
	instants := uint64(1200)
	s.e.Instants = &instants
	return s
}

func orphansOnly(t testing.TB) *scene {
	s := newScene(t)
	s.e.Settings[hostns][events.SysctlFinTimeout] = 120
	s.add(a{n: 30, local: "192.0.2.1:8080", remote: "198.51.100.7:0", stage: events.Orphaned, age: 2 * time.Second, step: time.Second})
	s.add(a{n: 12, local: "192.0.2.1:8080", remote: "198.51.100.9:0", stage: events.Minisock, age: 2 * time.Second, step: time.Second})
	s.e.Tables = []Table{{Name: "orphans", Count: 30, Max: 16384}, {Name: "timewait", Netns: hostns, Count: 12, Max: 16384}}
	return s
}

func oldWorker(t testing.TB) *scene {
	before := worker(t, 77, "2.6.12", threadConfig(t))
	before.Old, before.Changed, before.Master = true, true, 50
	after := worker(t, 1234, "2.6.12", strings.Replace(threadConfig(t), "    timeout client 1h\n", "    timeout client 1h\n    timeout client-fin 30s\n", 1))
	after.Master = 50
	s := newScene(t, before, after)
	s.add(a{n: 12, local: "192.0.2.1:443", remote: "198.51.100.22:0", process: oldLB, age: 8 * time.Minute, step: time.Minute, bound: true})
	return s
}

func localCulprit(t testing.TB) *scene {
	s := slow(t)
	held := s.add(a{n: 25, local: "192.0.2.1:443", remote: "192.0.2.1:0", process: lb, age: 3 * time.Minute, step: 30 * time.Second})
	s.others(held, proc(900, "batch"))
	s.twins(25, "10.0.0.5:8080", lb, time.Hour)
	return s
}

func serverSide(t testing.TB) *scene {
	s := slow(t)
	s.add(a{n: 15, local: "192.0.2.1:0", remote: "10.0.0.5:8080", side: events.Outbound, process: lb, age: 3 * time.Minute, step: time.Minute})
	s.add(a{n: 5, local: "192.0.2.1:0", remote: "10.0.0.7:8080", side: events.Outbound, process: lb, age: 3 * time.Minute, step: time.Minute})
	return s
}

func otherProgram(t testing.TB) *scene {
	s := newScene(t)
	for _, ip := range []string{"198.51.100.7", "198.51.100.9", "[2001:db8::7]"} {
		local := "192.0.2.1:8080"
		if ip[0] == '[' {
			local = "[2001:db8::1]:8080"
		}
		s.add(a{n: 8, local: local, remote: ip + ":0", process: proc(31, "gateway"), netns: lbNetns, age: 5 * time.Minute, step: time.Minute})
	}
	return s
}

// growingScene has two held connections more every second, and full lists.
func growingScene(t testing.TB) *scene {
	s := slow(t)
	s.e.HAProxy[0].Info = &haproxy.Info{PID: 1234, Maxconn: 4400, CurrConns: 350, UlimitN: -1, Nbthread: -1}
	s.e.HAProxy[0].Stats = []haproxy.ProxyStat{{Proxy: "www", Server: "FRONTEND", Scur: 300, Slim: 1000}}
	for _, c := range s.add(a{n: 230, local: "192.0.2.1:443", remote: "198.51.100.22:0", process: lb, age: 250 * time.Millisecond, step: 500 * time.Millisecond}) {
		if c.Since > s.e.Began {
			s.e.Arrivals = append(s.e.Arrivals, Arrival{c.Since, c})
		}
	}
	return s
}

var scenes = map[string]func(testing.TB) *scene{
	"thread": thread, "healthy": healthy, "orphans": orphansOnly, "old-worker": oldWorker, "local-culprit": localCulprit,
	"server-side": serverSide, "other-program": otherProgram, "growing": growingScene,
}

func textOf(t testing.TB, d Diagnosis) string {
	var b strings.Builder
	if err := PrintDiagnosis(&b, d, Style{}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func jsonOf(t testing.TB, d Diagnosis) string {
	var b bytes.Buffer
	out := json.NewEncoder(&b)
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	if err := out.Encode(d); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestDiagnose(t *testing.T) {
	for name, make := range scenes {
		t.Run(name, func(t *testing.T) {
			d := make(t).diagnose()
			text := textOf(t, d)
			golden.Check(t, "testdata/diagnose/"+name+".txt", text)
			golden.Check(t, "testdata/diagnose/"+name+".json", jsonOf(t, d))
			golden.Check(t, "testdata/diagnose/"+name+".nagios", Nagios(d)+"\n")
			for line := range strings.Lines(text) {
				// What is to be pasted is not wrapped, nor what has no space.
				if n := utf8.RuneCountInString(line) - 1; n > 80 && !strings.HasPrefix(line, "      ") {
					t.Errorf("%d columns: %s", n, line)
				}
			}
			if again := textOf(t, make(t).diagnose()); again != text {
				t.Errorf("another time it says otherwise:\n%s", again)
			}
		})
	}
}

// ids are those of the findings.
func (d *Diagnosis) ids() (all []string) {
	for _, f := range d.Findings {
		all = append(all, f.ID)
	}
	return all
}

func (d *Diagnosis) find(id string) *Finding {
	for i := range d.Findings {
		if d.Findings[i].ID == id {
			return &d.Findings[i]
		}
	}
	return nil
}

// TestFindings has what is close to the edge of each finding, on either side.
func TestFindings(t *testing.T) {
	silent := func(n int, age time.Duration) a {
		return a{n: n, local: "192.0.2.1:443", remote: "198.51.100.22:0", process: lb, age: age}
	}
	many := func(n int, age time.Duration) func(*scene) {
		return func(s *scene) {
			for i := range n {
				c := silent(1, age)
				c.remote = fmt.Sprintf("198.51.100.%d:0", i)
				s.add(c)
			}
		}
	}
	add := func(c ...a) func(*scene) {
		return func(s *scene) {
			for _, one := range c {
				s.add(one)
			}
		}
	}
	closed := func(n int, stage events.Stage) a {
		return a{n: n, local: "192.0.2.1:443", remote: "198.51.100.22:0", stage: stage, age: 2 * time.Second}
	}
	with := func(all ...func(*scene)) func(*scene) {
		return func(s *scene) {
			for _, one := range all {
				one(s)
			}
		}
	}
	finTimeout := func(netns uint32, seconds int) func(*scene) {
		return func(s *scene) { s.e.Settings[netns][events.SysctlFinTimeout] = seconds }
	}
	none := func(t testing.TB) *scene { return newScene(t) }
	outbound := func(n int) a {
		return a{n: n, local: "192.0.2.1:0", remote: "10.0.0.5:8080", side: events.Outbound, process: lb, age: time.Hour / 2}
	}
	pressed := func(maxconn, scur, global, currconns int) func(testing.TB) *scene {
		return func(t testing.TB) *scene {
			p := worker(t, 1234, "2.6.12", strings.Replace(tidyConfig, "maxconn 1000", fmt.Sprint("maxconn ", maxconn), 1))
			p.Info = &haproxy.Info{PID: 1234, Maxconn: global, CurrConns: currconns, UlimitN: -1, Nbthread: -1}
			p.Stats = []haproxy.ProxyStat{{Proxy: "www", Server: "FRONTEND", Scur: scur, Slim: maxconn}}
			return newScene(t, p)
		}
	}
	local := func(netns uint32, ip string, n int) func(*scene) {
		return func(s *scene) {
			held := s.add(a{n: n, local: ip + ":443", remote: ip + ":0", process: lb, age: 3 * time.Minute})
			for i := range held {
				held[i].Netns = netns
			}
			s.others(held, proc(900, "batch"))
		}
	}
	reloaded := func(t testing.TB) *scene {
		s := oldWorker(t)
		s.e.Conns = nil
		return s
	}
	ofOld := func(n int, age time.Duration) a {
		c := silent(n, age)
		c.process = oldLB
		return c
	}
	tables := func(all ...Table) func(*scene) {
		return func(s *scene) { s.e.Tables = all }
	}
	conntrack := func(closeWait int) func(*scene) {
		return func(s *scene) {
			s.e.Settings[hostns][events.SysctlConntrackCount] = 9
			s.e.Settings[hostns][events.SysctlConntrackCloseWait] = closeWait
		}
	}

	for _, test := range []struct {
		name string
		id   string
		from func(testing.TB) *scene
		yes  func(*scene) // it must be found
		no   func(*scene) // and here it must not
	}{
		{"ten are a pile", "held-pile-up", tidy, many(10, 33*time.Second), many(9, 33*time.Second)},
		{"those past their limit are", "held-pile-up", tidy, many(40, 33*time.Second), many(40, 31*time.Second)},
		{"an hour's limit is none", "held-pile-up", slow, many(40, 63*time.Second), many(40, 60*time.Second)},
		{"nothing young is stuck", "held-pile-up", none, with(finTimeout(hostns, 2), many(40, 5*time.Second)), with(finTimeout(hostns, 2), many(40, 4900*time.Millisecond))},
		{"three are where there are few slots", "held-pile-up", pressed(30, 3, 200, 3), many(3, time.Minute), many(2, time.Minute)},
		{"three are none where there are many", "held-pile-up", pressed(31, 4, 400, 4), many(4, time.Minute), many(3, time.Minute)},
		{"closed ones are none", "held-pile-up", none, add(silent(10, 2*time.Minute)), add(closed(500, events.Minisock))},
		{"a long timeout that is meant for it is no excuse", "held-pile-up", func(t testing.TB) *scene {
			return newScene(t, worker(t, 1234, "2.6.12", strings.Replace(tidyConfig, "client-fin 30s", "client-fin 2h", 1)))
		}, many(10, 6*time.Minute), many(10, 4*time.Minute)},

		{"ten minisocks", "closed-harmless", none, add(closed(10, events.Minisock)), add(closed(9, events.Minisock))},
		{"orphans", "closed-harmless", none, add(closed(10, events.Orphaned)), add(silent(10, time.Second))},

		{"high ports", "peer-is-client", slow, many(10, 2*time.Minute), add(outbound(20))},
		{"from low ports", "peer-is-client", none, add(silent(20, 2*time.Minute)), func(s *scene) {
			for i := range 20 {
				s.add(a{n: 1, local: "192.0.2.1:443", remote: fmt.Sprintf("198.51.100.22:%d", i+700), process: lb, age: 2 * time.Minute})
			}
		}},
		{"from one port", "peer-is-client", none, add(silent(20, 2*time.Minute)), func(s *scene) {
			for i := range 20 {
				s.add(a{n: 1, local: "192.0.2.1:443", remote: fmt.Sprintf("198.51.100.%d:5060", i), process: lb, age: 2 * time.Minute})
			}
		}},

		{"one address", "peer-is-one", slow, with(add(silent(40, 2*time.Minute)), many(10, 2*time.Minute)), with(add(silent(20, 2*time.Minute)), many(10, 2*time.Minute))},
		{"servers", "peer-is-one", slow, add(silent(10, 2*time.Minute)), add(outbound(20))},
		{"here", "peer-is-one", slow, add(silent(10, 2*time.Minute)), local(hostns, "192.0.2.1", 10)},

		{"the side that piles up", "client-fin-unset", slow, many(10, 2*time.Minute), add(outbound(20))},
		{"the other side", "server-fin-unset", slow, add(outbound(20)), many(10, 2*time.Minute)},
		{"no pile, no blame", "client-fin-unset", slow, many(10, 2*time.Minute), many(9, 2*time.Minute)},

		{"half of the slots", "maxconn-pressure", pressed(100, 80, 220, 80), many(20, time.Minute), many(19, time.Minute)},
		{"young ones with room", "maxconn-pressure", pressed(100, 80, 220, 80), many(20, time.Second), func(s *scene) {
			s.e.HAProxy[0].Stats[0].Scur = 79
			many(20, time.Second)(s)
		}},
		{"the whole process", "maxconn-pressure", pressed(1000, 80, 100, 80), many(20, time.Minute), many(19, time.Minute)},
		{"an old worker's slots", "maxconn-pressure", reloaded, add(silent(9, 10*time.Minute)), add(ofOld(30, 10*time.Minute))},

		{"arithmetic", "global-maxconn-no-room", func(t testing.TB) *scene {
			return newScene(t, worker(t, 1234, "2.6.12", threadConfig(t)))
		}, many(10, 2*time.Minute), many(2, 2*time.Minute)},

		{"held", "fin-timeout-no-help", slow, many(10, 2*time.Minute), with(many(9, 2*time.Minute), add(closed(50, events.Minisock)))},
		{"trap", "tcp-fin-timeout-trap", none, with(finTimeout(hostns, 65), add(closed(10, events.Minisock))), with(finTimeout(hostns, 65), add(closed(9, events.Minisock)))},
		{"long", "tcp-fin-timeout-long", none, with(finTimeout(hostns, 600), add(closed(10, events.Orphaned))), finTimeout(hostns, 600)},
		{"elsewhere", "tcp-fin-timeout-elsewhere", none, with(finTimeout(hostns, 15), func(s *scene) {
			c := closed(10, events.Minisock)
			c.netns = lbNetns
			s.add(c)
		}), with(finTimeout(hostns, 15), finTimeout(lbNetns, 15), func(s *scene) {
			c := closed(10, events.Minisock)
			c.netns = lbNetns
			s.add(c)
		})},

		{"old worker", "old-workers", reloaded, add(ofOld(1, 10*time.Minute)), add(ofOld(12, 2*time.Second))},
		{"new worker", "old-workers", reloaded, add(ofOld(1, 10*time.Minute)), add(silent(12, 10*time.Minute))},

		{"local", "local-peer", slow, local(hostns, "192.0.2.1", 10), add(silent(10, 3*time.Minute))},
		{"loopback of another namespace", "local-peer", slow, local(hostns, "127.0.0.1", 10), local(lbNetns, "127.0.0.1", 10)},
		{"address of another namespace", "local-peer", slow, local(lbNetns, "192.0.2.1", 10), with(add(silent(10, 3*time.Minute)), local(hostns, "192.0.2.1", 2))},
		{"closed by the other", "local-peer", none, func(s *scene) {
			c := closed(10, events.Minisock)
			c.age = 20 * time.Second
			s.others(s.add(c), proc(900, "batch"))
		}, func(s *scene) { s.others(s.add(closed(10, events.Minisock)), proc(900, "batch")) }},

		{"twins", "close-wait-twins", slow, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "10.0.0.5:8080", lb, 3*time.Minute)
		}, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "10.0.0.5:8080", proc(5, "other"), 3*time.Minute)
		}},
		{"of the same side", "close-wait-twins", slow, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "10.0.0.5:8080", lb, 3*time.Minute)
		}, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "198.51.100.99:40000", lb, 3*time.Minute)
			for i := range s.e.CloseWait {
				s.e.CloseWait[i].Side = events.Inbound
			}
		}},
		{"younger than the pile", "close-wait-twins", slow, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "10.0.0.5:8080", lb, 0) // not known
		}, func(s *scene) {
			many(10, 2*time.Minute)(s)
			s.twins(10, "10.0.0.5:8080", lb, time.Minute)
		}},

		{"table", "tables", none, tables(Table{Name: "timewait", Count: 800, Max: 1000}), tables(Table{Name: "timewait", Count: 799, Max: 1000})},
		{"counter", "tables", none, tables(Table{Name: "TCPTimeWaitOverflow", Count: 1}), tables(Table{Name: "TCPTimeWaitOverflow"})},
		{"conntrack", "conntrack-forgets-first", slow, with(conntrack(60), many(10, 2*time.Minute)), with(conntrack(7200), many(10, 2*time.Minute))},
		{"conntrack without a pile", "conntrack-forgets-first", slow, with(conntrack(60), many(10, 2*time.Minute)), conntrack(60)},

		{"lost", "not-seen", none, func(s *scene) { s.e.Lost = 1 }, func(s *scene) {}},
		{"not looked at", "not-seen", none, func(s *scene) { s.e.Unlooked = []string{"one"} }, func(s *scene) {}},
	} {
		t.Run(test.id+"/"+test.name, func(t *testing.T) {
			for _, side := range []struct {
				build func(*scene)
				want  bool
			}{{test.yes, true}, {test.no, false}} {
				s := test.from(t)
				side.build(s)
				d := s.diagnose()
				if found := d.find(test.id) != nil; found != side.want {
					t.Errorf("found %v, want %v; there are %v\n%s", found, side.want, d.ids(), d.Verdict)
				}
			}
		})
	}
}

// lives makes connections that stay for a while and leave, one after another.
func (s *scene) pass(n int, every, lasting time.Duration, c a) {
	c.n = 1
	for i := range n {
		at := s.e.Ended.Add(-time.Duration(i) * every)
		conn := s.conns(c)[0]
		conn.Since = at.Add(-lasting)
		if gone := at; gone >= s.e.Began {
			conn.Duration, conn.Held = lasting, lasting
			conn.End, conn.EndExact = events.PeerFIN, true
			s.e.Departures = append(s.e.Departures, conn)
		}
	}
}

func TestTimingFindings(t *testing.T) {
	held := a{local: "192.0.2.1:443", remote: "198.51.100.22:0", process: lb}
	watch := func(s *scene, d time.Duration) { s.e.Ended = s.e.Began.Add(d) }

	t.Run("growing", func(t *testing.T) {
		d := growingScene(t).diagnose()
		if f := d.find("growing"); f == nil || f.Severity != Warning {
			t.Errorf("%v", d.ids())
		}
		if f := d.find("maxconn-pressure"); f == nil || f.Severity != Critical || !strings.Contains(f.Title, "it is full in") {
			t.Errorf("what is full within minutes is not: %+v", f)
		}
		// As many leave as come.
		s := slow(t)
		watch(s, time.Minute)
		c := held
		c.n, c.age, c.step = 230, 250*time.Millisecond, 500*time.Millisecond
		s.add(c)
		s.pass(120, 500*time.Millisecond, 2*time.Minute, held)
		if d = s.diagnose(); d.find("growing") != nil {
			t.Errorf("%v", d.find("growing").Title)
		}
		// It grows, and will stop at 60 of 1000 slots.
		s = tidy(t)
		c.n = 30
		s.add(c)
		if d = s.diagnose(); d.find("growing") != nil {
			t.Errorf("%v", d.find("growing").Title)
		}
	})

	t.Run("age-cliff", func(t *testing.T) {
		s := tidy(t)
		watch(s, 5*time.Minute)
		s.pass(200, 1500*time.Millisecond, 30*time.Second, held)
		d := s.diagnose()
		if f := d.find("age-cliff"); f == nil || !strings.Contains(f.Title, "timeout client-fin 30s") || f.Where[0].Pos.Line != 10 {
			t.Errorf("no cliff of client-fin: %+v", f)
		}
		s = tidy(t)
		watch(s, 5*time.Minute)
		s.pass(200, 1500*time.Millisecond, 17*time.Second, held)
		d = s.diagnose()
		if f := d.find("age-cliff"); f == nil || strings.Contains(f.Title, "timeout") {
			t.Errorf("a timer that nobody knows has a name: %+v", f)
		}
		s = tidy(t)
		watch(s, 5*time.Minute)
		for i := range 200 {
			s.pass(1, 0, time.Duration(i)*100*time.Millisecond, held)
		}
		if d = s.diagnose(); d.find("age-cliff") != nil {
			t.Errorf("%v", d.find("age-cliff").Title)
		}
	})

	t.Run("bursts", func(t *testing.T) {
		s := slow(t)
		watch(s, 5*time.Minute)
		for i := range 10 {
			c := held
			c.n, c.age, c.step = 8, time.Duration(i)*30*time.Second+time.Second, 3*time.Millisecond
			s.add(c)
		}
		d := s.diagnose()
		if f := d.find("bursts"); f == nil || !strings.Contains(f.Title, "one every 30") {
			t.Errorf("%+v", f)
		}
		s = slow(t)
		watch(s, 5*time.Minute)
		c, random := held, rand.New(rand.NewPCG(1, 2))
		c.n = 1
		for range 80 {
			c.age = time.Duration(random.Int64N(int64(5 * time.Minute)))
			s.add(c)
		}
		if d = s.diagnose(); d.find("bursts") != nil {
			t.Errorf("%v", d.find("bursts").Title)
		}
		// A health check every two seconds.
		s = tidy(t)
		for i := range 14 {
			c.age = time.Duration(i)*2*time.Second + time.Second
			s.add(c)
		}
		if d = s.diagnose(); d.find("bursts") != nil {
			t.Errorf("%v", d.find("bursts").Title)
		}
	})
}

// Whatever is not known, there is a diagnosis.
func TestDiagnoseUnknown(t *testing.T) {
	each := func(s *scene, change func(*track.Conn)) {
		for i := range s.e.Conns {
			change(&s.e.Conns[i])
		}
	}
	for name, make := range scenes {
		for what, forget := range map[string]func(*scene){
			"nothing":     func(*scene) {},
			"not watched": func(s *scene) { s.e.Began = s.e.Ended },
			"processes":   func(s *scene) { each(s, func(c *track.Conn) { c.Process = nobody }) },
			"places":      func(s *scene) { each(s, func(c *track.Conn) { c.Place = nil }) },
			"sides":       func(s *scene) { each(s, func(c *track.Conn) { c.Side = 0 }) },
			"stages":      func(s *scene) { each(s, func(c *track.Conn) { c.StagesKnown, c.Held, c.Minisock = false, 0, 0 }) },
			"HAProxy":     func(s *scene) { s.e.HAProxy = nil },
			"configuration": func(s *scene) {
				s.e.HAProxy = slices.Clone(s.e.HAProxy)
				for i := range s.e.HAProxy {
					s.e.HAProxy[i].Config = nil
				}
			},
			"the new one": func(s *scene) {
				s.e.HAProxy = slices.Clone(s.e.HAProxy)
				for i := range s.e.HAProxy {
					s.e.HAProxy[i].Old = true
				}
			},
			"settings":   func(s *scene) { s.e.Settings = nil },
			"namespaces": func(s *scene) { s.e.Netns, s.e.OwnNetns = nil, 0 },
			"culprits": func(s *scene) {
				for i := range s.e.CloseWait {
					s.e.CloseWait[i].Process = nobody
				}
			},
		} {
			s := make(t)
			forget(s)
			d := s.diagnose()
			for _, line := range d.Verdict {
				if line == "" || strings.Contains(line, "?") || strings.Contains(line, "%!") {
					t.Errorf("%s without %s: %q", name, what, d.Verdict)
				}
			}
			if pile := d.find("held-pile-up"); pile == nil && (name == "thread" || name == "other-program") {
				t.Errorf("%s without %s: there is no pile, %v", name, what, d.ids())
			}
			if text := textOf(t, d) + jsonOf(t, d) + Nagios(d); strings.Contains(text, "%!") || strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
				t.Errorf("%s without %s:\n%s", name, what, text)
			}
		}
	}
}

func TestPastLimit(t *testing.T) {
	s := tidy(t)
	for _, stage := range []events.Stage{events.Held, events.Orphaned, events.Minisock} {
		c := s.conns(a{n: 1, local: "192.0.2.1:443", remote: "198.51.100.22:0", stage: stage, process: lb, age: time.Hour})[0]
		if got, want := pastLimit(&c), stage == events.Held; got != want {
			t.Errorf("%s: %v, want %v", stage, got, want)
		}
	}
}

// What an old worker holds has to do with its own settings, and what is to be
// changed is those of the one that runs.
func TestOldWorkerSettings(t *testing.T) {
	s := oldWorker(t)
	d := s.diagnose()
	if f := d.find("client-fin-unset"); f != nil {
		t.Errorf("the running one has it: %+v", f)
	}
	f := d.find("old-workers")
	if len(f.Fix) != 2 || f.Fix[0].Lines[0] != "    hard-stop-after 15m" || f.Fix[1].Lines[0] != "kill -TERM 77" {
		t.Errorf("%+v", f.Fix)
	}
	s.e.HAProxy[1].Config.Global.HardStopAfter = haproxy.Setting[time.Duration]{Value: time.Hour, Text: "hard-stop-after 1h", Pos: haproxy.Pos{File: "x", Line: 2}}
	d = s.diagnose()
	if f = d.find("old-workers"); len(f.Fix) != 1 || strings.Contains(d.Verdict[1], "hard-stop-after") {
		t.Errorf("what is set is to be set: %+v, %q", f.Fix, d.Verdict)
	}
}

// What could not be seen is last, however bad the rest.
func TestNotSeenIsLast(t *testing.T) {
	s := thread(t)
	s.e.Unlooked = []string{"network namespace blue: permission denied"}
	s.e.Lost = 12
	d := s.diagnose()
	if last := d.Findings[len(d.Findings)-1]; last.ID != "not-seen" || len(last.Where) != 1 || !strings.Contains(last.Title, "12 records") {
		t.Errorf("%+v", last)
	}
	for i, f := range d.Findings[1 : len(d.Findings)-1] {
		if f.Severity > d.Findings[i].Severity {
			t.Errorf("%s comes before %s", d.Findings[i].ID, f.ID)
		}
	}
}

func TestDiagnosisExit(t *testing.T) {
	for name, want := range map[string]int{"thread": ExitCritical, "healthy": ExitFine, "orphans": ExitFine, "old-worker": ExitWarning, "local-culprit": ExitWarning} {
		d := scenes[name](t).diagnose()
		if got := d.Exit(); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}

// Severity is that of the harm.
func TestPileSeverity(t *testing.T) {
	for _, test := range []struct {
		name string
		held int
		cfg  string
		want Severity
	}{
		{"few of many slots", 499, "", Warning},
		{"half of the slots", 500, "", Critical},
		{"nothing ever ends them", 10, "    timeout client 60s\n    timeout client-fin 30s\n", Critical},
	} {
		s := newScene(t, worker(t, 1234, "2.6.12", strings.Replace(tidyConfig, test.cfg, "", 1)))
		s.add(a{n: test.held, local: "192.0.2.1:443", remote: "198.51.100.22:0", process: lb, age: 2 * time.Minute})
		d := s.diagnose()
		if f := d.find("held-pile-up"); f == nil || f.Severity != test.want {
			t.Errorf("%s: %+v", test.name, f)
		}
	}
}

// Of many piles the largest have findings of their own.
func TestManyPiles(t *testing.T) {
	s := newScene(t)
	for port := range 30 {
		s.add(a{n: 10 + port, local: fmt.Sprintf("192.0.2.1:%d", 8000+port), remote: "198.51.100.22:0", process: proc(31, "gateway"), age: 5 * time.Minute})
	}
	d := s.diagnose()
	var titles []string
	for _, f := range d.Findings {
		if f.ID == "held-pile-up" {
			titles = append(titles, f.Title)
		}
	}
	if len(titles) != 6 || !strings.Contains(titles[0], "holds 39 connections") || !strings.HasPrefix(titles[5], "550 connections are held past their limit at 25 more places") {
		t.Errorf("%q", titles)
	}
	if text := strings.Join(d.Verdict, "\n"); !strings.Contains(text, "696 more connections are held at 29 other places") {
		t.Errorf("%s", text)
	}
}

var ipLike = regexp.MustCompile(`[0-9A-Fa-f:.]*[:.][0-9A-Fa-f:.]+`)

func TestAnonymize(t *testing.T) {
	all := map[string]func(testing.TB) *scene{"everything": func(t testing.TB) *scene {
		p := workerOf(t, 1234, "2.6.12", "/etc/haproxy/edge.shop.com.cfg", strings.NewReplacer("10.0.0.5:8080", "db.internal.corp:8080", "bind :443", "bind 192.0.2.1:443",
			"listen mail", "listen mail.shop.com", "10.0.0.6:993", "smtp1:993").Replace(tidyConfig))
		p.Problems = []string{"haproxy runtime socket ipv4@10.9.9.9:9999: nobody listens there", "fe80::1234:5678: no, [2001:db8:5::9]:443 neither"}
		s := newScene(t, p)
		for _, c := range []a{
			{local: "192.0.2.1:443", remote: "10.0.0.22:0"}, {local: "192.0.2.1:443", remote: "10.0.0.23:0"}, {local: "192.0.2.1:443", remote: "203.0.113.9:0"},
			{local: "127.0.0.1:993", remote: "127.0.0.22:0"}, {local: "[2001:db8:5::1]:993", remote: "[2001:db8:5::9]:0"},
			{local: "192.0.2.1:443", remote: "198.51.100.1:0"}, {local: "192.0.2.1:443", remote: "100.64.3.2:0"}, {local: "[fe80::1]:993", remote: "[fe80::1234:5678]:0"},
			{local: "192.0.2.1:0", remote: "10.0.0.7:8080", side: events.Outbound},
		} {
			c.n, c.process, c.age, c.step = 12, lb, 5*time.Minute, time.Minute
			s.others(s.add(c)[:3], proc(900, "x 10.0.0.22"))
		}
		s.add(a{n: 12, local: "192.0.2.1:22", remote: "10.0.0.23:0", process: proc(5, "x: 10.0.0.23"), age: time.Hour})
		s.e.Unlooked = []string{"network namespace of shop.example.com: 10.0.0.22 is not there"}
		s.e.Arrivals = []Arrival{{s.e.Began, s.e.Conns[0]}}
		s.e.Departures = s.e.Conns[:2:2]
		return s
	}}
	for name, make := range scenes {
		all[name] = make
	}
	for name, make := range all {
		t.Run(name, func(t *testing.T) {
			s := make(t)
			original := map[netip.Addr]bool{}
			note := func(f events.Flow) {
				for _, ip := range []netip.Addr{f.Local.IP(), f.Remote.IP()} {
					original[ip] = !ip.IsLoopback()
				}
			}
			for _, c := range s.e.Conns {
				note(c.Flow)
			}
			for _, w := range s.e.CloseWait {
				note(w.Flow)
			}
			for _, ip := range []string{"10.9.9.9", "10.0.0.5", "10.0.0.6", "10.0.0.7", "192.0.2.10"} {
				original[netip.MustParseAddr(ip)] = true
			}
			before := jsonOf(t, s.diagnose())
			plain, hidden := s.diagnose(), Diagnose(Anonymize(s.e))
			if after := jsonOf(t, s.diagnose()); after != before {
				t.Errorf("the evidence itself was changed:\n%s", after)
			}
			text := textOf(t, hidden) + jsonOf(t, hidden) + Nagios(hidden) + strings.Join(hidden.Verdict, "\n")
			for _, word := range ipLike.FindAllString(text, -1) {
				for end := len(word); end > 0; end-- {
					if ip, err := netip.ParseAddr(strings.TrimLeft(word[:end], ".")); err == nil {
						if original[ip] {
							t.Errorf("%s is still there", ip)
						}
						break
					}
				}
			}
			for _, host := range []string{"db.internal.corp", "shop.com", "smtp1", "shop.example.com"} {
				if strings.Contains(text, host) {
					t.Errorf("%s is still there", host)
				}
			}
			if name == "everything" {
				if host := Anonymize(s.e).HAProxy[0].Config.Proxies[1].Servers[0].Host; !strings.HasSuffix(host, ".example") {
					t.Errorf("the server is %s", host)
				}
			}
			if name == "everything" && !strings.Contains(text, "127.0.0.22") {
				t.Error("loopback is not")
			}
			// All else is as it was.
			if !slices.Equal(plain.ids(), hidden.ids()) || plain.Exit() != hidden.Exit() {
				t.Errorf("%v became %v", plain.ids(), hidden.ids())
			}
			if again := textOf(t, Diagnose(Anonymize(s.e))); again != textOf(t, hidden) {
				t.Error("another time it is otherwise")
			}
		})
	}
}

func TestAnonymizeAddresses(t *testing.T) {
	s := newScene(t)
	remotes := []string{"10.0.0.22", "10.0.0.23", "10.0.0.22", "10.0.1.22", "8.8.8.8", "192.0.2.77", "127.0.0.9", "2001:db8::5", "2a00::1", "2a00::2", "fd12::1", "::1"}
	for _, ip := range remotes {
		s.add(a{n: 1, local: "0.0.0.0:80", remote: netip.AddrPortFrom(netip.MustParseAddr(ip), 5000).String()})
	}
	var got []string
	for _, c := range Anonymize(s.e).Conns {
		if c.Flow.Remote.Port != 5000 || c.Flow.Local != s.e.Conns[0].Flow.Local {
			t.Errorf("port %d, local %s", c.Flow.Remote.Port, c.Flow.Local)
		}
		got = append(got, c.Flow.Remote.IP().String())
	}
	want := []string{"10.0.2.1", "10.0.2.2", "10.0.2.1", "10.0.3.1", "198.51.100.1", "203.0.113.1", "127.0.0.9", "2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:2::2", "fd00::1", "::1"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestAnonymizeText(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"/etc/haproxy/haproxy.cfg:12: timeout client 1h", "/etc/haproxy/haproxy.cfg:12: timeout client 1h"},
		{"/etc/haproxy/shop.test.org.cfg:12", "/etc/haproxy/host1.example.cfg:12"},
		{"net.ipv4.tcp_fin_timeout 60s", "net.ipv4.tcp_fin_timeout 60s"},
		{"at 10:20:30.5, e.g. 2.6.12", "at 10:20:30.5, e.g. 2.6.12"},
		{"ipv4@10.1.2.3:99", "ipv4@10.0.0.1:99"},
		{"WWW.test.org and www.TEST.org", "host1.example and host1.example"},
		{"dial [2a00::5]:99: refused", "dial [2001:db8::1]:99: refused"},
		{"2a00::5: refused", "2001:db8::1: refused"},
		{"::ffff:10.1.2.3", "10.0.0.1"},
		{"127.0.0.1:80, ::1 and :::443", "127.0.0.1:80, ::1 and :::443"},
	} {
		if got := Anonymize(Evidence{Unlooked: []string{test.text}}).Unlooked[0]; got != test.want {
			t.Errorf("%q became %q, want %q", test.text, got, test.want)
		}
	}
}

// Whatever a proxy is called, the line is one, and its data can be read.
func TestNagios(t *testing.T) {
	d := thread(t).diagnose()
	d.Figures.slots[0].what = "frontend it's|new\nline = x"
	d.Verdict[0] = "a|b\nc"
	line := Nagios(d)
	if strings.Count(line, "|") != 1 || strings.Contains(line, "\n") {
		t.Errorf("%q", line)
	}
	if !strings.HasPrefix(line, "FINTRACE CRITICAL - a/b?c | held=10;;;0 ") || !strings.Contains(line, "'slots_frontend_it_s/new?line___x'=10;;;0;10") {
		t.Errorf("%q", line)
	}
}

// crowd is n connections in FIN_WAIT2 from many addresses, with as many twins.
func crowd(t testing.TB, n int) *scene {
	s := slow(t)
	for i := range n {
		c := a{n: 1, local: "192.0.2.1:443", remote: fmt.Sprintf("198.%d.%d.%d:0", 18+i>>16&1, i>>8&0xff, i&0xff), process: lb, age: time.Duration(i) * 37 * time.Millisecond}
		if i%3 == 0 {
			c.stage, c.process = events.Minisock, nobody
			c.age %= time.Minute
		}
		s.add(c)
	}
	s.twins(n, "10.0.0.5:8080", lb, time.Hour)
	for i := range s.e.Conns[:n/10] {
		c := s.e.Conns[i]
		c.End = events.PeerFIN
		s.e.Departures = append(s.e.Departures, c)
	}
	return s
}

func BenchmarkDiagnose(b *testing.B) {
	s := crowd(b, 100_000)
	for b.Loop() {
		d := Diagnose(s.e)
		if d.find("held-pile-up") == nil {
			b.Fatal("no pile")
		}
		textOf(b, d)
	}
}

func BenchmarkAnonymize(b *testing.B) {
	s := crowd(b, 100_000)
	for b.Loop() {
		Anonymize(s.e)
	}
}

// TestAdvice: what alerts has been judged, by settings that may be stricter than
// a diagnosis is: one connection, and for less than it takes to be called stuck.
func TestAdvice(t *testing.T) {
	p := worker(t, 1234, "2.6.12", threadConfig(t))
	s := newScene(t, p)
	s.e.Settings[hostns][events.SysctlFinTimeout] = 2
	s.add(a{n: 1, local: "192.0.2.1:443", remote: "10.0.0.22:0", process: lb, age: 4 * time.Second})
	advice := Diagnosis{Findings: Advice(s.e)}
	if d := s.diagnose(); slices.Contains(d.ids(), "held-pile-up") {
		t.Errorf("a diagnosis calls it a pile: %q", d.ids())
	}
	for _, id := range []string{"held-pile-up", "client-fin-unset"} {
		at := slices.Index(advice.ids(), id)
		if at < 0 {
			t.Fatalf("it has %q, and no %s", advice.ids(), id)
		}
		f := advice.Findings[at]
		for _, edit := range f.Fix {
			if strings.Contains(edit.Text, "as in ") {
				t.Errorf("%s refers to what has no name here: %q", id, edit.Text)
			}
		}
		if id == "held-pile-up" && !strings.Contains(f.Title, "holds 1 connection past its limit at frontend proxy-https, for up to 4.0s, from 10.0.0.22") {
			t.Errorf("%s: %s", id, f.Title)
		}
		if id == "client-fin-unset" && (len(f.Fix) == 0 || strings.TrimSpace(strings.Join(f.Fix[0].Lines, "")) != "timeout client-fin 60s") {
			t.Errorf("%s: %+v", id, f.Fix)
		}
	}
}
