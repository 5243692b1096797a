// Package servertest runs real brokers in tests.
package servertest

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/server"
)

// CreateKEKs creates KEKs in the store in a directory.
func CreateKEKs(t testing.TB, dir string, ids ...string) {
	t.Helper()
	keys, err := server.OpenKeys(t.Context(), server.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if _, err := keys.Create(t.Context(), id, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
}

// Serve runs a broker until the test ends, when it must stop without an error. It listens
// on a unix socket in conf.Dir, whose address Serve returns, besides conf.Listen.
func Serve(t testing.TB, conf server.Config) (address string) {
	t.Helper()
	socket := filepath.Join(conf.Dir, "s")
	// It is opened last: once it accepts connections, the others do too.
	conf.Listen = append(conf.Listen, "unix://"+socket)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, conf) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for range 6000 { // a minute
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return "unix://" + socket
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the broker does not start")
	return ""
}
