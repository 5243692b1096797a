//go:build unix

package replacefile

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

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
