package layout

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// lockInterval is how often a lock is tried that another process holds.
const lockInterval = 20 * time.Millisecond

// lockTimeout bounds the wait for a lock. They are held for milliseconds, but anybody who
// can read the directory can lock it. Tests shorten it.
var lockTimeout = 10 * time.Second

// lock keeps others from changing index.json, which is replaced and so is not locked
// itself, until the returned function is called. A file system without locks is no error.
func lock(ctx context.Context, root *os.Root) (unlock func() error, err error) {
	f, err := root.Open(lockName)
	if err != nil {
		return nil, err
	}
	timeout := time.After(lockTimeout)
	for isHeld(f) {
		select {
		case <-timeout:
			return nil, errors.Join(fmt.Errorf("another process has locked it for %v", lockTimeout), f.Close())
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), f.Close())
		case <-time.After(lockInterval):
		}
	}
	return f.Close, nil
}
