//go:build unix

package replacefile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// maxLinks is how many symbolic links are followed.
const maxLinks = 40

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

// allowAs gives a new file the owner and mode of another.
func allowAs(f *os.File, _ *os.Root, _ string, info fs.FileInfo) error {
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	}
	return f.Chmod(info.Mode().Perm())
}

func replaceOpen(dir *os.Root, temporary, name string) error { return dir.Rename(temporary, name) }

func repeat(rename func() error) error { return rename() }

func sync(root *os.Root) error {
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
