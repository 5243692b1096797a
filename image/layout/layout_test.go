package layout

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestLayoutsMadeAtOnceKeepAllNames has several runs make the same layout and name an
// image in it.
func TestLayoutsMadeAtOnceKeepAllNames(t *testing.T) {
	const runs = 8
	for round := range 20 {
		dir := filepath.Join(t.TempDir(), "layout")
		var group sync.WaitGroup
		for i := range runs {
			group.Go(func() {
				if err := addImage(dir, fmt.Sprint(i)); err != nil {
					t.Errorf("round %d, run %d: %v", round, i, err)
				}
			})
		}
		group.Wait()
		l, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		for i := range runs {
			if _, err := l.Resolve(t.Context(), fmt.Sprint(i)); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if left, _ := filepath.Glob(dir + "/.*"); len(left) > 0 {
			t.Errorf("left: %s", left)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			return
		}
	}
}

// TestLockedLayoutsAreErrors has somebody who may only read a layout keep it locked.
func TestLockedLayoutsAreErrors(t *testing.T) {
	defer func(d time.Duration) { lockTimeout = d }(lockTimeout)
	lockTimeout = 100 * time.Millisecond
	dir := t.TempDir()
	if err := addImage(dir, "1"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, lockName))
	if err != nil || isHeld(f) {
		t.Fatal("it is locked", err)
	}
	if err := addImage(dir, "2"); err == nil || !strings.Contains(err.Error(), "lock "+dir+": another process has locked it") {
		t.Error(err)
	}
	f.Close()
	if err := addImage(dir, "2"); err != nil {
		t.Error(err)
	}
}

func addImage(dir, name string) error {
	l := New(dir)
	defer l.Close()
	return l.Tag(context.Background(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 1}, name, nil)
}
