//go:build unix

package layout

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockInterval is how often a lock is tried that another process holds.
const lockInterval = 20 * time.Millisecond

// lock keeps others from changing index.json until the returned function is called. It
// locks the directory, since index.json is replaced. A file system without locks is no
// error.
func lock(ctx context.Context, root *os.Root) (unlock func() error, err error) {
	dir, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return dir.Close, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), dir.Close())
		case <-time.After(lockInterval):
		}
	}
}
