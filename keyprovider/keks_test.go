package keyprovider

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// keeper is a broker that wraps and unwraps with KEKs, of which it gives out
// only some.
type keeper struct {
	*httptest.Server
	mu      sync.Mutex
	keys    map[string][]byte // "team-a@1"
	current map[string]int
	exports map[string]bool
	asked   map[string]int // by the last part of the path
}

func startKeeper(t *testing.T, ids ...string) *keeper {
	t.Helper()
	k := &keeper{keys: map[string][]byte{}, current: map[string]int{}, exports: map[string]bool{}, asked: map[string]int{}}
	for _, id := range ids {
		k.rotate(id)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v2/keks/{id}/key", k.key)
	mux.HandleFunc("POST /api/v2/keks/{id}/wrap", k.wrap)
	mux.HandleFunc("POST /api/v2/keks/{id}/unwrap", k.unwrap)
	k.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.asked[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]]++
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(k.Close)
	return k
}

func (k *keeper) rotate(id string) {
	k.current[id]++
	key := make([]byte, 32)
	rand.Read(key)
	k.keys[fmt.Sprintf("%s@%d", id, k.current[id])] = key
}

// count returns how often a path was asked for, and starts again.
func (k *keeper) count(verb string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := k.asked[verb]
	k.asked[verb] = 0
	return n
}

func problem(w http.ResponseWriter, code int, kind, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]any{"type": kind, "title": http.StatusText(code), "status": code, "detail": detail, "request": "0123456789abcdef"})
}

func reply(w http.ResponseWriter, answer any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

// find returns the cipher of a version, and says why there is none.
func (k *keeper) find(w http.ResponseWriter, id string, version int) (cipher.AEAD, []byte) {
	key := k.keys[fmt.Sprintf("%s@%d", id, version)]
	if key == nil {
		problem(w, http.StatusNotFound, "about:blank", "no such KEK")
		return nil, nil
	}
	block, _ := aes.NewCipher(key)
	aead, _ := cipher.NewGCMWithRandomNonce(block)
	return aead, key
}

func (k *keeper) key(w http.ResponseWriter, r *http.Request) {
	id, version := r.PathValue("id"), k.current[r.PathValue("id")]
	if v := r.URL.Query().Get("version"); v != "" {
		version, _ = strconv.Atoi(v)
	}
	_, key := k.find(w, id, version)
	if key == nil {
		return
	}
	if !k.exports[id] {
		problem(w, http.StatusConflict, "urn:pilot:problem:not-exported", "it stays in the HSM")
		return
	}
	reply(w, map[string]any{"id": id, "version": version, "key": key})
}

func (k *keeper) wrap(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Plaintext []byte `json:"plaintext"`
	}
	if decodeStrictly(r, &in) != nil || len(in.Plaintext) == 0 {
		problem(w, http.StatusBadRequest, "about:blank", "not the JSON that this path takes")
		return
	}
	id, version := r.PathValue("id"), k.current[r.PathValue("id")]
	aead, _ := k.find(w, id, version)
	if aead == nil {
		return
	}
	reply(w, map[string]any{"id": id, "version": version, "method": "copilot", "wrappedKey": aead.Seal(nil, nil, in.Plaintext, fmt.Appendf(nil, "%s@%d", id, version))})
}

func (k *keeper) unwrap(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Version    int    `json:"version"`
		Method     string `json:"method"`
		IV         []byte `json:"iv"`
		WrappedKey []byte `json:"wrappedKey"`
	}
	if decodeStrictly(r, &in) != nil || in.Method == "copilot" && in.IV != nil || in.Method != "copilot" && (in.Method != "A256GCMKW" || len(in.IV) != 12) || len(in.WrappedKey) < 12 {
		problem(w, http.StatusBadRequest, "about:blank", "not the JSON that this path takes")
		return
	}
	id := r.PathValue("id")
	aead, _ := k.find(w, id, in.Version)
	if aead == nil {
		return
	}
	sealed, data := slices.Concat(in.IV, in.WrappedKey), fmt.Sprintf(`{"kekId":%q,"kekVersion":%d,"method":"A256GCMKW"}`, id, in.Version)
	if in.Method == "copilot" {
		data = fmt.Sprintf("%s@%d", id, in.Version)
	}
	plaintext, err := aead.Open(nil, nil, sealed, []byte(data))
	if err != nil {
		problem(w, http.StatusBadRequest, "about:blank", "this KEK did not wrap that key, or it was changed")
		return
	}
	reply(w, map[string]any{"plaintext": plaintext})
}

func decodeStrictly(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	return d.Decode(v)
}

func parsed(t *testing.T, annotation []byte) []wireformat.Annotation {
	t.Helper()
	list, err := wireformat.ParseAnnotation(annotation)
	if err != nil {
		t.Fatalf("%s: %v", annotation, err)
	}
	return list
}

// TestNotExported wraps and unwraps many layer keys with a KEK that the broker
// does not give out, which it is asked for once in a while.
func TestNotExported(t *testing.T) {
	k := startKeeper(t, "team-a")
	p := newProvider(t, k.URL, Config{CacheSize: 10, CacheTTL: time.Minute})
	now := time.Now()
	p.keks.now = func() time.Time { return now }
	var annotations [][]byte
	for range 5 {
		annotation := wrapFor(t, p, "team-a")
		if a := parsed(t, annotation)[0]; a.Method != "copilot" || a.KEKID != "team-a" || a.KEKVersion != 1 || bytes.Contains(annotation, []byte(`"iv"`)) {
			t.Errorf("annotation %s", annotation)
		}
		annotations = append(annotations, annotation)
	}
	k.rotate("team-a")
	if a := parsed(t, wrapFor(t, p, "team-a"))[0]; a.KEKVersion != 2 {
		t.Errorf("wrapped with version %d", a.KEKVersion)
	}
	for _, annotation := range annotations {
		if err := unwraps(t, p, annotation); err != nil {
			t.Error(err)
		}
		if err := unwraps(t, p, annotation, "team-b"); !errors.Is(err, ErrWrongKEK) {
			t.Errorf("with another KEK named: %v", err)
		}
	}
	if n := k.count("key"); n != 1 {
		t.Errorf("the KEK was asked for %d times, want once", n)
	}
	if n := k.count("unwrap"); n != 5 {
		t.Errorf("%d layer keys were unwrapped, want 5", n)
	}

	now = now.Add(time.Minute)
	k.exports["team-a"] = true
	for range 3 {
		if a := parsed(t, wrapFor(t, p, "team-a"))[0]; a.Method != "A256GCMKW" {
			t.Errorf("it is given out now, and the method is %s", a.Method)
		}
	}
	if n := k.count("key"); n != 3 { // each time for the current version
		t.Errorf("the KEK was asked for %d times, want 3", n)
	}
}

// TestNotExportedHere unwraps, on a node that gets no KEK, what a CI machine
// wrapped that does. Nothing that it says can be changed.
func TestNotExportedHere(t *testing.T) {
	k := startKeeper(t, "team-a", "team-b")
	k.exports["team-a"] = true
	given := wrapFor(t, newProvider(t, k.URL, Config{}), "team-a")
	k.exports["team-a"] = false
	kept := wrapFor(t, newProvider(t, k.URL, Config{}), "team-a")
	k.rotate("team-a")
	node := newProvider(t, k.URL, Config{})
	for _, annotation := range [][]byte{given, kept} {
		for range 3 {
			if err := unwraps(t, node, annotation); err != nil {
				t.Error(err)
			}
		}
		for name, change := range map[string]func(*wireformat.Annotation){
			"KEK":         func(a *wireformat.Annotation) { a.KEKID = "team-b" },
			"version":     func(a *wireformat.Annotation) { a.KEKVersion = 2 },
			"wrapped key": func(a *wireformat.Annotation) { a.WrappedKey[20] ^= 1 },
			"cut":         func(a *wireformat.Annotation) { a.WrappedKey = a.WrappedKey[:len(a.WrappedKey)-1] },
			"method": func(a *wireformat.Annotation) {
				if a.Method == wireformat.MethodCopilot {
					a.Method, a.IV, a.WrappedKey = wireformat.MethodA256GCMKW, a.WrappedKey[:12], a.WrappedKey[12:]
				} else {
					a.Method, a.IV, a.WrappedKey = wireformat.MethodCopilot, nil, append(a.IV, a.WrappedKey...)
				}
			},
		} {
			a := parsed(t, annotation)[0]
			change(&a)
			b, err := json.Marshal(a)
			if err != nil {
				t.Fatal(err)
			}
			if err := unwraps(t, node, b); !errors.Is(err, ErrWrongKEK) || errors.Is(err, client.ErrUnavailable) || !strings.Contains(err.Error(), k.URL) {
				t.Errorf("with another %s: %v", name, err)
			}
		}
	}
	if n := k.count("key"); n == 0 || n > 5 {
		t.Errorf("the KEKs were asked for %d times", n)
	}
}

// TestFormatCopilot has the broker wrap although it would give the KEK out.
func TestFormatCopilot(t *testing.T) {
	k := startKeeper(t, "team-a", "team-b")
	k.exports["team-a"] = true
	p := newProvider(t, k.URL, Config{Format: FormatCopilot})
	annotation := wrapFor(t, p, "team-a", "team-b")
	if list := parsed(t, annotation); len(list) != 2 || list[0].Method != "copilot" || list[1].Method != "copilot" {
		t.Errorf("annotation %s", annotation)
	}
	if err := unwraps(t, newProvider(t, k.URL, Config{}), annotation); err != nil {
		t.Error(err)
	}
	if n := k.count("key"); n != 0 {
		t.Errorf("a KEK was asked for %d times", n)
	}
	if _, err := p.WrapKey(t.Context(), named("nobody"), []byte(secret)); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("no such KEK: %v", err)
	}
}

// TestNotExportedMixed wraps for a KEK that is given out and one that is not.
func TestNotExportedMixed(t *testing.T) {
	k := startKeeper(t, "team-a", "team-b")
	k.exports["team-b"] = true
	annotation := wrapFor(t, newProvider(t, k.URL, Config{}), "team-a", "team-b")
	if list := parsed(t, annotation); list[0].Method != "copilot" || list[1].Method != "A256GCMKW" {
		t.Errorf("annotation %s", annotation)
	}
	for _, id := range []string{"team-a", "team-b"} {
		if err := unwraps(t, newProvider(t, k.URL, Config{}), annotation, id); err != nil {
			t.Errorf("with %s: %v", id, err)
		}
	}
}

// TestOriginalNotExported checks that the original's format, which takes the
// KEK itself, says so.
func TestOriginalNotExported(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	k := startKeeper(t, "team-a", "team-b")
	k.exports["team-b"] = true
	conf := Config{Format: FormatOriginal, DefaultKEKs: []string{"team-a", "team-b"}}
	p := newProvider(t, k.URL, conf)
	if err := unwraps(t, p, wrapFor(t, p, "team-b")); err != nil {
		t.Errorf("with the second of the default KEKs: %v", err)
	}
	_, err := p.WrapKey(t.Context(), named("team-a"), []byte(secret))
	if !errors.Is(err, client.ErrNotExported) || !strings.Contains(err.Error(), "annotation-format original") {
		t.Errorf("got %v", err)
	}
	if n := k.count("wrap"); n != 0 {
		t.Error("the broker has wrapped")
	}
	c := serveGRPC(t, k.URL, time.Minute)
	original := wrapFor(t, p, "team-b")
	if _, err := c.UnWrapKey(t.Context(), message(unwrapRequest(t, original, "team-a"))); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("over gRPC: %v", err)
	}
}

// TestManyNotExported checks that what is remembered of KEKs that are not given
// out is bounded, and forgotten.
func TestManyNotExported(t *testing.T) {
	c := newCounted(0, 0, 10)
	c.expect(t, "a", 5, 1)
	c.err = fmt.Errorf("%w: 409", client.ErrNotExported)
	c.pass(errorTTL)
	for i := range int32(maxErrors + 10) {
		c.fail(t, fmt.Sprintf("kek-%d", i), 0, 2+i)
	}
	c.expect(t, "a", 5, maxErrors+11)
	last := fmt.Sprintf("kek-%d", maxErrors+9)
	c.pass(notExportedTTL - 1)
	c.fail(t, last, 7, maxErrors+11) // whatever the version
	if n := len(c.notExported); n > maxErrors {
		t.Errorf("%d are remembered", n)
	}
	c.pass(1)
	c.sweep()
	if n := len(c.notExported); n != 0 {
		t.Errorf("%d are still remembered", n)
	}
}

// TestNoLongerExported checks that a KEK which is not given out any more is
// not kept.
func TestNoLongerExported(t *testing.T) {
	c := newGraceful(0)
	c.expect(t, "a", 0, 1)
	c.expect(t, "a", 4, 2)
	c.err = fmt.Errorf("%w: 409", client.ErrNotExported)
	c.pass(10 * time.Second)
	c.fail(t, "a", 0, 3)
	if len(c.entries) != 0 {
		t.Error("a version is still in memory")
	}
}
