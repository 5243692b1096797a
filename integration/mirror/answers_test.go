package mirror

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestEncryptedImageIsServedPlain compares all that the mirror has of an image with the
// image before it was encrypted.
func TestEncryptedImageIsServedPlain(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	secret := harness.NewSecret()
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object { return l.Index(harness.LayerKinds[1], secret) })
	n.encrypt(layout, "team/app:enc")
	direct := ask(t, http.DefaultTransport, http.MethodHead, "http://"+n.registry+manifestPath("team/app", "enc"), http.Header{"Accept": {"application/vnd.oci.image.index.v1+json"}})
	encrypted := direct.header.Get("Docker-Content-Digest")
	if encrypted == "" || encrypted == plain {
		t.Fatalf("not encrypted: %v", direct)
	}

	n.get("/v2/").expect(t, "ping", http.StatusOK)
	compare := func(what, path, digest string) string {
		t.Helper()
		want := harness.Read(t, file(layout, digest))
		r := n.get(path)
		r.expect(t, what, http.StatusOK)
		if r.body != want {
			t.Errorf("%s: got %d bytes of %s, want %s", what, len(r.body), digestOf(r.body), digest)
		}
		h := n.head(path)
		h.expect(t, "HEAD "+what, http.StatusOK)
		for _, name := range []string{"Content-Length", "Content-Type", "Docker-Content-Digest"} {
			if h.header.Get(name) == "" || h.header.Get(name) != r.header.Get(name) {
				t.Errorf("%s: %s is %q for GET and %q for HEAD", what, name, r.header.Get(name), h.header.Get(name))
			}
		}
		if r.header.Get("Docker-Content-Digest") != digest {
			t.Errorf("%s: its digest is said to be %s", what, r.header.Get("Docker-Content-Digest"))
		}
		return r.body
	}
	var index struct{ Manifests []struct{ Digest string } }
	all := func() {
		t.Helper()
		if err := json.Unmarshal([]byte(compare("index by tag", manifestPath("team/app", "enc"), plain)), &index); err != nil {
			t.Fatal(err)
		}
		compare("index by digest", manifestPath("team/app", plain), plain)
		for _, m := range index.Manifests {
			manifest := compare("manifest", manifestPath("team/app", m.Digest), m.Digest)
			var config struct{ Config struct{ Digest string } }
			if err := json.Unmarshal([]byte(manifest), &config); err != nil {
				t.Fatal(err)
			}
			compare("configuration", blobPath("team/app", config.Config.Digest), config.Config.Digest)
			for _, layer := range layers(t, manifest) {
				compare("layer", blobPath("team/app", layer), layer)
			}
		}
	}
	all()
	if len(index.Manifests) != 3 {
		t.Errorf("%d manifests", len(index.Manifests))
	}

	// An index without this machine's platform is as good as another.
	foreign, foreignDigest := n.image("foreign", func(l *harness.Layout) harness.Object {
		m := l.Image(harness.LayerKinds[1], false, "s390x", secret)
		m["platform"] = harness.Object{"architecture": "s390x", "os": "linux"}
		return l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []harness.Object{m},
		})
	})
	n.encrypt(foreign, "team/app:foreign")
	if r := n.get(manifestPath("team/app", "foreign")); r.status != http.StatusOK || digestOf(r.body) != foreignDigest {
		t.Errorf("an index of another platform: %d %s", r.status, r.body)
	}

	// What was encrypted stays so under its own digest.
	r := n.get(manifestPath("team/app", encrypted))
	r.expect(t, "the encrypted index", http.StatusOK)
	if digestOf(r.body) != encrypted {
		t.Errorf("by the encrypted digest it is %s", digestOf(r.body))
	}

	// A pilot that was restarted finds all of it again, by digests alone.
	first := layers(t, harness.Read(t, file(layout, index.Manifests[0].Digest)))[1]
	for _, path := range []string{manifestPath("team/app", index.Manifests[0].Digest), blobPath("team/app", first), manifestPath("team/app", plain)} {
		n.pilot.Stop(t)
		n.start()
		n.get(path).expect(t, "after a restart", http.StatusOK)
	}
	all()

	metrics := n.metrics()
	for _, want := range []string{`pilot_mirror_blobs_total{encrypted="true",result="OK"} `, `pilot_mirror_bytes_total{encrypted="true"} `, `pilot_mirror_requests_total{code="200",kind="manifests"} `, "pilot_mirror_blobs_in_progress 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
}
