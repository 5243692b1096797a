package pull

import (
	"fmt"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

// BenchmarkNeeds asks which keys containers need, as pilot does when one is created: by the
// image's name, which takes a call of containerd's, and by its digest. Of 200 at once it
// measures all.
func BenchmarkNeeds(b *testing.B) {
	dir := harness.TempDir(b)
	c := harness.StartCI(b, dir, "team-a")
	image, other := twoLayers(c, "a:1", harness.LayerKinds[1], "provider:pilot:team-a"), twoLayers(c, "b:1", harness.LayerKinds[1], "provider:pilot:team-a")
	home := harness.TempDir(b)
	harness.StartPilot(b, home, c.BrokerURL)
	n := harness.NewDifferNode(b, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	images := map[string]string{"encrypted": image, "plain": other + "-plain"}
	for _, image := range images {
		harness.Output(b, n.Crictl("pull", image))
	}
	client, err := plugin.Dial(n.Socket)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	record, err := layerkeys.Open(dir + "/layers")
	if err != nil {
		b.Fatal(err)
	}
	defer record.Close()
	r := imagekeys.New(imagekeys.Config{Client: client, Record: record})
	needs := func(image imagekeys.Image) {
		if _, err := r.Needs(b.Context(), "k8s.io", image); err != nil {
			b.Error(err)
		}
	}
	for kind, name := range images {
		found, err := client.ImageService().Get(namespaces.WithNamespace(b.Context(), "k8s.io"), name)
		if err != nil {
			b.Fatal(err)
		}
		target := imagekeys.Image{Name: name, Digest: found.Target.Digest}
		for how, image := range map[string]imagekeys.Image{"name": {Name: name}, "digest": target} {
			b.Run(fmt.Sprintf("%s by %s", kind, how), func(b *testing.B) {
				for b.Loop() {
					needs(image)
				}
			})
			b.Run(fmt.Sprintf("200 times %s by %s", kind, how), func(b *testing.B) {
				for b.Loop() {
					var wg sync.WaitGroup
					for range 200 {
						wg.Go(func() { needs(image) })
					}
					wg.Wait()
				}
			})
		}
	}
}
