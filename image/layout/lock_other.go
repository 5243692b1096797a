//go:build !unix

package layout

import (
	"context"
	"os"
)

// lock does nothing: two processes must not name images in a layout at once.
func lock(context.Context, *os.Root) (unlock func() error, err error) {
	return func() error { return nil }, nil
}
