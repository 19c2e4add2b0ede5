// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mapped is the one value of an array that BPF programs share with this process.
type mapped[T any] struct {
	value  *T
	memory []byte
}

func mapValue[T any](m *ebpf.Map) (mapped[T], error) {
	page := os.Getpagesize()
	size := (int(unsafe.Sizeof(*new(T))) + page - 1) &^ (page - 1)
	memory, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return mapped[T]{}, fmt.Errorf("mmap what BPF programs share: %w", err)
	}
	return mapped[T]{(*T)(unsafe.Pointer(unsafe.SliceData(memory))), memory}, nil
}

// unmap may be called where nothing is mapped.
func (m *mapped[T]) unmap() error {
	if m.memory == nil {
		return nil
	}
	return unix.Munmap(m.memory)
}
