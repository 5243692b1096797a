package imagekeys

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/singleflight"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/processor"
)

const (
	// proofWait is how long a caller waits in all for layers to be read, and recipients to be
	// tried, which go on without it. containerd gives an NRI plugin 2 seconds.
	proofWait = time.Second
	// joinWait is how long after its start somebody waits for the reading of a layer that
	// another caller began. containerd creates one container at a time, so a tenant's pods
	// that wait for a large layer again and again would hold up all others.
	joinWait = 100 * time.Millisecond
	// proofTimeout bounds the reading of a layer.
	proofTimeout = 10 * time.Minute
	// maxProving is how many layers are read at once.
	maxProving = 2
	// unwrapTimeout bounds the wait for layer keys.
	unwrapTimeout = 40 * time.Second
	// refusedTTL is how long recipients are not tried again that gave no key, and failedTTL
	// those whose key provider did not answer.
	refusedTTL = 10 * time.Second
	failedTTL  = 5 * time.Second
	// maxOutcomes bounds the outcomes that are remembered.
	maxOutcomes = 4096
)

// proofs are the attempts to find out what is true of an image's own layers.
type proofs struct {
	flight singleflight.Group
	turn   chan struct{} // has one for each layer that is read

	mu       sync.Mutex
	refuted  map[string]error     // by blob and diff ID, which never changes
	readings map[string]*reading  // by blob and diff ID
	attempts map[string]time.Time // by blob and recipients: until when they are not tried again
}

// reading is the reading of a layer that goes on.
type reading struct {
	began time.Time
	done  chan struct{} // closed with err
	err   error
}

func newProofs() proofs {
	return proofs{turn: make(chan struct{}, maxProving), refuted: map[string]error{}, readings: map[string]*reading{}, attempts: map[string]time.Time{}}
}

// prove finds out whether the layers that an image has for a diff ID have its content. If
// all have, and are plain, the image needs no key for it. Else why is the reason for which
// it needs the keys of other images, or "". unproven is [Layer.Unproven].
func (r *Resolver) prove(ctx context.Context, p part, known layerkeys.Layer) (isPlain, unproven bool, why string) {
	if len(p.layers) == 0 {
		return false, false, "the image's configuration names this layer, and its manifest has none in its place"
	}
	isPlain, unproven = true, true
	for _, l := range p.layers {
		isPlain, unproven = isPlain && !l.encrypted(), unproven && !l.encrypted()
		switch {
		case l.encrypted() && r.learn(ctx, p.diffID, known, l):
			continue
		case l.encrypted() && sameKEKs(known, l):
			continue
		case !l.encrypted() && r.conf.Record.IsPlain(l.desc.Digest, p.diffID):
			continue
		}
		if err := r.proveBlob(ctx, p.diffID, known, l); err != nil {
			isPlain, why = false, r.explain(ctx, l, err)
			unproven = unproven && errdefs.IsNotFound(err)
		}
	}
	return isPlain, unproven && !isPlain, why
}

// sameKEKs reports whether an image names the KEKs that are needed anyway, and no others, as
// one does that was encrypted again for the same ones. Nothing has to be found out then.
func sameKEKs(known layerkeys.Layer, l layer) bool {
	named := claimed("", l.claimed)
	if named.Other {
		return false
	}
	for _, b := range known.Blobs {
		if b.Other || len(b.KEKs) != len(named.KEKs) || slices.ContainsFunc(b.KEKs, func(k KEK) bool { return !slices.Contains(named.KEKs, k) }) {
			return false
		}
	}
	return true
}

// errProving is the error of a layer that is being read.
var errProving = errors.New("it is being read, to find out whether it has the same content: try again")

// notTheLayer is the error of a blob whose content has another diff ID.
type notTheLayer struct{ diffID digest.Digest }

func (e notTheLayer) Error() string {
	return fmt.Sprintf("its content has the digest %s: the image is damaged, or made to get the files of another", e.diffID)
}

// explain says why a container needs keys that its image does not name.
func (r *Resolver) explain(ctx context.Context, l layer, err error) string {
	kind := "plain"
	if l.encrypted() {
		kind = "encrypted for others"
	}
	why := fmt.Sprintf("the image has this layer as %s, %s, and it was unpacked here from another image, encrypted: ", l.desc.Digest, kind)
	if errdefs.IsNotFound(err) {
		ns, _ := namespaces.Namespace(ctx)
		return why + fmt.Sprintf("nothing shows that the image's own has the same content, as containerd has not fetched it: fetch it with \"ctr -n %s content fetch IMAGE\", "+
			"or encrypt images without the public layers that they begin with (ctr-pilot images encrypt --all-but-base)", ns)
	}
	return why + err.Error()
}

// proveBlob reads the blob of a layer, unless it did, and returns nil once it is recorded
// that it has the content of the diff ID.
func (r *Resolver) proveBlob(ctx context.Context, diffID digest.Digest, known layerkeys.Layer, l layer) error {
	id := l.desc.Digest.String() + " " + diffID.String()
	r.proofs.mu.Lock()
	if err := r.proofs.refuted[id]; err != nil {
		r.proofs.mu.Unlock()
		return err
	}
	read := r.proofs.readings[id]
	if read == nil {
		read = &reading{began: time.Now(), done: make(chan struct{})}
		r.proofs.readings[id] = read
		go r.finish(context.WithoutCancel(ctx), id, read, diffID, known, l)
	}
	r.proofs.mu.Unlock()
	if time.Since(read.began) > joinWait {
		return errProving
	}
	select {
	case <-read.done:
		return read.err
	case <-ctx.Done():
		return errProving
	}
}

// finish reads the blob of a layer and ends a reading with the outcome.
func (r *Resolver) finish(ctx context.Context, id string, read *reading, diffID digest.Digest, known layerkeys.Layer, l layer) {
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	read.err = r.compare(ctx, diffID, known, l)
	r.proofs.mu.Lock()
	defer r.proofs.mu.Unlock()
	if _, ok := errors.AsType[notTheLayer](read.err); ok {
		if len(r.proofs.refuted) >= maxOutcomes {
			clear(r.proofs.refuted)
		}
		r.proofs.refuted[id] = read.err
	}
	delete(r.proofs.readings, id)
	close(read.done)
}

// compare reads the blob of a layer and records that it has the content of the diff ID.
func (r *Resolver) compare(ctx context.Context, diffID digest.Digest, known layerkeys.Layer, l layer) error {
	if _, err := r.store.Info(ctx, l.desc.Digest); err != nil {
		return err
	}
	select {
	case r.proofs.turn <- struct{}{}:
		defer func() { <-r.proofs.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	began := time.Now()
	blob, err := r.store.ReaderAt(ctx, l.desc)
	if err != nil {
		return err
	}
	defer blob.Close()
	raw := io.Reader(content.NewReader(blob))
	if !l.encrypted() {
		if err := sameContent(ctx, raw, diffID, sizeOf(known)); err != nil {
			return err
		}
		r.conf.Record.AddPlain(l.desc.Digest, diffID)
		logrus.WithFields(logrus.Fields{"digest": l.desc.Digest, "diff-id": diffID, "took": time.Since(began)}).Info("plain layer has the content of an encrypted one")
		return nil
	}
	key, err := r.unwrap(ctx, l)
	if err != nil {
		return err
	}
	defer key.Clear()
	plain, err := processor.NewDecrypter(raw, key)
	if err != nil {
		return err
	}
	defer plain.Close()
	plain.HashPlain()
	if isSealed(known, l) && image.IsLazy(l.desc) {
		err = asSealed(ctx, plain, diffID, l.desc, key, blob)
	} else {
		err = sameContent(ctx, plain, diffID, sizeOf(known))
	}
	if err != nil {
		return err
	}
	if err := plain.Verify(); err != nil {
		return err
	}
	own := layerkeys.Opened(l.desc.Digest, layerkeys.Decrypted, key.OpenedBy.Vouching(plain.PlainDigest(), diffID), key.Fingerprint())
	own.Plain = plain.PlainDigest()
	logrus.WithFields(logrus.Fields{"digest": l.desc.Digest, "diff-id": diffID, "took": time.Since(began)}).Info("encrypted layer has the content of another one")
	return r.conf.Record.Add(diffID, own)
}

// asSealed reads a layer that is mounted lazily, and so has the files that its seal says. It
// returns an error unless that is true of the layer, and has the diff ID.
func asSealed(ctx context.Context, plain io.Reader, diffID digest.Digest, desc ocispec.Descriptor, key *processor.LayerKey, blob content.ReaderAt) error {
	sealed, err := image.SealedLazy(key, desc)
	if err != nil {
		return err
	}
	if sealed.DiffID != diffID {
		return fmt.Errorf("its key has sealed that its diff ID is %s", sealed.DiffID)
	}
	size := sealed.Size - sealed.TailOffset
	if size > image.MaxTail {
		return fmt.Errorf("its table of contents has %d bytes, more than %d", size, image.MaxTail)
	}
	end := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(blob, sealed.TailOffset, size), end); err != nil {
		return err
	}
	stream, err := key.KeyStream(sealed.TailOffset)
	if err != nil {
		return err
	}
	stream.XORKeyStream(end, end)
	return image.VerifyLazy(&contextReader{ctx, plain}, sealed, end)
}

func (r *Resolver) unwrap(ctx context.Context, l layer) (*processor.LayerKey, error) {
	ctx, cancel := context.WithTimeout(ctx, unwrapTimeout)
	defer cancel()
	return r.keys.Unwrap(ctx, r.conf.Keys, l.desc)
}

// sizeOf returns the size of an uncompressed layer in bytes, or 0 if it is not known.
func sizeOf(known layerkeys.Layer) (size int64) {
	for _, b := range known.Blobs {
		size = max(size, b.Size)
	}
	return size
}

// sameContent reads a layer, compressed or not, and compares its digest. It reads no more
// than size bytes of the uncompressed layer, if that is not 0, and one: what is longer is
// another.
func sameContent(ctx context.Context, layer io.Reader, diffID digest.Digest, size int64) error {
	plain, err := compression.DecompressStream(&contextReader{ctx, layer})
	if err != nil {
		return err
	}
	defer plain.Close()
	from := io.Reader(plain)
	if size > 0 {
		from = io.LimitReader(plain, size+1)
	}
	digester := diffID.Algorithm().Digester()
	if _, err := io.CopyBuffer(struct{ io.Writer }{digester.Hash()}, from, make([]byte, processor.BufferSize)); err != nil {
		return err
	}
	if got := digester.Digest(); got != diffID {
		return notTheLayer{got}
	}
	// What decompresses may have more to read, such as a checksum.
	_, err = io.Copy(io.Discard, from)
	return err
}

// contextReader reads until ctx is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// learn reports whether what is known of a diff ID has the image's own encrypted blob, so
// that nothing has to be found out by reading it. If the image names recipients of that blob
// which are not recorded, they are tried: an image whose layer keys were wrapped again has
// others than the one that was unpacked.
func (r *Resolver) learn(ctx context.Context, diffID digest.Digest, known layerkeys.Layer, l layer) bool {
	wasDecrypted := slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool { return b.Basis == layerkeys.Decrypted })
	for _, b := range known.Blobs {
		if b.Digest != l.desc.Digest {
			continue
		}
		if b.Basis == layerkeys.Claimed {
			if len(known.Blobs) == 1 {
				return true
			}
			continue
		}
		if r.hasMore(l, b) {
			r.addRecipients(ctx, diffID, l, b)
		}
		return b.Basis == layerkeys.Decrypted || !wasDecrypted
	}
	return false
}

// hasMore reports whether an image names recipients of a blob that are not recorded.
func (r *Resolver) hasMore(l layer, b layerkeys.Blob) bool {
	return slices.ContainsFunc(l.claimed, func(o processor.Opener) bool {
		if o.KEK == "" {
			return !b.Other
		}
		return !slices.Contains(b.KEKs, KEK{ID: o.KEK, Version: o.Version})
	})
}

// addRecipients tries the recipients that an image names, and records those that give the
// blob's key.
func (r *Resolver) addRecipients(ctx context.Context, diffID digest.Digest, l layer, b layerkeys.Blob) {
	id := fmt.Sprintf("%s %v %s", l.desc.Digest, l.claimed, b.Plain)
	r.proofs.mu.Lock()
	wait := time.Now().Before(r.proofs.attempts[id])
	r.proofs.mu.Unlock()
	if wait {
		return
	}
	done := r.proofs.flight.DoChan(id, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unwrapTimeout)
		defer cancel()
		b.KEKs, b.Public, b.Vouched, b.Other = nil, nil, nil, false
		_, complete := r.keys.Openers(ctx, r.conf.Keys, l.desc, func(key *processor.LayerKey) bool {
			same := bytes.Equal(key.Fingerprint(), b.Fingerprint)
			if same && b.Basis == layerkeys.Decrypted {
				b.Open(key.OpenedBy.Vouching(b.Plain, diffID))
			} else if same {
				b.Open(key.OpenedBy) // nobody has compared the content
			}
			return same
		})
		ttl := failedTTL
		if complete {
			ttl = refusedTTL
		}
		r.proofs.mu.Lock()
		if len(r.proofs.attempts) >= maxOutcomes {
			clear(r.proofs.attempts)
		}
		r.proofs.attempts[id] = time.Now().Add(ttl)
		r.proofs.mu.Unlock()
		if len(b.KEKs) == 0 && !b.Other {
			return nil, nil
		}
		if err := r.conf.Record.Add(diffID, b); err != nil {
			logrus.WithError(err).Warn("recipients of a layer not recorded")
		}
		return nil, nil
	})
	select {
	case <-done:
	case <-ctx.Done():
	}
}
