// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// What runs in a network namespace of its own is a part of this program that
// runs as another process: a request in JSON comes in, and a reply goes out. It
// stays until its input ends; the namespace, with all that is left of its
// connections, ends with it.
var parts = map[string]func(*json.Decoder) (any, error){
	"load":     part(runLoad),
	"notice":   part(runNotice),
	"snapshot": part(runSnapshot),
	"start":    part(runStart),
	"steps":    part(runSteps),
	"toggled":  part(runToggled),
	"tracker":  part(runTracker),
	"tracked":  part(runTracked),
}

// self is this very program, also where another has taken its path.
const self = "/proc/self/exe"

func part[Request, Reply any](fn func(Request) (Reply, error)) func(*json.Decoder) (any, error) {
	return func(in *json.Decoder) (any, error) {
		var request Request
		if err := in.Decode(&request); err != nil {
			return nil, err
		}
		return fn(request)
	}
}

// runPart is main for a part.
func runPart(name string) error {
	if name == "hold" {
		return runHold(json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout))
	}
	fn, ok := parts[name]
	if !ok {
		return fmt.Errorf("there is no part %q", name)
	}
	reply, err := fn(json.NewDecoder(os.Stdin))
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(reply); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// inNamespace runs a part in a new network namespace.
func inNamespace[Reply any](ctx context.Context, name string, request any) (reply Reply, err error) {
	in, err := json.Marshal(request)
	if err != nil {
		return reply, err
	}
	var out, failed bytes.Buffer
	cmd := exec.CommandContext(ctx, self, name)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &failed
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		return reply, fmt.Errorf("%s: %w", name, errors.Join(err, errors.New(failed.String())))
	}
	return reply, json.Unmarshal(out.Bytes(), &reply)
}

func makeLoad(ctx context.Context, l load) (loaded, error) {
	return inNamespace[loaded](ctx, "load", l)
}
