// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/fintrace/fintrace/internal/events"
	"golang.org/x/sys/unix"
)

// aligned copies data to where a record may be: at a multiple of 8 bytes.
func aligned(data []byte) []byte {
	if len(data) == 0 {
		return nil
	}
	words := make([]uint64, (len(data)+7)/8)
	out := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(data))
	copy(out, data)
	return out
}

// bytesOf is the record that the kernel side would write.
func bytesOf[T any](record T) []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&record)), unsafe.Sizeof(record))...)
}

func rawEvent() bpfEvent {
	ev := bpfEvent{
		Time: 12345678901, Cookie: 0xc00c1e, Cgroup: 77, Netns: 4026531840, Pid: 1234,
		FinTimeout: 60 * 250, Linger2: -1, Rto: 50, Err: 104, LocalPort: 443, RemotePort: 50123,
		OldState: uint8(events.FinWait2), NewState: uint8(events.Close), Shutdown: rcvShutdown | sndShutdown, Dead: 1, Accepted: 1,
	}
	ev.Local = netip.MustParseAddr("192.0.2.1").As16()
	ev.Remote = netip.MustParseAddr("2001:db8::7").As16()
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&ev.Comm)), 16), "haproxy")
	return ev
}

func rawRow() bpfRow {
	row := bpfRow{
		Time: 12345678901, Cookie: 0xc00c1e, Inode: 99, Netns: 4026531840, FinTimeout: 60 * 250, Rto: 50,
		LastAck: 250, Entry: 1500, Timer: -25, LocalPort: 443, RemotePort: 50123,
		State: uint8(events.FinWait2), Minisock: 1, HasTimer: 1, HasEntry: 1,
	}
	row.Local = netip.MustParseAddr("192.0.2.1").As16()
	row.Remote = netip.MustParseAddr("192.0.2.2").As16()
	return row
}

var hz250 = clock{hz: 250}

func TestDecodeEvent(t *testing.T) {
	var ev events.Event
	if err := hz250.decodeEvent(aligned(bytesOf(rawEvent())), &ev); err != nil {
		t.Fatal(err)
	}
	want := events.Event{
		Time: 12345678901, Cookie: 0xc00c1e, Netns: 4026531840,
		Flow: events.Flow{
			Local:  events.EndpointFrom(netip.MustParseAddrPort("192.0.2.1:443")),
			Remote: events.EndpointFrom(netip.MustParseAddrPort("[2001:db8::7]:50123")),
		},
		Old: events.FinWait2, New: events.Close,
		Process: events.Process{PID: 1234, Cgroup: 77, Comm: [16]byte{'h', 'a', 'p', 'r', 'o', 'x', 'y'}},
		Timers:  events.Timers{FinTimeout: 60 * time.Second, Linger2: -4 * time.Millisecond, RTO: 200 * time.Millisecond},
		Err:     104, RcvShut: true, SndShut: true, Dead: true, Accepted: true,
	}
	if ev != want {
		t.Errorf("%+v\nwant %+v", ev, want)
	}
}

func TestDecodeRow(t *testing.T) {
	flow := events.Flow{
		Local:  events.EndpointFrom(netip.MustParseAddrPort("192.0.2.1:443")),
		Remote: events.EndpointFrom(netip.MustParseAddrPort("192.0.2.2:50123")),
	}
	want := events.Socket{
		Time: 12345678901, Cookie: 0xc00c1e, Inode: 99, Netns: 4026531840, Flow: flow,
		State: events.FinWait2, Stage: events.Minisock,
		Timers:  events.Timers{FinTimeout: 60 * time.Second, RTO: 200 * time.Millisecond},
		LastAck: time.Second, Entry: 1500 * time.Millisecond, Timer: -100 * time.Millisecond, HasTimer: true,
	}
	for _, test := range []struct {
		name   string
		change func(*bpfRow, *events.Socket)
	}{
		{"minisock", func(*bpfRow, *events.Socket) {}},
		{"minisock without a stamp", func(r *bpfRow, s *events.Socket) { r.HasEntry = 0; s.Entry = -1 }},
		{"TIME_WAIT", func(r *bpfRow, s *events.Socket) { r.State, s.State = uint8(events.TimeWait), events.TimeWait }},
		{"held", func(r *bpfRow, s *events.Socket) { r.Minisock = 0; s.Stage, s.Entry = events.Held, -1 }},
		{"orphan", func(r *bpfRow, s *events.Socket) { r.Minisock, r.Dead = 0, 1; s.Stage, s.Entry = events.Orphaned, -1 }},
		{"listener", func(r *bpfRow, s *events.Socket) {
			r.Minisock, r.State = 0, uint8(events.Listen)
			s.Stage, s.State, s.Entry = 0, events.Listen, -1
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			row, want := rawRow(), want
			test.change(&row, &want)
			var s events.Socket
			if err := hz250.decodeRow(aligned(bytesOf(row)), &s); err != nil {
				t.Fatal(err)
			}
			if s != want {
				t.Errorf("%+v\nwant %+v", s, want)
			}
		})
	}
}

// TestIdentity is about kernels that give tracing programs no cookie: the event
// and the minisock of a connection have to meet, and no others.
func TestIdentity(t *testing.T) {
	raw := rawEvent()
	raw.Cookie = 0
	var ev events.Event
	if err := hz250.decodeEvent(aligned(bytesOf(raw)), &ev); err != nil {
		t.Fatal(err)
	}
	if events.IsCookie(ev.Cookie) {
		t.Errorf("%x looks like a cookie", ev.Cookie)
	}
	of := func(change func(*bpfRow)) uint64 {
		t.Helper()
		row := rawRow()
		row.Cookie, row.Netns, row.Device = 0, raw.Netns, raw.Device
		row.Local, row.LocalPort, row.Remote, row.RemotePort = raw.Local, raw.LocalPort, raw.Remote, raw.RemotePort
		change(&row)
		var s events.Socket
		if err := hz250.decodeRow(aligned(bytesOf(row)), &s); err != nil {
			t.Fatal(err)
		}
		return s.Cookie
	}
	if got := of(func(*bpfRow) {}); got != ev.Cookie {
		t.Errorf("the minisock is %x, its event %x", got, ev.Cookie)
	}
	for name, change := range map[string]func(*bpfRow){
		"namespace":   func(r *bpfRow) { r.Netns++ },
		"device":      func(r *bpfRow) { r.Device++ },
		"local":       func(r *bpfRow) { r.Local[15]++ },
		"local port":  func(r *bpfRow) { r.LocalPort++ },
		"remote":      func(r *bpfRow) { r.Remote[15]++ },
		"remote port": func(r *bpfRow) { r.RemotePort++ },
	} {
		if got := of(change); got == ev.Cookie {
			t.Errorf("with another %s it has the same identity", name)
		}
	}
	if got := of(func(r *bpfRow) { r.Cookie = 7 }); got != 7 {
		t.Errorf("its cookie 7 became %x", got)
	}
}

func FuzzDecodeEvent(f *testing.F) {
	whole := bytesOf(rawEvent())
	f.Add(whole, int64(250))
	f.Add(whole[:len(whole)-1], int64(1000))
	f.Add(append(whole, 0), int64(100))
	f.Add([]byte{}, int64(300))
	f.Add(make([]byte, eventSize), int64(250))
	f.Fuzz(func(t *testing.T, data []byte, hz int64) {
		if hz < 1 || hz > 10_000 {
			t.Skip()
		}
		ev := events.Event{Cookie: 1}
		err := clock{hz}.decodeEvent(aligned(data), &ev)
		if len(data) != eventSize {
			want := fmt.Sprintf("a record of %d bytes where the BPF program sends %d", len(data), eventSize)
			if err == nil || err.Error() != want {
				t.Fatalf("error %v, want %s", err, want)
			}
			if ev != (events.Event{Cookie: 1}) {
				t.Fatal("a record of the wrong length was decoded")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := binary.NativeEndian.Uint64(data); uint64(ev.Time) != got {
			t.Fatalf("time %d, want %d", ev.Time, got)
		}
		_ = ev.Old.String() + ev.New.String() + ev.Flow.Local.String() + ev.Flow.Remote.String() + ev.Process.Name()
	})
}

func FuzzDecodeRow(f *testing.F) {
	whole := bytesOf(rawRow())
	f.Add(whole, int64(250))
	f.Add(whole[:len(whole)-1], int64(1000))
	f.Add(append(whole, 0), int64(100))
	f.Add([]byte{}, int64(300))
	f.Add(make([]byte, rowSize), int64(250))
	f.Fuzz(func(t *testing.T, data []byte, hz int64) {
		if hz < 1 || hz > 10_000 {
			t.Skip()
		}
		s := events.Socket{Cookie: 1}
		err := clock{hz}.decodeRow(aligned(data), &s)
		if len(data) != rowSize {
			want := fmt.Sprintf("a row of %d bytes where the BPF program writes %d", len(data), rowSize)
			if err == nil || err.Error() != want {
				t.Fatalf("error %v, want %s", err, want)
			}
			if s != (events.Socket{Cookie: 1}) {
				t.Fatal("a row of the wrong length was decoded")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if s.Entry < -1 || s.LastAck < 0 {
			t.Fatalf("an age below 0: %+v", s)
		}
		if (s.Stage == 0) != (s.State != events.FinWait2 && data[unsafe.Offsetof(bpfRow{}.Minisock)] == 0) {
			t.Fatalf("%v of a socket in %v", s.Stage, s.State)
		}
	})
}

func FuzzParseNamespace(f *testing.F) {
	for _, s := range []string{"net:[4026531840]", "net:[0]", "net:[]", "net:[4294967296]", "net:[-1]", "net:[+1]", "net:[1", "mnt:[1]", "net:[1]]", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		inode, ok := parseNamespace(s)
		digits := strings.TrimSuffix(strings.TrimPrefix(s, "net:["), "]")
		if ok && strings.TrimLeft(digits, "0") != strings.TrimLeft(fmt.Sprint(inode), "0") {
			t.Fatalf("%q is %d", s, inode)
		}
		if again, ok := parseNamespace(fmt.Sprintf("net:[%d]", inode)); !ok || again != inode {
			t.Fatalf("%d is read as %d, %v", inode, again, ok)
		}
	})
}

func FuzzParseMounts(f *testing.F) {
	f.Add("610 29 0:4 net:[4026532245] /run/netns/a\\040b rw shared:5 - nsfs nsfs rw\n")
	f.Add("29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\n1 2\nnet:[1]")
	f.Add("1 2 3 net:[7] /\\134040x - - -")
	f.Fuzz(func(t *testing.T, text string) {
		found, err := parseMounts(strings.NewReader(text))
		if err != nil && !strings.Contains(err.Error(), "token too long") {
			t.Fatal(err)
		}
		for inode, path := range found {
			if path == "" || !strings.Contains(text, "net:[") {
				t.Fatalf("namespace %d at %q", inode, path)
			}
		}
	})
}

func TestParseMounts(t *testing.T) {
	found, err := parseMounts(strings.NewReader("610 29 0:4 net:[7] /run/netns/a\\040b\\134040c rw - nsfs nsfs rw\n"))
	if want := `/run/netns/a b\040c`; err != nil || found[7] != want {
		t.Errorf("%q, %v; want %q", found[7], err, want)
	}
}

func FuzzProtocolCounts(f *testing.F) {
	f.Add("sockets: used 9\nTCP: inuse 5 orphan 1 tw 2 alloc 7 mem 3\nUDP: inuse 2 mem 1\n", "TCP:")
	f.Add("TCP6: inuse 3\n", "TCP6:")
	f.Add("TCP: inuse x", "TCP:")
	f.Add("TCP: inuse", "TCP:")
	f.Add("TCP: inuse 99999999999999999999", "TCP:")
	f.Fuzz(func(t *testing.T, text, prefix string) {
		counts, err := protocolCounts(strings.NewReader(text), prefix)
		if err != nil && counts != nil {
			t.Fatalf("counts %v beside the error %v", counts, err)
		}
		for name, n := range counts {
			if !strings.Contains(text, name) || strings.Count(text, prefix) == 0 {
				t.Fatalf("%q is %d", name, n)
			}
		}
	})
}

func TestProtocolCounts(t *testing.T) {
	const text = "sockets: used 9\nTCP: inuse 5 orphan 1 tw 2 alloc 7 mem 3\nUDP: inuse 8 mem 1\n"
	counts, err := protocolCounts(strings.NewReader(text), "TCP:")
	if err != nil || counts["inuse"] != 5 || counts["tw"] != 2 || len(counts) != 5 {
		t.Errorf("%v, %v", counts, err)
	}
	if _, err := protocolCounts(strings.NewReader("TCP: inuse x"), "TCP:"); err == nil {
		t.Error("a count of x")
	}
}

func FuzzTimeWaitOverflow(f *testing.F) {
	f.Add("TcpExt: SyncookiesSent TCPTimeWaitOverflow Other\nTcpExt: 1 23 4\nIpExt: A\nIpExt: 1\n")
	f.Add("TcpExt: TCPTimeWaitOverflow\nTcpExt:\n")
	f.Add("TcpExt: 1\nTcpExt: 2\n")
	f.Add("TcpExt: TCPTimeWaitOverflow\nTcpExt: -1\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := timeWaitOverflow(strings.NewReader(text))
		if err == nil && !strings.Contains(text, "TCPTimeWaitOverflow") {
			t.Fatalf("%d of nothing", n)
		}
		if err != nil && n != 0 && !strings.Contains(err.Error(), "out of range") {
			t.Fatalf("%d beside the error %v", n, err)
		}
	})
}

func TestTimeWaitOverflow(t *testing.T) {
	n, err := timeWaitOverflow(strings.NewReader("TcpExt: SyncookiesSent TCPTimeWaitOverflow Other\nTcpExt: 1 23 4\n"))
	if err != nil || n != 23 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := timeWaitOverflow(strings.NewReader("TcpExt: Other\nTcpExt: 4\n")); err == nil {
		t.Error("a column that is not there")
	}
}

// diagMessage is an inet_diag_msg of an IPv4 socket, with its attributes.
func diagMessage(state events.State, timer byte, expires, inode uint32, attributes ...byte) []byte {
	b := make([]byte, diagAnswerSize)
	b[0], b[1], b[diagAnswerTimer] = unix.AF_INET, byte(state), timer
	binary.BigEndian.PutUint16(b[4:], 443)
	binary.BigEndian.PutUint16(b[6:], 40001)
	copy(b[8:], []byte{192, 0, 2, 1})
	copy(b[24:], []byte{198, 51, 100, 7})
	binary.NativeEndian.PutUint64(b[diagAnswerCookie:], 0xc00c1e)
	binary.NativeEndian.PutUint32(b[diagAnswerExpires:], expires)
	binary.NativeEndian.PutUint32(b[diagAnswerSize-4:], inode)
	return append(b, attributes...)
}

// tcpInfo is an attribute with the first bytes of a struct tcp_info.
func tcpInfo(rto, lastAck uint32) []byte {
	b := make([]byte, 4+60)
	binary.NativeEndian.PutUint16(b, uint16(len(b)))
	binary.NativeEndian.PutUint16(b[2:], inetDiagInfo)
	binary.NativeEndian.PutUint32(b[4+8:], rto)
	binary.NativeEndian.PutUint32(b[4+56:], lastAck)
	return b
}

func FuzzDecodeDiag(f *testing.F) {
	f.Add(diagMessage(events.FinWait2, 0, 0, 99, tcpInfo(200_000, 1500)...))
	f.Add(diagMessage(events.FinWait2, diagTimerTimeWait, 5000, 0))
	f.Add(diagMessage(events.Listen, 0, 0, 98, 4, 0, 8, 0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, message []byte) {
		s, err := decodeDiag(message)
		if state, cookie, e := decodeFound(message); err == nil && state != 0 && (e != nil || state != s.State || cookie != s.Cookie) {
			t.Errorf("found in %v with cookie %x, %v", state, cookie, e)
		}
		if err != nil {
			return
		}
		if s.State != events.FinWait2 && s.Stage != 0 || s.State == events.FinWait2 && s.Stage == 0 {
			t.Errorf("%v in stage %v", s.State, s.Stage)
		}
		if s.Stage == events.Held && s.Inode == 0 || s.Timer < 0 || s.LastAck < 0 || s.Timers.RTO < 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestDecodeDiag(t *testing.T) {
	flow := events.Flow{
		Local:  events.EndpointFrom(netip.MustParseAddrPort("192.0.2.1:443")),
		Remote: events.EndpointFrom(netip.MustParseAddrPort("198.51.100.7:40001")),
	}
	for _, test := range []struct {
		message []byte
		want    events.Socket
	}{
		{diagMessage(events.FinWait2, 0, 0, 99, tcpInfo(200_000, 1500)...), events.Socket{
			State: events.FinWait2, Stage: events.Held, Inode: 99,
			LastAck: 1500 * time.Millisecond, Timers: events.Timers{RTO: 200 * time.Millisecond},
		}},
		{diagMessage(events.FinWait2, diagTimerKeepalive, 7000, 99), events.Socket{
			State: events.FinWait2, Stage: events.Held, Inode: 99, Timer: 7 * time.Second,
		}},
		{diagMessage(events.FinWait2, diagTimerKeepalive, 7000, 0), events.Socket{
			State: events.FinWait2, Stage: events.Orphaned, Timer: 7 * time.Second, HasTimer: true,
		}},
		{diagMessage(events.FinWait2, 0, 0, 0), events.Socket{State: events.FinWait2, Stage: events.Orphaned}},
		{diagMessage(events.FinWait2, diagTimerTimeWait, 5000, 0), events.Socket{
			State: events.FinWait2, Stage: events.Minisock, Timer: 5 * time.Second, HasTimer: true,
		}},
		{diagMessage(events.Listen, 0, 0, 98), events.Socket{State: events.Listen, Inode: 98}},
	} {
		want := test.want
		want.Cookie, want.Flow, want.Entry = 0xc00c1e, flow, -1
		if got, err := decodeDiag(test.message); err != nil || got != want {
			t.Errorf("%v\n%+v, want\n%+v", err, got, want)
		}
	}
}

func FuzzCgroup(f *testing.F) {
	f.Add("12:pids:/a\n0::/system.slice/haproxy.service\n")
	f.Add("0::/../other\n0::/\n")
	f.Fuzz(func(t *testing.T, text string) {
		path, ok := cgroup2(text)
		if ok && (!strings.Contains(text, "0::"+path) || strings.HasPrefix(path, "/..") || strings.Contains(path, "\n")) {
			t.Errorf("the cgroup %q in %q", path, text)
		}
	})
}

func FuzzPairedLines(f *testing.F) {
	f.Add("Tcp: CurrEstab InSegs\nTcp: 5 -1\nTcpExt: TCPTimeWaitOverflow\nTcpExt: 3\n")
	f.Add("Tcp: CurrEstab\nUdp: 1\n")
	f.Add("Tcp:\nTcp: 1")
	f.Fuzz(func(t *testing.T, text string) {
		counts := map[string]int64{}
		if pairedLines(strings.NewReader(text), counts) == nil && len(counts) > strings.Count(text, " ") {
			t.Errorf("%d counts of %q", len(counts), text)
		}
	})
}
