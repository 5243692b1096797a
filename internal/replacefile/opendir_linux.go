package replacefile

import "golang.org/x/sys/unix"

// openDir opens a directory to go through it, which takes no permission to read it.
const openDir = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
