// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fintrace/fintrace/internal/config"
)

// exposure is the score of the unit by `systemd-analyze security` of systemd 252,
// where 10 is a unit that may do everything.
const exposure = 2.9

const unitFile = "systemd/fintrace.service"

// setting is what a unit says of a key, each time that it does.
func setting(unit, key string) (values []string) {
	for _, m := range regexp.MustCompile(`(?m)^`+key+`=(.*)$`).FindAllStringSubmatch(unit, -1) {
		values = append(values, m[1])
	}
	return values
}

func one(t *testing.T, unit, key string) string {
	t.Helper()
	values := setting(unit, key)
	if len(values) != 1 {
		t.Fatalf("%s says %s %d times", unitFile, key, len(values))
	}
	return values[0]
}

// testedUnit is the unit as a file that systemd-analyze takes: it insists on
// programs that are there.
func testedUnit(t *testing.T) string {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text := read(t, unitFile)
	command := one(t, text, "ExecStart")
	binary, _, _ := strings.Cut(command, " ")
	path := filepath.Join(t.TempDir(), filepath.Base(unitFile))
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "ExecStart="+binary, "ExecStart="+program)), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUnitVerify(t *testing.T) {
	if said := run(t, tool(t, "systemd-analyze"), "verify", "--man=no", testedUnit(t)); said != "" {
		t.Errorf("systemd-analyze verify says:\n%s", said)
	}
}

func TestUnitExposure(t *testing.T) {
	said := run(t, tool(t, "systemd-analyze"), "security", "--offline=true", "--no-pager", testedUnit(t))
	m := regexp.MustCompile(`exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(said)
	if m == nil {
		t.Fatalf("no exposure in what systemd-analyze security says:\n%s", said)
	}
	if is, err := strconv.ParseFloat(m[1], 64); err != nil || is > exposure {
		t.Errorf("the exposure is %s, and was %v:\n%s", m[1], exposure, said)
	}
}

// TestUnitLetsItWork: lines that hardening guides have, and that take away what
// it needs without an error at the start.
func TestUnitLetsItWork(t *testing.T) {
	unit := read(t, unitFile)
	for key, want := range map[string]string{
		"RestrictSUIDSGID":   "no",      // blocks openat2
		"ProtectProc":        "default", // all processes
		"ProcSubset":         "all",     // /proc/sys, /proc/net
		"RestrictNamespaces": "net",     // setns
	} {
		if got := one(t, unit, key); got != want {
			t.Errorf("%s is %s, not %s", key, got, want)
		}
	}
	if got := setting(unit, "DynamicUser"); got != nil {
		t.Errorf("DynamicUser=%s implies RestrictSUIDSGID", got)
	}
	for _, call := range []string{"bpf", "open_by_handle_at", "capset", "seccomp"} {
		filters := setting(unit, "SystemCallFilter")
		if !slices.Contains(strings.Fields(filters[len(filters)-1]), call) {
			t.Errorf("the last SystemCallFilter does not allow %s", call)
		}
	}
	for _, family := range []string{"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} {
		if !slices.Contains(strings.Fields(one(t, unit, "RestrictAddressFamilies")), family) {
			t.Errorf("RestrictAddressFamilies lacks %s", family)
		}
	}
}

// The unit, the DaemonSet and the image start the same.

func TestSameCommand(t *testing.T) {
	want := strings.Fields(one(t, read(t, unitFile), "ExecStart"))
	image := dockerfile(t)
	if got := append(image.entrypoint, image.cmd...); !slices.Equal(got, want) {
		t.Errorf("the image starts %q, the unit %q", got, want)
	}
	container := at[map[string]any](t, daemonSet(t), "spec", "template", "spec", "containers", 0)
	if container["command"] != nil {
		t.Error("the DaemonSet has a command, which is the image's")
	}
	if got := words(t, container, "args"); !slices.Equal(got, want[1:]) {
		t.Errorf("the DaemonSet has the arguments %q, the unit %q", got, want[1:])
	}
}

func TestDaemonSet(t *testing.T) {
	unit := read(t, unitFile)
	d := daemonSet(t)
	pod := at[map[string]any](t, d, "spec", "template", "spec")
	container := at[map[string]any](t, pod, "containers", 0)
	for _, key := range []string{"hostPID", "hostNetwork"} {
		if !at[bool](t, pod, key) {
			t.Errorf("%s is off", key)
		}
	}
	if at[bool](t, pod, "automountServiceAccountToken") {
		t.Error("it has a token")
	}
	security := at[map[string]any](t, container, "securityContext")
	if at[bool](t, security, "privileged") || at[bool](t, security, "allowPrivilegeEscalation") || !at[bool](t, security, "readOnlyRootFilesystem") {
		t.Errorf("securityContext is %v", security)
	}
	if got := words(t, security, "capabilities", "drop"); !slices.Equal(got, []string{"ALL"}) {
		t.Errorf("it drops %q, not ALL", got)
	}
	want := []string{"DAC_OVERRIDE"} // for HAProxies in other containers
	for _, c := range strings.Fields(one(t, unit, "CapabilityBoundingSet")) {
		want = append(want, strings.TrimPrefix(c, "CAP_"))
	}
	if diff := cmp.Diff(want, words(t, security, "capabilities", "add"), cmpopts.SortSlices(strings.Compare)); diff != "" {
		t.Errorf("capabilities of the unit (-) and the DaemonSet (+):\n%s", diff)
	}

	if got, want := "GOMEMLIMIT="+at[string](t, container, "env", 0, "value"), one(t, unit, "Environment"); got != want {
		t.Errorf("the DaemonSet has %s, the unit %s", got, want)
	}
	if got, want := strings.TrimSuffix(at[string](t, container, "resources", "limits", "memory"), "i"), one(t, unit, "MemoryMax"); got != want {
		t.Errorf("the DaemonSet may have %s of memory, the unit %s", got, want)
	}
	if got, want := at[uint64](t, pod, "terminationGracePeriodSeconds"), one(t, unit, "TimeoutStopSec"); strconv.FormatUint(got, 10)+"s" != want {
		t.Errorf("the DaemonSet has %d s to end, the unit %s", got, want)
	}
	for probe, path := range map[string]string{"livenessProbe": "/healthz", "startupProbe": "/healthz", "readinessProbe": "/readyz"} {
		if got := at[string](t, container, probe, "httpGet", "path"); got != path {
			t.Errorf("the %s asks %s", probe, got)
		}
	}

	// Each mount has its volume, and the daemon's directories are among them.
	volumes := map[string]bool{}
	for _, v := range at[[]any](t, pod, "volumes") {
		volumes[at[string](t, v, "name")] = true
	}
	mounts := map[string]bool{}
	for _, m := range at[[]any](t, container, "volumeMounts") {
		mounts[at[string](t, m, "mountPath")] = true
		if name := at[string](t, m, "name"); !volumes[name] {
			t.Errorf("there is no volume %s", name)
		}
	}
	for _, dir := range []string{"/etc/" + one(t, unit, "ConfigurationDirectory"), "/var/lib/" + one(t, unit, "StateDirectory"), "/sys/fs/cgroup"} {
		if !mounts[dir] {
			t.Errorf("nothing is mounted at %s", dir)
		}
	}
	file := filepath.Base(words(t, container, "args")[2])
	settings, err := config.Parse(file, []byte(at[string](t, kind(t, "ConfigMap"), "data", file)))
	if err != nil {
		t.Fatal("the ConfigMap:", err)
	}
	if diff := cmp.Diff([]string{":" + port(t)}, settings.Web.Listen); diff != "" {
		t.Errorf("the ConfigMap's listeners (+):\n%s", diff)
	}
	if dir := filepath.Dir(settings.Alerts.StateFile); !mounts[dir] {
		t.Errorf("nothing is mounted at %s", dir)
	}
	if got := strconv.FormatUint(at[uint64](t, container, "ports", 0, "containerPort"), 10); got != port(t) {
		t.Errorf("the port is %s, and the daemon's %s", got, port(t))
	}
	labels := at[map[string]any](t, d, "spec", "template", "metadata", "labels")
	if diff := cmp.Diff(labels, at[map[string]any](t, d, "spec", "selector", "matchLabels")); diff != "" {
		t.Errorf("labels of the pods (-) and its selector (+):\n%s", diff)
	}
	monitor := documents(t, "kubernetes/podmonitor.yaml")[0]
	if diff := cmp.Diff(labels, at[map[string]any](t, monitor, "spec", "selector", "matchLabels")); diff != "" {
		t.Errorf("labels of the pods (-) and the PodMonitor's selector (+):\n%s", diff)
	}
}

func words(t *testing.T, v any, path ...any) (all []string) {
	t.Helper()
	for _, w := range at[[]any](t, v, path...) {
		all = append(all, w.(string))
	}
	return all
}

// kind is the one object of its kind among those of the DaemonSet.
func kind(t *testing.T, name string) map[string]any {
	t.Helper()
	for _, d := range documents(t, "kubernetes/daemonset.yaml") {
		if d["kind"] == name {
			return d
		}
	}
	t.Fatalf("there is no %s", name)
	return nil
}

func daemonSet(t *testing.T) map[string]any { return kind(t, "DaemonSet") }

type stage struct{ from, name string }

type imageFile struct {
	stages          []stage
	copies          [][]string // of the last stage: from, source, target
	runs            string
	entrypoint, cmd []string
}

// dockerfile reads as much of the Dockerfile as these tests are of. There is no
// docker to build it with where they run.
func dockerfile(t *testing.T) (d imageFile) {
	t.Helper()
	text := strings.ReplaceAll(read(t, "Dockerfile"), "\\\n", " ")
	array := func(s string) (all []string) {
		for _, m := range quoted.FindAllString(s, -1) {
			all = append(all, strings.Trim(m, `"`))
		}
		return all
	}
	for line := range strings.Lines(text) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		fields := strings.Fields(rest)
		switch word {
		case "FROM":
			fields = slices.DeleteFunc(fields, func(s string) bool { return strings.HasPrefix(s, "--") })
			s := stage{from: fields[0]}
			if len(fields) == 3 {
				s.name = fields[2]
			}
			d.stages, d.copies = append(d.stages, s), nil
		case "COPY":
			d.copies = append(d.copies, fields)
		case "RUN":
			d.runs += rest
		case "ENTRYPOINT":
			d.entrypoint = array(rest)
		case "CMD":
			d.cmd = array(rest)
		case "", "#", "ARG", "EXPOSE", "LABEL", "WORKDIR":
		default:
			if !strings.HasPrefix(word, "#") {
				t.Errorf("Dockerfile: %s is not known to its test", word)
			}
		}
	}
	return d
}

func TestDockerfile(t *testing.T) {
	d := dockerfile(t)
	if len(d.stages) != 2 || d.stages[0].name != "build" || d.stages[1].from != "scratch" {
		t.Fatalf("the stages are %v", d.stages)
	}
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read(t, "../go.mod"))[1]
	if !strings.HasPrefix(d.stages[0].from, "golang:"+goVersion+"-") {
		t.Errorf("it is built by %s, and go.mod asks for Go %s", d.stages[0].from, goVersion)
	}
	built := regexp.MustCompile(`CGO_ENABLED=0 .*go build -trimpath .*-o (\S+) \./cmd/fintrace$`).FindStringSubmatch(d.runs)
	if built == nil {
		t.Fatalf("nothing builds a static program: %s", d.runs)
	}
	program := []string{"--from=build", built[1], d.entrypoint[0]}
	if !slices.ContainsFunc(d.copies, func(c []string) bool { return slices.Equal(c, program) }) {
		t.Errorf("nothing copies %s to %s: %q", built[1], d.entrypoint[0], d.copies)
	}
	for _, c := range d.copies {
		if c[0] != "--from=build" {
			t.Errorf("%q comes from the build's directory", c)
		}
	}
	if _, err := os.Stat("../.dockerignore"); err != nil {
		t.Error(err)
	}
}
