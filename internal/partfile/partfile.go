// Package partfile writes files that get their names once they are whole, and removes
// those that a killed process left unfinished.
package partfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// prefix begins the names of unfinished files.
const prefix = ".pilot-part-"

// File is an unfinished file. It is locked while it is open, where there are locks.
type File struct {
	*os.File
	root *os.Root
	name string
}

// maxTries bounds the files that are made before one is not locked by another process.
const maxTries = 100

// Create makes a file in a directory of root, with a mode before umask.
func Create(root *os.Root, dir string, mode fs.FileMode) (*File, error) {
	for range maxTries {
		name := path.Join(dir, prefix+rand.Text())
		f, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
		if failed := (*fs.PathError)(nil); errors.As(err, &failed) {
			err = fmt.Errorf("make a file in %s: %w", filepath.Join(root.Name(), dir), failed.Err) // its name says nothing
		}
		if err != nil {
			return nil, err
		}
		part := &File{f, root, name}
		// Another process may have taken it for a leftover before it was locked.
		ours, err := lock(f)
		if ours {
			ours, err = part.named()
		}
		if ours && err == nil {
			return part, nil
		}
		if err := errors.Join(err, part.Discard()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("another process locks each new file in %s", filepath.Join(root.Name(), dir))
}

// named reports whether the file still has its name.
func (f *File) named() (bool, error) {
	at, err := f.root.Lstat(f.name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	info, err := f.Stat()
	return err == nil && os.SameFile(at, info), err
}

// Commit writes the file to disk and gives it a name in root, where it replaces another
// file. It is closed, and removed if there is an error.
func (f *File) Commit(name string) error {
	err := f.Sync()
	if err == nil {
		err = f.rename(name)
	}
	if err != nil {
		return errors.Join(err, f.Discard())
	}
	return nil
}

// CommitNew does as Commit, unless there is a file of that name, which stays.
func (f *File) CommitNew(name string) error {
	err := f.Sync()
	if err == nil {
		err = f.root.Link(f.name, name)
	}
	switch {
	case err == nil, errors.Is(err, fs.ErrExist):
		return f.Discard()
	case errors.Is(err, errors.ErrUnsupported), errors.Is(err, fs.ErrPermission): // a file system without links
		return f.Commit(name)
	}
	return errors.Join(err, f.Discard())
}

// Discard closes and removes the file.
func (f *File) Discard() error {
	// Removed before it is closed, so that no other process finds it without a lock,
	// where files that are open can be removed.
	gone := f.root.Remove(f.name) == nil
	err := f.Close()
	if errors.Is(err, fs.ErrClosed) {
		err = nil
	}
	if gone {
		return err
	}
	if rerr := f.root.Remove(f.name); !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}

// Is reports whether a file of that name is unfinished.
func Is(name string) bool { return strings.HasPrefix(name, prefix) }

// Clean removes the unfinished files in a directory of root that no process has open.
// Where files have no locks it removes none. What can't be removed stays.
func Clean(root *os.Root, dir string) {
	entries, err := fs.ReadDir(root.FS(), path.Clean(dir))
	if err != nil {
		return
	}
	for _, e := range entries {
		if Is(e.Name()) && e.Type().IsRegular() {
			removeStale(root, path.Join(dir, e.Name()))
		}
	}
}
