package install

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// writtenBy is the first line of the files that make containerd, CRI-O and systemd use
// pilot.
const writtenBy = "# Written by \"pilot node install\"; \"pilot node uninstall\" removes it.\n"

// loadRecord reads the record. If it is missing or damaged, loadRecord rebuilds it from
// the files of the installation, without writing it, and returns why in lost.
//
// A file is taken for pilot's if its whole text is one that an installation writes. What
// it replaced is unknown then: see record.Unsure.
func (o Options) loadRecord() (s record, lost string, err error) {
	s, err = o.readRecord()
	var damaged *host.Conflict
	switch {
	case errors.As(err, &damaged):
		lost, s = damaged.What, record{}
	case err != nil:
		return s, "", err
	case slices.ContainsFunc(s.Files, func(f installed) bool { return connects(f.Path) }):
		return s, "", nil
	case len(s.Files) > 0:
		lost = "it does not list them"
	default:
		lost = "it is missing"
	}
	if a := (adoption{o: o, s: s}); a.all() {
		return a.s, lost, nil
	}
	return s, "", err
}

// adoption rebuilds a record from the files of an installation.
type adoption struct {
	o Options
	s record
	// withoutLazy says that containerd reads a drop-in that does not add pilot's
	// snapshotter, so the units that run it are left over.
	withoutLazy bool
}

// all adopts an installation. It reports false if there is none: no file makes
// containerd or CRI-O use pilot.
func (a *adoption) all() bool {
	had := len(a.s.Files)
	dirs := map[string]bool{}
	for _, config := range containerd.PossibleConfigs(a.o.Host, a.o.Containerd) {
		a.dropIns(config, dirs)
	}
	a.file(crioDropIn, func(text []byte) bool { return string(text) == crioDropInText })
	units, _ := a.o.Glob(filepath.Join(host.UnitDir, "*.service.d", refreshName))
	for _, unit := range units {
		if unit != crioDropIn && a.file(unit, func(text []byte) bool { return refreshUnitText.Match(text) }) {
			dirs[filepath.Dir(unit)] = true
		}
	}
	if len(a.s.Files) == had {
		return false
	}
	a.nriPlugin(containerd.DefaultPlugin, dirs)
	a.file(pilotConfig, isPilotConfig)
	a.file(keyProviders, func(text []byte) bool { return string(text) == keyProvidersText })
	a.file(filepath.Join(host.UnitDir, PilotService+".d", decoderUnit), isEnvironmentUnit)
	a.file(filepath.Join(host.UnitDir, PilotService+".d", lazyUnit), func(text []byte) bool { return string(text) == lazyUnitText })
	for unit, wants := range unitWants {
		path := filepath.Join(host.UnitDir, unit)
		if !a.file(path, func(text []byte) bool { return isUnit(unit, text) }) {
			continue
		}
		if isLazyUnit(unit) && !a.s.Lazy {
			a.s.Lazy, a.s.LazyEnding = true, a.withoutLazy
		}
		link := filepath.Join(host.UnitDir, wants, unit)
		if to, err := a.o.Readlink(link); err == nil && to == path {
			a.s.Files = append(a.s.Files, installed{Path: link, Link: to})
			dirs[filepath.Dir(link)] = true
		}
	}
	a.s.Dirs = append(a.s.Dirs, recordDir)
	a.s.Unsure = append(a.s.Unsure, slices.Collect(maps.Keys(dirs))...)
	a.s.Unsure = append(a.s.Unsure, filepath.Dir(pilotConfig), filepath.Join(host.UnitDir, PilotService+".d"))
	slices.Sort(a.s.Unsure)
	return true
}

// file adopts a file if its text is one that an installation writes.
func (a *adoption) file(path string, ours func(text []byte) bool) bool {
	if a.s.file(path) != nil {
		return true
	}
	info, err := a.o.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	text, err := a.o.ReadFile(path)
	if err != nil || !ours(text) {
		return false
	}
	a.s.Files = append(a.s.Files, installed{Path: path, Mode: info.Mode().Perm(), SHA256: hash(text)})
	return true
}

// dropIns adopts the drop-ins of a containerd and their imports in its main file, and
// adds their directories to dirs.
func (a *adoption) dropIns(config string, dirs map[string]bool) {
	files, err := containerd.ReadConfigFiles(a.o.Host, config)
	if err != nil {
		files = containerd.ConfigFiles{Main: config}
	}
	inside := []string{filepath.Join(filepath.Dir(config), "conf.d")}
	if dir, isImported := files.DropInDir(); isImported {
		inside = append(inside, dir)
	}
	if d := containerd.DistributionAt(a.o.Host, config, ""); d.DropIns != "" {
		inside = append(inside, d.DropIns)
	}
	paths := []string{filepath.Join(filepath.Dir(config), "config.toml.tmpl"), filepath.Join(filepath.Dir(config), "config-v3.toml.tmpl")}
	for _, dir := range inside {
		paths = append(paths, filepath.Join(dir, dropInName), filepath.Join(dir, lastDropInName))
	}
	for _, path := range paths {
		if a.s.file(path) != nil || !a.file(path, isDropInText) {
			continue
		}
		dirs[filepath.Dir(path)] = true
		if text, err := a.o.ReadFile(path); err == nil {
			var conf map[string]any
			if toml.Unmarshal(bytes.Replace(text, []byte(containerd.TemplateBase), nil, 1), &conf) == nil && len(conf) > 0 {
				a.s.setLazy(containerd.LazyIn(conf), a.o)
				a.withoutLazy = !a.s.Lazy
				a.s.Workloads = a.s.Workloads || containerd.RequiresPilot(conf)
			}
		}
		for _, plugin := range files.Plugins(a.o.Host) {
			a.nriPlugin(plugin, dirs)
		}
		a.inserted(&files, path)
		if t, err := containerd.WithConfig(a.o.Host, a.o.Containerd, config); err == nil && a.s.Containerd == nil {
			a.s.Containerd = &installedTarget{t.Program, t.Config, t.Address, t.Service}
		}
	}
}

// nriPlugin adopts the program that containerd starts as a plugin, and adds its directory
// to dirs.
func (a *adoption) nriPlugin(path string, dirs map[string]bool) {
	if a.file(path, nriPluginFile.Match) {
		a.s.Workloads = true
		dirs[filepath.Dir(path)] = true
	}
}

// inserted adopts the import of a drop-in in the main file.
func (a *adoption) inserted(files *containerd.ConfigFiles, dropIn string) {
	for _, pattern := range []string{strings.TrimSuffix(dropIn, ".toml") + "*.toml", dropIn} {
		if !slices.Contains(files.Imports, pattern) || a.s.file(files.Main) != nil {
			continue
		}
		f := installed{Path: files.Main, Mode: 0o644, SHA256: hash(files.Text), Inserted: "'" + pattern + "'"}
		if info, err := a.o.Stat(files.Main); err == nil {
			f.Mode = info.Mode().Perm()
		}
		text := string(files.Text)
		for _, inserted := range []string{"imports = ['" + pattern + "']\n", ", '" + pattern + "'", " '" + pattern + "'", "'" + pattern + "'"} {
			if before := strings.Replace(text, inserted, "", 1); importsToo(before, text, pattern) {
				f.Before, f.Inserted = []byte(before), inserted
				break
			}
		}
		if f.Before == nil {
			f.SHA256 = "" // it is not written as pilot does
		} else if onlyVersion.Match(f.Before) {
			a.s.Unsure = append(a.s.Unsure, f.Path)
		}
		a.s.Files = append(a.s.Files, f)
	}
}

// onlyVersion matches a configuration file without settings, which pilot writes where
// there was none.
var onlyVersion = regexp.MustCompile(`^\s*(version = \d+)?\s*$`)

// isDropInText reports whether an installation has written this drop-in: it has pilot's
// header, and only pilot's settings.
func isDropInText(text []byte) bool {
	if string(text) == leftOut {
		return true
	}
	rest, emptied := bytes.CutPrefix(text, []byte(leftOut))
	rest, found := bytes.CutPrefix(rest, []byte(writtenBy))
	if !found && !emptied {
		return false
	}
	rest, isTemplate := bytes.CutPrefix(rest, []byte(containerd.TemplateBase))
	if isTemplate {
		rest = bytes.TrimPrefix(rest, []byte(containerd.TemplateMark))
	}
	var conf map[string]any
	if bytes.Contains(rest, []byte("#")) || toml.Unmarshal(rest, &conf) != nil {
		return false
	}
	delete(conf, "version")
	if plugins, ok := conf["plugins"].(map[string]any); ok {
		for id, short := range shortIDs { // without a version
			if plugins[short] != nil {
				plugins[id] = plugins[short]
				delete(plugins, short)
			}
		}
	}
	if emptied {
		plugins, _ := conf["plugins"].(map[string]any)
		return len(conf) == 1 && len(plugins) == 1 && plugins[containerd.NRI] != nil
	}
	return containerd.AddsOnlyPilot(conf)
}

// isPilotConfig reports whether an installation has written this pilot.toml, with any
// settings.
func isPilotConfig(text []byte) bool {
	var conf map[string]any
	if err := toml.Unmarshal(text, &conf); err != nil {
		return false
	}
	settings := map[string]string{}
	for name, v := range conf {
		s, ok := v.(string)
		if !ok {
			return false
		}
		settings[name] = s
	}
	if bytes.Equal(text, newPilotConfig(settings, true)) {
		return true
	}
	delete(settings, "diff-listen")
	return bytes.Equal(text, newPilotConfig(settings, false))
}

// isEnvironmentUnit reports whether an installation has written this drop-in of
// pilot.service.
func isEnvironmentUnit(text []byte) bool {
	return environmentUnitText.Match(text)
}

var (
	environmentUnitText = regexp.MustCompile(`^# Written by "pilot node install": what the stream processors of\n# \S+ had\.\n\[Service\]\n(Environment=".*"\n)+$`)
	refreshUnitText     = regexp.MustCompile("^" + strings.Replace(regexp.QuoteMeta(string(refreshUnit("PILOT"))), "PILOT", `/\S+`, 1) + "$")
	serveLine           = regexp.MustCompile(`(?m)^ExecStart=/\S+ (serve|snapshotter)$`)
)

// isUnit reports whether an installation by this version of pilot or an earlier one has
// written this unit.
func isUnit(name string, text []byte) bool {
	text = serveLine.ReplaceAll(text, []byte("ExecStart="+PackagedPilot+" $1"))
	ours, err := unitFiles.ReadFile("units/" + name)
	return err == nil && bytes.Equal(text, ours) || slices.Contains(earlierUnits, hash(text))
}

// earlierUnits are the SHA-256 sums of the units of earlier versions of pilot.
var earlierUnits = []string{
	"86dc8355993da6efbf14ed1f07ecd36c68c8151c536ed12d02251e299afc4a46",
	"ff184869bf8335ea3747cbdff256fed2dd3e688cf3975f9cbc44e5319e2f5595",
	"e99ee39c0cde4ef99a123fb9fbdae52ec11faba5b559031ebd249a379e68cde0",
	"e1c0413dbbb4584e81daa7db516001fa784fce6e9e8b07c2c2b20187dc03afe4",
	"b89d8dd41c530f8e6e7496bf2d4bf9fec47f86faad8ba4794f958a3fd3dd81b8",
	"3ad82c0a8c29bedf9ae716d569f82e7dbfb73ab834a0ce322bfd1f84f0408ba5",
	"c78805b6b557d9c09c5c21148cda326d8b5c56ec80ae1d17e5e5ee57ddc186bc",
	"9766bd2517f288746b914a45516c532b2cd0c1a449088fcec8895b7bcdcefacb",
	"fb93e1ed828da71c886563ff0bbe3f9cf7306bf8f673670b8ea575c12858c24e",
	"750c88bf5e1970835177936c6703cd211529cdd29e9469eb3f9452cf1d673700",
	"164ca7ec165897a38063034925d863e89e0be2e5d9e9b81499602dfe42472034",
}

// leftOver returns the existing files that an installation may have written and that are
// not in the record, so that they stay.
func (s *record) leftOver(o Options) []string {
	paths := slices.Clone(s.Unsure)
	for _, path := range []string{pilotConfig, keyProviders} {
		if s.file(path) == nil {
			paths = append(paths, path)
		}
	}
	for unit, wants := range unitWants {
		for _, path := range []string{filepath.Join(host.UnitDir, unit), filepath.Join(host.UnitDir, wants, unit)} {
			if s.file(path) == nil {
				paths = append(paths, path)
			}
		}
	}
	slices.Sort(paths)
	return slices.DeleteFunc(slices.Compact(paths), func(path string) bool {
		info, err := o.Lstat(path)
		if err != nil {
			return true
		}
		// Only empty directories are reported.
		if !info.IsDir() {
			return false
		}
		entries, _ := o.ReadDir(path)
		return len(entries) > 0
	})
}

// lostRecord is the error of a record that can't be read.
func lostRecord(err error) error {
	return &host.Conflict{Where: RecordFile, What: fmt.Sprintf("it is damaged: %s", err), Fix: "run \"pilot node install\", which rebuilds it from pilot's files; if there are none, remove it"}
}
