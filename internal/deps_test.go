// SPDX-License-Identifier: Apache-2.0

package internal

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/fintrace/fintrace/"

// A room is a package and what it may import beside the standard library.
type room struct {
	may []string // import paths, and what is below them
	why string   // why nothing else
}

const kernelOnly = "all that is asked of the kernel is asked by internal/probe"

var rooms = map[string]room{
	"internal/events":  {why: "everyone uses these words: they depend on nothing"},
	"internal/haproxy": {why: "it knows HAProxy, and nothing of fintrace"},
	"internal/limits": {
		may: []string{module + "internal/events", module + "internal/haproxy"},
		why: "a limit follows from settings alone; " + kernelOnly,
	},
	"internal/track": {
		may: []string{module + "internal/events", module + "internal/haproxy", module + "internal/limits"},
		why: "facts and the time come in as values, and decisions go out as values; " + kernelOnly,
	},
	"internal/report": {
		may: []string{module + "internal/events", module + "internal/haproxy", module + "internal/limits", module + "internal/track"},
		why: "it renders what it is given; " + kernelOnly,
	},
	"internal/alert": {
		may: []string{module + "internal/events", module + "internal/haproxy", module + "internal/limits", module + "internal/track", module + "internal/report",
			"github.com/prometheus/common/config", "github.com/cenkalti/backoff/v5", "github.com/coreos/go-systemd"},
		why: "it decides from what the table shows, and delivers; " + kernelOnly,
	},
	"internal/metrics": {
		may: []string{module + "internal/alert", module + "internal/events", module + "internal/haproxy", module + "internal/limits", module + "internal/track",
			"github.com/prometheus/client_golang", "github.com/prometheus/client_model", "golang.org/x/sync"},
		why: "it counts and shows what it is given; " + kernelOnly,
	},
	"internal/config": {
		may: []string{
			module + "internal/alert", module + "internal/events", module + "internal/haproxy", module + "internal/limits",
			"github.com/goccy/go-yaml", "github.com/prometheus/common/config",
		},
		why: "it turns the file into settings, and does nothing with them",
	},
	"internal/web": {
		may: []string{module + "internal/events", module + "internal/limits", module + "internal/track", module + "internal/report",
			module + "internal/alert", "github.com/prometheus/exporter-toolkit"},
		why: "it shows what it is given by functions: it knows neither the loop, nor the metrics' registry; " + kernelOnly,
	},
	"internal/probe": {
		may: []string{module + "internal/events", "github.com/cilium/ebpf", "github.com/mdlayher/netlink", "golang.org/x/sys/unix"},
		why: "it reports facts, and decides nothing about them",
	},
	"internal/sandbox": {
		may: []string{"golang.org/x/net/bpf", "golang.org/x/sys/unix", "kernel.org/pub/linux/libs/security/libcap/psx"},
		why: "it takes from the process what it is told to, and knows nothing of what that does",
	},
	"internal/kernels": {
		may: []string{"golang.org/x/sync/errgroup", "golang.org/x/sys/unix"},
		why: "it boots kernels and runs programs, and has to know nothing of what those do",
	},
	"internal/haproxytest": {
		may: []string{module + "internal/kerneltest", "golang.org/x/sys/unix"},
		why: "it runs the real HAProxy to judge the program by, and has to know nothing of that",
	},
}

// What the pure rooms may not use of the standard library either.
var impure = map[string]string{
	"context":   "nothing waits here",
	"log":       "what happens goes out as values",
	"log/slog":  "what happens goes out as values",
	"net":       "no I/O; addresses are net/netip's",
	"os":        "no I/O",
	"os/exec":   "no I/O",
	"os/signal": "no I/O",
	"sync":      "one goroutine owns the table",
	"runtime":   "no goroutines here",
}

var pure = []string{"internal/events", "internal/limits", "internal/track"}

// TestImports holds the direction of the imports between the rooms.
func TestImports(t *testing.T) {
	seen := map[string]bool{}
	for name, imports := range packages(t) {
		r, isRoom := rooms[name]
		seen[name] = isRoom
		for _, path := range imports {
			switch {
			case strings.HasPrefix(path, module+"cmd/"):
				t.Errorf("%s imports %s: the commands wire the rooms together, and nobody knows them", name, path)
			case !isRoom:
				// The commands may import all; test helpers are no rooms.
			case standard(path):
				if why, bad := impure[path]; bad && slices.Contains(pure, name) {
					t.Errorf("%s imports %s: %s", name, path, why)
				}
			case !slices.ContainsFunc(r.may, func(may string) bool {
				return path == may || !strings.HasPrefix(may, module) && strings.HasPrefix(path, may+"/")
			}):
				t.Errorf("%s imports %s: %s", name, path, r.why)
			}
		}
	}
	for name := range rooms {
		if !seen[name] {
			t.Errorf("there is no %s: has it moved?", name)
		}
	}
}

// standard says whether a path is of the standard library, whose paths begin
// with no host.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// packages reads the imports of the module's packages, tests left aside. It
// reads the files itself, so that the cache of test results knows of them.
func packages(t *testing.T) map[string][]string {
	all := map[string][]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(strings.TrimPrefix(filepath.Dir(path), "../"))
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			all[name] = append(all[name], imported)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
