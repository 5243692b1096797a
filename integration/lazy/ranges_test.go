package lazy

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// fetched has an image big:1 of one layer in containerd, and returns the path of the layer
// for the snapshotter, and the plain layer.
func (m *machine) fetched() (path, digest, plain string) {
	m.t.Helper()
	m.encrypt("big:1", layer{"big": random(1, 3*mib)})
	m.pull("big:1")
	l := layersOf(m.manifest("big:1"))[0]
	digest = l["digest"].(string)
	path = m.lazyPath("big", digest)
	all := m.ask(http.MethodGet, path, "0-")
	if all.status != http.StatusPartialContent || all.err != nil || len(all.body) != int(l["size"].(float64)) {
		m.t.Fatalf("all of the layer: %d %v, %d bytes of %v", all.status, all.err, len(all.body), l["size"])
	}
	z, err := gzip.NewReader(strings.NewReader(all.body))
	if err != nil {
		m.t.Fatal(err)
	}
	if b, err := io.ReadAll(z); err != nil || !bytes.Contains(b, random(1, 3*mib)) {
		m.t.Fatalf("it is not the plain layer: %v", err)
	}
	return path, digest, all.body
}

// TestRangesAreThoseOfThePlainLayer requests ranges as snapshotters and others may.
func TestRangesAreThoseOfThePlainLayer(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	path, digest, plain := m.fetched()
	size := len(plain)

	for _, r := range [][2]int{{0, 1}, {0, 0}, {1, 1}, {15, 16}, {16, 16}, {17, 4099}, {49999, 100000}, {mib, 2*mib + 3}, {size - 51, size - 1}, {size - 1, size - 1}, {size - 200000, size - 100}, {0, size - 1}, {5, size + 100}, {size - 1, 1 << 60}} {
		got := m.ask(http.MethodGet, path, fmt.Sprintf("%d-%d", r[0], r[1]))
		last := min(r[1], size-1)
		if got.status != http.StatusPartialContent || got.err != nil || got.body != plain[r[0]:last+1] {
			t.Errorf("%v: %d %v, %d bytes", r, got.status, got.err, len(got.body))
		}
		if want := fmt.Sprintf("bytes %d-%d/%d", r[0], last, size); got.header.Get("Content-Range") != want || got.header.Get("Content-Length") != strconv.Itoa(len(got.body)) {
			t.Errorf("%v: %v", r, got.header)
		}
	}
	for text, want := range map[string]string{fmt.Sprintf("%d-", size-100): plain[size-100:], "-100": plain[size-100:], "-99999999": plain} {
		if got := m.ask(http.MethodGet, path, text); got.status != http.StatusPartialContent || got.body != want {
			t.Errorf("%s: %d, %d bytes", text, got.status, len(got.body))
		}
	}
	if got := m.ask(http.MethodHead, path, ""); got.status != http.StatusOK || got.header.Get("Content-Length") != strconv.Itoa(size) || got.header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("HEAD: %d %v", got.status, got.header)
	}

	for text, status := range map[string]int{
		fmt.Sprintf("%d-%d", size, size+10): http.StatusRequestedRangeNotSatisfiable, "-0": http.StatusRequestedRangeNotSatisfiable,
		"0-1,5-6": http.StatusBadRequest, "5-1": http.StatusBadRequest, "x-1": http.StatusBadRequest, "-": http.StatusBadRequest,
		"": http.StatusBadRequest, "99999999999999999999-": http.StatusBadRequest,
	} {
		got := m.ask(http.MethodGet, path, text)
		if got.status != status || !strings.Contains(got.body, `"errors"`) {
			t.Errorf("%q: %d %.300s, not %d", text, got.status, got.body, status)
		}
		if status == http.StatusRequestedRangeNotSatisfiable && got.header.Get("Content-Range") != fmt.Sprintf("bytes */%d", size) {
			t.Errorf("%q: %v", text, got.header)
		}
	}
	for what, r := range map[string]struct {
		method, path string
		status       int
	}{
		"a push":             {http.MethodPut, path, http.StatusMethodNotAllowed},
		"a manifest":         {http.MethodGet, "/lazy/v2/big/manifests/1?ns=" + m.front.address, http.StatusNotFound},
		"no name":            {http.MethodGet, "/lazy/v2/", http.StatusNotFound},
		"the mirror's paths": {http.MethodGet, "/v2/big/blobs/" + digest + "?ns=" + m.front.address, http.StatusNotFound},
		"an unknown layer":   {http.MethodGet, m.lazyPath("big", "sha256:"+strings.Repeat("0", 64)), http.StatusNotFound},
		"the plain digest":   {http.MethodGet, m.lazyPath("big", "sha256:"+harness.SHA256(plain)), http.StatusNotFound},
		"no digest":          {http.MethodGet, m.lazyPath("big", "latest"), http.StatusBadRequest},
		"another repository": {http.MethodGet, m.lazyPath("other", digest), http.StatusPartialContent}, // of memory
	} {
		if got := m.ask(r.method, r.path, "0-1"); got.status != r.status {
			t.Errorf("%s: %d %.300s, not %d", what, got.status, got.body, r.status)
		}
	}
	// An image has it in its own.
	if got := m.ask(http.MethodGet, m.lazyPath("other", digest), "1000000-1000001"); got.status != http.StatusPartialContent || got.body != plain[1000000:1000002] {
		t.Errorf("the middle of a layer in another repository: %d %q", got.status, got.body)
	}

	// Only root can connect to the socket, and the mirror has no such paths.
	if info, err := os.Stat(m.LazySocket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v %v", info.Mode(), err)
	}
	part := http.Header{"Pilot-Secret": {m.Secret}, "Range": {"bytes=100-199"}}
	if got := m.askMirror(path, part); got.status != http.StatusNotFound || !strings.Contains(got.body, "below /v2/NAME/") {
		t.Errorf("the mirror: %d %.300s", got.status, got.body)
	}
	// Who resumes a download of the encrypted layer gets no plain bytes.
	got := m.askMirror("/v2/big/blobs/"+digest+"?ns="+m.front.address, part)
	if strings.Contains(got.body, plain[100:200]) || "sha256:"+harness.SHA256(got.body) != digest {
		t.Errorf("the encrypted layer: %d, %d bytes", got.status, len(got.body))
	}
}

// TestUpstreamThatLiesGivesNoOtherBytes has the registry answer requests for ranges in all
// the wrong ways.
func TestUpstreamThatLiesGivesNoOtherBytes(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	path, digest, plain := m.fetched()
	blob := m.blob(digest)
	isBlob := func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
	}
	answer := func(f func(w http.ResponseWriter, first, last int)) {
		m.front.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			var first, last int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || !isBlob(r) {
				forward.ServeHTTP(w, r)
				return
			}
			f(w, first, last)
		})
	}
	send := func(w http.ResponseWriter, status int, contentRange string, b []byte) {
		if contentRange != "" {
			w.Header().Set("Content-Range", contentRange)
		}
		w.WriteHeader(status)
		w.Write(b)
	}
	contentRange := func(first, last int) string { return fmt.Sprintf("bytes %d-%d/%d", first, last, len(blob)) }
	const first, last = 100000, 165535
	for what, f := range map[string]func(w http.ResponseWriter, a, b int){
		"200 with all of it": func(w http.ResponseWriter, a, b int) { send(w, 200, "", blob) },
		"200 with the range": func(w http.ResponseWriter, a, b int) { send(w, 200, "", blob[a:b+1]) },
		"no Content-Range":   func(w http.ResponseWriter, a, b int) { send(w, 206, "", blob[a:b+1]) },
		"another place":      func(w http.ResponseWriter, a, b int) { send(w, 206, contentRange(a+1, b+1), blob[a+1:b+2]) },
		"a shorter range":    func(w http.ResponseWriter, a, b int) { send(w, 206, contentRange(a, b-1), blob[a:b]) },
		"a longer range":     func(w http.ResponseWriter, a, b int) { send(w, 206, contentRange(a, b+1), blob[a:b+2]) },
		"another size": func(w http.ResponseWriter, a, b int) {
			send(w, 206, fmt.Sprintf("bytes %d-%d/%d", a, b, len(blob)+1), blob[a:b+1])
		},
		"a short body":  func(w http.ResponseWriter, a, b int) { send(w, 206, contentRange(a, b), blob[a:b-10]) },
		"an empty body": func(w http.ResponseWriter, a, b int) { send(w, 206, contentRange(a, b), nil) },
		"several parts": func(w http.ResponseWriter, a, b int) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			send(w, 206, "", blob[a:b+1])
		},
		"compressed": func(w http.ResponseWriter, a, b int) {
			w.Header().Set("Content-Encoding", "gzip")
			send(w, 206, contentRange(a, b), blob[a:b+1])
		},
		"204":           func(w http.ResponseWriter, a, b int) { send(w, 204, contentRange(a, b), nil) },
		"404":           func(w http.ResponseWriter, a, b int) { send(w, 404, "", nil) },
		"403":           func(w http.ResponseWriter, a, b int) { send(w, 403, "", nil) },
		"416":           func(w http.ResponseWriter, a, b int) { send(w, 416, "", nil) },
		"500 each time": func(w http.ResponseWriter, a, b int) { send(w, 500, "", nil) },
		"a redirect to nowhere": func(w http.ResponseWriter, a, b int) {
			w.Header().Set("Location", "http://127.0.0.1:1/x?token=secret-token")
			send(w, 307, "", nil)
		},
		"a redirect to itself": func(w http.ResponseWriter, a, b int) {
			w.Header().Set("Location", "/v2/big/blobs/"+digest)
			send(w, 307, "", nil)
		},
	} {
		answer(f)
		got := m.ask(http.MethodGet, path, fmt.Sprintf("%d-%d", first, last))
		if got.status == http.StatusPartialContent && got.err == nil || got.status == http.StatusOK {
			t.Errorf("%s: %d, %d bytes", what, got.status, len(got.body))
		}
		if got.status == http.StatusPartialContent && !strings.HasPrefix(plain[first:], got.body) {
			t.Errorf("%s: other bytes than the layer's", what)
		}
		if strings.Contains(got.body, "secret-token") {
			t.Errorf("%s: the answer has the query of the storage's URL: %s", what, got.body)
		}
	}
	m.front.set(nil)
	right := func(what string) {
		t.Helper()
		if got := m.ask(http.MethodGet, path, fmt.Sprintf("%d-%d", first, last)); got.status != http.StatusPartialContent || got.body != plain[first:last+1] {
			t.Errorf("%s: %d %v %.300s", what, got.status, got.err, got.body)
		}
	}
	right("the registry is itself again")

	// What is to be survived: some failures, redirects to storage that must not see the
	// credentials, and tokens that end.
	var failures atomic.Int32
	answer(func(w http.ResponseWriter, a, b int) {
		if failures.Add(1) < 3 {
			send(w, http.StatusServiceUnavailable, "", nil)
			return
		}
		send(w, 206, contentRange(a, b), blob[a:b+1])
	})
	right("two failures")
	failures.Store(0)
	answer(func(w http.ResponseWriter, a, b int) {
		if failures.Add(1) == 1 {
			w.Header().Set("Retry-After", "1")
			send(w, http.StatusTooManyRequests, "", nil)
			return
		}
		send(w, 206, contentRange(a, b), blob[a:b+1])
	})
	right("429")
	answer(func(w http.ResponseWriter, a, b int) {
		w.Header().Set("Retry-After", "60")
		send(w, http.StatusTooManyRequests, "", nil)
	})
	got := m.ask(http.MethodGet, path, fmt.Sprintf("%d-%d", first, last))
	if s, err := strconv.Atoi(got.header.Get("Retry-After")); got.status != http.StatusTooManyRequests || err != nil || s < 30 {
		t.Errorf("429 for a minute: %d, Retry-After %q", got.status, got.header.Get("Retry-After"))
	}
}

// TestStorageAndTokensOfTheRegistry has the registry redirect to its storage, and give
// tokens that end.
func TestStorageAndTokensOfTheRegistry(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	path, digest, plain := m.fetched()
	blob := m.blob(digest)
	var seen, tokens, used atomic.Int32
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Pilot-Secret") != "" {
			seen.Add(1)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
	}))
	t.Cleanup(storage.Close)
	m.front.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if r.URL.Path == "/token" {
			used.Store(0)
			fmt.Fprintf(w, `{"token":"t%d","expires_in":300}`, tokens.Add(1))
			return
		}
		if given := r.Header.Get("Authorization"); given != fmt.Sprintf("Bearer t%d", tokens.Load()) || used.Add(1) > 3 {
			challenge := `Bearer realm="http://` + r.Host + `/token",service="x",scope="repository:big:pull"`
			if given != "" {
				challenge += `,error="invalid_token"`
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, strings.Replace(storage.URL, "127.0.0.1", "localhost", 1)+"/blob?token=x", http.StatusTemporaryRedirect)
	})
	for i := range 10 {
		at := 100000 + i*7777
		if got := m.ask(http.MethodGet, path, fmt.Sprintf("%d-%d", at, at+7776)); got.status != http.StatusPartialContent || got.body != plain[at:at+7777] {
			t.Fatalf("range %d: %d %v %.300s", i, got.status, got.err, got.body)
		}
	}
	if tokens.Load() < 2 || seen.Load() > 0 {
		t.Errorf("%d tokens, and the storage has seen %d credentials", tokens.Load(), seen.Load())
	}
}

// TestSlowCallersKeepNobodyFromReading has more callers than there are streams that take a
// range and do not read it.
func TestSlowCallersKeepNobodyFromReading(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	m := newMachine(t)
	m.encrypt("large:1", layer{"large": random(1, 24*mib)})
	m.pull("large:1")
	path := m.lazyPath("large", layersOf(m.manifest("large:1"))[0]["digest"].(string))
	for range 100 {
		conn, err := net.Dial("unix", m.LazySocket())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nRange: bytes=100-23000000\r\n\r\n", path)
	}
	want := m.ask(http.MethodGet, path, "1000000-1065535")
	if want.status != http.StatusPartialContent || want.err != nil || len(want.body) != 65536 {
		t.Errorf("%d %v, %d bytes", want.status, want.err, len(want.body))
	}
}
