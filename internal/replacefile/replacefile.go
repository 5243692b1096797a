//go:build unix

// Package replacefile replaces files as a whole: after a crash, a file is the old one
// or the new one. It keeps its owner and mode.
package replacefile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Replacement is a file that is going to take another's place.
type Replacement struct{ temporary, name string }

// Prepare writes a replacement with the owner and mode of the file that is there.
// It clears the content, which may be a key.
func Prepare(name string, content []byte) (r Replacement, err error) {
	defer clear(content)
	if r.name, err = filepath.EvalSymlinks(name); err != nil {
		return r, err
	}
	info, err := os.Stat(r.name)
	if err != nil {
		return r, err
	}
	if !info.Mode().IsRegular() {
		return r, fmt.Errorf("%s is not a regular file", r.name)
	}
	// 0600 until the owner is right.
	f, err := os.CreateTemp(filepath.Dir(r.name), "."+filepath.Base(r.name)+".*")
	if err != nil {
		return r, err
	}
	r.temporary = f.Name()
	_, err = f.Write(content)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode().Perm())
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(r.temporary)
	}
	return r, err
}

// Discard removes a replacement that was not committed.
func (r Replacement) Discard() { os.Remove(r.temporary) }

// Commit puts the replacement in place, so that it survives a power failure.
func (r Replacement) Commit() error {
	if err := os.Rename(r.temporary, r.name); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(r.name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
