package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestCachesOfAnEarlierProcessMakeRoomAtOnce checks that they are gone from their place when
// discard returns, and soon from the disk, with what an earlier process has not removed.
func TestCachesOfAnEarlierProcessMakeRoomAtOnce(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "stargz")
	if err := discard(dir); err != nil {
		t.Fatalf("without caches: %v", err)
	}
	for _, name := range []string{"stargz/fscache/a/b", "stargz.old-1/fscache/c", "snapshotter/metadata.db"} {
		file := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := discard(dir); err != nil {
		t.Fatal(err)
	}
	// Its place is for the caches of this process, which stay.
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 6000 { // a minute
		entries, err := os.ReadDir(root)
		if err != nil {
			t.Fatal(err)
		}
		names := make([]string, len(entries))
		for i, e := range entries {
			names[i] = e.Name()
		}
		if slices.Equal(names, []string{"snapshotter", "stargz"}) {
			if _, err := os.Stat(filepath.Join(root, "snapshotter/metadata.db")); err != nil {
				t.Error(err)
			}
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("earlier caches are left")
}
