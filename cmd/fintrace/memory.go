// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// giveBack returns the memory that only the start has needed: the kernel's types,
// and of the program itself the pages that loading took, which are most of it. What
// runs from here on comes back from the page cache by itself.
func giveBack() {
	debug.FreeOSMemory()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return
	}
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for _, m := range asInFile(string(text), own) {
		// Where it is refused they stay.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.from, m.to-m.from, unix.MADV_DONTNEED)
	}
}

// A mapping is memory of this process, by addresses.
type mapping struct{ from, to uintptr }

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
