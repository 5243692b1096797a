package mirror

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// faulty is a proxy before a registry that answers some requests itself.
type faulty struct {
	address string

	mu      sync.Mutex
	answer  func(w http.ResponseWriter, r *http.Request, forward http.Handler)
	asked   []string
	current int // requests under way
}

func newFaulty(t testing.TB, registry string) *faulty {
	t.Helper()
	f := &faulty{}
	forward := &httputil.ReverseProxy{ErrorHandler: func(http.ResponseWriter, *http.Request, error) {}, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.asked = append(f.asked, r.Method+" "+r.URL.Path)
		f.current++
		answer := f.answer
		f.mu.Unlock()
		defer func() {
			f.mu.Lock()
			f.current--
			f.mu.Unlock()
		}()
		if answer == nil {
			forward.ServeHTTP(w, r)
			return
		}
		answer(w, r, forward)
	}))
	t.Cleanup(s.Close)
	f.address = strings.TrimPrefix(s.URL, "http://")
	return f
}

// set has the registry answer in another way, and forgets what it was asked.
func (f *faulty) set(answer func(w http.ResponseWriter, r *http.Request, forward http.Handler)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer, f.asked = answer, nil
}

// requests returns what the registry was asked since then that has a text in it.
func (f *faulty) requests(text string) (list []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, asked := range f.asked {
		if strings.Contains(asked, text) {
			list = append(list, asked)
		}
	}
	return list
}

// underWay returns how many requests the registry answers now.
func (f *faulty) underWay() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.current
}

// random returns a layer that does not compress, of so many bytes.
func random(size int) []byte {
	b := make([]byte, size)
	state := uint32(1)
	for i := range b {
		state = state*1664525 + 1013904223
		b[i] = byte(state >> 24)
	}
	return b
}

// bigNode has an encrypted image of one layer of 8 MiB as big:enc, with a faulty registry
// as the mirror's upstream.
func bigNode(t testing.TB, args ...string) (n *node, f *faulty, plain, layer string) {
	t.Helper()
	n = newNode(t)
	f = newFaulty(t, n.registry)
	n.startWith(f.address, append([]string{"--mirror-secret-file", n.dir + "/secret"}, args...)...)
	n.secret = strings.TrimSpace(harness.Read(t, n.dir+"/secret"))
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object {
		return l.ImageOf(harness.LayerKinds[0], [][]byte{random(8 << 20)})
	})
	n.encrypt(layout, "big:enc")
	return n, f, plain, layers(t, harness.Read(t, file(layout, plain)))[0]
}

// TestRegistryFaults has the registry do what registries and what is before them do.
func TestRegistryFaults(t *testing.T) {
	t.Parallel()
	n, f, plain, layer := bigNode(t)
	manifests := []string{manifestPath("big", "enc"), manifestPath("big", plain)}
	blob := blobPath("big", layer)
	whole := func(what string) {
		t.Helper()
		for _, path := range manifests {
			if r := n.get(path); r.status != http.StatusOK || digestOf(r.body) != plain {
				t.Errorf("%s: %s: %d %v %.300s", what, path, r.status, r.err, r.body)
			}
		}
		if r := n.get(blob); r.status != http.StatusOK || digestOf(r.body) != layer {
			t.Errorf("%s: layer: %d %v, %d bytes", what, r.status, r.err, len(r.body))
		} else if r.header.Get("Location") != "" {
			t.Errorf("%s: it passes a redirect on", what)
		}
	}
	refused := func(what string, status int, retry bool) {
		t.Helper()
		for _, path := range append(manifests, blob) {
			began := time.Now()
			r := n.get(path)
			if r.status != status || r.err != nil || !strings.Contains(r.body, `"errors"`) {
				t.Errorf("%s: %s: %d %v %.300s, not %d", what, path, r.status, r.err, r.body, status)
			}
			if s, err := strconv.Atoi(r.header.Get("Retry-After")); (err == nil && s > 0) != retry {
				t.Errorf("%s: %s: Retry-After is %q", what, path, r.header.Get("Retry-After"))
			}
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("%s: %s took %v", what, path, took)
			}
		}
	}
	isBlob := func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
	}
	whole("no fault")

	// Redirects to storage, which must not see the credentials.
	var seen atomic.Int32
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			seen.Add(1)
		}
		resp, err := http.Get("http://" + n.registry + r.URL.Path)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}))
	t.Cleanup(storage.Close)
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		_, _, ok := r.BasicAuth()
		switch {
		case !ok:
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		case isBlob(r):
			http.Redirect(w, r, strings.Replace(storage.URL, "127.0.0.1", "localhost", 1)+r.URL.Path, http.StatusTemporaryRedirect)
		default:
			forward.ServeHTTP(w, r)
		}
	})
	for _, path := range append(manifests, blob) {
		r := n.request(http.MethodGet, path, http.Header{"Pilot-Secret": {n.secret}, "Authorization": {"Basic " + basic("u", "p")}})
		if r.status != http.StatusOK || digestOf(r.body) != layer && digestOf(r.body) != plain || r.header.Get("Location") != "" {
			t.Errorf("redirected %s: %d %v %s", path, r.status, r.err, r.header)
		}
	}
	if seen.Load() > 0 {
		t.Error("the storage has seen the credentials")
	}

	// Tokens that are good for three requests.
	var tokens, used atomic.Int32
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if r.URL.Path == "/token" {
			used.Store(0)
			fmt.Fprintf(w, `{"token":"t%d","expires_in":300}`, tokens.Add(1))
			return
		}
		given := r.Header.Get("Authorization")
		if given != fmt.Sprintf("Bearer t%d", tokens.Load()) || used.Add(1) > 3 {
			challenge := `Bearer realm="http://` + r.Host + `/token",service="x",scope="repository:big:pull"`
			if given != "" {
				challenge += `,error="invalid_token"`
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		forward.ServeHTTP(w, r)
	})
	for range 4 {
		whole("tokens that expire")
	}
	if tokens.Load() < 3 {
		t.Errorf("%d tokens", tokens.Load())
	}

	// What the storage's URLs have for a query is for nobody.
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, map[bool]string{true: storage.URL + "/denied", false: "http://127.0.0.1:1/"}[r.Method == http.MethodGet]+"?signature=s3cret", http.StatusTemporaryRedirect)
			return
		}
		forward.ServeHTTP(w, r)
	})
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		if r := n.request(method, blob, nil); r.status != http.StatusNotFound && r.status != http.StatusBadGateway || strings.Contains(r.body, "s3cret") {
			t.Errorf("%s of a layer that the storage does not have: %d %s", method, r.status, r.body)
		}
	}
	if strings.Contains(harness.Read(t, n.pilot.Log), "s3cret") {
		t.Error("the log has what is for the storage alone")
	}

	for _, status := range []int{http.StatusForbidden, http.StatusUnauthorized} {
		f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(status) })
		refused(http.StatusText(status), status, false)
	}
	for _, status := range []int{http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusBadGateway} {
		f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(status) })
		refused(http.StatusText(status), http.StatusBadGateway, false)
	}
	f.set(func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) })
	refused("gone", http.StatusBadGateway, false)
	f.set(nil)
	whole("back")

	// A layer whose connection breaks every megabyte is continued.
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if isBlob(r) {
			w = &breaking{ResponseWriter: w, left: 1 << 20}
		}
		forward.ServeHTTP(w, r)
	})
	whole("connections that break")
	// A registry that knows no ranges begins again each time.
	var tries atomic.Int32
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if isBlob(r) {
			r.Header.Del("Range")
			w = &breaking{ResponseWriter: w, left: int(tries.Add(1)) << 21}
		}
		forward.ServeHTTP(w, r)
	})
	whole("connections that break, without ranges")

	// One that has no more of a layer never makes it a whole one.
	for what, answer := range map[string]func(w http.ResponseWriter, r *http.Request, forward http.Handler){
		"always cut": func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if isBlob(r) {
				if r.Header.Get("Range") != "" {
					panic(http.ErrAbortHandler)
				}
				w = &breaking{ResponseWriter: w, left: 5 << 20}
			}
			forward.ServeHTTP(w, r)
		},
		"too short, said to be so": func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if isBlob(r) {
				w.Write(random(5 << 20))
				return
			}
			forward.ServeHTTP(w, r)
		},
		"a byte too many": func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if isBlob(r) {
				w = &appending{w}
			}
			forward.ServeHTTP(w, r)
		},
		"other bytes": func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if isBlob(r) {
				w.Write(random(8<<20 + 1536))
				return
			}
			forward.ServeHTTP(w, r)
		},
		"a range of another place": func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if isBlob(r) && r.Header.Get("Range") == "" {
				w = &breaking{ResponseWriter: w, left: 5 << 20}
			} else if isBlob(r) {
				r.Header.Set("Range", "bytes=0-")
			}
			forward.ServeHTTP(w, r)
		},
	} {
		f.set(answer)
		if r := n.get(blob); r.status == http.StatusOK && r.err == nil {
			t.Errorf("%s: a whole layer of %d bytes, %s", what, len(r.body), digestOf(r.body))
		}
	}
	f.set(nil)
	whole("whole again")

	// A manifest that is not what its digest says.
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			fmt.Fprint(w, `{"schemaVersion":2}`)
			return
		}
		forward.ServeHTTP(w, r)
	})
	n.get(manifestPath("big", digestOf("x"))).expect(t, "no manifest", http.StatusNotFound)
	fresh := n.get(manifestPath("big", n.tagged("big", "enc")))
	if fresh.status != http.StatusBadGateway {
		t.Errorf("another manifest: %d %s", fresh.status, fresh.body)
	}
	f.set(nil)

	// A registry whose token is to pull alone says nothing about what else it has.
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusMethodNotAllowed} {
		f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			if strings.HasSuffix(r.URL.Path, "/tags/list") {
				w.WriteHeader(status)
				return
			}
			forward.ServeHTTP(w, r)
		})
		absent := digestOf(fmt.Sprint("absent ", status))
		for code, path := range map[string]string{"MANIFEST_UNKNOWN": manifestPath("big", absent), "BLOB_UNKNOWN": blobPath("big", absent)} {
			n.get(path).expect(t, fmt.Sprintf("absent, where tags are listed with %d", status), http.StatusNotFound, code)
		}
	}

	// What is no registry's answer, such as that of another server, is not for callers.
	const foreign = `{"AccessKeyId":"s3cret"}`
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		w.Header().Set("Content-Length", fmt.Sprint(len(foreign)))
		io.WriteString(w, foreign)
	})
	for _, path := range []string{"/v2/big/tags/list", "/v2/big/referrers/" + plain, blobPath("big", digestOf("y")), manifestPath("big", "other"), manifestPath("big", digestOf("y"))} {
		if r := n.get(path); r.status != http.StatusBadGateway && r.status != http.StatusNotFound || strings.Contains(r.body, "s3cret") {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		http.Redirect(w, r, "http://169.254.169.254/latest/meta-data/iam/", http.StatusTemporaryRedirect)
	})
	for _, path := range []string{"/v2/big/tags/list", blob, manifestPath("big", "enc")} {
		n.get(path).expect(t, "redirected to metadata", http.StatusForbidden, "DENIED", "169.254.169.254")
	}
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://169.254.169.254/token",service="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	n.request(http.MethodGet, manifestPath("big", "enc"), http.Header{"Pilot-Secret": {n.secret}, "Authorization": {"Basic " + basic("new", "p")}}).
		expect(t, "tokens from metadata", http.StatusForbidden, "DENIED", "169.254.169.254")
	f.set(nil)

	limit := func(retryAfter string) (asked *atomic.Int32) {
		asked = new(atomic.Int32)
		f.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			asked.Add(1)
			w.Header().Set("Retry-After", retryAfter)
			w.WriteHeader(http.StatusTooManyRequests)
		})
		return asked
	}
	limit("1")
	if r := n.get(blob); r.status != http.StatusTooManyRequests {
		t.Errorf("too many requests: %d %s", r.status, r.body)
	}
	f.set(nil)
	harness.Await(t, "the registry takes requests again", func() error {
		if r := n.get(blob); r.status != http.StatusOK {
			return fmt.Errorf("%d", r.status)
		}
		return nil
	})
	// Last, since it is not asked again before the time is over.
	asked := limit("250")
	refused("too many requests", http.StatusTooManyRequests, true)
	if asked.Load() != 1 {
		t.Errorf("a registry that wants no requests was asked %d times", asked.Load())
	}
}

// breaking ends a connection after some bytes.
type breaking struct {
	http.ResponseWriter
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if len(p) > b.left {
		b.ResponseWriter.Write(p[:b.left])
		panic(http.ErrAbortHandler)
	}
	b.left -= len(p)
	return b.ResponseWriter.Write(p)
}

// appending appends a byte to an answer.
type appending struct{ http.ResponseWriter }

func (a *appending) WriteHeader(status int) {
	size, _ := strconv.Atoi(a.Header().Get("Content-Length"))
	a.Header().Set("Content-Length", fmt.Sprint(size+1))
	a.ResponseWriter.WriteHeader(status)
	a.ResponseWriter.Write([]byte{'x'})
}

// TestOnlyAllowedRegistriesAreAsked has callers name registries.
func TestOnlyAllowedRegistriesAreAsked(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	f := newFaulty(t, n.registry)
	manifest := func(registry string) reply {
		t.Helper()
		return n.get(manifestPath("app", "enc") + "?ns=" + url.QueryEscape(registry))
	}
	start := func(upstream string, args ...string) {
		t.Helper()
		if n.pilot != nil {
			n.pilot.Stop(t)
		}
		n.startWith(upstream, append([]string{"--mirror-secret-file", n.dir + "/secret"}, args...)...)
		n.secret = strings.TrimSpace(harness.Read(t, n.dir+"/secret"))
	}
	start("")
	layout, _ := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	// What only this machine reaches, whether something listens there or not.
	for _, registry := range []string{f.address, "127.0.0.1:1", "localhost:1", "[::1]:1", "0.0.0.0:1", "169.254.169.254", "169.254.169.254:80"} {
		manifest(registry).expect(t, "by default "+registry, http.StatusForbidden, "DENIED", "mirror-allowed-upstreams")
	}
	if asked := f.requests(""); len(asked) > 0 {
		t.Errorf("it was asked: %q", asked)
	}
	start("", "--mirror-allowed-upstreams", "*.example.com,"+f.address)
	manifest(f.address).expect(t, "allowed", http.StatusOK)
	for _, registry := range []string{n.registry, "docker.io", "example.com", "x.example.com.test"} {
		manifest(registry).expect(t, "not allowed: "+registry, http.StatusForbidden, "DENIED", "is not one of mirror-allowed-upstreams")
	}
	start(n.registry, "--mirror-allowed-upstreams", "*.example.com")
	n.get(manifestPath("app", "enc")).expect(t, "mirror-upstream", http.StatusOK)
	manifest(n.registry).expect(t, "mirror-upstream by its name", http.StatusOK)
	manifest(f.address).expect(t, "another one", http.StatusForbidden, "DENIED")
}

// TestProxyOnLoopbackIsNoRegistry has the mirror reach a registry through an HTTP proxy on
// this machine, which is not for callers to name.
func TestProxyOnLoopbackIsNoRegistry(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	layout, plain := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	n.pilot.Stop(t)
	f := newFaulty(t, n.registry)
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		switch r.Host {
		case "registry.test":
			forward.ServeHTTP(w, r)
		case "leads.test":
			http.Redirect(w, r, "http://169.254.169.254/latest/", http.StatusTemporaryRedirect)
		default:
			t.Errorf("the proxy was asked for %s", r.URL)
		}
	})
	for _, registry := range []string{"registry.test", "leads.test"} {
		harness.Write(t, n.dir+"/upstream/"+registry+"/hosts.toml", "server = 'http://"+registry+"'\n")
	}
	n.env = []string{"HTTP_PROXY=http://" + f.address, "NO_PROXY="}
	n.startWith("", "--mirror-secret-file", n.dir+"/secret", "--mirror-hosts-dir", n.dir+"/upstream")
	if r := n.get(manifestPath("registry.test/app", "enc")); digestOf(r.body) != plain {
		t.Errorf("through the proxy: %d %s", r.status, r.body)
	}
	n.get(manifestPath("leads.test/app", "enc")).expect(t, "redirected to metadata", http.StatusForbidden, "DENIED")
	n.get(manifestPath("app", "enc")+"?ns="+f.address).expect(t, "the proxy as a registry", http.StatusForbidden, "DENIED")
}

// TestTagThatMovesDoesNotMixImages moves a tag after its manifest was read.
func TestTagThatMovesDoesNotMixImages(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	var layouts, digests, lasts []string
	for i := range 2 {
		layout, digest := n.image(fmt.Sprintf("plain%d", i), func(l *harness.Layout) harness.Object {
			return l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret())
		})
		layouts, digests = append(layouts, layout), append(digests, digest)
		lasts = append(lasts, layers(t, harness.Read(t, file(layout, digest)))[1])
	}
	for range 2 {
		for i := range 2 {
			n.encrypt(layouts[i], "app:enc", "--force")
			for _, method := range []string{http.MethodHead, http.MethodGet} {
				if r := n.request(method, manifestPath("app", "enc"), nil); r.header.Get("Docker-Content-Digest") != digests[i] {
					t.Errorf("%s: %s, want %s", method, r.header.Get("Docker-Content-Digest"), digests[i])
				}
			}
			// The other image was read before: what is named by digest is still there.
			for j := range 2 {
				if i == 0 && j == 1 {
					continue // not pushed yet in the first round
				}
				r := n.get(blobPath("app", lasts[j]))
				if digestOf(r.body) != lasts[j] {
					t.Errorf("layer of image %d: %d %s", j, r.status, r.body)
				}
				if r := n.get(manifestPath("app", digests[j])); digestOf(r.body) != digests[j] {
					t.Errorf("image %d: %d %s", j, r.status, r.body)
				}
			}
		}
	}
}
