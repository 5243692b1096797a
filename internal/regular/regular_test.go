//go:build unix

package regular

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	fifo, socket, sparse := filepath.Join(dir, "fifo"), filepath.Join(dir, "socket"), filepath.Join(dir, "sparse")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.WriteFile(sparse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 1<<40); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(fifo, link); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		fifo: "is a named pipe", link: "is a named pipe", socket: "no such device or address", dir: "is a directory", "/dev/zero": "is a device", sparse: "is too large: at most 4 KiB",
		filepath.Join(dir, "missing"): "no such file",
	} {
		if b, err := Read(name, 4096); b != nil || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %d bytes, %v; want %q", name, len(b), err, want)
		}
		if err := Check(name, 4096); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("check of %s: %v; want %q", name, err, want)
		}
	}
	if b, err := Read(os.DevNull, 4096); err != nil || len(b) > 0 {
		t.Errorf("%s: %q, %v", os.DevNull, b, err)
	}
}

// TestLimit reads files of the largest size, one byte more, and files that say
// another size than they have, as those of /proc do.
func TestLimit(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	for size, taken := range map[int]bool{0: true, 4095: true, 4096: true, 4097: false} {
		text := bytes.Repeat([]byte("x"), size)
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := Read(name, 4096)
		if taken != (err == nil) || taken && !bytes.Equal(b, text) {
			t.Errorf("%d bytes: %d, %v", size, len(b), err)
		}
	}
	if b, err := Read("/proc/self/status", 64<<10); err != nil || !bytes.HasPrefix(b, []byte("Name:")) {
		t.Errorf("/proc/self/status: %q, %v", b, err)
	}
}

// TestGivenPipe reads a pipe as the shell's <(command) gives it, which has nothing in it
// at first.
func TestGivenPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result)
	go func() {
		b, err := Read("/dev/fd/"+strconv.Itoa(int(r.Fd())), 4096)
		done <- result{b, err}
	}()
	w.WriteString("key = 1")
	w.Close()
	if got := <-done; string(got.b) != "key = 1" || got.err != nil {
		t.Errorf("%q, %v", got.b, got.err)
	}
}
