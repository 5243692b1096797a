package processor

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Encrypt encrypts the layer that src reads, of any size and of media type mediaType,
// for the recipients to, writes the encrypted layer, of equal size, to dst, and returns
// its descriptor. The digest of the plain layer is wrapped with its key.
//
// The layer key is wrapped last. To find out first whether it can be wrapped, use
// [NewLayerKey], [LayerKey.Wrap] and [NewEncrypter].
func Encrypt(ctx context.Context, dst io.Writer, src io.Reader, mediaType string, to Recipients) (ocispec.Descriptor, error) {
	encrypted, ok := EncryptedMediaType(mediaType)
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("media type %s can't be encrypted", mediaType)
	}
	key := NewLayerKey("")
	defer key.Clear()
	plain, ciphertext := digest.Canonical.Digester(), digest.Canonical.Digester()
	e, err := NewEncrypter(io.TeeReader(src, plain.Hash()), key)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer e.Close()
	size, err := e.WriteTo(&contextWriter{ctx, io.MultiWriter(dst, ciphertext.Hash())})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	key.Digest = plain.Digest()
	annotations, err := key.Wrap(ctx, to, nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	name, value, err := key.PublicOptions()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	annotations[name] = value
	return ocispec.Descriptor{MediaType: encrypted, Digest: ciphertext.Digest(), Size: size, Annotations: annotations}, nil
}

// Decrypt decrypts the layer that src reads and desc describes with keys, and writes the
// plain layer to dst. What it has written is authentic only if it returns nil. The error
// wraps [ErrNoKey] if no key unwraps the layer key, and [ErrTampered] if the layer was
// changed.
func Decrypt(ctx context.Context, dst io.Writer, src io.Reader, desc ocispec.Descriptor, keys Keys) error {
	if !IsEncrypted(desc.MediaType) {
		return fmt.Errorf("media type %q is not that of an encrypted layer", desc.MediaType)
	}
	key, err := Unwrap(ctx, keys, desc)
	if err != nil {
		return err
	}
	defer key.Clear()
	return decrypt(ctx, dst, src, key)
}

// decrypt is [Decrypt] with an unwrapped key.
func decrypt(ctx context.Context, dst io.Writer, src io.Reader, key *LayerKey) error {
	d, err := NewDecrypter(src, key)
	if err != nil {
		return err
	}
	defer d.Close()
	_, err = d.WriteTo(&contextWriter{ctx, dst})
	return err
}

// contextWriter writes to w until ctx is done.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c *contextWriter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(p)
}
