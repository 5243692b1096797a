package daemonset

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// apiServer responds as a Kubernetes API server does.
type apiServer struct {
	daemonSet, namespace string // JSON of their metadata
	status               int    // of all responses, unless it is 0
	notKubernetes        bool   // it is a proxy without a backend
	asked                atomic.Int32
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked.Add(1)
	refuse := func(code int, reason string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind": "Status", "status": "Failure", "reason": %q, "message": "refused", "code": %d}`, reason, code)
	}
	metadata := map[string]string{
		"/apis/apps/v1/namespaces/pilot-system/daemonsets/pilot": a.daemonSet,
		"/api/v1/namespaces/pilot-system":                        a.namespace,
	}[r.URL.Path]
	switch {
	case a.notKubernetes:
		http.NotFound(w, r)
	case a.status != 0:
		refuse(a.status, "Refused")
	case r.Header.Get("Authorization") != "Bearer TOKEN":
		refuse(http.StatusUnauthorized, "Unauthorized")
	case metadata == "":
		refuse(http.StatusNotFound, "NotFound")
	default:
		fmt.Fprintf(w, `{"kind": "Some", "metadata": %s}`, metadata)
	}
}

const (
	there    = `{"uid": "1"}`
	deleting = `{"uid": "1", "deletionTimestamp": "2026-01-01T00:00:00Z"}`
)

func newTestDaemonSet(t *testing.T, a *apiServer) (*DaemonSet, *httptest.Server) {
	t.Helper()
	server := httptest.NewTLSServer(a)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
		"token":  []byte("TOKEN\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := newDaemonSet("pilot-system", "pilot", server.URL, dir)
	if err != nil {
		t.Fatal(err)
	}
	retryInterval = time.Millisecond
	return d, server
}

func TestDeletionOfTheDaemonSetIsRecognized(t *testing.T) {
	for name, c := range map[string]struct {
		before, after *apiServer
		deleted       bool
		why           string
	}{
		"there":               {&apiServer{}, &apiServer{daemonSet: there, namespace: there}, false, "is there"},
		"deleted":             {&apiServer{}, &apiServer{namespace: there}, true, "the DaemonSet is deleted"},
		"being deleted":       {&apiServer{}, &apiServer{daemonSet: deleting, namespace: there}, true, "is being deleted"},
		"namespace":           {&apiServer{}, &apiServer{daemonSet: there, namespace: deleting}, true, "the namespace is being deleted"},
		"made anew":           {&apiServer{}, &apiServer{daemonSet: `{"uid": "2"}`, namespace: there}, false, "is there"},
		"account deleted":     {&apiServer{}, &apiServer{status: 401}, true, "ServiceAccount or Role"},
		"role deleted":        {&apiServer{}, &apiServer{status: 403}, true, "ServiceAccount or Role"},
		"role never there":    {&apiServer{status: 403}, &apiServer{status: 403}, false, "was not found"},
		"never there":         {&apiServer{status: 404}, &apiServer{}, false, "was not found"},
		"no right to look at": {&apiServer{daemonSet: there}, &apiServer{status: 403}, false, "was not found"},
		"API server ill":      {&apiServer{}, &apiServer{status: 503}, false, "does not say"},
		"not the API server":  {&apiServer{}, &apiServer{notKubernetes: true}, false, "does not say"},
	} {
		t.Run(name, func(t *testing.T) {
			a := c.before
			if a.daemonSet == "" && a.status == 0 {
				a.daemonSet, a.namespace = there, there
			}
			d, server := newTestDaemonSet(t, a)
			err := d.Find(t.Context())
			if found := err == nil; found == (c.why == "was not found") {
				t.Fatalf("Find: %v", err)
			}
			server.Config.Handler = c.after
			timeout := time.Minute
			if c.why == "does not say" { // it asks for as long as it may
				timeout = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			deleted, why := d.Deleted(ctx)
			if deleted != c.deleted || !strings.Contains(why, c.why) {
				t.Errorf("got %v, %q; want %v, %q", deleted, why, c.deleted, c.why)
			}
		})
	}
}

// TestRequestsDeniedForAMomentAreNoDeletion uses an API server that denies everything for a moment, as one
// does that has just been started.
func TestRequestsDeniedForAMomentAreNoDeletion(t *testing.T) {
	a := &apiServer{daemonSet: there, namespace: there}
	d, server := newTestDaemonSet(t, a)
	if err := d.Find(t.Context()); err != nil {
		t.Fatal(err)
	}
	refuses := &apiServer{status: http.StatusForbidden}
	server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refuses.asked.Load() < refusals-1 {
			refuses.ServeHTTP(w, r)
			return
		}
		a.ServeHTTP(w, r)
	})
	if deleted, why := d.Deleted(t.Context()); deleted {
		t.Errorf("deleted: %s", why)
	}
}

func TestUnreachableAPIServerIsNoDeletion(t *testing.T) {
	d, server := newTestDaemonSet(t, &apiServer{daemonSet: there, namespace: there})
	if err := d.Find(t.Context()); err != nil {
		t.Fatal(err)
	}
	server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if deleted, why := d.Deleted(ctx); deleted || !strings.Contains(why, "does not say") {
		t.Errorf("deleted %v: %s", deleted, why)
	}
}
