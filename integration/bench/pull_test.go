package bench

import (
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkPull compares pulls by CRI through pilot with pulls of the plain image
// on a containerd that knows nothing of pilot, both with an empty content store.
func BenchmarkPull(b *testing.B) {
	dir := benchDir(b)
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	_, conf := harness.StartPilot(b, dir+"/ci", brokerURL)
	c := harness.NewCI(b, dir+"/ci", conf)
	images := map[string]string{}
	for _, k := range harness.LayerKinds {
		l, m := harness.NewLayout(b), newMaterial(b)
		var layers [][]byte
		for range 4 {
			layers = append(layers, m.layer(64<<20))
		}
		images[k.Name] = c.Registry + "/bulk:" + k.Name
		c.Publish(l, images[k.Name], l.ImageOf(k, layers), "provider:pilot:team-a")
		harness.Output(b, c.CtrPilot("images", "push", "--plain-http", images[k.Name]+"-plain"))
	}
	c.Stop(b)

	harness.StartPilot(b, dir+"/ours", brokerURL)
	ours := harness.NewDifferNode(b, dir+"/ours", harness.DifferConfig{Containerd: harness.Containerd2(), Unpacks: 1}) // as it is by default
	theirs := harness.StartNode(b, dir+"/theirs", harness.Containerd2(), "", "")
	pull := func(n *harness.Node, image string) func() float64 {
		return func() float64 {
			defer func() {
				harness.Output(b, n.Crictl("rmi", image))
				n.CollectGarbage(b)
			}()
			return took(func() { harness.Output(b, n.Crictl("pull", image)) })
		}
	}
	for _, k := range harness.LayerKinds {
		target := "≤ 1.05"
		if k.Name == "gzip" {
			target = "≤ 1.05, then < 1"
		}
		b.Run("Encrypted/"+k.Name, func(b *testing.B) {
			compare(b, comparison{"pull an encrypted image of 256 MiB, " + k.Name, "the plain one, containerd as it is", "ms", target},
				pull(ours, images[k.Name]), pull(theirs, images[k.Name]+"-plain"))
		})
	}
	for _, k := range harness.LayerKinds {
		b.Run("Plain/"+k.Name, func(b *testing.B) {
			compare(b, comparison{"pull a plain image through pilot, " + k.Name, "containerd as it is", "ms", "≤ 1.02"},
				pull(ours, images[k.Name]+"-plain"), pull(theirs, images[k.Name]+"-plain"))
		})
	}
}
