// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// anAddress is one that nothing listens on and no client is given: the port is
// below theirs, and the address is this process's own.
func anAddress() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.77.%d.%d:%d", pid>>8&0xff, pid&0xff, 20000+addresses.Add(1))
}

var addresses atomic.Int32

// A receiver is a webhook that works.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	alerts []received
}

type received struct {
	alertRecord
	at time.Time
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		at := time.Now()
		var body struct{ Alerts []alertRecord }
		if err := json.NewDecoder(request.Body).Decode(&body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, a := range body.Alerts {
			r.alerts = append(r.alerts, received{a, at})
		}
	}))
	t.Cleanup(r.Close)
	return r
}

// about are those that it has been told of a namespace.
func (r *receiver) about(ns *kerneltest.Namespace, events ...alert.Event) (alerts []received) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.alerts {
		if a.Labels.Netns == inode(ns) && (len(events) == 0 || slices.Contains(events, a.Event)) {
			alerts = append(alerts, a)
		}
	}
	return alerts
}

// await waits for the nth such alert.
func (r *receiver) await(t *testing.T, n int, ns *kerneltest.Namespace, events ...alert.Event) received {
	t.Helper()
	if err := await(fmt.Sprintf("the webhook to be told %v %d times", events, n), func() bool { return len(r.about(ns, events...)) >= n }); err != nil {
		t.Fatalf("%v: %+v", err, r.about(ns))
	}
	return r.about(ns, events...)[n-1]
}

// TestDaemonLog has the log fail in every way: alerts reach others, and the
// daemon answers and ends.
func TestDaemonLog(t *testing.T) {
	kerneltest.Require(t)
	pipe := func(t *testing.T) (reader, writer *os.File) {
		t.Helper()
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			reader.Close()
			writer.Close()
		})
		return reader, writer
	}
	full := func(t *testing.T) (reader, writer *os.File) {
		reader, writer = pipe(t)
		size, err := unix.FcntlInt(writer.Fd(), unix.F_GETPIPE_SZ, 0)
		if err == nil {
			_, err = writer.Write(slices.Repeat([]byte{'\n'}, size))
		}
		if err != nil {
			t.Fatal(err)
		}
		return reader, writer
	}
	for _, test := range []struct {
		name   string
		stderr func(t *testing.T) (reader, writer *os.File)
		// fails: alerts cannot be written; lost: nor can other lines, which is noticed.
		fails, lost bool
		mend        bool // the reader goes on
	}{
		{name: "a full disk", fails: true, lost: true, stderr: func(t *testing.T) (_, writer *os.File) {
			writer, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { writer.Close() })
			return nil, writer
		}},
		{name: "nobody reads", fails: true, stderr: full},
		{name: "nobody reads for a while", fails: true, stderr: full, mend: true},
		{name: "the reader is gone", fails: true, lost: true, stderr: func(t *testing.T) (_, writer *os.File) {
			reader, writer := pipe(t)
			reader.Close()
			return nil, writer
		}},
		{name: "closed", stderr: func(t *testing.T) (reader, writer *os.File) { return nil, nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ns := kerneltest.NewNamespace(t)
			hook := newReceiver(t)
			reader, writer := test.stderr(t)
			at := anAddress()
			d := newDaemon(t, limited(ns, "min_connections: 1, resolve_after: 1s, peers_per_group: 0")+fmt.Sprintf(`
sinks: {webhooks: [{url: %q}]}
web: {listen: %q}
shutdown_timeout: 1s
`, hook.URL, at))
			d.at = at
			d.log = func(cmd *exec.Cmd) {
				if writer != nil {
					cmd.Stderr = writer
				} else {
					sh := exec.Command("sh", append([]string{"-c", `exec "$0" "$@" 2>&-`}, cmd.Args...)...)
					cmd.Path, cmd.Args = sh.Path, sh.Args
				}
			}
			d.start()

			first := holdSome(t, ns, 1)
			hook.await(t, 1, ns, alert.Fired)
			if test.fails {
				d.awaitMetric(0, "fintrace_sink_up", "sink=log")
				if n, _ := d.metric("fintrace_sink_failures_total", "sink=log"); n == 0 {
					t.Error("no failure of the log is counted")
				}
			} else if failed, _ := d.metric("fintrace_sink_failures_total", "sink=log"); failed > 0 {
				t.Error("the log fails")
			}
			if up, _ := d.metric("fintrace_sink_up", "sink=webhook"); up != 1 {
				t.Error("the webhook is down")
			}
			if n, _ := d.metric("fintrace_log_lines_lost_total"); (n > 0) != test.lost {
				t.Errorf("%v lines of the log are lost", n)
			}
			first[0].close()
			hook.await(t, 1, ns, alert.Resolved)
			if alerts := d.alerts(inode(ns)); len(alerts) != 0 {
				t.Errorf("there are still %+v", alerts)
			}

			var written []byte
			read := make(chan struct{})
			if test.mend {
				writer.Close()
				go func() {
					defer close(read)
					written, _ = io.ReadAll(reader) // up to its end
				}()
				d.awaitMetric(1, "fintrace_sink_up", "sink=log")
			}
			began := time.Now()
			err := d.end()
			if took := time.Since(began); took > time.Second+2*lastWord+late {
				t.Errorf("it took %s to end", took)
			}
			exit := (*exec.ExitError)(nil)
			if undelivered := test.fails && !test.mend; !undelivered && err != nil || undelivered && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
				t.Errorf("it ends with %v", err)
			}
			if test.mend {
				<-read
				for _, want := range []string{`"msg":"watching"`, `"msg":"alerts cannot be delivered"`, `"event":"resolved"`} {
					if n := strings.Count(string(written), want); n != 1 {
						t.Errorf("%d lines have %s:\n%s", n, want, written)
					}
				}
			}
		})
	}
}
