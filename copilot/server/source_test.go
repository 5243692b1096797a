package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/ratelimit"
)

// TestFloodOfBadTokens has one user of a unix socket, or one client at
// an address, show bad tokens until it is limited. No other caller is, and no other
// caller's refusals are summed up with its own.
func TestFloodOfBadTokens(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	users := map[int]context.Context{0: withUser(t, t.Context(), 0), 1000: withUser(t, t.Context(), 1000)}
	name := filepath.Join(t.TempDir(), "audit.log")
	log, err := audit.OpenFile(name, make(audit.Key, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	a := &api{broker: &broker{audit: auditing.New(), metrics: newMetrics(), policy: policy.Fixed(policy.Local("uid:0", "uid:1000"))}}
	a.audit.Open(log)
	if a.callers.Issuers, err = caller.NewIssuers(nil); err != nil {
		t.Fatal(err)
	}
	chain := a.audited(a.limitedByAddress(a.authenticated(a.limited(func(*http.Request, *auditing.Entry) (any, error) { return nil, nil }))))
	lines := func() (entries []audit.Entry) {
		t.Helper()
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
			var e audit.Entry
			if err := json.Unmarshal(s.Bytes(), &e); err != nil {
				t.Fatal(err)
			}
			entries = append(entries, e)
		}
		return entries
	}
	refused := make(map[string]int64)
	ask := func(uid int, from, token string) (*auditing.Entry, error) {
		r := httptest.NewRequest(http.MethodGet, "/api/v2/keks", nil)
		r.RemoteAddr = from
		if ctx := users[uid]; ctx != nil {
			r = r.WithContext(ctx)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		e := newEntry("list", "", from)
		_, err := chain(r, e)
		if err != nil {
			refused[e.From]++
		}
		return e, err
	}
	flood := func(uid int, from string) {
		t.Helper()
		var err error
		// One more is let through each 10 ms, which may be the last of a thousand.
		for n := 0; n < 1000 || n < 2000 && !errors.As(err, new(*ratelimit.Exceeded)); n++ {
			_, err = ask(uid, from, "bad")
		}
		if !errors.As(err, new(*ratelimit.Exceeded)) {
			t.Fatalf("after a flood of %s: %v", from, err)
		}
	}
	flood(1000, "@")
	for _, uid := range []int{0, 1000} {
		if _, err := ask(uid, "@", ""); err != nil {
			t.Errorf("user %d, without a token: %v", uid, err)
		}
	}
	before := len(lines())
	e, err := ask(0, "@", "bad")
	if !errors.Is(err, caller.ErrUnauthenticated) || len(lines()) != before+1 || e.Who != caller.Anonymous || e.From != "@ (uid:0)" {
		t.Errorf("another user's first bad token: %v, %+v, %d lines", err, e.Entry, len(lines())-before)
	}
	flood(-1, "192.0.2.1:1")
	for range 1000 {
		ask(-1, "192.0.2.2:1", "bad")
	}
	a.audit.Flush()
	written := make(map[string]int64)
	for _, e := range lines() {
		if e.Verdict == audit.Denied {
			written[e.From] += max(e.Count, 1)
		}
	}
	for from, n := range refused {
		if written[from] != n {
			t.Errorf("%d refused requests from %s, and the audit log has %d", n, from, written[from])
		}
	}
	if len(refused) != 4 || len(written) != 4 {
		t.Errorf("refused %v, written %v", refused, written)
	}
}
