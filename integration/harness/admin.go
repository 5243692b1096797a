package harness

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
)

// AdminGet reads something of an admin socket.
func AdminGet(t testing.TB, socket, path string) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r, err := client.Get("http://admin" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK || len(b) == 0 {
		t.Fatalf("%s: %s, %d bytes, %v", path, r.Status, len(b), err)
	}
	return string(b)
}
