package mirror

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestPlainImagesPassAsTheyAre compares what the mirror has of images that are not
// encrypted with what the registry has.
func TestPlainImagesPassAsTheyAre(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	d := harness.NewDebian(t, n.dir, n.ociConf)
	index, _ := n.image("index", func(l *harness.Layout) harness.Object {
		return l.Index(harness.LayerKinds[1], harness.NewSecret())
	})
	harness.Output(t, d.Run("skopeo", "copy", "-q", "--all", "--dest-tls-verify=false", "oci:"+index+":v1", "docker://"+n.registry+"/app:index"))
	harness.Output(t, d.Run("skopeo", "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false", "oci:"+index+":v1", "docker://"+n.registry+"/app:docker"))
	harness.Output(t, d.Run("skopeo", "copy", "-q", "--dest-tls-verify=false", "oci:"+index+":v1", "docker://"+n.registry+"/app:one"))
	for _, tag := range []string{"index", "docker", "one"} {
		digest := n.tagged("app", tag)
		for _, reference := range []string{tag, digest} {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				path := manifestPath("app", reference)
				r := n.request(method, path, nil)
				accept := http.Header{"Accept": {r.header.Get("Content-Type")}}
				want := ask(t, http.DefaultTransport, method, "http://"+n.registry+path, accept)
				if r.status != http.StatusOK || r.body != want.body {
					t.Errorf("%s %s: %d %.300s", method, path, r.status, r.body)
				}
				for _, name := range []string{"Content-Type", "Content-Length", "Docker-Content-Digest"} {
					if r.header.Get(name) != want.header.Get(name) {
						t.Errorf("%s %s: %s is %q, not %q", method, path, name, r.header.Get(name), want.header.Get(name))
					}
				}
			}
		}
		if tag == "index" {
			continue
		}
		for _, layer := range layers(t, harness.Read(t, n.stored(digest))) {
			for range 2 {
				if r := n.get(blobPath("app", layer)); digestOf(r.body) != layer {
					t.Errorf("%s: %d %.300s", layer, r.status, r.body)
				}
			}
			if r := n.head(blobPath("app", layer)); r.status != http.StatusOK || r.header.Get("Content-Length") != fmt.Sprint(len(harness.Read(t, n.stored(layer)))) {
				t.Errorf("HEAD %s: %d %s", layer, r.status, r.header)
			}
		}
	}
	if strings.Contains(harness.Read(t, n.pilot.Log), "layer key") {
		t.Error("keys were unwrapped for plain images")
	}
}

// tagged returns the digest of a tag, of any type.
func (n *node) tagged(repository, tag string) string {
	n.t.Helper()
	return strings.TrimSpace(harness.Read(n.t, filepath.Join(n.storage, "docker/registry/v2/repositories", repository, "_manifests/tags", tag, "current/link")))
}

// TestDockerImageComesBackAsSuch encrypts an image in Docker's format, which becomes an
// OCI image for that.
func TestDockerImageComesBackAsSuch(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	d := harness.NewDebian(t, n.dir, n.ociConf)
	layout, _ := n.image("one", func(l *harness.Layout) harness.Object {
		return l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret())
	})
	harness.Output(t, d.Run("skopeo", "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false", "oci:"+layout+":v1", "docker://"+n.registry+"/app:docker"))
	plain := n.tagged("app", "docker")
	harness.Output(t, n.ctrPilot("images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a", "docker://"+n.registry+"/app:docker", "docker://"+n.registry+"/enc:docker"))
	r := n.get(manifestPath("enc", "docker"))
	if digestOf(r.body) != plain || r.header.Get("Content-Type") != "application/vnd.docker.distribution.manifest.v2+json" {
		t.Errorf("%s %s", r.header, r.body)
	}
	for _, layer := range layers(t, r.body) {
		if b := n.get(blobPath("enc", layer)); digestOf(b.body) != layer {
			t.Errorf("%s: %d", layer, b.status)
		}
	}
}

// TestListsComeFromTheRegistry reads the pages of the list of tags as a client does, and
// what is said about referrers.
func TestListsComeFromTheRegistry(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.startByName()
	layout, plain := n.plain(harness.LayerKinds[0], harness.NewSecret())
	for i := range 5 {
		n.encrypt(layout, fmt.Sprintf("team/app:v%d", i))
	}
	for _, first := range []string{"/v2/registry.test/team/app/tags/list?n=2", "/v2/team/app/tags/list?n=2&ns=registry.test"} {
		var tags []string
		at, err := url.Parse("http://" + n.mirror + first)
		for pages := 0; at != nil; pages++ {
			if err != nil || pages > 5 {
				t.Fatal(at, err)
			}
			r := ask(t, http.DefaultTransport, http.MethodGet, at.String(), http.Header{"Pilot-Secret": {n.secret}})
			r.expect(t, at.String(), http.StatusOK)
			var page struct{ Tags []string }
			if err := json.Unmarshal([]byte(r.body), &page); err != nil {
				t.Fatal(err)
			}
			tags = append(tags, page.Tags...)
			link := r.header.Get("Link")
			if link == "" {
				break
			}
			target, _, _ := strings.Cut(strings.TrimPrefix(link, "<"), ">")
			at, err = at.Parse(target)
		}
		slices.Sort(tags) // the registry's order is its own
		if fmt.Sprint(tags) != "[v0 v1 v2 v3 v4]" {
			t.Errorf("%s: %q", first, tags)
		}
	}
	// By the name's first part, as podman and skopeo name images.
	if r := n.get(manifestPath("registry.test/team/app", "v1")); digestOf(r.body) != plain {
		t.Errorf("%d %s", r.status, r.body)
	}
	// This registry has no referrers API: clients go by tags then.
	n.get("/v2/registry.test/team/app/referrers/"+plain).expect(t, "referrers", http.StatusNotFound)
	n.get("/v2/team/app/manifests/v1").expect(t, "no registry", http.StatusNotFound, "mirror-upstream", "NAME_UNKNOWN")
}

// TestBadRequests makes requests that no client of a registry makes.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start("--mirror-hosts-dir", n.dir+"/upstream")
	harness.Write(t, n.dir+"/upstream/loop.test/hosts.toml", fmt.Sprintf("server = 'http://%s'\n[host.'http://%s']\n[host.'http://%s'.header]\npilot-secret = '%s'\n", n.mirror, n.mirror, n.mirror, n.secret))
	digest := digestOf("x")
	for _, c := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/", 404, "UNSUPPORTED"},
		{"GET", "/v1/_ping", 404, "UNSUPPORTED"},
		{"GET", "/v2/_catalog", 404, "UNSUPPORTED"},
		{"GET", "/v2/app/manifests/", 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/manifests/sha256:abc", 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/manifests/-x", 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/manifests/absent", 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/manifests/" + digest, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/blobs/latest", 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", 400, "DIGEST_INVALID"},
		{"GET", "/v2/App/manifests/x", 400, "NAME_INVALID"},
		{"GET", "/v2/../app/manifests/x", 400, "NAME_INVALID"},
		{"GET", "/v2/app%2f..%2f..%2fx/manifests/x", 400, "NAME_INVALID"},
		{"GET", "/v2/" + strings.Repeat("a", 300) + "/manifests/x", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/x?ns=a/b", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/x?ns=../../etc", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/x?ns=user:password@registry", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/x?ns=127.0.0.1:1", 502, "UNAVAILABLE"},
		// It would ask itself, without the secret and with it.
		{"GET", "/v2/app/manifests/x?ns=" + n.mirror, 401, "UNAUTHORIZED"},
		{"GET", "/v2/app/manifests/x?ns=loop.test", 502, "UNAVAILABLE"},
		{"PUT", "/v2/app/manifests/x", 405, "UNSUPPORTED"},
		{"POST", "/v2/app/blobs/uploads/", 405, "UNSUPPORTED"},
		{"DELETE", "/v2/app/manifests/" + digest, 405, "UNSUPPORTED"},
		{"GET", "/v2/app/tags/other", 404, "UNSUPPORTED"},
		{"GET", "/v2/app/tags/list", 404, "NAME_UNKNOWN"},
	} {
		r := n.request(c.method, c.path, nil)
		var problem struct {
			Errors []struct{ Code, Message string }
		}
		if err := json.Unmarshal([]byte(r.body), &problem); err != nil || len(problem.Errors) != 1 || problem.Errors[0].Message == "" {
			t.Errorf("%s %s: %v: %d %s", c.method, c.path, err, r.status, r.body)
			continue
		}
		if r.status != c.status || problem.Errors[0].Code != c.code {
			t.Errorf("%s %s: %d %s, not %d %s", c.method, c.path, r.status, r.body, c.status, c.code)
		}
	}
}
