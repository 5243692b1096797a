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

// TestOnlyHealthyServicesNotifySystemd has a service that works, hangs, and works again.
// The socket is as systemd's.
func TestOnlyHealthyServicesNotifySystemd(t *testing.T) {
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
	notified := func(timeout time.Duration) bool {
		l.SetReadDeadline(time.Now().Add(timeout))
		b := make([]byte, 64)
		n, err := l.Read(b)
		return err == nil && string(b[:n]) == "WATCHDOG=1"
	}
	for range 3 {
		if !notified(time.Minute) {
			t.Fatal("no notification")
		}
	}
	hangs.Store(true)
	silent := false
	for range 20 { // earlier notifications may still arrive
		if silent = !notified(300 * time.Millisecond); silent {
			break
		}
	}
	if !silent {
		t.Error("a notification while the service hangs")
	}
	hangs.Store(false)
	if !notified(time.Minute) {
		t.Error("no notification after the service recovered")
	}
	stop()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("Run does not end with its context")
	}
}

func TestNoWatchdog(t *testing.T) {
	t.Setenv("WATCHDOG_USEC", "")
	watchdog.Run(context.Background(), func(context.Context) error {
		t.Error("health is checked without a watchdog")
		return nil
	})
}
