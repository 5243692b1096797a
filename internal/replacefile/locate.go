//go:build unix

package replacefile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links are followed, as by Linux.
const maxLinks = 40

// locate returns the file's directory, its name there, and its FileInfo. It goes through
// name step by step, so that it sees each link. Those that change meanwhile are an error,
// and those that change afterwards have no effect.
func locate(name string) (dir *os.Root, base string, info fs.FileInfo, err error) {
	w := walk{path: "."}
	defer func() { err = errors.Join(err, w.close()) }()
	if w.fd, err = unix.Open(w.path, openDir, 0); err != nil {
		return nil, "", nil, &fs.PathError{Op: "open", Path: w.path, Err: err}
	}
	if base, err = w.to(name); err != nil {
		return nil, "", nil, err
	}
	if dir, err = w.root(); err != nil {
		return nil, "", nil, err
	}
	if info, err = dir.Lstat(base); err == nil {
		err = w.check(name, info)
	}
	if err != nil {
		dir.Close()
		return nil, "", nil, err
	}
	return dir, base, info, nil
}

// walk is a way through directories.
type walk struct {
	fd      int    // the directory that it has come to
	path    string // of that, without symbolic links
	foreign []int  // the other users that control a link on the way
}

func (w *walk) close() error { return unix.Close(w.fd) }

// to follows name, and returns the last part of it, which is not a link.
func (w *walk) to(name string) (base string, err error) {
	links := 0
	for rest := name; ; {
		if strings.HasPrefix(rest, "/") {
			if err := w.enter("/"); err != nil {
				return "", err
			}
		}
		var part string
		part, rest, _ = strings.Cut(strings.TrimLeft(rest, "/"), "/")
		rest = strings.TrimLeft(rest, "/") // only a name or a target begins at the root
		if part == "" || part == "." || part == ".." {
			if rest == "" {
				return "", &fs.PathError{Op: "open", Path: name, Err: unix.EISDIR}
			}
			if part != ".." {
				continue
			}
		}
		target, err := w.link(part)
		switch {
		case err != nil:
			return "", &fs.PathError{Op: "open", Path: name, Err: err}
		case target != "":
			if links++; links > maxLinks {
				return "", fmt.Errorf("%s: too many symbolic links", name)
			}
			rest = strings.TrimSuffix(target+"/"+rest, "/")
		case rest == "":
			return part, nil
		default:
			if err := w.enter(part); err != nil {
				return "", err
			}
		}
	}
}

// link returns where a symbolic link in the directory leads, and notes who controls it,
// or "" if it is none.
func (w *walk) link(part string) (target string, err error) {
	var dir, link unix.Stat_t
	if err := unix.Fstatat(w.fd, part, &link, unix.AT_SYMLINK_NOFOLLOW); err != nil || link.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", err
	}
	if err := unix.Fstat(w.fd, &dir); err != nil {
		return "", err
	}
	for _, user := range []int{int(link.Uid), int(dir.Uid)} {
		if user != 0 && user != os.Geteuid() {
			w.foreign = append(w.foreign, user)
		}
	}
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(w.fd, part, b)
	return string(b[:max(n, 0)]), err
}

// enter goes to a directory in this one, or to the root directory, and follows no link.
func (w *walk) enter(part string) error {
	path := w.path + "/" + part
	if part == "/" {
		path = part
	}
	fd, err := unix.Openat(w.fd, part, openDir|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	err = w.close()
	w.fd, w.path = fd, path
	return err
}

// root opens the directory that the walk has come to.
func (w *walk) root() (*os.Root, error) {
	dir, err := os.OpenRoot(w.path)
	if err != nil {
		return nil, err
	}
	var walked unix.Stat_t
	err = unix.Fstat(w.fd, &walked)
	if info, statErr := dir.Stat("."); statErr != nil || err != nil {
		err = errors.Join(statErr, err)
	} else if opened, ok := info.Sys().(*syscall.Stat_t); !ok || opened.Ino != walked.Ino || uint64(opened.Dev) != uint64(walked.Dev) {
		err = fmt.Errorf("%s was replaced meanwhile", w.path)
	}
	if err != nil {
		dir.Close()
		return nil, err
	}
	return dir, nil
}

// check returns an error unless the file may be replaced.
func (w *walk) check(name string, file fs.FileInfo) error {
	if !file.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", name)
	}
	for _, user := range w.foreign {
		if userOf(file) != user {
			return fmt.Errorf("%s is where a symbolic link leads that user %d may have put there: name the file itself", name, user)
		}
	}
	return nil
}

// userOf returns the user that a file belongs to, or -1 if that is not known.
func userOf(info fs.FileInfo) int {
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(owner.Uid)
	}
	return -1
}
