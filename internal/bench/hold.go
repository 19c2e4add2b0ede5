// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// A holdRequest is for connections that stay as they are. Minisocks in
// FIN_WAIT2 stay for tcp_fin_timeout, 60 s, as do those in TIME_WAIT.
type holdRequest struct {
	Worker    int
	Held      int // in FIN_WAIT2, and as many peers in CLOSE_WAIT
	Minisocks int // the same
	Others    others
}

type held struct{}

// files is how many a request takes.
func (r *holdRequest) files() int {
	n := 2*r.Held + r.Minisocks
	if r.Others.Kind == "established" {
		n += r.Others.Number
	}
	return n
}

// fill makes connections, of each request after those of the one before, by as
// many processes as it takes: each may have only so many files open. They stay
// until release.
func fill(requests ...holdRequest) (release func() error, err error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read the limit of open files: %w", err)
	}
	const other = 100 // files that are not sockets
	files := 0
	for _, r := range requests {
		files += r.files()
	}
	workers := max(runtime.NumCPU(), 1+files/(int(limit.Max)-other))
	var holders []*holder
	release = func() (err error) {
		for _, h := range holders {
			err = errors.Join(err, h.close())
		}
		return err
	}
	for range workers {
		h, err := startHolder()
		if err != nil {
			return nil, errors.Join(err, release())
		}
		holders = append(holders, h)
	}
	for _, r := range requests {
		for worker, h := range holders {
			share := func(n int) int { return (n + worker) / workers }
			if err := h.requests.Encode(holdRequest{
				Worker: worker, Held: share(r.Held), Minisocks: share(r.Minisocks),
				Others: others{r.Others.Kind, share(r.Others.Number)},
			}); err != nil {
				return nil, errors.Join(err, release())
			}
		}
		for _, h := range holders {
			var reply held
			if err := h.replies.Decode(&reply); err != nil {
				return nil, errors.Join(fmt.Errorf("hold: %w", err), release())
			}
		}
	}
	return release, nil
}

// A holder is a process that has connections, in the caller's namespace.
type holder struct {
	cmd      *exec.Cmd
	in       io.Closer
	requests *json.Encoder
	replies  *json.Decoder
}

func startHolder() (*holder, error) {
	cmd := exec.Command(self, "hold")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &holder{cmd, in, json.NewEncoder(in), json.NewDecoder(out)}, nil
}

// close ends the process, and with it what it holds.
func (h *holder) close() error { return errors.Join(h.in.Close(), h.cmd.Wait()) }

// runHold answers each request when its connections are there, until there are no more.
func runHold(in *json.Decoder, out *json.Encoder) error {
	var c *connector
	for {
		var r holdRequest
		if err := in.Decode(&r); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if c == nil {
			var err error
			if c, err = newConnector(r.Worker); err != nil {
				return err
			}
		}
		if err := r.make(c); err != nil {
			return err
		}
		if err := out.Encode(held{}); err != nil {
			return err
		}
	}
}

func (r *holdRequest) make(c *connector) error {
	for range r.Held {
		client, server, err := c.connect()
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Shutdown(client, unix.SHUT_WR), acknowledge(server)); err != nil {
			return err
		}
	}
	for range r.Minisocks {
		client, server, err := c.connect()
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Close(client), acknowledge(server)); err != nil {
			return err
		}
	}
	switch r.Others.Kind {
	case "established":
		for range r.Others.Number / 2 { // Each has two ends.
			if _, _, err := c.connect(); err != nil {
				return err
			}
		}
	default:
		for range r.Others.Number {
			client, server, err := c.connect()
			if err != nil {
				return err
			}
			if err := errors.Join(unix.Close(client), unix.Close(server)); err != nil {
				return err
			}
		}
	}
	return nil
}
