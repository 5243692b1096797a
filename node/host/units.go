package host

import (
	"bytes"
	"maps"
	"path/filepath"
	"slices"

	"github.com/coreos/go-systemd/v22/unit"
)

// UnitDir is systemd's directory for the administrator's units.
const UnitDir = "/etc/systemd/system"

// unitDirs are systemd's directories of units, by precedence.
var unitDirs = []string{UnitDir, "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// HasUnit reports whether the machine has a unit.
func (h Host) HasUnit(name string) bool {
	return slices.ContainsFunc(unitDirs, func(dir string) bool { return h.Has(filepath.Join(dir, name)) })
}

// UnitFiles returns the files of a unit, in systemd's order: the unit itself, then the
// drop-ins of all directories by name. Of drop-ins with the same name, the first
// directory's is used.
func (h Host) UnitFiles(name string) []string {
	var files []string
	for _, dir := range unitDirs {
		if path := filepath.Join(dir, name); len(files) == 0 && h.Has(path) {
			files = append(files, path)
		}
	}
	dropIns := map[string]string{}
	for _, dir := range slices.Backward(unitDirs) {
		found, _ := h.Glob(filepath.Join(dir, name+".d", "*.conf"))
		for _, f := range found {
			dropIns[filepath.Base(f)] = f
		}
	}
	for _, base := range slices.Sorted(maps.Keys(dropIns)) {
		files = append(files, dropIns[base])
	}
	return files
}

// unitSettings returns the settings of a unit's file, or none if it can't be read.
func (h Host) unitSettings(file string) []*unit.UnitOption {
	text, err := h.ReadFile(file)
	if err != nil {
		return nil
	}
	settings, err := unit.DeserializeOptions(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	return settings
}

// HasSystemd reports whether systemd is installed on the machine.
func (h Host) HasSystemd() bool {
	for _, dir := range []string{"/usr/lib/systemd/system", "/lib/systemd/system"} {
		if info, err := h.Stat(dir); err == nil && info.IsDir() {
			return true
		}
	}
	return false
}
