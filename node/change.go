package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/sirupsen/logrus"
)

// Change is a file or a symbolic link that is made, changed or removed.
type Change struct {
	Path string // inside the root
	Old  []byte // what was there; nil: nothing
	New  []byte // what shall be there; nil: nothing, or a link
	Link string // what a symbolic link shall point to
	Mode fs.FileMode
	// Remove says that the file goes, which an earlier installation has made.
	Remove bool
}

// Diff returns the change as a unified diff.
func (c Change) Diff() string {
	if c.Link != "" {
		return fmt.Sprintf("link %s -> %s\n", c.Path, c.Link)
	}
	from, to := c.Path, c.Path
	if c.Old == nil {
		from = "/dev/null"
	}
	if c.New == nil {
		to = "/dev/null"
	}
	return string(diff.Diff(from, c.Old, to, c.New))
}

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

// stateFile is where the state is kept, inside the root, in stateDir.
const (
	stateDir  = "/var/lib/pilot"
	stateFile = stateDir + "/node.json"
)

func (o Options) readState() (state, error) {
	var s state
	b, err := o.readFile(stateFile)
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
		return errors.Join(o.removeUnfinished(stateFile), ignoreNotExist(o.remove(stateFile)))
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := o.mkdirAll(filepath.Dir(stateFile), 0o700); err != nil {
		return err
	}
	return o.writeFile(stateFile, append(b, '\n'), 0o600)
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
		if o.has(dir) || slices.Contains(s.Dirs, dir) {
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
		o.removeDir(dir)
	}
}

// make makes the change, unless somebody else has changed the file since the
// change was planned.
func (c Change) make(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.Old); err != nil {
			return err
		}
	}
	if c.Remove {
		return o.remove(c.Path)
	}
	if err := o.mkdirAll(filepath.Dir(c.Path), 0o755); err != nil {
		return err
	}
	if c.Link != "" {
		return o.symlink(c.Link, c.Path)
	}
	return o.writeFile(c.Path, c.New, c.Mode)
}

// finds reports an error if the file's content is another. Nil: there is none.
func (c Change) finds(o Options, content []byte) error {
	has, err := o.readFile(c.Path)
	if ignoreNotExist(err) != nil {
		return err
	}
	if !bytes.Equal(has, content) || (err == nil) != (content != nil) {
		return &Conflict{c.Path, "somebody else has changed it in the meantime", "run this again"}
	}
	return nil
}

// revert puts back what the change replaced, unless somebody else has changed
// the file since.
func (c Change) revert(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.New); err != nil {
			return err
		}
	}
	if c.Old != nil {
		return o.writeFile(c.Path, c.Old, c.Mode)
	}
	return ignoreNotExist(o.removeLink(c.Path))
}

// undo puts a file back as it was. One that was changed in the meantime loses
// what was inserted into it, or else stays: then undo reports why.
func (s *state) undo(o Options, f installed) error {
	if err := o.removeUnfinished(f.Path); err != nil {
		return err
	}
	if f.Link != "" {
		if to, err := o.readlink(f.Path); err != nil || to != f.Link {
			return ignoreNotExist(err)
		}
		return o.removeLink(f.Path)
	}
	has, err := o.readFile(f.Path)
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
		return named(f.Path, o.remove(f.Path))
	case f.is(has):
		return named(f.Path, o.writeFile(f.Path, f.Before, f.Mode))
	case f.Inserted != "" && bytes.Contains(has, []byte(f.Inserted)):
		return named(f.Path, o.writeFile(f.Path, bytes.Replace(has, []byte(f.Inserted), nil, 1), f.Mode))
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

// lock keeps other installations on the machine away until it is released.
func (o Options) lock() (release func(), err error) {
	if release, err = o.tryLock(); err != nil || release != nil {
		return release, err
	}
	f, err := o.lockFile()
	if err != nil {
		return nil, err
	}
	logrus.WithField("lock", f.Name()).Info("waiting for another installation on this machine")
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// tryLock is lock, but returns no release if another installation is at work.
func (o Options) tryLock() (release func(), err error) {
	f, err := o.lockFile()
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return func() { f.Close() }, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}

// lockFile opens what is locked: on a machine that runs, what only root can
// lock; in a root directory, nothing that would stay in it.
func (o Options) lockFile() (*os.File, error) {
	name, flags := "/etc", os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_DIRECTORY
	if o.Root == "" || o.Root == machineRoot {
		name, flags = "/run/pilot-install.lock", os.O_RDWR|os.O_CREATE
	}
	var f *os.File
	err := o.inRoot(name, func(root *os.Root, name string) (err error) {
		f, err = root.OpenFile(name, flags, 0o600)
		return err
	})
	return f, err
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
