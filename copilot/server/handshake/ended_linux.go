package handshake

import "golang.org/x/sys/unix"

// ended reports whether nothing more comes from a socket.
func ended(fd uintptr) bool {
	n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	return n == 0 || err != nil && err != unix.EAGAIN
}
