package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/internal/verified"
)

// TestImpossibleSizesAreErrors has a registry's descriptors lie about sizes.
func TestImpossibleSizesAreErrors(t *testing.T) {
	dir, manifest, layer := oneLayer(t, 5000)
	hosts := plainHTTP(http.DefaultClient)
	address := newRegistry(t, nil)
	reg := target(t, "docker://"+address+"/app:1", hosts)
	if _, err := NewPair(source(t, "oci:"+dir+":app", hosts), reg).Finish(t.Context(), image.Result{Target: manifest}, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, desc := range []ocispec.Descriptor{manifest, layer} {
		desc.Size = -1
		if _, err := content.ReadBlob(t.Context(), source(t, "docker://"+address+"/app:1", hosts), desc); err == nil {
			t.Errorf("%s: a size of -1 was read", desc.MediaType)
		}
	}
	desc := layer
	desc.Size = 0
	if _, err := reg.ReaderAt(t.Context(), desc); !errors.Is(err, verified.ErrDigest) {
		t.Errorf("a layer that claims to be empty: %v", err)
	}
	empty := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(nil)}
	put(t, reg, ocispec.MediaTypeImageLayer, nil)
	if b, err := content.ReadBlob(t.Context(), reg, empty); err != nil || len(b) != 0 {
		t.Errorf("an empty layer: %v", err)
	}
}

// TestOtherHostsSeeNoCredentials has a registry send uploads to another host.
func TestOtherHostsSeeNoCredentials(t *testing.T) {
	ec, _ := newKey(t)
	var seen sync.Map
	inner := newRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for _, name := range []string{"Authorization", "X-Secret"} {
				if r.Header.Get(name) != "" {
					seen.Store(r.Method+" "+name, true)
				}
			}
			h.ServeHTTP(w, r)
		})
	})
	registry := func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			req, _ := http.NewRequestWithContext(r.Context(), r.Method, "http://"+inner+r.URL.String(), http.NoBody)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			resp.Body.Close()
			w.Header().Set("Location", "http://"+inner+resp.Header.Get("Location"))
			w.WriteHeader(resp.StatusCode)
			return
		}
		if r.Method == http.MethodPut { // of the manifest
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusCreated)
			return
		}
		http.NotFound(w, r)
	}
	for name, start := range map[string]func(http.Handler) *httptest.Server{"http": httptest.NewServer, "https": httptest.NewTLSServer} {
		t.Run(name, func(t *testing.T) {
			s := start(http.HandlerFunc(registry))
			t.Cleanup(s.Close)
			hosts := docker.ConfigureDefaultRegistries(docker.WithClient(s.Client()), docker.WithPlainHTTP(func(string) (bool, error) { return name == "http", nil }))
			secret := func(host string) ([]docker.RegistryHost, error) {
				list, err := hosts(host)
				for i := range list {
					list[i].Header = http.Header{"Authorization": {"Basic eDp5"}, "X-Secret": {"x"}}
				}
				return list, err
			}
			dir, _, _ := oneLayer(t, 19<<20)
			_, address, _ := strings.Cut(s.URL, "//")
			_, err := crypt(t, source(t, "oci:"+dir+":app", nil), target(t, "docker://"+address+"/app:1", secret), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
				return image.Encrypt(ctx, cs, desc, ec, image.Options{})
			})
			if name == "http" && err != nil {
				t.Error(err)
			}
			if name == "https" && (err == nil || !strings.Contains(err.Error(), "not encrypted")) {
				t.Errorf("a registry with https had a blob sent without: %v", err)
			}
			seen.Range(func(key, _ any) bool { t.Errorf("the other host saw %v", key); return true })
		})
	}
}

// TestRedirectsCarryNoSecrets has a registry redirect what is read and written to another
// host, which is the same registry.
func TestRedirectsCarryNoSecrets(t *testing.T) {
	ec, dc := newKey(t)
	var mu sync.Mutex
	seen, redirected := map[string]bool{}, map[string]bool{}
	inner := newRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			for _, name := range []string{"Authorization", "Cookie", "X-Secret"} {
				seen[name] = seen[name] || r.Header.Get(name) != ""
			}
			mu.Unlock()
			h.ServeHTTP(w, r)
		})
	})
	outer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		redirected[r.Method] = true
		mu.Unlock()
		if r.Header.Get("X-Secret") == "" {
			t.Errorf("%s %s: the registry itself does not see the header", r.Method, r.URL)
		}
		http.Redirect(w, r, "http://"+inner+r.URL.String(), http.StatusTemporaryRedirect)
	}))
	t.Cleanup(outer.Close)
	hosts := func(host string) ([]docker.RegistryHost, error) {
		list, err := plainHTTP(outer.Client())(host)
		for i := range list {
			list[i].Header = http.Header{"Authorization": {"Basic eDp5"}, "X-Secret": {"x"}, "Cookie": {"a=b"}}
		}
		return list, err
	}
	dir, manifest, _ := oneLayer(t, 19<<20)
	enc := "docker://" + strings.TrimPrefix(outer.URL, "http://") + "/app:1"
	if _, err := crypt(t, source(t, "oci:"+dir+":app", nil), target(t, enc, hosts), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		return image.Encrypt(ctx, cs, desc, ec, image.Options{})
	}); err != nil {
		t.Fatal(err)
	}
	back, err := crypt(t, source(t, enc, hosts), target(t, "oci:"+dir+":back", nil), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		return image.Decrypt(ctx, cs, desc, dc, image.Options{})
	})
	if err != nil || back.Target.Digest != manifest.Digest {
		t.Errorf("%s came back: %v", back.Target.Digest, err)
	}
	for name, was := range seen {
		if was {
			t.Errorf("the other host saw %s", name)
		}
	}
	for _, method := range []string{"GET", "HEAD", "POST", "PUT"} {
		if !redirected[method] {
			t.Errorf("no %s was redirected", method)
		}
	}
}

// TestMissingManifestsAreErrorsUnlessAccepted brings an index of which a manifest is missing
// to another place.
func TestMissingManifestsAreErrorsUnlessAccepted(t *testing.T) {
	dir, manifest, _ := oneLayer(t, 5000)
	missing := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("missing"), Size: 7}
	doc, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{missing, manifest}})
	if err != nil {
		t.Fatal(err)
	}
	index := put(t, target(t, "oci:"+dir+":app", nil), ocispec.MediaTypeImageIndex, doc)
	finish := func(result image.Result) error {
		result.Target = index
		_, err := NewPair(source(t, "oci:"+dir+":app", nil), target(t, "oci:"+dir+"/../to:x", nil)).Finish(t.Context(), result, nil, nil)
		return err
	}
	if err := finish(image.Result{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), missing.Digest.String()) {
		t.Errorf("nobody accepted it: %v", err)
	}
	if _, err := target(t, "oci:"+dir+"/../to:x", nil).Resolve(t.Context()); !errdefs.IsNotFound(err) {
		t.Errorf("the name is given: %v", err)
	}
	for what, result := range map[string]image.Result{
		"skipped": {Skipped: []ocispec.Descriptor{missing}},
		"kept":    {Plain: []image.Plain{{Digest: missing.Digest, Reason: image.ReasonAbsent}}},
	} {
		if err := finish(result); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestForeignLayersThatAreThereAreCopied has a registry refuse such a layer in the words
// for one that is not there.
func TestForeignLayersThatAreThereAreCopied(t *testing.T) {
	dir, manifest, layer := oneLayer(t, 5000)
	from := source(t, "oci:"+dir+":app", nil)
	var m ocispec.Manifest
	doc, err := content.ReadBlob(t.Context(), from, manifest)
	if err == nil {
		err = json.Unmarshal(doc, &m)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, there := range []bool{true, false} {
		foreign := layer
		if !there {
			foreign.Digest = digest.FromString("elsewhere")
		}
		foreign.URLs = []string{"https://example.com/layer"}
		m.Layers = []ocispec.Descriptor{foreign}
		if doc, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		result := image.Result{Target: put(t, target(t, "oci:"+dir+":app", nil), ocispec.MediaTypeImageManifest, doc)}
		to := target(t, "docker://"+newRegistry(t, func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPut && r.URL.Query().Get("digest") == layer.Digest.String() {
					http.NotFound(w, r)
					return
				}
				h.ServeHTTP(w, r)
			})
		})+"/app:1", plainHTTP(nil))
		_, err := NewPair(from, to).Finish(t.Context(), result, nil, nil)
		if _, rerr := to.Resolve(t.Context()); errdefs.IsNotFound(rerr) != there || (err != nil) != there {
			t.Errorf("there: %v: %v, and the tag: %v", there, err, rerr)
		}
	}
}

// TestArchivesResolveToWhatIsReplaced looks at a file before it is replaced.
func TestArchivesResolveToWhatIsReplaced(t *testing.T) {
	dir, manifest, _ := oneLayer(t, 5000)
	file := filepath.Join(dir, "..", "app.tar")
	name := "oci-archive:" + file
	if _, err := target(t, name, nil).Resolve(t.Context()); !errdefs.IsNotFound(err) {
		t.Errorf("no file: %v", err)
	}
	to := target(t, name+":app", nil)
	if _, err := NewPair(source(t, "oci:"+dir+":app", nil), to).Finish(t.Context(), image.Result{Target: manifest}, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{name, name + ":app"} {
		if desc, err := target(t, n, nil).Resolve(t.Context()); err != nil || desc.Digest != manifest.Digest {
			t.Errorf("%s is %v: %v", n, desc.Digest, err)
		}
	}
	if _, err := target(t, name+":other", nil).Resolve(t.Context()); !errdefs.IsAlreadyExists(err) || errdefs.IsNotFound(err) {
		t.Errorf("a file with another image: %v", err)
	}
}

// TestArchivesKeepTheirMode replaces an archive that nobody else may read, by one that
// nobody else may read while it is written.
func TestArchivesKeepTheirMode(t *testing.T) {
	dir, _, _ := oneLayer(t, 5000)
	file := filepath.Join(t.TempDir(), "app.tar")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := crypt(t, source(t, "oci:"+dir+":app", nil), target(t, "oci-archive:"+file, nil), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		ec, _ := newKey(t)
		result, err := image.Encrypt(ctx, cs, desc, ec, image.Options{})
		files, _ := filepath.Glob(filepath.Dir(file) + "/.*")
		for _, name := range append(files, file) {
			if info, err := os.Stat(name); err != nil || info.Mode() != 0o600 || len(files) == 0 {
				t.Errorf("%s: %v, %v", name, info.Mode(), err)
			}
		}
		return result, err
	})
	info, serr := os.Stat(file)
	if err != nil || serr != nil || info.Mode() != 0o600 || info.Size() == 0 {
		t.Errorf("%v, %v, %v", info.Mode(), err, serr)
	}
}

// TestLayoutKeepsNamesGivenAtOnce names images from several handles of one layout.
func TestLayoutKeepsNamesGivenAtOnce(t *testing.T) {
	dir, manifest, _ := oneLayer(t, 5000)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			l, err := layout.Open(dir)
			if err == nil {
				defer l.Close()
				err = l.Tag(t.Context(), manifest, fmt.Sprint(i), nil)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range 20 {
		if _, err := source(t, fmt.Sprintf("oci:%s:%d", dir, i), nil).Resolve(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
