package image

import (
	"context"
	"errors"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// rangeStore is a store whose ranges are what somebody made of them.
type rangeStore struct {
	*store
	change func(p []byte, off int64) error
}

func (s rangeStore) ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	ra, err := s.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if _, err := ra.ReadAt(p, off); err != nil && len(p) == 0 {
		return err
	}
	return s.change(p, off)
}

// TestEndReadInAdvanceIsComparedWithTheLayer has a registry answer requests for ranges with
// something else than what it sends of the whole layer.
func TestEndReadInAdvanceIsComparedWithTheLayer(t *testing.T) {
	newKEKs(t, "a")
	s := newStore(t)
	layer := build(t, tarOf(t, reg("a", "content")))
	plain := s.lazyImage(layer)
	n := int64(len(layer.blob))
	for name, test := range map[string]struct {
		change func(p []byte, off int64) error
		want   string // empty: the layer is sealed
	}{
		"the same": {func([]byte, int64) error { return nil }, ""},
		"an error": {func([]byte, int64) error { return errors.New("416 Requested Range Not Satisfiable") }, "its end can't be read before the rest of it: 416"},
		"nothing":  {func(p []byte, _ int64) error { clear(p); return nil }, "no footer"},
		// The time in the header of the table's gzip member, which changes nothing of it.
		"other bytes with the same meaning": {func(p []byte, off int64) error {
			if int64(len(p)) > 60 {
				p[4] ^= 1
			}
			return nil
		}, "its end was another when it was read before"},
		"another offset": {func(p []byte, off int64) error {
			if off+51 == n {
				copy(p[16:32], "0000000000000010")
			}
			return nil
		}, "can't be read"},
	} {
		to := kek("pilot", "a")
		to.Keys = s.dc
		result, err := Encrypt(s.ctx, rangeStore{s, test.change}, plain, to, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if test.want == "" {
			if result.Lazy != 1 {
				t.Errorf("%s: %+v", name, result.NotLazy)
			}
			continue
		}
		if result.Lazy != 0 || len(result.NotLazy) != 1 || !strings.Contains(result.NotLazy[0].Reason, test.want) {
			t.Errorf("%s: %+v, want %q", name, result.NotLazy, test.want)
		}
		s.mustComeBack(result, plain)
	}
}
