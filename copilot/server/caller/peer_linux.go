package caller

import "golang.org/x/sys/unix"

// peer returns the user at the other end of a unix socket.
func peer(fd uintptr) (uid int, ok bool) {
	cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, false
	}
	return int(cred.Uid), true
}
