package node

import (
	"bytes"
	"maps"
	"path/filepath"
	"slices"

	"github.com/coreos/go-systemd/v22/unit"
)

// unitDirs are systemd's directories of units, the one that counts first.
var unitDirs = []string{unitDir, "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// hasUnit reports whether the machine has a unit.
func (o Options) hasUnit(name string) bool {
	return slices.ContainsFunc(unitDirs, func(dir string) bool { return o.has(filepath.Join(dir, name)) })
}

// unitFiles returns the files of a unit inside the root, in systemd's order: the
// unit itself, then its drop-ins by their names, in whichever directory they are.
// Of files with one name, the one of the first directory counts.
func (o Options) unitFiles(name string) []string {
	var files []string
	for _, dir := range unitDirs {
		if path := filepath.Join(dir, name); len(files) == 0 && o.has(path) {
			files = append(files, path)
		}
	}
	dropIns := map[string]string{}
	for _, dir := range slices.Backward(unitDirs) {
		found, _ := o.glob(filepath.Join(dir, name+".d", "*.conf"))
		for _, f := range found {
			dropIns[filepath.Base(f)] = f
		}
	}
	for _, base := range slices.Sorted(maps.Keys(dropIns)) {
		files = append(files, dropIns[base])
	}
	return files
}

// unitSettings returns the settings of a unit's file, none if it can't be read.
func (o Options) unitSettings(file string) []*unit.UnitOption {
	text, err := o.readFile(file)
	if err != nil {
		return nil
	}
	settings, err := unit.DeserializeOptions(bytes.NewReader(text))
	if err != nil {
		return nil
	}
	return settings
}
