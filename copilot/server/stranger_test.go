package server_test

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// TestStrangersOfAPublicIssuerAreOneCaller has somebody show one token after another, each
// with a subject of its own, as everybody can who has an account at a public issuer.
func TestStrangersOfAPublicIssuerAreOneCaller(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	issuer := newOIDCIssuer(t)
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File,
		Policy:      writeFile(t, filepath.Join(dir, "policy.toml"), tokenPolicy),
		Issuers: map[string]caller.Issuer{"cluster": {URL: issuer.URL, Audience: "copilot",
			CA: writeFile(t, filepath.Join(dir, "issuer.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw})))}},
	})
	const path = "/api/v2/keks/team-a/key?version=1"
	stranger := newRemote(t, address, ca, nil)
	stranger.client.Transport.(*http.Transport).DisableKeepAlives = false
	begin, before := time.Now(), len(audited(t, dir))
	counts := make(map[int]int)
	for n := range 500 {
		stranger.token = issuer.token(t, func(c *jwt.Claims) {
			c.Subject = fmt.Sprintf("repo:mallory/%d:ref:refs/heads/%s", n, strings.Repeat("x", 300))
		})
		status, _ := stranger.do(t, "GET", path, "")
		counts[status]++
	}
	took := time.Since(begin)
	// A hundred or so kinds of refusals have a line each.
	if lines, most := len(audited(t, dir))-before, 140+int(took/time.Second); lines > most || counts[403] == 0 || counts[403]+counts[429] != 500 {
		t.Errorf("%d lines, at most %d: %v", lines, most, counts)
	}
	if perSecond, burst := new(policy.Policy).Limit("cluster:x"); float64(burst)+took.Seconds()*perSecond < 500 && counts[429] == 0 {
		t.Errorf("500 requests in %s, and none was too many", took)
	}
	// A certificate's holder at the same address is another caller.
	files := ca.Issue(t, spiffe("/node/7"))
	newRemote(t, address, ca, &files).want(t, 200, "GET", path, "")
	// So is one that a rule names, once the address may send tokens again.
	stranger.token = issuer.token(t, nil)
	eventually(t, func() bool { status, _ := stranger.do(t, "GET", path, ""); return status == 200 })
}
