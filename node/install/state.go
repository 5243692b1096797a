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

	"github.com/ctrlplane/pilot/node/host"
)

// state is what a machine remembers of an installation, so that it can be
// undone.
type state struct {
	Files []installed `json:"files"`
	Dirs  []string    `json:"dirs,omitempty"` // that were made, the outermost first
	// Containerd is the one that was set up; null: by a version of pilot that
	// did not note it.
	Containerd *installedTarget `json:"containerd,omitempty"`
	// Unsure are files and directories of which nobody knows whether they were
	// there before the installation, since the state was lost and made again.
	Unsure []string `json:"unsure,omitempty"`
}

// installedTarget is the containerd that was set up.
type installedTarget struct {
	Program string `json:"program"`
	Config  string `json:"config"`
	Address string `json:"address,omitempty"`
	Service string `json:"service"`
}

// installed is a file as it is after the installation, and as it was before.
type installed struct {
	Path   string      `json:"path"`
	Before []byte      `json:"before"` // null: there was none
	Mode   fs.FileMode `json:"mode"`
	SHA256 string      `json:"sha256,omitempty"`
	Was    string      `json:"was,omitempty"` // SHA256 before the last change, which may not have been made
	Link   string      `json:"link,omitempty"`
	// Inserted is what was inserted into a file that is somebody else's.
	Inserted string `json:"inserted,omitempty"`
}

// StateFile is where the state is kept, inside the root, in stateDir.
const (
	stateDir  = "/var/lib/pilot"
	StateFile = stateDir + "/node.json"
)

func (o Options) readState() (state, error) {
	var s state
	b, err := o.ReadFile(StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, lostState(err)
	}
	return s, s.check()
}

func (o Options) writeState(s state) error {
	if len(s.Files) == 0 {
		return errors.Join(o.RemoveUnfinished(StateFile), host.IgnoreNotExist(o.Remove(StateFile)))
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := o.MkdirAll(filepath.Dir(StateFile), 0o700); err != nil {
		return err
	}
	return o.WriteFile(StateFile, append(b, '\n'), 0o600)
}

// file returns the state of a file.
func (s *state) file(path string) *installed {
	i := slices.IndexFunc(s.Files, func(f installed) bool { return f.Path == path })
	if i < 0 {
		return nil
	}
	return &s.Files[i]
}

// note notes a change that is going to be made.
func (s *state) note(o Options, c Change, inserted string) {
	if c.Remove {
		return // it is noted until it is gone
	}
	s.noteDir(o, filepath.Dir(c.Path))
	f := s.file(c.Path)
	if f == nil {
		s.Files = append(s.Files, installed{Path: c.Path, Before: c.Old, Mode: c.Mode})
		f = &s.Files[len(s.Files)-1]
	} else if c.Link == "" && !f.is(c.Old) {
		f.Before, f.Mode = c.Old, c.Mode // somebody has changed it since
	}
	f.Link, f.Inserted = c.Link, inserted
	if c.Link == "" {
		f.Was, f.SHA256 = f.SHA256, hash(c.New)
	}
}

// forget takes out of the state what was removed.
func (s *state) forget(changes []Change) {
	s.Files = slices.DeleteFunc(s.Files, func(f installed) bool {
		return slices.ContainsFunc(changes, func(c Change) bool { return c.Remove && c.Path == f.Path })
	})
}

// is reports whether a file is as it was installed.
func (f *installed) is(content []byte) bool {
	sum := hash(content)
	return sum == f.SHA256 || sum == f.Was
}

// noteDir notes a directory that is going to be made, with those above it that
// are missing.
func (s *state) noteDir(o Options, dir string) {
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

// removeDirs removes directories that were made, unless something is in them.
func (o Options) removeDirs(dirs []string) {
	for _, dir := range slices.Backward(dirs) {
		o.RemoveDir(dir)
	}
}

// undo puts a file back as it was. One that was changed in the meantime loses
// what was inserted into it, or else stays: then undo reports why.
func (s *state) undo(o Options, f installed) error {
	if err := o.RemoveUnfinished(f.Path); err != nil {
		return err
	}
	if f.Link != "" {
		if to, err := o.Readlink(f.Path); err != nil || to != f.Link {
			return host.IgnoreNotExist(err)
		}
		return o.RemoveLink(f.Path)
	}
	has, err := o.ReadFile(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody has removed it
	}
	if err != nil {
		return err
	}
	switch {
	case f.Before != nil && bytes.Equal(has, f.Before):
		return nil
	case f.is(has) && f.Before == nil:
		return named(f.Path, o.Remove(f.Path))
	case f.is(has):
		return named(f.Path, o.WriteFile(f.Path, f.Before, f.Mode))
	case f.Inserted != "" && bytes.Contains(has, []byte(f.Inserted)):
		return named(f.Path, o.WriteFile(f.Path, bytes.Replace(has, []byte(f.Inserted), nil, 1), f.Mode))
	case f.Inserted != "" && !bytes.Contains(has, imported(f.Inserted)):
		return nil // somebody has removed it
	case f.Inserted != "":
		return fmt.Errorf("%s was changed since pilot was installed, and stays: take %s out of its imports yourself", f.Path, imported(f.Inserted))
	}
	return fmt.Errorf("%s was changed since it was installed, and stays: remove it yourself if it is not needed", f.Path)
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

// isOwnFile reports whether an installation writes or changes a file.
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
		return strings.HasSuffix(dir, ".service.d") && (name == refreshName || name == decoderUnit)
	case name == "pilot" || name == "pilot-decoder":
		return true // which the DaemonSet puts into a directory of the admin's choice
	}
	return isDropIn(f.Path) || slices.Contains([]string{pilotConfig, keyProviders, DaemonSetMark, BrokerToken, BrokerCA}, f.Path)
}

// check refuses a state with files that no installation writes, so that uninstalling
// does not touch them.
func (s *state) check() error {
	for _, f := range s.Files {
		if !f.isOwnFile() {
			return lostState(fmt.Errorf("it names %q, which pilot does not write", f.Path))
		}
	}
	for _, dir := range s.Dirs {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
			return lostState(fmt.Errorf("it names the directory %q", dir))
		}
	}
	return nil
}
