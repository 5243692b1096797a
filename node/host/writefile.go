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

// unfinished returns the name under which a file is written before it is renamed.
// Installations hold a lock, so a file with such a name was left by one that was killed.
func unfinished(name string) string {
	return filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".pilot-new")
}

// RemoveUnfinished removes what a WriteFile of that name has left that was killed.
func (h Host) RemoveUnfinished(name string) error {
	return h.InRoot(name, func(root *os.Root, name string) error {
		if _, err := root.Lstat(unfinished(name)); err != nil {
			return IgnoreNotExist(err)
		}
		return root.Remove(unfinished(name))
	})
}

// WriteFile replaces a file atomically and keeps its owner. The error is an
// [ImmutableError] if the file can't be replaced.
func (h Host) WriteFile(name string, b []byte, mode fs.FileMode) error {
	if err := h.RemoveUnfinished(name); err != nil {
		return err
	}
	return h.InRoot(name, func(root *os.Root, name string) error {
		path := filepath.Join(h.root(), name) // for messages
		f, err := root.OpenFile(unfinished(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return whyImmutable(path, err)
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
		return whyImmutable(path, root.Rename(unfinished(name), name))
	})
}

// ImmutableError is the error of a file that can't be replaced or removed, since it is
// mounted, immutable, or on a read-only file system. It says how to change that.
type ImmutableError string

func (e ImmutableError) Error() string { return string(e) }

// whyImmutable returns an [ImmutableError] if err is one of those, or else err.
func whyImmutable(name string, err error) error {
	switch {
	case errors.Is(err, syscall.EBUSY):
		return ImmutableError(fmt.Sprintf("it is mounted there from elsewhere (\"findmnt --target %s\" says from where), so it can't be replaced: unmount it, or change the file that is mounted", name))
	case errors.Is(err, syscall.EROFS):
		return ImmutableError("it is on a read-only file system: mount that writable")
	case errors.Is(err, syscall.EPERM):
		for _, at := range []string{name, filepath.Dir(name)} {
			if isImmutable(at) {
				return ImmutableError(fmt.Sprintf("%s is immutable: run \"chattr -ia %s\", and this again", at, at))
			}
		}
	}
	return err
}

// isImmutable reports whether a file or directory has an attribute that keeps even root
// from replacing it.
func isImmutable(name string) bool {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, name, 0, 0, &stat)
	return err == nil && stat.Attributes&(unix.STATX_ATTR_IMMUTABLE|unix.STATX_ATTR_APPEND) != 0
}
