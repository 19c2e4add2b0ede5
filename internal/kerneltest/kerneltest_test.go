// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNamespace(t *testing.T) {
	Require(t)
	outside := inode(t)
	var path string
	t.Run("there", func(t *testing.T) {
		n, other := NewNamespace(t), NewNamespace(t)
		path = n.Path()
		if n.Inode == outside || n.Inode == other.Inode {
			t.Fatalf("inode %d is not that of a namespace of its own", n.Inode)
		}
		n.Sysctl(t, "net.ipv4.tcp_fin_timeout", "7")
		n.Do(func() {
			if got := inode(t); got != n.Inode {
				t.Errorf("runs in %d, want %d", got, n.Inode)
			}
			if got := finTimeout(t); got != "7" {
				t.Errorf("tcp_fin_timeout is %s inside, want 7", got)
			}
			for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
				l, err := net.Listen("tcp", address)
				if err != nil {
					t.Error("lo is not up:", err)
					continue
				}
				l.Close()
			}
		})
		if got := inode(t); got != outside {
			t.Errorf("came back to %d, want %d", got, outside)
		}
		other.Do(func() {
			if got := finTimeout(t); got == "7" {
				t.Error("tcp_fin_timeout is 7 in another namespace too")
			}
		})
	})
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there after the test: %v", path, err)
	}
}

// inode is that of the calling thread's network namespace.
func inode(t *testing.T) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}

func finTimeout(t *testing.T) string {
	t.Helper()
	value, err := os.ReadFile("/proc/sys/net/ipv4/tcp_fin_timeout")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(value))
}
