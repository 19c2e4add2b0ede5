// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func TestExplain(t *testing.T) {
	var (
		good     = host{root: true, btf: true, release: "6.1.0-18-amd64"}
		user     = host{btf: true, release: "6.1.0-18-amd64"}
		noTypes  = host{root: true, release: "6.1.0-18-amd64"}
		old      = host{root: true, btf: true, release: "5.9.16"}
		ancient  = host{root: true, release: "4.19.0-27-amd64"}
		barely   = host{root: true, btf: true, release: "5.10.0-rc7"}
		locked   = host{root: true, btf: true, locked: true, release: "6.1.0-18-amd64"}
		nameless = host{root: true, btf: true, release: "of unknown release"}

		denied      = fmt.Errorf("load the BPF programs: map create: %w (MEMLOCK may be too low)", unix.EPERM)
		unsupported = fmt.Errorf("load the BPF programs: a detail: %w", ebpf.ErrNotSupported)
		rejected    = fmt.Errorf("load the BPF programs: %w", &ebpf.VerifierError{Cause: unix.EACCES, Log: []string{"R1 !read_ok"}})
		full        = fmt.Errorf("load the BPF programs: %w", unix.ENOMEM)
	)
	const (
		asRoot   = "no permission to use BPF: run it as root, for example with sudo"
		boxed    = "no permission to use BPF although this is root: a container or a service needs CAP_BPF and CAP_PERFMON, CAP_SYS_PTRACE for processes and CAP_SYS_ADMIN for other network namespaces (and --pid=host)"
		needsBTF = "this kernel (6.1.0-18-amd64) does not show its types in /sys/kernel/btf/vmlinux: fintrace needs one built with CONFIG_DEBUG_INFO_BTF=y"
	)
	for _, test := range []struct {
		name string
		host host
		err  error
		want string
	}{
		{"not root", user, denied, asRoot},
		{"root without the capability", good, denied, boxed},
		{"no BTF", noTypes, unsupported, needsBTF},
		{"too old", old, unsupported, "this kernel (5.9.16) is too old: fintrace needs Linux 5.10 or later"},
		{"too old, in the verifier's words", old, rejected, "this kernel (5.9.16) is too old: fintrace needs Linux 5.10 or later"},
		{"too old and no BTF", ancient, unsupported, "this kernel (4.19.0-27-amd64) is too old: fintrace needs Linux 5.10 or later"},
		{"new enough, yet something is missing", barely, unsupported, "this kernel (5.10.0-rc7) lacks something that fintrace needs: " + unsupported.Error()},
		{"a release that is no number", nameless, unsupported, "this kernel (of unknown release) lacks something that fintrace needs: " + unsupported.Error()},
		{"the verifier's EACCES is not about permission", user, rejected, rejected.Error()},
		{"locked down", locked, rejected, "this kernel is locked down (confidentiality): no BPF program may read its memory"},
		{"nothing to be done", good, full, full.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := test.host.explain(test.err)
			if got.Error() != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if !errors.Is(got, test.err) {
				t.Error("the cause is no longer in the error")
			}
		})
	}
}
