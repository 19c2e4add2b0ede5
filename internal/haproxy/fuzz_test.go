// SPDX-License-Identifier: Apache-2.0

package haproxy_test

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fintrace/fintrace/internal/haproxy"
)

// Whatever a file says, reading it ends, soon, and everything that is read has
// its place in the file.
func FuzzParse(f *testing.F) {
	err := filepath.WalkDir(corpus, func(path string, _ os.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".cfg" {
			return err
		}
		text, err := os.ReadFile(path)
		f.Add(text)
		return err
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, o := range []haproxy.Options{
			{},
			{Version: debian12, Env: variables, EnvComplete: true},
			{Version: haproxy.Version{Major: 3, Minor: 3, Text: "3.3.0"}, Env: variables},
		} {
			begin := time.Now()
			c, err := haproxy.Parse([]haproxy.Source{{Name: "fuzz.cfg", Text: text}}, o)
			if took := time.Since(begin); took > time.Second+time.Duration(len(text))*10*time.Microsecond {
				t.Errorf("%d bytes take %s", len(text), took)
			}
			v := &verifier{t: t, lines: bytes.Split(text, []byte("\n"))}
			var several haproxy.Errors
			switch {
			case err == nil:
				v.config(c)
			case c != nil:
				t.Error("a configuration beside an error")
			case !errors.As(err, &several) || len(several) == 0:
				t.Errorf("%T is not what errors are", err)
			}
			for _, e := range several {
				v.pos(e.Pos, e.Text)
				if e.Text == "" {
					t.Errorf("%s: an error without words", e.Pos)
				}
			}
		}
	})
}

type verifier struct {
	t     *testing.T
	lines [][]byte
}

// pos verifies that a place is in the file, or just behind the end of a line.
func (v *verifier) pos(p haproxy.Pos, what string) {
	if p.File != "fuzz.cfg" || p.Line < 1 || p.Line > len(v.lines) || p.Column < 1 || p.Column > len(v.lines[p.Line-1])+1 {
		v.t.Errorf("%q is at %s:%d, which is not in the file", what, p, p.Column)
	}
}

// written verifies a setting: its words stand in its line, in their order, unless
// they were quoted, escaped or expanded.
func written[T any](v *verifier, s haproxy.Setting[T], what string) {
	if !s.IsSet() {
		if s.Text != "" || s.Section != "" || s.Undecided {
			v.t.Errorf("%s is not set, and says %+v", what, s)
		}
		return
	}
	v.pos(s.Pos, s.Text)
	if s.Section == "" || s.Text == "" || v.t.Failed() {
		v.t.Errorf("%s at %s is of section %q, in words %q", what, s.Pos, s.Section, s.Text)
		return
	}
	line := string(v.lines[s.Pos.Line-1])
	if strings.ContainsAny(line, `"'\$`) {
		return
	}
	rest := line
	for _, word := range strings.Fields(s.Text) {
		_, after, found := strings.Cut(rest, word)
		if !found {
			v.t.Errorf("%s at %s is %q, not in %q", what, s.Pos, s.Text, line)
			return
		}
		rest = after
	}
}

func (v *verifier) config(c *haproxy.Config) {
	if !slices.Equal(c.Files, []string{"fuzz.cfg"}) {
		v.t.Errorf("files %q", c.Files)
	}
	g := c.Global
	written(v, g.Maxconn, "global maxconn")
	written(v, g.UlimitN, "ulimit-n")
	written(v, g.FDHardLimit, "fd-hard-limit")
	written(v, g.Nbproc, "nbproc")
	written(v, g.Nbthread, "nbthread")
	written(v, g.HardStopAfter, "hard-stop-after")
	for _, s := range g.StatsSockets {
		written(v, s, "stats socket")
	}
	for _, px := range c.Proxies {
		v.pos(px.Pos, px.String())
		written(v, px.Mode, "mode")
		written(v, px.Disabled, "disabled")
		written(v, px.Maxconn, "maxconn")
		written(v, px.Fullconn, "fullconn")
		written(v, px.DefaultBackend, "default_backend")
		for _, name := range slices.Sorted(maps.Keys(px.Timeouts)) {
			written(v, px.Timeouts[name], "timeout "+name)
			if d := px.Timeouts[name].Value; d < 0 || d != d.Truncate(time.Millisecond) {
				v.t.Errorf("timeout %s is %s", name, d)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(px.Options)) {
			written(v, px.Options[name], "option "+name)
		}
		for _, use := range px.UseBackends {
			written(v, use, "use_backend")
		}
		for _, b := range px.Binds {
			v.pos(b.Pos, "bind")
			written(v, b.Maxconn, "maxconn of bind")
			for _, a := range b.Addrs {
				if a.First > a.Last {
					v.t.Errorf("%s has ports %d to %d", a.Text, a.First, a.Last)
				}
			}
		}
		for _, s := range px.Servers {
			v.pos(s.Pos, "server "+s.Name)
			written(v, s.Maxconn, "maxconn of server")
			if s.Count < 1 || s.AnyDest && s.IP.IsValid() {
				v.t.Errorf("server %+v", s)
			}
		}
	}
	for _, n := range c.Notes {
		v.pos(n.Pos, n.Text)
	}
	if v.t.Failed() {
		v.t.Logf("%s", bytes.Join(v.lines, []byte("\n")))
	}
}
