package host

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
)

// HTTPGet sends a GET of path over HTTP to a unix socket, and returns at most limit
// bytes of the body, and the PID of the server. A status other than 200 is an error.
func HTTPGet(ctx context.Context, socket, path string, limit int64) ([]byte, int, error) {
	var pid int
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, err
		}
		if pid, err = peerPID(conn.(*net.UnixConn)); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, 0, fmt.Errorf("HTTP status %s", resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	return body, pid, err
}
