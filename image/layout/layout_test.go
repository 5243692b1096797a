package layout

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

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

func addImage(dir, name string) error {
	l := New(dir)
	defer l.Close()
	return l.Tag(context.Background(), ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 1}, name, nil)
}
