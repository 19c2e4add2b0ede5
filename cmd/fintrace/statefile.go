// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/report"
	"github.com/fintrace/fintrace/internal/sandbox"
)

// stateFile keeps which alerts fire across restarts. It is written beside the
// loop, which does not wait for a disk.
type stateFile struct {
	path   string // "": none is kept
	log    *slog.Logger
	latest chan pending // holds one
	failed bool         // to write, the last time
}

// pending is what is to be written.
type pending struct {
	path  string
	saved alert.Saved
}

func newStateFile(path string, log *slog.Logger) *stateFile {
	return &stateFile{path: path, log: log, latest: make(chan pending, 1)}
}

// stateMost bounds what is read, in bytes: some thousand alerts are less.
const stateMost = 16 << 20

// read returns what was saved last; what cannot be read is as good as none.
func (s *stateFile) read() (saved alert.Saved, ok bool) {
	if s.path == "" {
		return saved, false
	}
	f, err := os.Open(s.path)
	if err == nil {
		defer f.Close()
		err = json.NewDecoder(io.LimitReader(f, stateMost)).Decode(&saved)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("alerts that were firing before are not known: they fire anew", "error", err)
	}
	return saved, err == nil
}

// save has the state written soon.
func (s *stateFile) save(saved alert.Saved) {
	select {
	case <-s.latest: // Not written yet, and out of date.
	default:
	}
	s.latest <- pending{s.path, saved}
}

func (s *stateFile) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case p := <-s.latest:
			s.write(p)
		}
	}
}

func (s *stateFile) write(p pending) {
	if p.path == "" {
		return
	}
	text, err := json.Marshal(p.saved)
	if err == nil {
		err = sandbox.ReplaceFile(p.path, append(report.EscapeJSON(text), '\n'))
	}
	if err != nil && !s.failed {
		s.log.Warn("which alerts fire cannot be kept: after a restart they fire anew", "error", err)
	}
	s.failed = err != nil
}
