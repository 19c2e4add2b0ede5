// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"net"
	"testing"

	"github.com/fintrace/fintrace/internal/kerneltest"
)

// connected makes a connection to a listener at an address in a namespace.
func connected(t *testing.T, ns *kerneltest.Namespace, at string) (client, server *net.TCPConn) {
	t.Helper()
	var (
		listener net.Listener
		dialed   net.Conn
		err      error
	)
	ns.Do(func() {
		if listener, err = net.Listen("tcp", at); err == nil {
			dialed, err = net.Dial("tcp", listener.Addr().String())
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close(); dialed.Close() })
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialed.(*net.TCPConn), accepted.(*net.TCPConn)
}
