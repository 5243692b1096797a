//go:build unix

package partfile

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/internal/replacefile"
)

// lock locks a file until it is closed, and reports whether no other process has it locked.
// A file system without locks is no error.
func lock(f *os.File) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case errors.Is(err, unix.ENOLCK), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			return true, nil
		}
		return err == nil, err
	}
}

// removeStale removes a file that no process has locked.
func removeStale(root *os.Root, name string) {
	f, err := root.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = root.Remove(name)
	}
}

func (f *File) rename(name string) error {
	if err := replacefile.NameIn(f.root, f.name, name); err != nil {
		return err
	}
	return f.Close()
}
