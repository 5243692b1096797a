package node

import (
	"bytes"
	"slices"
	"strings"
)

// insertImport makes a configuration file import another, and returns what it
// has inserted.
func insertImport(text, file string) (edited, inserted string) {
	lines := strings.SplitAfter(text, "\n")
	at := 0 // where a line of the top level can stand: before the first table
	for i, line := range lines {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "[") {
			break
		}
		if rest, ok := strings.CutPrefix(trimmed, "imports"); ok && strings.HasPrefix(strings.TrimLeft(rest, " \t="), "[") {
			inserted = "'" + file + "', "
			if strings.HasPrefix(strings.TrimSpace(trimmed[strings.Index(trimmed, "[")+1:]), "]") {
				inserted = "'" + file + "'"
			}
			bracket := strings.Index(line, "[") + 1
			lines[i] = line[:bracket] + inserted + line[bracket:]
			return strings.Join(lines, ""), inserted
		}
		if strings.HasPrefix(trimmed, "version") {
			at = i + 1
		}
	}
	inserted = "imports = ['" + file + "']\n"
	if at > 0 && !strings.HasSuffix(lines[at-1], "\n") {
		inserted = "\n" + inserted
	}
	return strings.Join(slices.Insert(lines, at, inserted), ""), inserted
}

// imported returns the file that what insertImport has inserted imports.
func imported(inserted string) []byte {
	return bytes.Split([]byte(inserted), []byte("'"))[1]
}
