package layout

import (
	"context"
	"errors"
	"os"
	"time"
)

// lockInterval is how often a lock is tried that another process holds.
const lockInterval = 20 * time.Millisecond

// lock keeps others from changing index.json, which is replaced and so is not locked
// itself, until the returned function is called. A file system without locks is no error.
func lock(ctx context.Context, root *os.Root) (unlock func() error, err error) {
	f, err := root.Open(lockName)
	if err != nil {
		return nil, err
	}
	for isHeld(f) {
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), f.Close())
		case <-time.After(lockInterval):
		}
	}
	return f.Close, nil
}
