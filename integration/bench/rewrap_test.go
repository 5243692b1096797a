package bench

import (
	"os/exec"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkRewrap shows that it does not matter how large layers are.
func BenchmarkRewrap(b *testing.B) {
	dir := benchDir(b)
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a", "team-b")
	_, ociConf := harness.StartPilot(b, dir+"/ci", brokerURL)
	n := harness.NewNode(b, dir+"/ci", harness.Containerd2(), ociConf, "")
	address, _ := harness.StartRegistry(b, dir)
	for name, size := range map[string]int{"small": 10 << 20 / 4, "large": 256 << 20} {
		l, m := harness.NewLayout(b), newMaterial(b)
		var contents [][]byte
		for range 4 {
			contents = append(contents, m.layer(size))
		}
		name = address + "/app:" + name
		harness.Output(b, n.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", name, l.ImageOf(harness.LayerKinds[0], contents))))
		harness.Output(b, exec.Command("rm", dir+"/image.tar"))
		harness.Output(b, n.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", name))
		harness.Output(b, n.CtrPilot("images", "push", "--plain-http", name))
	}
	for _, flags := range [][]string{nil, {"--registry", "--plain-http"}} {
		rewrap := func(name string) func() float64 {
			from, to := "team-a", "team-b"
			return func() float64 {
				args := append([]string{"images", "rewrap", "--from", from, "--to", to}, flags...)
				from, to = to, from
				return took(func() { harness.Output(b, n.CtrPilot(append(args, address+"/app:"+name)...)) })
			}
		}
		name, where := "Containerd", "in containerd"
		if flags != nil {
			name, where = "Registry", "in a registry"
		}
		b.Run(name, func(b *testing.B) {
			compare(b, comparison{"rewrap an image of 1 GiB " + where, "the same with 10 MiB", "ms", "≈ 1"}, rewrap("large"), rewrap("small"))
		})
	}
}
