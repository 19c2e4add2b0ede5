// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"testing"

	"github.com/cilium/ebpf/asm"
)

// TestStack holds each function of the program that most changes of state run to
// the stack that Linux gives it of the kernel's own. From 64 bytes on, rounded up
// to 16, it has another, on a page that is in no cache (BPF_PRIV_STACK_MIN_SIZE,
// round_up_stack_depth(), kernel/bpf/verifier.c).
func TestStack(t *testing.T) {
	const most = 48
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	depth, function := map[string]int{}, ""
	for i := range spec.Programs[bpfProgOnSetState].Instructions {
		ins := &spec.Programs[bpfProgOnSetState].Instructions[i]
		if name := ins.Symbol(); name != "" {
			function = name
			depth[function] = 0
		}
		offset := int64(0)
		switch class := ins.OpCode.Class(); {
		case class.IsStore() && ins.Dst == asm.R10, class.IsLoad() && ins.Src == asm.R10:
			offset = int64(ins.Offset)
		case i > 0 && ins.OpCode.ALUOp() == asm.Add && ins.OpCode.Source() == asm.ImmSource:
			if before := spec.Programs[bpfProgOnSetState].Instructions[i-1]; before.OpCode.ALUOp() == asm.Mov && before.Src == asm.R10 && before.Dst == ins.Dst {
				offset = ins.Constant
			}
		}
		depth[function] = max(depth[function], int(-offset))
	}
	if len(depth) < 3 || depth["usual_change"] == 0 {
		t.Fatalf("the functions have stacks of %v bytes: not those that are known", depth)
	}
	for function, bytes := range depth {
		if bytes > most {
			t.Errorf("%s() has a stack of %d bytes, and more than %d are not the kernel's own", function, bytes, most)
		}
	}
	t.Log(depth)
}
