package layout

import (
	"errors"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/windows"
)

// lockName is what is locked: directories can't be, and this file is never replaced.
const lockName = ocispec.ImageLayoutFile

// isHeld locks f, and reports whether another process has it locked. Nobody can read bytes
// that are locked, so it is one far behind the file's end.
func isHeld(f *os.File) bool {
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &windows.Overlapped{OffsetHigh: 1 << 30})
	return errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING)
}
