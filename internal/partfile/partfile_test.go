//go:build unix

package partfile

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

func open(t *testing.T, dir string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func names(t *testing.T, dir string) string {
	t.Helper()
	list, err := filepath.Glob(dir + "/.*")
	if err != nil {
		t.Fatal(err)
	}
	for i := range list {
		list[i] = filepath.Base(list[i])
	}
	return strings.Join(list, " ")
}

// TestCleanLeavesFilesThatAreOpen has a process of its own be killed and one go on.
func TestCleanLeavesFilesThatAreOpen(t *testing.T) {
	if dir := os.Getenv("PARTFILE_DIR"); dir != "" {
		f, err := Create(open(t, dir), ".", 0o666)
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("made\n")
		os.Stdin.Read(make([]byte, 1)) // until it is killed
		runtime.KeepAlive(f)
		return
	}
	dir := t.TempDir()
	root := open(t, dir)
	ours, err := Create(root, ".", 0o666)
	if err != nil {
		t.Fatal(err)
	}
	other := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	other.Env = append(os.Environ(), "PARTFILE_DIR="+dir)
	if _, err := other.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(dir+"/.pilot-other", nil, 0o600)
	os.Symlink("/etc/passwd", dir+"/"+prefix+"LINK")
	if exec.Command("mkfifo", dir+"/"+prefix+"FIFO").Run() != nil {
		t.Fatal("no fifo")
	}
	Clean(root, ".")
	if n := len(strings.Fields(names(t, dir))); n != 5 {
		t.Errorf("%d files are left of 5: %s", n, names(t, dir))
	}
	other.Process.Kill()
	other.Wait()
	Clean(root, ".")
	if n := len(strings.Fields(names(t, dir))); n != 4 {
		t.Errorf("%d files are left of 4: %s", n, names(t, dir))
	}
	if err := ours.Commit("whole"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir + "/whole"); err != nil {
		t.Error(err)
	}
}

// TestCreateWhileOthersClean makes files in a directory that is cleaned all the time.
func TestCreateWhileOthersClean(t *testing.T) {
	dir := t.TempDir()
	root := open(t, dir)
	done := make(chan struct{})
	var cleaners, writers sync.WaitGroup
	for range 4 {
		cleaners.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					Clean(root, ".")
				}
			}
		})
	}
	for i := range 4 {
		writers.Go(func() {
			for j := range 200 {
				f, err := Create(root, ".", 0o666)
				if err == nil && j%2 == 0 {
					err = f.Commit(string(rune('a' + i)))
				} else if err == nil {
					err = f.Discard()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(done)
	cleaners.Wait()
	if left := names(t, dir); left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestCommitNewLeavesTheFirst gives several files the same name at once.
func TestCommitNewLeavesTheFirst(t *testing.T) {
	dir := t.TempDir()
	root := open(t, dir)
	os.WriteFile(dir+"/there", []byte("first"), 0o600)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for _, name := range []string{"there", "new"} {
				f, err := Create(root, ".", 0o666)
				if err == nil {
					f.WriteString("later")
					err = f.CommitNew(name)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for name, want := range map[string]string{"there": "first", "new": "later"} {
		if b, err := os.ReadFile(dir + "/" + name); err != nil || string(b) != want {
			t.Errorf("%s is %q: %v", name, b, err)
		}
	}
	if left := names(t, dir); left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestFilesThatOthersLockAreNotWaitedFor has another process hold the lock of a new file.
func TestFilesThatOthersLockAreNotWaitedFor(t *testing.T) {
	name := t.TempDir() + "/file"
	for _, held := range []bool{false, true} {
		ours, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if held {
			if _, err := lock(theirs); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := lock(ours); err != nil || got == held {
			t.Errorf("held by another process: %v, locked: %v, %v", held, got, err)
		}
		ours.Close()
		theirs.Close()
	}
}
