package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/verified"
	"github.com/ctrlplane/pilot/processor"
)

var zeroTime time.Time

func digestOf(text string) string { return digest.FromString(text).String() }

func TestVerdicts(t *testing.T) {
	errDown := errors.New("no broker answers")
	m := New(Config{Unavailable: func(err error) bool { return errors.Is(err, errDown) }})
	layer := ocispec.Descriptor{Digest: digest.FromString("x")}
	for _, c := range []struct {
		err    error
		status int
		result codes.Code
	}{
		{&layerError{layer: layer, key: true, err: errDown}, http.StatusServiceUnavailable, codes.Unavailable},
		{&layerError{layer: layer, key: true, err: context.DeadlineExceeded}, http.StatusServiceUnavailable, codes.Unavailable},
		{&layerError{layer: layer, key: true, err: processor.ErrNoKey}, http.StatusForbidden, codes.FailedPrecondition},
		{&layerError{layer: layer, key: true, err: errors.New("no JSON")}, http.StatusBadGateway, codes.InvalidArgument},
		{&layerError{layer: layer, err: processor.ErrTampered}, http.StatusBadGateway, codes.DataLoss},
		{fmt.Errorf("x: %w", verified.ErrDigest), http.StatusBadGateway, codes.DataLoss},
		{fmt.Errorf("x: %w", registry.ErrTooLarge), http.StatusBadGateway, codes.InvalidArgument},
		{fmt.Errorf("x: %w", errNoList), http.StatusBadGateway, codes.InvalidArgument},
		{&url.Error{Op: "Get", URL: "http://x", Err: fmt.Errorf("x: %w", errOutOfReach)}, http.StatusForbidden, codes.PermissionDenied},
		{errBusy, http.StatusServiceUnavailable, codes.ResourceExhausted},
		{errSlow, http.StatusServiceUnavailable, codes.ResourceExhausted},
		{fmt.Errorf("%w: broken pipe", errCaller), 499, codes.Canceled},
		{context.DeadlineExceeded, http.StatusGatewayTimeout, codes.Unavailable},
		{errors.New("connection refused"), http.StatusBadGateway, codes.Unavailable},
	} {
		if v := m.judge(c.err); v.status != c.status || v.result != c.result {
			t.Errorf("%v: %d %v, want %d %v", c.err, v.status, v.result, c.status, c.result)
		}
	}
}

func TestBlobsThatArePassedOn(t *testing.T) {
	for _, size := range []int{0, 1, processor.BufferSize, processor.BufferSize + 1, 3*processor.BufferSize + 5} {
		blob := bytes.Repeat([]byte{'x'}, size)
		desc := ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(size)}
		for name, c := range map[string]struct {
			body string
			want error
			sent int // at most
		}{
			"whole":     {string(blob), nil, size},
			"too short": {string(blob[:max(size-1, 0)]), io.ErrUnexpectedEOF, size - 1},
			"too long":  {string(blob) + "y", verified.ErrDigest, size},
			"another":   {strings.Repeat("y", size), verified.ErrDigest, 0},
		} {
			if size == 0 && name != "whole" || size > processor.BufferSize && name == "another" {
				continue // the same as whole; clients see
			}
			if size <= processor.BufferSize && name == "too long" {
				c.want = nil // all that was announced is right
			}
			var out bytes.Buffer
			err := passOn(&out, strings.NewReader(c.body), desc)
			if !errors.Is(err, c.want) || out.Len() > c.sent || c.want == nil && out.Len() != size {
				t.Errorf("%s, %d bytes: %v, %d sent", name, size, err, out.Len())
			}
		}
	}
}

func TestListsAreTheRegistrys(t *testing.T) {
	for _, c := range []struct {
		kind, doc string
		want      bool
	}{
		{"tags", `{"name":"app","tags":["1"]}`, true},
		{"tags", `{"name":"app","tags":null}`, true},
		{"tags", `{"AccessKeyId":"x","Token":"y"}`, false},
		{"tags", `["tags"]`, false},
		{"tags", `tags`, false},
		{"tags", ``, false},
		{"referrers", `{"schemaVersion":2,"manifests":[]}`, true},
		{"referrers", `{"tags":["1"]}`, false},
	} {
		if got := isList(c.kind, []byte(c.doc)); got != c.want {
			t.Errorf("%s %s: %v", c.kind, c.doc, got)
		}
	}
}

// TestManifestThatComesSlowlyIsGivenUp has a registry send a manifest byte by byte.
func TestManifestThatComesSlowlyIsGivenUp(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Content-Length", "10000")
		w.Header().Set("Docker-Content-Digest", digestOf("x"))
		for r.Method == http.MethodGet && r.Context().Err() == nil {
			fmt.Fprint(w, " ")
			w.(http.Flusher).Flush()
			time.Sleep(time.Millisecond)
		}
	}))
	defer s.Close()
	m := New(Config{Upstream: strings.TrimPrefix(s.URL, "http://"), Secret: strings.Repeat("x", minSecret), ManifestTimeout: 50 * time.Millisecond})
	for _, reference := range []string{"1", digestOf("x")} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/v2/app/manifests/"+reference, nil)
		r.Header.Set(SecretHeader, strings.Repeat("x", minSecret))
		m.ServeHTTP(deadlines{w}, r)
		if w.Code != http.StatusGatewayTimeout {
			t.Errorf("%s: %d %s", reference, w.Code, w.Body)
		}
	}
}

// deadlines is a recorder that takes deadlines, as connections do.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetWriteDeadline(time.Time) error { return nil }
func (deadlines) SetReadDeadline(time.Time) error  { return nil }

// TestPageHasAllLazyReasons looks for the reasons for a full pull in the page that explains
// them.
func TestPageHasAllLazyReasons(t *testing.T) {
	page, err := os.ReadFile("../docs/lazy.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, reason := range lazyReasons {
		if !strings.Contains(string(page), "\n| `"+reason+"` | ") {
			t.Errorf("it lacks %q", reason)
		}
	}
}
