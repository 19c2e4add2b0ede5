// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// TestCloseWait: of a pair of sockets, the one whose peer has closed is listed,
// with its holder, and no other.
func TestCloseWait(t *testing.T) {
	kerneltest.Require(t)
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(network, func(t *testing.T) {
			ns := kerneltest.NewNamespace(t)
			var lookup Lookup
			defer func() { lookup.Close() }()
			client, server := connected(t, ns, network)
			if sockets, err := lookup.CloseWait(ns.Inode); err != nil || len(sockets) != 0 {
				t.Fatalf("before: %v, %v", sockets, err)
			}
			before, err := lookup.Statistics(ns.Inode)
			if err != nil {
				t.Fatal(err)
			}
			if before["Tcp CurrEstab"] != 2 {
				t.Errorf("%d established, want both ends", before["Tcp CurrEstab"])
			}
			client.Close()
			var sockets []events.Socket
			for deadline := time.Now().Add(10 * time.Second); len(sockets) == 0 && time.Now().Before(deadline); {
				if sockets, err = lookup.CloseWait(ns.Inode); err != nil {
					t.Fatal(err)
				}
			}
			want := events.Flow{
				Local:  events.EndpointFrom(netip.MustParseAddrPort(server.LocalAddr().String())),
				Remote: events.EndpointFrom(netip.MustParseAddrPort(server.RemoteAddr().String())),
			}
			if len(sockets) != 1 || sockets[0].Flow != want || sockets[0].Netns != ns.Inode || sockets[0].State != events.CloseWait {
				t.Fatalf("%+v, want %+v", sockets, want)
			}
			owners, err := new(Probe).Owners(events.CloseWait, []uint64{sockets[0].Inode})
			if err != nil {
				t.Error(err)
			}
			if owner := owners.Of(sockets[0].Inode); int(owner.PID) != os.Getpid() {
				t.Errorf("it is held by %d, want %d", owner.PID, os.Getpid())
			}
			// The client's end is a minisock once the ACK of its FIN has come.
			tw := int64(0)
			for deadline := time.Now().Add(10 * time.Second); tw == 0 && time.Now().Before(deadline); {
				after, err := lookup.Statistics(ns.Inode)
				if err != nil {
					t.Fatal(err)
				}
				tw = after["TCP tw"]
			}
			if tw != 1 {
				t.Errorf("%d in the timewait table, want the client's", tw)
			}
		})
	}
}

func TestPairedLines(t *testing.T) {
	got := map[string]int64{}
	const text = "Ip: A B\nIp: 1 -2\nTcpExt: C\nTcpExt: 3\n\n"
	if err := pairedLines(strings.NewReader(text), got); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"Ip A": 1, "Ip B": -2, "TcpExt C": 3} {
		if n, ok := got[name]; !ok || n != want {
			t.Errorf("%s is %d (%v), want %d", name, n, ok, want)
		}
	}
	if err := pairedLines(strings.NewReader("Ip: A\nIp: x\n"), got); err == nil {
		t.Error("x is taken for a number")
	}
}
