// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/kerneltest"
)

// asUnit is a shell's script that starts what follows as the unit does, as far as
// that can be done without systemd: on a file system that is read-only but for
// one directory, where the directory of HAProxy's files is hidden as PrivateTmp= hides it.
const asUnit = `
set -e
mount --bind "$WRITABLE" "$WRITABLE"
mount -t tmpfs tmpfs "$HIDDEN"
mount --bind /proc/sys /proc/sys
for at in / /sys /proc/sys; do
	mount -o remount,bind,ro $at
done
exec setpriv --no-new-privs --inh-caps=-all --bounding-set="$CAPABILITIES" "$@"
`

// TestDaemonPrivileges: with the capabilities of the shipped unit, and no others,
// it sees all that it is to see.
func TestDaemonPrivileges(t *testing.T) {
	kerneltest.Require(t)
	unit, err := os.ReadFile("../../deploy/systemd/fintrace.service")
	if err != nil {
		t.Fatal(err)
	}
	sets := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindAllSubmatch(unit, -1)
	if len(sets) != 1 {
		t.Fatalf("the unit has %d bounding sets", len(sets))
	}
	numbers := map[string]int{"CAP_BPF": unix.CAP_BPF, "CAP_PERFMON": unix.CAP_PERFMON, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
		"CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE, "CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH}
	capabilities, mask := "-all", uint64(0)
	for _, name := range strings.Fields(string(sets[0][1])) {
		number, known := numbers[name]
		if !known {
			t.Fatalf("%s is not known to this test", name)
		}
		capabilities += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
		mask |= 1 << number
	}

	w := newWorld(t)
	w.finTimeout(1)
	w.listen(w.internet, labServer, w.answers)
	proxy := "live-" + inode(w.host)
	w.runs(liveConfig(proxy))
	// The configuration is not root's, and nobody else may read it.
	const nobody = 65534
	config := w.haproxy.ConfigPath()
	if err := os.Chown(config, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	d := newDaemon(t, "")
	d.under = []string{"env", "WRITABLE=" + d.dir, "HIDDEN=" + filepath.Dir(config), "CAPABILITIES=" + capabilities,
		"unshare", "--mount", "--propagation=private", "sh", "-c", asUnit, "sh"}
	d.start()

	// What it needs to attach alone has been given up, where CAP_SETPCAP is not
	// needed for that.
	left := mask &^ (1<<unix.CAP_BPF | 1<<unix.CAP_PERFMON)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"CapEff": fmt.Sprintf("%016x", left), "CapPrm": fmt.Sprintf("%016x", left), "CapBnd": fmt.Sprintf("%016x", mask),
		"CapAmb": strings.Repeat("0", 16), "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if !strings.Contains(string(status), key+":\t"+want+"\n") {
			t.Errorf("it does not run with %s %s:\n%s", key, want, status)
		}
	}

	w.stuck(5, only(labWorker2), labHost+":443")
	d.await("the alert", spoken(inode(w.host), alert.Fired))
	alerts := d.alerts(inode(w.host))
	if len(alerts) != 1 {
		t.Fatalf("there are %d alerts: %+v", len(alerts), alerts)
	}
	a := alerts[0]
	if a.Labels.Process != "haproxy" || a.Labels.Proxy != proxy || a.Maxconn != 50 {
		t.Errorf("the alert is of %+v, maxconn %d", a.Labels, a.Maxconn)
	}
	want := "haproxy.cfg:" + strconv.Itoa(lineOf(t, config, "timeout client")) + " defaults timeout client 1h (client-fin unset); net.ipv4.tcp_fin_timeout 1s"
	if a.LimitSource != want {
		t.Errorf("the limit is %q, want %q", a.LimitSource, want)
	}
	for _, r := range a.Examples {
		if int(r.PID) != w.haproxy.Worker() {
			t.Errorf("an example is %+v, want it to be of process %d", r, w.haproxy.Worker())
		}
	}
	// It is attached. (The kernel may skip single events where others attach.)
	if n, _ := d.metric("fintrace_records_total"); n == 0 {
		t.Error("it has read no record")
	}
	// That is asked of the runtime socket.
	d.awaitMetric(60, "fintrace_haproxy_maxconn", "haproxy="+config)
	// What is read there is of this namespace.
	d.awaitMetric(1, "fintrace_tcp_fin_timeout_seconds", "netns="+inode(w.host))
	if err := await("the state to be kept", func() bool {
		_, err := os.Stat(d.dir + "/alerts.json")
		return err == nil
	}); err != nil {
		t.Error(err)
	}
	// Of others on this host it may say what it likes.
	for _, l := range d.logged(func(l *logLine) bool {
		return l.Message == "not looked at" && (strings.Contains(l.What, filepath.Dir(config)) || strings.Contains(l.What, "CAP_"))
	}) {
		t.Errorf("not looked at: %s", l.What)
	}
	if err := d.end(); err != nil {
		t.Error(err)
	}
}
