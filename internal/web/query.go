// SPDX-License-Identifier: Apache-2.0

package web

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/fintrace/fintrace/internal/events"
	"github.com/fintrace/fintrace/internal/limits"
)

const (
	// listUsual is how many connections are listed where no limit is given.
	listUsual = 1000
	// listMost bounds an answer to some megabytes.
	listMost = 10_000
	// valuesMost bounds what each connection is compared with while the loop waits.
	valuesMost = 100
)

// parameters are those of connections, in the order of the flags of `list`.
var parameters = []string{"overdue", "port", "peer", "process", "proxy", "netns", "side", "stage", "min_duration", "limit"}

// parseQuery reads the parameters that select connections: the words of the
// flags, with _ for -.
func (h *handler) parseQuery(raw string) (Query, error) {
	q := Query{Limit: listUsual}
	values, err := url.ParseQuery(raw)
	if err != nil {
		return Query{}, fmt.Errorf("the query is of the form name=value&name=value: %w", err)
	}
	for name := range values {
		if !slices.Contains(parameters, name) {
			return Query{}, fmt.Errorf("the parameters are %s, not %q", strings.Join(parameters, ", "), name)
		}
	}
	for _, name := range parameters {
		given := values[name]
		switch name {
		case "port", "peer": // several are separated by commas, as after their flags
			given = strings.Split(strings.Join(given, ","), ",")
			if len(values[name]) == 0 {
				given = nil
			}
		case "process", "proxy", "netns":
		default:
			if len(given) > 1 {
				return Query{}, fmt.Errorf("%s: it is given %d times", name, len(given))
			}
		}
		if len(given) > valuesMost {
			return Query{}, fmt.Errorf("%s: %d values, of at most %d", name, len(given), valuesMost)
		}
		for _, value := range given {
			if err := h.set(&q, name, value); err != nil {
				return Query{}, fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return q, nil
}

func (h *handler) set(q *Query, name, value string) (err error) {
	f := &q.Filter
	switch name {
	case "overdue":
		switch value {
		case "1", "true":
			q.Overdue = true
		case "0", "false":
		default:
			return fmt.Errorf("it is 1 or 0, not %q", value)
		}
	case "port":
		err = add(&f.Ports, value, limits.ParsePort)
	case "peer":
		err = add(&f.Peers, value, limits.ParsePeer)
	case "process":
		err = add(&f.Processes, value, named)
	case "proxy":
		err = add(&f.Proxies, value, named)
	case "netns":
		err = add(&f.Netns, value, h.parseNetns)
	case "side":
		f.Side, err = events.ParseSide(value)
	case "stage":
		f.Stage, err = events.ParseStage(value)
	case "min_duration":
		f.MinDuration, err = limits.ParseDuration(value)
	case "limit":
		q.Limit, err = strconv.Atoi(value)
		if err != nil || q.Limit < 1 || q.Limit > listMost {
			return fmt.Errorf("a limit is a number from 1 to %d, not %q", listMost, value)
		}
	}
	return err
}

func add[T any](list *[]T, value string, parse func(string) (T, error)) error {
	v, err := parse(value)
	*list = append(*list, v)
	return err
}

func named(value string) (string, error) {
	if value == "" {
		return "", errors.New("it is a name, and not empty")
	}
	return value, nil
}

// parseNetns takes no paths, as the flag does: who asks is not who may open files.
func (h *handler) parseNetns(value string) (uint32, error) {
	if n, err := strconv.ParseUint(value, 10, 32); err == nil {
		return uint32(n), nil
	}
	if h.Netns != nil && value != "" && !strings.ContainsAny(value, "/\x00") {
		if inode, err := h.Netns(value); err == nil {
			return inode, nil
		}
	}
	return 0, fmt.Errorf("a network namespace is a name in /run/netns or an inode number, not %q", value)
}
