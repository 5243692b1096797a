package watchdog_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/watchdog"
)

// TestRun has a service that lives, hangs, and lives again tell a socket such
// as systemd's.
func TestRun(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	t.Setenv("WATCHDOG_USEC", "150000")
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	var hangs atomic.Bool
	go func() {
		defer close(ended)
		watchdog.Run(ctx, func(ctx context.Context) error {
			if hangs.Load() {
				<-ctx.Done()
				return errors.New("hangs")
			}
			return nil
		})
	}()
	told := func(within time.Duration) bool {
		l.SetReadDeadline(time.Now().Add(within))
		b := make([]byte, 64)
		n, err := l.Read(b)
		return err == nil && string(b[:n]) == "WATCHDOG=1"
	}
	for range 3 {
		if !told(time.Minute) {
			t.Fatal("systemd is not told that the service lives")
		}
	}
	hangs.Store(true)
	silent := false
	for range 20 { // what was said before may still come
		if silent = !told(300 * time.Millisecond); silent {
			break
		}
	}
	if !silent {
		t.Error("systemd is told that a service lives that hangs")
	}
	hangs.Store(false)
	if !told(time.Minute) {
		t.Error("systemd is not told that the service lives again")
	}
	stop()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("it does not end with its context")
	}
}

func TestNoWatchdog(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	watchdog.Run(context.Background(), func(context.Context) error {
		t.Error("asked, and nobody wants to know")
		return nil
	})
}
