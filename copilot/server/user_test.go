package server

import (
	"context"
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/copilot/server/caller"
)

// withUser returns the context of a connection over a unix socket that a user of this
// machine made. Users other than the test's take root.
func withUser(t testing.TB, ctx context.Context, uid int) context.Context {
	t.Helper()
	// The kernel notes the effective user of the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(uid int) {
		const same = ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
			t.Fatalf("become user %d: %v", uid, errno)
		}
	}
	own := os.Geteuid()
	if uid != own {
		become(uid)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if uid != own {
		become(own)
	}
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "")
	defer file.Close()
	defer unix.Close(fds[1])
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return caller.OnConnection(ctx, conn)
}
