package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/host"
)

// Uninstall restores a machine as it was before [Plan.Install], byte for byte. Files of
// pilot that were changed since stay, and are named in the error; what was inserted into
// containerd's configuration is removed even if other lines of it were changed. With
// KeepConfig, pilot's own configuration stays.
//
// If containerd would not start without pilot's drop-in, or would still ask pilot,
// because a tool has written its configuration from a dump with pilot in it, nothing is
// removed, and the error names the lines.
//
// On the machine that runs, pilot's record of layers stays, for as long as pilot and its NRI
// plugin do: see [Options.RemoveLayerRecord].
//
// If the record was lost, Uninstall removes the files that an installation has written,
// and returns in unsure the paths that stay because they may have been there before.
func Uninstall(ctx context.Context, o Options) (unsure []string, err error) {
	release, err := o.lock()
	if err != nil {
		return nil, err
	}
	defer release()
	s, _, err := o.loadRecord()
	if err != nil {
		return nil, err
	}
	if err := o.checkLazyUse(s); err != nil {
		return nil, err
	}
	if err := s.disconnect(ctx, o); err != nil {
		return nil, err
	}
	var errs []error
	var left []installed
	for _, f := range slices.Backward(s.Files) {
		if o.keeps(f) {
			left = append(left, f)
			continue
		}
		if err := s.undo(o, f); err != nil {
			errs = append(errs, err)
			left = append(left, f)
		}
	}
	slices.Reverse(left)
	if s.Unsure != nil {
		unsure = s.leftOver(o)
	}
	s.Files = left
	// While the record says which they are, in case this is killed.
	o.removeDirs(s.Dirs)
	if err := o.writeRecord(s); err != nil {
		errs = append(errs, err)
	}
	if o.Root != "" {
		errs = append(errs, o.RemoveLayerRecord())
	}
	// recordDir is not in the record if an installation was killed before writing it.
	o.removeDirs(append(s.Dirs, recordDir))
	return unsure, errors.Join(errs...)
}

// RemoveLayerRecord removes pilot's record of layers. Pilot and containerd's NRI plugin have to
// be stopped: a pilot that starts without it knows less of which keys a container needs, and
// a plugin creates no container without it.
func (o Options) RemoveLayerRecord() error {
	var errs []error
	for _, name := range layerRecords {
		errs = append(errs, host.IgnoreNotExist(o.Remove(name)))
	}
	o.removeDirs([]string{recordDir})
	return errors.Join(errs...)
}

// RemoveLayerRecordCommands returns the commands that do what [Options.RemoveLayerRecord]
// does, if there is a record.
func (o Options) RemoveLayerRecordCommands() []string {
	if _, err := o.Stat(layerRecords[0]); err != nil {
		return nil
	}
	return []string{"rm -f " + strings.Join(layerRecords, " "), "rmdir --ignore-fail-on-non-empty " + recordDir}
}

// disconnect removes pilot from containerd's configuration. If containerd would not start
// then, or would still ask pilot, it restores everything and returns an error.
func (s *record) disconnect(ctx context.Context, o Options) error {
	c, err := s.lookAgain(ctx, o)
	worked := false
	if err == nil {
		_, err = c.Dump(ctx, o.Host)
		worked = err == nil
	}
	var undone []Change
	putBack := func(err error) error {
		for _, c := range slices.Backward(undone) {
			err = errors.Join(err, o.WriteFile(c.Path, c.Old, c.Mode))
		}
		return err
	}
	// The NRI plugin last: containerd creates no container while it requires one that is not
	// there, also if this is killed in between.
	var files, plugins []installed
	for _, f := range slices.Backward(s.Files) {
		switch {
		case isNRIPlugin(f.Path):
			plugins = append(plugins, f)
		case connects(f.Path) || f.Inserted != "":
			files = append(files, f)
		}
	}
	for _, f := range append(files, plugins...) {
		was := Change{Path: f.Path, Mode: o.modeOf(f.Path, f.Mode)}
		if was.Old, err = o.ReadFile(f.Path); err != nil {
			continue // it is gone, or undo reports why it can't be read
		}
		if err := s.undo(o, f); err == nil {
			undone = append(undone, was)
		} else if connects(f.Path) {
			return putBack(err)
		}
	}
	if worked && !c.Deferred() {
		if err := without(ctx, c, o); err != nil {
			return putBack(err)
		}
	}
	return nil
}

// lookAgain examines the containerd that was set up.
func (s *record) lookAgain(ctx context.Context, o Options) (*containerd.Instance, error) {
	t, err := s.target(o)
	if err != nil {
		return nil, err
	}
	c, err := containerd.Examine(ctx, o.Host, *t, s.dropIns())
	if err == nil {
		c.Lazy = s.lazyMode()
		c.Workloads = s.Workloads
	}
	return c, err
}

// target returns the containerd that was set up.
func (s *record) target(o Options) (*containerd.Target, error) {
	if c := s.Containerd; c != nil {
		return containerd.FindAgain(o.Host, containerd.Target{Program: c.Program, Config: c.Config, Address: c.Address, Service: c.Service})
	}
	// The versions of pilot that recorded none set up that of containerd.service only,
	// even if another runs.
	for _, f := range s.Files {
		if f.Inserted != "" {
			o.Containerd.Config = f.Path
		}
	}
	return containerd.FromUnit(o.Host, o.Containerd)
}

// without checks that containerd starts with the remaining configuration, and does not
// ask pilot.
func without(ctx context.Context, c *containerd.Instance, o Options) error {
	dump, err := c.Dump(ctx, o.Host)
	if err == nil && !containerd.MentionsPilot(dump) {
		return nil
	}
	what := "containerd would still ask pilot"
	if err != nil {
		what = "containerd would not start without pilot's drop-in: " + err.Error()
	}
	lines := linesWithPilot(c, o)
	if len(lines) == 0 {
		lines = []string{c.Config}
	}
	return &host.Conflict{Where: strings.Join(lines, ", "), What: what + ": a tool has written its configuration from a dump with pilot in it. Nothing was removed", Fix: "take pilot out of these lines, and run this again"}
}

// namesPilot matches a line of a configuration that adds pilot: the name of its proxy
// plugin, differ or snapshotter, its socket, its stream processor, or its drop-in. It does not match
// copilot, or a directory named pilot.
var namesPilot = regexp.MustCompile(`["']pilot(-lazy)?["']|\bproxy_plugins\.pilot(-lazy)?\s*[].=]|^\s*pilot(-lazy)?\s*[.=]|` +
	regexp.QuoteMeta(containerd.DiffSocket) + `\b|/pilot-decoder\b|/(zz-)?pilot\*?\.toml["']`)

// linesWithPilot returns the lines of containerd's files that name pilot, as FILE:LINE.
func linesWithPilot(c *containerd.Instance, o Options) []string {
	files, _, err := (&containerd.ConfigFiles{Main: c.Config}).All(o.Host)
	if err != nil {
		files = []string{c.Config}
	}
	var found []string
	for _, file := range files {
		text, err := containerd.ReadConfig(o.Host, file)
		if err != nil {
			continue
		}
		number := 0
		for line := range bytes.Lines(text) {
			number++
			code, _, _ := bytes.Cut(line, []byte("#"))
			if namesPilot.Match(code) {
				found = append(found, fmt.Sprintf("%s:%d", file, number))
			}
		}
	}
	return found
}

// keeps reports whether KeepConfig keeps a file.
func (o Options) keeps(f installed) bool {
	return o.KeepConfig && (f.Path == pilotConfig || f.Path == keyProviders)
}

// connects reports whether a file makes containerd or CRI-O ask pilot.
func connects(path string) bool {
	return isDropIn(path) || path == crioDropIn || isNRIPlugin(path)
}

// Connected reports whether containerd or CRI-O is still configured to ask pilot, by the
// record.
func Connected(o Options) bool {
	s, err := o.readRecord()
	return err != nil || slices.ContainsFunc(s.Files, func(f installed) bool { return connects(f.Path) })
}

// Installation is the record of an installation in short.
type Installation struct {
	// Units are the systemd units that were enabled.
	Units []string
	// Service is the systemd service of the containerd or CRI-O that asks pilot.
	Service string
	// Address is the socket of that containerd, or "".
	Address string
	// Lazy says what pilot's snapshotter is for. LazyLeft is true if it is for nothing, and
	// has left snapshots.
	Lazy     containerd.LazyMode
	LazyLeft bool
	// Program is true if pilot's program is one of the files.
	Program bool
	// Present is true if there is something to uninstall.
	Present bool
}

// LazyPresent reports whether pilot's snapshotter is there, or has left snapshots.
func (i Installation) LazyPresent() bool { return i.Lazy != containerd.LazyOff || i.LazyLeft }

// Installed returns what a machine's record says.
func Installed(o Options) (Installation, error) {
	s, _, err := o.loadRecord()
	i := Installation{Service: containerd.Service, Lazy: s.lazyMode(), LazyLeft: s.lazyLeft()}
	if s.Containerd != nil {
		i.Service, i.Address = s.Containerd.Service, s.Containerd.Address
	}
	for _, f := range s.Files {
		if f.Link != "" {
			i.Units = append(i.Units, filepath.Base(f.Path))
		}
		if f.Path == crioDropIn {
			i.Service = crio.Service
		}
		i.Program = i.Program || f.Link == "" && filepath.Base(f.Path) == "pilot"
		i.Present = i.Present || !o.keeps(f)
	}
	return i, err
}

// Recorded returns pilot's drop-ins of containerd's configuration, by the record. If the
// record was lost and pilot's files are there, lost says how.
func Recorded(o Options) (dropIns []string, lost string, err error) {
	s, lost, err := o.loadRecord()
	return s.dropIns(), lost, err
}
