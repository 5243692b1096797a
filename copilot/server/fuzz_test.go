package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/keyjson"
)

// FuzzAPI sends any request to copilot, as a user that may use the KEK team-a and no
// other.
func FuzzAPI(f *testing.F) {
	logrus.SetLevel(logrus.PanicLevel)
	dir := f.TempDir()
	policy := filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(policy, fmt.Appendf(nil, "[[rule]]\nidentities = [\"uid:%d\"]\nkeks = [\"team-a\"]\nactions = [\"wrap\", \"unwrap\"]\n", os.Geteuid()), 0o600); err != nil {
		f.Fatal(err)
	}
	b, owner := localBroker(f, Config{Dir: dir, Policy: policy})
	key := []byte("KEKKEKKEKKEKKEKKEKKEKKEKKEKKEKKE")
	for _, kek := range []string{"team-a", "other"} {
		if _, err := owner.Create(f.Context(), kek, key); err != nil {
			f.Fatal(err)
		}
	}
	user := withUser(f, f.Context(), os.Geteuid())
	wrapped := wrapOther(f, user, newAdminAPI(b))
	api := newAPI(b)
	f.Add("GET", "/api/v2/keks/team-a", "")
	f.Add("GET", "/api/v2/keks/other/key?version=1", "")
	f.Add("GET", "/api/v1/key/eyJrZWtfaWQiOiJvdGhlciIsImttc19wcm92aWRlciI6ImRldiJ9", "")
	f.Add("POST", "/api/v2/keks", `{"id":"x","key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`)
	f.Add("POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"c2VjcmV0"}`)
	f.Add("POST", "/api/v2/keks/team-a/unwrap", wrapped)
	f.Add("POST", "/api/v2/keks/other/unwrap", wrapped)
	f.Add("POST", "/api/v2/keks/team-a/destroy", `{"version":1,"after":0}`)
	f.Add("POST", "/api/v2/keks/team-a/rotate", ``)
	f.Add("POST", "/api/v2/keks/team-a/revoke", `{"identity":"uid:0"}`)
	f.Fuzz(func(t *testing.T, method, target, body string) {
		r, err := http.NewRequest(method, "http://copilot/", strings.NewReader(body))
		if err != nil {
			return
		}
		u, err := r.URL.Parse(target)
		if err != nil || u.Host != "copilot" {
			return
		}
		r.URL, r.RequestURI = u, u.RequestURI()
		r = r.WithContext(user)
		w := httptest.NewRecorder()
		api.ServeHTTP(w, r)
		said := w.Body.String()
		if strings.Contains(said, base64.StdEncoding.EncodeToString(key)) || strings.Contains(said, string(key)) {
			t.Errorf("%s %s %s gives the KEK out: %s", method, target, body, said)
		}
		switch {
		case w.Code < 300:
			var a struct{ Plaintext []byte }
			if json.Unmarshal([]byte(said), &a) == nil && string(a.Plaintext) == otherSecret {
				t.Errorf("%s %s %s unwraps what is wrapped for another KEK", method, target, body)
			}
		case w.Code >= 500:
			t.Errorf("%s %s %s: %d %s", method, target, body, w.Code, said)
		case w.Code >= 400 && w.Code != http.StatusNotFound && w.Code != http.StatusMethodNotAllowed && w.Header().Get("Content-Type") != "application/problem+json":
			t.Errorf("%s %s %s: %d without problem details: %s", method, target, body, w.Code, said)
		}
		for _, kek := range []string{"team-a", "other"} {
			if i, err := owner.Get(t.Context(), kek); err != nil || i.Version != 1 || i.Disabled || len(i.Revoked) > 0 || len(i.Versions) != 1 {
				t.Fatalf("%s %s %s changed %s to %+v, %v", method, target, body, kek, i, err)
			}
		}
	})
}

// otherSecret is wrapped with the KEK other.
const otherSecret = "secret of the other"

// wrapOther returns the body of a request to unwrap otherSecret.
func wrapOther(f *testing.F, user context.Context, api http.Handler) string {
	r := httptest.NewRequest(http.MethodPost, "http://copilot/api/v2/keks/other/wrap", bytes.NewReader(keyjson.Object(keyjson.Key("plaintext", []byte(otherSecret)))))
	w := httptest.NewRecorder()
	api.ServeHTTP(w, r.WithContext(user))
	var fields map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &fields); err != nil || w.Code != http.StatusOK {
		f.Fatalf("wrap: %d %s", w.Code, w.Body)
	}
	delete(fields, "id")
	b, err := json.Marshal(fields)
	if err != nil {
		f.Fatal(err)
	}
	return string(b)
}

// FuzzReadConfig reads any text as copilot.toml.
func FuzzReadConfig(f *testing.F) {
	f.Add("dir = \"/x\"\nlisten = [\"unix:///s\", \"0.0.0.0:8443\"]\n[issuers.a]\nurl = \"https://a\"\naudience = \"b\"\n")
	f.Add("[backends.a]\ntype = \"vault-kv\"\naddress = \"https://a\"\n[keks.\"b\"]\nbackend = \"a\"\npath = \"c\"\n")
	f.Add("dir = 1")
	name := filepath.Join(f.TempDir(), "copilot.toml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		conf := Config{Dir: "/x"}
		err := conf.ReadConfig(name)
		if err == nil {
			err = conf.check()
		} else if !strings.HasPrefix(err.Error(), name) {
			t.Errorf("the error does not name the file: %v", err)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("the error has lines: %q", err)
		}
	})
}
