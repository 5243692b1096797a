//go:build unix

package replacefile

import (
	"errors"
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

// TestLinkOfAnother replaces files by names that another user has chosen where to lead.
func TestLinkOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	const other = 65534
	dir, theirs := t.TempDir(), filepath.Join(t.TempDir(), "theirs")
	target, link := filepath.Join(dir, "target"), filepath.Join(theirs, "key.pem")
	replace := func(name string) error {
		r, err := Prepare(name, []byte("new"))
		if err != nil {
			return err
		}
		defer r.Discard()
		return r.Commit()
	}
	for _, err := range []error{os.Mkdir(theirs, 0o755), os.WriteFile(target, []byte("old"), 0o644), os.Symlink(target, link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := replace(link); err != nil {
		t.Errorf("root's link: %v", err)
	}
	os.WriteFile(target, []byte("old"), 0o644)
	for _, of := range []string{link, theirs} {
		if err := os.Lchown(of, other, other); err != nil {
			t.Fatal(err)
		}
		if err := replace(link); err == nil {
			t.Errorf("with another user's %s it is followed", of)
		}
		if b, _ := os.ReadFile(target); string(b) != "old" {
			t.Errorf("root's file has %q now", b)
		}
		os.Lchown(link, 0, 0)
	}
	// By a directory further up.
	os.Chown(theirs, 0, 0)
	for _, of := range []string{filepath.Join(theirs, "conf"), theirs} {
		if err := os.Symlink(dir, filepath.Join(theirs, "conf")); err != nil {
			t.Fatal(err)
		}
		if err := replace(filepath.Join(theirs, "conf/target")); err != nil {
			t.Errorf("root's link to a directory: %v", err)
		}
		os.WriteFile(target, []byte("old"), 0o644)
		if err := os.Lchown(of, other, other); err != nil {
			t.Fatal(err)
		}
		if err := replace(filepath.Join(theirs, "conf/../conf/./target")); err == nil {
			t.Errorf("with another user's %s a link to a directory is followed", of)
		}
		if b, _ := os.ReadFile(target); string(b) != "old" {
			t.Errorf("root's file has %q now", b)
		}
		os.Remove(filepath.Join(theirs, "conf"))
		os.Chown(theirs, 0, 0)
	}
	// To another's, by way of a third user's link.
	third := filepath.Join(theirs, "third")
	if err := errors.Join(os.Chown(target, other, other), os.Lchown(link, other, other), os.Symlink(link, third), os.Lchown(third, other-1, other-1)); err != nil {
		t.Fatal(err)
	}
	if err := replace(third); err == nil {
		t.Error("a user's link leads to another user's file")
	}
	os.Remove(third)
	// To what is theirs.
	if err := os.Chown(target, other, other); err != nil {
		t.Fatal(err)
	}
	if err := replace(link); err != nil {
		t.Errorf("their own file: %v", err)
	}
	if info, err := os.Stat(target); err != nil || userOf(info) != other || info.Mode().Perm() != 0o644 {
		t.Errorf("%v %v", info, err)
	}
	for _, d := range []string{dir, theirs} {
		if left, _ := filepath.Glob(filepath.Join(d, ".*")); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	}
}

// TestSeveralSlashes replaces a file by names with more slashes than they need.
func TestSeveralSlashes(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "conf", "key.pem")
	if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "conf")+"/", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, by := range []string{"conf//key.pem", "./conf/.//key.pem", "link/key.pem", "link///key.pem", dir + "//conf//key.pem", "//" + name} {
		if err := os.WriteFile(name, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Prepare(by, []byte("new"))
		if err == nil {
			err = r.Commit()
			r.Discard()
		}
		if b, readErr := os.ReadFile(name); err != nil || readErr != nil || string(b) != "new" {
			t.Errorf("%s: %q, %v, %v", by, b, err, readErr)
		}
	}
}
