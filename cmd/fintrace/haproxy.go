// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/probe"
)

// haproxyFlags adds the flags that say where HAProxy's configuration and
// runtime socket are.
func haproxyFlags(cmd *cobra.Command) *haproxies {
	h := &haproxies{}
	cmd.Flags().StringArrayVar(&h.options.Paths, "haproxy-config", nil, "HAProxy's configuration, a file or a directory, in place of what running ones name (repeatable)")
	cmd.Flags().StringVar(&h.options.Socket, "haproxy-socket", "", "HAProxy's runtime socket, in place of what its configuration names")
	return h
}

// haproxies is what is known of the HAProxy processes on this host. They come
// and go with every reload, and their files change: it is looked up anew beside
// the loop, and the loop takes what has been found.
type haproxies struct {
	options haproxy.DiscoverOptions
	netns   []uint32 // that are of interest; empty: all
	found   haproxy.Found
	view    *haproxy.View
	missing bool                 // a process of HAProxy has been seen that is not in the view
	changed bool                 // by the last look
	others  map[int]bool         // that were looked up already
	running chan haproxy.Found   // of a look that goes on; nil if none does
	began   events.Time          // the last look
	stamps  map[string]fileStamp // of the configuration files, by the last check
}

// use looks elsewhere from now on.
func (h *haproxies) use(paths []string, socket string) {
	if slices.Equal(paths, h.options.Paths) && socket == h.options.Socket {
		return
	}
	// What the files of before said counts no longer, nor what a look that goes
	// on finds in them.
	h.options = haproxy.DiscoverOptions{Paths: paths, Socket: socket}
	h.running, h.missing = nil, true
}

// look looks for them now.
func (h *haproxies) look(ctx context.Context) {
	h.began = probe.Now()
	h.take(haproxy.Discover(ctx, h.options))
}

// take takes what a look has found, and says whether it changes anything.
func (h *haproxies) take(found haproxy.Found) bool {
	h.running = nil
	h.changed = !slices.EqualFunc(h.found.Processes, found.Processes, haproxy.SamePlaces)
	h.found, h.options.Previous = found, found.Processes
	if h.changed {
		h.view = haproxy.NewView(found.Processes)
		h.rewritten()
	}
	return h.changed
}

// refresh begins a look if one is due.
func (h *haproxies) refresh(ctx context.Context, now events.Time) {
	wait := reconcileEvery
	switch {
	case h.missing:
		wait = hurry
	case h.changed:
		// It may have been in the middle of a reload.
		wait = checkEvery
	}
	if h.running != nil || now < h.began.Add(wait) {
		return
	}
	h.began, h.missing = now, false
	h.running = make(chan haproxy.Found, 1)
	go func(to chan<- haproxy.Found, o haproxy.DiscoverOptions) { to <- haproxy.Discover(ctx, o) }(h.running, h.options)
}

// hurry is between two looks where something is known to be new.
const hurry = 100 * time.Millisecond

// check asks masters for their children, which is cheap: a reload makes new ones;
// and looks whether a configuration file has been written.
func (h *haproxies) check() {
	if h.rewritten() {
		h.missing = true
	}
	for i := range h.found.Processes {
		master := h.found.Processes[i].Master
		if master == 0 {
			continue
		}
		for _, pid := range haproxy.Children(master) {
			h.seen(pid)
		}
	}
}

// fileStamp changes when a file is written or replaced; it is 0 for none.
type fileStamp struct {
	inode uint64
	size  int64
	mtime unix.Timespec
}

// rewritten says whether a configuration file has changed since it was asked
// last. The files of a process that has ended say nothing.
func (h *haproxies) rewritten() (changed bool) {
	now := map[string]fileStamp{}
	add := func(path string) {
		var st unix.Stat_t
		var stamp fileStamp
		if unix.Stat(path, &st) == nil {
			stamp = fileStamp{st.Ino, st.Size, st.Mtim}
		}
		before, known := h.stamps[path]
		changed = changed || known && stamp != before
		now[path] = stamp
	}
	for _, path := range h.options.Paths {
		add(path)
	}
	seen := map[*haproxy.Config]bool{}
	for i := range h.found.Processes {
		p := &h.found.Processes[i]
		if len(h.options.Paths) > 0 || p.Config == nil || seen[p.Config] {
			continue
		}
		dir := filepath.Join("/proc", strconv.Itoa(p.PID))
		if unix.Access(dir+"/root/.", unix.F_OK) != nil {
			continue
		}
		seen[p.Config] = true
		for _, file := range p.Config.Files {
			from := "root"
			if !filepath.IsAbs(file) {
				from = "cwd"
			}
			add(filepath.Join(dir, from, file))
		}
	}
	h.stamps = now
	return changed
}

// noticed is for a process that holds or closes connections: one of HAProxy
// that is new is looked for at once.
func (h *haproxies) noticed(p events.Process) {
	if p.Known() && haproxy.IsName(p.Name()) {
		h.seen(int(p.PID))
	}
}

// seen is for a process that may be one of HAProxy.
func (h *haproxies) seen(pid int) {
	if h.others[pid] || h.view != nil && h.view.Knows(pid) {
		return
	}
	if h.others == nil || len(h.others) >= othersKept {
		h.others = map[int]bool{}
	}
	h.missing, h.others[pid] = true, true
}

// othersKept bounds the processes that are remembered for not being in the view.
const othersKept = 1000

// warnings are what could not be looked at, of the processes in namespaces that
// are selected.
func (h *haproxies) warnings() []string {
	warnings := slices.Clone(h.found.Problems)
	for i := range h.found.Processes {
		if netns := h.found.Processes[i].Netns; len(h.netns) > 0 && !slices.Contains(h.netns, netns) {
			continue
		}
		for _, problem := range h.found.Processes[i].Problems {
			if !slices.Contains(warnings, problem) {
				warnings = append(warnings, problem)
			}
		}
	}
	return warnings
}
