package harness

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// RecordingRegistry is a registry whose requests are watched.
type RecordingRegistry struct {
	t       testing.TB
	Address string

	mu       sync.Mutex
	requests []string
	before   func(method, path string) // is called before a request is answered
}

func RecordRegistry(t testing.TB, registry string) *RecordingRegistry {
	t.Helper()
	w := &RecordingRegistry{t: t}
	forward := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
		// So that the lists of tags have several pages.
		r.Out.URL.RawQuery = strings.Replace(r.Out.URL.RawQuery, "n=1000", "n=2", 1)
	}}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.requests = append(w.requests, r.Method+" "+r.URL.Path)
		before := w.before
		w.mu.Unlock()
		if before != nil {
			before(r.Method, r.URL.Path)
		}
		forward.ServeHTTP(out, r)
	}))
	t.Cleanup(s.Close)
	w.Address = strings.TrimPrefix(s.URL, "http://")
	return w
}

// Record calls f and returns the requests that were made meanwhile.
func (w *RecordingRegistry) Record(before func(method, path string), f func()) []string {
	w.mu.Lock()
	w.requests, w.before = nil, before
	w.mu.Unlock()
	f()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.before = nil
	return w.requests
}

// Manifest sends a request for a manifest of a repository.
func (w *RecordingRegistry) Manifest(method, repository, ref, mediaType, body string) (content, gotType string) {
	w.t.Helper()
	req, err := http.NewRequest(method, "http://"+w.Address+"/v2/"+repository+"/manifests/"+ref, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	req.Header["Accept"] = []string{"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode > 299 {
		w.t.Fatalf("%s %s: %s %s %v", method, req.URL, resp.Status, b, err)
	}
	return string(b), resp.Header.Get("Content-Type")
}

// manifest is an index or a manifest.
type manifest struct {
	MediaType string
	Manifests []struct {
		Digest   string
		Platform struct{ Architecture string }
	}
	Layers []struct {
		Digest      string
		Annotations map[string]string
	}
}

// KEKs returns the digests of the layers of an image in the registry, and the KEKs
// and versions that they are wrapped for, by architecture.
func (w *RecordingRegistry) KEKs(repository, ref string) (digests []string, keks map[string]string) {
	w.t.Helper()
	keks = map[string]string{}
	var visit func(ref, architecture string)
	visit = func(ref, architecture string) {
		doc, _ := w.Manifest("GET", repository, ref, "", "")
		var m manifest
		if err := json.Unmarshal([]byte(doc), &m); err != nil {
			w.t.Fatal(err)
		}
		for _, child := range m.Manifests {
			visit(child.Digest, child.Platform.Architecture)
		}
		for _, l := range m.Layers {
			digests = append(digests, l.Digest)
			b, err := base64.StdEncoding.DecodeString(l.Annotations["org.opencontainers.image.enc.keys.provider.pilot"])
			if err != nil || len(b) == 0 {
				continue
			}
			var a struct {
				KEKID      string
				KEKVersion int
			}
			if err := json.Unmarshal(b, &a); err != nil {
				w.t.Fatal(err)
			}
			keks[architecture] = a.KEKID + "@" + string(rune('0'+a.KEKVersion))
		}
	}
	visit(ref, "")
	return digests, keks
}
