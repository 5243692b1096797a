//go:build unix && !linux

package unixsocket

import (
	"net"
	"syscall"
)

// listen changes the umask of the process for a moment: other systems than Linux do not
// take the mode of a socket that is not bound. Directories that are made meanwhile can't
// be entered by others.
func listen(path string) (net.Listener, error) {
	defer syscall.Umask(syscall.Umask(0o177))
	return net.Listen("unix", path)
}
