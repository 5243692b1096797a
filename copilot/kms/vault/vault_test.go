//go:build !no_vault

package vault_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/vault"
)

const vaultToken = "hvs.secret-token"

var vaultKey = bytes.Repeat([]byte{0x5a, 0xfe}, 16)

// openTOML opens a backend with settings as in the broker's configuration.
func openTOML(kind, settings string) (kms.Backend, error) {
	return vault.Types().Open(kind, func(v any) error {
		return toml.NewDecoder(strings.NewReader(settings)).DisallowUnknownFields().Decode(v)
	})
}

func mustOpen(t testing.TB, kind, settings string) kms.Backend {
	t.Helper()
	b, err := openTOML(kind, settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func writeFile(t testing.TB, name, content string) string {
	t.Helper()
	if err := errors.Join(os.WriteFile(name+".part", []byte(content), 0o600), os.Rename(name+".part", name)); err != nil {
		t.Fatal(err)
	}
	return name
}

// fakeVault is a server that answers with what Vault's documentation shows. It
// answers the renewal of tokens itself.
func fakeVault(t testing.TB, h http.HandlerFunc) (url, tokenFile string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/auth/token/renew-self" {
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, `{"errors":["lease is not renewable"]}`)
			return
		}
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL, writeFile(t, filepath.Join(t.TempDir(), "token"), vaultToken+"\n")
}

// openFake opens a backend of that server, with more settings.
func openFake(t testing.TB, kind, more string, h http.HandlerFunc) kms.Backend {
	t.Helper()
	url, tokenFile := fakeVault(t, h)
	return mustOpen(t, kind, fmt.Sprintf("address = %q\ntoken-file = %q\n%s", url, tokenFile, more))
}

func always(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

func secretVersion(version int, field, value string) string {
	return fmt.Sprintf(`{"request_id":"1","data":{"data":{%q:%q},"metadata":{"created_time":"2026-01-02T03:04:05Z","deletion_time":"","destroyed":false,"version":%d}}}`, field, value, version)
}

func TestVaultSettings(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct{ kind, settings, want string }{
		{"vault-kv", `token-file = "/t"`, "address"},
		{"vault-kv", `address = "http://vault.example.com:8200"` + "\n" + `token-file = "/t"`, "use https"},
		{"vault-kv", `address = "ftp://vault.example.com"` + "\n" + `token-file = "/t"`, "neither https"},
		{"vault-kv", `address = "https://"` + "\n" + `token-file = "/t"`, "neither https"},
		{"vault-kv", `address = "unix://run/vault.sock"` + "\n" + `token-file = "/t"`, "neither https"},
		{"vault-kv", `address = "https://me:pw@vault.example.com"` + "\n" + `token-file = "/t"`, "address is to be"},
		{"vault-kv", `address = "https://vault.example.com"`, "set one of token-file, approle, kubernetes and cert"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `kubernetes.role = "r"`, "set one of"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `approle.role-id = "r"`, "secret-id-file"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `kubernetes.jwt-file = "/j"`, "needs role"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `cert.tls-cert = "/c"`, "tls-key"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `cert = {tls-cert = "/none", tls-key = "/none"}`, "cert: open /none"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `kubernetes = {role = "r", mount = "a/../b"}`, "of the auth method"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `ca = "` + dir + `/none"`, "ca: open"},
		{"vault-kv", `address = "http://127.0.0.1:8200"` + "\n" + `token-file = "/t"` + "\n" + `ca = "vault_test.go"`, "holds no certificate"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `mount = "../sys"`, "mount"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `encoding = "base32"`, "encoding"},
		{"vault-kv", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `tokenfile = "/t"`, "strict mode"},
		{"vault-transit", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `field = "kek"`, "strict mode"},
		{"vault-transit", `address = "https://vault.example.com"` + "\n" + `token-file = "/t"` + "\n" + `mount = "a//b"`, "mount"},
	} {
		if b, err := openTOML(test.kind, test.settings); err == nil {
			b.Close()
			t.Errorf("%s: opened", test.settings)
		} else if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.settings, err, test.want)
		}
	}
}

// TestVaultAbilities: what a backend can do, it says by its methods.
func TestVaultAbilities(t *testing.T) {
	for _, test := range []struct {
		kind, more              string
		gives, wraps, mayRotate bool
	}{
		{"vault-kv", "", true, false, true},
		{"vault-kv", `encoding = "raw"`, true, false, false},
		{"vault-transit", "", false, true, true},
	} {
		b := openFake(t, test.kind, test.more, always(500, ""))
		_, gives := b.(kms.Giver)
		_, wraps := b.(kms.Wrapper)
		_, mayRotate := b.(kms.Rotator)
		if gives != test.gives || wraps != test.wraps || mayRotate != test.mayRotate {
			t.Errorf("%s %s: gives %v, wraps %v, rotates %v", test.kind, test.more, gives, wraps, mayRotate)
		}
	}
}

func TestVaultEnvironmentIsNotUsed(t *testing.T) {
	t.Setenv("VAULT_TOKEN", "of-the-environment")
	t.Setenv("VAULT_NAMESPACE", "of-the-environment")
	t.Setenv("VAULT_ADDR", "https://192.0.2.1")
	t.Setenv("VAULT_HEADERS", `{"X-Extra":"of-the-environment"}`)
	t.Setenv("VAULT_WRAP_TTL", "5m")
	b := openFake(t, "vault-kv", `namespace = "teams/"`, func(w http.ResponseWriter, r *http.Request) {
		if h := fmt.Sprint(r.Header); strings.Contains(h, "of-the-environment") || r.Header.Get("X-Vault-Wrap-Ttl") != "" {
			t.Error(h)
		}
		if got := r.Header.Get("X-Vault-Token"); got != vaultToken {
			t.Errorf("token %q", got)
		}
		if got := r.Header.Get("X-Vault-Namespace"); got != "teams/" {
			t.Errorf("namespace %q", got)
		}
		io.WriteString(w, secretVersion(1, "kek", base64.StdEncoding.EncodeToString(vaultKey)))
	})
	if _, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); err != nil {
		t.Error(err)
	}
}

func TestVaultPaths(t *testing.T) {
	for _, test := range []struct{ kind, mount, path, want string }{
		{"vault-kv", "secret", "team-a", "/v1/secret/data/team-a"},
		{"vault-kv", "secret", "secret/data/team-a", "/v1/secret/data/team-a"},
		{"vault-kv", "secret", "keks/team-a", "/v1/secret/data/keks/team-a"},
		{"vault-kv", "secret", "secret/team-a", "/v1/secret/data/secret/team-a"},
		{"vault-kv", "secret", "secret/data/secret/data/team-a", "/v1/secret/data/secret/data/team-a"},
		{"vault-kv", "org/kv/", "org/kv/data/team-a", "/v1/org/kv/data/team-a"},
		{"vault-kv", "secret", "a b?version=1#%2e%2e/ü", "/v1/secret/data/a%20b%3Fversion=1%23%252e%252e/%C3%BC"},
		{"vault-transit", "transit", "team-a", "/v1/transit/encrypt/team-a"},
		{"vault-transit", "transit", "transit/keys/team-a", "/v1/transit/encrypt/team-a"},
		{"vault-kv", "secret", "", ""},
		{"vault-kv", "secret", "secret/data/", ""},
		{"vault-kv", "secret", "/team-a", ""},
		{"vault-kv", "secret", "team-a/", ""},
		{"vault-kv", "secret", "a//b", ""},
		{"vault-kv", "secret", "../../sys/seal", ""},
		{"vault-kv", "secret", "secret/data/../../sys/seal", ""},
		{"vault-kv", "secret", "a/./b", ""},
		{"vault-kv", "secret", "a\nb", ""},
		{"vault-kv", "secret", "a\xffb", ""},
		{"vault-kv", "secret", strings.Repeat("a", 513), ""},
		{"vault-transit", "transit", "a/b", ""},
		{"vault-transit", "transit", "..", ""},
		{"vault-transit", "transit", "a?b", ""},
		{"vault-transit", "transit", "", ""},
	} {
		var got string
		b := openFake(t, test.kind, fmt.Sprintf("mount = %q", test.mount), func(w http.ResponseWriter, r *http.Request) {
			got = r.RequestURI
			w.WriteHeader(http.StatusNotFound)
		})
		var err error
		if g, ok := b.(kms.Giver); ok {
			_, _, err = g.Key(t.Context(), test.path, 0)
		} else {
			_, _, err = b.(kms.Wrapper).Wrap(t.Context(), test.path, vaultKey)
		}
		if got != test.want {
			t.Errorf("mount %q, path %q: asked for %q, want %q", test.mount, test.path, got, test.want)
		}
		if err == nil || (test.want == "") == errors.Is(err, kms.ErrNotFound) {
			t.Errorf("path %q: %v", test.path, err)
		}
	}
}

func TestVaultKey(t *testing.T) {
	for _, test := range []struct{ more, field, value string }{
		{"", "kek", base64.StdEncoding.EncodeToString(vaultKey)},
		{"", "kek", base64.StdEncoding.EncodeToString(vaultKey) + "\n"},
		{`field = "key"` + "\n" + `encoding = "hex"`, "key", hex.EncodeToString(vaultKey)},
	} {
		b := openFake(t, "vault-kv", test.more, func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.URL.Query().Get("version") != "7" {
				t.Errorf("%s %s", r.Method, r.RequestURI)
			}
			io.WriteString(w, secretVersion(7, test.field, test.value))
		})
		key, version, err := b.(kms.Giver).Key(t.Context(), "team-a", 7)
		if err != nil || version != 7 || !bytes.Equal(key, vaultKey) {
			t.Errorf("%q: version %d, %v", test.value, version, err)
		}
	}
	b := openFake(t, "vault-kv", `encoding = "raw"`, always(200, secretVersion(3, "kek", " sixteen \u00e4 bytes")))
	if _, version, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); err == nil {
		t.Errorf("raw, of the wrong length: version %d", version)
	}
	b = openFake(t, "vault-kv", `encoding = "raw"`, always(200, secretVersion(3, "kek", " sixteen ä byte")))
	if key, version, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); err != nil || version != 3 || string(key) != " sixteen ä byte" {
		t.Errorf("raw: %d bytes, version %d, %v", len(key), version, err)
	}
}

// TestVaultAnswers has the answers that Vault's documentation and its source
// show.
func TestVaultAnswers(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString(vaultKey)
	for name, test := range map[string]struct {
		status int
		body   string
		kind   error
		want   string
	}{
		"sealed":            {503, `{"errors":["Vault is sealed"]}`, kms.ErrUnavailable, "unseal it"},
		"no active server":  {500, `{"errors":["local node not active but active cluster node not found"]}`, kms.ErrUnavailable, "local node not active"},
		"forbidden":         {403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`, kms.ErrForbidden, `path "secret/data/team-a" { capabilities = ["read"] }`},
		"quota":             {429, `{"errors":["request path \"secret/data/team-a\": rate limit quota exceeded"]}`, kms.ErrUnavailable, "quota"},
		"no secret":         {404, `{"errors":[]}`, kms.ErrNotFound, "there is no such secret"},
		"no engine":         {404, `{"errors":["no handler for route \"secret/data/team-a\". route entry not found."]}`, kms.ErrNotFound, "no handler for route"},
		"deleted":           {404, `{"data":{"data":null,"metadata":{"deletion_time":"2026-01-02T03:04:05Z","destroyed":false,"version":2}}}`, kms.ErrNotFound, "vault kv undelete -versions=2 -mount=secret team-a"},
		"destroyed":         {404, `{"data":{"data":null,"metadata":{"deletion_time":"","destroyed":true,"version":2}}}`, kms.ErrNotFound, "version 2 was destroyed"},
		"gateway":           {502, "<html>" + secret + "</html>", kms.ErrUnavailable, "status 502"},
		"web page":          {200, "<html>" + secret + "</html>", kms.ErrUnavailable, "is address right?"},
		"nothing":           {200, "", kms.ErrUnavailable, "is address right?"},
		"no content":        {204, "", kms.ErrUnavailable, "version 0"},
		"other JSON":        {200, `{"kek":"` + secret + `"}`, kms.ErrUnavailable, "version 0"},
		"key-value 1":       {200, `{"data":{"kek":"` + secret + `"}}`, kms.ErrUnavailable, "version 0"},
		"another type":      {200, `{"data":{"data":["` + secret + `"]}}`, kms.ErrUnavailable, "is address right?"},
		"redirect":          {307, "", kms.ErrUnavailable, ""},
		"other status":      {418, secret, kms.ErrUnavailable, "status 418"},
		"no field":          {200, secretVersion(2, "key", secret), kms.ErrNotFound, `no field "kek"`},
		"wrong length":      {200, secretVersion(2, "kek", secret[:28]), kms.ErrUnavailable, "21 bytes"},
		"not base64":        {200, secretVersion(2, "kek", "*"+secret[1:]), kms.ErrUnavailable, "not encoded as base64"},
		"no string":         {200, `{"data":{"data":{"kek":12345678},"metadata":{"version":2}}}`, kms.ErrUnavailable, "no string"},
		"too large":         {200, secretVersion(2, "kek", strings.Repeat(secret, 1<<15)), kms.ErrUnavailable, "more than 1048576 bytes"},
		"too large refusal": {500, `{"errors":["` + strings.Repeat("no", 1<<20) + `"]}`, kms.ErrUnavailable, "more than 1048576 bytes"},
		"long refusal":      {500, `{"errors":["` + strings.Repeat("no", 1<<10) + `"]}`, kms.ErrUnavailable, "nono"},
	} {
		t.Run(name, func(t *testing.T) {
			b := openFake(t, "vault-kv", "", always(test.status, test.body))
			_, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0)
			if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("%v, want %q with %q", err, test.kind, test.want)
			}
			if s := err.Error(); len(s) > 800 || strings.Contains(s, secret[1:20]) || strings.Contains(s, vaultToken) || strings.ContainsAny(s, "\n\t") {
				t.Errorf("%d bytes: %s", len(s), s)
			}
		})
	}
	b := openFake(t, "vault-kv", "", always(200, secretVersion(2, "kek", secret)))
	if _, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 1); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "version 2, not 1") {
		t.Errorf("another version: %v", err)
	}
}

func TestVaultDeadline(t *testing.T) {
	for name, before := range map[string]string{"before it answers": "", "within the answer": `{"data":`} {
		t.Run(name, func(t *testing.T) {
			b := openFake(t, "vault-kv", "", func(w http.ResponseWriter, r *http.Request) {
				if before != "" {
					io.WriteString(w, before)
					w.(http.Flusher).Flush()
				}
				<-r.Context().Done()
			})
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, _, err := b.(kms.Giver).Key(ctx, "team-a", 0)
			if !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
			if took := time.Since(start); took > time.Minute {
				t.Errorf("after %v", took)
			}
		})
	}
}

func TestVaultIsDown(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "vault.sock")
	b := mustOpen(t, "vault-kv", fmt.Sprintf("address = \"unix://%s\"\napprole = {role-id = \"r\", secret-id-file = %q}", socket, writeFile(t, filepath.Join(t.TempDir(), "id"), "secret-id")))
	_, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0)
	if !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "the Vault at unix://"+socket) || strings.Contains(err.Error(), "secret-id") {
		t.Error(err)
	}
}

// TestVaultStandby: a standby server sends clients to the active one.
func TestVaultStandby(t *testing.T) {
	active := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); r.Method != http.MethodPut || !strings.Contains(string(body), `"plaintext":"`) || r.Header.Get("X-Vault-Token") != vaultToken {
			t.Errorf("%s %s", r.Method, body)
		}
		io.WriteString(w, `{"data":{"ciphertext":"vault:v3:AAAA","key_version":3}}`)
	}))
	defer active.Close()
	to := active.URL
	b := openFake(t, "vault-transit", "", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, to+r.RequestURI, http.StatusTemporaryRedirect)
	})
	version, wrapped, err := b.(kms.Wrapper).Wrap(t.Context(), "team-a", vaultKey)
	if err != nil || version != 3 || string(wrapped) != "vault:v3:AAAA" {
		t.Errorf("version %d, %s, %v", version, wrapped, err)
	}
	to = "http://192.0.2.1"
	if _, _, err := b.(kms.Wrapper).Wrap(t.Context(), "team-a", vaultKey); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "redirects to http://192.0.2.1") {
		t.Errorf("to another machine in plain: %v", err)
	}
}

// TestVaultLogin logs in again when the server says that the token is over,
// once for all requests at once, and not when a policy denies something.
func TestVaultLogin(t *testing.T) {
	dir := t.TempDir()
	secretID := writeFile(t, filepath.Join(dir, "secret-id"), "id-1\n")
	jwt := writeFile(t, filepath.Join(dir, "jwt"), "eyJ.jwt")
	for name, login := range map[string]struct{ settings, path, body string }{
		"approle":    {fmt.Sprintf(`approle = {role-id = "role", secret-id-file = %q}`, secretID), "/v1/auth/approle/login", `{"role_id":"role","secret_id":"id-1"}`},
		"kubernetes": {fmt.Sprintf(`kubernetes = {role = "role", jwt-file = %q, mount = "clusters/a"}`, jwt), "/v1/auth/clusters/a/login", `{"jwt":"eyJ.jwt","role":"role"}`},
	} {
		t.Run(name, func(t *testing.T) {
			var logins, denied atomic.Int32
			var broken atomic.Bool
			url, _ := fakeVault(t, func(w http.ResponseWriter, r *http.Request) {
				current := fmt.Sprintf("token-%d", logins.Load())
				switch {
				case r.URL.Path == login.path && broken.Load():
					always(400, `{"errors":["invalid role or secret ID"]}`)(w, r)
				case r.URL.Path == login.path:
					if body, _ := io.ReadAll(r.Body); string(body) != login.body || r.Header.Get("X-Vault-Token") != "" {
						t.Errorf("login %s", body)
					}
					time.Sleep(20 * time.Millisecond)
					fmt.Fprintf(w, `{"auth":{"client_token":"token-%d","lease_duration":3600,"renewable":true}}`, logins.Add(1))
				case r.Header.Get("X-Vault-Token") != current:
					always(403, `{"errors":["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"]}`)(w, r)
				case strings.HasSuffix(r.URL.Path, "/denied"):
					denied.Add(1)
					always(403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`)(w, r)
				default:
					io.WriteString(w, secretVersion(1, "kek", base64.StdEncoding.EncodeToString(vaultKey)))
				}
			})
			b := mustOpen(t, "vault-kv", fmt.Sprintf("address = %q\n%s", url, login.settings)).(kms.Giver)
			ask := func() {
				t.Helper()
				var wg sync.WaitGroup
				for range 10 {
					wg.Go(func() {
						if _, _, err := b.Key(t.Context(), "team-a", 0); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			expect := func(n int32) {
				t.Helper()
				if got := logins.Load(); got != n {
					t.Fatalf("%d logins, want %d", got, n)
				}
			}
			ask()
			expect(1)
			for range 3 {
				if _, _, err := b.Key(t.Context(), "denied", 0); !errors.Is(err, kms.ErrForbidden) {
					t.Error(err)
				}
			}
			expect(1)
			logins.Add(1) // the token is revoked
			ask()
			expect(3)
			logins.Add(1)
			broken.Store(true)
			_, _, err := b.Key(t.Context(), "team-a", 0)
			if !errors.Is(err, kms.ErrForbidden) || !strings.Contains(err.Error(), "invalid role or secret ID: it does not let the broker log in") {
				t.Error(err)
			}
			for _, secret := range []string{"id-1", "eyJ.jwt", "token-"} {
				if strings.Contains(err.Error(), secret) {
					t.Error(err)
				}
			}
		})
	}
}

func TestVaultLoginWaits(t *testing.T) {
	url, _ := fakeVault(t, func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // else the server does not see that the client is gone
		<-r.Context().Done()
	})
	b := mustOpen(t, "vault-kv", fmt.Sprintf("address = %q\nkubernetes = {role = \"r\", jwt-file = %q}", url, writeFile(t, filepath.Join(t.TempDir(), "jwt"), "j"))).(kms.Giver)
	var wg sync.WaitGroup
	start := time.Now()
	for range 4 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, _, err := b.Key(ctx, "team-a", 0); !errors.Is(err, kms.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > time.Minute {
		t.Errorf("after %v", took)
	}
}

func TestVaultTokenFile(t *testing.T) {
	var renewed, want atomic.Value
	renewed.Store("")
	want.Store("token-1")
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get("X-Vault-Token")
		switch {
		case token != want.Load():
			always(403, `{"errors":["permission denied"]}`)(w, r)
		case r.URL.Path == "/v1/auth/token/renew-self":
			renewed.Store(token)
			io.WriteString(w, `{"auth":{"client_token":"`+token+`","lease_duration":1,"renewable":true}}`)
		default:
			io.WriteString(w, secretVersion(1, "kek", base64.StdEncoding.EncodeToString(vaultKey)))
		}
	}))
	defer s.Close()
	file := filepath.Join(t.TempDir(), "token")
	b := mustOpen(t, "vault-kv", fmt.Sprintf("address = %q\ntoken-file = %q", s.URL, writeFile(t, file, "token-1")))
	for _, token := range []string{"token-1", "token-2"} {
		writeFile(t, file, token)
		want.Store(token)
		if _, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); err != nil {
			t.Error(err)
		}
		for deadline := time.Now().Add(time.Minute); renewed.Load() != token; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s is not renewed", token)
			}
		}
	}
	for content, says := range map[string]string{"": "one line", "a\nb": "one line", "tökén": "one line"} {
		writeFile(t, file, content)
		if _, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), says) {
			t.Errorf("token %q: %v", content, err)
		}
	}
	os.Remove(file)
	if _, _, err := b.(kms.Giver).Key(t.Context(), "team-a", 0); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "token-file: open "+file) {
		t.Errorf("no token: %v", err)
	}
}

// TestVaultKVRotate rotates a secret that others write to.
func TestVaultKVRotate(t *testing.T) {
	const others = `"big":12345678901234567890,"note":"<&>"`
	var version, keeps atomic.Int32
	version.Store(8)
	keeps.Store(0)
	var conflicts atomic.Int32
	var written []byte
	b := openFake(t, "vault-kv", "", func(w http.ResponseWriter, r *http.Request) {
		current := version.Load()
		switch r.Method + r.URL.Path {
		case "GET/v1/secret/data/team-a":
			fmt.Fprintf(w, `{"data":{"data":{"kek":"b2xk",%s},"metadata":{"version":%d}}}`, others, current)
		case "GET/v1/secret/metadata/team-a":
			io.WriteString(w, `{"data":{"max_versions":0,"versions":{"1":{"destroyed":true},"2":{"destroyed":false,"deletion_time":"2026-01-02T03:04:05Z"},"8":{"destroyed":false}}}}`)
		case "GET/v1/secret/config":
			fmt.Fprintf(w, `{"data":{"max_versions":%d}}`, keeps.Load())
		case "PUT/v1/secret/data/team-a":
			var body struct {
				Options struct{ CAS int32 }
				Data    json.RawMessage
			}
			if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
				t.Error(err)
			}
			if conflicts.Add(-1) >= 0 {
				version.Add(1)
				always(400, `{"errors":["check-and-set parameter did not match the current version"]}`)(w, r)
				return
			}
			if body.Options.CAS != current {
				t.Errorf("cas %d", body.Options.CAS)
			}
			written = body.Data
			fmt.Fprintf(w, `{"data":{"version":%d}}`, version.Add(1))
		default:
			t.Errorf("%s %s", r.Method, r.URL)
		}
	}).(kms.Rotator)
	conflicts.Store(1)
	v, err := b.Rotate(t.Context(), "team-a")
	if err != nil || v != 10 {
		t.Fatalf("version %d, %v", v, err)
	}
	var fields struct {
		KEK  []byte
		Big  json.Number
		Note string
	}
	if err := json.Unmarshal(written, &fields); err != nil || len(fields.KEK) != 32 || fields.Big != "12345678901234567890" || fields.Note != "<&>" {
		t.Errorf("wrote %d bytes of KEK, %v, %q, %v", len(fields.KEK), fields.Big, fields.Note, err)
	}

	// Versions 2 to 11 are ten; one more is one too many.
	if v, err := b.Rotate(t.Context(), "team-a"); err != nil || v != 11 {
		t.Fatalf("version %d, %v", v, err)
	}
	_, err = b.Rotate(t.Context(), "team-a")
	if err == nil || !strings.Contains(err.Error(), "keeps 10 versions and would forget version 2: vault kv metadata put -max-versions=") {
		t.Errorf("one too many: %v", err)
	}
	keeps.Store(11)
	if v, err := b.Rotate(t.Context(), "team-a"); err != nil || v != 12 {
		t.Errorf("version %d, %v", v, err)
	}
	keeps.Store(100)
	conflicts.Store(1000)
	if _, err := b.Rotate(t.Context(), "team-a"); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "check-and-set") {
		t.Errorf("others always rotate first: %v", err)
	}
}

func TestVaultTransit(t *testing.T) {
	var status int
	var body string
	b := openFake(t, "vault-transit", "", func(w http.ResponseWriter, r *http.Request) { always(status, body)(w, r) })
	w := b.(kms.Wrapper)
	for name, test := range map[string]struct {
		status int
		body   string
		kind   error
		want   string
	}{
		"no ciphertext": {200, `{"data":{}}`, kms.ErrUnavailable, "no ciphertext"},
		"version 0":     {200, `{"data":{"ciphertext":"vault:v0:AAAA"}}`, kms.ErrUnavailable, "no ciphertext"},
		"no version":    {200, `{"data":{"ciphertext":"vault:v:AAAA"}}`, kms.ErrUnavailable, "no ciphertext"},
		"other version": {200, `{"data":{"ciphertext":"vault:v+1:AAAA"}}`, kms.ErrUnavailable, "no ciphertext"},
		"forbidden":     {403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`, kms.ErrForbidden, `path "transit/encrypt/team-a" { capabilities = ["update"] }, or there is no such key`},
		"no key":        {400, `{"errors":["encryption key not found"]}`, kms.ErrNotFound, "encryption key not found"},
		"signing key":   {400, `{"errors":["message encryption not supported for key type ed25519"]}`, kms.ErrUnavailable, "not supported"},
	} {
		status, body = test.status, test.body
		if _, _, err := w.Wrap(t.Context(), "team-a", vaultKey); !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("wrap: %s: %v", name, err)
		}
	}
	for name, test := range map[string]struct {
		version int
		wrapped string
		status  int
		body    string
		kind    error
	}{
		"tampered":           {1, "vault:v1:AAAA", 400, `{"errors":["cipher: message authentication failed"]}`, kms.ErrUnwrap},
		"retired version":    {1, "vault:v1:AAAA", 400, `{"errors":["ciphertext or signature version is disallowed by policy (too old)"]}`, kms.ErrNotFound},
		"future version":     {9, "vault:v9:AAAA", 400, `{"errors":["invalid ciphertext: version is too new"]}`, kms.ErrNotFound},
		"no key":             {1, "vault:v1:AAAA", 400, `{"errors":["encryption key not found"]}`, kms.ErrNotFound},
		"forbidden":          {1, "vault:v1:AAAA", 403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`, kms.ErrForbidden},
		"broken server":      {1, "vault:v1:AAAA", 500, `{"errors":["internal error"]}`, kms.ErrUnavailable},
		"no plaintext":       {1, "vault:v1:AAAA", 200, `{"data":{}}`, kms.ErrUnavailable},
		"no base64":          {1, "vault:v1:AAAA", 200, `{"data":{"plaintext":"*"}}`, kms.ErrUnavailable},
		"another version":    {2, "vault:v1:AAAA", 200, "never asked", kms.ErrUnwrap},
		"no prefix":          {1, "AAAA", 200, "never asked", kms.ErrUnwrap},
		"another way to 1":   {1, "vault:v01:AAAA", 200, "never asked", kms.ErrUnwrap},
		"nothing wrapped":    {1, "vault:v1:", 200, "never asked", kms.ErrUnwrap},
		"much wrapped":       {1, "vault:v1:" + strings.Repeat("A", 1<<20), 200, "never asked", kms.ErrUnwrap},
		"a version of zero":  {0, "vault:v0:AAAA", 200, "never asked", kms.ErrUnwrap},
		"less than zero":     {-1, "vault:v-1:AAAA", 200, "never asked", kms.ErrUnwrap},
		"more than an int64": {1, "vault:v99999999999999999999:AAAA", 200, "never asked", kms.ErrUnwrap},
	} {
		status, body = test.status, test.body
		if _, err := w.Unwrap(t.Context(), "team-a", test.version, []byte(test.wrapped)); !errors.Is(err, test.kind) {
			t.Errorf("unwrap: %s: %v", name, err)
		}
	}
	status, body = 200, `{"data":{"latest_version":5}}`
	if v, err := b.(kms.Rotator).Rotate(t.Context(), "team-a"); err != nil || v != 5 {
		t.Errorf("rotate: version %d, %v", v, err)
	}
	status, body = 400, `{"errors":["key not found"]}`
	if _, err := b.(kms.Rotator).Rotate(t.Context(), "team-a"); !errors.Is(err, kms.ErrNotFound) {
		t.Errorf("rotate no key: %v", err)
	}
}

// TestVaultTransitRotateSilently: old servers answer nothing to a rotation.
func TestVaultTransitRotateSilently(t *testing.T) {
	b := openFake(t, "vault-transit", "", func(w http.ResponseWriter, r *http.Request) {
		switch r.Method + r.URL.Path {
		case "PUT/v1/transit/keys/team-a/rotate":
			w.WriteHeader(http.StatusNoContent)
		case "GET/v1/transit/keys/team-a":
			io.WriteString(w, `{"data":{"latest_version":4}}`)
		default:
			t.Errorf("%s %s", r.Method, r.URL)
		}
	})
	if v, err := b.(kms.Rotator).Rotate(t.Context(), "team-a"); err != nil || v != 4 {
		t.Errorf("version %d, %v", v, err)
	}
}

func FuzzVaultKey(f *testing.F) {
	f.Add(200, secretVersion(2, "kek", base64.StdEncoding.EncodeToString(vaultKey)))
	f.Add(200, `{"data":{"data":{"kek":null},"metadata":{"version":2}}}`)
	f.Add(404, `{"data":{"data":null,"metadata":{"destroyed":true,"version":2}}}`)
	f.Add(400, `{"errors":["no"]}`)
	var status int
	var body string
	b := openFake(f, "vault-kv", "", func(w http.ResponseWriter, r *http.Request) { always(status, body)(w, r) })
	f.Fuzz(func(t *testing.T, s int, answer string) {
		if s < 200 || s > 599 {
			return
		}
		status, body = s, answer
		key, version, err := b.(kms.Giver).Key(t.Context(), "team-a", 0)
		if err == nil && (version < 1 || len(key) != 16 && len(key) != 24 && len(key) != 32) {
			t.Errorf("version %d, %d bytes", version, len(key))
		}
		if err != nil && key != nil {
			t.Error("a key and an error")
		}
	})
}
