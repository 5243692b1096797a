//go:build unix

// Package replacefile replaces files atomically: after a crash, a file has the old or
// the new content. It keeps its owner and mode.
package replacefile

import (
	"crypto/rand"
	"errors"
	"os"
	"syscall"
)

// Replacement is a file that Commit replaces another with.
type Replacement struct {
	dir             *os.Root
	temporary, name string // in dir
}

// Prepare writes a replacement with the owner and mode of the existing file. It clears
// content, which may be a key. Symbolic links are followed, anywhere in name. One that a
// user other than root or this process's may have put there leads to that user's own
// files only.
func Prepare(name string, content []byte) (r Replacement, err error) {
	defer clear(content)
	dir, base, info, err := locate(name)
	if err != nil {
		return Replacement{}, err
	}
	r = Replacement{dir, "." + base + "." + rand.Text(), base}
	// 0600 until the owner is right.
	f, err := dir.OpenFile(r.temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		dir.Close()
		return Replacement{}, err
	}
	_, err = f.Write(content)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && err == nil {
		err = f.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode().Perm())
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		r.Discard()
	}
	return r, err
}

// Discard removes a replacement that was not committed.
func (r Replacement) Discard() {
	if r.dir != nil {
		r.dir.Remove(r.temporary)
		r.dir.Close()
	}
}

// Commit puts the replacement in place, so that it survives a power failure.
func (r Replacement) Commit() error {
	if err := r.dir.Rename(r.temporary, r.name); err != nil {
		return err
	}
	dir, err := r.dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
