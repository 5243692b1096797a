package mirror

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/ctrlplane/pilot/integration/harness"
)

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	indexType    = "application/vnd.oci.image.index.v1+json"
	sbomType     = "application/spdx+json"
	noteType     = "application/vnd.example.note"
)

// TestReferrersByTheAPI has a registry with a referrers API list what is about a plain
// image: whole, of one type, and in pages.
func TestReferrersByTheAPI(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	server := httptest.NewServer(ggcr.New(ggcr.WithReferrersSupport(true), ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	n.registry = strings.TrimPrefix(server.URL, "http://")
	pages := harness.FrontRegistry(t, n.registry, inPages)
	harness.Write(t, n.dir+"/upstream/pages.test/hosts.toml", "server = 'http://"+pages+"'\n")
	n.startByName()

	layout, plain := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "team/app:enc")
	subject := harness.Object{"mediaType": manifestType, "digest": plain, "size": len(harness.Read(t, file(layout, plain)))}
	want := map[string][]string{}
	for i := range 5 {
		kind := []string{sbomType, noteType}[i%2]
		want[kind] = append(want[kind], n.artifact("team/app", kind, subject, fmt.Sprint(i)))
	}
	all := slices.Concat(want[sbomType], want[noteType])

	list := func(path string) (digests []string, filters string, requests int) {
		t.Helper()
		at := &url.URL{Scheme: "http", Host: n.mirror}
		for path != "" {
			if requests++; requests > 9 {
				t.Fatalf("%s: the pages have no end", path)
			}
			var err error
			if at, err = at.Parse(path); err != nil {
				t.Fatal(err)
			}
			r := n.get(at.RequestURI())
			r.expect(t, path, http.StatusOK)
			if r.header.Get("Content-Type") != indexType {
				t.Errorf("%s: %s", path, r.header)
			}
			var index struct {
				Manifests []struct{ Digest string }
			}
			if err := json.Unmarshal([]byte(r.body), &index); err != nil {
				t.Fatal(err)
			}
			for _, m := range index.Manifests {
				digests = append(digests, m.Digest)
			}
			filters = r.header.Get("OCI-Filters-Applied")
			path, _, _ = strings.Cut(strings.TrimPrefix(r.header.Get("Link"), "<"), ">")
		}
		slices.Sort(digests)
		return digests, filters, requests
	}
	slices.Sort(all)
	slices.Sort(want[sbomType])
	filter := "?artifactType=" + url.QueryEscape(sbomType)
	for _, c := range []struct {
		path     string
		want     []string
		filters  string
		requests int
	}{
		{"/v2/registry.test/team/app/referrers/" + plain, all, "", 1},
		// A registry need not filter, and its client does then.
		{"/v2/registry.test/team/app/referrers/" + plain + filter, all, "", 1},
		{"/v2/team/app/referrers/" + plain + filter + "&ns=registry.test", all, "", 1},
		{"/v2/pages.test/team/app/referrers/" + plain, all, "", 3},
		{"/v2/pages.test/team/app/referrers/" + plain + filter, want[sbomType], "artifactType", 2},
		{"/v2/team/app/referrers/" + plain + filter + "&ns=pages.test", want[sbomType], "artifactType", 2},
	} {
		got, filters, requests := list(c.path)
		if !slices.Equal(got, c.want) || filters != c.filters || requests != c.requests {
			t.Errorf("%s: %q by %d requests, filtered by %q; want %q by %d, %q", c.path, got, requests, filters, c.want, c.requests, c.filters)
		}
	}

	// ctr-pilot, as another client, finds them beside the image that it pulls from the mirror.
	var result struct {
		Referrers []struct{ Subject, Name, Type string }
	}
	out := harness.Output(t, n.ctrPilot("images", "encrypt", "--json", "--plain-http", "--user", "pilot:"+n.secret, "--recipient", "provider:pilot:team-a",
		"docker://"+n.mirror+"/pages.test/team/app:enc", "oci:"+n.dir+"/again:v1"))
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var found []string
	for _, r := range result.Referrers {
		if r.Subject != plain {
			t.Errorf("%+v is not about %s", r, plain)
		}
		found = append(found, r.Name)
	}
	slices.Sort(found)
	if !slices.Equal(found, all) {
		t.Errorf("ctr-pilot found %q, want %q", found, all)
	}
	// And what they say.
	for _, digest := range all {
		r := n.get(manifestPath("registry.test/team/app", digest))
		if digestOf(r.body) != digest || !strings.Contains(r.body, plain) {
			t.Errorf("%s: %d %s", digest, r.status, r.body)
		}
	}
}

// artifact pushes an artifact about a manifest into the registry, and returns its digest.
func (n *node) artifact(repository, kind string, subject harness.Object, text string) string {
	n.t.Helper()
	put := func(path, mediaType, body string) {
		n.t.Helper()
		req, err := http.NewRequestWithContext(n.t.Context(), http.MethodPut, "http://"+n.registry+path, strings.NewReader(body))
		if err != nil {
			n.t.Fatal(err)
		}
		req.Header.Set("Content-Type", mediaType)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			n.t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			n.t.Fatalf("PUT %s: %s", path, resp.Status)
		}
	}
	l := harness.NewLayout(n.t)
	artifact := l.JSON(manifestType, harness.Object{
		"schemaVersion": 2, "mediaType": manifestType, "subject": subject,
		"config": l.Blob(kind, []byte("{}")), "layers": []harness.Object{l.Blob("text/plain", []byte(text))},
	})
	digest := artifact["digest"].(string)
	for name, content := range l.Files {
		if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && "sha256:"+hex != digest {
			req, err := http.Post("http://"+n.registry+"/v2/"+repository+"/blobs/uploads/", "", nil)
			if err != nil {
				n.t.Fatal(err)
			}
			req.Body.Close()
			put(req.Header.Get("Location")+"?digest=sha256:"+hex, "application/octet-stream", string(content))
		}
	}
	put(manifestPath(repository, digest), manifestType, string(l.Files["blobs/sha256/"+strings.TrimPrefix(digest, "sha256:")]))
	return digest
}

// inPages has a registry filter its lists of referrers by type and send them in pages of
// two, with links whose parameters are its own.
func inPages(h http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Path, "/referrers/") {
			h.ServeHTTP(w, r)
			return
		}
		recorder := httptest.NewRecorder()
		h.ServeHTTP(recorder, r)
		var index struct {
			SchemaVersion int              `json:"schemaVersion"`
			MediaType     string           `json:"mediaType"`
			Manifests     []map[string]any `json:"manifests"`
		}
		if err := json.Unmarshal(recorder.Body.Bytes(), &index); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		query := r.URL.Query()
		if kind := query.Get("artifactType"); kind != "" {
			index.Manifests = slices.DeleteFunc(index.Manifests, func(m map[string]any) bool { return m["artifactType"] != kind })
			w.Header().Set("OCI-Filters-Applied", "artifactType")
		}
		// The registry has no order of its own.
		slices.SortFunc(index.Manifests, func(a, b map[string]any) int {
			return strings.Compare(a["digest"].(string), b["digest"].(string))
		})
		from, _ := strconv.Atoi(query.Get("from"))
		index.Manifests = index.Manifests[min(from, len(index.Manifests)):]
		if len(index.Manifests) > 2 {
			index.Manifests = index.Manifests[:2]
			query.Set("from", strconv.Itoa(from+2))
			w.Header().Set("Link", "<"+r.URL.Path+"?"+query.Encode()+`>; rel="next"`)
		}
		w.Header().Set("Content-Type", indexType)
		_ = json.NewEncoder(w).Encode(index)
	}
}
