// Package filestamp tells whether a file was changed, and whether somebody may still
// be writing it.
package filestamp

import (
	"fmt"
	"os"
	"syscall"
	"time"
)

// Settle is for how long a file must not have changed to be taken for whole. A
// program that truncates a file and writes it anew is done by then.
const Settle = 500 * time.Millisecond

// Stamp tells one content of a file from others. The zero Stamp is that of a file
// that is missing.
type Stamp struct {
	modified, changed time.Time
	size              int64
	inode             uint64
}

// Of returns the stamp of a regular file.
func Of(name string) (Stamp, error) {
	info, err := os.Stat(name)
	if err != nil {
		return Stamp{}, err
	}
	if !info.Mode().IsRegular() {
		return Stamp{}, fmt.Errorf("%s is not a regular file", name)
	}
	s := Stamp{modified: info.ModTime(), size: info.Size()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.changed = sys.Ino, time.Unix(sys.Ctim.Unix())
	}
	return s, nil
}

// Size is the file's, in bytes.
func (s Stamp) Size() int64 { return s.size }

// Wait returns how long to wait before the file is whole, from 0 to [Settle], if it
// has the same stamp then. It is Settle if the file's time is in the future, as
// after the clock was set.
func (s Stamp) Wait() time.Duration {
	return min(max(Settle-time.Since(s.changed), 0), Settle)
}
