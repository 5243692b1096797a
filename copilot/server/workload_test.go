package server_test

import (
	"encoding/json"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// workloadPolicy lets nodes pull images with the KEKs team-*, and run those with team-a in
// one namespace.
const workloadPolicy = `
[[rule]]
identities = ["spiffe://example.com/node/*"]
keks = ["team-*"]
actions = ["unwrap"]

[[rule]]
identities = ["spiffe://example.com/node/*"]
keks = ["team-a", "tenant", "later"]
actions = ["unwrap"]
workloads = ["prod/*"]

[[rule]]
identities = ["spiffe://example.com/ci"]
keks = ["**"]
actions = ["wrap"]
`

func TestNodeAsksForAWorkload(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "team-b": nil, "tenant": nil})
	ca := certtest.NewAuthority(t)
	policyFile := writeFile(t, filepath.Join(dir, "policy.toml"), workloadPolicy)
	address := serveTLS(t, dir, ca, server.Config{TLSClientCA: ca.File, Policy: policyFile})
	as := func(path string) *client.Client {
		t.Helper()
		files := ca.Issue(t, spiffe(path))
		c, err := client.New(client.Config{URLs: []string{"https://" + address}, CAFile: ca.File, CertFile: files.Cert, KeyFile: files.Key, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.CloseIdleConnections)
		return c
	}
	node, stranger := as("/node/7"), as("/other")
	use := func(c *client.Client, kek, workload string, want error) {
		t.Helper()
		_, err := c.Use(t.Context(), kek, 1, workload, nil)
		if !errors.Is(err, want) {
			t.Errorf("%s for %s: %v, want %v", kek, workload, err, want)
		}
		e := lastAudited(t, dir)
		if e.Action != "use" || e.KEK != kek || e.Workload != workload || e.Version != 1 || (e.Verdict == "allowed") != (want == nil) {
			t.Errorf("audited %+v", e)
		}
	}
	use(node, "team-a", "prod/web", nil)
	if e := lastAudited(t, dir); e.Who != "spiffe://example.com/node/7" || e.Reason != "" {
		t.Errorf("audited %+v", e)
	}
	use(node, "team-a", "dev/web", client.ErrForbidden)
	if e := lastAudited(t, dir); !strings.Contains(e.Reason, `is for other workloads: dev/web is not "prod/*"`) {
		t.Errorf("audited %+v", e)
	}
	use(node, "team-b", "prod/web", client.ErrForbidden)
	use(stranger, "team-a", "prod/web", client.ErrForbidden)
	use(node, "later", "prod/web", client.ErrNotFound)
	// A denied KEK looks the same whether it is there or not.
	_, hidden := node.Use(t.Context(), "team-b", 1, "prod/web", nil)
	_, absent := node.Use(t.Context(), "team-x", 1, "prod/web", nil)
	if strings.ReplaceAll(absent.Error(), "team-x", "team-b") != hidden.Error() {
		t.Errorf("%v\n%v", hidden, absent)
	}
	for _, workload := range []string{"", "prod", "prod/web/x", "Prod/web", "prod/*"} {
		if _, err := node.Use(t.Context(), "team-a", 1, workload, nil); !errors.Is(err, client.ErrRejected) || !strings.Contains(err.Error(), "NAMESPACE/SERVICEACCOUNT") {
			t.Errorf("%q: %v", workload, err)
		}
	}

	// A rule with workloads lets a node unwrap for those, and not for itself; nor does it
	// export anything.
	ci := as("/ci")
	for kek, want := range map[string][]int{"team-a": {200, 200, 403}, "team-b": {200, 403, 403}, "tenant": {403, 200, 403}} {
		w, err := ci.Wrap(t.Context(), kek, []byte("a layer key"))
		if err != nil {
			t.Fatal(err)
		}
		files := ca.Issue(t, spiffe("/node/8"))
		raw := newRemote(t, address, ca, &files)
		wrapped, err := json.Marshal(w)
		if err != nil {
			t.Fatal(err)
		}
		body := string(wrapped)
		for i, workload := range []string{"", "prod/web", "dev/web"} {
			sent := body
			if workload != "" {
				sent = strings.TrimSuffix(body, "}") + `,"workload":"` + workload + `"}`
			}
			raw.want(t, want[i], "POST", "/api/v2/keks/"+kek+"/unwrap", sent)
			if e := lastAudited(t, dir); e.Workload != workload || e.Who != "spiffe://example.com/node/8" {
				t.Errorf("audited %+v", e)
			}
		}
		raw.want(t, 400, "POST", "/api/v2/keks/team-a/unwrap", strings.TrimSuffix(body, "}")+`,"workload":"prod"}`)
		if status, answer := raw.do(t, "GET", "/api/v2/keks/"+kek+"/key", ""); status == 200 {
			t.Errorf("exported: %s", answer)
		}
	}

	// Taken away in each way there is.
	admin := "unix://" + filepath.Join(dir, "admin.sock")
	change := func(verb, body string) {
		t.Helper()
		if status, answer := request(t, admin, "POST", "/api/v2/keks/team-a/"+verb, body); status != 200 {
			t.Fatalf("%s: %d %s", verb, status, answer)
		}
	}
	change("revoke", `{"identity":"spiffe://example.com/node/7"}`)
	use(node, "team-a", "prod/web", client.ErrForbidden)
	use(as("/node/8"), "team-a", "prod/web", nil)
	change("reinstate", `{"identity":"spiffe://example.com/node/7"}`)
	use(node, "team-a", "prod/web", nil)
	change("rotate", "")
	change("disable", `{"version":1}`)
	use(node, "team-a", "prod/web", client.ErrForbidden)
	if _, err := node.Use(t.Context(), "team-a", 2, "prod/web", nil); err != nil {
		t.Error(err)
	}
	if _, err := node.Use(t.Context(), "team-a", 0, "prod/web", nil); err != nil {
		t.Error(err)
	}
	if _, err := node.Use(t.Context(), "team-a", 3, "prod/web", nil); !errors.Is(err, client.ErrNoVersion) {
		t.Error(err)
	}
	change("disable", "")
	if _, err := node.Use(t.Context(), "team-a", 2, "prod/web", nil); !errors.Is(err, client.ErrForbidden) {
		t.Error(err)
	}
	use(node, "tenant", "prod/web", nil)
	writeFile(t, policyFile, strings.Replace(workloadPolicy, `"prod/*"`, `"dev/*"`, 1))
	eventually(t, func() bool {
		_, err := node.Use(t.Context(), "tenant", 1, "prod/web", nil)
		return errors.Is(err, client.ErrForbidden)
	})
	use(node, "tenant", "dev/web", nil)
}

func TestNodeAsksForAWorkloadWithLabels(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil, "tenant": nil})
	ca := certtest.NewAuthority(t)
	policyFile := writeFile(t, filepath.Join(dir, "policy.toml"), strings.Replace(workloadPolicy, `workloads = ["prod/*"]`, `workloads = ["prod/*"]
labels = "tier=gold"`, 1))
	address := serveTLS(t, dir, ca, server.Config{TLSClientCA: ca.File, Policy: policyFile})
	files := ca.Issue(t, spiffe("/node/7"))
	node, err := client.New(client.Config{URLs: []string{"https://" + address}, CAFile: ca.File, CertFile: files.Cert, KeyFile: files.Key, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(node.CloseIdleConnections)
	for _, test := range []struct {
		workload string
		labels   map[string]string
		want     error
		keys     []string
		audited  map[string]string
	}{
		{"prod/web", map[string]string{"tier": "gold", "secret": "x"}, nil, []string{"tier"}, map[string]string{"tier": "gold"}},
		{"prod/web", map[string]string{"tier": "bad\nvalue"}, client.ErrForbidden, nil, map[string]string{"tier": `"bad\nvalue"`}},
		{"prod/web", map[string]string{}, client.ErrForbidden, nil, nil},
		{"prod/web", nil, client.ErrForbidden, nil, nil},
		{"dev/web", map[string]string{"tier": "gold"}, client.ErrForbidden, nil, nil},
		// More than a request may have, so they are not known.
		{"prod/web", map[string]string{"tier": "gold", "x": strings.Repeat("x", 200<<10)}, client.ErrForbidden, nil, nil},
	} {
		keys, err := node.Use(t.Context(), "team-a", 1, test.workload, test.labels)
		if !errors.Is(err, test.want) || !slices.Equal(keys, test.keys) {
			t.Errorf("%s with %.100v: %q, %v", test.workload, test.labels, keys, err)
		}
		if e := lastAudited(t, dir); e.Workload != test.workload || !maps.Equal(e.Labels, test.audited) || (e.Verdict == "allowed") != (test.want == nil) {
			t.Errorf("%s with %.100v: audited %+v", test.workload, test.labels, e)
		}
	}
	files = ca.Issue(t, spiffe("/ci"))
	raw := newRemote(t, address, ca, &files)
	status, wrapped := raw.do(t, "POST", "/api/v2/keks/tenant/wrap", `{"plaintext":"AAAA"}`)
	files = ca.Issue(t, spiffe("/node/7"))
	raw = newRemote(t, address, ca, &files)
	_, wrapped, _ = strings.Cut(strings.TrimSpace(wrapped), `"tenant",`)
	for labels, want := range map[string]int{`{"tier":"gold"}`: 200, `{"tier":"silver"}`: 403, `{}`: 403, `null`: 403} {
		raw.want(t, want, "POST", "/api/v2/keks/tenant/unwrap", `{"workload":"prod/web","labels":`+labels+`,`+wrapped)
	}
	if status != 200 {
		t.Errorf("wrap: %d %s", status, wrapped)
	}
	// An answer that no label matters for says so.
	writeFile(t, policyFile, workloadPolicy)
	eventually(t, func() bool {
		keys, err := node.Use(t.Context(), "team-a", 1, "prod/web", map[string]string{"tier": "silver"})
		return err == nil && keys != nil && len(keys) == 0
	})
}
