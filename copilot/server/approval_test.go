package server

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// TestStoresOwnerIsOneAdmin has those who can get at the store make requests, and approve
// them, as several users and on several sockets. Other users can approve theirs, and they
// those of others.
func TestStoresOwnerIsOneAdmin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	dir := t.TempDir()
	policy := filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(policy, []byte("[[rule]]\nidentities = [\"uid:*\"]\nkeks = [\"**\"]\nactions = [\"admin\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, local := localBroker(t, Config{Dir: dir, Policy: policy, Approvals: Approvals{Require: []string{"destroy"}}})
	if _, err := local.Create(t.Context(), "team-a", nil); err != nil {
		t.Fatal(err)
	}
	users := map[int]context.Context{0: withUser(t, t.Context(), 0), 997: withUser(t, t.Context(), 997), 1000: withUser(t, t.Context(), 1000)}
	over := func(api http.Handler, uid int) func(path, body string) string {
		return func(path, body string) string {
			w := httptest.NewRecorder()
			api.ServeHTTP(w, httptest.NewRequest(http.MethodPost, path, strings.NewReader(body)).WithContext(users[uid]))
			return w.Body.String()
		}
	}
	admin, public := newAdminAPI(b), newAPI(b)
	inStore := func(path, body string) (answer string) {
		id, isApproval := strings.CutPrefix(path, "/api/v2/approvals/")
		if isApproval {
			r, err := local.Approve(t.Context(), strings.TrimSuffix(id, "/approve"))
			return fmt.Sprintf(`"approved":"%s" %v`, r.Approved, err)
		}
		var after time.Duration
		fmt.Sscanf(body, `{"afterSeconds":%d}`, &after)
		_, err := local.Destroy(t.Context(), "team-a", 0, after*time.Second)
		return err.Error()
	}
	owner := map[string]func(path, body string) string{
		"root on the admin socket":   over(admin, 0),
		"a user on the admin socket": over(admin, 997),
		"root in the store itself":   inStore,
		"root on another socket":     over(public, 0),
	}
	after := 3600
	ask := func(t *testing.T, as func(path, body string) string) (approve string) {
		t.Helper()
		after++
		answer := as("/api/v2/keks/team-a/destroy", fmt.Sprintf(`{"afterSeconds":%d}`, after))
		id := regexp.MustCompile(`approvals approve ([a-z2-7]{12})`).FindStringSubmatch(answer)
		if id == nil {
			t.Fatal(answer)
		}
		return "/api/v2/approvals/" + id[1] + "/approve"
	}
	other := over(public, 1000)
	for by, asks := range owner {
		approve := ask(t, asks)
		for as, approves := range owner {
			if answer := approves(approve, ""); !strings.Contains(answer, "somebody else has to approve it") {
				t.Errorf("asked by %s, approved by %s: %s", by, as, answer)
			}
		}
		if answer := other(approve, ""); !strings.Contains(answer, `"approved":"uid:1000"`) {
			t.Errorf("asked by %s, approved by another user: %s", by, answer)
		}
	}
	for as, approves := range owner {
		if answer := approves(ask(t, other), ""); !strings.Contains(answer, `"approved":"uid:`) {
			t.Errorf("asked by another user, approved by %s: %s", as, answer)
		}
	}

	// Earlier versions do not say how a request was made.
	for by, want := range map[string]string{
		"uid:0": "somebody else has to approve it", "uid:1000": "somebody else has to approve it", "cluster:job": "somebody else has to approve it",
		"spiffe://example.com/admin": `"approved":"uid:997"`, "dns:admin.example.com": `"approved":"uid:997"`, "cn:admin": `"approved":"uid:997"`,
	} {
		after++
		id := fmt.Sprint("earlier-", after)
		if _, err := b.keks.Store.ChangeApproval(t.Context(), id, func(r *keystore.Approval, _ bool) error {
			r.Operation, r.KEK, r.By, r.Expires = opDestroy, "team-a", by, time.Now().Add(time.Hour)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if answer := over(admin, 997)("/api/v2/approvals/"+id+"/approve", ""); !strings.Contains(answer, want) {
			t.Errorf("asked by %s of an earlier version: %s", by, answer)
		}
	}
}

// TestAdminSocketTakesNoTokens shows a token on the admin socket, as which root would be
// somebody else.
func TestAdminSocketTakesNoTokens(t *testing.T) {
	a := &api{broker: &broker{}, owner: true}
	r := httptest.NewRequest(http.MethodGet, "/api/v2/keks", nil)
	r.Header.Set("Authorization", "Bearer good")
	_, err := a.authenticated(func(*http.Request, *auditing.Entry) (any, error) { return nil, nil })(r, newEntry("list", "", "@"))
	if status, _ := statusOf(err); status != http.StatusUnauthorized || !strings.Contains(err.Error(), "the admin socket goes by its user") {
		t.Errorf("%v", err)
	}
}
