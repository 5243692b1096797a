//go:build unix && !linux

package replacefile

import "golang.org/x/sys/unix"

// openDir opens a directory to go through it.
const openDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
