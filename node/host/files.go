package host

import (
	"cmp"
	"crypto/rand"
	"errors"
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
// resolved as on the machine itself: an absolute one starts at the machine's root.
// The resolved path is then opened below that directory with [os.Root], so nothing
// outside is reached, even if a link or a directory changes at the same time.

// Path returns this process's path of a file of the machine, with all symbolic links
// resolved inside the machine's root. Use it for messages and for reading only: a link
// may change before the path is used.
func (h Host) Path(name string) string {
	resolved, err := continuity.RootPath(h.root(), name)
	if err != nil {
		return filepath.Join(h.root(), name) // which fails as well
	}
	return resolved
}

// root returns the machine's root directory.
func (h Host) root() string { return cmp.Or(h.Root, "/") }

// LinkPath is Path, but does not resolve the last element.
func (h Host) LinkPath(name string) string {
	return filepath.Join(h.Path(filepath.Dir(name)), filepath.Base(name))
}

// InRoot calls f with the machine's root and the path of a file below it, with all
// symbolic links resolved.
func (h Host) InRoot(name string, f func(root *os.Root, name string) error) error {
	return h.at(h.Path(name), f)
}

// linkInRoot is InRoot, but does not resolve the last element.
func (h Host) linkInRoot(name string, f func(root *os.Root, name string) error) error {
	return h.at(h.LinkPath(name), f)
}

func (h Host) at(path string, f func(root *os.Root, name string) error) error {
	rel, err := filepath.Rel(h.root(), path)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(h.root())
	if err != nil {
		return err
	}
	defer root.Close()
	return withPath(path, f(root, rel))
}

// withPath replaces the relative path in an error of [os.Root] with the full one.
func withPath(path string, err error) error {
	var e *fs.PathError
	if errors.As(err, &e) && !filepath.IsAbs(e.Path) {
		return &fs.PathError{Op: strings.TrimSuffix(e.Op, "at"), Path: path, Err: e.Err}
	}
	return err
}

// ReadFile returns the content of a regular file of the machine, of at most
// [regular.MaxConfig] bytes.
func (h Host) ReadFile(name string) ([]byte, error) {
	return h.ReadFileAtMost(name, regular.MaxConfig)
}

// ReadFileAtMost is ReadFile with another limit, in bytes.
func (h Host) ReadFileAtMost(name string, most int) (b []byte, err error) {
	err = h.InRoot(name, func(root *os.Root, name string) error {
		f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err == nil {
			b, err = regular.ReadAll(f, most)
		}
		return err
	})
	return b, err
}

// Stat describes a file of the machine, and follows symbolic links.
func (h Host) Stat(name string) (info fs.FileInfo, err error) {
	err = h.InRoot(name, func(root *os.Root, name string) (err error) {
		info, err = root.Lstat(name)
		return err
	})
	return info, err
}

// Lstat describes a file of the machine, and does not follow a symbolic link.
func (h Host) Lstat(name string) (info fs.FileInfo, err error) {
	err = h.linkInRoot(name, func(root *os.Root, name string) (err error) {
		info, err = root.Lstat(name)
		return err
	})
	return info, err
}

// Has reports whether the machine has a file.
func (h Host) Has(name string) bool {
	_, err := h.Stat(name)
	return err == nil
}

// Readlink returns the target of a symbolic link of the machine.
func (h Host) Readlink(name string) (to string, err error) {
	err = h.linkInRoot(name, func(root *os.Root, name string) (err error) {
		to, err = root.Readlink(name)
		return err
	})
	return to, err
}

// ReadDir returns the entries of a directory of the machine, sorted by name.
func (h Host) ReadDir(name string) (entries []fs.DirEntry, err error) {
	err = h.InRoot(name, func(root *os.Root, name string) error {
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

// Glob is filepath.Glob on the machine.
func (h Host) Glob(pattern string) ([]string, error) {
	if _, err := filepath.Match(pattern, ""); err != nil {
		return nil, err
	}
	dir, name := filepath.Split(pattern)
	dirs := []string{filepath.Clean(dir)}
	if strings.ContainsAny(dir, `*?[\`) && filepath.Clean(dir) != pattern {
		dirs, _ = h.Glob(filepath.Clean(dir))
	}
	var found []string
	for _, dir := range dirs {
		entries, _ := h.ReadDir(dir)
		for _, e := range entries {
			if ok, _ := filepath.Match(name, e.Name()); ok {
				found = append(found, filepath.Join(dir, e.Name()))
			}
		}
	}
	return found, nil
}

// Remove removes a file of the machine, and follows symbolic links.
func (h Host) Remove(name string) error {
	return h.InRoot(name, func(root *os.Root, name string) error { return whyImmutable(h.Path(name), root.Remove(name)) })
}

// RemoveLink removes a file of the machine, and does not follow a symbolic link.
func (h Host) RemoveLink(name string) error {
	return h.linkInRoot(name, func(root *os.Root, name string) error { return root.Remove(name) })
}

// RemoveDir removes an empty directory of the machine.
func (h Host) RemoveDir(name string) error {
	return h.InRoot(name, func(root *os.Root, name string) error {
		if info, err := root.Lstat(name); err != nil || !info.IsDir() {
			return err
		}
		return root.Remove(name)
	})
}

// MkdirAll makes a directory on the machine, with its parents.
func (h Host) MkdirAll(name string, mode fs.FileMode) error {
	return h.InRoot(name, func(root *os.Root, name string) error { return root.MkdirAll(name, mode) })
}

// Symlink makes a symbolic link on the machine.
func (h Host) Symlink(to, name string) error {
	return h.linkInRoot(name, func(root *os.Root, name string) error {
		return whyImmutable(filepath.Join(h.root(), name), root.Symlink(to, name))
	})
}

// MakeTemp makes a directory with mode 0700 in a directory of the machine, and returns
// its path on the machine.
func (h Host) MakeTemp(parent, prefix string) (dir string, err error) {
	dir = filepath.Join(parent, prefix+rand.Text())
	return dir, h.InRoot(dir, func(root *os.Root, name string) error { return root.Mkdir(name, 0o700) })
}

// RemoveAll removes a directory of the machine with its content. If the path is a
// symbolic link, it removes the link.
func (h Host) RemoveAll(name string) error {
	return h.linkInRoot(name, func(root *os.Root, name string) error { return root.RemoveAll(name) })
}

// AddFile writes a new file with mode 0600 on the machine.
func (h Host) AddFile(name string, b []byte) error {
	return h.InRoot(name, func(root *os.Root, name string) error {
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(b)
		return errors.Join(err, f.Close())
	})
}
