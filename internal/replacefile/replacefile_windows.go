package replacefile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/windows"
)

// locate returns the file's directory, its name there, and its FileInfo.
func locate(name string) (_ *os.Root, base string, info fs.FileInfo, err error) {
	if name, err = filepath.EvalSymlinks(name); err != nil {
		return nil, "", nil, err
	}
	dir, err := os.OpenRoot(filepath.Dir(name))
	if err != nil {
		return nil, "", nil, err
	}
	base = filepath.Base(name)
	if info, err = dir.Lstat(base); err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		dir.Close()
		return nil, "", nil, err
	}
	return dir, base, info, nil
}

// allowAs gives a new file the access control list of another in dir.
func allowAs(f *os.File, dir *os.Root, base string, _ fs.FileInfo) error {
	list, err := windows.GetNamedSecurityInfo(filepath.Join(dir.Name(), base), windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION)
	if err != nil {
		return err
	}
	dacl, _, err := list.DACL()
	if err != nil {
		return err
	}
	control, _, err := list.Control()
	if err != nil {
		return err
	}
	var what windows.SECURITY_INFORMATION = windows.DACL_SECURITY_INFORMATION
	if control&windows.SE_DACL_PROTECTED != 0 { // it takes nothing over from its directory
		what |= windows.PROTECTED_DACL_SECURITY_INFORMATION
	}
	return windows.SetNamedSecurityInfo(filepath.Join(dir.Name(), filepath.Base(f.Name())), windows.SE_FILE_OBJECT, what, nil, nil, dacl, nil)
}

// A rename is tried for 2 s in all.
const (
	renameTries    = 40
	renameInterval = 50 * time.Millisecond
)

func repeat(rename func() error) (err error) {
	for range renameTries {
		if err = rename(); !isBusy(err) {
			return err
		}
		time.Sleep(renameInterval)
	}
	return fmt.Errorf("another program has the file open: %w", err)
}

func isBusy(err error) bool {
	return errors.Is(err, windows.ERROR_SHARING_VIOLATION) || errors.Is(err, windows.ERROR_ACCESS_DENIED)
}

// replaceOpen moves a file that is open out of the way where it can't be replaced, as on
// network drives: it is gone once it is closed.
func replaceOpen(dir *os.Root, temporary, name string) error {
	err := dir.Rename(temporary, name)
	if !isBusy(err) {
		return err
	}
	away := temporary + ".old"
	if dir.Rename(name, away) != nil {
		return err
	}
	if err := dir.Rename(temporary, name); err != nil {
		return errors.Join(err, dir.Rename(away, name))
	}
	return dir.Remove(away)
}

// sync does nothing: a directory can't be flushed.
func sync(*os.Root) error { return nil }
