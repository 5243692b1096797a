package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// BenchmarkMirrorMemory has four callers read a whole blob each from the mirror at once,
// and reports pilot's peak memory.
func BenchmarkMirrorMemory(b *testing.B) {
	dir := benchDir(b)
	c := harness.StartCI(b, dir, "team-a")
	l, m := harness.NewLayout(b), newMaterial(b)
	var layers [][]byte
	for range 4 {
		layers = append(layers, m.layer(256<<20))
	}
	name := c.Registry + "/bulk:1"
	c.Publish(l, name, l.ImageOf(harness.LayerKinds[0], layers), "provider:pilot:team-a")
	l, layers = nil, nil
	mirror := loopbacktest.FreeAddress(b)
	process, _ := harness.StartPilot(b, dir+"/mirror", c.BrokerURL, "--mirror-listen", mirror, "--mirror-upstream", c.Registry, "--mirror-secret-file", dir+"/secret")
	harness.Await(b, "the mirror", harness.Listening(mirror))
	secret := strings.TrimSpace(harness.Read(b, dir+"/secret"))
	get := func(path string, to io.Writer) error {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "http://"+mirror+"/v2/bulk/"+path, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Pilot-Secret", secret)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		n, err := io.Copy(to, resp.Body)
		if err == nil && (resp.StatusCode != http.StatusOK || n != resp.ContentLength) {
			err = fmt.Errorf("%s: %s, %d bytes", path, resp.Status, n)
		}
		return err
	}
	var doc bytes.Buffer
	if err := get("manifests/1", &doc); err != nil {
		b.Fatal(err)
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(doc.Bytes(), &manifest); err != nil {
		b.Fatal(err)
	}
	var g errgroup.Group
	for _, layer := range manifest.Layers {
		g.Go(func() error { return get("blobs/"+layer.Digest.String(), io.Discard) })
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	peak := float64(process.Peak(b)) / 1e6
	measure(b, comparison{"memory of pilot with a mirror, four blobs of 256 MiB at once", "target: 48 MiB", "MB", "≤ 1"}, (48<<20)/1e6, func() float64 { return peak })
}
