package policy

import (
	"fmt"
	"time"

	"github.com/ctrlplane/pilot/internal/filestamp"
	"github.com/ctrlplane/pilot/internal/regular"
)

const (
	// settleTries is how many times readWhole waits for a policy file to be whole.
	settleTries = 10
	// maxFile bounds a policy, in bytes.
	maxFile = 4 << 20
)

// readWhole returns the content of a file once it is no longer being written, and its
// stamp. It waits up to 5 seconds. If that is not enough, it returns the stamp of no
// file, so that it is read again, whether it changes or not.
func readWhole(name string) ([]byte, filestamp.Stamp, error) {
	before, err := filestamp.Of(name)
	for range settleTries {
		if err != nil {
			return nil, before, err
		}
		var now filestamp.Stamp
		if wait := before.Wait(); wait > 0 {
			time.Sleep(wait)
			if now, err = filestamp.Of(name); now != before {
				before = now
				continue
			}
		}
		if before.Size() > maxFile {
			return nil, before, fmt.Errorf("%s has %d bytes, more than %d", name, before.Size(), maxFile)
		}
		b, err := regular.ReadText(name, maxFile)
		if err != nil {
			return nil, before, err
		}
		if now, err = filestamp.Of(name); err == nil && now == before {
			return b, before, nil
		}
		before = now
	}
	return nil, filestamp.Stamp{}, fmt.Errorf("%s is being written all the time", name)
}
