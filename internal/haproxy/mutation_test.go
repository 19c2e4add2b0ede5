// SPDX-License-Identifier: Apache-2.0

package haproxy_test

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fintrace/fintrace/internal/haproxy"
	"github.com/fintrace/fintrace/internal/haproxytest"
)

var (
	mutations = flag.Int("mutations", 150, "how many files to mutate for each version")
	seed      = flag.Uint64("seed", 1, "of what tests make at random")
)

// What a HAProxy accepts is read without an error: realistic files with a
// mistake or two in the lines that the reader is strict about.
func TestMutations(t *testing.T) {
	for name, value := range variables {
		t.Setenv(name, value)
	}
	for i, v := range haproxytest.Versions(t) {
		if v.AtLeast(2, 4) {
			t.Run(v.Name, func(t *testing.T) { testMutations(t, v, rand.New(rand.NewPCG(uint64(i), *seed))) })
		}
	}
}

func testMutations(t *testing.T, v haproxytest.Version, random *rand.Rand) {
	mutations := *mutations
	version, err := haproxy.ParseVersion(v.Text)
	if err != nil {
		t.Fatal(err)
	}
	var bases []string
	all := files(t)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		sources := load(t, all[name])
		if _, err := haproxy.Parse(sources, haproxy.Options{Version: version, Env: variables, EnvComplete: true}); err == nil && len(sources) == 1 {
			bases = append(bases, string(sources[0].Text))
		}
	}
	dir, err := os.MkdirTemp(filepath.Join(v.Root, "/tmp"), "haproxy-mutations")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	texts := make([]string, mutations)
	paths := make([]string, mutations)
	for i := range texts {
		texts[i] = mutate(random, bases[random.IntN(len(bases))])
		paths[i] = filepath.Join(dir, fmt.Sprintf("%d.cfg", i))
		if err := os.WriteFile(paths[i], []byte(texts[i]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	theirs := make([]verdict, mutations)
	inParallel(mutations, func(i int) { theirs[i] = check(t, v, v.Inside(paths[i])) })
	accepted, both, lenient := 0, 0, 0
	for i, text := range texts {
		_, err := haproxy.Parse([]haproxy.Source{{Name: "mutation.cfg", Text: []byte(text)}},
			haproxy.Options{Version: version, Env: variables, EnvComplete: true})
		switch {
		case theirs[i].ok && err != nil:
			t.Errorf("HAProxy accepts what the reader refuses: %v\n%s\n%s", err, theirs[i].output, text)
		case theirs[i].ok:
			accepted++
		case err != nil:
			both++
		default:
			lenient++
			if testing.Verbose() {
				_, why, _ := strings.Cut(theirs[i].output, "[ALERT]")
				why, _, _ = strings.Cut(why, "\n")
				t.Logf("only HAProxy refuses:%s", why)
			}
		}
	}
	t.Logf("%d accepted by both, %d refused by both, %d by HAProxy alone", accepted, both, lenient)
	if accepted < mutations/5 || both < mutations/10 {
		t.Error("the mutations show little")
	}
}

// strict begin the lines that the reader has an opinion on.
var strict = []string{"global", "defaults", "frontend", "backend", "listen", "maxconn", "fullconn", "nbthread", "ulimit-n", "fd-hard-limit",
	"hard-stop-after", "timeout", "mode", "option", "no", "bind", "server", "server-template", "default-server", "default_backend",
	"use_backend", "disabled", "enabled", "stats", "setenv", ".if", ".elif", ".else", ".endif"}

// spare are words to put in the place of others: mostly one of a kind with them.
var spare = map[string][]string{
	"number": {"0", "1", "10", "007", "+5", "-1", "10k", "many", "4294967296", "99999999999999999999", "\"$LIMIT\"", "\"${UNSET-7}\"", "'8'", "1\\x30"},
	"time":   {"0", "1", "99", "1s", "30s", "1m", "2h", "1d", "24d", "25d", "5us", "1h30", "2.5s", "-1s", "1w", "\"$CLIENT\"s", "'1's", "2147483647", "2147483648"},
	"address": {":8089", "*:90", ":0", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:80-90", "127.0.0.1:90-80", "[::1]:99", "::1", ":::77", "[::]:78", ":99x", "abns@x",
		"/x", "ipv4@:90", "ipv6@:91", "fd@7", "127.0.0.1:+10", "127.0.0.1:-10", "0.0.0.0", "*", "${ADDR}:80", "\"$ADDR:81\"", ":80,:81", ":80,", ":65535", ":65536", ""},
	"word": {"tcp", "http", "log", "client", "client-fin", "server", "server-fin", "tunnel", "connect", "check", "queue", "maxconn", "interface", "lo", "ssl",
		"verify", "none", "disabled", "enabled", "from", "global", "a", "b", "x!", "\"\"", "''", "\"${UNSET}\"", "'", "\"", "\\", "\\x41", "\\#", "#", "nolinger",
		"tcpka", "httpchk", "socket", "weight", "inter", "backup", "send-proxy", "accept-proxy", "v4v6", "v6only", "defer-accept", "name", "id", "cookie",
		"timeout", "bind", "defaults", ".if", ".endif", "defined(LIMIT)", "!1", "1"},
}

// kind is what a word of a configuration is.
func kind(word string) string {
	switch {
	case strings.Trim(word, "0123456789") == "":
		return "number"
	case strings.Trim(word, "0123456789smhdu") == "" && word[0] <= '9':
		return "time"
	case strings.ContainsAny(word, ":/@"), strings.Count(word, ".") == 3:
		return "address"
	}
	return "word"
}

// mutate changes a line, and now and then two.
func mutate(random *rand.Rand, text string) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for range 1 + random.IntN(4)/3 {
		var candidates []int
		for i, line := range lines {
			if words := strings.Fields(line); len(words) > 0 && slices.Contains(strict, words[0]) {
				candidates = append(candidates, i)
			}
		}
		if len(candidates) == 0 {
			return text
		}
		i := candidates[random.IntN(len(candidates))]
		other := candidates[random.IntN(len(candidates))]
		words := strings.Fields(lines[i])
		at := random.IntN(len(words))
		choices := spare[kind(words[at])]
		word := choices[random.IntN(len(choices))]
		switch random.IntN(14) {
		case 0: // drop a word
			words = slices.Delete(words, at, at+1)
		case 1: // say it twice
			words = slices.Insert(words, at, words[at])
		case 2, 3, 4, 5: // another word
			words[at] = word
		case 6: // one more
			words = slices.Insert(words, at+1, word)
		case 7: // one more at the end
			words = append(words, word)
		case 8: // cut it off
			words = words[:at]
		case 9: // a letter less
			if n := len(words[at]); n > 1 {
				j := random.IntN(n)
				words[at] = words[at][:j] + words[at][j+1:]
			}
		case 10: // the line again, elsewhere
			lines = slices.Insert(lines, other, lines[i])
			continue
		case 11: // without the line
			lines = slices.Delete(lines, i, i+1)
			continue
		case 12: // in another place
			lines[i], lines[other] = lines[other], lines[i]
			continue
		case 13: // quoted
			words[at] = `"` + words[at] + `"`
		}
		lines[i] = "    " + strings.Join(words, " ")
	}
	return strings.Join(lines, "\n") + "\n"
}
