// Package regular reads configuration, certificates and keys from files that have
// to be regular files. A named pipe in place of one would keep a program waiting,
// and a device or a huge file would take all of its memory.
//
// Two others are taken: /dev/null, as an empty file, and a pipe that the process was
// started with, as the shell's <(command) is one.
package regular

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// MaxConfig is the most that configuration, certificates and keys may have, in bytes.
const MaxConfig = 4 << 20

// Open opens a regular file, or what symbolic links lead to, without waiting.
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

// Check returns the error with which [Read] would fail, for what others read.
func Check(name string, most int) error {
	f, err := Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > int64(most) {
		return tooLarge(name, most)
	}
	return nil
}

func tooLarge(name string, most int) error {
	return fmt.Errorf("%s is too large: at most %d KiB are read", name, most>>10)
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
		return nil, tooLarge(f.Name(), most)
	}
	return b.Bytes(), nil
}

// ReadText is [Read] of a text in UTF-8, without the byte order mark that editors on
// Windows put in front of it. A text in UTF-16, as older PowerShells write, is an error.
func ReadText(name string, most int) ([]byte, error) {
	b, err := Read(name, most)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(b, []byte("\xff\xfe")) || bytes.HasPrefix(b, []byte("\xfe\xff")) {
		return nil, fmt.Errorf("%s is in UTF-16: save it as UTF-8", name)
	}
	return bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")), nil
}

func check(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	kind := "a device"
	given := strings.HasPrefix(f.Name(), "/dev/fd/") || strings.HasPrefix(f.Name(), "/proc/self/fd/") || f.Name() == "/dev/stdin"
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return nil
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeNamedPipe != 0 && given:
		return nil
	case mode&fs.ModeNamedPipe != 0:
		kind = "a named pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	case mode&fs.ModeCharDevice != 0:
		if null, err := os.Stat(os.DevNull); err == nil && os.SameFile(info, null) {
			return nil
		}
	}
	return fmt.Errorf("%s is %s, and has to be a regular file", f.Name(), kind)
}
