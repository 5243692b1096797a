//go:build unix

package keystore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// checkDir refuses a store's directory that others can write: they could put another
// store, master key or admin socket there. A pod's fsGroup may write it.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	owner := info.Sys().(*syscall.Stat_t)
	if uid := os.Geteuid(); uid != 0 && owner.Uid != 0 && int(owner.Uid) != uid {
		return fmt.Errorf("the store's directory %s belongs to user %d, who can replace what is in it: run copilot as that user, or run \"chown -R %d %[1]s\"", dir, owner.Uid, uid)
	}
	mode := info.Mode().Perm()
	if mode&0o002 != 0 || mode&0o020 != 0 && !isFSGroup(info) {
		return fmt.Errorf("others can write the store's directory %s (mode %04o): run \"chmod go-w %[1]s\", and look at what is in it", dir, mode)
	}
	return nil
}

// isFSGroup reports whether a directory is root's and its group is one of this
// process's, as the kubelet makes a volume for a pod with an fsGroup.
func isFSGroup(dir fs.FileInfo) bool {
	owner := dir.Sys().(*syscall.Stat_t)
	groups, err := os.Getgroups()
	return err == nil && owner.Uid == 0 && os.Geteuid() != 0 && slices.Contains(append(groups, os.Getegid()), int(owner.Gid))
}

// checkFile rejects a file of a store that is owned by a user other than root, this
// user or the owner of its directory, or that has one of the mode bits in forbidden:
// others can do what then.
func checkFile(name string, info fs.FileInfo, forbidden fs.FileMode, what, fix string) error {
	if err := CheckOwner(name, info); err != nil {
		return err
	}
	if info.Mode().Perm()&forbidden != 0 {
		return fmt.Errorf("%s can be %s by others (mode %04o): %s", name, what, info.Mode().Perm(), fix)
	}
	return nil
}

// CheckOwner rejects a file that is owned by a user other than root, this user or the
// owner of its directory.
func CheckOwner(name string, info fs.FileInfo) error {
	owner := info.Sys().(*syscall.Stat_t).Uid
	if owner == 0 || int(owner) == os.Geteuid() {
		return nil
	}
	dir, err := os.Stat(filepath.Dir(name))
	if err != nil {
		return err
	}
	// Root reads the store of the service's user.
	if os.Geteuid() == 0 && dir.Sys().(*syscall.Stat_t).Uid == owner {
		return nil
	}
	return fmt.Errorf("%s belongs to user %d, who may have put it there: if it is the right one, run \"chown %d %[1]s\"", name, owner, dir.Sys().(*syscall.Stat_t).Uid)
}

// giveToOwner gives a file that root has made to the owner of its directory.
func giveToOwner(f *os.File) error {
	dir, err := os.Stat(filepath.Dir(f.Name()))
	if err != nil || os.Geteuid() != 0 {
		return err
	}
	owner := dir.Sys().(*syscall.Stat_t)
	return f.Chown(int(owner.Uid), int(owner.Gid))
}
