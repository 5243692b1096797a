// Package replacefile replaces files atomically: after a crash, a file has the old or
// the new content. It keeps its owner and mode, and on Windows its access control list.
package replacefile

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
)

// Replacement is a file that Commit replaces another with.
type Replacement struct {
	dir             *os.Root
	temporary, name string // in dir
}

// Prepare writes a replacement with the owner and mode, or the access control list, of
// the existing file. It clears content, which may be a key. Symbolic links are followed,
// anywhere in name. One that a user other than root or this process's may have put there
// leads to that user's own files only.
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
	if err == nil {
		err = allowAs(f, dir, base, info)
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
	if err := Rename(func() error { return r.dir.Rename(r.temporary, r.name) }); err != nil {
		return err
	}
	return sync(r.dir)
}

// Rename calls rename, which puts a file in the place of another. On Windows it is called
// again for a while if another program, such as a virus scanner, has one of them open.
func Rename(rename func() error) error { return repeat(rename) }

// Name gives a file the name of another in its directory, which it replaces. On Windows
// that may be open, if it was opened by [os.Root].
func Name(temporary, name string) error {
	dir, err := os.OpenRoot(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return NameIn(dir, filepath.Base(temporary), filepath.Base(name))
}

// NameIn does so below a directory that is open.
func NameIn(dir *os.Root, temporary, name string) error {
	return Rename(func() error { return replaceOpen(dir, temporary, name) })
}
