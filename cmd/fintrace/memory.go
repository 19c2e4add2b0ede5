// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/track"
)

const hugePage = 2 << 20 // where others have 4 KiB

// hugePages is memory for a table, of which all but the first comes in huge pages
// where the kernel has some: the page faults would take longer than all that is done
// for its connections. The heap may have that much less.
func hugePages() track.Memory {
	var left []byte
	size, advice := hugePage/2, unix.MADV_NOHUGEPAGE // Most tables are smaller.
	return func(bytes int) []byte {
		if len(left) < bytes {
			more, err := aligned(max(bytes, size))
			if err != nil {
				return make([]byte, bytes)
			}
			// Where it is refused the pages are small.
			_ = unix.Madvise(more, advice)
			if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
				debug.SetMemoryLimit(limit - int64(len(more)))
			}
			size, advice = hugePage, unix.MADV_HUGEPAGE
			if bytes >= hugePage {
				return more
			}
			left = more
		}
		taken := left[:bytes:bytes]
		left = left[bytes:]
		return taken
	}
}

// aligned maps memory that begins where a huge page may.
func aligned(bytes int) ([]byte, error) {
	at, err := unix.MmapPtr(-1, 0, nil, uintptr(bytes)+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	before := -uintptr(at) % hugePage
	memory := unsafe.Add(at, before)
	// What is around it stays where it cannot be unmapped, and is not used.
	if before > 0 {
		_ = unix.MunmapPtr(at, before)
	}
	_ = unix.MunmapPtr(unsafe.Add(memory, bytes), hugePage-before)
	return unsafe.Slice((*byte)(memory), bytes), nil
}

// earlyHeap is where the heap grows into first.
var earlyHeap mapping

const earlyBytes = 16 << 20

// startHeap makes memory cheap until giveBack. A start takes megabytes, once: a page
// fault for each 4 KiB of them, and to collect garbage every few, take as long as all
// else that it does.
func startHeap() {
	// Not for this. Nor never: for a heap of gigabytes the runtime takes its own memory
	// in huge pages too (enableMetadataHugePages), megabytes of it.
	collectAt(2000)
	room := uintptr(unsafe.Pointer(unsafe.SliceData(make([]byte, earlyBytes))))
	earlyHeap = mapping{room, room + earlyBytes}
	// Where the kernel has no huge pages the others do.
	earlyHeap.advise(unix.MADV_HUGEPAGE)
	runtime.GC() // It is free from here on.
	collectAt(400)
}

// collectAt has garbage collected when the heap has grown by so many percent, unless
// the user has said when.
func collectAt(percent int) {
	if _, set := os.LookupEnv("GOGC"); !set {
		debug.SetGCPercent(percent)
	}
}

// giveBack returns the memory that only the start has needed: the kernel's types,
// and of the program itself the pages that loading took, which are most of it. What
// runs from here on comes back from the page cache by itself.
func giveBack() {
	// From here on little is garbage, and little has pointers: to collect it often
	// costs little, and not to costs memory.
	collectAt(25)
	// What is given back of a huge page would come back with the rest of it.
	earlyHeap.advise(unix.MADV_NOHUGEPAGE)
	debug.FreeOSMemory()
	// Splits those of which a part is in use: what is free of them is charged till then.
	earlyHeap.advise(unix.MADV_COLD)
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for _, m := range asInFile(string(text), own) {
		// In small pages: a huge one comes back as a whole. Where it is refused they stay.
		m.advise(unix.MADV_NOHUGEPAGE)
		m.advise(unix.MADV_DONTNEED)
	}
}

// A mapping is memory of this process, by addresses.
type mapping struct{ from, to uintptr }

func (m mapping) advise(what uintptr) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.from, m.to-m.from, what)
}

// asInFile finds the mappings of a file in the text of /proc/PID/smaps
// (proc_pid_smaps(5)) that may not be written and have not been: nothing is in them
// but what is in the file, as not where the dynamic linker has relocated.
func asInFile(smaps, file string) (found []mapping) {
	var m mapping
	readOnly := false
	for line := range strings.Lines(smaps) {
		fields := strings.Fields(line)
		if len(fields) >= 6 {
			n, _ := fmt.Sscanf(fields[0], "%x-%x", &m.from, &m.to)
			readOnly = n == 2 && strings.HasPrefix(fields[1], "r-") && strings.Join(fields[5:], " ") == file
		}
		if readOnly && len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" {
			found = append(found, m)
		}
	}
	return found
}
