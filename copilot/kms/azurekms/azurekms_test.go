//go:build !no_azurekms

package azurekms_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	josecipher "github.com/go-jose/go-jose/v4/cipher"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/azurekms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
)

// keyVault is Azure Key Vault as its REST API is documented. It is not the real
// service.
type keyVault struct {
	keys   map[string][]string // names of versions, by name
	rsa    map[string]*rsa.PrivateKey
	aes    map[string][]byte
	asks   atomic.Int32 // requests without a token
	hangs  bool         // instead of answering
	status int          // and body of each answer, if not 0
	body   string
	tries  atomic.Int32 // requests that were answered with status
	then   bool         // hang, after one of them
	pause  string       // Retry-After
}

func newKeyVault(t *testing.T) *keyVault {
	t.Helper()
	v := &keyVault{keys: map[string][]string{}, rsa: map[string]*rsa.PrivateKey{}, aes: map[string][]byte{}}
	for _, name := range []string{"a", "b"} {
		v.rotate(t, name)
	}
	return v
}

func (v *keyVault) rotate(t *testing.T, name string) {
	t.Helper()
	version := make([]byte, 16)
	rand.Read(version)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("%x", version)
	v.keys[name] = append(v.keys[name], id)
	v.rsa[id], v.aes[id] = key, append(version, version...)
}

const vaultHost = "team.vault.azure.net"

func (v *keyVault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if v.hangs {
		io.Copy(io.Discard, r.Body) // or the server does not notice that the client is gone
		<-r.Context().Done()
		return
	}
	w.Header().Set("Content-Type", "application/json")
	refuse := func(status int, code, inner, message string) {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{"code": code, "message": message, "innererror": map[string]string{"code": inner}}})
	}
	if r.Header.Get("Authorization") != "Bearer a token for https://vault.azure.net/.default" {
		v.asks.Add(1)
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555", resource="https://vault.azure.net"`)
		refuse(401, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token.")
		return
	}
	if v.status != 0 {
		if v.tries.Add(1) > 1 && v.then {
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		w.Header().Set("Retry-After", v.pause)
		w.WriteHeader(v.status)
		fmt.Fprint(w, v.body)
		return
	}
	var in struct{ Alg, Value string }
	path := strings.Split(r.URL.Path, "/") // "", keys, NAME, VERSION if not the current one, OPERATION
	if len(path) == 4 {
		path = slices.Insert(path, 3, "")
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || r.Method != "POST" || r.URL.Query().Get("api-version") == "" || len(path) != 5 || path[1] != "keys" {
		refuse(400, "BadParameter", "", "malformed")
		return
	}
	name, version := path[2], path[3]
	if versions := v.keys[name]; version == "" && len(versions) > 0 {
		version = versions[len(versions)-1]
	}
	if !slices.Contains(v.keys[name], version) {
		refuse(404, "KeyNotFound", "", "A key with (name/id) "+name+" was not found in this key vault.")
		return
	}
	value, err := base64.RawURLEncoding.DecodeString(in.Value)
	if err != nil {
		refuse(400, "BadParameter", "", "value")
		return
	}
	block, _ := aes.NewCipher(v.aes[version])
	var out []byte
	switch path[4] + " " + in.Alg {
	case "wrapkey RSA-OAEP-256":
		out, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, &v.rsa[version].PublicKey, value, nil)
	case "unwrapkey RSA-OAEP-256":
		out, err = rsa.DecryptOAEP(sha256.New(), nil, v.rsa[version], value, nil)
	case "wrapkey A256KW":
		out, err = josecipher.KeyWrap(block, value)
	case "unwrapkey A256KW":
		out, err = josecipher.KeyUnwrap(block, value)
	default:
		err = errors.New("no such operation")
	}
	if err != nil {
		refuse(400, "BadParameter", "", "The parameter is incorrect.")
		return
	}
	json.NewEncoder(w).Encode(map[string]string{"kid": "https://" + vaultHost + "/keys/" + name + "/" + version, "value": base64.RawURLEncoding.EncodeToString(out)})
}

// token is a credential.
type token struct{ err error }

func (c token) GetToken(_ context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "a token for " + o.Scopes[0], ExpiresOn: time.Now().Add(time.Hour)}, c.err
}

// openVault opens a vault that is at address.
func openVault(t *testing.T, server *httptest.Server, address, algorithm string, credential azcore.TokenCredential) kms.Wrapper {
	t.Helper()
	transport := server.Client().Transport.(*http.Transport).Clone()
	transport.TLSClientConfig.ServerName = "example.com" // of httptest's certificate
	transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	t.Cleanup(transport.CloseIdleConnections)
	b, err := azurekms.New("https://"+vaultHost, algorithm, credential, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// notFoundIsUnwrap is for a version that is none of the other key's, which Azure
// does not find.
type notFoundIsUnwrap struct{ kms.Wrapper }

func (w notFoundIsUnwrap) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	b, err := w.Wrapper.Unwrap(ctx, path, version, wrapped)
	if errors.Is(err, kms.ErrNotFound) {
		err = fmt.Errorf("%w: %w", kms.ErrUnwrap, err)
	}
	return b, err
}

func TestAzure(t *testing.T) {
	for _, algorithm := range []string{"", "A256KW"} {
		t.Run(algorithm, func(t *testing.T) {
			v := newKeyVault(t)
			server := httptest.NewTLSServer(v)
			t.Cleanup(server.Close)
			address := server.Listener.Addr().String()
			w := openVault(t, server, address, algorithm, token{})
			kmstest.CheckWrapper(t, notFoundIsUnwrap{w}, "a", "b")
			if n := v.asks.Load(); n != 1 {
				t.Errorf("asked %d times without a token", n)
			}

			_, wrapped, err := w.Wrap(t.Context(), "a", kmstest.Secret)
			if err != nil {
				t.Fatal(err)
			}
			// Somebody who says that it is a version of b.
			forged := bytes.Clone(wrapped)
			copy(forged[1:], v.keys["b"][0])
			if got, err := w.Unwrap(t.Context(), "b", 1, forged); !errors.Is(err, kms.ErrUnwrap) {
				t.Errorf("forged: %q, %v", got, err)
			}
			copy(forged[1:], "../../b/")
			if got, err := w.Unwrap(t.Context(), "a", 1, forged); !errors.Is(err, kms.ErrUnwrap) {
				t.Errorf("forged path: %q, %v", got, err)
			}
			v.rotate(t, "a")
			if got, err := w.Unwrap(t.Context(), "a", 1, wrapped); err != nil || !bytes.Equal(got, kmstest.Secret) {
				t.Errorf("unwrap after a rotation: %q, %v", got, err)
			}
			if _, after, err := w.Wrap(t.Context(), "a", kmstest.Secret); err != nil || string(after[1:33]) != v.keys["a"][1] {
				t.Errorf("wrap after a rotation: %v", err)
			}
			kmstest.Refuses(t, "missing", w, "missing", wrapped, kms.ErrNotFound)
			kmstest.Refuses(t, "no name of a key", w, "../secrets/x", wrapped, kms.ErrNotFound)
			v.status, v.body = 403, `{"error":{"code":"Forbidden","message":"Operation wrapKey is not allowed on a disabled key.","innererror":{"code":"KeyDisabled"}}}`
			kmstest.Refuses(t, "disabled", w, "a", wrapped, kms.ErrForbidden)
			if _, _, err := w.Wrap(t.Context(), "a", kmstest.Secret); err == nil || !strings.HasSuffix(err.Error(), "403: Forbidden: KeyDisabled: Operation wrapKey is not allowed on a disabled key.") {
				t.Errorf("disabled: %v", err)
			}
			v.status, v.body = 403, `{"error":{"code":"Forbidden","message":"Caller is not authorized","innererror":{"code":"ForbiddenByRbac"}}}`
			kmstest.Refuses(t, "forbidden", w, "a", wrapped, kms.ErrForbidden)
			v.status, v.body = 200, `{}`
			if _, _, err := w.Wrap(t.Context(), "a", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) {
				t.Errorf("an empty answer: %v", err)
			}
			v.status, v.body = 503, "<html>"
			kmstest.Unavailable(t, "overloaded", w, "a")
			v.status, v.hangs = 0, true
			kmstest.TimesOut(t, "hangs", w, "a")
			kmstest.Unavailable(t, "down", openVault(t, server, kmstest.ClosedPort(t), algorithm, token{}), "a")
			kmstest.Unavailable(t, "no credentials", openVault(t, server, kmstest.ClosedPort(t), algorithm, token{errors.New("no credentials")}), "a")
		})
	}
}

// TestAzureSaysWhy: what Azure answers is in the error, long before the deadline.
func TestAzureSaysWhy(t *testing.T) {
	v := newKeyVault(t)
	server := httptest.NewTLSServer(v)
	t.Cleanup(server.Close)
	w := openVault(t, server, server.Listener.Addr().String(), "", token{})
	_, wrapped, err := w.Wrap(t.Context(), "a", kmstest.Secret)
	if err != nil {
		t.Fatal(err)
	}
	const answer = "503: ServiceUnavailable: The service is overloaded"
	v.status, v.body = 503, `{"error":{"code":"ServiceUnavailable","message":"The service is overloaded"}}`
	check := func(timeout time.Duration, tries int32, do func(context.Context) error) {
		t.Helper()
		v.tries.Store(0)
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		start := time.Now()
		err := do(ctx)
		if !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), answer) || strings.Contains(err.Error(), "context") != v.then {
			t.Error(err)
		}
		if n, took := v.tries.Load(), time.Since(start); n != tries || took > time.Minute {
			t.Errorf("%d tries, not %d, in %v", n, tries, took)
		}
	}
	wrap := func(ctx context.Context) error { _, _, err := w.Wrap(ctx, "a", kmstest.Secret); return err }
	unwrap := func(ctx context.Context) error { _, err := w.Unwrap(ctx, "a", 1, wrapped); return err }
	check(10*time.Minute, 3, wrap)
	check(10*time.Minute, 3, unwrap)
	v.pause = "30" // seconds, which nobody waits for
	check(10*time.Minute, 1, wrap)
	v.pause, v.then = "", true
	check(5*time.Second, 2, unwrap)
}

func TestAzureSettings(t *testing.T) {
	for settings, want := range map[string]string{
		"": "give the URL of the vault",
		`vault-url = "http://team.vault.azure.net"`:                        "use https",
		"vault-url = 'https://team.vault.azure.net'\nalgorithm = 'RSA1_5'": "RSA1_5",
		`vault-url = "https://team.vault.azure.net"`:                       "",
	} {
		kmstest.Opens(t, azurekms.Types(), "azure-key-vault", settings, want)
	}
}
