package transport

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containers/ocicrypt/config"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/imagetest"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/verified"
	"github.com/ctrlplane/pilot/processor"
)

func TestParseReadsNamesAsSkopeoSpellsThem(t *testing.T) {
	for s, want := range map[string]Name{
		"docker://registry.example.com/app:1": {Registry, "", "registry.example.com/app:1"},
		"docker://127.0.0.1:5000/a/b@sha256:0123456789012345678901234567890123456789012345678901234567890123": {Registry, "",
			"127.0.0.1:5000/a/b@sha256:0123456789012345678901234567890123456789012345678901234567890123"},
		"oci:dir":                               {OCI, "dir", ""},
		"oci:dir:1":                             {OCI, "dir", "1"},
		"oci:/a/dir:registry.example.com/app:1": {OCI, "/a/dir", "registry.example.com/app:1"},
		"oci-archive:app.tar:1":                 {OCIArchive, "app.tar", "1"},
		"docker-archive:app.tar":                {DockerArchive, "app.tar", ""},
		"docker-archive:app.tar:app:1":          {DockerArchive, "app.tar", "app:1"},
		"containerd:registry.example.com/app:1": {Containerd, "", "registry.example.com/app:1"},
		"registry.example.com:5000/app:1":       {Containerd, "", "registry.example.com:5000/app:1"},
		"app:1":                                 {Containerd, "", "app:1"},
	} {
		got, err := Parse(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if back := got.String(); back != s && "containerd:"+s != back {
			t.Errorf("%s is spelled %s", s, back)
		}
	}
	for _, s := range []string{"docker:app", "docker://app:1", "docker://registry.example.com/app", "oci:", "oci-archive::1", "", "containerd:"} {
		if _, err := Parse(s); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestParseTakesDrivesOnWindows(t *testing.T) {
	for s, want := range map[string]Name{
		`oci:C:\images\app`:                        {OCI, `C:\images\app`, ""},
		`oci:C:\images\app:1`:                      {OCI, `C:\images\app`, "1"},
		`oci:c:/images/app:registry.example.com:1`: {OCI, `c:/images/app`, "registry.example.com:1"},
		`oci-archive:C:\a.tar:1`:                   {OCIArchive, `C:\a.tar`, "1"},
		`docker-archive:D:\a.tar:app:1`:            {DockerArchive, `D:\a.tar`, "app:1"},
		`oci:\\?\C:\images\app:1`:                  {OCI, `\\?\C:\images\app`, "1"},
		`oci:\\server\share\app:1`:                 {OCI, `\\server\share\app`, "1"},
		`oci:images\app:1`:                         {OCI, `images\app`, "1"},
		`oci:c:1`:                                  {OCI, `c`, "1"},
		`oci:c:`:                                   {OCI, `c`, ""},
		"app:1":                                    {Containerd, "", "app:1"},
		"docker://registry.example.com/app:1":      {Registry, "", "registry.example.com/app:1"},
	} {
		if got, err := parse(s, true); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{`C:\images\app`, `c:/images/app:1`, `oci::1`} {
		if _, err := parse(s, true); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", s, err)
		}
	}
	// Elsewhere a drive is a directory.
	if got, err := parse(`oci:C:\images`, false); err != nil || got != (Name{OCI, "C", `\images`}) {
		t.Errorf("%+v, %v", got, err)
	}
}

// newKey returns how to encrypt and decrypt with a key of its own.
func newKey(t testing.TB) (processor.Recipients, processor.Keys) {
	t.Helper()
	fipstest.Refused(t, fipstest.JWE)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}) }
	ec, err := config.EncryptWithJwe([][]byte{encode("PUBLIC KEY", public)})
	if err != nil {
		t.Fatal(err)
	}
	dc, err := config.DecryptWithPrivKeys([][]byte{encode("PRIVATE KEY", private)}, [][]byte{nil})
	if err != nil {
		t.Fatal(err)
	}
	return processor.Recipients{Parameters: ec.EncryptConfig.Parameters}, processor.Keys{Private: dc.DecryptConfig}
}

// plainHTTP are hosts without TLS.
func plainHTTP(client *http.Client) docker.RegistryHosts {
	return docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(client))
}

// newRegistry starts a registry and returns its address.
func newRegistry(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		handler = wrap(handler)
	}
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func source(t testing.TB, name string, hosts docker.RegistryHosts) Source {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenSource(t.Context(), n, hosts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func target(t testing.TB, name string, hosts docker.RegistryHosts) Target {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := OpenTarget(t.Context(), n, false, hosts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// write makes a layout of an image.
func write(t *testing.T, img *imagetest.Image, dir string) {
	t.Helper()
	to := target(t, "oci:"+dir+":app", nil)
	if err := img.Write(t.Context(), NewPair(to, to)); err != nil {
		t.Fatal(err)
	}
	if err := to.Name(t.Context(), to, img.Target, nil); err != nil {
		t.Fatal(err)
	}
}

// crypt encrypts or decrypts from one place to another.
func crypt(t testing.TB, from Source, to Target, do func(context.Context, image.Store, ocispec.Descriptor) (image.Result, error)) (image.Result, error) {
	t.Helper()
	pair := NewPair(from, to)
	desc, err := from.Resolve(t.Context())
	if err != nil {
		return image.Result{}, err
	}
	result, err := do(t.Context(), pair, desc)
	if err != nil {
		return result, err
	}
	_, err = pair.Finish(t.Context(), result, nil, nil)
	return result, err
}

// complete returns the first image from a seed on of which all blobs are there: no
// registry takes others.
func complete(seed uint64, size int) *imagetest.Image {
	for ; ; seed++ {
		img := imagetest.New(seed, size)
		if !slices.ContainsFunc(slices.Collect(maps.Values(img.Blobs)), func(b *imagetest.Blob) bool { return b.Absent }) {
			return img
		}
	}
}

// TestImagesComeBackFromEachTransport encrypts random images from a layout into each
// transport, decrypts them from there into each, and reads every blob of the result.
func TestImagesComeBackFromEachTransport(t *testing.T) {
	ec, dc := newKey(t)
	encrypt := func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		return image.Encrypt(ctx, cs, desc, ec, image.Options{AllowPlain: true})
	}
	decrypt := func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		return image.Decrypt(ctx, cs, desc, dc, image.Options{})
	}
	hosts := plainHTTP(http.DefaultClient)
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			img := complete(1000*seed, 1+int(seed)%4)
			dir, address := t.TempDir(), newRegistry(t, nil)
			write(t, img, filepath.Join(dir, "plain"))
			for _, middle := range []string{"oci:" + dir + "/middle:x", "oci-archive:" + dir + "/middle.tar:x", "docker://" + address + "/middle:x"} {
				from := source(t, "oci:"+dir+"/plain:app", hosts)
				to := target(t, middle, hosts)
				if _, err := crypt(t, from, to, encrypt); err != nil {
					t.Fatalf("%s: %v\n%s", middle, err, img)
				}
				for i, end := range []string{"oci:" + dir + "/end", "oci-archive:" + dir + "/end.tar", "docker://" + address + "/end"} {
					end += fmt.Sprintf(":%d", i)
					result, err := crypt(t, source(t, middle, hosts), target(t, end, hosts), decrypt)
					if err != nil {
						t.Fatalf("%s from %s: %v\n%s", end, middle, err, img)
					}
					if result.Target.Digest != img.Target.Digest {
						t.Errorf("%s from %s: %s came back and not %s", end, middle, result.Target.Digest, img.Target.Digest)
					}
					back := source(t, end, hosts)
					desc, err := back.Resolve(t.Context())
					if err != nil || desc.Digest != img.Target.Digest {
						t.Fatalf("%s: %v, %v", end, desc, err)
					}
					for d, b := range img.Blobs {
						if b.Absent {
							continue
						}
						_, err := content.ReadBlob(t.Context(), back, ocispec.Descriptor{MediaType: b.MediaType, Digest: d, Size: int64(len(b.Bytes))})
						if err != nil {
							t.Errorf("%s from %s: %s: %v\n%s", end, middle, d, err, img)
						}
					}
				}
				os.RemoveAll(filepath.Join(dir, "end"))
				os.Remove(filepath.Join(dir, "end.tar"))
			}
		})
	}
}

// put writes a blob.
func put(t testing.TB, to Target, mediaType string, b []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := content.WriteBlob(t.Context(), to, "x", bytes.NewReader(b), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

// oneLayer returns a layout with an image of one layer of n bytes.
func oneLayer(t *testing.T, n int) (dir string, manifest, layer ocispec.Descriptor) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "plain")
	layers(t, dir, 1, n)
	from := source(t, "oci:"+dir+":app", nil)
	manifest, err := from.Resolve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	children, err := images.Children(t.Context(), from, manifest)
	if err != nil {
		t.Fatal(err)
	}
	return dir, manifest, children[1]
}

// TestDamagedBlobsAreFound damages a layer of a layout.
func TestDamagedBlobsAreFound(t *testing.T) {
	ec, _ := newKey(t)
	for name, damage := range map[string]func(path string) error{
		"changed": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), 5000)
			return err
		},
		"missing": os.Remove,
		"shorter": func(path string) error { return os.Truncate(path, 4000) },
	} {
		t.Run(name, func(t *testing.T) {
			dir, _, layer := oneLayer(t, 3<<20)
			if err := damage(filepath.Join(dir, "blobs", "sha256", layer.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
			for _, to := range []string{"oci:" + dir + "/../to:x", "oci-archive:" + dir + "/../to.tar:x"} {
				_, err := crypt(t, source(t, "oci:"+dir+":app", nil), target(t, to, nil), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
					return image.Encrypt(ctx, cs, desc, ec, image.Options{})
				})
				if err == nil {
					t.Fatalf("%s: it was encrypted", to)
				}
				if name == "changed" && !errors.Is(err, verified.ErrDigest) {
					t.Errorf("%s: %v", to, err)
				}
				if !strings.Contains(err.Error(), layer.Digest.String()) {
					t.Errorf("%s: the error names no layer: %v", to, err)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "..", "to.tar")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("there is an archive: %v", err)
			}
		})
	}
}

// TestUploadsSurviveABadNetwork has a registry break off, refuse chunks and ask to wait.
func TestUploadsSurviveABadNetwork(t *testing.T) {
	ec, dc := newKey(t)
	for name, wrap := range map[string]func(http.Handler) http.Handler{
		"chunk refused": func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPatch && r.Header.Get("Content-Range") != "" {
					http.Error(w, "no chunks here", http.StatusRequestedRangeNotSatisfiable)
					return
				}
				h.ServeHTTP(w, r)
			})
		},
		"one of three fails": func(h http.Handler) http.Handler {
			var n atomic.Int64
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1)%3 == 0 {
					w.Header().Set("Retry-After", "0")
					http.Error(w, "busy", http.StatusServiceUnavailable)
					return
				}
				h.ServeHTTP(w, r)
			})
		},
		"connection breaks": func(h http.Handler) http.Handler {
			var n atomic.Int64
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1)%4 == 0 {
					io.CopyN(io.Discard, r.Body, 1000)
					panic(http.ErrAbortHandler)
				}
				h.ServeHTTP(w, r)
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, manifest, _ := oneLayer(t, 19<<20)
			hosts := plainHTTP(http.DefaultClient)
			enc := "docker://" + newRegistry(t, wrap) + "/app:enc"
			if _, err := crypt(t, source(t, "oci:"+dir+":app", hosts), target(t, enc, hosts), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
				return image.Encrypt(ctx, cs, desc, ec, image.Options{})
			}); err != nil {
				t.Fatal(err)
			}
			result, err := crypt(t, source(t, enc, hosts), target(t, "oci:"+dir+":back", hosts), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
				return image.Decrypt(ctx, cs, desc, dc, image.Options{})
			})
			if err != nil || result.Target.Digest != manifest.Digest {
				t.Errorf("%v came back: %v", result.Target.Digest, err)
			}
		})
	}
}
