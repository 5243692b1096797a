package plugin

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/processor"
)

// keys is a key pair, to encrypt and to decrypt with.
type keys struct {
	to  processor.Recipients
	dc  *config.DecryptConfig
	dir string // with the private key in key.pem
}

func newKeys(t testing.TB) keys {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "key.pem"), private, 0o600); err != nil {
		t.Fatal(err)
	}
	return keys{
		processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {public}}},
		&config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}}},
		dir,
	}
}

func newStore(t *testing.T) content.Store {
	t.Helper()
	s, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tarball is a layer with one file.
func tarball(t testing.TB, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	w.Write(bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size])
	w.Close()
	return b.Bytes()
}

// compressions are what a layer can be compressed with, by the end of its media
// type.
var compressions = map[string]func(t *testing.T, b []byte) []byte{
	"": func(_ *testing.T, b []byte) []byte { return b },
	"+gzip": func(_ *testing.T, b []byte) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		w.Write(b)
		w.Close()
		return out.Bytes()
	},
	"+zstd": func(t *testing.T, b []byte) []byte {
		w, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return w.EncodeAll(b, nil)
	},
}

// put encrypts a layer and writes what change makes of the ciphertext.
func put(t *testing.T, s content.Store, k keys, mediaType string, layer []byte, change func([]byte) []byte) ocispec.Descriptor {
	t.Helper()
	var out bytes.Buffer
	desc, err := processor.Encrypt(t.Context(), &out, bytes.NewReader(layer), mediaType, k.to)
	if err != nil {
		t.Fatal(err)
	}
	encrypted := change(out.Bytes())
	desc.Digest, desc.Size = digest.FromBytes(encrypted), int64(len(encrypted))
	if err := content.WriteBlob(t.Context(), s, desc.Digest.String(), bytes.NewReader(encrypted), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

func unchanged(b []byte) []byte { return b }

// overlay returns mounts onto which a layer is unpacked without mounting
// anything, and the directory into which.
func overlay(t testing.TB) ([]mount.Mount, string) {
	dir := t.TempDir()
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/nonexistent", "upperdir=" + dir}}}, dir
}

const layerType = ocispec.MediaTypeImageLayer

func TestApply(t *testing.T) {
	s, k := newStore(t), newKeys(t)
	d := New(s, nil, Config{DecryptionKeysPath: k.dir})
	for suffix, compress := range compressions {
		for _, size := range []int{0, 5, 1 << 20} {
			layer := tarball(t, size)
			for _, desc := range []ocispec.Descriptor{
				put(t, s, k, layerType+suffix, compress(t, layer), unchanged),
				func() ocispec.Descriptor { // plain
					b := compress(t, layer)
					desc := ocispec.Descriptor{MediaType: layerType + suffix, Digest: digest.FromBytes(b), Size: int64(len(b))}
					if err := content.WriteBlob(t.Context(), s, desc.Digest.String(), bytes.NewReader(b), desc); err != nil {
						t.Fatal(err)
					}
					return desc
				}(),
			} {
				mounts, dir := overlay(t)
				applied, err := d.Apply(t.Context(), desc, mounts)
				if err != nil || applied.Digest != digest.FromBytes(layer) || applied.MediaType != layerType || applied.Size != int64(len(layer)) {
					t.Errorf("%s, %d bytes: %+v, %v", desc.MediaType, size, applied, err)
				}
				if info, err := os.Stat(filepath.Join(dir, "file")); err != nil || info.Size() != int64(size) {
					t.Errorf("%s, %d bytes: %v", desc.MediaType, size, err)
				}
			}
		}
	}
}

func TestApplyTampered(t *testing.T) {
	s, k := newStore(t), newKeys(t)
	d := New(s, nil, Config{DecryptionKeysPath: k.dir})
	for suffix, compress := range compressions {
		for _, size := range []int{5, 2 << 20} {
			layer := compress(t, tarball(t, size))
			for name, change := range map[string]func([]byte) []byte{
				"first":   func(b []byte) []byte { b[0] ^= 1; return b },
				"middle":  func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
				"last":    func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
				"cut":     func(b []byte) []byte { return b[:len(b)-1] },
				"half":    func(b []byte) []byte { return b[:len(b)/2] },
				"longer":  func(b []byte) []byte { return append(b, 0) },
				"twice":   func(b []byte) []byte { return append(b, b...) },
				"nothing": func([]byte) []byte { return nil },
			} {
				desc := put(t, s, k, layerType+suffix, layer, change)
				mounts, _ := overlay(t)
				_, err := d.Apply(t.Context(), desc, mounts)
				if !errdefs.IsDataLoss(err) || err.Error() != "pilot: layer "+desc.Digest.String()+": "+processor.ErrTampered.Error() {
					t.Errorf("%s, %d bytes, %s: %v", suffix, size, name, err)
				}
			}
		}
	}
}

// TestApplyGarbage unpacks what is authentic, but no layer.
func TestApplyGarbage(t *testing.T) {
	s, k := newStore(t), newKeys(t)
	d := New(s, nil, Config{DecryptionKeysPath: k.dir})
	for suffix := range compressions {
		desc := put(t, s, k, layerType+suffix, bytes.Repeat([]byte("garbage "), 1000), unchanged)
		mounts, _ := overlay(t)
		if _, err := d.Apply(t.Context(), desc, mounts); err == nil || errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", suffix, err)
		}
	}
}

// TestApplyOdd applies what no containerd sends, and what it leaves to others.
func TestApplyOdd(t *testing.T) {
	s, k := newStore(t), newKeys(t)
	d := New(s, nil, Config{DecryptionKeysPath: k.dir})
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)
	if _, err := d.Apply(t.Context(), desc, nil); err == nil {
		t.Error("a layer was applied to no mounts")
	}
	for _, size := range []int64{0, -1, 1<<63 - 1} {
		wrong := desc
		wrong.Size = size
		mounts, _ := overlay(t)
		if _, err := d.Apply(t.Context(), wrong, mounts); err != nil {
			t.Errorf("a layer of %d bytes, as its descriptor says: %v", size, err)
		}
	}
	mounts, _ := overlay(t)
	other := ocispec.Descriptor{MediaType: "application/vnd.example.layer", Digest: desc.Digest, Size: desc.Size}
	if _, err := d.Apply(t.Context(), other, mounts); !errdefs.IsNotImplemented(err) {
		t.Errorf("a layer of another kind: %v", err)
	}
}

func TestApplyKeys(t *testing.T) {
	s, k, other := newStore(t), newKeys(t), newKeys(t)
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)
	payload, err := typeurl.MarshalAny(&imgcrypt.Payload{DecryptConfig: *k.dc, Descriptor: desc})
	if err != nil {
		t.Fatal(err)
	}
	passed := diff.WithPayloads(map[string]typeurl.Any{"some.processor": payload})
	for name, test := range map[string]struct {
		keys string
		opts []diff.ApplyOpt
		is   func(error) bool
		want string
	}{
		"of the node":         {k.dir, nil, nil, ""},
		"of the client":       {"", []diff.ApplyOpt{passed}, nil, ""},
		"of both":             {other.dir, []diff.ApplyOpt{passed}, nil, ""},
		"another":             {other.dir, nil, errdefs.IsFailedPrecondition, "no key unwraps the layer key: jwe: "},
		"none":                {"", nil, errdefs.IsFailedPrecondition, "jwe: no private key was given"},
		"for another purpose": {"", []diff.ApplyOpt{diff.WithPayloads(map[string]typeurl.Any{"x": &anypb.Any{TypeUrl: "x", Value: []byte("y")}})}, errdefs.IsFailedPrecondition, "no private key"},
	} {
		mounts, _ := overlay(t)
		_, err := New(s, nil, Config{DecryptionKeysPath: test.keys}).Apply(t.Context(), desc, mounts, test.opts...)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !test.is(err) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A descriptor that makes no sense.
	delete(desc.Annotations, "org.opencontainers.image.enc.pubopts")
	mounts, _ := overlay(t)
	if _, err := New(s, nil, Config{DecryptionKeysPath: k.dir}).Apply(t.Context(), desc, mounts); err == nil || !strings.Contains(err.Error(), "pubopts is missing") {
		t.Errorf("without pubopts: %v", err)
	}
}

// slowStore lets a test hold its readers up and counts them.
type slowStore struct {
	content.Store
	now, most atomic.Int32
	proceed   chan struct{}
}

func (s *slowStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	n := s.now.Add(1)
	defer s.now.Add(-1)
	for most := s.most.Load(); n > most && !s.most.CompareAndSwap(most, n); most = s.most.Load() {
	}
	<-s.proceed
	return s.Store.ReaderAt(ctx, desc)
}

func TestLayersAtOnce(t *testing.T) {
	k := newKeys(t)
	s := &slowStore{Store: newStore(t), proceed: make(chan struct{})}
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)
	d := New(s, nil, Config{DecryptionKeysPath: k.dir, Layers: 2})
	errs := make(chan error)
	for range 6 {
		mounts, _ := overlay(t)
		go func() {
			_, err := d.Apply(t.Context(), desc, mounts)
			errs <- err
		}()
	}
	for s.now.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	// One that gives up waiting.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	mounts, _ := overlay(t)
	if _, err := d.Apply(ctx, desc, mounts); !errdefs.IsUnavailable(err) {
		t.Errorf("gave up: %v", err)
	}
	time.Sleep(20 * time.Millisecond)
	close(s.proceed)
	for range 6 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if most := s.most.Load(); most != 2 {
		t.Errorf("%d layers at once, want 2", most)
	}
}
