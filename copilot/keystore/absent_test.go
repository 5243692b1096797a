package keystore_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
)

// keepingKMS has keys that it keeps, and counts its calls with the accesses to the store.
// What it wraps is not secret.
type keepingKMS struct{ accesses *keystore.Accesses }

func (k keepingKMS) Wrap(ctx context.Context, _ string, plaintext []byte) (int, []byte, error) {
	k.accesses.Add(ctx, "KMS wrap")
	return 1, plaintext, nil
}

func (k keepingKMS) Unwrap(ctx context.Context, _ string, _ int, wrapped []byte) ([]byte, error) {
	k.accesses.Add(ctx, "KMS unwrap")
	return bytes.Clone(wrapped), nil
}

func (keepingKMS) Close() error { return nil }

// givingKMS has keys that it gives out.
type givingKMS struct{ keepingKMS }

func (k givingKMS) Key(ctx context.Context, _ string, _ int) ([]byte, int, error) {
	k.accesses.Add(ctx, "KMS get")
	return make([]byte, keystore.KeySize), 1, nil
}

// TestBrokerTreatsDeniedKEKsAsAbsent sends a real broker each request of a caller whose
// policy allows it one KEK, about KEKs that exist and about one that doesn't. The answers
// are the same, and so is what the broker does with its store and KMSs, so that neither
// they nor the time that they take distinguish a denied KEK from an absent one.
func TestBrokerTreatsDeniedKEKsAsAbsent(t *testing.T) {
	accesses := keystore.CountAccesses(t)
	dir := t.TempDir()
	noSettings := func(b kms.Backend) func(kms.Settings) (kms.Backend, error) {
		return func(s kms.Settings) (kms.Backend, error) { return b, s(&struct{}{}) }
	}
	policy := filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(policy, fmt.Appendf(nil, "[[rule]]\nidentities = ['uid:%d']\nkeks = ['own-*']\nactions = ['wrap', 'unwrap', 'export']\n", os.Getuid()), 0o600); err != nil {
		t.Fatal(err)
	}
	conf := server.Config{
		Dir: dir, Database: "postgres://" + dir, AuditLog: filepath.Join(dir, "audit.log"), Policy: policy,
		KMS:      kms.Types{"keeps": noSettings(keepingKMS{accesses}), "gives": noSettings(givingKMS{keepingKMS{accesses}})},
		Backends: map[string]map[string]any{"keeps": {"type": "keeps"}, "gives": {"type": "gives"}},
		KEKs: map[string]keyring.Location{
			"own-kept": {Backend: "keeps", Path: "p"}, "kept": {Backend: "keeps", Path: "p"}, "given": {Backend: "gives", Path: "p"},
		},
	}
	owner, err := server.OpenKeys(t.Context(), conf)
	if err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("uid:%d", os.Getuid())
	for _, id := range []string{"own-stored", "stored", "revoked", "disabled"} {
		if _, err := owner.Create(t.Context(), id, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := owner.Revoke(t.Context(), "revoked", me); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"disabled", "given"} { // which makes a record of the KMS's
		if _, err := owner.Disable(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := owner.Close(); err != nil {
		t.Fatal(err)
	}
	socket := strings.TrimPrefix(servertest.Serve(t, conf), "unix://")
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}

	type answer struct {
		status       int
		header, body string
	}
	ask := func(operation, kek string) (a answer, did map[string]int) {
		t.Helper()
		method, rest, _ := strings.Cut(operation, " ")
		path, body, _ := strings.Cut(rest, " ")
		name := strings.NewReplacer("KEK", kek, "ORIGINAL", base64.URLEncoding.EncodeToString([]byte(`{"kek_id":"`+kek+`","kms_provider":"dev"}`)))
		req, err := http.NewRequest(method, "http://broker"+name.Replace(path), strings.NewReader(name.Replace(body)))
		if err != nil {
			t.Fatal(err)
		}
		accesses.Take()
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		request := resp.Header.Get("X-Request-Id") // which differs, as the date may
		resp.Header.Del("X-Request-Id")
		resp.Header.Del("Date")
		return answer{resp.StatusCode, fmt.Sprint(resp.Header), strings.ReplaceAll(string(b), request, "")}, accesses.Take()
	}

	const wrapped = `{"version":1,"method":"A256GCMKW","iv":"AAAAAAAAAAAAAAAA","wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}`
	operations := []string{
		"GET /api/v1/key/KEK", "GET /api/v1/key/ORIGINAL",
		"GET /api/v2/keks/KEK", "GET /api/v2/keks/KEK/key", "GET /api/v2/keks/KEK/key?version=1",
		`POST /api/v2/keks/KEK/wrap {"plaintext":"AAAA"}`, "POST /api/v2/keks/KEK/wrap", "POST /api/v2/keks/KEK/unwrap " + wrapped,
		`POST /api/v2/keks {"id":"KEK"}`, "POST /api/v2/keks/KEK/rotate", "POST /api/v2/keks/KEK/disable", "POST /api/v2/keks/KEK/enable",
		"POST /api/v2/keks/KEK/destroy", `POST /api/v2/keks/KEK/revoke {"identity":"uid:7"}`, `POST /api/v2/keks/KEK/reinstate {"identity":"uid:7"}`,
		"POST /api/v2/keks/KEK/check",
	}
	for _, operation := range operations {
		absent, nothing := ask(operation, "absent")
		if absent.status != http.StatusForbidden {
			t.Errorf("%s of a KEK that does not exist: %+v", operation, absent)
		}
		for _, kek := range []string{"stored", "revoked", "disabled", "kept", "given"} {
			if answer, did := ask(operation, kek); answer != absent || !maps.Equal(did, nothing) {
				t.Errorf("%s of the KEK %s: %+v, which took %v\nof one that does not exist: %+v, which took %v", operation, kek, answer, did, absent, nothing)
			}
		}
	}

	// What is allowed is counted, so the test would see the difference.
	for _, operation := range operations[2:] {
		if strings.HasPrefix(operation, "POST /api/v2/keks ") {
			break // the rest is for admins
		}
		for _, kek := range []string{"own-stored", "own-kept"} {
			if _, did := ask(operation, kek); len(did) == 0 {
				t.Errorf("%s of %s took nothing", operation, kek)
			}
		}
	}
	if _, did := ask(operations[5], "own-kept"); did["KMS wrap"] != 1 {
		t.Errorf("wrapping in a KMS took %v", did)
	}

	// A list names and reads what the caller may use, however many others there are.
	list, did := ask("GET /api/v2/keks", "")
	var keks []struct{ ID string }
	if err := json.Unmarshal([]byte(list.body), &keks); err != nil || len(keks) != 2 {
		t.Errorf("%v: %+v", err, list)
	}
	if want := (map[string]int{"list": 1, "get": 2, "wraps": 2}); !maps.Equal(did, want) {
		t.Errorf("a list took %v, want %v", did, want)
	}
}
