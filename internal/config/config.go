// SPDX-License-Identifier: Apache-2.0

// Package config turns the daemon's YAML file into settings, or says what is
// wrong with it: where, and how to mend it. It does nothing with the settings.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/fintrace/fintrace/internal/alert"
	"github.com/fintrace/fintrace/internal/limits"
)

// Config is what the daemon does. What holds for a key that the file does not
// have is said by Default.
type Config struct {
	HAProxy HAProxy
	// Limits are the user's own rules: the first that selects a connection has it.
	Limits []limits.Rule
	Alerts Alerts
	Sinks  Sinks
	Web    Web
	Log    Log
	// ShutdownTimeout bounds the delivery of what is under way at the end.
	ShutdownTimeout time.Duration

	name  string // of the file; "" without one
	lines []int  // of each of Limits, in the file
}

// HAProxy says where it is; what is empty is found by the processes that run.
type HAProxy struct {
	Config []string // files or directories
	Socket string   // path of the runtime socket
}

// Alerts are the settings of alerts, and where those that fire are remembered.
type Alerts struct {
	alert.Settings
	StateFile string // "": a restart forgets them
}

// Sinks are where alerts go.
type Sinks struct {
	Log           bool
	Webhooks      []alert.WebhookConfig
	Alertmanagers []alert.AlertmanagerConfig
}

// Web is the listener for metrics, the page, the API and health.
type Web struct {
	Listen      []string // host:port; none: no listener
	ConfigFile  string   // of exporter-toolkit: TLS, basic auth; "" has neither
	ExternalURL string   // by which others reach it; "" unknown
}

// Log is how the daemon logs.
type Log struct {
	Level  slog.Level
	Format string // one of Formats
}

// Formats are how the log can be written. Auto is journald's where that reads
// it, else text.
var Formats = []string{"auto", "text", "json", "journald", "syslog"}

// Default is what holds without a file, which is right for a host with HAProxy.
func Default() *Config {
	return &Config{
		Alerts: Alerts{
			Settings:  alert.DefaultSettings(),
			StateFile: "/var/lib/fintrace/alerts.json",
		},
		Sinks: Sinks{Log: true},
		// Exporters have all of 9100 to 9999 by now.
		Web:             Web{Listen: []string{"127.0.0.1:19818"}},
		Log:             Log{Level: slog.LevelInfo, Format: "auto"},
		ShutdownTimeout: 5 * time.Second,
	}
}

// maxSize bounds the file, in bytes: a file of settings is not longer, what is
// longer is another file.
const maxSize = 1 << 20

// Load reads a file, and checks that the files which it names for secrets and
// certificates are there and hold some. The errors are as of Parse.
func Load(path string) (*Config, error) {
	text, err := readFile(path, maxSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return parse(path, text, true)
}

// Parse reads the text of a file of that name. It does not look at other files.
// An error has a line for each thing that is wrong, in the order of the file:
// name:line:column, the key, and how to mend it.
func Parse(name string, text []byte) (*Config, error) { return parse(name, text, false) }

// readFile reads a regular file of at most so many bytes. Its errors do not
// name it.
func readFile(path string, most int64) ([]byte, error) {
	// O_NONBLOCK: a FIFO that nobody writes to would not be opened.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, cause(err)
	case info.IsDir():
		return nil, errors.New("is a directory; a file was expected")
	case !info.Mode().IsRegular():
		return nil, errors.New("is no regular file")
	}
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	switch {
	case err != nil:
		return nil, cause(err)
	case int64(len(text)) > most:
		return nil, fmt.Errorf("is larger than %d KiB", most>>10)
	}
	return text, nil
}

// cause is the error without the path.
func cause(err error) error {
	if pathError := (*fs.PathError)(nil); errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
