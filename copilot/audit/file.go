package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// OpenFile continues the log in the file named name, which it creates with mode 0600 if
// it is missing, or writes a new log to standard output if name is "-". One process at
// a time can write a file. Known are the last lines of its chains that are known to be
// on disk, the last one at the end: if the file does not have them, that is logged, and
// a new chain begins after them.
func OpenFile(name string, key Key, known ...Head) (*Log, error) {
	if name == "-" {
		return newLog(key, stdout{}, false, nil)
	}
	f := &file{name: name}
	if err := f.reopen(); err != nil {
		return nil, err
	}
	l, err := newLog(key, f, true, known)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("audit log: %w", err)
	}
	return l, nil
}

// stdout is a sink that another program reads.
type stdout struct{}

func (stdout) append(_ string, _ int64, lines [][]byte) error {
	n, err := os.Stdout.Write(joinLines(lines))
	if err != nil && n > 0 {
		os.Stdout.Write([]byte("\n")) // so that the next line is whole
	}
	return err
}

func (stdout) head(Key, string) ([]byte, error)                     { return nil, nil }
func (stdout) missing(context.Context, Key, []Head) ([]Head, error) { return nil, nil }
func (stdout) Close() error                                         { return nil }

// lockWait is how long to wait for another process to close the file. A program that is being
// started has the files of the one that starts it for a moment.
const lockWait = 2 * time.Second

// file is a sink that is one file.
type file struct {
	name string
	f    *os.File
	size int64 // at least, after what was written
}

func (s *file) Close() error { return s.f.Close() }

// reopen opens the file that has the name now.
func (s *file) reopen() error {
	f, err := os.OpenFile(s.name, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if s.f != nil && sameFile(s.f, f) {
		s.size = 0
		return f.Close()
	}
	if s.f != nil && isRegular(s.f) && !isRegular(f) {
		// Where lines would go that nobody finds again, or that nobody reads.
		f.Close()
		return fmt.Errorf("audit log: %s was replaced by a device or a pipe: move it away, and check who can write to its directory", s.name)
	}
	// A pipe or a device can't be locked.
	for end := time.Now().Add(lockWait); isLocked(f); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			f.Close()
			return fmt.Errorf("audit log: %s is in use by another copilot: give each its own", s.name)
		}
	}
	if s.f != nil {
		s.f.Close()
	}
	s.f, s.size = f, 0
	return s.endLine()
}

// endLine terminates an incomplete last line, which a crash or another program left.
func (s *file) endLine() error {
	info, err := s.f.Stat()
	if err != nil || info.Size() == 0 || !info.Mode().IsRegular() {
		return err
	}
	last := make([]byte, 1)
	if _, err := s.f.ReadAt(last, info.Size()-1); err != nil || last[0] == '\n' {
		return err
	}
	_, err = s.f.Write([]byte("\n"))
	return err
}

// lost says why the file's name no longer leads to it, or returns "" if it does. Lines
// written to a lost file can't be found by its name.
func (s *file) lost() string {
	mine, err := s.f.Stat()
	if err != nil || !mine.Mode().IsRegular() {
		return "" // append says what is wrong
	}
	if isDeleted(mine) {
		return "its file was deleted"
	}
	if named, err := os.Stat(s.name); err != nil || !os.SameFile(mine, named) {
		return "its file was moved or replaced"
	}
	if mine.Size() < s.size {
		return "its file was truncated"
	}
	return ""
}

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

func sameFile(a, b *os.File) bool {
	infoA, errA := a.Stat()
	infoB, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

// append writes the lines and waits until they are on disk. A partial write is undone.
func (s *file) append(_ string, _ int64, lines [][]byte) error {
	info, err := s.f.Stat()
	if err != nil {
		return err
	}
	n, err := s.f.Write(joinLines(lines))
	if !info.Mode().IsRegular() {
		return err
	}
	if err == nil {
		err = s.f.Sync()
	}
	if err != nil && n > 0 {
		err = errors.Join(err, s.f.Truncate(info.Size()))
	}
	if err == nil {
		s.size = info.Size() + int64(n)
	}
	return err
}

// head returns the last line that this key sealed.
func (s *file) head(key Key, _ string) ([]byte, error) {
	info, err := s.f.Stat()
	if err != nil || info.Size() == 0 || !info.Mode().IsRegular() {
		return nil, err
	}
	tail := make([]byte, min(info.Size(), 2*maxBatch*maxLine))
	if _, err := s.f.ReadAt(tail, info.Size()-int64(len(tail))); err != nil && err != io.EOF {
		return nil, err
	}
	for rest := bytes.TrimRight(tail, "\n"); len(rest) > 0; {
		i := bytes.LastIndexByte(rest, '\n')
		if _, _, err := key.open(rest[i+1:]); err == nil {
			return rest[i+1:], nil
		}
		rest = rest[:max(i, 0)]
	}
	return nil, fmt.Errorf("%s does not end in lines that this copilot wrote: \"copilot audit verify\" says more; move it away to begin a new one", s.name)
}

func joinLines(lines [][]byte) []byte {
	return append(bytes.Join(lines, []byte("\n")), '\n')
}
