package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// vaultServer is a Vault with an engine of each kind, and what its
// administrator does.
type vaultServer struct {
	t       testing.TB
	dir     string
	url     string
	process *process
	*api.Client
}

func newVault(t testing.TB) *vaultServer {
	t.Helper()
	v := &vaultServer{t: t, dir: tempDir(t)}
	v.url = "unix://" + v.dir + "/vault.sock"
	v.start()
	v.connect(&api.Config{Address: v.url})
	v.engines()
	return v
}

// newOpenBao is newVault with OpenBao, which keeps its storage in memory.
func newOpenBao(t testing.TB) *vaultServer {
	t.Helper()
	bao := filepath.Join(tools, "bin/bao")
	if _, err := os.Stat(bao); err != nil {
		t.Fatalf("OpenBao is missing: install it with \"scripts/install-tools.sh %s\"", tools)
	}
	v := &vaultServer{t: t, dir: tempDir(t)}
	v.url = "unix://" + v.dir + "/vault.sock"
	conf := write(t, v.dir+"/openbao.hcl", fmt.Sprintf("storage \"inmem\" {}\nlistener \"unix\" { address = %q }\nlog_level = \"warn\"\n", v.dir+"/vault.sock"))
	v.process = start(t, v.dir, "openbao", exec.Command(bao, "server", "-config", conf))
	await(t, "OpenBao", answers(v.dir+"/vault.sock"))
	write(t, v.dir+"/root-token", "") // there is none yet
	v.connect(&api.Config{Address: v.url})
	init, err := v.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Sys().Unseal(init.Keys[0]); err != nil {
		t.Fatal(err)
	}
	write(t, v.dir+"/root-token", init.RootToken)
	v.SetToken(init.RootToken)
	v.engines()
	return v
}

// eachVault runs a test with Vault and with OpenBao.
func eachVault(t *testing.T, test func(*testing.T, *vaultServer)) {
	t.Parallel()
	t.Run("Vault", func(t *testing.T) { test(t, newVault(t)) })
	t.Run("OpenBao", func(t *testing.T) { test(t, newOpenBao(t)) })
}

// start starts the server, with more flags of vault-dev.
func (v *vaultServer) start(flags ...string) {
	v.t.Helper()
	socket := strings.TrimPrefix(v.url, "unix://")
	v.process = start(v.t, v.dir, "vault-dev", exec.Command("vault-dev", append([]string{"-dir", v.dir, "-listen", "unix:" + socket}, flags...)...))
	await(v.t, "vault-dev", answers(socket))
}

func (v *vaultServer) connect(conf *api.Config) {
	v.t.Helper()
	var err error
	if v.Client, err = api.NewClient(conf); err != nil {
		v.t.Fatal(err)
	}
	v.SetToken(read(v.t, v.dir+"/root-token"))
}

func (v *vaultServer) engines() {
	v.t.Helper()
	v.write("sys/mounts/secret", `{"type": "kv", "options": {"version": "2"}}`)
	v.write("sys/mounts/transit", `{"type": "transit"}`)
	// The engine is busy for a moment after it was made.
	await(v.t, "key-value engine", func() error {
		_, err := v.Logical().Write("secret/config", map[string]any{"max_versions": 0})
		return err
	})
}

func (v *vaultServer) write(path, body string) *api.Secret {
	v.t.Helper()
	s, err := v.Logical().WriteBytes(path, []byte(body))
	if err != nil {
		v.t.Fatal(err)
	}
	return s
}

func (v *vaultServer) delete(path string) {
	v.t.Helper()
	if _, err := v.Logical().Delete(path); err != nil {
		v.t.Fatal(err)
	}
}

// put writes a new key to a secret, and returns it.
func (v *vaultServer) put(secret string) []byte {
	v.t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	v.write("secret/data/"+secret, fmt.Sprintf(`{"data": {"kek": %q, "owner": "team", "number": 17}}`, base64.StdEncoding.EncodeToString(key)))
	return key
}

// policy makes the policies of docs/kms.md that begin with those comments, and
// returns their names as JSON.
func (v *vaultServer) policy(comments ...string) string {
	v.t.Helper()
	doc := read(v.t, repo+"/docs/kms.md")
	var names []string
	for _, comment := range comments {
		_, rest, ok := strings.Cut(doc, "```hcl\n# "+comment+"\n")
		hcl, _, _ := strings.Cut(rest, "```")
		if !ok {
			v.t.Fatalf("docs/kms.md has no policy for %s", comment)
		}
		name := strings.ReplaceAll(comment, ", ", "-")
		if err := v.Sys().PutPolicy(name, hcl); err != nil {
			v.t.Fatal(err)
		}
		names = append(names, name)
	}
	b, _ := json.Marshal(names)
	return string(b)
}

// token returns the settings for a new token with those policies.
func (v *vaultServer) token(comments ...string) string {
	v.t.Helper()
	s := v.write("auth/token/create", fmt.Sprintf(`{"policies": %s, "ttl": "1h"}`, v.policy(comments...)))
	return fmt.Sprintf("token-file = %q\n", write(v.t, tempDir(v.t)+"/token", s.Auth.ClientToken+"\n"))
}

// appRole returns the settings for a role with those policies whose tokens
// are good for a time.
func (v *vaultServer) appRole(ttl string, comments ...string) (settings, secretIDFile string) {
	v.t.Helper()
	v.write("sys/auth/approle", `{"type": "approle"}`)
	v.write("auth/approle/role/copilot", fmt.Sprintf(`{"token_policies": %s, "token_ttl": %q, "token_max_ttl": %[2]q}`, v.policy(comments...), ttl))
	role, err := v.Logical().Read("auth/approle/role/copilot/role-id")
	if err != nil {
		v.t.Fatal(err)
	}
	secretIDFile = write(v.t, tempDir(v.t)+"/secret-id", v.secretID())
	return fmt.Sprintf("approle = {role-id = %q, secret-id-file = %q}\n", role.Data["role_id"], secretIDFile), secretIDFile
}

func (v *vaultServer) secretID() string {
	v.t.Helper()
	return v.write("auth/approle/role/copilot/secret-id", "{}").Data["secret_id"].(string)
}

func (v *vaultServer) open(kind, settings string) kms.Backend {
	v.t.Helper()
	b, err := kms.Open(kind, func(s any) error {
		return toml.NewDecoder(strings.NewReader(fmt.Sprintf("address = %q\n%s", v.url, settings))).DisallowUnknownFields().Decode(s)
	})
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { b.Close() })
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
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestVaultGivesKeys(t *testing.T) { eachVault(t, testVaultGivesKeys) }

func testVaultGivesKeys(t *testing.T, v *vaultServer) {
	keys := [][]byte{nil, v.put("team-a"), v.put("team-a"), v.put("team-a"), v.put("team-a")}
	v.put("team-x")
	b := v.open("vault-kv", v.token("vault-kv"))
	gives(t, b, "team-a", 0, keys[4], 4)
	for version := 1; version <= 4; version++ {
		gives(t, b, "secret/data/team-a", version, keys[version], version)
	}
	givesNot(t, b, "team-a", 5, kms.ErrNotFound, "there is no version 5")
	givesNot(t, b, "team-x", 0, kms.ErrForbidden, "permission denied", `path "secret/data/team-x" { capabilities = ["read"] }`)

	v.write("secret/delete/team-a", `{"versions": [1]}`)
	givesNot(t, b, "team-a", 1, kms.ErrNotFound, "version 1 was deleted")
	v.write("secret/undelete/team-a", `{"versions": [1]}`)
	gives(t, b, "team-a", 1, keys[1], 1)
	v.write("secret/destroy/team-a", `{"versions": [2]}`)
	givesNot(t, b, "team-a", 2, kms.ErrNotFound, "version 2 was destroyed")
	v.delete("secret/data/team-a")
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, "version 4 was deleted")
	v.delete("secret/metadata/team-a")
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, "there is no such secret")

	v.write("secret/data/team-a", `{"data": {"kek": "c2hvcnQ="}}`)
	givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "5 bytes")
	v.write("secret/data/team-a", `{"data": {"KEK": "c2hvcnQ="}}`)
	givesNot(t, b, "team-a", 0, kms.ErrNotFound, `version 2 has no field "kek"`)

	b = v.open("vault-kv", fmt.Sprintf("token-file = %q", write(t, tempDir(t)+"/token", "hvs.wrong")))
	givesNot(t, b, "team-a", 0, kms.ErrForbidden, "permission denied", "has expired, was revoked, or is not of this server")
	root := fmt.Sprintf("token-file = %q\n", v.dir+"/root-token")
	givesNot(t, v.open("vault-kv", root+`mount = "nowhere"`), "team-a", 0, kms.ErrNotFound, "no handler for route")

	v.write("sys/mounts/old", `{"type": "kv", "options": {"version": "1"}}`)
	v.write("old/team-a", `{"kek": "c2hvcnQ="}`)
	givesNot(t, v.open("vault-kv", root+`mount = "old"`), "team-a", 0, kms.ErrNotFound, "no key-value engine of version 2")
}

func TestVaultRotatesKeys(t *testing.T) { eachVault(t, testVaultRotatesKeys) }

func testVaultRotatesKeys(t *testing.T, v *vaultServer) {
	first := v.put("team-a")
	isRotator := func(b kms.Backend) kms.Rotator { return b.(kms.Rotator) }

	_, err := isRotator(v.open("vault-kv", v.token("vault-kv"))).Rotate(within(t), "team-a")
	isKMSError(t, err, kms.ErrForbidden, "secret/metadata/team-a")
	b := v.open("vault-kv", v.token("vault-kv, rotating"))
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
	var mu sync.Mutex
	var versions []int
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			version, err := isRotator(b).Rotate(within(t), "team-a")
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
	v.write("secret/metadata/team-a", `{"max_versions": 11}`)
	if got, err := isRotator(b).Rotate(within(t), "team-a"); err != nil || got != 11 {
		t.Errorf("version %d, %v", got, err)
	}
	v.write("secret/destroy/team-a", `{"versions": [1]}`)
	if got, err := isRotator(b).Rotate(within(t), "team-a"); err != nil || got != 12 {
		t.Errorf("version %d, %v", got, err)
	}
	gives(t, b, "team-a", 2, second, 2)

	v.delete("secret/data/team-a")
	_, err = isRotator(b).Rotate(within(t), "team-a")
	isKMSError(t, err, kms.ErrNotFound, "version 12 was deleted")
	_, err = isRotator(v.open("vault-kv", fmt.Sprintf("token-file = %q", v.dir+"/root-token"))).Rotate(within(t), "team-b")
	isKMSError(t, err, kms.ErrNotFound, "there is no such secret")
}

func TestVaultTransit(t *testing.T) { eachVault(t, testVaultTransit) }

func testVaultTransit(t *testing.T, v *vaultServer) {
	v.write("transit/keys/team-b", "{}")
	v.write("transit/keys/other", "{}")
	root := v.open("vault-transit", fmt.Sprintf("token-file = %q", v.dir+"/root-token")).(kms.Wrapper)
	b := v.open("vault-transit", v.token("vault-transit"))
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
	r := v.open("vault-transit", v.token("vault-transit", "vault-transit, rotating")).(kms.Rotator)
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

	var mu sync.Mutex
	var versions []int
	var wg sync.WaitGroup
	for range 4 {
		// Of several copilots. OpenBao refuses some with "transaction commit failed".
		r := v.open("vault-transit", v.token("vault-transit", "vault-transit, rotating")).(kms.Rotator)
		wg.Go(func() {
			version, err := r.Rotate(within(t), "team-b")
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

	v.write("transit/keys/team-b/config", `{"min_decryption_version": 2}`)
	refuses(w, "team-b", 1, first, kms.ErrNotFound, "too old")
	unwraps(2, second)

	// A key that nobody made is not made by a typing error.
	_, _, err = v.open("vault-transit", v.token("vault-transit")).(kms.Wrapper).Wrap(within(t), "team-c", key)
	isKMSError(t, err, kms.ErrForbidden, `path "transit/encrypt/team-c"`, "no such key")
	refuses(root, "team-c", 1, first, kms.ErrNotFound)
	v.write("transit/keys/team-b/config", `{"deletion_allowed": true}`)
	v.delete("transit/keys/team-b")
	refuses(w, "team-b", 2, second, kms.ErrNotFound)
	_, _, err = w.Wrap(within(t), "team-b", key)
	isKMSError(t, err, kms.ErrForbidden, "there is no such key")
	_, err = r.Rotate(within(t), "team-b")
	isKMSError(t, err, kms.ErrNotFound, "key not found")

	v.write("transit/keys/signs", `{"type": "ed25519"}`)
	_, _, err = root.Wrap(within(t), "signs", key)
	isKMSError(t, err, kms.ErrUnavailable, "not supported")
}

// TestVaultLogsInAgain has tokens that end after two seconds, and then some that
// are revoked.
func TestVaultLogsInAgain(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	key := v.put("team-a")
	settings, secretIDFile := v.appRole("2s", "vault-kv")
	b := v.open("vault-kv", settings)
	for range 12 {
		gives(t, b, "team-a", 0, key, 1)
		time.Sleep(500 * time.Millisecond)
	}

	v.write("auth/approle/role/copilot", `{"token_ttl": "1h", "token_max_ttl": "1h"}`)
	time.Sleep(2 * time.Second)
	gives(t, b, "team-a", 0, key, 1)
	v.write("sys/leases/revoke-prefix/auth/approle/login", "{}")
	gives(t, b, "team-a", 0, key, 1)
	write(t, secretIDFile, "wrong")
	v.write("sys/leases/revoke-prefix/auth/approle/login", "{}")
	givesNot(t, b, "team-a", 0, kms.ErrForbidden, "auth/approle/login", "does not let the broker log in")
	write(t, secretIDFile, v.secretID())
	gives(t, b, "team-a", 0, key, 1)
}

// TestVaultTokenEnds has tokens that were revoked, beside policies that deny
// something: only the first call for a new token.
func TestVaultTokenEnds(t *testing.T) {
	eachVault(t, func(t *testing.T, v *vaultServer) {
		key := v.put("team-a")
		v.put("denied")
		settings, _ := v.appRole("1h", "vault-kv")
		// Tokens without the policy "default" may not look themselves up.
		for _, alone := range []bool{false, true} {
			v.write("auth/approle/role/copilot", fmt.Sprintf(`{"token_no_default_policy": %v}`, alone))
			b := v.open("vault-kv", settings)
			for range 3 {
				gives(t, b, "team-a", 0, key, 1)
				v.write("sys/leases/revoke-prefix/auth/approle/login", "{}")
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
			v.write("sys/leases/revoke-prefix/auth/approle/login", "{}")
		}

		created := v.write("auth/token/create", fmt.Sprintf(`{"policies": %s, "ttl": "1h"}`, v.policy("vault-kv"))).Auth
		file := write(t, tempDir(t)+"/token", created.ClientToken)
		b := v.open("vault-kv", fmt.Sprintf("token-file = %q\n", file))
		w := v.open("vault-transit", fmt.Sprintf("token-file = %q\n", file)).(kms.Wrapper)
		gives(t, b, "team-a", 0, key, 1)
		givesNot(t, b, "denied", 0, kms.ErrForbidden, "the policy of the broker's token needs")
		v.write("auth/token/revoke", fmt.Sprintf(`{"token": %q}`, created.ClientToken))
		hint := "the token in " + file + " has expired, was revoked, or is not of this server: put a new one there"
		givesNot(t, b, "team-a", 0, kms.ErrForbidden, hint)
		if _, _, err := w.Wrap(within(t), "team-b", key); err == nil || !strings.HasSuffix(err.Error(), hint) {
			t.Errorf("wrap with a revoked token: %v", err)
		}
	})
}

// TestVaultRenewsToken: one that would end after six seconds.
func TestVaultRenewsToken(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	key := v.put("team-a")
	s := v.write("auth/token/create", fmt.Sprintf(`{"policies": %s, "period": "6s"}`, v.policy("vault-kv")))
	b := v.open("vault-kv", fmt.Sprintf("token-file = %q", write(t, tempDir(t)+"/token", s.Auth.ClientToken)))
	for range 5 {
		gives(t, b, "team-a", 0, key, 1)
		time.Sleep(3 * time.Second)
	}
}

func TestVaultIsStopped(t *testing.T) {
	t.Parallel()
	v := newVault(t)
	key := v.put("team-a")
	v.write("transit/keys/team-b", "{}")
	settings, _ := v.appRole("1h", "vault-kv", "vault-transit")
	kv, transit := v.open("vault-kv", settings), v.open("vault-transit", settings).(kms.Wrapper)
	gives(t, kv, "team-a", 0, key, 1)
	_, wrapped, err := transit.Wrap(within(t), "team-b", key)
	if err != nil {
		t.Fatal(err)
	}

	v.process.stop(t)
	late := v.open("vault-kv", settings) // opens all the same
	for _, b := range []kms.Backend{kv, late} {
		givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "the Vault at "+v.url)
	}
	_, err = transit.Unwrap(within(t), "team-b", 1, wrapped)
	isKMSError(t, err, kms.ErrUnavailable)

	v.start("-sealed")
	for _, b := range []kms.Backend{kv, late} {
		givesNot(t, b, "team-a", 0, kms.ErrUnavailable, "Vault is sealed: unseal it")
	}
	_, err = transit.Unwrap(within(t), "team-b", 1, wrapped)
	isKMSError(t, err, kms.ErrUnavailable, "unseal it")
	v.process.stop(t)

	v.start()
	for _, b := range []kms.Backend{kv, late} {
		gives(t, b, "team-a", 0, key, 1)
	}
	if got, err := transit.Unwrap(within(t), "team-b", 1, wrapped); err != nil || !bytes.Equal(got, key) {
		t.Errorf("the same: %v, %v", bytes.Equal(got, key), err)
	}

	// One that hangs.
	defer v.process.pause(t)()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, _, err = kv.(kms.Giver).Key(ctx, "team-a", 0)
	isKMSError(t, err, kms.ErrUnavailable, "deadline exceeded")
	if took := time.Since(began); took > patience/2 {
		t.Errorf("after %v", took)
	}
}

// TestVaultTLS logs in with a client certificate.
func TestVaultTLS(t *testing.T) {
	t.Parallel()
	server, clients := certtest.NewAuthority(t), certtest.NewAuthority(t)
	files := server.Issue(t, certtest.Named("vault"))
	v := &vaultServer{t: t, dir: tempDir(t)}
	address := loopbacktest.FreeAddress(t)
	v.process = start(t, v.dir, "vault-dev", exec.Command("vault-dev", "-dir", v.dir, "-listen", address, "-tls-cert", files.Cert, "-tls-key", files.Key))
	await(t, "vault-dev", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	v.url = "https://" + address
	conf := api.DefaultConfig()
	conf.Address = v.url
	if err := conf.ConfigureTLS(&api.TLSConfig{CACert: server.File}); err != nil {
		t.Fatal(err)
	}
	v.connect(conf)
	v.engines()
	key := v.put("team-a")
	v.write("sys/auth/cert", `{"type": "cert"}`)
	b, _ := json.Marshal(read(t, clients.File))
	v.write("auth/cert/certs/copilot", fmt.Sprintf(`{"certificate": %s, "allowed_common_names": "copilot", "token_policies": %s}`, b, v.policy("vault-kv")))

	settings := func(f certtest.Files, ca string) string {
		return fmt.Sprintf("ca = %q\ncert = {tls-cert = %q, tls-key = %q, role = \"copilot\"}", ca, f.Cert, f.Key)
	}
	right := clients.Issue(t, certtest.Named("copilot"))
	gives(t, v.open("vault-kv", settings(right, server.File)), "team-a", 0, key, 1)
	givesNot(t, v.open("vault-kv", settings(clients.Issue(t, certtest.Named("somebody")), server.File)), "team-a", 0, kms.ErrForbidden, "does not let the broker log in")
	givesNot(t, v.open("vault-kv", settings(server.Issue(t, certtest.Named("copilot")), server.File)), "team-a", 0, kms.ErrForbidden, "does not let the broker log in")
	givesNot(t, v.open("vault-kv", settings(right, clients.File)), "team-a", 0, kms.ErrUnavailable, "certificate")
}
