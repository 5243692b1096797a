package server_test

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestNoRenewalWhileARevocationMayBeLost has a node, for which a KEK was revoked that it need
// not use, renew its certificate after that KEK's record was put back, deleted or damaged.
func TestNoRenewalWhileARevocationMayBeLost(t *testing.T) {
	kek := []byte("revoked")
	for name, test := range map[string]struct {
		spoil  func(keks *bolt.Bucket, earlier []byte) error
		status int
		reason string
	}{
		"as it was":          {func(*bolt.Bucket, []byte) error { return nil }, 403, "the KEK revoked was revoked for"},
		"put back":           {func(keks *bolt.Bucket, earlier []byte) error { return keks.Put(kek, earlier) }, 403, "kek revoked: it is not as copilot has written it last"},
		"deleted":            {func(keks *bolt.Bucket, _ []byte) error { return keks.Delete(kek) }, 403, "kek revoked: its record was deleted"},
		"damaged":            {func(keks *bolt.Bucket, _ []byte) error { return keks.Put(kek, []byte("x")) }, 403, "kek revoked: KEK \"revoked\" is damaged"},
		"without revocation": {nil, 200, "certificate "},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			in := func(name string) string { return filepath.Join(dir, name) }
			create(t, dir, map[string][]byte{"team-a": nil, string(kek): nil})
			if test.spoil != nil {
				var earlier []byte
				records(t, dir, func(keks *bolt.Bucket) error {
					earlier = bytes.Clone(keks.Get(kek))
					return nil
				})
				keys := open(t, dir)
				if _, err := keys.Revoke(t.Context(), string(kek), "spiffe://example.com/node/worker-7"); err != nil {
					t.Fatal(err)
				}
				if err := keys.Close(); err != nil {
					t.Fatal(err)
				}
				records(t, dir, func(keks *bolt.Bucket) error { return test.spoil(keks, earlier) })
			}
			_, pair, body := requestRenewal(t, dir)
			address := loopbacktest.FreeAddress(t)
			serve(t, dir, server.Config{
				Listen: []string{address}, TLSCert: in("server.pem"), TLSKey: in("server-key.pem"), TLSClientCA: in("ca.pem"), NodeCA: in("ca.pem"), NodeCAKey: in("ca-key.pem"),
				Policy: writeFile(t, in("policy.toml"), "[[rule]]\nidentities = [\"spiffe://example.com/node/*\"]\nkeks = [\"team-a\"]\nactions = [\"export\"]\n"),
			})
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM([]byte(read(t, in("ca.pem"))))
			node := &remote{base: "https://" + address, client: http.Client{Transport: &http.Transport{
				DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}},
			}}}
			node.want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
			node.want(t, test.status, "POST", "/api/v2/certificate/renew", string(body))
			if e := lastAudited(t, dir); e.Action != "renew" || !strings.Contains(e.Reason, test.reason) {
				t.Errorf("audited %+v", e)
			}
		})
	}
}

// TestAdminsListNamesWhatCantBeUsed lists KEKs of which some records were put back, deleted or
// damaged, as the store's owner, as an admin, and as somebody who may use them.
func TestAdminsListNamesWhatCantBeUsed(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"good": nil, "put-back": nil, "deleted": nil, "damaged": nil})
	var earlier []byte
	records(t, dir, func(keks *bolt.Bucket) error {
		earlier = bytes.Clone(keks.Get([]byte("put-back")))
		return nil
	})
	keys := open(t, dir)
	if _, err := keys.Disable(t.Context(), "put-back", 0); err != nil {
		t.Fatal(err)
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	records(t, dir, func(keks *bolt.Bucket) error {
		return errors.Join(keks.Put([]byte("put-back"), earlier), keks.Delete([]byte("deleted")), keks.Put([]byte("damaged"), []byte("x")))
	})
	policy := filepath.Join(dir, "policy.toml")
	rule := func(action string) string {
		return fmt.Sprintf("[[rule]]\nidentities = [\"uid:%d\"]\nkeks = [\"**\"]\nactions = [%q]\n", os.Getuid(), action)
	}
	writeFile(t, policy, rule("export"))
	public := serve(t, dir, server.Config{Policy: policy})
	check := func(who, address string, want map[string]string) {
		t.Helper()
		var list []keyring.Info
		if _, answer := request(t, address, "GET", "/api/v2/keks", ""); json.Unmarshal([]byte(answer), &list) != nil || len(list) != len(want) {
			t.Errorf("%s: %s", who, answer)
		}
		for _, info := range list {
			if problem, ok := want[info.ID]; !ok || (info.Problem == "") != (problem == "") || !strings.Contains(info.Problem, problem) {
				t.Errorf("%s: %s: %q", who, info.ID, info.Problem)
			}
		}
	}
	all := map[string]string{"good": "", "put-back": "not as copilot has written it last", "deleted": "was deleted", "damaged": "is damaged"}
	check("owner", filepath.Join(dir, "admin.sock"), all)
	check("user", public, map[string]string{"good": "", "put-back": ""})
	writeFile(t, policy, rule("admin"))
	eventually(t, func() bool {
		_, answer := request(t, public, "GET", "/api/v2/keks", "")
		return strings.Contains(answer, "problem")
	})
	check("admin", public, all)
}

// records changes the records of a store that nothing has open.
func records(t *testing.T, dir string, change func(keks *bolt.Bucket) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "keks.db"), 0o600, &bolt.Options{Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bolt.Tx) error { return change(tx.Bucket([]byte("keks"))) }); err != nil {
		t.Fatal(err)
	}
}

// requestRenewal makes a CA in dir with a certificate for a broker, server.pem, and one for
// spiffe://example.com/node/worker-7, node.pem, and returns the latter with a
// request to renew it.
func requestRenewal(t *testing.T, dir string) (ca *pki.CA, pair tls.Certificate, body []byte) {
	t.Helper()
	ca, err := pki.Create(dir, "example.com", 240*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := ca.IssueServer([]string{"127.0.0.1"}, time.Hour, in("server.pem"), in("server-key.pem"), nil); err != nil {
		t.Fatal(err)
	}
	if err := ca.IssueClient(pki.Client{Path: "node/worker-7", Hold: time.Hour}, in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	if pair, err = tls.LoadX509KeyPair(in("node.pem"), in("node-key.pem")); err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	body, err = json.Marshal(map[string]string{"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))})
	if err != nil {
		t.Fatal(err)
	}
	return ca, pair, body
}
