package mirror

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/internal/verified"
	"github.com/ctrlplane/pilot/processor"
)

// octets is the media type of blobs.
const octets = "application/octet-stream"

// blob answers with a blob: that of a plain layer decrypted, and what the registry has for
// other digests. Ranges are not served: RFC 9110 lets a server ignore them, and a part of a
// layer can't be verified by its HMAC.
func (m *Mirror) blob(w *answer, r *http.Request, repo *repository) error {
	ctx, d := r.Context(), repo.digest()
	if layer, ok := m.layer(repo, d); ok {
		return m.decrypted(w, r, repo, d, layer)
	}
	size, err := repo.Size(ctx, d)
	if errdefs.IsNotFound(err) {
		if searchErr := m.search(ctx, repo, d); searchErr != nil {
			return searchErr
		}
		if layer, ok := m.layer(repo, d); ok {
			return m.decrypted(w, r, repo, d, layer)
		}
	}
	if err != nil {
		return err
	}
	return m.asItIs(w, r, repo, ocispec.Descriptor{MediaType: octets, Digest: d, Size: size})
}

// layer returns the encrypted layer that a plain one is in, if it is remembered.
func (m *Mirror) layer(repo *repository, d digest.Digest) (ocispec.Descriptor, bool) {
	i := m.images.find(repo.key(), d)
	if i == nil {
		return ocispec.Descriptor{}, false
	}
	layer, ok := i.Layers[d]
	return layer, ok
}

// asItIs passes on a blob of the registry, which clients check against its digest too.
func (m *Mirror) asItIs(w *answer, r *http.Request, repo *repository, desc ocispec.Descriptor) (err error) {
	w.head(octets, desc.Digest, desc.Size)
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	end := m.metrics.begin(false)
	defer func() { end(m.judge, desc.Size, err) }()
	leave, err := m.streams.enter(r.Context(), w)
	if err != nil {
		return err
	}
	defer leave()
	body, err := repo.Stream(r.Context(), desc)
	if err != nil {
		return err
	}
	defer body.Close()
	return passOn(w, body, desc)
}

// passOn sends the blob that body reads. One of up to [processor.BufferSize] bytes is checked
// first: what a host answers may be none of a registry's, and not for callers.
func passOn(w io.Writer, body io.Reader, desc ocispec.Descriptor) error {
	buffer := make([]byte, min(desc.Size, processor.BufferSize))
	n, err := io.ReadFull(body, buffer)
	if isShort(err) {
		return endsAfter(int64(n), desc)
	}
	if err != nil {
		return err
	}
	whole := int64(n) == desc.Size
	if whole && desc.Digest.Algorithm().FromBytes(buffer) != desc.Digest {
		return fmt.Errorf("%w: %s", verified.ErrDigest, desc.Digest)
	}
	if _, err := w.Write(buffer); err != nil || whole {
		return err
	}
	rest, err := io.CopyBuffer(writerOnly{w}, io.LimitReader(body, desc.Size-int64(n)), buffer)
	if err == nil && int64(n)+rest < desc.Size || isShort(err) {
		return endsAfter(int64(n)+rest, desc)
	}
	if err != nil {
		return err
	}
	if extra, _ := body.Read(buffer[:1]); extra > 0 {
		return fmt.Errorf("%w: %s has more than %d bytes", verified.ErrDigest, desc.Digest, desc.Size)
	}
	return nil
}

func isShort(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

func endsAfter(n int64, desc ocispec.Descriptor) error {
	return fmt.Errorf("%s ends after %d of %d bytes: %w", desc.Digest, n, desc.Size, io.ErrUnexpectedEOF)
}

// decrypted answers with the layer of plain digest d. Its last bytes are given out once its
// HMAC is verified, so an answer of full length is authentic.
func (m *Mirror) decrypted(w *answer, r *http.Request, repo *repository, d digest.Digest, layer ocispec.Descriptor) (err error) {
	if r.Method == http.MethodGet {
		end := m.metrics.begin(true)
		defer func() { end(m.judge, layer.Size, err) }()
	}
	key, err := m.unwrap(r.Context(), layer)
	if err != nil {
		return err
	}
	defer key.Clear()
	w.head(octets, d, layer.Size)
	if r.Method == http.MethodGet {
		began := time.Now()
		if err = m.decrypt(w, r, repo, layer, key); err == nil {
			logrus.WithFields(logrus.Fields{"digest": layer.Digest, "image": repo.key(), "bytes": layer.Size, "took": time.Since(began), "trace": traceid.Of(r.Context())}).Info("layer decrypted for a caller of the mirror")
		}
	} else {
		var size int64
		if size, err = repo.Size(r.Context(), layer.Digest); err == nil && size != layer.Size {
			err = fmt.Errorf("the registry has %d bytes of it, and its manifest says %d: %w", size, layer.Size, processor.ErrTampered)
		}
		if err == nil {
			w.WriteHeader(http.StatusOK)
		}
	}
	if errors.Is(err, processor.ErrTampered) {
		return &layerError{layer: layer, err: err}
	}
	return err
}

// decrypt sends a decrypted layer.
func (m *Mirror) decrypt(w *answer, r *http.Request, repo *repository, layer ocispec.Descriptor, key *processor.LayerKey) error {
	leave, err := m.streams.enter(r.Context(), w)
	if err != nil {
		return err
	}
	defer leave()
	body, err := repo.Stream(r.Context(), ocispec.Descriptor{MediaType: octets, Digest: layer.Digest, Size: layer.Size})
	if err != nil {
		return err
	}
	defer body.Close()
	// A byte too many is one that the HMAC does not match, and it ends there.
	decrypter, err := processor.NewDecrypter(io.LimitReader(body, layer.Size+1), key)
	if err != nil {
		return err
	}
	defer decrypter.Close()
	n, err := decrypter.WriteTo(writerOnly{w})
	if err == nil && n != layer.Size {
		err = fmt.Errorf("it has %d bytes, and its manifest says %d: %w", n, layer.Size, processor.ErrTampered)
	}
	return err
}

// writerOnly hides the other methods of an answer, so that all bytes go through Write.
type writerOnly struct{ io.Writer }
