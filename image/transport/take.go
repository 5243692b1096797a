package transport

import (
	"context"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// taken are the blobs that [Pair.Take] brought.
type taken struct {
	*digests

	mu    sync.Mutex
	moved Moved
}

// Take brings a blob of a third place to the target, such as an earlier image's.
func (p *Pair) Take(ctx context.Context, from content.Provider, blob ocispec.Descriptor) error {
	origin, err := p.target.Copy(ctx, from, blob)
	if err != nil {
		return err
	}
	if p.taken.add(blob.Digest, blob.Size) {
		p.taken.mu.Lock()
		defer p.taken.mu.Unlock()
		p.taken.moved.add(origin, blob.Size)
	}
	return nil
}
