// SPDX-License-Identifier: Apache-2.0

// Package probe is everything fintrace asks of the kernel: it loads and attaches
// the BPF programs, reads their records, walks the socket tables of every
// network namespace, and finds the processes behind sockets.
package probe

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/events"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-Os -g -mcpu=v3 -Wall -Werror" -target amd64,arm64 -type event -type row bpf ../../bpf/fintrace.bpf.c

// Options choose what the kernel side reports.
type Options struct {
	// AllStates sends every transition of every TCP socket.
	AllStates bool
	// Instants sends also the connections that leave FIN_WAIT2 in the very
	// segment that brought them there. They are counted in any case.
	Instants bool
	// EveryHandover sends all connections that become minisocks, however many:
	// see SendEveryHandover. With Instants or AllStates they are.
	EveryHandover bool
	// RingBytes is the size of the ring buffer, a power of two and a multiple
	// of the page size; 0 is the default of 4 MiB.
	RingBytes int
	// Plain does without the walk and the look for owners, as on kernels that
	// lack what they take.
	Plain bool
}

// Probe is the loaded kernel side.
type Probe struct {
	objects  objects
	attached link.Link
	iterator *link.Iter
	owners   *ownerFinder // nil: the kernel lacks what it takes
	first    chan *Owners // of the first Snapshot; nil: it has them, or there are none
	walker   *walker      // nil: the same
	looked   events.Time  // when the last snapshot began
	ring     *ring
	part     *ebpf.MapSpec // of the heirs; nil where all handovers are sent
	clock    clock
	bare     bool // without BPF: only clock is set
}

// objects are what every kernel has that fintrace runs on.
type objects struct {
	OnSetState *ebpf.Program `ebpf:"on_set_state"`
	Snapshot   *ebpf.Program `ebpf:"snapshot"`
	Ring       *ebpf.Map     `ebpf:"ring"`
	CPUs       *ebpf.Map     `ebpf:"cpus"`
	Heirs      *ebpf.Map     `ebpf:"heirs"`

	TimeWaitSince *ebpf.Variable `ebpf:"time_wait_since"`
	Allowance     *ebpf.Variable `ebpf:"allowance"`
}

func (o *objects) close() error {
	return errors.Join(o.OnSetState.Close(), o.Snapshot.Close(), o.Ring.Close(), o.CPUs.Close(), o.Heirs.Close())
}

// Counters are totals since Open, over all namespaces.
type Counters struct {
	Lost     uint64 // records the ring buffer had no room for
	Missed   uint64 // events the kernel did not run the program for, because it was running on that CPU
	Instants uint64 // connections that left FIN_WAIT2 as they entered it, and were not sent
	Unsent   uint64 // connections that became minisocks, and were not sent as there were very many: a Snapshot shows those that stay
}

// Open loads the programs. Attach starts the records; Snapshot works without. It
// begins to look for the owners of the first Snapshot's sockets. An error is one line
// that says what is missing and how to get it.
func Open(opts Options) (_ *Probe, err error) {
	clock, err := prepare()
	if err != nil {
		return nil, err
	}
	p := &Probe{clock: clock}
	defer func() {
		if err != nil {
			err = errors.Join(thisHost().explain(err), p.Close())
		}
	}()

	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	if opts.RingBytes != 0 {
		spec.Maps[bpfMapRing].MaxEntries = uint32(opts.RingBytes)
	}
	config := bpfConfig{
		Hz:             uint32(clock.hz),
		AllStates:      flag(opts.AllStates),
		ReportInstants: flag(opts.Instants || opts.AllStates),
	}
	if thisHost().before(chargesMemory) {
		// Where this is refused, so is the loading, which says why.
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	}
	every := opts.EveryHandover || opts.Instants || opts.AllStates
	if !every {
		part := spec.Maps[bpfMapHeirs].InnerMap
		// Not the types of its keys and values, which hold on to all others.
		p.part = &ebpf.MapSpec{Name: part.Name, Type: part.Type, KeySize: part.KeySize, ValueSize: part.ValueSize, MaxEntries: part.MaxEntries}
	}
	if err := spec.Variables[bpfVarAllowance].Set(allowance(every)); err != nil {
		return nil, fmt.Errorf("configure the BPF programs: %w", err)
	}
	if opts.AllStates || opts.Instants {
		spec.Programs[bpfProgOnSetState] = spec.Programs[bpfProgOnSetStateConfigured]
	}
	types := btf.NewCache() // The kernel's are many: they are read once.
	var finder <-chan error
	if !opts.Plain {
		finder = p.findFirstOwners(spec, types)
	}
	if err := p.load(spec, config, types); err != nil {
		if there, e := tracingHasCookie(); e != nil || there {
			return nil, err
		}
		config.Before512, p.part = 1, nil
		spec.Programs[bpfProgOnSetState] = spec.Programs[bpfProgOnSetStateConfigured]
		if err := p.load(spec, config, types); err != nil {
			return nil, err
		}
	}
	p.iterator, err = link.AttachIter(link.IterOptions{Program: p.objects.Snapshot})
	if err != nil {
		return nil, fmt.Errorf("attach the socket iterator: %w", err)
	}
	if opts.Plain {
		return p, nil
	}
	if p.walker, err = newWalker(spec, types, p.objects.Heirs); err != nil {
		return nil, err
	}
	return p, <-finder
}

// handoversSent is how many connections that become minisocks each CPU sends in a
// tenth of a second, where they are not all wanted.
const handoversSent = 8

// SendEveryHandover says whether all connections that become minisocks are sent, or
// on each CPU 80 a second, within a tenth of a second from now on. Most are minisocks
// for milliseconds; a Snapshot shows those that stay. A Probe that was opened to send
// all goes on to, and so does each before Linux 5.12.
func (p *Probe) SendEveryHandover(every bool) error {
	if p.bare {
		return nil
	}
	if err := p.objects.Allowance.Set(allowance(every)); err != nil {
		return fmt.Errorf("set how many handovers to send: %w", err)
	}
	return nil
}

func allowance(every bool) uint32 {
	if every {
		return math.MaxUint32
	}
	return handoversSent
}

// filesNeeded is how many descriptors a Probe and a look at the sockets have at
// once, with room. Where there are fewer, what fails first is what cilium/ebpf
// tries to find out about the kernel, and it calls that too old.
const filesNeeded = 64

// prepare is for what every Probe needs.
func prepare() (clock, error) {
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur < filesNeeded {
		return clock{}, fmt.Errorf("no more than %d files may be open, and fintrace needs %d: raise the limit (ulimit -n, LimitNOFILE=)", files.Cur, filesNeeded)
	}
	if _, err := os.Stat("/proc/self/mountinfo"); err != nil {
		return clock{}, fmt.Errorf("/proc has to be mounted, for the network namespaces and processes in it: %w", err)
	}
	return newClock()
}

func (p *Probe) load(spec *ebpf.CollectionSpec, config bpfConfig, types *btf.Cache) error {
	if err := spec.Variables[bpfVarConfig].Set(config); err != nil {
		return fmt.Errorf("configure the BPF programs: %w", err)
	}
	if err := spec.LoadAndAssign(&p.objects, &ebpf.CollectionOptions{Cache: types}); err != nil {
		return fmt.Errorf("load the BPF programs: %w", err)
	}
	return nil
}

// Attach starts the records: from here on Drain finds them. A bare Probe has none.
func (p *Probe) Attach() (err error) {
	if p.bare {
		return nil
	}
	if p.ring == nil {
		if p.ring, err = newRing(p.objects.Ring); err != nil {
			return thisHost().explain(fmt.Errorf("map the ring buffer: %w", err))
		}
	}
	p.attached, err = link.AttachTracing(link.TracingOptions{Program: p.objects.OnSetState})
	if err != nil {
		return thisHost().explain(fmt.Errorf("attach to inet_sock_set_state: %w", err))
	}
	return nil
}

// Detach stops the records until Attach, for whoever compares the host with and
// without: what changes meanwhile is not seen.
func (p *Probe) Detach() error {
	if p.attached == nil {
		return nil
	}
	err := p.attached.Close()
	p.attached = nil
	return err
}

// KeepHandovers gives the kernel side its memory for the handovers that it does not
// send, some megabytes; until then it sends all. Where all are wanted it does nothing,
// nor again.
func (p *Probe) KeepHandovers() error {
	if p.part == nil {
		return nil
	}
	for i := range p.objects.Heirs.MaxEntries() {
		part, err := ebpf.NewMap(p.part)
		if err != nil {
			return thisHost().explain(fmt.Errorf("make a map for handovers: %w", err))
		}
		if err := errors.Join(p.objects.Heirs.Put(i, part), part.Close()); err != nil {
			return thisHost().explain(fmt.Errorf("add a map for handovers: %w", err))
		}
	}
	p.part = nil
	return nil
}

// Close detaches and frees all. It may be called on a half-open Probe.
func (p *Probe) Close() error {
	errs := []error{p.Detach()}
	if p.iterator != nil {
		errs = append(errs, p.iterator.Close())
	}
	p.firstOwners() // None is looked for any more.
	if p.owners != nil {
		errs = append(errs, p.owners.close())
	}
	if p.walker != nil {
		errs = append(errs, p.walker.close())
	}
	if p.ring != nil {
		errs = append(errs, p.ring.close())
	}
	if !p.bare {
		errs = append(errs, p.objects.close())
	}
	return errors.Join(errs...)
}

// Ready receives when records are waiting that come after a Drain which has found
// none, and when a CPU has sent some hundred since it was last woken for it. The
// kernel wakes it once for any number of the former until they are drained.
func (p *Probe) Ready() <-chan struct{} {
	if p.ring == nil {
		return nil
	}
	return p.ring.ready
}

// Drain calls fn for each waiting record; before Attach there is none. The Event
// is reused. Where some says that there were any, Ready is silent about those
// that follow, while they are few: whoever drains again after a little while is not
// woken meanwhile.
func (p *Probe) Drain(fn func(*events.Event)) (some bool, err error) {
	if p.ring == nil {
		return false, nil
	}
	var ev events.Event
	return p.ring.drain(func(record []byte) error {
		if err := p.clock.decodeEvent(record, &ev); err != nil {
			return err
		}
		fn(&ev)
		return nil
	})
}

// Counters reads the kernel side's counts.
func (p *Probe) Counters() (Counters, error) {
	if p.bare {
		return Counters{}, nil
	}
	var perCPU []bpfCpu
	if err := p.objects.CPUs.Lookup(uint32(0), &perCPU); err != nil {
		return Counters{}, fmt.Errorf("read the counters: %w", err)
	}
	var c Counters
	for _, n := range perCPU {
		c.Lost += n.Lost
		c.Instants += n.Instants
		c.Unsent += n.Unsent
	}
	stats, err := p.objects.OnSetState.Stats()
	if err != nil {
		return Counters{}, fmt.Errorf("read the program's counters: %w", err)
	}
	c.Missed = stats.RecursionMisses
	return c, nil
}

// Now reads the clock that events are dated by, the host's CLOCK_BOOTTIME.
func Now() events.Time {
	var ts unix.Timespec
	// Cannot fail: the clock has been there since Linux 2.6.39.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return events.Time(ts.Nano() - ownBoot())
}

// ownBoot is by how many nanoseconds the boot clock of this process's time
// namespace (time_namespaces(7)) is ahead of the host's. BPF has the host's.
var ownBoot = sync.OnceValue(func() int64 {
	text, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil {
		return 0 // a kernel without time namespaces
	}
	return bootOffset(string(text))
})

// bootOffset reads the line "boottime SECONDS NANOSECONDS"; without it there is none.
func bootOffset(text string) int64 {
	for line := range strings.Lines(text) {
		var seconds, nanoseconds int64
		if n, _ := fmt.Sscanf(line, "boottime %d %d", &seconds, &nanoseconds); n == 2 {
			return seconds*int64(time.Second) + nanoseconds
		}
	}
	return 0
}

// A WallClock turns readings of Now into wall-clock time, by the wall clock as it
// is set when it is asked. Between steps of that clock it is consistent.
type WallClock struct {
	boot time.Duration // the wall clock's time of the boot, since 1970
	read time.Time     // when that was
}

// wallClockEvery is how often a WallClock looks at how the wall clock is set.
const wallClockEvery = time.Millisecond

// Time is t on the wall clock.
func (c *WallClock) Time(t events.Time) time.Time {
	now := time.Now()
	if now.Sub(c.read).Abs() >= wallClockEvery {
		boot := time.Duration(now.UnixNano() - int64(Now()))
		// Two clocks cannot be read at once: what is less than this is no step.
		if (boot - c.boot).Abs() > time.Millisecond {
			c.boot = boot
		}
		c.read = now
	}
	return time.Unix(0, int64(t)+int64(c.boot))
}

// A hint says what to do about an error, in place of the error's own text.
type hint struct {
	text string
	error
}

func (h hint) Error() string { return h.text }
func (h hint) Unwrap() error { return h.error }

// A host is what decides whether the BPF programs can be used at all.
type host struct {
	root    bool
	btf     bool   // the kernel shows its types
	release string // of the kernel
	locked  bool   // the kernel lets nobody read its memory (kernel_lockdown(7), confidentiality)
}

func thisHost() host {
	h := host{root: os.Geteuid() == 0, release: "of unknown release"}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err == nil {
		h.btf = true
	}
	if mode, err := os.ReadFile("/sys/kernel/security/lockdown"); err == nil {
		h.locked = strings.Contains(string(mode), "[confidentiality]")
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.release = unix.ByteSliceToString(u.Release[:])
	}
	return h
}

// explain turns the errors that a user can do something about into what to do.
func (h host) explain(err error) error {
	var rejected *ebpf.VerifierError
	switch {
	case h.tooOld():
		return hint{fmt.Sprintf("this kernel (%s) is too old: fintrace needs Linux %d.%d or later", h.release, oldest[0], oldest[1]), err}
	case h.locked && (errors.As(err, &rejected) || errors.Is(err, unix.EPERM)):
		return hint{"this kernel is locked down (confidentiality): no BPF program may read its memory", err}
	case errors.As(err, &rejected):
		return err
	case (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)) && !h.root:
		return hint{"no permission to use BPF: run it as root, for example with sudo", err}
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return hint{"no permission to use BPF although this is root: a container or a service needs CAP_BPF and CAP_PERFMON, CAP_SYS_PTRACE for processes and CAP_SYS_ADMIN for other network namespaces (and --pid=host)", err}
	case errors.Is(err, ebpf.ErrNotSupported) && !h.btf:
		return hint{fmt.Sprintf("this kernel (%s) does not show its types in /sys/kernel/btf/vmlinux: fintrace needs one built with CONFIG_DEBUG_INFO_BTF=y", h.release), err}
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("this kernel (%s) lacks something that fintrace needs: %w", h.release, err)
	}
	return err
}

// oldest is the first release that fintrace is tested on.
var oldest = [2]int{5, 10}

// chargesMemory is the first release that charges BPF maps to the memory cgroup,
// and not to RLIMIT_MEMLOCK.
var chargesMemory = [2]int{5, 11}

func (h host) tooOld() bool { return h.before(oldest) }

// before is false for a release that does not look like one.
func (h host) before(release [2]int) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(h.release, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return major < release[0] || major == release[0] && minor < release[1]
}

func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
