// SPDX-License-Identifier: Apache-2.0

package web

import (
	"strings"
	"testing"
)

func FuzzParseQuery(f *testing.F) {
	for _, query := range []string{
		"", "overdue=1&port=443,8443&peer=198.51.100.0/24&process=haproxy&proxy=https&netns=4026531840&side=inbound&stage=held&min_duration=1m&limit=5",
		"limit=0", "port=443&port=80", "side=up", "peer=::ffff:10.0.0.0/104", "a%", "netns=blue",
	} {
		f.Add(query)
	}
	h := &handler{}
	f.Fuzz(func(t *testing.T, query string) {
		q, err := h.parseQuery(query)
		if err != nil && strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("more than a line: %q", err)
		}
		if err == nil && (q.Limit < 1 || q.Limit > listMost || q.Filter.MinDuration < 0 || len(q.Filter.Ports) > valuesMost) {
			t.Errorf("%q is %+v", query, q)
		}
	})
}
