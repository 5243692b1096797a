// Package regular reads configuration, certificates and keys from files that have
// to be regular files. A named pipe in place of one would keep a program waiting,
// and a device or a huge file would take all of its memory.
package regular

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// Sizes of files, in bytes.
const (
	// MaxConfig is the most that configuration, certificates and keys may have.
	MaxConfig = 4 << 20
)

// Open opens a regular file, or what symbolic links lead to, without waiting. It
// takes /dev/null, too, as an empty file.
func Open(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := check(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Read reads a file that [Open] takes. More than most bytes are an error.
func Read(name string, most int) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return ReadAll(f, most)
}

// ReadAll is Read of a file that was opened without waiting (O_NONBLOCK). It
// closes the file.
func ReadAll(f *os.File, most int) ([]byte, error) {
	defer f.Close()
	if err := check(f); err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if size := info.Size(); size <= int64(most) {
		b.Grow(int(size) + bytes.MinRead) // so that no copy of a key is left
	}
	if _, err := b.ReadFrom(io.LimitReader(f, int64(most)+1)); err != nil {
		return nil, err
	}
	if b.Len() > most {
		clear(b.Bytes())
		return nil, fmt.Errorf("%s is too large: at most %d KiB are read", f.Name(), most>>10)
	}
	return b.Bytes(), nil
}

func check(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	kind := "a device"
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		kind = "a pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	case mode&fs.ModeCharDevice != 0:
		if null, err := os.Stat(os.DevNull); err == nil && os.SameFile(info, null) {
			return nil
		}
	}
	return fmt.Errorf("%s is %s, and has to be a regular file", f.Name(), kind)
}
