package broker

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/unixsocket"
)

// hostile is a proxy in front of a broker, which records all requests, and can answer
// them itself.
type hostile struct {
	mu       sync.Mutex
	requests []string // as they came
	answer   func(w http.ResponseWriter, r *http.Request, honest func() harness.Object)
}

// newHostile starts one on a unix socket, in front of the broker on another.
func newHostile(t testing.TB, socket, broker string) *hostile {
	t.Helper()
	h := &hostile{}
	l, err := unixsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "copilot"})
	proxy.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", broker)
	}}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		dump, err := httputil.DumpRequest(r, true)
		if err != nil {
			t.Error(err)
		}
		h.mu.Lock()
		h.requests = append(h.requests, string(dump))
		answer := h.answer
		h.mu.Unlock()
		r.Header.Del("Authorization") // the broker knows us by the socket
		if answer == nil {
			proxy.ServeHTTP(w, r)
			return
		}
		answer(w, r, func() harness.Object {
			rec := httptest.NewRecorder()
			proxy.ServeHTTP(rec, r)
			var o harness.Object
			if err := json.Unmarshal(rec.Body.Bytes(), &o); err != nil || rec.Code >= 500 {
				t.Errorf("the honest answer: %d %s: %v", rec.Code, rec.Body, err)
			}
			return o
		})
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return h
}

// set sets its answer, or has the broker answer.
func (h *hostile) set(answer func(http.ResponseWriter, *http.Request, func() harness.Object)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answer = answer
}

// TestHostileBrokerGetsAndChangesNothing has a broker lie to pilot about keys, and looks at all that pilot
// sends: no keys except the layer key that the broker is to wrap, nothing about other
// KEKs, and nothing to any other server.
func TestHostileBrokerGetsAndChangesNothing(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
	h := newHostile(t, dir+"/hostile.sock", dir+"/broker/copilot.sock")
	token := make([]byte, 24)
	rand.Read(token)
	tokenText := fmt.Sprintf("eyJhbGciOiJSUzI1NiJ9.%x.x", token)
	args := []string{"--broker-timeout", "4s", "--kek-cache-size", "0", "--diff-listen", "off", "--broker-token-file", harness.Write(t, dir+"/token", tokenText)}
	localPilot, _ := harness.StartPilot(t, dir+"/local", "unix://"+dir+"/hostile.sock", args...)
	harness.StartPilot(t, dir+"/remote", "unix://"+dir+"/hostile.sock", append(args, "--annotation-format", "copilot")...)
	local, remote := harness.NewPilotClient(t, dir+"/local"), harness.NewPilotClient(t, dir+"/remote")

	// Another server, to which the broker redirects pilot.
	elsewhere, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	var called sync.Map
	go http.Serve(elsewhere, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		dump, _ := httputil.DumpRequest(r, true)
		called.Store(string(dump), true)
	}))

	layerKey := make([]byte, 48)
	rand.Read(layerKey)
	wrap := func(k *harness.PilotClient) ([]byte, error) {
		return k.Call(t.Context(), ocicryptpb.NewKeyProviderServiceClient(k.Conn).WrapKey,
			harness.Object{"op": "keywrap", "keywrapparams": harness.Object{"ec": harness.Object{"Parameters": harness.Object{"pilot": []string{"dGVhbS1h"}}}, "optsdata": layerKey}},
			func(a harness.KeyProviderOutput) []byte { return a.Wrapped.Annotation })
	}
	unwrap := func(k *harness.PilotClient, annotation []byte) error {
		b, err := k.Call(t.Context(), ocicryptpb.NewKeyProviderServiceClient(k.Conn).UnWrapKey,
			harness.Object{"op": "keyunwrap", "keyunwrapparams": harness.Object{"dc": harness.Object{}, "annotation": annotation}},
			func(a harness.KeyProviderOutput) []byte { return a.Unwrapped.OptsData })
		if err == nil && !bytes.Equal(b, layerKey) {
			err = fmt.Errorf("unwrapped to something else")
		}
		return err
	}
	// honestly has both pilots wrap and unwrap, and returns what the first wrote.
	honestly := func() []byte {
		t.Helper()
		h.set(nil)
		var all [2][]byte
		for i, k := range []*harness.PilotClient{local, remote} {
			harness.Await(t, "an honest broker", func() (err error) {
				if all[i], err = wrap(k); err != nil {
					return err
				}
				return unwrap(k, all[i])
			})
		}
		return all[0]
	}
	annotation := honestly()
	// What only the broker can unwrap.
	opaque := []byte(`{"method":"copilot","kekId":"team-a","kekVersion":1,"wrappedKey":"AAAA"}`)

	keyB := sha256.Sum256([]byte("team-b"))
	random := make([]byte, 32)
	rand.Read(random)
	changed := func(with harness.Object) func(http.ResponseWriter, *http.Request, func() harness.Object) {
		return func(w http.ResponseWriter, _ *http.Request, honest func() harness.Object) {
			o := honest()
			for k, v := range with {
				o[k] = v
			}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(o)
		}
	}
	for name, test := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request, func() harness.Object)
		do     func() error
		want   string
	}{
		"another KEK's key":      {changed(harness.Object{"key": keyB[:]}), func() error { return unwrap(local, annotation) }, "does not unwrap this layer key"},
		"another KEK":            {changed(harness.Object{"key": keyB[:], "id": "team-b"}), func() error { return unwrap(local, annotation) }, `it answered with KEK "team-b"`},
		"another version":        {changed(harness.Object{"version": 2}), func() error { return unwrap(local, annotation) }, "version 2, and was asked for version 1"},
		"a key of its own":       {changed(harness.Object{"key": random}), func() error { return unwrap(local, annotation) }, "does not unwrap this layer key"},
		"a short key":            {changed(harness.Object{"key": random[:16]}), func() error { return unwrap(local, annotation) }, "has 16 bytes"},
		"no key":                 {changed(harness.Object{"key": nil}), func() error { return unwrap(local, annotation) }, "not an AES key: 0 bytes"},
		"a huge key":             {changed(harness.Object{"key": make([]byte, 1<<20)}), func() error { return unwrap(local, annotation) }, "more than 131072 bytes"},
		"wraps with another KEK": {changed(harness.Object{"id": "team-b"}), func() error { _, err := wrap(local); return err }, `it answered with KEK "team-b"`},
		"wraps as version -1":    {changed(harness.Object{"version": -1}), func() error { _, err := wrap(local); return err }, "version -1"},
		"wraps with a short key": {changed(harness.Object{"key": random[:16]}), func() error { _, err := wrap(local); return err }, "has 16 bytes"},

		"wraps by the original's method": {changed(harness.Object{"method": "AES-GCM"}), func() error { _, err := wrap(remote); return err }, "does not name a KEK"},
		"wraps by no method":             {changed(harness.Object{"method": ""}), func() error { _, err := wrap(remote); return err }, "no method"},
		"wraps by a method of its own":   {changed(harness.Object{"method": "none"}), func() error { _, err := wrap(remote); return err }, "not known to this version"},
		"wraps in version 0":             {changed(harness.Object{"version": 0}), func() error { _, err := wrap(remote); return err }, "without a wrapped key"},
		"wraps to nothing":               {changed(harness.Object{"wrappedKey": ""}), func() error { _, err := wrap(remote); return err }, "without a wrapped key"},
		"wraps to too much":              {changed(harness.Object{"wrappedKey": make([]byte, 200<<10)}), func() error { _, err := wrap(remote); return err }, "more than"},
		"wraps with a wrong IV":          {changed(harness.Object{"method": "A256GCMKW", "iv": random}), func() error { _, err := wrap(remote); return err }, "IV of 32 bytes"},
		"unwraps to nothing":             {changed(harness.Object{"plaintext": ""}), func() error { return unwrap(remote, opaque) }, "KEK \"team-a\""},
		"takes its time": {func(_ http.ResponseWriter, r *http.Request, _ func() harness.Object) { <-r.Context().Done() },
			func() error { return unwrap(local, annotation) }, "no response within"},
		"sends elsewhere": {func(w http.ResponseWriter, _ *http.Request, _ func() harness.Object) {
			w.Header().Set("Location", "http://"+elsewhere.Addr().String()+"/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}, func() error { _, err := wrap(remote); return err }, "307"},
		"wants a password": {func(w http.ResponseWriter, _ *http.Request, _ func() harness.Object) {
			w.Header().Set("WWW-Authenticate", `Basic realm="`+elsewhere.Addr().String()+`"`)
			w.WriteHeader(http.StatusUnauthorized)
		}, func() error { return unwrap(local, annotation) }, "401"},
		"names another place": {func(w http.ResponseWriter, _ *http.Request, honest func() harness.Object) {
			w.Header().Set("Alt-Svc", `h2="`+elsewhere.Addr().String()+`"`)
			w.Header().Set("Link", "<http://"+elsewhere.Addr().String()+">; rel=preload")
			changed(harness.Object{"version": 7})(w, nil, honest)
		}, func() error { return unwrap(local, annotation) }, "version 7"},
	} {
		t.Run(name, func(t *testing.T) {
			h.set(test.answer)
			// Or pilot still uses the broker's previous answer for a moment.
			localPilot.Cmd.Process.Signal(syscall.SIGHUP)
			harness.Await(t, fmt.Sprintf("want %q", test.want), func() error {
				began := time.Now()
				err := test.do()
				if took := time.Since(began); took > harness.Timeout/4 {
					t.Errorf("it took %s", took)
				}
				if err == nil || strings.ContainsAny(err.Error(), "\n\x00") {
					t.Fatalf("%q", err)
				}
				if !strings.Contains(err.Error(), test.want) {
					return err
				}
				return nil
			})
		})
	}
	honestly() // pilot is as well as before

	called.Range(func(request, _ any) bool {
		t.Errorf("pilot has sent somebody else:\n%s", request)
		return true
	})
	keyA := sha256.Sum256([]byte("team-a"))
	var all secrets
	all.add("KEK", keyA[:])
	all.add("another KEK", keyB[:])
	all.add("layer key", layerKey)
	h.mu.Lock()
	defer h.mu.Unlock()
	toWrap := 0
	for _, request := range h.requests {
		line, _, _ := strings.Cut(request, "\r\n")
		found := all.in([]byte(request))
		switch {
		case strings.HasPrefix(line, "POST /api/v2/keks/team-a/wrap HTTP"):
			toWrap++
			if len(found) == 0 || !strings.HasPrefix(found[0], "layer key") || strings.Contains(strings.Join(found, " "), "KEK") {
				t.Errorf("%s: it has %q", line, found)
			}
		case len(found) > 0:
			t.Errorf("%s: it has %q", line, found)
		}
		if !strings.Contains(line, "/api/v2/keks/team-a/") {
			t.Errorf("pilot asks for %s", line)
		}
		if !strings.Contains(request, "Bearer "+tokenText) {
			t.Errorf("%s: without the token", line)
		}
	}
	if len(h.requests) < 20 || toWrap < 5 {
		t.Errorf("the broker got only %d requests, %d of them to wrap", len(h.requests), toWrap)
	}
}
