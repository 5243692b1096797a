package caller

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

// TestWithdrawnKeyStopsCounting has an issuer withdraw one of two keys, be away and come back.
func TestWithdrawnKeyStopsCounting(t *testing.T) {
	var served jose.JSONWebKeySet
	var tokens []string
	for _, id := range []string{"old", "new"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		served.Keys = append(served.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: id, Algorithm: "ES256", Use: "sig"})
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign([]byte("{}"))
		if err != nil {
			t.Fatal(err)
		}
		token, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	var mu sync.Mutex
	status, calls := http.StatusOK, 0
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		calls++
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(served)
	}))
	defer issuer.Close()
	transport := newIssuerTransport(http.DefaultTransport, issuer.URL)
	k := newFreshKeys(oidc.ClientContext(t.Context(), &http.Client{Transport: transport}), issuer.URL)
	check := func(when string, old, new bool, wantCalls int) {
		t.Helper()
		mu.Lock()
		before := calls
		mu.Unlock()
		for i, want := range []bool{old, new} {
			if _, err := k.VerifySignature(t.Context(), tokens[i]); (err == nil) != want {
				t.Errorf("%s: token %d: %v", when, i, err)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		if calls-before != wantCalls {
			t.Errorf("%s: fetched %d times, want %d", when, calls-before, wantCalls)
		}
	}
	// later lets that time pass, and what the issuer has answered.
	later := func(d time.Duration) {
		k.due = k.due.Add(-d)
		transport.mu.Lock()
		defer transport.mu.Unlock()
		clear(transport.recent)
	}
	check("first", true, true, 1)
	mu.Lock()
	served.Keys = served.Keys[1:]
	mu.Unlock()
	later(keysMaxAge / 2)
	check("withdrawn just now", true, true, 0)
	mu.Lock()
	status = http.StatusServiceUnavailable
	mu.Unlock()
	later(keysMaxAge / 2)
	check("away", true, true, 1)
	check("away, again", true, true, 0)
	mu.Lock()
	status = http.StatusOK
	mu.Unlock()
	later(keysTTL)
	check("back", false, true, 1)
	check("back, again", false, true, 0)
	later(keysMaxAge)
	check("much later", false, true, 1)
}
