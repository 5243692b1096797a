package copilot

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/policy"
)

// TestFloodOfBadTokens has one user of a unix socket, or one client at an address, show
// bad tokens until it is kept out. Nobody else is, and nobody else's refusals are
// summed up with its own.
func TestFloodOfBadTokens(t *testing.T) {
	a := &api{broker: &broker{limits: &limits{}, refusals: &refusals{}, policy: policy.Fixed(policy.Local("uid:0", "uid:1000"))}}
	ask := func(uid int, from, token string) (*entry, bool, error) {
		r := httptest.NewRequest(http.MethodGet, "/api/v2/keks", nil)
		r.RemoteAddr = from
		if uid >= 0 {
			r = r.WithContext(context.WithValue(r.Context(), peerKey{}, &unix.Ucred{Uid: uint32(uid)}))
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		e := &entry{Entry: audit.Entry{From: from}}
		_, err := a.answer(r, e, func(*http.Request, *entry) (any, error) { return nil, nil })
		return e, err != nil && !a.summedUp(r, e, err), err
	}
	flood := func(uid int, from string) {
		t.Helper()
		for range 1000 {
			ask(uid, from, "bad")
		}
		if _, _, err := ask(uid, from, "bad"); !errors.As(err, new(*tooMany)) {
			t.Fatalf("after a flood of %s: %v", from, err)
		}
	}
	flood(1000, "@")
	for _, uid := range []int{0, 1000} {
		if _, _, err := ask(uid, "@", ""); err != nil {
			t.Errorf("user %d, without a token: %v", uid, err)
		}
	}
	e, line, err := ask(0, "@", "bad")
	if !errors.Is(err, errWho) || !line || e.Who != anonymous || e.From != "@ (uid:0)" {
		t.Errorf("another user's first bad token: %v, %+v, with a line: %t", err, e.Entry, line)
	}
	flood(-1, "192.0.2.1:1")
	for range 1000 { // a kind of its own
		e, line, _ = ask(-1, "192.0.2.2:1", "bad")
		if line && e.From != "192.0.2.2:1" {
			t.Errorf("%+v", e.Entry)
		}
	}
	for el := a.refusals.recent.Front(); el != nil; el = el.Next() {
		if k := el.Value.(*kind); k.caller == "" || k.caller == anonymous {
			t.Errorf("refusals of callers that differ are summed up together: %+v", k)
		}
	}
}
