// SPDX-License-Identifier: Apache-2.0

package config

import "strings"

const (
	licence = "# SPDX-License-Identifier: Apache-2.0\n"

	about = `# The configuration of fintrace's daemon: /etc/fintrace/fintrace.yaml.
#
# Every key can be left out, and this file too. What is commented out is the
# default, or an example where that is said. Durations are written 500ms, 30s or
# 1h30m; where a list is taken, a single value is as good.
#
# fintrace daemon --check says whether the file is in order, and what follows
# from it. The daemon reads it again on SIGHUP (systemctl reload fintrace); what
# is not in order changes nothing, and the log says where it is wrong.
`
)

// DefaultFile is the file that is shipped: every key, what it is for and its
// default, all of it commented out.
func DefaultFile() []byte {
	var b strings.Builder
	b.WriteString(licence + about)
	for _, k := range keys(Default()) {
		b.WriteString("\n")
		show(&b, k, "#", "", false)
	}
	return []byte(b.String())
}

// show writes a key, commented out by prefix. The first line of what it has to
// say begins with first in place of indent: the dash of a list.
func show(b *strings.Builder, k key, prefix, indent string, exampled bool) {
	line := func(text string) { b.WriteString(strings.TrimRight(prefix+indent+text, " ") + "\n") }
	help := k.help
	if (k.example || k.items != nil) && !exampled {
		if help != "" {
			help += " "
		}
		help += "For example:"
	}
	for text := range strings.Lines(help) {
		// On the outermost level text and settings are told apart by the space.
		line(strings.TrimSuffix("# "+text, "\n"))
	}
	comment := ""
	if k.aside {
		comment = "#"
	}
	switch {
	case k.items != nil:
		line(comment + k.name + ":")
		known, _ := k.items(0)
		for i, item := range known {
			var text strings.Builder
			show(&text, item, prefix, indent+"    ", true)
			s := text.String()
			if i == 0 {
				// The dash stands before the first key; what is said of it, before that.
				at := strings.LastIndex(strings.TrimSuffix(s, "\n"), "\n") + 1
				dashed := prefix + indent + "  - "
				s = s[:at] + dashed + s[at+len(dashed):]
			}
			b.WriteString(s)
		}
	case k.keys != nil:
		line(comment + k.name + ":")
		for _, below := range k.keys {
			show(b, below, prefix, indent+comment+"  ", exampled)
		}
	default:
		line(comment + k.name + ": " + k.text)
	}
}
