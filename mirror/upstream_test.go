package mirror

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// TestMadeUpPasswordsDoNotReplaceCallers asks a registry with more passwords than are
// remembered, beside a caller and the mirror's own credentials.
func TestMadeUpPasswordsDoNotReplaceCallers(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, ok := r.BasicAuth(); ok && password != "right" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer s.Close()
	registry := strings.TrimPrefix(s.URL, "http://")
	m := New(Config{Upstream: registry, Secret: strings.Repeat("x", minSecret)})
	ask := func(c caller) *upstream {
		t.Helper()
		u, err := m.upstreams.of(c, registry)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequest(http.MethodGet, s.URL+"/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.named {
			req.SetBasicAuth(c.user, c.secret)
		}
		resp, err := u.hosts[0].Client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return u
	}
	right := caller{user: "u", secret: "right", named: true}
	own, alice := ask(caller{}), ask(right)
	for i := range 2 * maxUpstreams {
		ask(caller{user: "u", secret: fmt.Sprint(i), named: true})
	}
	if len(m.upstreams.known) != maxUpstreams {
		t.Errorf("%d are remembered", len(m.upstreams.known))
	}
	if ask(caller{}) != own || ask(right) != alice {
		t.Error("one that works was forgotten")
	}
	if ask(caller{user: "u", secret: "new", named: true}) == nil {
		t.Error("a new one is not taken")
	}
}

// TestImagesAreMadeForEachCallersCredentials: what fails for one caller does not for others
// who ask at the same time.
func TestImagesAreMadeForEachCallersCredentials(t *testing.T) {
	doc := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2,"data":"e30="},"layers":[]}`
	var once sync.Once
	waiting, resume := make(chan struct{}), make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		if password == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method == http.MethodGet && password == "wrong" {
			once.Do(func() { close(waiting) })
			<-resume
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Docker-Content-Digest", digestOf(doc))
		http.ServeContent(w, r, "", zeroTime, strings.NewReader(doc))
	}))
	defer s.Close()
	registry := strings.TrimPrefix(s.URL, "http://")
	m := New(Config{Upstream: registry, Secret: strings.Repeat("x", minSecret)})
	get := func(password string) error {
		repo, err := m.open(t.Context(), caller{user: "u", secret: password, named: true}, target{registry: registry, repository: "app", kind: "manifests", object: "1"})
		if err != nil {
			return err
		}
		desc, err := repo.Resolve(t.Context())
		if err != nil {
			return err
		}
		_, err = m.plain(t.Context(), repo, desc)
		return err
	}
	failed := make(chan error)
	go func() { failed <- get("wrong") }()
	<-waiting
	if err := get("right"); err != nil {
		t.Error(err)
	}
	close(resume)
	if err := <-failed; m.judge(err).status != http.StatusForbidden || errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
