package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/vault"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
	"github.com/hashicorp/vault/api"
	"github.com/pelletier/go-toml/v2"
)

// eachVault runs a test with Vault and with OpenBao.
func eachVault(t *testing.T, test func(*testing.T, *harness.VaultServer)) {
	t.Parallel()
	t.Run("Vault", func(t *testing.T) { test(t, harness.NewVault(t)) })
	t.Run("OpenBao", func(t *testing.T) { test(t, harness.NewOpenBao(t)) })
}

func deletePath(v *harness.VaultServer, path string) {
	v.T.Helper()
	if _, err := v.Logical().Delete(path); err != nil {
		v.T.Fatal(err)
	}
}

// appRole returns the settings for a role with those policies whose tokens
// are good for a time.
func appRole(v *harness.VaultServer, ttl string, comments ...string) (settings, secretIDFile string) {
	v.T.Helper()
	v.Write("sys/auth/approle", `{"type": "approle"}`)
	v.Write("auth/approle/role/copilot", fmt.Sprintf(`{"token_policies": %s, "token_ttl": %q, "token_max_ttl": %[2]q}`, v.Policy(comments...), ttl))
	role, err := v.Logical().Read("auth/approle/role/copilot/role-id")
	if err != nil {
		v.T.Fatal(err)
	}
	secretIDFile = harness.Write(v.T, harness.TempDir(v.T)+"/secret-id", secretID(v))
	return fmt.Sprintf("approle = {role-id = %q, secret-id-file = %q}\n", role.Data["role_id"], secretIDFile), secretIDFile
}

func secretID(v *harness.VaultServer) string {
	v.T.Helper()
	return v.Write("auth/approle/role/copilot/secret-id", "{}").Data["secret_id"].(string)
}

func open(v *harness.VaultServer, kind, settings string) kms.Backend {
	v.T.Helper()
	b, err := vault.Types().Open(kind, func(s any) error {
		return toml.NewDecoder(strings.NewReader(fmt.Sprintf("address = %q\n%s", v.URL, settings))).DisallowUnknownFields().Decode(s)
	})
	if err != nil {
		v.T.Fatal(err)
	}
	v.T.Cleanup(func() { b.Close() })
	return b
}

// gives asks for a key and compares it.
func gives(t testing.TB, b kms.Backend, path string, version int, key []byte, is int) {
	t.Helper()
	got, v, err := b.(kms.Giver).Key(within(t), path, version)
	if err != nil || v != is || !bytes.Equal(got, key) {
		t.Errorf("%s in version %d: version %d, the key: %v, %v", path, version, v, bytes.Equal(got, key), err)
	}
}

// givesNot asks for a key, which has to fail with an error of that kind, which says each of want.
func givesNot(t testing.TB, b kms.Backend, path string, version int, kind error, want ...string) {
	t.Helper()
	_, _, err := b.(kms.Giver).Key(within(t), path, version)
	isKMSError(t, err, kind, want...)
}

func isKMSError(t testing.TB, err, kind error, want ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%v, want %q", err, kind)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: want %q", err, w)
		}
	}
}

// within returns a context for one request.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), harness.Timeout)
	t.Cleanup(cancel)
	return ctx
}

func TestVaultGivesKeys(t *testing.T) { eachVault(t, testVaultGivesKeys) }

func testVaultGivesKeys(t *testing.T, v *harness.VaultServer) {
	keys := [][]byte{nil, v.Put("team-a"), v.Put("team-a"), v.Put("team-a"), v.Put("team-a")}
	v.Put("team-x")
	b := open(v, "vault-kv", v.Token("vault-kv"))
	gives(t, b, "team-a", 0, keys[4], 4)
	for version := 1; version <= 4; version++ {
		gives(t, b, "secret/data/team-a", version, keys[version], version)
	}
	givesNot(t, b, "team-a", 5, kms.ErrNotFound, "there is no version 5")
	givesNot(t, b, "team-x", 0, kms.ErrForbidden, "permission denied", `path "secret/data/team-x" { capabilities = ["read"] }`)

	v.Write("secret/delete/team-a", `{"versions": [1]}`)
	givesNot(t, b, "team-a", 1, kms.ErrNotFound, "version 1 was deleted")
	v.Write("secret/undelete/team-a", `{"versions": [1]}`)
	gives(t, b, "team-a", 1, keys[1], 1)
	v.Write("secret/destroy/team-a", `{"versions": [2]}`)
	givesNot(t, b, "team-a", 2, kms.ErrNotFound, "version 2 was destroyed")
	deletePath(v, "secret/data/team-a")
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, "version 4 was deleted")
	deletePath(v, "secret/metadata/team-a")
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, "there is no such secret")

	v.Write("secret/data/team-a", `{"data": {"kek": "c2hvcnQ="}}`)
	givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "5 bytes")
	v.Write("secret/data/team-a", `{"data": {"KEK": "c2hvcnQ="}}`)
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, `version 2 has no field "kek"`)

	b = open(v, "vault-kv", fmt.Sprintf("token-file = %q", harness.Write(t, harness.TempDir(t)+"/token", "hvs.wrong")))
	givesNot(t, b, "team-a", 0, kms.ErrForbidden, "permission denied", "has expired, was revoked, or is not of this server")
	root := fmt.Sprintf("token-file = %q\n", v.Dir+"/root-token")
	givesNot(t, open(v, "vault-kv", root+`mount = "nowhere"`), "team-a", 0, kms.ErrNotFound, "no handler for route")

	v.Write("sys/mounts/old", `{"type": "kv", "options": {"version": "1"}}`)
	v.Write("old/team-a", `{"kek": "c2hvcnQ="}`)
	givesNot(t, open(v, "vault-kv", root+`mount = "old"`), "team-a", 0, kms.ErrNotFound, "no key-value engine of version 2")
}

func TestVaultRotatesKeys(t *testing.T) { eachVault(t, testVaultRotatesKeys) }

func testVaultRotatesKeys(t *testing.T, v *harness.VaultServer) {
	first := v.Put("team-a")
	isRotator := func(b kms.Backend) kms.Rotator { return b.(kms.Rotator) }

	_, err := isRotator(open(v, "vault-kv", v.Token("vault-kv"))).Rotate(within(t), "team-a")
	isKMSError(t, err, kms.ErrForbidden, "secret/metadata/team-a")
	b := open(v, "vault-kv", v.Token("vault-kv, rotating"))
	version, err := isRotator(b).Rotate(within(t), "team-a")
	if err != nil || version != 2 {
		t.Fatalf("version %d, %v", version, err)
	}
	second, _, err := b.(kms.Giver).Key(within(t), "team-a", 0)
	if err != nil || len(second) != 32 || bytes.Equal(first, second) {
		t.Errorf("%d bytes, the same: %v, %v", len(second), bytes.Equal(first, second), err)
	}
	gives(t, b, "team-a", 1, first, 1)
	s, err := v.Logical().Read("secret/data/team-a")
	if err != nil {
		t.Fatal(err)
	}
	if fields := s.Data["data"].(map[string]any); len(fields) != 3 || fields["owner"] != "team" || fmt.Sprint(fields["number"]) != "17" {
		t.Errorf("other fields: %v, %v", fields["owner"], fields["number"])
	}

	// Four at once make a version each.
	rotateAtOnce(t, "team-a", func() kms.Rotator { return isRotator(b) })
	gives(t, b, "team-a", 1, first, 1)
	gives(t, b, "team-a", 2, second, 2)

	// The engine keeps ten.
	for version := 7; version <= 10; version++ {
		if got, err := isRotator(b).Rotate(within(t), "team-a"); err != nil || got != version {
			t.Fatalf("version %d, %v", got, err)
		}
	}
	if _, err := isRotator(b).Rotate(within(t), "team-a"); err == nil || !strings.Contains(err.Error(), "would forget version 1") {
		t.Errorf("an eleventh version: %v", err)
	}
	gives(t, b, "team-a", 1, first, 1)
	v.Write("secret/metadata/team-a", `{"max_versions": 11}`)
	if got, err := isRotator(b).Rotate(within(t), "team-a"); err != nil || got != 11 {
		t.Errorf("version %d, %v", got, err)
	}
	v.Write("secret/destroy/team-a", `{"versions": [1]}`)
	if got, err := isRotator(b).Rotate(within(t), "team-a"); err != nil || got != 12 {
		t.Errorf("version %d, %v", got, err)
	}
	gives(t, b, "team-a", 2, second, 2)

	deletePath(v, "secret/data/team-a")
	_, err = isRotator(b).Rotate(within(t), "team-a")
	isKMSError(t, err, kms.ErrNotFound, "version 12 was deleted")
	_, err = isRotator(open(v, "vault-kv", fmt.Sprintf("token-file = %q", v.Dir+"/root-token"))).Rotate(within(t), "team-b")
	isKMSError(t, err, kms.ErrNotFound, "there is no such secret")
}

func TestVaultTransit(t *testing.T) { eachVault(t, testVaultTransit) }

func testVaultTransit(t *testing.T, v *harness.VaultServer) {
	v.Write("transit/keys/team-b", "{}")
	v.Write("transit/keys/other", "{}")
	root := open(v, "vault-transit", fmt.Sprintf("token-file = %q", v.Dir+"/root-token")).(kms.Wrapper)
	b := open(v, "vault-transit", v.Token("vault-transit"))
	w := b.(kms.Wrapper)
	key := make([]byte, kms.MaxPlaintext)
	rand.Read(key)
	unwraps := func(version int, wrapped []byte) {
		t.Helper()
		if got, err := w.Unwrap(within(t), "transit/keys/team-b", version, wrapped); err != nil || !bytes.Equal(got, key) {
			t.Errorf("version %d: the same: %v, %v", version, bytes.Equal(got, key), err)
		}
	}
	refuses := func(w kms.Wrapper, path string, version int, wrapped []byte, kind error, want ...string) {
		t.Helper()
		_, err := w.Unwrap(within(t), path, version, wrapped)
		isKMSError(t, err, kind, want...)
	}

	version, first, err := w.Wrap(within(t), "team-b", key)
	if err != nil || version != 1 || !bytes.HasPrefix(first, []byte("vault:v1:")) {
		t.Fatalf("version %d, %v", version, err)
	}
	unwraps(1, first)

	// Changed in any place, in another version, with another key.
	for i := range first {
		changed := bytes.Clone(first)
		changed[i] ^= 1
		if _, err := w.Unwrap(within(t), "team-b", 1, changed); !errors.Is(err, kms.ErrUnwrap) {
			t.Errorf("changed at %d, %q: %v", i, changed, err)
		}
	}
	refuses(w, "team-b", 1, first[:len(first)-8], kms.ErrUnwrap)
	refuses(w, "team-b", 2, first, kms.ErrUnwrap)
	refuses(root, "other", 1, first, kms.ErrUnwrap)
	refuses(w, "team-b", 7, append([]byte("vault:v7:"), first[9:]...), kms.ErrNotFound, "too new")

	_, err = b.(kms.Rotator).Rotate(within(t), "team-b")
	isKMSError(t, err, kms.ErrForbidden, `path "transit/keys/team-b/rotate" { capabilities = ["update"] }`)
	r := open(v, "vault-transit", v.Token("vault-transit", "vault-transit, rotating")).(kms.Rotator)
	if version, err := r.Rotate(within(t), "team-b"); err != nil || version != 2 {
		t.Fatalf("version %d, %v", version, err)
	}
	version, second, err := w.Wrap(within(t), "team-b", key)
	if err != nil || version != 2 {
		t.Fatalf("version %d, %v", version, err)
	}
	unwraps(1, first)
	unwraps(2, second)
	refuses(w, "team-b", 2, append([]byte("vault:v2:"), first[9:]...), kms.ErrUnwrap)

	// Of several copilots. OpenBao refuses some with "transaction commit failed".
	rotateAtOnce(t, "team-b", func() kms.Rotator {
		return open(v, "vault-transit", v.Token("vault-transit", "vault-transit, rotating")).(kms.Rotator)
	})

	v.Write("transit/keys/team-b/config", `{"min_decryption_version": 2}`)
	refuses(w, "team-b", 1, first, kms.ErrNotFound, "too old")
	unwraps(2, second)

	// A key that nobody made is not made by a typing error.
	_, _, err = open(v, "vault-transit", v.Token("vault-transit")).(kms.Wrapper).Wrap(within(t), "team-c", key)
	isKMSError(t, err, kms.ErrForbidden, `path "transit/encrypt/team-c"`, "no such key")
	refuses(root, "team-c", 1, first, kms.ErrNotFound)
	v.Write("transit/keys/team-b/config", `{"deletion_allowed": true}`)
	deletePath(v, "transit/keys/team-b")
	refuses(w, "team-b", 2, second, kms.ErrNotFound)
	_, _, err = w.Wrap(within(t), "team-b", key)
	isKMSError(t, err, kms.ErrForbidden, "there is no such key")
	_, err = r.Rotate(within(t), "team-b")
	isKMSError(t, err, kms.ErrNotFound, "key not found")

	v.Write("transit/keys/signs", `{"type": "ed25519"}`)
	_, _, err = root.Wrap(within(t), "signs", key)
	isKMSError(t, err, kms.ErrUnavailable, "not supported")
}

// rotateAtOnce rotates a key that has two versions four times at once: each makes a version.
func rotateAtOnce(t *testing.T, kek string, rotator func() kms.Rotator) {
	t.Helper()
	var mu sync.Mutex
	var versions []int
	var wg sync.WaitGroup
	for range 4 {
		r := rotator()
		wg.Go(func() {
			version, err := r.Rotate(within(t), kek)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			versions = append(versions, version)
		})
	}
	wg.Wait()
	if slices.Sort(versions); len(slices.Compact(slices.Clone(versions))) != 4 || versions[0] < 3 {
		t.Errorf("versions %v", versions)
	}
}

// TestVaultLogsInAgain has tokens that end after two seconds, and then some that
// are revoked.
func TestVaultLogsInAgain(t *testing.T) {
	t.Parallel()
	v := harness.NewVault(t)
	key := v.Put("team-a")
	settings, secretIDFile := appRole(v, "2s", "vault-kv")
	b := open(v, "vault-kv", settings)
	for range 12 {
		gives(t, b, "team-a", 0, key, 1)
		time.Sleep(500 * time.Millisecond)
	}

	v.Write("auth/approle/role/copilot", `{"token_ttl": "1h", "token_max_ttl": "1h"}`)
	time.Sleep(2 * time.Second)
	gives(t, b, "team-a", 0, key, 1)
	v.Write("sys/leases/revoke-prefix/auth/approle/login", "{}")
	gives(t, b, "team-a", 0, key, 1)
	harness.Write(t, secretIDFile, "wrong")
	v.Write("sys/leases/revoke-prefix/auth/approle/login", "{}")
	givesNot(t, b, "team-a", 0, kms.ErrForbidden, "auth/approle/login", "does not let the broker log in")
	harness.Write(t, secretIDFile, secretID(v))
	gives(t, b, "team-a", 0, key, 1)
}

// TestVaultTokenEnds has tokens that were revoked, beside policies that deny
// something: only the first call for a new token.
func TestVaultTokenEnds(t *testing.T) {
	eachVault(t, func(t *testing.T, v *harness.VaultServer) {
		key := v.Put("team-a")
		v.Put("denied")
		settings, _ := appRole(v, "1h", "vault-kv")
		// Tokens without the policy "default" may not look themselves up.
		for _, alone := range []bool{false, true} {
			v.Write("auth/approle/role/copilot", fmt.Sprintf(`{"token_no_default_policy": %v}`, alone))
			b := open(v, "vault-kv", settings)
			for range 3 {
				gives(t, b, "team-a", 0, key, 1)
				v.Write("sys/leases/revoke-prefix/auth/approle/login", "{}")
			}
			gives(t, b, "team-a", 0, key, 1)
			for range 3 {
				givesNot(t, b, "denied", 0, kms.ErrForbidden, `path "secret/data/denied" { capabilities = ["read"] }`)
			}
			s, err := v.Logical().List("auth/token/accessors")
			if err != nil {
				t.Fatal(err)
			}
			// The root token and one that is still good.
			if n := len(s.Data["keys"].([]any)); n != 2 {
				t.Errorf("%d tokens: a denied request makes new ones", n)
			}
			v.Write("sys/leases/revoke-prefix/auth/approle/login", "{}")
		}

		created := v.Write("auth/token/create", fmt.Sprintf(`{"policies": %s, "ttl": "1h"}`, v.Policy("vault-kv"))).Auth
		file := harness.Write(t, harness.TempDir(t)+"/token", created.ClientToken)
		b := open(v, "vault-kv", fmt.Sprintf("token-file = %q\n", file))
		w := open(v, "vault-transit", fmt.Sprintf("token-file = %q\n", file)).(kms.Wrapper)
		gives(t, b, "team-a", 0, key, 1)
		givesNot(t, b, "denied", 0, kms.ErrForbidden, "the policy of the broker's token needs")
		v.Write("auth/token/revoke", fmt.Sprintf(`{"token": %q}`, created.ClientToken))
		hint := "the token in " + file + " has expired, was revoked, or is not of this server: put a new one there"
		givesNot(t, b, "team-a", 0, kms.ErrForbidden, hint)
		if _, _, err := w.Wrap(within(t), "team-b", key); err == nil || !strings.HasSuffix(err.Error(), hint) {
			t.Errorf("wrap with a revoked token: %v", err)
		}
	})
}

// TestVaultRenewsToken: one that would end after 20 seconds.
func TestVaultRenewsToken(t *testing.T) {
	t.Parallel()
	v := harness.NewVault(t)
	key := v.Put("team-a")
	s := v.Write("auth/token/create", fmt.Sprintf(`{"policies": %s, "period": "20s"}`, v.Policy("vault-kv")))
	b := open(v, "vault-kv", fmt.Sprintf("token-file = %q", harness.Write(t, harness.TempDir(t)+"/token", s.Auth.ClientToken)))
	for range 5 {
		gives(t, b, "team-a", 0, key, 1)
		time.Sleep(5 * time.Second)
	}
}

func TestVaultIsStopped(t *testing.T) {
	t.Parallel()
	v := harness.NewVault(t)
	key := v.Put("team-a")
	v.Write("transit/keys/team-b", "{}")
	settings, _ := appRole(v, "1h", "vault-kv", "vault-transit")
	kv, transit := open(v, "vault-kv", settings), open(v, "vault-transit", settings).(kms.Wrapper)
	gives(t, kv, "team-a", 0, key, 1)
	_, wrapped, err := transit.Wrap(within(t), "team-b", key)
	if err != nil {
		t.Fatal(err)
	}

	v.Process.Stop(t)
	late := open(v, "vault-kv", settings) // opens all the same
	for _, b := range []kms.Backend{kv, late} {
		givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "the Vault at "+v.URL)
	}
	_, err = transit.Unwrap(within(t), "team-b", 1, wrapped)
	isKMSError(t, err, kms.ErrUnavailable)

	v.Start("-sealed")
	for _, b := range []kms.Backend{kv, late} {
		givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "Vault is sealed: unseal it")
	}
	_, err = transit.Unwrap(within(t), "team-b", 1, wrapped)
	isKMSError(t, err, kms.ErrUnavailable, "unseal it")
	v.Process.Stop(t)

	v.Start()
	for _, b := range []kms.Backend{kv, late} {
		gives(t, b, "team-a", 0, key, 1)
	}
	if got, err := transit.Unwrap(within(t), "team-b", 1, wrapped); err != nil || !bytes.Equal(got, key) {
		t.Errorf("the same: %v, %v", bytes.Equal(got, key), err)
	}

	// One that hangs.
	defer v.Process.Pause(t)()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, _, err = kv.(kms.Giver).Key(ctx, "team-a", 0)
	isKMSError(t, err, kms.ErrUnavailable, "deadline exceeded")
	if took := time.Since(began); took > harness.Timeout/2 {
		t.Errorf("after %v", took)
	}
}

// TestVaultTLS logs in with a client certificate.
func TestVaultTLS(t *testing.T) {
	t.Parallel()
	server, clients := certtest.NewAuthority(t), certtest.NewAuthority(t)
	files := server.Issue(t, certtest.Named("vault"))
	v := &harness.VaultServer{T: t, Dir: harness.TempDir(t)}
	address := loopbacktest.FreeAddress(t)
	v.Process = harness.Start(t, v.Dir, "vault-dev", exec.Command("vault-dev", "-dir", v.Dir, "-listen", address, "-tls-cert", files.Cert, "-tls-key", files.Key))
	harness.Await(t, "vault-dev", harness.Listening(address))
	v.URL = "https://" + address
	conf := api.DefaultConfig()
	conf.Address = v.URL
	if err := conf.ConfigureTLS(&api.TLSConfig{CACert: server.File}); err != nil {
		t.Fatal(err)
	}
	v.Connect(conf)
	v.Engines()
	key := v.Put("team-a")
	v.Write("sys/auth/cert", `{"type": "cert"}`)
	b, _ := json.Marshal(harness.Read(t, clients.File))
	v.Write("auth/cert/certs/copilot", fmt.Sprintf(`{"certificate": %s, "allowed_common_names": "copilot", "token_policies": %s}`, b, v.Policy("vault-kv")))

	settings := func(f certtest.Files, ca string) string {
		return fmt.Sprintf("ca = %q\ncert = {tls-cert = %q, tls-key = %q, role = \"copilot\"}", ca, f.Cert, f.Key)
	}
	right := clients.Issue(t, certtest.Named("copilot"))
	gives(t, open(v, "vault-kv", settings(right, server.File)), "team-a", 0, key, 1)
	givesNot(t, open(v, "vault-kv", settings(clients.Issue(t, certtest.Named("somebody")), server.File)), "team-a", 0, kms.ErrForbidden, "does not let the broker log in")
	givesNot(t, open(v, "vault-kv", settings(server.Issue(t, certtest.Named("copilot")), server.File)), "team-a", 0, kms.ErrForbidden, "does not let the broker log in")
	givesNot(t, open(v, "vault-kv", settings(right, clients.File)), "team-a", 0, kms.ErrUnavailable, "certificate")
}
