// Package filestamp detects that a file has changed, and that it may still be being
// written.
package filestamp

import (
	"fmt"
	"os"
	"time"
)

// Settle is how long a file must not have changed to be complete. A program that
// truncates a file and writes it again is done by then. It is also longer than the
// resolution of any file system's times.
const Settle = 500 * time.Millisecond

// Stamp identifies one content of a file. The zero Stamp is that of a missing file.
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
	s := Stamp{modified: info.ModTime(), changed: info.ModTime(), size: info.Size()}
	s.addSystem(info)
	return s, nil
}

// Size is the file's, in bytes.
func (s Stamp) Size() int64 { return s.size }

// Wait returns how long to wait, from 0 to [Settle], until the file is complete if it has
// the same stamp then: after that, each change gives it another one. It is Settle if the
// file's time is in the future, as after the clock was set.
func (s Stamp) Wait() time.Duration {
	return min(max(Settle-time.Since(s.changed), 0), Settle)
}
