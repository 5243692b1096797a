package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// BenchmarkMirror compares a whole layer that comes through the mirror, decrypted and
// authenticated, with the encrypted layer that comes from the registry itself.
func BenchmarkMirror(b *testing.B) {
	dir := benchDir(b)
	const size = 256 << 20
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	registry, _ := harness.StartRegistry(b, dir)
	mirror := loopbacktest.FreeAddress(b)
	_, conf := harness.StartPilot(b, dir, brokerURL, "--diff-listen", "off", "--mirror-listen", mirror, "--mirror-upstream", registry, "--mirror-secret-file", dir+"/secret")
	l, m := harness.NewLayout(b), newMaterial(b)
	l.Write(dir+"/plain", "v1", l.ImageOf(harness.LayerKinds[0], [][]byte{m.layer(size)}))
	encrypt := harness.Command(b, "ctr-pilot", "images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+registry+"/app:enc")
	encrypt.Env = append(encrypt.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+conf)
	harness.Output(b, encrypt)
	secret := strings.TrimSpace(harness.Read(b, dir+"/secret"))
	get := func(address, path string, to io.Writer) int {
		b.Helper()
		req, err := http.NewRequest(http.MethodGet, "http://"+address+"/v2/app/"+path, nil)
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
		req.Header.Set("Pilot-Secret", secret)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		n, err := io.CopyBuffer(to, struct{ io.Reader }{resp.Body}, make([]byte, 1<<20))
		if err != nil || resp.StatusCode != http.StatusOK {
			b.Fatal(resp.Status, err)
		}
		return int(n)
	}
	layer := func(address string) func() float64 {
		var doc strings.Builder
		get(address, "manifests/enc", &doc)
		var manifest struct{ Layers []struct{ Digest string } }
		if err := json.Unmarshal([]byte(doc.String()), &manifest); err != nil {
			b.Fatal(err)
		}
		path := fmt.Sprintf("blobs/%s", manifest.Layers[0].Digest)
		return func() float64 {
			return rate(size, func() {
				if n := get(address, path, struct{ io.Writer }{io.Discard}); n < size {
					b.Fatalf("%d bytes", n)
				}
			})
		}
	}
	compare(b, comparison{"a whole layer of 256 MiB through the mirror, with its HMAC", "the encrypted one from docker-registry, on loopback", "MB/s", "≥ 0.75"}, layer(mirror), layer(registry))
}
