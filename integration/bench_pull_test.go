package integration

import (
	"testing"
)

// BenchmarkPull compares pulls by CRI through pilot with pulls of the plain image
// on a containerd that knows nothing of pilot, both with an empty content store.
func BenchmarkPull(b *testing.B) {
	dir := benchDir(b)
	_, brokerURL := broker(b, dir+"/broker", "team-a")
	_, conf := pilot(b, dir+"/ci", brokerURL)
	c := newCI(b, dir+"/ci", conf)
	images := map[string]string{}
	for _, k := range kinds {
		l, m := newLayout(b), newMaterial(b)
		var layers [][]byte
		for range 4 {
			layers = append(layers, m.layer(64<<20))
		}
		images[k.name] = c.registry + "/bulk:" + k.name
		c.publish(l, images[k.name], l.bulk(k, layers), "provider:pilot:team-a")
		output(b, c.ctrPilot("images", "push", "--plain-http", images[k.name]+"-plain"))
	}
	c.stop(b)

	pilot(b, dir+"/ours", brokerURL)
	ours := newDifferNode(b, dir+"/ours", differNode{v: containerd2(), unpacks: 1}) // as it is by default
	theirs := startNode(b, dir+"/theirs", containerd2(), "", "")
	pull := func(n *node, image string) func() float64 {
		return func() float64 {
			defer func() {
				output(b, n.crictl("rmi", image))
				n.collect(b)
			}()
			return took(func() { output(b, n.crictl("pull", image)) })
		}
	}
	for _, k := range kinds {
		target := "≤ 1.05"
		if k.name == "gzip" {
			target = "≤ 1.05, then < 1"
		}
		b.Run("Encrypted/"+k.name, func(b *testing.B) {
			compare(b, comparison{"pull an encrypted image of 256 MiB, " + k.name, "the plain one, containerd as it is", "ms", target},
				pull(ours, images[k.name]), pull(theirs, images[k.name]+"-plain"))
		})
	}
	for _, k := range kinds {
		b.Run("Plain/"+k.name, func(b *testing.B) {
			compare(b, comparison{"pull a plain image through pilot, " + k.name, "containerd as it is", "ms", "≤ 1.02"},
				pull(ours, images[k.name]+"-plain"), pull(theirs, images[k.name]+"-plain"))
		})
	}
}
