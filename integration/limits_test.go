package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// ecKeys makes key pairs and returns their private and public keys' files.
func ecKeys(t testing.TB, dir string, n int) (private, public []string) {
	t.Helper()
	for i := range n {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		priv, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		private = append(private, write(t, fmt.Sprintf("%s/%d.pem", dir, i), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: priv}))))
		public = append(public, write(t, fmt.Sprintf("%s/%d.pub", dir, i), string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))))
	}
	return private, public
}

// TestManyRecipients encrypts for more recipients than go-jose parses in one JWE by
// default, and reads what skopeo wrote for as many.
func TestManyRecipients(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newCI(t, dir+"/ci", conf)
	private, public := ecKeys(t, dir+"/keys", 80)
	l := newLayout(t)
	image := l.image(kinds[0], false, goarch, newSecret())
	l.write(dir+"/layout", "v1", image)
	plain := c.registry + "/app:plain"
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", plain, image)))
	original := c.target(plain)
	encrypt := func(flag string, n int) (args []string) {
		for _, p := range public[:n] {
			args = append(args, flag, "jwe:"+p)
		}
		return args
	}
	decrypts := func(name, key string) {
		t.Helper()
		output(t, c.ctrPilot("images", "decrypt", "--force", "--key", key, name, name+"-decrypted"))
		if got := c.target(name + "-decrypted"); got != original {
			t.Errorf("%s with %s: decrypted to %s, was %s", name, key, got, original)
		}
	}

	for _, n := range []int{32, 33, 80} {
		name := fmt.Sprintf("%s/app:%d", c.registry, n)
		output(t, c.ctrPilot(append(append([]string{"images", "encrypt"}, encrypt("--recipient", n)...), plain, name)...))
		for _, i := range []int{0, 31, n - 1} {
			decrypts(name, private[i])
		}
	}
	// Through the stream processor, and in skopeo.
	name := c.registry + "/app:80"
	output(t, c.ctrPilot("images", "push", "--plain-http", name))
	node := newNode(t, dir+"/node", containerd2(), conf, "")
	output(t, node.ctrPilot("images", "pull", "--plain-http", "--key", private[79], name))
	d := newDebian(t, dir, conf)
	output(t, d.run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", private[79], "docker://"+name, "oci:"+dir+"/by-skopeo:v1"))

	// skopeo writes one JWE for all.
	skopeos := c.registry + "/app:skopeo"
	output(t, d.run("skopeo", append(append([]string{"copy", "--dest-tls-verify=false"}, encrypt("--encryption-key", 60)...), "oci:"+dir+"/layout:v1", "docker://"+skopeos)...))
	output(t, node.ctrPilot("images", "pull", "--plain-http", "--key", private[59], skopeos))
	fails(t, c.ctrPilot("images", "pull", "--plain-http", "--key", private[60], skopeos), "no key unwraps the layer key")

	// One after the other, each wraps anew. All that are written are tried.
	name = c.registry + "/app:one-by-one"
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public[0], plain, name))
	for i := 1; i < 64; i++ {
		output(t, c.ctrPilot("images", "encrypt", "--key", private[0], "--recipient", "jwe:"+public[i], name))
	}
	decrypts(name, private[63])
	before := c.target(name)
	fails(t, c.ctrPilot("images", "encrypt", "--key", private[0], "--recipient", "jwe:"+public[64], name), "the layer would have 65 wrapped keys, and only 64 are tried")
	fails(t, c.ctrPilot("images", "rewrap", "--key", private[0], "--recipient", "jwe:"+public[64], name), "the layer would have 65 wrapped keys, and only 64 are tried")
	if now := c.target(name); now != before {
		t.Errorf("it is %s, and was %s", now, before)
	}
	// What the error advises.
	output(t, c.ctrPilot(append(append([]string{"images", "rewrap", "--key", private[0], "--remove", "jwe"}, encrypt("--recipient", 65)...), name)...))
	decrypts(name, private[64])
	c.nothingPending()
}

// TestLargeManifest refuses an image whose manifest would be larger than registries
// take, before it reads the first layer: that has another size than the manifest says.
func TestLargeManifest(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	c := newNode(t, dir+"/ci", containerd2(), write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`), "")
	_, public := ecKeys(t, dir+"/keys", 60)
	l := newLayout(t)
	var layers []object
	var ids []string
	for range 250 {
		layer, id := l.layer(kinds[0], kinds[0].oci, map[string][]byte{"file": []byte(newSecret())})
		layers, ids = append(layers, layer), append(ids, id)
	}
	layers[0]["size"] = layers[0]["size"].(int) + 1
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", "example.com/app:1", l.manifest(layers, ids))))
	args := []string{"images", "encrypt"}
	for _, p := range public {
		args = append(args, "--recipient", "jwe:"+p)
	}
	fails(t, c.ctrPilot(append(args, "example.com/app:1", "example.com/app:2")...), "registries take at most 4194304", "name fewer recipients")
	fails(t, c.ctrPilot(append(args[:4], "example.com/app:1", "example.com/app:2")...), "the manifest says")
	c.nothingPending()
}

// TestNestedIndexes rewraps all tags of a repository, where some are images of few
// kilobytes that stand for millions of manifests, or that the registry does not give.
func TestNestedIndexes(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, conf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", conf)
	w := watch(t, c.registry)
	app := w.address + "/app:"
	l := newLayout(t)
	image := l.image(kinds[0], false, goarch, newSecret())
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", app+"plain", image)))
	for _, tag := range []string{"a", "held", "z"} {
		output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"plain", app+tag))
		output(t, c.ctrPilot("images", "push", "--plain-http", app+tag))
	}
	nest := func(tag string, depth, width int) {
		const index = "application/vnd.oci.image.index.v1+json"
		doc, mediaType := w.do("GET", "app", "a", "", "")
		child := object{"mediaType": mediaType, "digest": c.target(app + "a"), "size": len(doc)}
		for i := range depth {
			children := make([]object, width)
			for j := range children {
				children[j] = child
			}
			b, err := json.Marshal(object{"schemaVersion": 2, "mediaType": index, "manifests": children})
			if err != nil {
				t.Fatal(err)
			}
			n := newLayout(t)
			child = n.blob(index, b)
			ref := child["digest"].(string)
			if i == depth-1 {
				ref = tag
			}
			w.do("PUT", "app", ref, index, string(b))
		}
	}
	nest("nested", 8, 7)
	nest("too-deep", 9, 1)
	nest("wide", 1, 2000)
	rotate(t, dir+"/broker", "team-a")

	rewrap := func(args ...string) *exec.Cmd {
		t.Helper()
		cmd := command(t, "ctr-pilot", append([]string{"images", "rewrap", "--registry", "--plain-http"}, args...)...)
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+conf, "TMPDIR="+dir)
		return cmd
	}
	requests := w.during(nil, func() {
		if out := output(t, rewrap("--dry-run", app+"nested")); !strings.Contains(out, "(2 layers: provider:pilot:team-a@1 -> provider:pilot:team-a@2") {
			t.Errorf("nested: %s", out)
		}
	})
	if len(requests) > 20 { // 9 documents, and what the tag is
		t.Errorf("%d requests: %q", len(requests), requests)
	}
	release := make(chan struct{})
	var out string
	w.during(func(_, path string) {
		if strings.HasSuffix(path, "/manifests/held") {
			<-release
		}
	}, func() {
		defer close(release)
		out = fails(t, rewrap("--image-timeout", "15s", app+"*"), "app:held: it took longer than 15s (--image-timeout)", "app:too-deep: ", "indexes are nested more than 8 deep",
			"6 images: 4 changed", ", 2 failed")
	})
	for _, tag := range []string{"a", "nested", "wide", "z"} {
		if !strings.Contains(out, app+tag+" sha256:") {
			t.Errorf("%s is not rewrapped:\n%s", tag, out)
		}
	}
	for _, tag := range []string{"a", "z"} {
		if _, keks := w.keks("app", tag); keks[""] != "team-a@2" {
			t.Errorf("%s: %v", tag, keks)
		}
	}
	// In containerd.
	l = newLayout(t)
	nested := l.image(kinds[0], false, goarch, newSecret())
	for range 7 {
		nested = l.json("application/vnd.oci.image.index.v1+json", object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []object{nested, nested, nested}})
	}
	output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(dir+"/nested.tar", app+"nested-plain", nested)))
	for _, args := range [][]string{
		{"encrypt", "--recipient", "provider:pilot:team-a", app + "nested-plain", app + "nested-encrypted"},
		{"decrypt", app + "nested-encrypted", app + "nested-decrypted"},
	} {
		if out := output(t, c.ctrPilot(append([]string{"images"}, args...)...)); !strings.Contains(out, "(2 layers "+args[0]) {
			t.Errorf("%s: %s", args[0], out)
		}
	}
	if got, want := c.target(app+"nested-decrypted"), c.target(app+"nested-plain"); got != want {
		t.Errorf("decrypted to %s, was %s", got, want)
	}
	if out := output(t, c.ctrPilot("images", "layerinfo", app+"nested-encrypted")); strings.Count(out, "team-a@2") != 2 {
		t.Errorf("layerinfo:\n%s", out)
	}
	c.nothingPending()
}

// TestRefusedManifest has a registry refuse what it does not know, as some do.
func TestRefusedManifest(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, public := ecKeys(t, dir+"/keys", 1)
	c := newCI(t, dir+"/ci", write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`))
	const detail = `{"message":"unsupported media type application/vnd.oci.image.layer.v1.tar+encrypted"}`
	refusing := refuse(t, c.registry, func(r *http.Request) (int, string) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			return http.StatusBadRequest, `{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid","detail":` + detail + `}]}`
		}
		return 0, ""
	})
	l := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", "example.com/app:1", l.image(kinds[0], false, goarch, newSecret()))))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public[0], "example.com/app:1", "example.com/app:2"))
	want := []string{"the registry refused the manifest", "400 Bad Request: MANIFEST_INVALID: manifest invalid: " + detail, "refuse media types that they do not know"}
	fails(t, c.ctrPilot("images", "push", "--plain-http", refusing+"/app:2", "example.com/app:2"), want...)
	output(t, c.ctrPilot("images", "push", "--plain-http", c.registry+"/app:2", "example.com/app:2"))
	fails(t, c.ctrPilot("images", "rewrap", "--registry", "--plain-http", "--key", dir+"/keys/0.pem", "--recipient", "jwe:"+public[0], refusing+"/app:2", refusing+"/app:3"), want...)

	// A registry that misses a layer says which, and media types are not why.
	layers, _ := watch(t, c.registry).keks("app", "2")
	for _, l := range layers {
		link := c.storage + "/docker/registry/v2/repositories/app/_layers/sha256/" + strings.TrimPrefix(l, "sha256:")
		if err := os.RemoveAll(link); err != nil {
			t.Fatal(err)
		}
	}
	out := fails(t, c.ctrPilot("images", "rewrap", "--registry", "--plain-http", "--key", dir+"/keys/0.pem", "--recipient", "jwe:"+public[0], c.registry+"/app:2", c.registry+"/app:3"),
		"the registry refused the manifest", "MANIFEST_BLOB_UNKNOWN", layers[0])
	if strings.Contains(out, "media types") {
		t.Errorf("media types are blamed: %s", out)
	}
}
