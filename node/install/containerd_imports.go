package install

import (
	"bytes"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// importsKey matches the line that begins the list of imports.
var importsKey = regexp.MustCompile(`^\s*(imports|"imports"|'imports')\s*=\s*\[`)

// insertImport adds a file to the end of a configuration file's imports, so that it is
// read last. It also returns the inserted text.
func insertImport(text, file string) (edited, inserted string) {
	lines := strings.SplitAfter(text, "\n")
	at := 0 // the line before which to insert: in the top level, before the first table
	offset := 0
	for i, line := range lines {
		trimmed := strings.TrimSpace(line)
		if strings.HasPrefix(trimmed, "[") {
			break
		}
		if key := importsKey.FindString(line); key != "" {
			return insertElement(text, offset+len(key), "'"+file+"'")
		}
		if strings.HasPrefix(trimmed, "version") {
			at = i + 1
		}
		offset += len(line)
	}
	inserted = "imports = ['" + file + "']\n"
	if at > 0 && !strings.HasSuffix(lines[at-1], "\n") {
		inserted = "\n" + inserted
	}
	return strings.Join(slices.Insert(lines, at, inserted), ""), inserted
}

// insertElement adds an element to the end of the array of strings whose content
// begins at start.
func insertElement(text string, start int, element string) (edited, inserted string) {
	end := start // of the last element, with its comma if it has one
	comma := true
scan:
	for i := start; i < len(text); i++ {
		switch text[i] {
		case '#':
			for i < len(text) && text[i] != '\n' {
				i++
			}
		case '\'', '"':
			quote := text[i]
			for i++; i < len(text) && text[i] != quote; i++ {
				if quote == '"' && text[i] == '\\' {
					i++
				}
			}
			end, comma = min(i+1, len(text)), false
		case ',':
			end, comma = i+1, true
		case ']':
			break scan
		}
	}
	switch {
	case !comma:
		inserted = ", " + element
	case end > start:
		inserted = " " + element
	default:
		inserted = element
	}
	return text[:end] + inserted + text[end:], inserted
}

// importsToo reports whether the only difference between two texts of a configuration
// file is that the second imports one more file, as its last.
func importsToo(was, is, file string) bool {
	var before, after map[string]any
	if toml.Unmarshal([]byte(was), &before) != nil || toml.Unmarshal([]byte(is), &after) != nil {
		return false
	}
	list, _ := before["imports"].([]any)
	if before == nil {
		before = map[string]any{}
	}
	before["imports"] = append(slices.Clone(list), file)
	return reflect.DeepEqual(before, after)
}

// insertedImport matches what insertImport inserts for a drop-in.
var insertedImport = regexp.MustCompile(`^(\n?imports = \[|,? |)'[^'\n]*pilot\*?\.toml'(\]\n)?$`)

// imported returns the file in the text that insertImport has inserted.
func imported(inserted string) []byte {
	return bytes.Split([]byte(inserted), []byte("'"))[1]
}
