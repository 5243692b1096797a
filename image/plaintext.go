package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Plaintext is what [Decrypt] would make of an image.
type Plaintext struct {
	// Target describes the plain image. It is the one that was given if nothing of it
	// is encrypted.
	Target ocispec.Descriptor
	// Documents are the manifests and indexes that decrypting changes, as they are
	// then.
	Documents map[digest.Digest]Document
	// Layers are the encrypted layers, by the digest that each has once it is
	// decrypted.
	Layers map[digest.Digest]ocispec.Descriptor
}

// Document is a manifest or an index.
type Document struct {
	MediaType string
	Content   []byte
}

// Unwrapper returns the key of an encrypted layer. The caller clears it.
type Unwrapper func(ctx context.Context, layer ocispec.Descriptor) (*processor.LayerKey, error)

// PlaintextOf returns what [Decrypt] would make of the image target, and writes nothing.
// It takes the digests of plain layers from what is wrapped with their keys, so it reads
// no layer, except those whose key has no digest or that of the uncompressed layer, as
// buildah and podman write it when they push. Keys are unwrapped several at a time.
func PlaintextOf(ctx context.Context, store Store, target ocispec.Descriptor, unwrap Unwrapper) (Plaintext, error) {
	p := &plaintext{Store: store, unwrap: unwrap, diffIDs: map[digest.Digest]bool{}, found: Plaintext{
		Documents: map[digest.Digest]Document{}, Layers: map[digest.Digest]ocispec.Descriptor{},
	}}
	w := newWork(p, Options{}, decrypting, p.layer)
	w.dry, w.enter = true, p.enter
	w.written = func(desc ocispec.Descriptor, doc []byte) {
		p.found.Documents[desc.Digest] = Document{desc.MediaType, doc}
	}
	result, err := w.run(ctx, target)
	p.found.Target = result.Target
	return p.found, err
}

// plaintext is one [PlaintextOf]. It is a store that also has the decrypted layers, which
// a descriptor may have inlined.
type plaintext struct {
	Store
	unwrap  Unwrapper
	diffIDs map[digest.Digest]bool // of the image's configurations

	mu    sync.Mutex
	found Plaintext
}

// layer finds out what a layer is once it is decrypted.
func (p *plaintext) layer(ctx context.Context, w *work, desc ocispec.Descriptor) (change, error) {
	c := change{desc: desc}
	c.desc.MediaType, _ = processor.PlainMediaType(desc.MediaType)
	key, err := p.key(ctx, desc)
	if err != nil {
		return change{}, err
	}
	defer key.Clear()
	c.sealKey = newSealKey(key)
	c.desc.Digest = key.Digest
	if key.Digest == "" || p.diffIDs[key.Digest] && !strings.HasSuffix(c.desc.MediaType, "tar") {
		hash := digest.Canonical.Digester()
		if err := p.decrypt(ctx, w, desc, key, hash.Hash()); err != nil {
			return change{}, err
		}
		c.desc.Digest = hash.Digest()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.found.Layers[c.desc.Digest] = desc
	return c, nil
}

func (p *plaintext) key(ctx context.Context, desc ocispec.Descriptor) (*processor.LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	return p.unwrap(ctx, desc)
}

// decrypt writes a decrypted layer to out.
func (p *plaintext) decrypt(ctx context.Context, w *work, desc ocispec.Descriptor, key *processor.LayerKey, out io.Writer) error {
	return w.read(ctx, desc, func(r io.Reader) error {
		d, err := processor.NewDecrypter(r, key)
		if err != nil {
			return err
		}
		defer d.Close()
		_, err = d.WriteTo(out)
		return err
	})
}

// enter notes the diff IDs of a manifest's configuration, if it has any.
func (p *plaintext) enter(ctx context.Context, m ocispec.Manifest) error {
	config := inlined(m.Config)
	if config == nil {
		if m.Config.Size > maxManifest {
			return fmt.Errorf("%w: its configuration has %d bytes, more than %d", ErrLimit, m.Config.Size, maxManifest)
		}
		var err error
		config, err = content.ReadBlob(ctx, p.Store, m.Config)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("configuration %s: %w", m.Config.Digest, err)
		}
	}
	var c struct {
		RootFS ocispec.RootFS `json:"rootfs"`
	}
	if json.Unmarshal(config, &c) != nil {
		return nil // it is not here, or another kind of configuration, as artifacts have
	}
	for _, id := range c.RootFS.DiffIDs {
		p.diffIDs[id] = true
	}
	return nil
}

// ReaderAt returns a reader of a blob, also of a layer that is decrypted for it.
func (p *plaintext) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	p.mu.Lock()
	layer, isLayer := p.found.Layers[desc.Digest]
	doc, isDocument := p.found.Documents[desc.Digest]
	p.mu.Unlock()
	switch {
	case isDocument:
		return memory{bytes.NewReader(doc.Content)}, nil
	case !isLayer:
		return p.Store.ReaderAt(ctx, desc)
	case layer.Size > maxManifest:
		return nil, fmt.Errorf("%w: layer %s has %d bytes, more than a document may hold", ErrLimit, layer.Digest, layer.Size)
	}
	key, err := p.key(ctx, layer)
	if err != nil {
		return nil, err
	}
	defer key.Clear()
	var plain bytes.Buffer
	if err := p.decrypt(ctx, &work{Store: p.Store}, layer, key, &plain); err != nil {
		return nil, err
	}
	return memory{bytes.NewReader(plain.Bytes())}, nil
}

// memory is a blob in memory.
type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }
