// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/config"
	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
	"github.com/fintrace/fintrace/internal/metrics"
	"github.com/fintrace/fintrace/internal/probe"
	"github.com/fintrace/fintrace/internal/track"
	"github.com/fintrace/fintrace/internal/web"
)

// defaultConfig is read if it is there and nothing else is asked for.
const defaultConfig = "/etc/fintrace/fintrace.yaml"

func daemonCommand(e env) *cobra.Command {
	var (
		d     daemon
		check bool
	)
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Watch for good: alerts, metrics and a page",
		Long: `Watches until it is told to stop. It alerts while connections are still stuck, has
metrics for Prometheus and a page that shows what is stuck now. Without a
configuration file the defaults hold, which are right for a host with HAProxy.

SIGHUP reads the configuration anew; one that is wrong is not taken.`,
		Args: noArguments,
	}
	cmd.Flags().StringVar(&d.path, "config", "", "the configuration file (default: "+defaultConfig+", if there is one)")
	cmd.Flags().BoolVar(&check, "check", false, "say whether the configuration is right, and what it comes to; start nothing")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d.env = e
		d.explicit = cmd.Flags().Changed("config")
		switch {
		case !d.explicit:
			d.path = defaultConfig
		case d.path == "":
			return errors.New("--config: the path is empty; leave the flag out for " + defaultConfig)
		}
		d.logTo = newSwapHandler(slog.DiscardHandler)
		d.lines = newLogQueue(d.logTo)
		d.log, d.alertTo = slog.New(d.lines.handler()), slog.New(d.logTo)
		s, err := d.prepare()
		if err != nil {
			return err
		}
		if check {
			return s.config.Print(e.stdout)
		}
		return d.run(cmd.Context(), s)
	}
	return cmd
}

// daemon is one run of the daemon. What has no other mark belongs to the loop's
// goroutine, which others ask.
type daemon struct {
	env      env
	path     string // of the configuration file
	explicit bool   // it was asked for, and has to be there

	log     *slog.Logger // never waits for what reads it
	logTo   *swapHandler
	lines   *logQueue
	alertTo *slog.Logger // the log as a sink of alerts, which has to know what is written
	outbox  *alert.Outbox
	metrics *metrics.Metrics
	state   *stateFile
	asked   chan func()
	began   time.Time
	alive   atomic.Int64 // the events.Time of the loop's last turn; 0 before the first
	own     uint32       // network namespace

	config  *config.Config
	probe   *probe.Probe
	server  *server
	watch   *watch
	names   *hostNames
	book    *alert.Book
	records uint64
	// changed: connections have become overdue, or are so no longer, since the
	// book was asked.
	changed   bool
	evaluated events.Time
	cost      time.Duration
	warned    []string // what could not be looked at and has been logged
}

// prepared is a configuration, and all that can fail of putting it in force but
// to listen.
type prepared struct {
	config *config.Config
	sinks  []alert.Sink
	log    slog.Handler
}

// prepare reads the configuration file, or takes the defaults where there is none
// and none was asked for.
func (d *daemon) prepare() (p prepared, err error) {
	p.config, err = config.Load(d.path)
	if errors.Is(err, fs.ErrNotExist) && !d.explicit {
		p.config, err = config.Default(), nil
	}
	if err != nil {
		return p, err
	}
	if p.log, err = alert.NewHandler(p.config.Log.Format, d.env.stderr, p.config.Log.Level); err != nil {
		return p, err
	}
	if p.sinks, err = d.sinks(p.config); err != nil {
		return p, err
	}
	return p, web.Validate(p.config.Web.ConfigFile)
}

func (d *daemon) run(ctx context.Context, s prepared) (err error) {
	d.began = time.Now()
	d.logTo.use(s.log)
	defer d.lines.flush(lastWord)
	// Whose log has lost its reader goes on without.
	signal.Ignore(unix.SIGPIPE)
	// From the beginning and to the end, for SIGHUP would end it else.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP)
	c := s.config
	if d.own, err = probe.OwnNetns(); err != nil {
		return err
	}
	p, err := probe.Open(probe.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()

	d.probe = p
	d.metrics = metrics.New(metrics.BuildInfo{Version: version(), Revision: revision()})
	d.names = newHostNames()
	d.asked = make(chan func())
	d.watch = &watch{
		probe:     p,
		tracker:   track.New(limits.Rules{}, track.DefaultCapacity, hugePages()),
		haproxies: &haproxies{},
		onEvent:   func(*events.Event) { d.records++ },
		notify:    d.notice,
		warn:      d.warn,
		turn:      d.turn,
		looked:    d.looked,
		asked:     d.asked,
	}
	d.watch.rules.Names = limits.Names{Cgroup: d.names.cgroupPath, Netns: d.names.netnsName}
	d.book = alert.NewBook(c.Alerts.Settings, d.names.names(), d.own)
	d.state = newStateFile(c.Alerts.StateFile, d.log)
	if saved, ok := d.state.read(); ok {
		if err := d.book.Restore(saved, probe.Now()); err != nil {
			d.log.Warn("not all alerts that were firing before go on: the others fire anew", "error", err)
		}
	}
	if d.outbox, err = alert.NewOutbox(s.sinks, d.log); err != nil {
		return err
	}

	tasks, ctx := errgroup.WithContext(ctx)
	d.server = &server{handler: web.Handler(d.source()), log: d.log, failed: make(chan error, 1)}
	if err := d.server.listen(c); err != nil {
		return err
	}
	defer d.server.end()
	d.configure(c)
	d.metrics.Reloaded(true, d.began)

	tasks.Go(func() error { return d.state.run(ctx) })
	tasks.Go(func() error { return d.outbox.Run(ctx) })
	tasks.Go(func() error { return d.reloads(ctx, hangup) })
	tasks.Go(func() error { return d.watchdog(ctx) })
	tasks.Go(func() error { return d.server.wait(ctx) })
	tasks.Go(func() error { return d.loop(ctx) })
	err = tasks.Wait()
	d.tell(systemd.SdNotifyStopping)
	d.state.write(pending{d.state.path, d.book.Save()})
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.config.ShutdownTimeout)
	defer cancel()
	return errors.Join(err, d.outbox.Close(bound))
}

// configure puts a configuration in force.
func (d *daemon) configure(c *config.Config) {
	d.config = c
	d.watch.haproxies.use(c.HAProxy.Config, c.HAProxy.Socket)
	if err := d.watch.use(c.Limits); err != nil {
		d.warn(err)
	}
	d.book.SetSettings(c.Alerts.Settings)
	d.changed = true
	if d.state.path != c.Alerts.StateFile {
		d.state.path = c.Alerts.StateFile
		d.state.save(d.book.Save())
	}
}

// reload reads the configuration file again and puts it in force, or leaves all
// as it is.
func (d *daemon) reload(ctx context.Context) error {
	s, err := d.prepare()
	if err != nil {
		return err
	}
	if err := d.server.listen(s.config); err != nil {
		return err
	}
	asked := d.ask(ctx, func() {
		if err = d.outbox.Replace(s.sinks, d.firing()); err == nil {
			d.configure(s.config)
			d.logTo.use(s.log)
		}
	})
	return cmp.Or(asked, err)
}
