package encrypt

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// refuse answers requests of a method, whose paths hold a text, with a status and a body.
func refuse(method, path string, status int, body string) func(http.Handler) http.HandlerFunc {
	return func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == method && strings.Contains(r.URL.Path, path) {
				_, _ = io.Copy(io.Discard, r.Body)
				w.WriteHeader(status)
				io.WriteString(w, body)
				return
			}
			h.ServeHTTP(w, r)
		}
	}
}

// lie changes the answers to requests of a method, whose paths hold a text.
func lie(method, path string, change func(header http.Header, body []byte) []byte) func(http.Handler) http.HandlerFunc {
	return func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method != method || !strings.Contains(r.URL.Path, path) {
				h.ServeHTTP(w, r)
				return
			}
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, r)
			body := change(answer.Header(), answer.Body.Bytes())
			for name, values := range answer.Header() {
				w.Header()[name] = values
			}
			w.WriteHeader(answer.Code)
			w.Write(body)
		}
	}
}

// someTimes does something else with each nth request of a method.
func someTimes(method string, n int64, bad http.HandlerFunc) func(http.Handler) http.HandlerFunc {
	var count atomic.Int64
	return func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == method && count.Add(1)%n == 0 {
				bad(w, r)
				return
			}
			h.ServeHTTP(w, r)
		}
	}
}

// TestBadRegistries has each registry lie, refuse and break off. What is written is whole,
// or there is an error and no tag.
func TestBadRegistries(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a", "team-b")
	unevenImage(t, dir+"/plain")
	registry, _ := harness.StartRegistry(t, dir)
	distribution, _ := harness.StartDistribution(t, dir)
	other := "sha256:" + strings.Repeat("0", 64)
	breakOff := func(w http.ResponseWriter, r *http.Request) {
		io.CopyN(io.Discard, r.Body, 100_000)
		panic(http.ErrAbortHandler)
	}
	setHeader := func(name, value string) func(http.Header, []byte) []byte {
		return func(h http.Header, b []byte) []byte {
			h.Set(name, value)
			return b
		}
	}
	withoutChunks := func(status int) func(http.Handler) http.HandlerFunc {
		return func(h http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Content-Range") != "" {
					refuse("PATCH", "/uploads/", status, "no chunks")(h)(w, r)
					return
				}
				h.ServeHTTP(w, r)
			}
		}
	}
	knowsBlobsLate := func(h http.Handler) http.HandlerFunc {
		var pushes atomic.Int32
		refusing := refuse("PUT", "/manifests/", http.StatusBadRequest, `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown"}]}`)(h)
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && pushes.Add(1) <= 2 {
				refusing(w, r)
				return
			}
			h.ServeHTTP(w, r)
		}
	}
	flip := func(h http.Header, b []byte) []byte {
		b = bytes.Clone(b)
		if len(b) > 0 {
			b[len(b)/2] ^= 1
		}
		return b
	}
	shorten := func(h http.Header, b []byte) []byte {
		b = b[:len(b)/2]
		h.Set("Content-Length", strconv.Itoa(len(b)))
		return b
	}

	writing := map[string]struct {
		wrap func(http.Handler) http.HandlerFunc
		want string // of the error, or empty if it works
	}{
		"chunks are refused, 416":              {withoutChunks(http.StatusRequestedRangeNotSatisfiable), ""},
		"chunks are refused, 405":              {withoutChunks(http.StatusMethodNotAllowed), ""},
		"chunks are refused, 413":              {withoutChunks(http.StatusRequestEntityTooLarge), ""},
		"it is busy now and then":              {someTimes("PUT", 2, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }), ""},
		"it limits the rate":                   {someTimes("POST", 2, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }), ""},
		"it breaks off chunks":                 {someTimes("PATCH", 2, breakOff), ""},
		"it breaks off ends of uploads":        {someTimes("PUT", 2, breakOff), ""},
		"it knows blobs a moment late":         {knowsBlobsLate, ""},
		"it answers slowly":                    {someTimes("POST", 1, nil), ""},
		"blobs are kept as something else":     {lie("PUT", "/blobs/", setHeader("Docker-Content-Digest", other)), "keeps the blob"},
		"manifests are kept as something else": {lie("PUT", "/manifests/", setHeader("Docker-Content-Digest", other)), "keeps the manifest"},
		"it says nowhere where to upload":      {lie("POST", "/uploads/", setHeader("Location", "")), "does not say where to send the blob"},
		"it forgets uploads":                   {refuse("PUT", "/blobs/", http.StatusNotFound, ""), "finish the upload"},
		"manifests are refused":                {refuse("PUT", "/manifests/", http.StatusBadRequest, `{"errors":[{"code":"MANIFEST_INVALID","message":"media type"}]}`), "refuse media types that they do not know"},
		"uploads are forbidden":                {refuse("POST", "/uploads/", http.StatusForbidden, `{"errors":[{"code":"DENIED","message":"quota"}]}`), "403"},
	}
	answersSlowly := writing["it answers slowly"]
	answersSlowly.wrap = func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(300 * time.Millisecond)
			h.ServeHTTP(w, r)
		}
	}
	writing["it answers slowly"] = answersSlowly
	n := 0
	for kind, address := range map[string]string{"2.8": registry, "3": distribution} {
		for name, test := range writing {
			n++
			repository := fmt.Sprintf("bad%d", n)
			t.Run(kind+": "+name, func(t *testing.T) {
				t.Parallel()
				a := a
				a.t = t
				front := harness.FrontRegistry(t, address, test.wrap)
				cmd := a.images("encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+front+"/"+repository+":x")
				if test.want == "" {
					harness.Output(t, cmd)
					a.decrypts("docker://" + address + "/" + repository + ":x")
					return
				}
				harness.ExpectFailure(t, cmd, test.want)
				if strings.Contains(name, "manifests are kept") {
					return // it has it, and only says that it has not
				}
				harness.ExpectFailure(t, a.images("layerinfo", "docker://"+address+"/"+repository+":x"), "not found")
			})
		}
	}

	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/enc:x")
	for kind, address := range map[string]string{"2.8": registry, "3": distribution} {
		a.rewrap("oci:"+dir+"/enc:x", "docker://"+address+"/enc:x")
		for name, test := range map[string]struct {
			wrap func(http.Handler) http.HandlerFunc
			want string
		}{
			"blobs are changed":     {lie("GET", "/blobs/", flip), "the blob is not what its digest says"},
			"manifests are changed": {lie("GET", "/manifests/sha256:", flip), "the blob is not what its digest says"},
			"blobs are cut off":     {lie("GET", "/blobs/", shorten), ""},
			"manifests are cut off": {lie("GET", "/manifests/sha256:", shorten), ""},
			"blobs break off":       {lie("GET", "/blobs/", func(h http.Header, b []byte) []byte { return b[:len(b)/2] }), ""},
			"blobs are not there":   {refuse("GET", "/blobs/", http.StatusNotFound, ""), "not found"},
		} {
			t.Run(kind+": reading, "+name, func(t *testing.T) {
				t.Parallel()
				a := a
				a.t = t
				front := harness.FrontRegistry(t, address, test.wrap)
				for _, args := range [][]string{{"decrypt"}, {"rewrap", "--from", "team-a", "--to", "team-b"}} {
					to := "oci:" + dir + "/never-" + kind + "-" + name + ":x"
					harness.ExpectFailure(t, a.images(append(args, "docker://"+front+"/enc:x", to)...), test.want)
					if err := a.images("layerinfo", to).Run(); err == nil {
						t.Errorf("%s is there after %s", to, args)
					}
				}
			})
		}
		// A blob that it claims to have, with another size.
		t.Run(kind+": it has something else already", func(t *testing.T) {
			front := harness.FrontRegistry(t, address, lie("HEAD", "/blobs/", setHeader("Content-Length", "5")))
			harness.ExpectFailure(t, a.images("rewrap", "--from", "team-a", "--to", "team-b", "oci:"+dir+"/enc:x", "docker://"+front+"/enc:never"), "has 5 bytes of sha256:", "storage or the manifest is damaged")
		})
	}

	// A slow registry works, as long as something arrives.
	t.Run("it is slow", func(t *testing.T) {
		front := harness.FrontRegistry(t, registry, harness.Throttled(slowly))
		a.rewrap("docker://"+front+"/enc:x", "docker://"+front+"/slow:x")
		a.decrypts("docker://" + registry + "/slow:x")
	})
}

// TestDamagedLayoutsAreRepaired copies into a layout that has a blob of the right name and
// size, and another content.
func TestDamagedLayoutsAreRepaired(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a", "team-b")
	unevenImage(t, dir+"/plain")
	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/enc:x")
	digests, _ := a.layers("oci:" + dir + "/enc:x")
	a.rewrap("oci:"+dir+"/enc:x", "oci:"+dir+"/to:1")
	blob := dir + "/to/blobs/sha256/" + strings.TrimPrefix(digests[0], "sha256:")
	harness.Write(t, blob, strings.Replace(harness.Read(t, blob), harness.Read(t, blob)[1000:1008], "damaged!", 1))
	r := a.rewrap("--from", "team-a", "--to", "team-b", "oci:"+dir+"/enc:x", "oci:"+dir+"/to:2")[0]
	if r.Moved.Copied < largeLayer || r.Moved.Copied >= 2*largeLayer || r.Moved.Present < largeLayer {
		t.Errorf("%+v", r)
	}
	a.decrypts("oci:" + dir + "/to:2")
	a.decrypts("oci:" + dir + "/to:1")
}
