// Package ingest has what the writers of blobs have in common: they count and digest what
// is written, and compare that with what was expected.
package ingest

import (
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Blob is a blob that is being written. It has the methods of a [content.Writer] that do
// not depend on where it is written to.
type Blob struct {
	ref      string
	total    int64
	written  int64
	started  time.Time
	digester digest.Digester
}

// New returns a blob of which nothing is written. total is its size in bytes, or 0 if that
// is not known.
func New(ref string, total int64) Blob {
	return Blob{ref: ref, total: total, started: time.Now(), digester: digest.Canonical.Digester()}
}

// Add counts and digests what was written.
func (b *Blob) Add(p []byte) {
	_, _ = b.digester.Hash().Write(p) // never fails
	b.written += int64(len(p))
}

// Reset forgets what was written.
func (b *Blob) Reset() {
	b.digester.Hash().Reset()
	b.written = 0
}

// Written returns how many bytes were written.
func (b *Blob) Written() int64 { return b.written }

// Digest returns the digest of what was written.
func (b *Blob) Digest() digest.Digest { return b.digester.Digest() }

// Status returns how far the blob has got.
func (b *Blob) Status() (content.Status, error) {
	return content.Status{Ref: b.ref, Offset: b.written, Total: b.total, StartedAt: b.started, UpdatedAt: time.Now()}, nil
}

// Check compares what was written with the arguments of [content.Writer].Commit: a size in
// bytes and a digest, of which either may be empty. Its error wraps
// [errdefs.ErrFailedPrecondition].
func (b *Blob) Check(size int64, expected digest.Digest) error {
	if size > 0 && size != b.written {
		return fmt.Errorf("the blob has %d bytes, and %d were expected: %w", b.written, size, errdefs.ErrFailedPrecondition)
	}
	if d := b.Digest(); expected != "" && expected != d {
		return fmt.Errorf("the blob has the digest %s, and %s was expected: %w", d, expected, errdefs.ErrFailedPrecondition)
	}
	return nil
}
