package pull

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestManyRecipients encrypts for more recipients than go-jose parses in one JWE by
// default, and reads what skopeo wrote for as many.
func TestManyRecipients(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	private, public := harness.ECKeyPairs(t, dir+"/keys", 80)
	l := harness.NewLayout(t)
	image := l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret())
	l.Write(dir+"/layout", "v1", image)
	plain := c.Registry + "/app:plain"
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", plain, image)))
	original := c.Target(plain)
	encrypt := func(flag string, n int) (args []string) {
		for _, p := range public[:n] {
			args = append(args, flag, "jwe:"+p)
		}
		return args
	}
	decrypts := func(name, key string) {
		t.Helper()
		harness.Output(t, c.CtrPilot("images", "decrypt", "--force", "--key", key, name, name+"-decrypted"))
		if got := c.Target(name + "-decrypted"); got != original {
			t.Errorf("%s with %s: decrypted to %s, was %s", name, key, got, original)
		}
	}

	for _, n := range []int{32, 33, 80} {
		name := fmt.Sprintf("%s/app:%d", c.Registry, n)
		harness.Output(t, c.CtrPilot(append(append([]string{"images", "encrypt"}, encrypt("--recipient", n)...), plain, name)...))
		for _, i := range []int{0, 31, n - 1} {
			decrypts(name, private[i])
		}
	}
	// Through the stream processor, and in skopeo.
	name := c.Registry + "/app:80"
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	node := harness.NewNode(t, dir+"/node", harness.Containerd2(), conf, "")
	harness.Output(t, node.CtrPilot("images", "pull", "--plain-http", "--key", private[79], name))
	d := harness.NewDebian(t, dir, conf)
	harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", private[79], "docker://"+name, "oci:"+dir+"/by-skopeo:v1"))

	// skopeo writes one JWE for all.
	skopeos := c.Registry + "/app:skopeo"
	harness.Output(t, d.Run("skopeo", append(append([]string{"copy", "--dest-tls-verify=false"}, encrypt("--encryption-key", 60)...), "oci:"+dir+"/layout:v1", "docker://"+skopeos)...))
	harness.Output(t, node.CtrPilot("images", "pull", "--plain-http", "--key", private[59], skopeos))
	harness.ExpectFailure(t, c.CtrPilot("images", "pull", "--plain-http", "--key", private[60], skopeos), "no key unwraps the layer key")

	// One after the other, each wraps anew. All that are written are tried.
	name = c.Registry + "/app:one-by-one"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public[0], plain, name))
	for i := 1; i < 64; i++ {
		harness.Output(t, c.CtrPilot("images", "encrypt", "--key", private[0], "--recipient", "jwe:"+public[i], name))
	}
	decrypts(name, private[63])
	before := c.Target(name)
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--key", private[0], "--recipient", "jwe:"+public[64], name), "the layer would have 65 wrapped keys, and only 64 are tried")
	harness.ExpectFailure(t, c.CtrPilot("images", "rewrap", "--key", private[0], "--recipient", "jwe:"+public[64], name), "the layer would have 65 wrapped keys, and only 64 are tried")
	if now := c.Target(name); now != before {
		t.Errorf("it is %s, and was %s", now, before)
	}
	// What the error advises.
	harness.Output(t, c.CtrPilot(append(append([]string{"images", "rewrap", "--key", private[0], "--remove", "jwe"}, encrypt("--recipient", 65)...), name)...))
	decrypts(name, private[64])
	c.ExpectNothingPending()
}

// TestLargeManifestIsRefused refuses an image whose manifest would be larger than registries
// take, before it reads the first layer: that has another size than the manifest says.
func TestLargeManifestIsRefused(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`), "")
	_, public := harness.ECKeyPairs(t, dir+"/keys", 60)
	l := harness.NewLayout(t)
	var layers []harness.Object
	var ids []string
	for range 250 {
		layer, id := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"file": []byte(harness.NewSecret())})
		layers, ids = append(layers, layer), append(ids, id)
	}
	layers[0]["size"] = layers[0]["size"].(int) + 1
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "example.com/app:1", l.Manifest(layers, ids))))
	args := []string{"images", "encrypt"}
	for _, p := range public {
		args = append(args, "--recipient", "jwe:"+p)
	}
	harness.ExpectFailure(t, c.CtrPilot(append(args, "example.com/app:1", "example.com/app:2")...), "registries take at most 4194304", "name fewer recipients")
	harness.ExpectFailure(t, c.CtrPilot(append(args[:4], "example.com/app:1", "example.com/app:2")...), "the manifest says")
	c.ExpectNothingPending()
}

// TestNestedIndexes rewraps all tags of a repository, where some are images of few
// kilobytes that stand for millions of manifests, or that the registry does not give.
func TestNestedIndexes(t *testing.T) {
	t.Parallel()
	harness.Long(t)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	w := harness.RecordRegistry(t, c.Registry)
	app := w.Address + "/app:"
	l := harness.NewLayout(t)
	image := l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret())
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", app+"plain", image)))
	for _, tag := range []string{"a", "held", "z"} {
		harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"plain", app+tag))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", app+tag))
	}
	nest := func(tag string, depth, width int) {
		const index = "application/vnd.oci.image.index.v1+json"
		doc, mediaType := w.Manifest("GET", "app", "a", "", "")
		child := harness.Object{"mediaType": mediaType, "digest": c.Target(app + "a"), "size": len(doc)}
		for i := range depth {
			children := make([]harness.Object, width)
			for j := range children {
				children[j] = child
			}
			b, err := json.Marshal(harness.Object{"schemaVersion": 2, "mediaType": index, "manifests": children})
			if err != nil {
				t.Fatal(err)
			}
			n := harness.NewLayout(t)
			child = n.Blob(index, b)
			ref := child["digest"].(string)
			if i == depth-1 {
				ref = tag
			}
			w.Manifest("PUT", "app", ref, index, string(b))
		}
	}
	nest("nested", 8, 7)
	nest("too-deep", 9, 1)
	nest("wide", 1, 2000)
	harness.RotateKEK(t, dir+"/broker", "team-a")

	rewrap := func(args ...string) *exec.Cmd {
		t.Helper()
		cmd := harness.Command(t, "ctr-pilot", append([]string{"images", "rewrap", "--registry", "--plain-http"}, args...)...)
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+c.Ocicrypt, "TMPDIR="+dir)
		return cmd
	}
	requests := w.Record(nil, func() {
		if out := harness.Output(t, rewrap("--dry-run", app+"nested")); !strings.Contains(out, "(2 layers: provider:pilot:team-a@1 -> provider:pilot:team-a@2") {
			t.Errorf("nested: %s", out)
		}
	})
	if len(requests) > 20 { // 9 documents, and what the tag is
		t.Errorf("%d requests: %q", len(requests), requests)
	}
	release := make(chan struct{})
	var out string
	w.Record(func(_, path string) {
		if strings.HasSuffix(path, "/manifests/held") {
			<-release
		}
	}, func() {
		defer close(release)
		out = harness.ExpectFailure(t, rewrap("--image-timeout", "15s", app+"*"), "app:held: it took longer than 15s (--image-timeout)", "app:too-deep: ", "indexes are nested more than 8 deep",
			"6 images: 4 changed", ", 2 failed")
	})
	for _, tag := range []string{"a", "nested", "wide", "z"} {
		if !strings.Contains(out, app+tag+" sha256:") {
			t.Errorf("%s is not rewrapped:\n%s", tag, out)
		}
	}
	for _, tag := range []string{"a", "z"} {
		if _, keks := w.KEKs("app", tag); keks[""] != "team-a@2" {
			t.Errorf("%s: %v", tag, keks)
		}
	}
	// In containerd.
	l = harness.NewLayout(t)
	nested := l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret())
	for range 7 {
		nested = l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []harness.Object{nested, nested, nested}})
	}
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/nested.tar", app+"nested-plain", nested)))
	for _, args := range [][]string{
		{"encrypt", "--recipient", "provider:pilot:team-a", app + "nested-plain", app + "nested-encrypted"},
		{"decrypt", app + "nested-encrypted", app + "nested-decrypted"},
	} {
		if out := harness.Output(t, c.CtrPilot(append([]string{"images"}, args...)...)); !strings.Contains(out, "(2 layers "+args[0]) {
			t.Errorf("%s: %s", args[0], out)
		}
	}
	if got, want := c.Target(app+"nested-decrypted"), c.Target(app+"nested-plain"); got != want {
		t.Errorf("decrypted to %s, was %s", got, want)
	}
	if out := harness.Output(t, c.CtrPilot("images", "layerinfo", app+"nested-encrypted")); strings.Count(out, "team-a@2") != 2 {
		t.Errorf("layerinfo:\n%s", out)
	}
	c.ExpectNothingPending()
}

// TestRefusedManifest has a registry refuse what it does not know, as some do.
func TestRefusedManifest(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	_, public := harness.ECKeyPairs(t, dir+"/keys", 1)
	c := harness.NewCI(t, dir+"/ci", harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`))
	const detail = `{"message":"unsupported media type application/vnd.oci.image.layer.v1.tar+encrypted"}`
	refusing := refuse(t, c.Registry, func(r *http.Request) (int, string) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			return http.StatusBadRequest, `{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid","detail":` + detail + `}]}`
		}
		return 0, ""
	})
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "example.com/app:1", l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret()))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public[0], "example.com/app:1", "example.com/app:2"))
	want := []string{"the registry refused the manifest", "400 Bad Request: MANIFEST_INVALID: manifest invalid: " + detail, "refuse media types that they do not know"}
	harness.ExpectFailure(t, c.CtrPilot("images", "push", "--plain-http", refusing+"/app:2", "example.com/app:2"), want...)
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", c.Registry+"/app:2", "example.com/app:2"))
	harness.ExpectFailure(t, c.CtrPilot("images", "rewrap", "--registry", "--plain-http", "--key", dir+"/keys/0.pem", "--recipient", "jwe:"+public[0], refusing+"/app:2", refusing+"/app:3"), want...)

	// A registry that misses a layer says which, and media types are not why.
	layers, _ := harness.RecordRegistry(t, c.Registry).KEKs("app", "2")
	for _, l := range layers {
		link := c.Storage + "/docker/registry/v2/repositories/app/_layers/sha256/" + strings.TrimPrefix(l, "sha256:")
		if err := os.RemoveAll(link); err != nil {
			t.Fatal(err)
		}
	}
	out := harness.ExpectFailure(t, c.CtrPilot("images", "rewrap", "--registry", "--plain-http", "--key", dir+"/keys/0.pem", "--recipient", "jwe:"+public[0], c.Registry+"/app:2", c.Registry+"/app:3"),
		"the registry refused the manifest", "MANIFEST_BLOB_UNKNOWN", layers[0])
	if strings.Contains(out, "media types") {
		t.Errorf("media types are blamed: %s", out)
	}
}

// refuse is a registry that answers as f says, unless that returns 0, and otherwise as
// the registry that it is in front of.
func refuse(t testing.TB, registry string, f func(*http.Request) (status int, body string)) (address string) {
	t.Helper()
	forward := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		status, body := f(r)
		if status == 0 {
			forward.ServeHTTP(out, r)
			return
		}
		out.Header().Set("Content-Type", "application/json")
		out.WriteHeader(status)
		io.WriteString(out, body)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}
