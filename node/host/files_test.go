package host

import (
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLinksStayInRoot uses a root with links that lead outside of it, unless they are
// resolved inside.
func TestLinksStayInRoot(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	o := Host{Root: filepath.Join(dir, "root")}
	for _, d := range []string{outside + "/a.service.d", o.Root + "/etc", o.Root + outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"absolute": outside, "up": "../../../../../../../../.." + outside, "etc/deep": "../../.." + outside} {
		if err := os.Symlink(to, filepath.Join(o.Root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(outside+"/a.service.d/pilot.conf", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{"/absolute", "/up", "/etc/deep", "/../../.." + outside} {
		name := filepath.Join(link, "file")
		if err := o.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Errorf("%s: %v", link, err)
		}
		if b, err := os.ReadFile(filepath.Join(o.Root, outside, "file")); err != nil || string(b) != "x" {
			t.Errorf("%s: %q, %v", link, b, err)
		}
		if found, err := o.Glob(filepath.Join(link, "*.service.d/*.conf")); len(found) > 0 || err != nil {
			t.Errorf("%s has %q, %v", link, found, err)
		}
		if found, err := o.Glob(filepath.Join(link, "f*")); !reflect.DeepEqual(found, []string{name}) || err != nil {
			t.Errorf("%s has %q, %v", link, found, err)
		}
		if err := o.Remove(name); err != nil {
			t.Errorf("%s: %v", link, err)
		}
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
}

// TestLinkSwappedInRoot keeps exchanging a directory of the root for a link to the
// outside while files in it are written, read and removed.
func TestLinkSwappedInRoot(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	o := Host{Root: filepath.Join(dir, "root")}
	at, link := filepath.Join(o.Root, "etc"), filepath.Join(o.Root, "link")
	for _, d := range []string{outside, at} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../outside", link); err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("the machine's"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, at, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	})
	// Errors are expected while the link is in place.
	for range 400 {
		o.WriteFile("/etc/new", []byte("x"), 0o600)
		o.MkdirAll("/etc/dir/below", 0o755)
		o.AddFile("/etc/added", nil)
		o.Symlink("/nowhere", "/etc/symlink")
		if b, err := o.ReadFile("/etc/victim"); err == nil {
			t.Fatalf("it read %q of outside", b)
		}
		o.Remove("/etc/victim")
		o.RemoveLink("/etc/victim")
		o.RemoveAll("/etc/victim")
	}
	close(done)
	swapping.Wait()
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside has %v, %v", entries, err)
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "the machine's" {
		t.Errorf("the file outside has %q, %v", b, err)
	}
}
