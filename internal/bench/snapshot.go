// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/probe"
)

const (
	snapshotRounds = 5
	snapshotBar    = 4 // times as fast as ss
	snapshotBarAt  = 50_000
	snapshotFew    = 1_000
	// What the reader may take more of memory for 249 000 sockets more: less
	// than 9 bytes for each, which a table of them could not do.
	readerSlack = 2 << 20
)

// snapshotSizes are numbers of connections in FIN_WAIT2, half of them held and
// half minisocks, each beside its peer in CLOSE_WAIT.
var snapshotSizes = []int{snapshotFew, snapshotBarAt, 250_000}

// snapshotOthers are sockets that are not in FIN_WAIT2, beside snapshotFew that are.
var snapshotOthers = []others{
	{"established", 100_000},
	{"established", 300_000},
	{"time-wait", 100_000},
	{"time-wait", 300_000},
	{"time-wait, watched", 300_000},
}

type others struct {
	Kind   string
	Number int
}

type snapshotRequest struct {
	Binary  string
	Sockets int
	Others  others
	List    bool // measure `fintrace list` too
}

// snapshotTimes are those of one look at all connections in FIN_WAIT2.
type snapshotTimes struct {
	Walk     taken   // fintrace's, of all namespaces
	PeakRSS  float64 // bytes, of the process that walks
	List     taken   // `fintrace list` as a command; zero: not measured
	SS       taken
	SSError  string
	ProcFile taken // reading /proc/net/tcp
}

// taken is what something took, by the clock and of the processors.
type taken struct{ Wall, CPU time.Duration }

func (t taken) String() string { return fmt.Sprintf("%s (CPU %s)", short(t.Wall), short(t.CPU)) }

func (s *suite) snapshot(ctx context.Context) (section, error) {
	found := section{name: "snapshot", about: fmt.Sprintf(`
Connections in FIN_WAIT2, half of them held and half minisocks, beside as many peers in CLOSE_WAIT, in a network namespace
of their own; %d rounds. fintrace's figure is the walk of all namespaces by its own probe; ss is %s, and /proc/net/tcp
is read and not parsed. The others: established connections (both ends count), TIME_WAIT minisocks from before fintrace, and
such as were healthy connections while it watched, which it does not follow any more.`, snapshotRounds, "`ss -tan state fin-wait-2`")}
	var few, many snapshotTimes
	for _, n := range snapshotSizes {
		t, err := inNamespace[snapshotTimes](ctx, "snapshot", snapshotRequest{
			Binary: s.binary, Sockets: n, List: n == snapshotBarAt,
		})
		if err != nil {
			return found, err
		}
		r := t.row(fmt.Sprintf("snapshot of %s FIN_WAIT2 sockets among as many others", spaced(n)))
		if n == snapshotBarAt {
			r.bar, r.met = fmt.Sprintf("≥ %d × as fast as ss", snapshotBar), t.meets()
		}
		found.rows = append(found.rows, r)
		if t.List.Wall > 0 {
			found.rows = append(found.rows, row{
				what:     "the same as `fintrace list -o json`, start to end, with owners and limits",
				ratio:    t.against(t.List),
				fintrace: t.List.String(),
			})
		}
		if n == snapshotFew {
			few = t
		}
		many = t
	}
	found.rows = append(found.rows, row{
		what:     fmt.Sprintf("peak memory of what reads %s FIN_WAIT2 sockets", spaced(snapshotSizes[len(snapshotSizes)-1])),
		ratio:    times(many.PeakRSS, few.PeakRSS) + " that for " + spaced(snapshotFew),
		bar:      "independent of their number",
		met:      meets(many.PeakRSS-few.PeakRSS <= readerSlack),
		fintrace: mebibytes(many.PeakRSS) + ", and for " + spaced(snapshotFew) + " " + mebibytes(few.PeakRSS),
	})
	for _, o := range snapshotOthers {
		t, err := inNamespace[snapshotTimes](ctx, "snapshot", snapshotRequest{Binary: s.binary, Sockets: snapshotFew, Others: o})
		if err != nil {
			return found, err
		}
		found.rows = append(found.rows, t.row(fmt.Sprintf("snapshot of %s among %s %s", spaced(snapshotFew), spaced(o.Number), o.Kind)))
	}
	return found, nil
}

func (t *snapshotTimes) row(what string) row {
	return row{
		what:     what,
		ratio:    t.against(t.Walk),
		fintrace: t.Walk.String(),
		beside: list("ss "+cmp.Or(t.SSError, t.SS.String()),
			"/proc/net/tcp "+t.ProcFile.String()),
	}
}

// against compares a time with that of ss.
func (t *snapshotTimes) against(other taken) string {
	if t.SSError != "" {
		return "?"
	}
	return times(float64(t.SS.Wall), float64(other.Wall)) + " as fast as ss"
}

func (t *snapshotTimes) meets() verdict {
	if t.SSError != "" {
		return unknown
	}
	return meets(t.SS.Wall >= snapshotBar*t.Walk.Wall)
}

// runSnapshot is the part that looks at the sockets; other processes have them.
func runSnapshot(r snapshotRequest) (t snapshotTimes, err error) {
	if err := prepareNamespace(); err != nil {
		return t, err
	}
	p, err := probe.Open(probe.Options{})
	if err != nil {
		return t, err
	}
	defer p.Close()
	if r.Others.Kind == "time-wait, watched" {
		// Nobody reads the records, of which a healthy close makes none.
		if err := p.Attach(); err != nil {
			return t, err
		}
	}
	// Minisocks in FIN_WAIT2 stay for 60 s: they come last.
	release, err := fill(holdRequest{Others: r.Others}, holdRequest{Held: r.Sockets / 2}, holdRequest{Minisocks: r.Sockets - r.Sockets/2})
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, release()) }()

	listing, ssing := []string{"list", "-o", "json"}, []string{"-tan", "state", "fin-wait-2"}
	if err := shows(r.Sockets, "ss", ssing...); err != nil {
		t.SSError = err.Error()
	}
	contenders := []*contender{
		timed("walk", &t.Walk, func() error {
			found := 0
			_, err := p.Snapshot(nothingKnown, func(sockets []events.Socket) {
				for i := range sockets {
					if sockets[i].State == events.FinWait2 {
						found++
					}
				}
			})
			if err == nil && found < r.Sockets {
				err = fmt.Errorf("the snapshot shows %d of %d connections", found, r.Sockets)
			}
			return err
		}),
		timed("/proc/net/tcp", &t.ProcFile, readProc),
	}
	if t.SSError == "" {
		contenders = append(contenders, timed("ss", &t.SS, command("ss", ssing...)))
	}
	if r.List {
		if err := shows(r.Sockets, r.Binary, listing...); err != nil {
			return t, err
		}
		contenders = append(contenders, timed("list", &t.List, command(r.Binary, listing...)))
	}
	if err := compete(context.Background(), snapshotRounds, contenders); err != nil {
		return t, err
	}
	for _, c := range contenders {
		if c.err != nil {
			return t, fmt.Errorf("%s: %w", c.name, c.err)
		}
	}
	own, err := memoryOf(os.Getpid())
	t.PeakRSS = own.Peak
	return t, err
}

// timed is a contender whose median of all rounds is always in result.
func timed(name string, result *taken, do func() error) *contender {
	var wall, cpu []float64
	return &contender{name: name, round: func() error {
		began, spent := time.Now(), processorTime()
		err := do()
		wall, cpu = append(wall, float64(time.Since(began))), append(cpu, float64(processorTime()-spent))
		*result = taken{time.Duration(median(wall)), time.Duration(median(cpu))}
		return err
	}}
}

// processorTime is what this process and those that it has waited for have had.
func processorTime() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var used unix.Rusage
		// Cannot fail: it is for this process, into memory of its own.
		_ = unix.Getrusage(who, &used)
		sum += time.Duration(used.Utime.Nano() + used.Stime.Nano())
	}
	return sum
}

// command is a command with its output thrown away.
func command(name string, args ...string) func() error {
	return func() error { return exec.Command(name, args...).Run() }
}

// shows checks that a command prints a line for each connection.
func shows(lines int, name string, args ...string) error {
	if _, err := exec.LookPath(name); err != nil {
		return errors.New("not installed")
	}
	out := &lineCounter{}
	cmd := exec.Command(name, args...)
	cmd.Stdout = out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if out.lines < lines {
		return fmt.Errorf("%s shows %d of %d connections", name, out.lines, lines)
	}
	return nil
}

type lineCounter struct{ lines int }

func (c *lineCounter) Write(b []byte) (int, error) {
	c.lines += bytes.Count(b, []byte{'\n'})
	return len(b), nil
}

func readProc() error {
	f, err := os.Open("/proc/self/net/tcp")
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// nothingKnown is for a look that follows no connection.
func nothingKnown(func(uint64)) {}
