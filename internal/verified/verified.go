// Package verified reads blobs of untrusted stores, and checks them against their
// digests on the way.
package verified

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrDigest is the error of a blob that is not what its descriptor says.
var ErrDigest = errors.New("the blob is not what its digest says")

// New returns a reader of ra, which must be read in order. Before it returns the last
// byte, it checks all of them against desc's digest, which must be valid, and fails with
// [ErrDigest] if they do not match. An empty blob, which is never read, is checked at
// once. Closing the reader closes ra, as an error does.
func New(ra content.ReaderAt, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r := &reader{ReaderAt: ra, desc: desc, digester: desc.Digest.Algorithm().Digester()}
	var err error
	switch size := ra.Size(); {
	case size < 0:
		err = fmt.Errorf("%s has a size of %d bytes", desc.Digest, size)
	case size == 0:
		err = r.check()
	}
	if err != nil {
		return nil, errors.Join(err, ra.Close())
	}
	return r, nil
}

type reader struct {
	content.ReaderAt
	desc     ocispec.Descriptor
	digester digest.Digester
	next     int64 // the offset of what is hashed next
}

func (r *reader) ReadAt(p []byte, off int64) (int, error) {
	if off >= r.Size() && r.next == r.Size() {
		return 0, io.EOF
	}
	if off != r.next {
		return 0, fmt.Errorf("%s is read at offset %d and not in order, which its digest can't be checked in", r.desc.Digest, off)
	}
	n, err := r.ReaderAt.ReadAt(p[:min(int64(len(p)), r.Size()-off)], off)
	_, _ = r.digester.Hash().Write(p[:n]) // never fails
	r.next += int64(n)
	switch {
	case r.next < r.Size() && errors.Is(err, io.EOF):
		return 0, fmt.Errorf("%s ends after %d of %d bytes: %w", r.desc.Digest, r.next, r.Size(), io.ErrUnexpectedEOF)
	case r.next < r.Size():
		return n, err
	case err != nil && !errors.Is(err, io.EOF):
		return 0, err
	}
	if err := r.check(); err != nil {
		return 0, err
	}
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// check compares the digest of all that was read.
func (r *reader) check() error {
	if got := r.digester.Digest(); got != r.desc.Digest {
		return fmt.Errorf("%w: %s has the digest %s", ErrDigest, r.desc.Digest, got)
	}
	return nil
}
