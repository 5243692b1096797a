package unixsocket

import (
	"context"
	"net"
	"os"
	"syscall"
)

func listen(path string) (net.Listener, error) {
	conf := net.ListenConfig{Control: ownerOnly}
	return conf.Listen(context.Background(), "unix", path)
}

// ownerOnly gives a socket that is not bound yet the mode 0600. On Linux the file
// that bind creates takes its mode from the socket, less the umask (unix_bind in
// net/unix/af_unix.c), so others can't connect at any moment. A umask instead would
// be that of the whole process, and of the files that it creates meanwhile.
func ownerOnly(_, _ string, c syscall.RawConn) error {
	var chmodErr error
	if err := c.Control(func(fd uintptr) { chmodErr = syscall.Fchmod(int(fd), 0o600) }); err != nil {
		return err
	}
	return os.NewSyscallError("fchmod", chmodErr)
}
