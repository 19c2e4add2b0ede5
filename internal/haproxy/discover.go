// SPDX-License-Identifier: Apache-2.0

package haproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// DiscoverOptions are where Discover looks.
type DiscoverOptions struct {
	Proc   string   // "" is /proc
	Paths  []string // configuration files as we see them, in place of what processes name
	Socket string   // the address of a runtime socket, in place of what configurations name
	// Previous is what was found before. A process that still runs keeps the
	// configuration that was read before its files changed.
	Previous []Process
}

// Found is what Discover finds.
type Found struct {
	Processes []Process // by PID
	Problems  []string  // that belong to no process, in a line each
}

// Limits on what the processes that call themselves haproxy make us do: the
// time that execve(2) may take them, and one configuration, all that is read of
// them, how many of them are looked at, and how many sockets are asked at once.
const (
	execTime    = 200 * time.Millisecond
	loadTime    = 2 * time.Second
	loadAllTime = 5 * time.Second
	maxBytes    = 2 * maxSourceBytes
	maxGroups   = 256
	maxAsked    = 8
)

// sameMoment is within what time processes are taken to be started together,
// and a file to be written before the process that reads it started.
const sameMoment = time.Second

// Discover finds the HAProxy processes that run, and reads what they were told
// and what they say. What cannot be had is a problem in a line, and absent; where
// nothing can be looked at, what was found before is returned.
func Discover(ctx context.Context, o DiscoverOptions) Found {
	proc, err := openProcfs(cmp.Or(o.Proc, "/proc"))
	d := &discovery{procfs: proc, o: o, budget: maxBytes}
	if err == nil {
		err = d.scan()
	}
	if err != nil {
		return Found{Processes: o.Previous, Problems: []string{fmt.Sprintf("cannot look for haproxy: %v", err)}}
	}
	d.group()
	d.load(ctx)
	defer func() {
		for _, g := range d.groups {
			g.close()
		}
	}()
	d.merge()
	d.findOld()
	d.ask(ctx)
	return d.result()
}

type discovery struct {
	procfs
	o        DiscoverOptions
	tasks    map[int]*task
	inExec   map[int]bool // processes that could not be read for that
	groups   []*group
	budget   int64
	problems []string
}

// A group is the processes that share a configuration: the workers of a
// master, or one process, or several that were started alike.
type group struct {
	loaded
	leader   *task   // the master, or the only process
	workers  []*task // that handle connections, the newest first
	forked   []*task // children of a leader that may be a master
	isMaster bool
	problems []string
	old      map[*task]bool
	accounts map[*task]account
}

// loaded is what a group's files say.
type loaded struct {
	view    view
	root    *os.File // holds the view's root
	key     string   // what other groups have that share it
	sources []Source
	config  *Config
	err     error
	version Version // of the program
	options Options // that the configuration was read with
}

func (l *loaded) close() {
	if l.root != nil {
		l.root.Close()
	}
}

// scan reads all processes that are HAProxy. A master that is told to reload
// runs itself again, which is over at once.
func (d *discovery) scan() error {
	pids, err := d.pids()
	if err != nil {
		return err
	}
	d.tasks = map[int]*task{}
	for deadline := time.Now().Add(execTime); ; time.Sleep(time.Millisecond) {
		d.inExec = map[int]bool{}
		for _, pid := range pids {
			switch t, inExec := d.task(pid); {
			case t != nil:
				d.tasks[pid] = t
			case inExec:
				d.inExec[pid] = true
			}
		}
		pids = slices.Collect(maps.Keys(d.inExec))
		if len(pids) == 0 || time.Now().After(deadline) {
			return nil
		}
	}
}

// group tells masters from workers from processes without either.
func (d *discovery) group() {
	// A master's workers are forks of it, with its arguments but for -sf and -x.
	parent := func(t *task) *task {
		if p := d.tasks[t.ppid]; p != nil && slices.Equal(p.args.files, t.args.files) && p.pidns == t.pidns {
			return p
		}
		return nil
	}
	groups := map[*task]*group{}
	for _, t := range d.tasks {
		if parent(t) == nil && !d.inExec[t.ppid] {
			groups[t] = &group{leader: t, isMaster: t.args.master}
		}
	}
	for _, t := range d.tasks {
		// What a worker forks is on its way to another program.
		if g := groups[parent(t)]; g != nil {
			g.forked = append(g.forked, t)
		}
	}
	for t, g := range groups {
		newestFirst(g.forked)
		g.workers = []*task{t}
		if g.isMaster {
			g.workers = g.forked
		}
		if len(g.workers) > 0 {
			d.groups = append(d.groups, g)
		}
	}
	// Those of root first, so that others cannot use up what there is for all.
	slices.SortFunc(d.groups, func(a, b *group) int {
		return cmp.Or(cmp.Compare(a.leader.uid, b.leader.uid), cmp.Compare(a.leader.pid, b.leader.pid))
	})
	if n := len(d.groups) - maxGroups; n > 0 {
		d.groups = d.groups[:maxGroups]
		d.problems = append(d.problems, fmt.Sprintf("%d more processes go by the name of haproxy: they are not looked at", n))
	}
}

func newestFirst(tasks []*task) {
	slices.SortFunc(tasks, func(a, b *task) int {
		return cmp.Or(cmp.Compare(b.ticks, a.ticks), cmp.Compare(b.pid, a.pid))
	})
}

// load reads the configurations. Files may be on what does not answer: those
// are left behind.
func (d *discovery) load(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, loadAllTime)
	defer cancel()
	for _, g := range d.groups {
		d.loadGroup(ctx, g)
		if g.err != nil {
			g.problems = append(g.problems, g.err.Error())
		}
		// The master-worker mode can also be asked for in the global section.
		if !g.isMaster && len(g.forked) > 0 && (g.sources == nil || saysMaster(g.sources)) {
			g.isMaster, g.workers = true, g.forked
		}
	}
}

func (d *discovery) loadGroup(ctx context.Context, g *group) {
	ctx, cancel := context.WithTimeout(ctx, loadTime)
	defer cancel()
	done := make(chan loaded, 1)
	leader, forked, budget := g.leader, slices.Clone(g.forked), min(d.budget, maxSourceBytes)
	go func() { done <- d.read(leader, forked, &budget) }()
	select {
	case g.loaded = <-done:
		for _, s := range g.sources {
			d.budget -= int64(len(s.Text))
		}
	case <-ctx.Done():
		g.err = fmt.Errorf("the files of process %d: reading them took too long", leader.pid)
	}
}

// saysMaster looks for the keyword master-worker.
func saysMaster(sources []Source) bool {
	for _, s := range sources {
		for line := range strings.Lines(string(s.Text)) {
			if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "master-worker" {
				return true
			}
		}
	}
	return false
}

// read is load without its bounds in time. It keeps to its arguments.
func (d *discovery) read(leader *task, forked []*task, budget *int64) (l loaded) {
	newest := leader
	if len(forked) > 0 {
		newest = forked[0]
	}
	l.version = d.programVersion(newest)
	files := leader.args.files
	l.view, l.root, l.err = d.viewOf(leader, forked)
	if len(d.o.Paths) > 0 {
		files = d.o.Paths
		l.sources, l.err = view{}.load(files, budget)
	} else if l.err == nil {
		l.sources, l.err = l.view.load(files, budget)
	}
	l.key = strconv.Itoa(leader.pid)
	if l.root != nil && !leader.args.master {
		if info, err := l.root.Stat(); err == nil {
			s := info.Sys().(*syscall.Stat_t)
			l.key = fmt.Sprint(s.Dev, s.Ino, leader.mnt, leader.pidns, l.view.dir, leader.args.files)
		}
	}
	if l.err != nil {
		return l
	}
	l.options = Options{Version: l.version, Env: newest.env, EnvComplete: newest.envWhole}
	l.config, l.err = Parse(l.sources, l.options)
	return l
}

// programVersion reads a process's program, unless that was done before.
func (d *discovery) programVersion(t *task) Version {
	if p := d.previous(t); p != nil && p.Version.Known() {
		return p.Version
	}
	return d.programs.version(d.of(t.pid, "exe"))
}

// previous is what was found of the same process before.
func (d *discovery) previous(t *task) *Process {
	for i, p := range d.o.Previous {
		if p.PID == t.pid && p.ticks == t.ticks {
			return &d.o.Previous[i]
		}
	}
	return nil
}

// viewOf finds the root and the directory from where HAProxy read its files.
// Its own root is the chroot that its configuration asks for, if it does; a
// master has none.
func (d *discovery) viewOf(leader *task, forked []*task) (view, *os.File, error) {
	var first error
	var firstView view
	var firstRoot *os.File
	seen := map[[2]uint64]bool{}
	// try opens a process's root, and says whether the files are there.
	try := func(pid string, dirs ...string) (view, *os.File, bool) {
		root, err := os.OpenFile(d.file(pid, "root"), oPath|syscall.O_DIRECTORY, 0)
		if err != nil {
			first = cmp.Or(first, err)
			return view{}, nil, false
		}
		if info, err := root.Stat(); err == nil {
			s := info.Sys().(*syscall.Stat_t)
			if seen[[2]uint64{s.Dev, s.Ino}] {
				root.Close()
				return view{}, nil, false
			}
			seen[[2]uint64{s.Dev, s.Ino}] = true
		}
		v := view{root: handle(root)}
		for _, dir := range dirs {
			if dir == "" && needDir(leader.args.files) {
				continue
			}
			v.dir = dir
			if v.has(leader.args.files) {
				return v, root, true
			}
		}
		if firstRoot == nil {
			firstView, firstRoot = v, root
		} else {
			root.Close()
		}
		return view{}, nil, false
	}
	found := func(v view, root *os.File) (view, *os.File, error) {
		if firstRoot != nil && firstRoot != root {
			firstRoot.Close()
		}
		return v, root, nil
	}
	started := startDir(leader)
	pid := strconv.Itoa(leader.pid)
	dirs := []string{d.workingDir(pid), started}
	for _, t := range forked {
		dirs = append(dirs, d.workingDir(strconv.Itoa(t.pid)))
	}
	if v, root, ok := try(pid, append(dirs, "")...); ok {
		return found(v, root)
	}
	if parent := strconv.Itoa(leader.ppid); leader.mnt != "" && d.mountNamespace(parent) == leader.mnt {
		if v, root, ok := try(parent, started, ""); ok {
			return found(v, root)
		}
	}
	if leader.mnt == d.mnt && d.mnt != "" || leader.mnt == "" && !leader.nested {
		if v, root, ok := try("self", started, ""); ok {
			return found(v, root)
		}
	}
	// Any process that sees the same mounts will do, but not one of a user who
	// could have made up its root.
	pids, _ := d.pids()
	for _, pid := range pids {
		name := strconv.Itoa(pid)
		if leader.mnt == "" || d.mountNamespace(name) != leader.mnt {
			continue
		}
		info, err := os.Stat(d.file(name))
		if err != nil {
			continue
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 && uid != leader.uid {
			continue
		}
		if v, root, ok := try(name, started, ""); ok {
			return found(v, root)
		}
	}
	switch {
	case firstRoot == nil && errors.Is(first, fs.ErrPermission):
		return view{}, nil, fmt.Errorf("the files of process %d: permission denied: run as root, or name them with --haproxy-config", leader.pid)
	case firstRoot == nil:
		return view{}, nil, fmt.Errorf("the files of process %d: cannot look into its root: %w", leader.pid, first)
	case needDir(leader.args.files) && firstView.dir == "":
		return firstView, firstRoot, fmt.Errorf("%s: the directory is not known that it was read from: name it with --haproxy-config",
			leader.args.files[slices.IndexFunc(leader.args.files, isRelative)])
	}
	return firstView, firstRoot, nil
}

func (d *discovery) mountNamespace(pid string) string {
	link, _ := os.Readlink(d.file(pid, "ns", "mnt"))
	return link
}

func isRelative(name string) bool { return !strings.HasPrefix(name, "/") }

func needDir(names []string) bool { return slices.ContainsFunc(names, isRelative) }

// has says whether all of the files are there.
func (v view) has(names []string) bool {
	for _, name := range names {
		at, _, err := v.find(name)
		if err != nil {
			return false
		}
		at.Close()
	}
	return true
}

// workingDir is a process's working directory as a path in its root, "" if
// that cannot be told.
func (d *discovery) workingDir(pid string) string {
	root, rootErr := os.Readlink(d.file(pid, "root"))
	dir, dirErr := os.Readlink(d.file(pid, "cwd"))
	if rootErr != nil || dirErr != nil {
		return ""
	}
	dir, inside := strings.CutPrefix(dir, strings.TrimSuffix(root, "/"))
	if !inside {
		return ""
	}
	dir = cmp.Or(dir, "/")
	// The links are only names, which may have changed or mean another place.
	at, info, err := view{root: d.file(pid, "root")}.find(dir)
	if err != nil {
		return ""
	}
	at.Close()
	if really, err := os.Stat(d.file(pid, "cwd")); err != nil || !os.SameFile(info, really) {
		return ""
	}
	return dir
}

// startDir is the directory that a process read its files in as far as its
// arguments and the shell that started it say.
func startDir(t *task) string {
	pwd := t.env["PWD"]
	switch {
	case strings.HasPrefix(t.args.dir, "/"):
		return t.args.dir
	case !strings.HasPrefix(pwd, "/"):
		return ""
	case t.args.dir != "":
		return pwd + "/" + t.args.dir
	}
	return pwd
}

// merge makes one group of processes without a master that were started alike.
func (d *discovery) merge() {
	byKey := map[string]*group{}
	d.groups = slices.DeleteFunc(d.groups, func(g *group) bool {
		same := byKey[g.key]
		if g.isMaster || g.key == "" || same == nil {
			if !g.isMaster && g.key != "" {
				byKey[g.key] = g
			}
			return false
		}
		same.workers = append(same.workers, g.workers...)
		newestFirst(same.workers)
		if same.workers[0] == g.leader { // the newest knows best
			same.loaded, g.loaded = g.loaded, same.loaded
			same.leader, same.problems = g.leader, g.problems
		}
		g.close()
		return true
	})
}

// findOld finds the processes that a newer one has told to finish, by what
// their command lines say.
func (d *discovery) findOld() {
	for _, g := range d.groups {
		g.old = map[*task]bool{}
		g.accounts = map[*task]account{}
		newest := g.workers[0]
		// A master has one worker at a time, but for nbproc's, which are started
		// together.
		single := g.isMaster && g.config != nil && g.config.Global.Nbproc.Value <= 1
		for _, t := range g.workers {
			older := newest.start.Sub(t.start) > sameMoment || single && t != newest
			if older && (g.isMaster || newest.args.takesOver) {
				g.old[t] = true
			}
		}
	}
	for _, by := range d.tasks {
		for _, pid := range by.args.finish {
			d.finished(by, pid)
		}
	}
}

// finished notes that a process was started to take over from another, which
// may be a master. A master's own arguments name its workers too, also after a
// reload that has failed: they say nothing. Nor do pids that are another's now.
func (d *discovery) finished(by *task, pid int) {
	is := func(t *task) bool {
		return t.inner == pid && t.pidns == by.pidns && t != by && t.ticks <= by.ticks && t.ppid != by.pid
	}
	for _, g := range d.groups {
		all := g.isMaster && is(g.leader) && by.ppid != g.leader.pid
		for _, t := range g.workers {
			g.old[t] = g.old[t] || all || is(t)
		}
	}
}

// ask asks the runtime sockets, all of them within one limit in time.
func (d *discovery) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if d.o.Socket != "" {
		half, cancel := share(ctx, 2)
		a, err := endpoint{address: d.o.Socket}.query(half, "")
		cancel()
		switch t, g := d.whose(a); {
		case err != nil:
			d.problems = append(d.problems, err.Error())
		case t == nil:
			d.problems = append(d.problems, fmt.Sprintf("haproxy runtime socket %s: it is of process %d, which is not to be seen from here",
				d.o.Socket, a.info.PID))
		default:
			g.accounts[t] = a
		}
	}
	var all sync.WaitGroup
	slots := make(chan struct{}, maxAsked)
	for _, g := range d.groups {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if d.o.Socket == "" {
				d.askSockets(ctx, g)
			}
			d.askMaster(ctx, g)
		})
	}
	all.Wait()
	for _, g := range d.groups {
		g.learnVersion()
	}
}

// learnVersion reads the configuration again where only the process has said
// what version reads it.
func (g *group) learnVersion() {
	if g.version.Known() || g.config == nil {
		return
	}
	for _, t := range g.workers {
		if a := g.accounts[t]; a.info != nil && a.info.Version.Known() {
			g.options.Version, g.version = a.info.Version, a.info.Version
			if config, err := Parse(g.sources, g.options); err == nil {
				g.config = config
			}
			return
		}
	}
}

// share is a part of the time that is left.
func share(ctx context.Context, parts int) (context.Context, context.CancelFunc) {
	deadline, _ := ctx.Deadline()
	return context.WithTimeout(ctx, time.Until(deadline)/time.Duration(parts))
}

// whose finds the process that an account is of, which knows its pid in its
// own namespace alone: the one in ours, or the only one in another.
func (d *discovery) whose(a account) (t *task, of *group) {
	nested := 0
	for _, g := range d.groups {
		for _, w := range g.workers {
			switch {
			case a.info == nil || w.inner != a.info.PID:
			case !w.nested:
				return w, g
			default:
				nested++
				t, of = w, g
			}
		}
	}
	if nested > 1 {
		return nil, nil
	}
	return t, of
}

// askSockets asks the sockets of a configuration until all processes of the
// group that are not old have answered.
func (d *discovery) askSockets(ctx context.Context, g *group) {
	// They were opened by what the newest has read, or if that is not known, and it may
	// never serve, by what another has.
	config := g.config
	for i, t := range g.workers {
		if p := d.previous(t); p != nil && p.Config != nil && (i == 0 || config == nil) {
			config = p.Config
		}
	}
	if config == nil {
		return
	}
	var problems []string
	for i, s := range config.Global.StatsSockets {
		e := endpoint{view: g.view, address: s.Value}
		if e.isInherited() {
			continue
		}
		if e.isLocal() && (g.leader.net == 0 || g.leader.net != d.net) {
			why := "it is in another network namespace: add a `stats socket` that is a path, such as /run/haproxy/admin.sock"
			if g.leader.net == 0 {
				why = "permission denied to see its network namespace: run as root"
			}
			problems = append(problems, fmt.Sprintf("haproxy runtime socket %s: %s", s.Value, why))
			continue
		}
		part := 2
		if i == len(config.Global.StatsSockets)-1 {
			part = 1
		}
		limited, cancel := share(ctx, part)
		a, err := e.query(limited, "")
		cancel()
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		at := slices.IndexFunc(g.workers, func(t *task) bool { return t.inner == a.info.PID })
		if at < 0 {
			problems = append(problems, fmt.Sprintf("haproxy runtime socket %s: process %d has it, another haproxy", s.Value, a.info.PID))
			continue
		}
		g.accounts[g.workers[at]] = a
		if !slices.ContainsFunc(g.workers, func(t *task) bool { return !g.old[t] && g.accounts[t].info == nil }) {
			return
		}
	}
	if len(g.accounts) == 0 {
		g.problems = append(g.problems, problems...)
	}
}

// askMaster asks a master's socket for the workers that have not answered:
// old ones have no socket of their own any more.
func (d *discovery) askMaster(ctx context.Context, g *group) {
	if !g.isMaster {
		return
	}
	for _, address := range g.leader.args.masterSockets {
		e := endpoint{view: g.view, address: address}
		if e.isInherited() || e.isLocal() && (g.leader.net == 0 || g.leader.net != d.net) {
			continue
		}
		for _, t := range g.workers {
			if g.accounts[t].info != nil {
				continue
			}
			if before := d.previous(t); before != nil && before.Old {
				continue // It stays so, and 2.2 takes seconds to say what it is.
			}
			limited, cancel := share(ctx, 2)
			a, err := e.query(limited, fmt.Sprintf("@!%d ", t.inner))
			cancel()
			// Not all versions pass on what is for an old worker.
			if err == nil && a.info.PID == t.inner {
				g.accounts[t] = a
			}
		}
	}
}

// result is what is known now of the processes that still run.
func (d *discovery) result() Found {
	found := Found{Problems: d.problems}
	for _, g := range d.groups {
		var answered *task // the newest that did at an address that all share
		for _, t := range g.workers {
			if g.accounts[t].info != nil {
				answered = t
				break
			}
		}
		for _, t := range g.workers {
			if !d.runs(t.pid, t.ticks) {
				continue
			}
			a := g.accounts[t]
			p := Process{
				PID: t.pid, Netns: t.net, Start: t.start, ticks: t.ticks,
				Version: g.version, Config: g.config, Old: g.old[t],
				Info: a.info, Stats: a.stats, Servers: a.servers,
				Problems: slices.Clone(g.problems),
			}
			if g.isMaster {
				p.Master = g.leader.pid
			}
			switch {
			case a.info != nil:
				p.Old = a.info.Stopping
				p.Version = cmp.Or(a.info.Version, g.version)
			case answered != nil && !g.isMaster && answered.start.Sub(t.start) > sameMoment:
				p.Old = true
			}
			before := d.previous(t)
			if before != nil {
				p.Start = before.Start // the clocks that it follows from may have been set
			}
			for _, s := range g.sources {
				p.Changed = p.Changed || s.Modified.After(p.Start.Add(sameMoment))
			}
			// A process never reads its files again. What was read for an unknown
			// version may be read better now, as long as it is the same text.
			if before != nil && before.Config != nil && !before.Changed &&
				(before.Version.Known() || p.Changed || g.config == nil) {
				p.Config, p.Changed = before.Config, false
			}
			if p.Config != nil {
				p.Interfaces, p.Namespaces = d.interfaces(t.pid, p.Config), g.view.namespaces(p.Config)
			}
			found.Processes = append(found.Processes, p)
		}
	}
	// A configuration that is forgotten cannot be read again: the file has changed.
	for _, p := range d.o.Previous {
		if (d.inExec[p.PID] || d.inExec[p.Master]) && d.runs(p.PID, p.ticks) {
			found.Processes = append(found.Processes, p)
		}
	}
	slices.SortFunc(found.Processes, func(a, b Process) int { return cmp.Compare(a.PID, b.PID) })
	return found
}
