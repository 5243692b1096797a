package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// unfinished returns the name under which a file is written before it takes its
// place. What is left there was cut short, since only one installation is at work.
func unfinished(name string) string {
	return filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".pilot-new")
}

func (h Host) RemoveUnfinished(name string) error {
	return h.InRoot(name, func(root *os.Root, name string) error {
		if _, err := root.Lstat(unfinished(name)); err != nil {
			return IgnoreNotExist(err)
		}
		return root.Remove(unfinished(name))
	})
}

// WriteFile replaces a file as a whole, keeping its owner. The error is an
// [errFixed] for one that can't be replaced.
func (h Host) WriteFile(name string, b []byte, mode fs.FileMode) error {
	if err := h.RemoveUnfinished(name); err != nil {
		return err
	}
	return h.InRoot(name, func(root *os.Root, name string) error {
		path := filepath.Join(h.root(), name) // for messages
		f, err := root.OpenFile(unfinished(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return whyFixed(path, err)
		}
		defer root.Remove(unfinished(name)) // fails once it is renamed
		_, err = f.Write(b)
		if info, statErr := root.Stat(name); statErr == nil {
			owner := info.Sys().(*syscall.Stat_t)
			err = errors.Join(err, f.Chown(int(owner.Uid), int(owner.Gid)))
		}
		err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
		if err != nil {
			return err
		}
		return whyFixed(path, root.Rename(unfinished(name), name))
	})
}

// FixedError is the error of a file that can't be replaced or removed as long as the
// machine is as it is.
type FixedError string

func (e FixedError) Error() string { return string(e) }

// whyFixed says in words why a file can't be replaced or removed, if it is known.
func whyFixed(name string, err error) error {
	switch {
	case errors.Is(err, syscall.EBUSY):
		return FixedError(fmt.Sprintf("it is mounted there from elsewhere (\"findmnt --target %s\" says from where), so it can't be replaced: unmount it, or change the file that is mounted", name))
	case errors.Is(err, syscall.EROFS):
		return FixedError("it is on a read-only file system: mount that writable")
	case errors.Is(err, syscall.EPERM):
		for _, at := range []string{name, filepath.Dir(name)} {
			if isImmutable(at) {
				return FixedError(fmt.Sprintf("%s is immutable: run \"chattr -ia %s\", and this again", at, at))
			}
		}
	}
	return err
}

// isImmutable reports whether a file or a directory has one of the attributes with
// which root can't replace it, either.
func isImmutable(name string) bool {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, name, 0, 0, &stat)
	return err == nil && stat.Attributes&(unix.STATX_ATTR_IMMUTABLE|unix.STATX_ATTR_APPEND) != 0
}
