// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/sandbox"
)

// loop attaches, gives up what it needs no longer, and goes on until ctx ends.
func (d *daemon) loop(ctx context.Context) error {
	if err := d.probe.Attach(); err != nil {
		return err
	}
	if err := d.probe.KeepHandovers(); err != nil { // While it may.
		return err
	}
	d.confine()
	giveBack()
	if err := d.watch.seed(ctx); err != nil {
		return err
	}
	d.log.Info("watching", "connections", d.watch.tracker.Len(), "namespaces", len(d.watch.covered),
		"haproxies", len(d.watch.haproxies.found.Processes))
	d.tell(systemd.SdNotifyReady)
	return d.watch.run(ctx)
}

// confine gives up what is needed no longer, and says what is left. It comes before
// the first file of another process is opened: one on a disk that hangs would keep
// a thread, and all of them have to take part.
func (d *daemon) confine() {
	p := sandbox.Confine(sandbox.Needs{
		Capabilities: []int{
			unix.CAP_SYS_ADMIN,        // setns
			unix.CAP_SYS_PTRACE,       // /proc of other processes
			unix.CAP_DAC_READ_SEARCH,  // their files; cgroups by number
			unix.CAP_DAC_OVERRIDE,     // runtime sockets that are not its own
			unix.CAP_NET_BIND_SERVICE, // another listener
			unix.CAP_BPF,
		},
		// Before 5.19 nothing can be asked of BPF without, where it is not for
		// everybody (kernel.unprivileged_bpf_disabled).
		Spare:   []int{unix.CAP_BPF},
		Works:   func() error { _, err := d.probe.Counters(); return err },
		OpenHow: haproxy.OpenHow(),
	})
	level, calls := slog.LevelInfo, "filtered"
	if len(p.Missing) > 0 {
		level = slog.LevelWarn
	}
	if !p.Filtered {
		calls = "all"
	}
	d.log.Log(context.Background(), level, "confined", "capabilities", p.Capabilities, "system_calls", calls, "missing", p.Missing)
}

// tell tells systemd, where it has started us. That it does not listen is no
// reason to do otherwise.
func (d *daemon) tell(state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		d.log.Debug("systemd cannot be told", "state", state, "error", err)
	}
}

// watchdog tells systemd that the loop lives, twice as often as it wants to hear.
func (d *daemon) watchdog(ctx context.Context) error {
	interval, err := systemd.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return nil
	}
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if d.healthy() == nil {
				d.tell(systemd.SdNotifyWatchdog)
			}
		}
	}
}

// reloads reads the configuration anew at each SIGHUP.
func (d *daemon) reloads(ctx context.Context, hangup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangup:
			d.tell(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", systemd.SdNotifyReloading, monotonic().Microseconds()))
			err := d.reload(ctx)
			d.metrics.Reloaded(err == nil, time.Now())
			status := "watching"
			if err != nil {
				status = "watching; the configuration was not taken, and the one before is in force: see the log"
				d.log.Error("the configuration is not taken, and the one before stays in force", "error", err)
			} else {
				d.log.Info("the configuration is in force", "file", d.path)
			}
			d.tell(systemd.SdNotifyReady + "\nSTATUS=" + status)
		}
	}
}

// monotonic is CLOCK_MONOTONIC, by which systemd dates a reload.
func monotonic() time.Duration {
	var ts unix.Timespec
	// Cannot fail, like CLOCK_BOOTTIME.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// looked follows each snapshot.
func (d *daemon) looked(took time.Duration, at time.Time) {
	d.metrics.Snapshot(took, at)
	d.names.refresh()
}

// warn logs what could not be looked at, once.
func (d *daemon) warn(err error) {
	line := report.Clean(err.Error())
	if slices.Contains(d.warned, line) {
		return
	}
	if len(d.warned) == warnedKept {
		d.warned = d.warned[1:]
	}
	d.warned = append(d.warned, line)
	d.log.Warn("not looked at", "what", line)
}

// warnedKept bounds the warnings that are remembered.
const warnedKept = 100
