package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// record is what pilot stores on a machine about an installation, so that it can be
// undone.
type record struct {
	Files []installed `json:"files"`
	Dirs  []string    `json:"dirs,omitempty"` // that were made, the outermost first
	// Containerd is the one that was set up; null: unknown, set up by an old version.
	Containerd *installedTarget `json:"containerd,omitempty"`
	// Lazy is true if pilot's snapshotter is set up. LazyEnding is true if it is to go: with
	// Lazy, once no container has it; without, once its snapshots are removed.
	Lazy       bool `json:"lazy,omitempty"`
	LazyEnding bool `json:"lazyEnding,omitempty"`
	// Workloads is true if containerd asks pilot's NRI plugin about each container.
	Workloads bool `json:"workloads,omitempty"`
	// Unsure are files and directories that may have existed before the installation:
	// the record was lost and rebuilt.
	Unsure []string `json:"unsure,omitempty"`
}

// installedTarget is the containerd that was set up.
type installedTarget struct {
	Program string `json:"program"`
	Config  string `json:"config"`
	Address string `json:"address,omitempty"`
	Service string `json:"service"`
}

// installed is a file as it was before the installation and is after it.
type installed struct {
	Path   string      `json:"path"`
	Before []byte      `json:"before"` // null: there was none
	Mode   fs.FileMode `json:"mode"`
	SHA256 string      `json:"sha256,omitempty"`
	Was    string      `json:"was,omitempty"` // SHA256 before the last change, which may not have been made
	Link   string      `json:"link,omitempty"`
	// Inserted is the text that was inserted into a file that is not pilot's.
	Inserted string `json:"inserted,omitempty"`
}

// moved reports whether the containerd that was set up has another program now, if c is not nil.
func (s *record) moved(c *containerd.Instance) bool {
	return c != nil && s.Containerd != nil && s.Containerd.Program != c.Program
}

// RecordFile is the path of the record on the machine.
const (
	recordDir  = "/var/lib/pilot"
	RecordFile = recordDir + "/node.json"
)

// layerRecords are the files in which pilot serve keeps what it knows of unpacked layers.
var layerRecords = []string{recordDir + "/layers", recordDir + "/layers.lock"}

func (o Options) readRecord() (record, error) {
	var s record
	b, err := o.ReadFile(RecordFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, lostRecord(err)
	}
	return s, s.check()
}

func (o Options) writeRecord(s record) error {
	if len(s.Files) == 0 {
		return errors.Join(o.RemoveUnfinished(RecordFile), host.IgnoreNotExist(o.Remove(RecordFile)))
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := o.MkdirAll(filepath.Dir(RecordFile), 0o700); err != nil {
		return err
	}
	return o.WriteFile(RecordFile, append(b, '\n'), 0o600)
}

// file returns the record of a file, or nil.
func (s *record) file(path string) *installed {
	i := slices.IndexFunc(s.Files, func(f installed) bool { return f.Path == path })
	if i < 0 {
		return nil
	}
	return &s.Files[i]
}

// note records a change before it is made.
func (s *record) note(o Options, c Change, inserted string) {
	if c.Remove {
		return // it stays recorded until it is gone
	}
	s.noteDir(o, filepath.Dir(c.Path))
	f := s.file(c.Path)
	if f == nil {
		s.Files = append(s.Files, installed{Path: c.Path, Before: c.Old, Mode: c.Mode})
		f = &s.Files[len(s.Files)-1]
	} else if c.Link == "" && !f.is(c.Old) {
		f.Before, f.Mode = c.Old, c.Mode // the owner has changed it since
	}
	f.Link, f.Inserted = c.Link, inserted
	if c.Link == "" {
		f.Was, f.SHA256 = f.SHA256, hash(c.New)
	}
}

// forget drops removed files from the record.
func (s *record) forget(changes []Change) {
	s.Files = slices.DeleteFunc(s.Files, func(f installed) bool {
		return slices.ContainsFunc(changes, func(c Change) bool { return c.Remove && c.Path == f.Path })
	})
}

// is reports whether a file has the content that was installed.
func (f *installed) is(content []byte) bool {
	sum := hash(content)
	return sum == f.SHA256 || sum == f.Was
}

// noteDir records a directory and its missing parents before they are made.
func (s *record) noteDir(o Options, dir string) {
	var missing []string
	for ; ; dir = filepath.Dir(dir) {
		if o.Has(dir) || slices.Contains(s.Dirs, dir) {
			break
		}
		missing = append(missing, dir)
	}
	slices.Reverse(missing)
	s.Dirs = append(s.Dirs, missing...)
}

// removeDirs removes directories that were made, if they are empty.
func (o Options) removeDirs(dirs []string) {
	for _, dir := range slices.Backward(dirs) {
		o.RemoveDir(dir)
	}
}

// undo restores a file. From one that was changed in the meantime it removes only what
// was inserted; if there is nothing to remove, the file stays and the error says why.
func (s *record) undo(o Options, f installed) error {
	if err := o.RemoveUnfinished(f.Path); err != nil {
		return err
	}
	if f.Link != "" {
		if to, err := o.Readlink(f.Path); err != nil || to != f.Link {
			return host.IgnoreNotExist(err)
		}
		return o.RemoveLink(f.Path)
	}
	has, err := o.readInstalled(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it was removed
	}
	if err != nil {
		return err
	}
	mode := o.modeOf(f.Path, f.Mode)
	switch {
	case f.Before != nil && bytes.Equal(has, f.Before):
		return nil
	case f.is(has) && f.Before == nil:
		return named(f.Path, o.Remove(f.Path))
	case f.is(has):
		return named(f.Path, o.WriteFile(f.Path, f.Before, mode))
	case f.Inserted != "" && bytes.Contains(has, []byte(f.Inserted)):
		return named(f.Path, o.WriteFile(f.Path, bytes.Replace(has, []byte(f.Inserted), nil, 1), mode))
	case f.Inserted != "" && !bytes.Contains(has, imported(f.Inserted)):
		return nil // it was removed
	case f.Inserted != "":
		return fmt.Errorf("%s was changed since pilot was installed, and stays: remove %s from its imports yourself", f.Path, imported(f.Inserted))
	}
	return fmt.Errorf("%s was changed since it was installed, and stays: remove it yourself if it is not needed", f.Path)
}

// modeOf returns the permissions that a file has now, or others if there is none. Its owner
// may have changed them since it was installed.
func (o Options) modeOf(path string, others fs.FileMode) fs.FileMode {
	if info, err := o.Stat(path); err == nil {
		return info.Mode().Perm()
	}
	return others
}

// named returns err with the path that it is about, or nil.
func named(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", path, err)
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// isOwnFile reports whether installations write or change such a file.
func (f *installed) isOwnFile() bool {
	dir, name := filepath.Dir(f.Path), filepath.Base(f.Path)
	switch {
	case !filepath.IsAbs(f.Path) || filepath.Clean(f.Path) != f.Path:
		return false
	case f.Link != "":
		return dir == filepath.Join(host.UnitDir, unitWants[name]) && unitWants[name] != "" && filepath.Base(f.Link) == name
	case f.Inserted != "":
		return insertedImport.MatchString(f.Inserted)
	case dir == host.UnitDir:
		return unitWants[name] != ""
	case filepath.Dir(dir) == host.UnitDir:
		return strings.HasSuffix(dir, ".service.d") && (name == refreshName || name == decoderUnit || name == lazyUnit)
	case name == "pilot" || name == "pilot-decoder" || isNRIPlugin(f.Path):
		return true // the DaemonSet copies them to any directory
	}
	return isDropIn(f.Path) || slices.Contains([]string{pilotConfig, keyProviders, DaemonSetMark, BrokerToken, BrokerCA}, f.Path)
}

// check rejects a record with files that no installation writes, so that uninstalling
// does not touch them.
func (s *record) check() error {
	for _, f := range s.Files {
		if !f.isOwnFile() {
			return lostRecord(fmt.Errorf("it names %q, which is not a file of pilot", f.Path))
		}
	}
	for _, dir := range s.Dirs {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
			return lostRecord(fmt.Errorf("it names the directory %q, which is not a clean absolute path", dir))
		}
	}
	return nil
}
