// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// A ring is the consumer's end of a BPF ring buffer. The reader of cilium/ebpf
// copies each record, takes a lock for it and consumes the first one as soon as
// it is woken, which makes the kernel wake it again for the next; here records
// are read in place, in batches, by the goroutine that uses them, and waiting
// for them is a goroutine of its own. While there are some in every batch the
// kernel wakes nobody.
type ring struct {
	file     *os.File
	consumer []byte         // the consumer's page, writable
	producer []byte         // the producer's page, the data, and its first page once more
	read     *atomic.Uint64 // as the kernel is told
	written  *atomic.Uint64
	at       uint64 // what has been read
	data     []byte
	mask     uint64
	ready    chan struct{}
	done     chan struct{}
}

// kernel/bpf/ringbuf.c: each record starts with its length, whose upper two
// bits are flags, and a page offset; records are aligned to 8 bytes.
const (
	recordHeader = 8
	busyBit      = 1 << 31
	discardBit   = 1 << 30
)

// busyTries is how often a record is looked at that is being written on another
// CPU: it takes that less than a microsecond.
const busyTries = 1000

func newRing(m *ebpf.Map) (_ *ring, err error) {
	fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate its descriptor: %w", err)
	}
	// Non-blocking, so that the Go runtime's poller takes it.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("make it non-blocking: %w", err), unix.Close(fd))
	}
	r := &ring{
		file:  os.NewFile(uintptr(fd), "ring buffer"),
		mask:  uint64(m.MaxEntries()) - 1,
		ready: make(chan struct{}, 1),
		done:  make(chan struct{}),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.unmap(), r.file.Close())
		}
	}()
	page := os.Getpagesize()
	r.consumer, err = unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap the consumer page: %w", err)
	}
	r.producer, err = unix.Mmap(fd, int64(page), 2*page+int(m.MaxEntries()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap the data: %w", err)
	}
	r.read = (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(r.consumer)))
	r.written = (*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(r.producer)))
	r.data = r.producer[page:]
	conn, err := r.file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("poll it: %w", err)
	}
	go r.wait(conn)
	return r, nil
}

// wait turns wake-ups of the kernel into receives from ready, until close.
func (r *ring) wait(conn syscall.RawConn) {
	defer close(r.done)
	for {
		woken := false
		// The poller is edge-triggered: false waits for the next wake-up.
		if conn.Read(func(uintptr) bool { w := woken; woken = true; return w }) != nil {
			return
		}
		select {
		case r.ready <- struct{}{}:
		default:
		}
	}
}

// drain calls fn for each record in the buffer, in place. It returns the last
// error of fn, having read on. Where there were some, more may come without a
// wake-up, until a drain has found none.
func (r *ring) drain(fn func([]byte) error) (some bool, err error) {
	last := r.at // the record that was read last
	for written := r.written.Load(); r.at < written; written = r.written.Load() {
		for r.at < written {
			start := r.at & r.mask
			header := (*atomic.Uint32)(unsafe.Pointer(&r.data[start]))
			length := header.Load()
			for tries := 0; length&busyBit != 0 && tries < busyTries; tries++ {
				runtime.Gosched()
				length = header.Load()
			}
			if length&busyBit != 0 {
				// Its writer has lost its CPU, and will wake us: the position
				// below says that we wait for this very record.
				r.read.Store(r.at)
				return some, err
			}
			size := uint64(length &^ discardBit)
			if length&discardBit == 0 {
				body := r.data[start+recordHeader : start+recordHeader+size]
				if e := fn(body); e != nil {
					err = e
				}
			}
			last, some = r.at, true
			r.at += (recordHeader + size + 7) &^ 7
		}
	}
	// Who commits a record wakes us if that is the one we are at: we are, where
	// nothing came. What is committed before this is known is found below.
	r.read.Store(last)
	return some || r.at < r.written.Load(), err
}

func (r *ring) close() error {
	err := r.file.Close()
	<-r.done
	return errors.Join(err, r.unmap())
}

func (r *ring) unmap() error {
	var errs []error
	for _, m := range [][]byte{r.consumer, r.producer} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	return errors.Join(errs...)
}
