//go:build unix

package replacefile

import (
	"os"
	"path/filepath"
	"testing"
)

// TestReplace replaces a file behind a symbolic link.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	name, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(name, []byte("old"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", link); err != nil {
		t.Fatal(err)
	}
	content := []byte("new")
	r, err := Prepare(link, content)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "old" {
		t.Errorf("prepared: %q %v", b, err)
	}
	if content[0] != 0 {
		t.Error("the content is still there")
	}
	if err := r.Commit(); err != nil {
		t.Fatal(err)
	}
	r.Discard()
	if b, err := os.ReadFile(link); err != nil || string(b) != "new" {
		t.Errorf("committed: %q %v", b, err)
	}
	if info, err := os.Stat(name); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if _, err := Prepare(dir, nil); err == nil {
		t.Error("a directory is replaced")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("left behind: %v", entries)
	}
}
