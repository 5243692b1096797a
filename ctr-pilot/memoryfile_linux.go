package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// memoryFile makes an empty file in memory, which stays open until the program ends, and
// returns its name.
func memoryFile() (string, error) {
	fd, err := unix.MemfdCreate("key", unix.MFD_CLOEXEC)
	return fmt.Sprintf("/proc/self/fd/%d", fd), err
}
