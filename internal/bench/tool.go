// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// bpftraceScript measures durations in FIN_WAIT2 the way people write it.
const bpftraceScript = `
tracepoint:sock:inet_sock_set_state /args->newstate == 5/ { @start[args->skaddr] = nsecs; }
tracepoint:sock:inet_sock_set_state /args->oldstate == 5 && @start[args->skaddr]/ {
	@ms = hist((nsecs - @start[args->skaddr]) / 1000000);
	delete(@start[args->skaddr]);
}`

// A tool is a command that traces TCP states.
type tool struct {
	name string
	args []string
	// compiles: at its start, against the kernel's headers.
	compiles bool
	tracefs  bool // it needs that
}

func fintrace(binary string, args ...string) tool {
	return tool{name: "fintrace", args: append([]string{binary, "trace"}, args...)}
}

// fintraceDaemon is the daemon with a configuration that leaves the host alone.
func fintraceDaemon(binary string) (t tool, remove func() error, err error) {
	f, err := os.CreateTemp("", "bench*.yaml")
	if err != nil {
		return t, nil, err
	}
	_, err = f.WriteString("alerts: {state_file: \"\"}\nweb: {listen: []}\n")
	remove = func() error { return os.Remove(f.Name()) }
	t = tool{name: "fintrace daemon", args: []string{binary, "daemon", "--config", f.Name()}}
	if err := errors.Join(err, f.Close()); err != nil {
		return t, nil, errors.Join(err, remove())
	}
	return t, remove, nil
}

var (
	tcpstates    = tool{name: "tcpstates", args: []string{"tcpstates"}, tracefs: true}
	bccTcpstates = tool{name: "bcc's tcpstates", args: []string{"tcpstates-bpfcc"}, compiles: true, tracefs: true}
	bpftrace     = tool{name: "bpftrace histogram", args: []string{"bpftrace", "-e", bpftraceScript}, tracefs: true}
)

// tracer is a tool at work.
type tracer struct {
	name   string
	cmd    *exec.Cmd
	stderr bytes.Buffer
	ended  chan error
}

// attachWithin is how long a tool may take to attach; bpftrace compiles first.
const attachWithin = 20 * time.Second

// start launches the tool and returns once its programs run and it has done
// what it does at its start.
func (t tool) start(ctx context.Context, stdout *os.File) (*tracer, error) {
	r, err := t.launch(ctx, stdout)
	if err != nil {
		return nil, err
	}
	if err = r.attached(ctx); err == nil {
		err = r.settled()
	}
	if err != nil {
		_ = r.cmd.Process.Kill() // It may have ended by itself, which is then what err says.
		return nil, err
	}
	return r, nil
}

// launch runs the tool with its output to stdout, or away where that is nil.
func (t tool) launch(ctx context.Context, stdout *os.File) (*tracer, error) {
	cmd, err := t.command(ctx)
	if err != nil {
		return nil, err
	}
	r := &tracer{name: t.name, cmd: cmd, ended: make(chan error, 1)}
	if stdout != nil {
		r.cmd.Stdout = stdout
	}
	r.cmd.Stderr = &r.stderr
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { r.ended <- r.cmd.Wait() }()
	return r, nil
}

// command is how the tool is run; the error says why it cannot be.
func (t tool) command(ctx context.Context) (*exec.Cmd, error) {
	path, err := exec.LookPath(t.args[0])
	if err != nil {
		return nil, errors.New("not installed")
	}
	if t.compiles && !haveHeaders() {
		return nil, errors.New("cannot run: no headers of this kernel to compile against")
	}
	if !t.tracefs {
		return exec.CommandContext(ctx, path, t.args[1:]...), nil
	}
	cmd := exec.CommandContext(ctx, self, append([]string{withTracefs, path}, t.args[1:]...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	return cmd, nil
}

// withTracefs is the word for runWithTracefs on the command line.
const withTracefs = "with-tracefs"

// runWithTracefs becomes a command that finds tracefs where it looks for it. It
// has a mount namespace of its own: on the host all stays as it was.
func runWithTracefs(command []string) error {
	for _, m := range [][2]string{{"tracefs", "/sys/kernel/tracing"}, {"debugfs", "/sys/kernel/debug"}} {
		var there unix.Statfs_t
		if err := unix.Statfs(m[1], &there); err == nil && (there.Type == unix.TRACEFS_MAGIC || there.Type == unix.DEBUGFS_MAGIC) {
			continue
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	return unix.Exec(command[0], command, os.Environ())
}

// haveHeaders says whether bcc would find the headers of the running kernel.
func haveHeaders() bool {
	for _, path := range []string{"/lib/modules/" + kernelRelease() + "/build", "/sys/kernel/kheaders.tar.xz"} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}

// attached waits until a connection has made the tool's programs run.
func (r *tracer) attached(ctx context.Context) error {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return fmt.Errorf("count the runs of BPF programs: %w", err)
	}
	defer stats.Close()
	for deadline := time.Now().Add(attachWithin); time.Now().Before(deadline); {
		if _, err := makeLoad(ctx, load{Kind: healthy, Connections: 1, Duration: time.Second}); err != nil {
			return err
		}
		programs, err := r.programs()
		if err != nil {
			return err
		}
		c, err := costOf(programs)
		closePrograms(programs)
		if err != nil {
			return err
		}
		if c.runs > 0 {
			return nil
		}
		select {
		case err := <-r.ended:
			return fmt.Errorf("ended at once (%v): %s", err, firstLine(r.stderr.String()))
		default:
		}
	}
	return fmt.Errorf("no program of it has run within %s: %s", attachWithin, firstLine(r.stderr.String()))
}

// settled waits until the tool has done what it does at its start, and is idle.
func (r *tracer) settled() error {
	const pause, idle = 100 * time.Millisecond, 2 * time.Millisecond
	before, err := r.cpu()
	for deadline := time.Now().Add(attachWithin); err == nil && time.Now().Before(deadline); {
		time.Sleep(pause)
		var now time.Duration
		if now, err = r.cpu(); now-before < idle {
			return err
		}
		before = now
	}
	return errors.Join(err, fmt.Errorf("%s goes on working without a connection", r.name))
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// programs are the BPF programs of the process that events run: not iterators.
func (r *tracer) programs() ([]*ebpf.Program, error) {
	dir := filepath.Join("/proc", strconv.Itoa(r.cmd.Process.Pid), "fdinfo")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil // It has ended.
	}
	var ids, iterators []ebpf.ProgramID
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // Closed meanwhile.
		}
		info := map[string]string{}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			info[key] = strings.TrimSpace(value)
		}
		id, err := strconv.ParseUint(info["prog_id"], 10, 32)
		if err != nil {
			continue // Neither a program nor a link.
		}
		if info["link_type"] == "iter" {
			iterators = append(iterators, ebpf.ProgramID(id))
		}
		if !slices.Contains(ids, ebpf.ProgramID(id)) {
			ids = append(ids, ebpf.ProgramID(id))
		}
	}
	var programs []*ebpf.Program
	for _, id := range ids {
		if slices.Contains(iterators, id) {
			continue
		}
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			closePrograms(programs)
			return nil, fmt.Errorf("program %d of %s: %w", id, r.name, err)
		}
		programs = append(programs, p)
	}
	return programs, nil
}

func closePrograms(programs []*ebpf.Program) {
	for _, p := range programs {
		p.Close()
	}
}

// cpu is the processor time that all threads of the tool have had so far.
func (r *tracer) cpu() (time.Duration, error) {
	// The clock of another process, clock_getcpuclockid(3): in nanoseconds,
	// where /proc/PID/stat counts ticks of 10 ms.
	const cpuclockSched = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^r.cmd.Process.Pid<<3|cpuclockSched), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", r.name, err)
	}
	return time.Duration(ts.Nano()), nil
}

// cost is what BPF programs have had of the kernel's time.
type cost struct {
	runs uint64 // of the one that has run most: several may hang on one tracepoint
	time time.Duration
}

func (c cost) less(before cost) cost { return cost{c.runs - before.runs, c.time - before.time} }

func (c cost) perRun() float64 { return float64(c.time) / float64(c.runs) }

func costOf(programs []*ebpf.Program) (cost, error) {
	var sum cost
	for _, p := range programs {
		s, err := p.Stats()
		if err != nil {
			return sum, fmt.Errorf("statistics of a BPF program: %w", err)
		}
		sum.runs = max(sum.runs, s.RunCount)
		sum.time += s.Runtime
	}
	return sum, nil
}

// stop ends the tool as Ctrl-C does.
func (r *tracer) stop() error {
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		return fmt.Errorf("stop %s: %w", r.name, err)
	}
	select {
	case <-r.ended:
		// How it exits on Ctrl-C is its own affair.
		return nil
	case <-time.After(10 * time.Second):
		return errors.Join(fmt.Errorf("%s does not end on an interrupt", r.name), r.cmd.Process.Kill())
	}
}

// tempOutput is a file for the output of a tool, deleted already.
func tempOutput() (*os.File, error) {
	f, err := os.CreateTemp("", "bench")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// readBack is all that was written to f.
func readBack(f *os.File) ([]byte, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(f)
}
