package node

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	continuity "github.com/containerd/continuity/fs"

	"github.com/ctrlplane/pilot/internal/regular"
)

// This file reads, writes and removes files of the machine. Symbolic links are
// followed as on the machine itself: an absolute one leads from the machine's root.
// What the links come to is then opened below that directory by [os.Root], so that
// nothing outside of it is reached, even if a link or a directory changes at the same time.

// path returns where a file of the machine is for this process, after all
// symbolic links, which lead to nowhere outside the machine's root. It is for
// messages and for looking: between path and a use, a link may have changed.
func (o Options) path(name string) string {
	resolved, err := continuity.RootPath(o.root(), name)
	if err != nil {
		return filepath.Join(o.root(), name) // which fails as well
	}
	return resolved
}

// root returns the machine's root directory.
func (o Options) root() string { return cmp.Or(o.Root, "/") }

// linkPath is path for what may be a symbolic link itself.
func (o Options) linkPath(name string) string {
	return filepath.Join(o.path(filepath.Dir(name)), filepath.Base(name))
}

// inRoot calls f with the machine's root and what the path of a file in it is after
// all symbolic links.
func (o Options) inRoot(name string, f func(root *os.Root, name string) error) error {
	return o.at(o.path(name), f)
}

// linkInRoot is inRoot for what may be a symbolic link itself.
func (o Options) linkInRoot(name string, f func(root *os.Root, name string) error) error {
	return o.at(o.linkPath(name), f)
}

func (o Options) at(path string, f func(root *os.Root, name string) error) error {
	rel, err := filepath.Rel(o.root(), path)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(o.root())
	if err != nil {
		return err
	}
	defer root.Close()
	return withPath(path, f(root, rel))
}

// withPath gives an error of [os.Root]'s the path that a person can use.
func withPath(path string, err error) error {
	var e *fs.PathError
	if errors.As(err, &e) && !filepath.IsAbs(e.Path) {
		return &fs.PathError{Op: strings.TrimSuffix(e.Op, "at"), Path: path, Err: e.Err}
	}
	return err
}

// readFile returns the content of a regular file of the machine's.
func (o Options) readFile(name string) (b []byte, err error) {
	err = o.inRoot(name, func(root *os.Root, name string) error {
		f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err == nil {
			b, err = regular.ReadAll(f, regular.MaxConfig)
		}
		return err
	})
	return b, err
}

// stat describes a file of the machine's, after all symbolic links.
func (o Options) stat(name string) (info fs.FileInfo, err error) {
	err = o.inRoot(name, func(root *os.Root, name string) (err error) {
		info, err = root.Lstat(name)
		return err
	})
	return info, err
}

// lstat describes a file of the machine's, or a symbolic link itself.
func (o Options) lstat(name string) (info fs.FileInfo, err error) {
	err = o.linkInRoot(name, func(root *os.Root, name string) (err error) {
		info, err = root.Lstat(name)
		return err
	})
	return info, err
}

// has reports whether the machine has a file.
func (o Options) has(name string) bool {
	_, err := o.stat(name)
	return err == nil
}

// readlink returns where a symbolic link of the machine's leads.
func (o Options) readlink(name string) (to string, err error) {
	err = o.linkInRoot(name, func(root *os.Root, name string) (err error) {
		to, err = root.Readlink(name)
		return err
	})
	return to, err
}

// readDir returns the entries of a directory of the machine's, by their names.
func (o Options) readDir(name string) (entries []fs.DirEntry, err error) {
	err = o.inRoot(name, func(root *os.Root, name string) error {
		dir, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer dir.Close()
		entries, err = dir.ReadDir(-1)
		return err
	})
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// glob is filepath.Glob on the machine.
func (o Options) glob(pattern string) ([]string, error) {
	if _, err := filepath.Match(pattern, ""); err != nil {
		return nil, err
	}
	dir, name := filepath.Split(pattern)
	dirs := []string{filepath.Clean(dir)}
	if strings.ContainsAny(dir, `*?[\`) && filepath.Clean(dir) != pattern {
		dirs, _ = o.glob(filepath.Clean(dir))
	}
	var found []string
	for _, dir := range dirs {
		entries, _ := o.readDir(dir)
		for _, e := range entries {
			if ok, _ := filepath.Match(name, e.Name()); ok {
				found = append(found, filepath.Join(dir, e.Name()))
			}
		}
	}
	return found, nil
}

// remove removes a file of the machine's, after all symbolic links.
func (o Options) remove(name string) error {
	return o.inRoot(name, func(root *os.Root, name string) error { return whyFixed(o.path(name), root.Remove(name)) })
}

// removeLink removes a file of the machine's, or a symbolic link itself.
func (o Options) removeLink(name string) error {
	return o.linkInRoot(name, func(root *os.Root, name string) error { return root.Remove(name) })
}

// removeDir removes a directory of the machine's if nothing is in it.
func (o Options) removeDir(name string) error {
	return o.inRoot(name, func(root *os.Root, name string) error {
		if info, err := root.Lstat(name); err != nil || !info.IsDir() {
			return err
		}
		return root.Remove(name)
	})
}

// mkdirAll makes a directory of the machine's, with those above it.
func (o Options) mkdirAll(name string, mode fs.FileMode) error {
	return o.inRoot(name, func(root *os.Root, name string) error { return root.MkdirAll(name, mode) })
}

// symlink makes a symbolic link on the machine.
func (o Options) symlink(to, name string) error {
	return o.linkInRoot(name, func(root *os.Root, name string) error {
		return whyFixed(filepath.Join(o.root(), name), root.Symlink(to, name))
	})
}

// makeTemp makes a directory in one of the machine's that only this user can read,
// and returns its path on the machine.
func (o Options) makeTemp(parent, prefix string) (dir string, err error) {
	dir = filepath.Join(parent, prefix+rand.Text())
	return dir, o.inRoot(dir, func(root *os.Root, name string) error { return root.Mkdir(name, 0o700) })
}

// removeAll removes a directory of the machine's with all that is in it. It
// follows no symbolic link that is the directory itself.
func (o Options) removeAll(name string) error {
	return o.linkInRoot(name, func(root *os.Root, name string) error { return root.RemoveAll(name) })
}

// addFile writes a new file on the machine that only this user can read.
func (o Options) addFile(name string, b []byte) error {
	return o.inRoot(name, func(root *os.Root, name string) error {
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		return errors.Join(err, f.Close())
	})
}

// isOwnFile reports whether an installation writes or changes a file.
func (f *installed) isOwnFile() bool {
	dir, name := filepath.Dir(f.Path), filepath.Base(f.Path)
	switch {
	case !filepath.IsAbs(f.Path) || filepath.Clean(f.Path) != f.Path:
		return false
	case f.Link != "":
		return dir == filepath.Join(unitDir, unitWants[name]) && unitWants[name] != "" && filepath.Base(f.Link) == name
	case f.Inserted != "":
		return insertedImport.MatchString(f.Inserted)
	case dir == unitDir:
		return unitWants[name] != ""
	case filepath.Dir(dir) == unitDir:
		return strings.HasSuffix(dir, ".service.d") && (name == refreshName || name == decoderUnit)
	case name == "pilot" || name == "pilot-decoder":
		return true // which the DaemonSet puts into a directory of the admin's choice
	}
	return isDropIn(f.Path) || slices.Contains([]string{pilotConfig, keyProviders, mark, brokerToken, brokerCA}, f.Path)
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
