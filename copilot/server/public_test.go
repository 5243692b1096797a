package server_test

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// signing returns the settings of a broker in dir that signs public halves of KEKs, and
// the CA of what it signs with.
func signing(t testing.TB, dir string) (server.Config, *x509.CertPool) {
	t.Helper()
	ca, err := pki.Create(dir, "example.com", 24*time.Hour)
	if err == nil {
		err = ca.IssueSigner(dir, time.Hour, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	roots, err := certfile.Pool(filepath.Join(dir, pki.CertFile))
	if err != nil {
		t.Fatal(err)
	}
	return server.Config{PublicKeysCert: filepath.Join(dir, pki.SignerCertFile), PublicKeysKey: filepath.Join(dir, pki.SignerKeyFile)}, roots
}

// TestBrokerUnwrapsForItsPublicKeys has the broker unwrap what was wrapped for the public
// half of each version of a KEK, as long as that exists.
func TestBrokerUnwrapsForItsPublicKeys(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil, "short": make([]byte, 16)})
	conf, roots := signing(t, dir)
	url := serve(t, dir, conf)
	keys, err := server.OpenKeys(t.Context(), server.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	c, err := client.New(client.Config{URLs: []string{url}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	const plaintext = "a layer key"
	var wrapped []client.Wrapped
	for version := 1; version <= 2; version++ {
		answer, err := keys.Public(t.Context(), "team-a", 0)
		if err != nil {
			t.Fatal(err)
		}
		f, err := publickek.Parse([]byte(answer.File))
		if err != nil {
			t.Fatal(err)
		}
		public, err := f.Verify(roots, time.Now())
		if err != nil || public.ID != "team-a" || public.Version != version || f.Broker != "spiffe://example.com/copilot/public-keys" || f.Broker != answer.Broker {
			t.Fatalf("%+v: %v", answer, err)
		}
		if left := time.Until(f.Expires); left > time.Hour || left < 50*time.Minute {
			t.Errorf("it expires in %s, and its signer in an hour", left)
		}
		a, err := public.Wrap([]byte(plaintext))
		if err != nil {
			t.Fatal(err)
		}
		wrapped = append(wrapped, client.Wrapped{Version: a.KEKVersion, Method: a.Method, Enc: a.Enc, Key: a.WrappedKey})
		if _, err := keys.Rotate(t.Context(), "team-a"); err != nil {
			t.Fatal(err)
		}
	}
	for i, w := range wrapped {
		if got, err := c.Unwrap(t.Context(), "team-a", w); err != nil || string(got) != plaintext {
			t.Errorf("version %d: %q, %v", i+1, got, err)
		}
	}
	for name, change := range map[string]func(*client.Wrapped) string{
		"another KEK":         func(*client.Wrapped) string { return "team-b" },
		"another version":     func(w *client.Wrapped) string { w.Version = 2; return "team-a" },
		"another method":      func(w *client.Wrapped) string { w.Method = wireformat.MethodA256GCMKW; return "team-a" },
		"no encapsulated key": func(w *client.Wrapped) string { w.Enc = nil; return "team-a" },
		"an iv":               func(w *client.Wrapped) string { w.IV = make([]byte, 12); return "team-a" },
		"cut":                 func(w *client.Wrapped) string { w.Enc = w.Enc[1:]; return "team-a" },
		"changed":             func(w *client.Wrapped) string { w.Key[0] ^= 1; return "team-a" },
		"a KEK of 16 bytes":   func(*client.Wrapped) string { return "short" },
	} {
		w := wrapped[0]
		w.Key = append([]byte{}, w.Key...)
		id := change(&w)
		if got, err := c.Unwrap(t.Context(), id, w); !errors.Is(err, client.ErrRejected) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := keys.Destroy(t.Context(), "team-a", 1, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Unwrap(t.Context(), "team-a", wrapped[0]); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("after it was destroyed: %v", err)
	}
}

// TestPublicKeysTakeTheirOwnRight gives one caller the right, another all except that, and
// has a third administer.
func TestPublicKeysTakeTheirOwnRight(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil, "team-c": nil})
	conf, _ := signing(t, dir)
	conf.Policy = filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(conf.Policy, []byte(`
[[rule]]
identities = ["uid:*"]
keks = ["team-a"]
actions = ["public"]
[[rule]]
identities = ["uid:*"]
keks = ["team-b"]
actions = ["wrap", "unwrap", "export"]
[[rule]]
identities = ["uid:*"]
keks = ["team-c"]
actions = ["admin"]
`), 0o600); err != nil {
		t.Fatal(err)
	}
	url := serve(t, dir, conf)
	for kek, want := range map[string]int{"team-a": 200, "team-b": 403, "team-c": 200, "nobody": 403} {
		if status, answer := request(t, url, "GET", "/api/v2/keks/"+kek+"/public", ""); status != want {
			t.Errorf("%s: %d %s", kek, status, answer)
		}
	}
	if status, _ := request(t, url, "GET", "/api/v2/keks/team-a/key", ""); status != 403 {
		t.Errorf("with the right public, the KEK itself: %d", status)
	}
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(b)) {
		var e struct{ Action, KEK, Verdict, Reason string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		found = found || e.Action == "public" && e.KEK == "team-a" && e.Verdict == "allowed" && strings.HasPrefix(e.Reason, "valid until 20")
	}
	if !found {
		t.Errorf("the audit log does not have it: %s", b)
	}
}

func TestBrokerWithoutASignerGivesOutNoPublicKeys(t *testing.T) {
	fipstest.Refused(t, fipstest.HPKE)
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	url := serve(t, dir, server.Config{})
	if status, answer := request(t, url, "GET", "/api/v2/keks/team-a/public", ""); status != 409 || !strings.Contains(answer, "copilot certs public-keys") {
		t.Errorf("%d %s", status, answer)
	}
}
