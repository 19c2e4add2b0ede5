// SPDX-License-Identifier: Apache-2.0

package haproxytest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fintrace/fintrace/internal/kerneltest"
)

func TestVersions(t *testing.T) {
	var before Version
	for _, v := range Versions(t) {
		if !strings.HasPrefix(v.Text, v.Name+".") || v.Name != fmt.Sprintf("%d.%d", v.Major, v.Minor) {
			t.Errorf("%+v contradicts itself", v)
		}
		if v.Name == before.Name || !v.AtLeast(before.Major, before.Minor) {
			t.Errorf("%s comes after %s", v, before)
		}
		before = v
		if ok, output := v.Check(t, config); !ok {
			t.Errorf("%s refuses: %s", v, output)
		}
		if ok, output := v.Check(t, strings.Replace(config, "client", "clients", 1)); ok || !strings.Contains(output, "clients") {
			t.Errorf("%s accepts %v what is wrong: %s", v, ok, output)
		}
	}
}

// config listens on a port and holds who connects and says nothing.
const config = `
defaults
	timeout client 1h
	timeout server 1h
	timeout connect 1h
frontend www
	bind 127.0.0.1:8000
	tcp-request inspect-delay 1h
	tcp-request content accept if { req.len gt 0 }
`

func TestRun(t *testing.T) {
	kerneltest.Require(t)
	for _, v := range Versions(t) {
		for _, mode := range []Mode{Foreground, MasterWorker} {
			t.Run(fmt.Sprintf("%s/%s", v, mode), func(t *testing.T) {
				var processes []int
				var dir string
				t.Run("run", func(t *testing.T) { processes, dir = run(t, v, mode) })
				for _, pid := range processes {
					if state := state(pid); state != "" && state != "Z" {
						t.Errorf("process %d is there after the test, in state %s", pid, state)
					}
				}
				if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is there after the test: %v", dir, err)
				}
			})
		}
	}
}

func run(t *testing.T, v Version, mode Mode) (processes []int, dir string) {
	ns := kerneltest.NewNamespace(t)
	h := Start(t, ns, v, mode, config)
	old := h.Worker()
	if inWorkers := slices.Equal(h.Workers(), []int{old}); !inWorkers || (h.PID() == old) != (mode == Foreground) {
		t.Errorf("pid %d, workers %d, of which %d answers", h.PID(), h.Workers(), old)
	}
	for _, pid := range []int{h.PID(), old} {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) != "haproxy\n" {
			t.Errorf("process %d is %q (%v), want haproxy", pid, comm, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st); err != nil || uint32(st.Ino) != ns.Inode {
			t.Errorf("process %d is in namespace %d (%v), want %d", pid, st.Ino, err, ns.Inode)
		}
		text, err := os.ReadFile(filepath.Join(fmt.Sprintf("/proc/%d/root", pid), v.Inside(h.ConfigPath())))
		if err != nil || !strings.HasPrefix(string(text), config) {
			t.Errorf("process %d sees the configuration %q (%v)", pid, text, err)
		}
	}
	if info := h.Ask("show info"); !strings.Contains(info, "Version: "+v.Text+"\n") {
		t.Errorf("show info of %s: %s", v.Text, info)
	}

	// What holds the old worker when it is told to finish.
	var client net.Conn
	var err error
	ns.Do(func() { client, err = net.Dial("tcp", "127.0.0.1:8000") })
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	awaitText(t, "the connection", func() string { return h.Ask("show info") }, "\nCurrConns: 1\n")

	h.WriteConfig(config + "frontend other\n\tbind 127.0.0.1:8001\n")
	h.Reload()
	processes = append(h.Workers(), h.PID())
	if workers := h.Workers(); len(workers) != 2 || !slices.Contains(workers, old) || h.Worker() == old {
		t.Errorf("workers %d after a reload, of which %d answers, want %d and another", workers, h.Worker(), old)
	}
	if stat := h.Ask("show stat"); !strings.Contains(stat, "\nother,FRONTEND") {
		t.Errorf("the new configuration is not in force: %s", stat)
	}
	if mode == MasterWorker {
		answer := h.AskMaster(fmt.Sprintf("@!%d show info", old))
		if infoPID(answer) != old || !strings.Contains(answer, "\nStopping: 1\n") {
			t.Errorf("the old worker says by the master: %s", answer)
		}
	}
	return processes, h.Dir
}

// awaitText waits until something says a text.
func awaitText(t *testing.T, what string, says func() string, text string) {
	t.Helper()
	said := ""
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if said = says(); strings.Contains(said, text) {
			return
		}
	}
	t.Fatalf("%s: no %q in %s", what, text, said)
}

// state is the letter of a process's state, "" if it is gone.
func state(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return rest[:1]
}
