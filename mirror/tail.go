package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/processor"
)

// maxTails bounds the ends of layers that are in memory, in bytes.
const maxTails = 32 << 20

// pin fetches the first and the last bytes of a layer, the latter verified, with the table
// of contents in them: no other part is served before.
func (m *Mirror) pin(ctx context.Context, repo *repository, layer *lazyLayer) error {
	sealed := layer.sealed
	if size := sealed.Size - sealed.TailOffset; size > image.MaxTail {
		return &notLazy{reasonTailSize, fmt.Errorf("its table of contents has %d bytes, more than %d: it has too many files in one layer", size, image.MaxTail)}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		layer.tail, err = m.fetchTail(ctx, repo, layer)
		return err
	})
	g.Go(func() (err error) {
		layer.head, err = m.fetchPart(ctx, repo, layer, 0, min(mountRange.last+1, sealed.Size))
		return err
	})
	if err := g.Wait(); err != nil {
		return noLazyRange(err)
	}
	// The maker of the seal may lie, and the snapshotter reads a table of contents of any
	// size into memory.
	if err := image.VerifyTOC(sealed, layer.tail); err != nil {
		return &notLazy{reasonTampered, err}
	}
	return nil
}

// noLazyRange makes the error of a registry that has no ranges one of a layer that is not
// lazy: another request would not help.
func noLazyRange(err error) error {
	if _, ok := errors.AsType[*rangeError](err); ok {
		return &notLazy{reasonRegistry, err}
	}
	return err
}

// tail returns the last bytes of a layer, verified.
func (m *Mirror) tail(ctx context.Context, repo *repository, layer *lazyLayer) ([]byte, error) {
	m.lazy.mu.Lock()
	tail := layer.tail
	m.lazy.mu.Unlock()
	if tail != nil {
		return tail, nil
	}
	leave, err := enter(ctx, m.lazy.opening)
	if err != nil {
		return nil, err
	}
	defer leave()
	if tail, err = m.fetchTail(ctx, repo, layer); err != nil {
		return nil, err
	}
	m.lazy.mu.Lock()
	defer m.lazy.mu.Unlock()
	if m.lazy.layers[layer.desc.Digest] == layer && layer.tail == nil {
		layer.tail = tail
		m.lazy.tails += len(tail)
		m.lazy.shrink(layer)
		m.lazy.measure()
	}
	return tail, nil
}

// shrink forgets tails until the others, or that of the layer alone, are not too large.
func (l *lazy) shrink(except *lazyLayer) {
	for l.tails > maxTails {
		oldest := l.oldest(func(layer *lazyLayer) bool { return layer != except && layer.tail != nil })
		if oldest == nil {
			return
		}
		l.tails -= len(oldest.tail)
		oldest.tail = nil
	}
}

func (m *Mirror) fetchTail(ctx context.Context, repo *repository, layer *lazyLayer) ([]byte, error) {
	sealed := layer.sealed
	tail, err := m.fetchPart(ctx, repo, layer, sealed.TailOffset, sealed.Size-sealed.TailOffset)
	if err != nil {
		return nil, err
	}
	if got := digest.FromBytes(tail); got != sealed.Tail {
		return nil, &notLazy{reasonTampered, fmt.Errorf("the layer's table of contents has the digest %s, and its key has sealed that it is %s: %w", got, sealed.Tail, processor.ErrTampered)}
	}
	return tail, nil
}

// fetchPart fetches a part of a layer into memory.
func (m *Mirror) fetchPart(ctx context.Context, repo *repository, layer *lazyLayer, offset, length int64) ([]byte, error) {
	body, err := m.readLazy(ctx, repo, layer, offset, length)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	part := make([]byte, length)
	n, err := io.ReadFull(body, part)
	m.lazy.metrics.fetched.Add(float64(n))
	if err != nil {
		return nil, err
	}
	return part, nil
}
