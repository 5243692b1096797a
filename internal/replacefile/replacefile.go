//go:build unix

// Package replacefile replaces files atomically: after a crash, a file has the old or
// the new content. It keeps its owner and mode.
package replacefile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Replacement is a file that Commit puts in the place of another.
type Replacement struct {
	dir             *os.Root
	temporary, name string // in dir
}

// maxLinks is how many symbolic links are followed.
const maxLinks = 40

// Prepare writes a replacement with the owner and mode of the existing file. It clears
// content, which may be a key. Symbolic links are followed; one that a user other than
// root or this process's can create may lead to that user's own files only.
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

// locate returns the file's directory, its name there, and its FileInfo. Links that
// change afterwards have no effect.
func locate(name string) (_ *os.Root, base string, info fs.FileInfo, err error) {
	foreign := -1 // the other user who controls a link on the way
	for range maxLinks {
		dir, err := os.OpenRoot(filepath.Dir(name))
		if err != nil {
			return nil, "", nil, err
		}
		base = filepath.Base(name)
		if info, err = dir.Lstat(base); err != nil {
			dir.Close()
			return nil, "", nil, err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			switch owner := userOf(info); {
			case !info.Mode().IsRegular():
				err = fmt.Errorf("%s is not a regular file", name)
			case foreign >= 0 && owner != foreign:
				err = fmt.Errorf("%s is where a symbolic link leads that user %d may have put there: name the file itself", name, foreign)
			default:
				return dir, base, info, nil
			}
			dir.Close()
			return nil, "", nil, err
		}
		for _, what := range []string{base, "."} {
			var of fs.FileInfo
			if of, err = dir.Lstat(what); err != nil {
				break
			}
			if u := userOf(of); u > 0 && u != os.Geteuid() {
				foreign = u
			}
		}
		var target string
		if err == nil {
			target, err = dir.Readlink(base)
		}
		dir.Close()
		if err != nil {
			return nil, "", nil, err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Dir(name) + "/" + target // not cleaned: directories may be links, too
		}
		name = target
	}
	return nil, "", nil, fmt.Errorf("%s: too many symbolic links", name)
}

// userOf returns the user that a file belongs to, or -1 if that is not known.
func userOf(info fs.FileInfo) int {
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(owner.Uid)
	}
	return -1
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
