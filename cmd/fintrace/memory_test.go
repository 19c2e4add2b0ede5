// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// TestAsInFile: of a program that was linked dynamically, what the linker has
// written to must not be given back.
func TestAsInFile(t *testing.T) {
	const smaps = `00400000-00b10000 r-xp 00000000 fe:00 12 /opt/a b/fintrace
Size:               7232 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
00b10000-00b20000 r--p 00710000 fe:00 12 /opt/a b/fintrace
Anonymous:            64 kB
00b20000-00b30000 rw-p 00720000 fe:00 12 /opt/a b/fintrace
Anonymous:             0 kB
00b30000-00b40000 r--p 00730000 fe:00 12 /opt/a b/fintrace
Anonymous:             0 kB
7f0000000000-7f0000100000 r-xp 00000000 fe:00 13 /usr/lib/libc.so.6
Anonymous:             0 kB
7f0000200000-7f0000300000 r--p 00000000 00:00 0
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0xb10000}, {0xb30000, 0xb40000}}
	if diff := cmp.Diff(want, asInFile(smaps, "/opt/a b/fintrace"), cmp.AllowUnexported(mapping{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestGiveBack: this process goes on.
func TestGiveBack(t *testing.T) {
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	if len(asInFile(string(text), own)) == 0 {
		t.Errorf("nothing of the program could be given back:\n%s", text)
	}
	giveBack()
	runtime.GC()
}

// TestHugePages: what a table is given is zeroed, and nobody else's.
func TestHugePages(t *testing.T) {
	memory := hugePages()
	var all [][]byte
	for _, bytes := range []int{2048, 4096, 128 << 10, 1 << 20, 128 << 10, 4 << 20, 128 << 10, 2 << 20, 64 << 10} {
		given := memory(bytes)
		if len(given) != bytes || uintptr(unsafe.Pointer(unsafe.SliceData(given)))%8 != 0 {
			t.Fatalf("%d bytes at %p, want %d", len(given), given, bytes)
		}
		if slices.ContainsFunc(given, func(b byte) bool { return b != 0 }) {
			t.Fatalf("of %d bytes not all are zero", bytes)
		}
		for i := range given {
			given[i] = byte(len(all) + 1)
		}
		all = append(all, given)
	}
	for n, given := range all {
		for i := range given {
			if given[i] != byte(n+1) {
				t.Fatalf("byte %d of the memory given as number %d is that of number %d", i, n+1, given[i])
			}
		}
	}
}
