//go:build unix

package unixsocket_test

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/internal/unixsocket"
)

// listen listens at path and checks that a client gets through.
func listen(t *testing.T, path string) {
	t.Helper()
	l, err := unixsocket.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			conn.Write([]byte("!"))
			conn.Close()
		}
	}()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, err := conn.Read(make([]byte, 2)); n != 1 {
		t.Errorf("%d bytes came, %v", n, err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %s, want that of a socket that only its owner may use", info.Mode())
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "pilot", "s")
	listen(t, path)
	for _, made := range []string{"run", "run/pilot"} {
		if info, err := os.Stat(filepath.Join(dir, made)); err != nil {
			t.Error(err)
		} else if info.Mode().Perm()&0o022 != 0 {
			t.Errorf("%s: others may write, mode %s", made, info.Mode())
		}
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left when it is closed")
	}
}

// TestModeFromTheFirstMoment watches the mode of sockets while they are created, and
// that of other files that the process creates meanwhile, with a umask that takes no
// rights away.
func TestModeFromTheFirstMoment(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := t.TempDir()
	path, other := filepath.Join(dir, "s"), filepath.Join(dir, "other")
	done := make(chan struct{})
	var watchers sync.WaitGroup
	watchers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if info, err := os.Lstat(path); err == nil && info.Mode() != fs.ModeSocket|0o600 {
				t.Errorf("the socket has mode %s for a moment", info.Mode())
				return
			}
		}
	})
	watchers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := os.Mkdir(other, 0o777); err != nil {
				t.Error(err)
				return
			}
			info, err := os.Stat(other)
			if err != nil {
				t.Error(err)
				return
			}
			if info.Mode().Perm() != 0o777 {
				t.Errorf("a directory made meanwhile has mode %s", info.Mode())
				return
			}
			os.Remove(other)
		}
	})
	for range 2000 {
		l, err := unixsocket.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	close(done)
	watchers.Wait()
}

// TestSocketOfADeadProcessIsReplaced has a socket left behind by a process that was killed.
func TestSocketOfADeadProcessIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	listen(t, path)
}

// TestSocketInUseStays has paths that are a socket in use, or no socket.
func TestSocketInUseStays(t *testing.T) {
	dir := t.TempDir()
	used := filepath.Join(dir, "used")
	l, err := unixsocket.Listen(used)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(used, link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		used: "in use by another process", file: "exists and is not a socket", link: "exists and is not a socket", dir: "exists and is not a socket",
		filepath.Join(file, "s"): "not a directory",
	} {
		if l, err := unixsocket.Listen(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v, want %q", path, err, want)
			if l != nil {
				l.Close()
			}
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if conn, err := net.Dial("unix", used); err != nil {
		t.Errorf("the socket that was there: %v", err)
	} else {
		conn.Close()
	}
}
