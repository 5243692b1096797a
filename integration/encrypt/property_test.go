package encrypt

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/image/imagetest"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/opencontainers/go-digest"
)

// TestPropertySample takes some of the random images of image's TestProperty through
// containerd, ctr-pilot and skopeo: what ctr-pilot does not name is nowhere in
// containerd's content store, each recipient gets the original back, and skopeo gets its layers.
func TestPropertySample(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, conf := harness.StartPilot(t, dir+"/ci", brokerURL)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), conf, "")
	d := harness.NewDebian(t, dir, conf)
	private, public := harness.KeyPair(t, dir+"/keys")
	for _, sample := range []struct{ size, images int }{{1, 3}, {5, 3}} {
		for seed := uint64(1); sample.images > 0; seed++ {
			img := imagetest.New(seed, sample.size)
			if !importable(img) {
				continue
			}
			sample.images--
			t.Run(img.ID, func(t *testing.T) {
				base := filepath.Join(dir, strings.ReplaceAll(img.ID, "/", "-"))
				name := "example.com/" + filepath.Base(base)
				harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", archive(t, img, base+".tar", name+":plain")))
				var report struct {
					Plain []struct{ Digest digest.Digest }
				}
				text := harness.Output(t, c.CtrPilot("images", "encrypt", "--allow-plain", "--json", "--recipient", "provider:pilot:team-a", "--recipient", "jwe:"+public, name+":plain", name+":encrypted"))
				if err := json.Unmarshal([]byte(text), &report); err != nil {
					t.Fatal(err)
				}
				// What is left when the plain image is removed is the encrypted one.
				harness.Output(t, c.CtrPilot("images", "remove", "--sync", name+":plain"))
				for _, blob := range img.Digests(imagetest.Content) {
					b := img.Blobs[blob]
					named := false
					for _, p := range report.Plain {
						named = named || p.Digest == blob
					}
					if !named && len(b.Marker) > 0 && harness.ContainsText(t, c.Dir+"/root/io.containerd.content.v1.content/blobs", string(b.Marker)) {
						t.Errorf("%s %s is readable, and was not named:\n%s\n%s", b.MediaType, blob, text, img)
					}
				}
				for i, key := range []string{private, "provider:pilot:team-a"} {
					decrypted := name + ":decrypted" + string(rune('0'+i))
					harness.Output(t, c.CtrPilot("images", "decrypt", "--key", key, name+":encrypted", decrypted))
					if got := c.Target(decrypted); got != img.Target.Digest.String() {
						t.Errorf("with %s: %s, was %s", key, got, img.Target.Digest)
					}
				}
				if sample.size > 1 {
					return // skopeo copies one platform
				}
				harness.Output(t, c.CtrPilot("images", "export", "--all-platforms", base+"-encrypted.tar", name+":encrypted"))
				harness.Output(t, d.Run("skopeo", "copy", "--decryption-key", private, "oci-archive:"+base+"-encrypted.tar", "dir:"+base+"-skopeo"))
				for _, blob := range img.Digests(imagetest.Content) {
					if b, err := os.ReadFile(filepath.Join(base+"-skopeo", blob.Encoded())); err != nil || digest.FromBytes(b) != blob {
						t.Errorf("skopeo does not decrypt %s %s: %v\n%s", img.Blobs[blob].MediaType, blob, err, img)
					}
				}
			})
		}
	}
}

// importable reports whether containerd imports the image, and if it is a single
// manifest, whether skopeo knows its layers.
func importable(img *imagetest.Image) bool {
	for _, feature := range []string{"absent manifest", "absent layer", "absent config", "absent foreign layer", "entry of another type", "old artifact", "unusual manifest type", "inlined layer", "inlined manifest"} {
		if img.Features[feature] {
			return false
		}
	}
	contents := img.Digests(imagetest.Content)
	if len(contents) == 0 {
		return false
	}
	if strings.HasSuffix(img.ID, "/1") {
		usual := []string{"application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+zstd"}
		for _, feature := range []string{"artifact", "unusual layer", "foreign layer", "same content, different types", "stale annotations of encryption", "empty layer"} {
			if img.Features[feature] {
				return false
			}
		}
		return !slices.ContainsFunc(contents, func(d digest.Digest) bool { return !slices.Contains(usual, img.Blobs[d].MediaType) })
	}
	return true
}

// archive writes an image as an OCI archive, and returns the file.
func archive(t testing.TB, img *imagetest.Image, file, name string) string {
	t.Helper()
	index, err := json.Marshal(harness.Object{"schemaVersion": 2, "manifests": []harness.Object{{
		"mediaType": img.Target.MediaType, "digest": img.Target.Digest, "size": img.Target.Size, "annotations": harness.Object{"io.containerd.image.name": name},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for d, b := range img.Blobs {
		files["blobs/sha256/"+d.Encoded()] = b.Bytes
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, b := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		w.Write(b)
	}
	w.Close()
	return harness.Write(t, file, out.String())
}
