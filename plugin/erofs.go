package plugin

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/diff/erofs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// erofsApplier is containerd's EROFS differ. It derives the UUID of a file system with SHA-1,
// which protects nothing, and with GODEBUG=fips140=only panics otherwise. The keys of layers
// are unwrapped before, and what decrypts them is approved.
type erofsApplier struct{ diff.Applier }

func newErofsApplier(store content.Store) diff.Applier {
	return erofsApplier{erofs.NewErofsDiffer(store)}
}

func (a erofsApplier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (applied ocispec.Descriptor, err error) {
	fips140.WithoutEnforcement(func() { applied, err = a.Applier.Apply(ctx, desc, mounts, opts...) })
	return applied, err
}

// isErofs reports whether a media type is that of a layer which is an EROFS file
// system, perhaps compressed, as containerd's EROFS differ does.
func isErofs(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.erofs.layer")
}

// applyErofs decrypts a layer that is an EROFS file system and hands it to
// containerd's EROFS differ, which knows no stream processors for such layers and
// copies them as they are.
func (d *Differ) applyErofs(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey, mounts []mount.Mount, opts ...diff.ApplyOpt) (applied ocispec.Descriptor, plainDigest digest.Digest, err error) {
	store := &decryptedStore{Store: d.store, encrypted: desc, key: key}
	defer store.close()
	plain := desc
	plain.MediaType, _ = processor.PlainMediaType(desc.MediaType)
	applied, err = newErofsApplier(store).Apply(ctx, plain, mounts, opts...)
	if errdefs.IsNotImplemented(err) {
		return ocispec.Descriptor{}, "", fmt.Errorf("a layer of type %s is for the snapshotter erofs: %w", plain.MediaType, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		plainDigest, err = store.verify()
	} else if ctx.Err() == nil && errors.Is(d.verify(ctx, desc, key), processor.ErrTampered) {
		err = processor.ErrTampered // hide follow-up errors
	}
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if applied.Digest == desc.Digest {
		// It returns what it was given for what it does not decompress.
		applied.Digest = plainDigest
	}
	return applied, plainDigest, nil
}

// decryptedStore is a content store in which one layer is plain. It reads it once,
// from its beginning to its end.
type decryptedStore struct {
	content.Store
	encrypted ocispec.Descriptor
	key       *processor.LayerKey
	blob      content.ReaderAt

	// What decompresses may read in a goroutine, and go on for a moment.
	mu     sync.Mutex
	layer  *processor.Decrypter
	offset int64
}

func (s *decryptedStore) ReaderAt(ctx context.Context, _ ocispec.Descriptor) (content.ReaderAt, error) {
	if s.blob != nil {
		return nil, fmt.Errorf("layer %s is read twice", s.encrypted.Digest)
	}
	blob, err := s.Store.ReaderAt(ctx, s.encrypted)
	if err != nil {
		return nil, err
	}
	s.blob = blob
	if s.layer, err = processor.NewDecrypter(content.NewReader(blob), s.key); err != nil {
		return nil, err
	}
	s.layer.HashPlain()
	return s, nil
}

// ReadAt implements io.ReaderAt, for a reader that goes from the beginning to the
// end.
func (s *decryptedStore) ReadAt(p []byte, offset int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if offset != s.offset {
		return 0, fmt.Errorf("layer %s is read at %d instead of %d", s.encrypted.Digest, offset, s.offset)
	}
	n, err := io.ReadFull(s.layer, p)
	s.offset += int64(n)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return n, err
}

// Size returns the size of the layer, which encryption does not change.
func (s *decryptedStore) Size() int64 { return s.blob.Size() }

// Close does nothing: the layer is yet to be verified.
func (s *decryptedStore) Close() error { return nil }

// verify reads the rest of the layer, and returns its digest, and an error unless all of it
// is authentic.
func (s *decryptedStore) verify() (digest.Digest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.layer == nil {
		return "", nil
	}
	err := s.layer.Verify()
	return s.layer.PlainDigest(), err
}

func (s *decryptedStore) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.layer != nil {
		s.layer.Close()
	}
	if s.blob != nil {
		s.blob.Close()
	}
}
