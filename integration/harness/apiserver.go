package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// APIServer stands in for a cluster's API server: it has a DaemonSet, and issues
// tokens to its pods.
type APIServer struct {
	*httptest.Server
	key *ecdsa.PrivateKey
	Dir string // of the files that a pod gets

	mu                   sync.Mutex
	daemonSet, namespace Object // their metadata
}

func NewAPIServer(t testing.TB) *APIServer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &APIServer{key: key, Dir: TempDir(t), daemonSet: Object{"uid": "1"}, namespace: Object{"uid": "2"}}
	c.Server = httptest.NewTLSServer(c)
	t.Cleanup(c.Close)
	Write(t, c.Dir+"/account/ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})))
	Write(t, c.Dir+"/account/token", "api-token")
	Write(t, c.Dir+"/broker/token", c.Token(t))
	return c
}

func (c *APIServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var answer any
	object := func(metadata Object) {
		switch {
		case r.Header.Get("Authorization") != "Bearer api-token":
			w.WriteHeader(http.StatusUnauthorized)
			answer = map[string]any{"kind": "Status", "reason": "Unauthorized"}
		case metadata == nil:
			w.WriteHeader(http.StatusNotFound)
			answer = map[string]any{"kind": "Status", "reason": "NotFound"}
		default:
			answer = map[string]any{"metadata": metadata}
		}
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration": // the keys are at another address, as with kubeadm
		answer = map[string]any{"issuer": c.URL, "jwks_uri": "https://192.0.2.1:6443/openid/v1/jwks", "id_token_signing_alg_values_supported": []string{"ES256"}}
	case "/openid/v1/jwks":
		answer = jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}}
	case "/apis/apps/v1/namespaces/pilot-system/daemonsets/pilot":
		object(c.daemonSet)
	case "/api/v1/namespaces/pilot-system":
		object(c.namespace)
	default:
		http.NotFound(w, r)
		return
	}
	json.NewEncoder(w).Encode(answer)
}

// Token returns a new token of pilot's service account on the node worker-7.
func (c *APIServer) Token(t testing.TB) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: c.key, KeyID: "1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: c.URL, Subject: "system:serviceaccount:pilot-system:pilot", Audience: jwt.Audience{"copilot"},
		Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour)), ID: strconv.FormatInt(time.Now().UnixNano(), 10),
	}).Claims(map[string]any{"kubernetes.io": Object{"namespace": "pilot-system", "node": Object{"name": "worker-7", "uid": "3"}}}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// Set changes what the cluster has.
func (c *APIServer) Set(daemonSet, namespace Object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.daemonSet, c.namespace = daemonSet, namespace
}
