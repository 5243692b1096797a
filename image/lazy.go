package image

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

const (
	// lazyAnnotation, on an encrypted layer whose blob is eStargz or zstd:chunked, has what
	// it takes to serve parts of the layer before it is read as a whole.
	lazyAnnotation = processor.AnnotationPrefix + "pilot.lazy"
	// tocAnnotation, on a layer, has the digest of the JSON of its table of contents:
	// https://github.com/containerd/stargz-snapshotter/blob/v0.19.1/docs/estargz.md
	tocAnnotation = "containerd.io/snapshot/stargz/toc.digest"
	// maxLazyAnnotation bounds lazyAnnotation, in bytes. A usual one has about 370.
	maxLazyAnnotation = 1024
)

// Lazy is what an encrypted layer's key has sealed of it, so that parts of it can be served
// before it is read as a whole.
type Lazy struct {
	Plain      digest.Digest // of the plain blob
	Size       int64         // of the blob, in bytes
	DiffID     digest.Digest // SHA-256, of the uncompressed layer
	TOC        digest.Digest // SHA-256, as in the annotation containerd.io/snapshot/stargz/toc.digest
	TailOffset int64         // where TOC and footer begin, in bytes
	Tail       digest.Digest // SHA-256, of the plain bytes from there to the end
}

// IsWrapped reports whether what was sealed is wrapped together with the layer's key, from
// which key was unwrapped. If not, everybody who could decrypt the layer may have sealed it.
func (l Lazy) IsWrapped(key *processor.LayerKey) bool {
	return hmac.Equal(key.Sealed, l.wrapped())
}

// wrapped returns what is wrapped with the layer's key of what is sealed, 32 bytes.
func (l Lazy) wrapped() []byte {
	sum := sha256.Sum256([]byte("pilot image lazy layer " + l.text()))
	return sum[:]
}

// ErrNotSealed is the error of a layer that has no seal for lazy pulling. It is not
// damaged: it has to be read as a whole.
var ErrNotSealed = errors.New("the layer is not sealed for lazy pulling")

// lazyJSON is what lazyAnnotation holds. The digest of the plain blob is in the wrapped
// key, and the size in the descriptor.
type lazyJSON struct {
	DiffID     digest.Digest `json:"diffID"`
	TOC        digest.Digest `json:"toc"`
	TailOffset int64         `json:"tailOffset"`
	Tail       digest.Digest `json:"tail"`
	Seal       []byte        `json:"seal"` // 32 bytes
}

// SealedLazy returns what key, unwrapped from the layer, has sealed of it. The error wraps
// [ErrNotSealed] if the layer has no seal, and [processor.ErrTampered] if it is damaged, or
// not the seal of this key and this layer.
func SealedLazy(key *processor.LayerKey, layer ocispec.Descriptor) (Lazy, error) {
	text, ok := layer.Annotations[lazyAnnotation]
	if !ok {
		return Lazy{}, ErrNotSealed
	}
	var a lazyJSON
	if err := decodeLazy(text, &a); err != nil {
		return Lazy{}, lazyTampered{err}
	}
	l := Lazy{Plain: key.Digest, Size: layer.Size, DiffID: a.DiffID, TOC: a.TOC, TailOffset: a.TailOffset, Tail: a.Tail}
	if err := l.validate(); err != nil {
		return Lazy{}, lazyTampered{err}
	}
	if !hmac.Equal(a.Seal, l.seal(key)) {
		return Lazy{}, lazyTampered{errors.New("it does not match the layer's key, size and plain digest")}
	}
	if got := layer.Annotations[tocAnnotation]; got != l.TOC.String() {
		return Lazy{}, lazyTampered{fmt.Errorf("annotation %s is %.80q, and it says %s", tocAnnotation, got, l.TOC)}
	}
	return l, nil
}

// annotation returns the value of lazyAnnotation, sealed with the key of the layer. The
// error is that of a value that [SealedLazy] would not read.
func (l Lazy) annotation(key *processor.LayerKey) (string, error) {
	if err := l.validate(); err != nil {
		return "", err
	}
	text, err := json.Marshal(lazyJSON{l.DiffID, l.TOC, l.TailOffset, l.Tail, l.seal(key)})
	return string(text), err
}

// seal returns the HMAC-SHA-256 of all that l says, 32 bytes.
func (l Lazy) seal(key *processor.LayerKey) []byte {
	return sealOf(key.Derive("pilot image lazy layer"), []byte(l.text()))
}

// text returns all that l says. No digest has a space, so no two values have the same text.
func (l Lazy) text() string {
	return fmt.Sprintf("%s %d %s %s %d %s", l.Plain, l.Size, l.DiffID, l.TOC, l.TailOffset, l.Tail)
}

func (l Lazy) validate() error {
	if l.Plain == "" {
		return errors.New("the layer's key does not have the digest of the plain layer")
	}
	for name, d := range map[string]digest.Digest{"diffID": l.DiffID, "toc": l.TOC, "tail": l.Tail} {
		if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
			return fmt.Errorf("%s is %.80q, not a SHA-256 digest", name, d)
		}
	}
	if l.TailOffset < 0 || l.TailOffset >= l.Size {
		return fmt.Errorf("tailOffset is %d, and the layer has %d bytes", l.TailOffset, l.Size)
	}
	return nil
}

// decodeLazy reads the annotation into a. Each member has to be there once, and no other.
func decodeLazy(text string, a *lazyJSON) error {
	if len(text) > maxLazyAnnotation {
		return fmt.Errorf("it has %d bytes, more than %d", len(text), maxLazyAnnotation)
	}
	if err := jsonedit.CheckDistinct([]byte(text)); err != nil {
		return err
	}
	names := []string{"diffID", "toc", "tailOffset", "tail", "seal"}
	if err := jsonedit.CheckKeys([]byte(text), names); err != nil {
		return err
	}
	for _, name := range names {
		if value, err := jsonedit.Get([]byte(text), name); err != nil || value == nil {
			return errors.Join(fmt.Errorf("%s is missing", name), err)
		}
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(a)
}

// lazyTampered is the error of a lazyAnnotation that was changed. It is
// [processor.ErrTampered].
type lazyTampered struct{ err error }

func (e lazyTampered) Error() string {
	return fmt.Sprintf("annotation %s: %.300s: it was changed after the layer was encrypted", lazyAnnotation, e.err)
}

func (e lazyTampered) Unwrap() error { return e.err }

func (lazyTampered) Is(target error) bool { return target == processor.ErrTampered }
