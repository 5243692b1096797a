package pull

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestManifestTampered pulls images whose manifest, configuration or blobs
// somebody has changed who can write to the registry's storage: with the digests
// that name them, so that only pilot and the diff IDs are left to find it, and
// without.
func TestManifestTampered(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	image, other := c.Image(harness.LayerKinds[1], "provider:pilot:team-a"), c.Image(harness.LayerKinds[1], "provider:pilot:team-b")
	home := harness.TempDir(t)
	harness.StartPilot(t, home, c.BrokerURL)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})

	var foreign ocispec.Manifest
	c.Edit(other, "same", func(m *ocispec.Manifest) { foreign = *m })
	// The diff IDs of the configuration.
	config := func(change func(ids []any)) func(m *ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			var conf harness.Object
			if err := json.Unmarshal([]byte(harness.Read(t, c.Blob(m.Config.Digest.String()))), &conf); err != nil {
				t.Fatal(err)
			}
			change(conf["rootfs"].(harness.Object)["diff_ids"].([]any))
			b, err := json.Marshal(conf)
			if err != nil {
				t.Fatal(err)
			}
			m.Config.Digest, m.Config.Size = c.Put(image, "_layers", b), int64(len(b))
		}
	}
	const tampered, wrongDiffID = "HMAC does not match", "wrong diff id"
	for suffix, test := range map[string]struct {
		change func(m *ocispec.Manifest)
		want   string
	}{
		"annotations": {func(m *ocispec.Manifest) {
			m.Layers[0].Annotations, m.Layers[1].Annotations = m.Layers[1].Annotations, m.Layers[0].Annotations
		}, tampered},
		"foreign-annotations": {func(m *ocispec.Manifest) { m.Layers[1].Annotations = foreign.Layers[1].Annotations }, tampered},
		"digests": {func(m *ocispec.Manifest) {
			a, b := &m.Layers[0], &m.Layers[1]
			a.Digest, b.Digest, a.Size, b.Size = b.Digest, a.Digest, b.Size, a.Size
		}, tampered},
		"order":    {func(m *ocispec.Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] }, wrongDiffID},
		"twice":    {func(m *ocispec.Manifest) { m.Layers[1] = m.Layers[0] }, wrongDiffID},
		"as-plain": {func(m *ocispec.Manifest) { m.Layers[1].MediaType = ocispec.MediaTypeImageLayer }, "unexpected EOF"},
		"as-tar":   {func(m *ocispec.Manifest) { m.Layers[1].MediaType = ocispec.MediaTypeImageLayer + "+encrypted" }, "unexpected EOF"},
		"diff-ids": {config(func(ids []any) { ids[0], ids[1] = ids[1], ids[0] }), wrongDiffID},
		"diff-id":  {config(func(ids []any) { ids[1] = "sha256:" + strings.Repeat("0", 64) }), wrongDiffID},
		"larger":   {func(m *ocispec.Manifest) { m.Layers[1].Size++ }, "short read"},
		"smaller":  {func(m *ocispec.Manifest) { m.Layers[1].Size-- }, "read past expected size"},
	} {
		changed := c.Edit(image, suffix, test.change)
		harness.ExpectFailure(t, n.Crictl("pull", changed), test.want)
		n.ExpectNoSnapshots(t)
	}

	// What is not what its digest says, containerd finds: a layer, and a manifest.
	for what, file := range map[string]string{
		"layer":    c.Blob(foreign.Layers[1].Digest.String()),
		"manifest": c.Blob(harness.Read(t, c.Repository(other)+"/_manifests/tags/gzip/current/link")),
	} {
		was := harness.Read(t, file)
		b := []byte(was)
		b[len(b)/2] ^= 1
		harness.Write(t, file, string(b))
		harness.ExpectFailure(t, n.Crictl("pull", other), what, "unexpected commit digest")
		harness.Write(t, file, was)
		n.ExpectNoSnapshots(t)
	}
	harness.Output(t, n.Crictl("pull", other))
	harness.Output(t, n.Crictl("pull", image))
}
