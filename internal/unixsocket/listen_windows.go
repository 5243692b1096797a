package unixsocket

import (
	"errors"
	"net"
)

// listen fails: a socket's file has no mode that keeps other users from it.
func listen(string) (net.Listener, error) {
	return nil, errors.New("pilot listens on no unix sockets on Windows")
}
