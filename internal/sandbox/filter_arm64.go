// SPDX-License-Identifier: Apache-2.0

package sandbox

import "golang.org/x/sys/unix"

const (
	architecture = unix.AUDIT_ARCH_AARCH64
	x32          = 0x40000000 // there is none
)

var plainHere = []uint32{unix.SYS_FSTATAT}
