package server_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

const puller = "cluster:system:serviceaccount:prod:puller"

// nodePolicy lets pods of all nodes use team-a, and those of some nodes team-b.
const nodePolicy = `
[[rule]]
identities = ["` + puller + `"]
keks = ["team-a"]
actions = ["export"]
[[rule]]
identities = ["` + puller + `@node/gpu-*"]
keks = ["team-b"]
actions = ["export"]
[[rule]]
identities = ["` + puller + `@node/stolen"]
keks = ["**"]
actions = ["export"]
deny = true
[[limit]]
identities = ["` + puller + `"]
per-second = 0.0001
burst = 20
`

// serveNodes starts a broker for the pods of a cluster's nodes.
func serveNodes(t *testing.T, nodesURL string, issuer *oidcIssuer) (dir string, pod *remote) {
	t.Helper()
	dir = t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Policy:      writeFile(t, filepath.Join(dir, "policy.toml"), nodePolicy),
		Issuers: map[string]caller.Issuer{"cluster": {
			URL: issuer.URL, Audience: "copilot", NodesURL: nodesURL, TokenFile: writeFile(t, filepath.Join(dir, "token"), "its own"),
			CA: writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw}))),
		}},
	})
	return dir, newRemote(t, address, ca, nil)
}

const (
	keyA = "/api/v2/keks/team-a/key?version=1"
	keyB = "/api/v2/keks/team-b/key?version=1"
)

func TestTokenOfANodeHasAnIdentityOfItsOwn(t *testing.T) {
	issuer := newOIDCIssuer(t)
	issuer.bearer = "Bearer its own"
	dir, pod := serveNodes(t, "", issuer)
	for _, test := range []struct {
		node, who string
		a, b      int
	}{
		{"worker-7", puller + "@node/worker-7", 200, 403},
		{"gpu-1.example.com", puller + "@node/gpu-1.example.com", 200, 200},
		{"stolen", puller + "@node/stolen", 403, 403},
		{"", puller, 200, 403}, // Kubernetes before 1.30
	} {
		pod.token = issuer.nodeToken(t, test.node, nil)
		pod.want(t, test.a, "GET", keyA, "")
		if e := lastAudited(t, dir); e.Who != test.who {
			t.Errorf("%q: audited %+v", test.node, e)
		}
		pod.want(t, test.b, "GET", keyB, "")
	}
	for _, node := range []string{"Worker-7", "worker-7/x", "-", "a..b", "worker-7\n", "*", strings.Repeat("x", 254)} {
		pod.token = issuer.nodeToken(t, node, nil)
		if answer := pod.want(t, 401, "GET", keyA, ""); !strings.Contains(answer, "with the name of a node") {
			t.Errorf("%q: %s", node, answer)
		}
	}
	// An issuer can't have a subject that looks like another node's.
	for _, node := range []string{"", "worker-8"} {
		pod.token = issuer.nodeToken(t, node, func(c *jwt.Claims) { c.Subject += "@node/gpu-1" })
		if answer := pod.want(t, 401, "GET", keyB, ""); !strings.Contains(answer, "it has an @") {
			t.Error(answer)
		}
	}
	// Only a service account's token has a node.
	pod.token = issuer.nodeToken(t, "gpu-1", func(c *jwt.Claims) { c.Subject = "puller" })
	pod.want(t, 403, "GET", keyB, "")
	if e := lastAudited(t, dir); e.Who != "cluster:puller" {
		t.Errorf("audited %+v", e)
	}
}

func TestNodesAreLimitedAndRevokedOneByOne(t *testing.T) {
	issuer := newOIDCIssuer(t)
	issuer.bearer = "Bearer its own"
	dir, pod := serveNodes(t, "", issuer)
	as := func(node string) { pod.token = issuer.nodeToken(t, node, nil) }
	as("worker-7")
	for range 20 { // the burst
		pod.want(t, 200, "GET", keyA, "")
	}
	pod.want(t, 429, "GET", keyA, "")
	as("worker-8")
	pod.want(t, 200, "GET", keyA, "")

	admin := "unix://" + filepath.Join(dir, "admin.sock")
	revoke := func(verb, identity string, want int) {
		t.Helper()
		if status, answer := request(t, admin, "POST", "/api/v2/keks/team-a/"+verb, `{"identity":"`+identity+`"}`); status != want {
			t.Errorf("%s %s: %d %s", verb, identity, status, answer)
		}
	}
	revoke("revoke", puller+"@node/worker-8", 200)
	revoke("revoke", puller+"@worker-8", 400)
	pod.want(t, 403, "GET", keyA, "")
	as("worker-9")
	pod.want(t, 200, "GET", keyA, "")
	revoke("revoke", puller, 200)
	pod.want(t, 403, "GET", keyA, "")
	if e := lastAudited(t, dir); e.Reason != "the KEK was revoked for "+puller {
		t.Errorf("audited %+v", e)
	}
	revoke("reinstate", puller, 200)
	pod.want(t, 200, "GET", keyA, "")
	as("worker-8")
	pod.want(t, 403, "GET", keyA, "")
}

// TestTokenOfANodeIsAcceptedFromItsAddressesOnly has nodes whose addresses are the test's
// own or not.
func TestTokenOfANodeIsAcceptedFromItsAddressesOnly(t *testing.T) {
	issuer := newOIDCIssuer(t)
	issuer.bearer = "Bearer its own"
	var down atomic.Int32 // a status
	type object map[string]any
	addresses := func(list ...string) (all []object) {
		for _, a := range list {
			all = append(all, object{"type": "InternalIP", "address": a})
		}
		return all
	}
	found := map[string]object{
		"here":      {"status": object{"addresses": addresses("here.example.com", "192.0.2.7", "127.0.0.1")}},
		"pods-here": {"spec": object{"podCIDRs": []string{"127.0.0.0/24"}}, "status": object{"addresses": addresses("192.0.2.8")}},
		"elsewhere": {"spec": object{"podCIDRs": []string{"10.88.0.0/24", "fd00::/64"}}, "status": object{"addresses": addresses("192.0.2.9", "2001:db8::1")}},
		"nowhere":   {},
		"broken":    {"spec": object{"podCIDRs": []string{"x"}}},
	}
	plain := issuer.Server.Config.Handler
	issuer.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, "/api/v1/nodes/")
		switch {
		case !ok || r.Header.Get("Authorization") != issuer.bearer:
			plain.ServeHTTP(w, r)
		case down.Load() == http.StatusFound:
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		case down.Load() != 0:
			http.Error(w, "no", int(down.Load()))
		case found[name] == nil:
			http.NotFound(w, r)
		default:
			json.NewEncoder(w).Encode(found[name])
		}
	})
	dir, pod := serveNodes(t, issuer.URL+"/api/v1/nodes", issuer)
	as := func(node string) { pod.token = issuer.nodeToken(t, node, nil) }
	for status, reason := range map[int]string{http.StatusForbidden: "copilot may not get nodes", http.StatusFound: "302", http.StatusBadGateway: "502"} {
		down.Store(int32(status))
		as(fmt.Sprint("node-", status))
		if answer := pod.want(t, 503, "GET", keyA, ""); !strings.Contains(answer, "can't fetch the addresses of the token's node") || strings.Contains(answer, issuer.URL) {
			t.Error(answer)
		}
		if e := lastAudited(t, dir); !strings.Contains(e.Reason, reason) {
			t.Errorf("audited %+v", e)
		}
	}
	down.Store(0)
	for node, want := range map[string]int{"here": 200, "pods-here": 200, "elsewhere": 401, "nowhere": 401, "gone": 401, "broken": 503, "": 200} {
		as(node)
		answer := pod.want(t, want, "GET", keyA, "")
		if node == "elsewhere" && !strings.Contains(answer, "the token is for node elsewhere, and 127.0.0.1 is not one of its addresses") {
			t.Error(answer)
		}
	}
}

// TestServiceAccountIsOneAdminOnAllNodes has a service account approve on one node what it has
// asked for on another.
func TestServiceAccountIsOneAdminOnAllNodes(t *testing.T) {
	issuer := newOIDCIssuer(t)
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	pod := newRemote(t, serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Policy:      writeFile(t, filepath.Join(dir, "policy.toml"), "[[rule]]\nidentities = [\"cluster:system:serviceaccount:prod:*\"]\nkeks = [\"**\"]\nactions = [\"admin\"]\n"),
		Approvals:   server.Approvals{Require: []string{"destroy"}},
		Issuers: map[string]caller.Issuer{"cluster": {
			URL: issuer.URL, Audience: "copilot",
			CA: writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw}))),
		}},
	}), ca, nil)
	pod.token = issuer.nodeToken(t, "worker-7", nil)
	asked := pod.want(t, 403, "POST", "/api/v2/keks/team-a/destroy", "{}")
	_, id, _ := strings.Cut(asked, "approvals approve ")
	id, _, _ = strings.Cut(id, "\\")
	approve := "/api/v2/approvals/" + id + "/approve"
	pod.token = issuer.nodeToken(t, "worker-8", nil)
	if answer := pod.want(t, 409, "POST", approve, ""); !strings.Contains(answer, "somebody else has to approve it") {
		t.Errorf("approved by itself: %s", answer)
	}
	pod.token = issuer.nodeToken(t, "worker-8", func(c *jwt.Claims) { c.Subject = "system:serviceaccount:prod:other" })
	pod.want(t, 200, "POST", approve, "")
}
