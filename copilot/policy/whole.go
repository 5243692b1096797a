package policy

import (
	"fmt"
	"os"
	"syscall"
	"time"
)

const (
	// settleTime is for how long a policy file must not have changed when it is read.
	// An editor that truncates a file and writes it anew is done by then.
	settleTime = 500 * time.Millisecond
	// settleTries is how often that is waited for.
	settleTries = 10
	// maxFile bounds a policy, in bytes.
	maxFile = 4 << 20
)

// stamp tells one content of a file from others.
type stamp struct {
	modified, changed time.Time
	size              int64
	inode             uint64
}

func stampOf(name string) (stamp, error) {
	info, err := os.Stat(name)
	if err != nil {
		return stamp{}, err
	}
	if !info.Mode().IsRegular() {
		return stamp{}, fmt.Errorf("%s is not a regular file", name)
	}
	s := stamp{modified: info.ModTime(), size: info.Size()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.changed = sys.Ino, time.Unix(sys.Ctim.Unix())
	}
	return s, nil
}

// readWhole returns what is in a file once nobody is writing it, and the stamp of
// that. It waits up to 5 seconds.
func readWhole(name string) ([]byte, stamp, error) {
	before, err := stampOf(name)
	for range settleTries {
		if err != nil {
			return nil, before, err
		}
		var now stamp
		// After the clock was set, the last change can be in the future.
		if wait := settleTime - time.Since(before.changed); wait > 0 {
			time.Sleep(min(wait, settleTime))
			if now, err = stampOf(name); now != before {
				before = now
				continue
			}
		}
		if before.size > maxFile {
			return nil, before, fmt.Errorf("%s has %d bytes, more than %d", name, before.size, maxFile)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, before, err
		}
		if now, err = stampOf(name); err == nil && now == before {
			return b, before, nil
		}
		before = now
	}
	return nil, before, fmt.Errorf("%s is being written all the time", name)
}
