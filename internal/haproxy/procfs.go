// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A task is a process that is HAProxy by its looks. What could not be read of
// it has its zero value.
type task struct {
	pid, ppid int
	inner     int // its pid as itself sees it
	nested    bool
	uid       uint32 // who owns it
	ticks     uint64 // since boot when it was started: with pid, which process it is
	start     time.Time
	args      commandLine
	env       map[string]string
	envWhole  bool
	mnt       string // its namespaces
	pidns     string
	net       uint32
}

// procfs is a /proc, and what there is to know of it once.
type procfs struct {
	dir  string
	boot time.Time
	mnt  string // our own namespaces
	net  uint32

	programs *programs
}

// What is read of a process at most: all that execve(2) takes by default, and
// more than an environment can sensibly be.
const (
	maxCommandLine = 2 << 20
	maxEnvironment = 1 << 20
)

func openProcfs(dir string) (procfs, error) {
	p := procfs{dir: dir, programs: &programs{budget: maxPrograms, versions: map[[2]uint64]Version{}}}
	uptime, err := readSome(p.file("uptime"), 64)
	if err != nil {
		return p, err
	}
	first, _, _ := strings.Cut(string(uptime), " ")
	seconds, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return p, fmt.Errorf("%s: %w", p.file("uptime"), err)
	}
	p.boot = time.Now().Round(0).Add(-time.Duration(seconds * float64(time.Second)))
	p.mnt, _ = os.Readlink(p.file("self", "ns", "mnt"))
	p.net = p.namespace("self", "net")
	return p, nil
}

func (p procfs) file(parts ...string) string {
	return p.dir + "/" + strings.Join(parts, "/")
}

func (p procfs) of(pid int, parts ...string) string {
	return p.file(append([]string{strconv.Itoa(pid)}, parts...)...)
}

// namespace is the number in a link such as net:[4026531840], 0 if unknown.
func (p procfs) namespace(pid, kind string) uint32 {
	link, _ := os.Readlink(p.file(pid, "ns", kind))
	link = strings.TrimSuffix(strings.TrimPrefix(link, kind+":["), "]")
	n, _ := strconv.ParseUint(link, 10, 32)
	return uint32(n)
}

// pids are all the processes there are.
func (p procfs) pids() ([]int, error) {
	d, err := os.Open(p.dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// task reads a process, nil if it is not HAProxy, or gone. One that is in the
// middle of execve(2) has no arguments yet.
func (p procfs) task(pid int) (t *task, inExec bool) {
	comm, err := readSome(p.of(pid, "comm"), 64)
	if err != nil {
		return nil, false
	}
	cmdline, err := readSome(p.of(pid, "cmdline"), maxCommandLine)
	if err != nil {
		return nil, false
	}
	argv := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	if !p.isHAProxy(pid, strings.TrimSuffix(string(comm), "\n"), argv[0]) {
		return nil, false
	}
	t = &task{pid: pid}
	var ok bool
	if t.ppid, t.ticks, ok = p.stat(pid); !ok {
		return nil, false
	}
	if len(cmdline) == 0 {
		return nil, true
	}
	if t.args, ok = parseCommandLine(argv); !ok {
		return nil, false
	}
	// In units of USER_HZ, which is 100 wherever Go runs.
	t.start = p.boot.Add(time.Duration(t.ticks) * (time.Second / 100))
	if t.inner, t.nested, ok = p.innerPID(pid); !ok {
		return nil, false
	}
	if info, err := os.Stat(p.of(pid)); err == nil {
		t.uid = info.Sys().(*syscall.Stat_t).Uid
	}
	t.env, t.envWhole = p.environ(pid)
	t.mnt, _ = os.Readlink(p.of(pid, "ns", "mnt"))
	t.pidns, _ = os.Readlink(p.of(pid, "ns", "pid"))
	t.net = p.namespace(strconv.Itoa(pid), "net")
	return t, false
}

// isHAProxy says whether a process goes by that name. haproxy-2.8 is one if
// its program says so too, which haproxy_exporter's does not.
func (p procfs) isHAProxy(pid int, comm, argv0 string) bool {
	exe, _ := os.Readlink(p.of(pid, "exe"))
	exe = path.Base(strings.TrimSuffix(exe, " (deleted)"))
	maybe := false
	for _, name := range []string{comm, path.Base(argv0), exe} {
		if name == "haproxy" {
			return true
		}
		maybe = maybe || strings.HasPrefix(name, "haproxy")
	}
	return maybe && p.programs.version(p.of(pid, "exe")).Known()
}

// stat is a process's parent and when it started; not ok if it has ended.
func (p procfs) stat(pid int) (ppid int, ticks uint64, ok bool) {
	text, err := readSome(p.of(pid, "stat"), 4096)
	if err != nil {
		return 0, 0, false
	}
	return parseStat(text)
}

func parseStat(text []byte) (ppid int, ticks uint64, ok bool) {
	// The name before it may have anything in it.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || strings.ContainsAny(fields[0], "ZXx") {
		return 0, 0, false
	}
	ppid, err := strconv.Atoi(fields[1])
	ticks, tickErr := strconv.ParseUint(fields[19], 10, 64)
	return ppid, ticks, err == nil && tickErr == nil
}

// runs says whether the process of a pid is still the one that started then.
func (p procfs) runs(pid int, ticks uint64) bool {
	_, now, ok := p.stat(pid)
	return ok && now == ticks
}

// innerPID is the last of a process's pids, which is the one in its own
// namespace, and whether it has others.
func (p procfs) innerPID(pid int) (inner int, nested, ok bool) {
	status, err := readSome(p.of(pid, "status"), 16<<10)
	if err != nil {
		return 0, false, false
	}
	return parseInnerPID(pid, string(status))
}

func parseInnerPID(pid int, status string) (inner int, nested, ok bool) {
	_, line, found := strings.Cut(status, "\nNSpid:")
	if !found {
		return pid, false, true
	}
	line, _, _ = strings.Cut(line, "\n")
	pids := strings.Fields(line)
	if len(pids) == 0 {
		return pid, false, true
	}
	inner, err := strconv.Atoi(pids[len(pids)-1])
	return inner, len(pids) > 1, err == nil
}

// environ is what a process was started with, and whether that is all of it.
func (p procfs) environ(pid int) (env map[string]string, whole bool) {
	text, err := readSome(p.of(pid, "environ"), maxEnvironment+1)
	if err != nil {
		return nil, false
	}
	return parseEnviron(text), len(text) <= maxEnvironment
}

func parseEnviron(text []byte) map[string]string {
	env := map[string]string{}
	for entry := range bytes.SplitSeq(text, []byte{0}) {
		name, value, ok := strings.Cut(string(entry), "=")
		if _, again := env[name]; ok && !again { // getenv(3) finds the first
			env[name] = value
		}
	}
	return env
}

// readSome reads the beginning of a file.
func readSome(name string, most int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// Children are the pids of a process's children; none where the kernel does not
// say (CONFIG_PROC_CHILDREN).
func Children(pid int) (pids []int) {
	text, err := readSome(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid), maxCommandLine)
	if err != nil {
		return nil
	}
	for _, field := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// IsName says whether a process of that name may be HAProxy: distributions that
// have several versions call them haproxy-2.8 or so.
func IsName(name string) bool { return strings.HasPrefix(name, "haproxy") }

// commandLine is what HAProxy was told by its arguments.
type commandLine struct {
	files         []string
	dir           string   // -C
	master        bool     // -W, -Ws
	masterSockets []string // addresses of -S
	finish        []int    // pids of -sf and -st, as the process sees them
	takesOver     bool     // -sf, -st or -x
}

// parseCommandLine reads arguments as haproxy_init_args() of src/haproxy.c
// does. It is not ok if HAProxy would not run with them: it refuses what is
// no option, so that a script of the same name is told from it.
func parseCommandLine(argv []string) (c commandLine, ok bool) {
	args := argv[min(1, len(argv)):]
	next := func() (arg string) {
		if len(args) > 0 {
			arg, args = args[0], args[1:]
		}
		return arg
	}
	isValue := func() bool { return len(args) > 0 && !strings.HasPrefix(args[0], "-") }
	for len(args) > 0 {
		flag, isFlag := strings.CutPrefix(next(), "-")
		switch {
		case !isFlag:
			return c, false
		case flag == "-":
			c.files = append(c.files, args...)
			args = nil
		case strings.HasPrefix(flag, "sf"), strings.HasPrefix(flag, "st"):
			c.takesOver = true
			for isValue() {
				if pid, err := strconv.Atoi(strings.TrimSpace(next())); err == nil && pid > 0 {
					c.finish = append(c.finish, pid)
				}
			}
		case strings.HasPrefix(flag, "dt"):
			if isValue() {
				next()
			}
		case flag == "", strings.ContainsRune("dVDq4", rune(flag[0])):
		case flag[0] == 'v', flag[0] == 'c': // it says something and ends
			return c, false
		case flag[0] == 'W':
			c.master = true
		case flag[0] == 'x':
			c.takesOver = true
			next()
		case flag[0] == 'S':
			address, _, _ := strings.Cut(next(), ",")
			c.masterSockets = append(c.masterSockets, address)
		case flag[0] == 'C':
			c.dir = next()
		case flag[0] == 'f':
			c.files = append(c.files, next())
		case strings.ContainsRune("nmNLp", rune(flag[0])):
			next()
		default: // of a version to come
			if isValue() {
				next()
			}
		}
	}
	return c, len(c.files) > 0
}

// Bounds on what is read of programs: a few times the largest HAProxy of one,
// and of all that call themselves so.
const (
	maxProgram  = 128 << 20
	maxPrograms = 4 * maxProgram
)

// BinaryVersion finds in a program, without running it, which version of
// HAProxy it is; the zero Version if it is none.
func BinaryVersion(path string) Version {
	return (&programs{budget: maxProgram, versions: map[[2]uint64]Version{}}).version(path)
}

// programs are those whose version was looked for, by device and inode.
type programs struct {
	mutex    sync.Mutex
	budget   int64 // bytes that may yet be read
	versions map[[2]uint64]Version
}

func (p *programs) version(path string) Version {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Version{}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return Version{}
	}
	s := info.Sys().(*syscall.Stat_t)
	id := [2]uint64{s.Dev, s.Ino}
	p.mutex.Lock()
	v, known := p.versions[id]
	most := min(p.budget, maxProgram, info.Size())
	if !known {
		p.budget -= most
	}
	p.mutex.Unlock()
	if known {
		return v
	}
	v = findVersion(io.LimitReader(f, most)) // which may take long, where the disk is far
	p.mutex.Lock()
	p.versions[id] = v
	p.mutex.Unlock()
	return v
}

// findVersion looks for stats_version_string of src/version.c, which all of
// them have in their data: " version 2.6.12-1+deb12u4, released 2026/10/17".
func findVersion(r io.Reader) Version {
	const before, between = " version ", ", released "
	const longest = 128 // of what is looked for
	buffer := make([]byte, 0, 256<<10)
	for {
		n, err := io.ReadFull(r, buffer[len(buffer):cap(buffer)])
		buffer = buffer[:len(buffer)+n]
		for rest := buffer; ; {
			at := bytes.Index(rest, []byte(before))
			if at < 0 {
				break
			}
			rest = rest[at+len(before):]
			text, date, found := bytes.Cut(rest[:min(len(rest), longest)], []byte(between))
			if !found || len(date) < len("2026/10/17\x00") || date[4] != '/' || date[7] != '/' || date[10] != 0 {
				continue
			}
			if v := versionOf(string(text)); v.Known() {
				return v
			}
		}
		if err != nil {
			return Version{}
		}
		keep := len(before) + longest
		buffer = buffer[:copy(buffer, buffer[len(buffer)-keep:])]
	}
}

// versionOf is ParseVersion of what anybody may have written.
func versionOf(text string) Version {
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return Version{}
	}
	v, _ := ParseVersion(text)
	return v
}
