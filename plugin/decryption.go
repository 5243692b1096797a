package plugin

import (
	"context"
	"sync"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/processor"
)

// decryptionKey is the context key under which Apply hands the layer's
// decryption to the stream processor that containerd's applier makes.
type decryptionKey struct{}

var registerDecryption = sync.OnceFunc(func() {
	diff.RegisterProcessor(func(ctx context.Context, mediaType string) (diff.StreamProcessorInit, bool) {
		_, ok := ctx.Value(decryptionKey{}).(*decryption)
		return startDecryption, ok && processor.IsEncrypted(mediaType)
	})
})

// decryption is a stream processor in this process.
type decryption struct {
	key       *processor.LayerKey
	hash      bool // of the plain layer, too
	mediaType string

	// What decompresses may read in a goroutine, and go on for a moment
	// after it has all that it needs.
	mu    sync.Mutex
	layer *processor.Decrypter
}

func startDecryption(ctx context.Context, stream diff.StreamProcessor, _ map[string]typeurl.Any) (diff.StreamProcessor, error) {
	d := ctx.Value(decryptionKey{}).(*decryption)
	d.end() // that of an applier before, which could not
	layer, err := processor.NewDecrypter(stream, d.key)
	if err != nil {
		return nil, err
	}
	if d.hash {
		layer.HashPlain()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.layer = layer
	d.mediaType, _ = processor.PlainMediaType(stream.MediaType())
	return d, nil
}

func (d *decryption) Read(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.layer.Read(p)
}

// Err is called by containerd's applier once it has unpacked everything.
func (d *decryption) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.layer.Verify()
}

// verified reports whether the layer was read to its end and is authentic.
func (d *decryption) verified() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.layer != nil && d.layer.Verified()
}

// plainDigest returns the digest of a layer that was verified, or "" if it is not computed.
func (d *decryption) plainDigest() digest.Digest {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.layer == nil {
		return ""
	}
	return d.layer.PlainDigest()
}

// end ends the decryption, if it has begun, and a Read that goes on with an error. It
// takes no lock, which that Read holds: layer changes only in the goroutine of Apply,
// which is also the only one that calls end.
func (d *decryption) end() {
	if d.layer != nil {
		d.layer.Close()
	}
}

func (d *decryption) MediaType() string { return d.mediaType }

func (d *decryption) Close() error { return nil }
