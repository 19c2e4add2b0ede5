// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// A walker reads the kernel's socket tables without a lock, several times as fast
// as the iterator does. It gives no cookie to a socket that has none.
type walker struct {
	objects struct {
		Walk    *ebpf.Program `ebpf:"walk"`
		Batches *ebpf.Map     `ebpf:"batches"`
		Known   *ebpf.Map     `ebpf:"known"`
	}
	batch  mapped[bpfBatch]
	known  mapped[bpfKnown]
	chains uint32 // walked at once
}

const (
	mostChains = uint32(len(bpfScratch{}.Node))
	mostRows   = uint32(len(bpfBatch{}.Rows))
	aimedRows  = mostRows / 2 // of a run; the rest is for buckets with very many
	knownBits  = uint64(len(bpfKnown{}.Bits)) * 64
	// walkTries is how often a part of a table is walked whose sockets move:
	// to see one twice, or not the one that came meanwhile, is what any walk does.
	walkTries = 8
)

// newWalker loads the walk; nil and no error where the kernel lacks what it
// takes, bpf_rdonly_cast(), which came with Linux 6.2. What the other programs have
// not sent it takes from heirs.
func newWalker(spec *ebpf.CollectionSpec, kernel *btf.Cache, heirs *ebpf.Map) (_ *walker, err error) {
	if there, err := canWalk(kernel); err != nil || !there {
		return nil, err
	}
	w := &walker{chains: mostChains}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	shared := map[string]*ebpf.Map{bpfMapHeirs: heirs}
	if err := spec.LoadAndAssign(&w.objects, &ebpf.CollectionOptions{Cache: kernel, MapReplacements: shared}); err != nil {
		return nil, fmt.Errorf("load the walk of the socket tables: %w", err)
	}
	if w.batch, err = mapValue[bpfBatch](w.objects.Batches); err != nil {
		return nil, err
	}
	if w.known, err = mapValue[bpfKnown](w.objects.Known); err != nil {
		return nil, err
	}
	// The first run has cilium/ebpf load a program, to find out whether it can be
	// run: later the daemon may load none.
	if _, err = w.table(); err != nil {
		return nil, err
	}
	return w, nil
}

func canWalk(kernel *btf.Cache) (bool, error) {
	types, err := kernel.Kernel()
	if err != nil {
		return false, err
	}
	var cast *btf.Func
	err = types.TypeByName("bpf_rdonly_cast", &cast)
	if errors.Is(err, btf.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

func (w *walker) close() error {
	return errors.Join(w.batch.unmap(), w.known.unmap(),
		w.objects.Walk.Close(), w.objects.Batches.Close(), w.objects.Known.Close())
}

// show makes the walk show the minisocks in TIME_WAIT that have these cookies.
func (w *walker) show(known func(func(uint64))) {
	bits := w.known.value.Bits[:]
	clear(bits)
	known(func(cookie uint64) {
		bit := cookie % knownBits
		bits[bit/64] |= 1 << (bit % 64)
	})
}

// table is the address of the hash tables that the calling thread's network
// namespace has its sockets in: the host's, or its own (tcp_child_ehash_entries).
func (w *walker) table() (uint64, error) {
	b := w.batch.value
	b.Begin, b.End = 0, 0
	err := w.run()
	return b.Table, err
}

// walk calls fn with the sockets of the calling thread's tables, the listeners
// first. The slice is reused.
func (w *walker) walk(fn func([]bpfRow)) error {
	b := w.batch.value
	for _, listening := range []uint32{1, 0} {
		b.Listening, b.Begin = listening, 0
		for tries := 0; ; {
			b.End = b.Begin + w.chains
			if err := w.run(); err != nil {
				return err
			}
			tries++
			if b.Full != 0 {
				if w.chains == 1 {
					return fmt.Errorf("walk the socket tables: more than %d sockets in one bucket", mostRows)
				}
				w.chains /= 2
				continue
			}
			if b.Strayed != 0 && tries < walkTries {
				continue
			}
			fn(b.Rows[:b.Filled])
			if b.End >= b.Buckets {
				break
			}
			b.Begin, tries = b.End, 0
			switch {
			case b.Filled < aimedRows/2:
				w.chains = min(2*w.chains, mostChains)
			case b.Filled > aimedRows:
				w.chains = max(w.chains/2, 1)
			}
		}
	}
	return nil
}

func (w *walker) run() error {
	if _, err := w.objects.Walk.Run(&ebpf.RunOptions{}); err != nil {
		return fmt.Errorf("walk the socket tables: %w", err)
	}
	return nil
}
