// Package unixsocket listens on unix sockets that only their owner may use.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Listen listens on a new unix socket at path, of mode 0600. It creates the
// directory, of mode 0755, if it is missing. It replaces a socket that a dead process
// left behind. A socket on which something answers is an error, and so is a file that
// is not a socket.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s exists and is not a socket", path)
	default:
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("%s is in use by another process", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
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
