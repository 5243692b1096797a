package bench

import (
	"fmt"
	"os/exec"
	"strconv"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkImages compares ctr-pilot's encrypt and decrypt with imgcrypt's
// ctr-enc, on an image of 1 GiB in four layers.
func BenchmarkImages(b *testing.B) {
	dir := benchDir(b)
	harness.GoBuild(b, "", dir+"/", "./integration/testdata/ctr-enc")
	conf := harness.Write(b, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	n := harness.NewNode(b, dir+"/ci", harness.Containerd2(), conf, "")
	private, public := harness.KeyPair(b, dir+"/keys")
	_, other := harness.KeyPair(b, dir+"/other")

	imported := func(name string, layers, size int) {
		l, m := harness.NewLayout(b), newMaterial(b)
		var contents [][]byte
		for range layers {
			contents = append(contents, m.layer(size))
		}
		harness.Output(b, n.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", name, l.ImageOf(harness.LayerKinds[0], contents))))
		harness.Output(b, exec.Command("rm", dir+"/image.tar"))
	}
	remove := func(names ...string) {
		harness.Output(b, n.CtrPilot(append([]string{"images", "remove", "--sync"}, names...)...))
	}
	ours := func(args ...string) float64 {
		return took(func() { harness.Output(b, n.CtrPilot(append([]string{"images"}, args...)...)) })
	}
	theirs := func(op, key, from, to string) float64 {
		return took(func() { harness.Output(b, harness.Command(b, dir+"/ctr-enc", n.Socket, op, key, from, to)) })
	}
	perSecond := func(ms float64) float64 { return (1 << 30) / 1000 / ms }

	imported("plain", 4, 256<<20)
	b.Run("Encrypt", func(b *testing.B) {
		compare(b, comparison{"encrypt an image of 1 GiB in four layers", "ctr-enc", "MB/s", "≥ 3"}, func() float64 {
			defer remove("ours")
			return perSecond(ours("encrypt", "--recipient", "jwe:"+public, "plain", "ours"))
		}, func() float64 {
			defer remove("theirs")
			return perSecond(theirs("encrypt", public, "plain", "theirs"))
		})
	})
	harness.Output(b, n.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "plain", "encrypted"))
	remove("plain") // or what comes out is there already
	b.Run("Decrypt", func(b *testing.B) {
		compare(b, comparison{"decrypt an image of 1 GiB in four layers", "ctr-enc", "MB/s", "≥ 3"}, func() float64 {
			defer remove("ours")
			return perSecond(ours("decrypt", "--key", private, "encrypted", "ours"))
		}, func() float64 {
			defer remove("theirs")
			return perSecond(theirs("decrypt", private, "encrypted", "theirs"))
		})
	})

	// How the cost grows.
	again := func(name string) func() float64 {
		return func() float64 {
			return ours("encrypt", "--force", "--recipient", "jwe:"+other, "--key", private, name, name+"-both")
		}
	}
	imported("small", 4, 1<<20)
	harness.Output(b, n.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "small"))
	b.Run("AddRecipient", func(b *testing.B) {
		compare(b, comparison{"add a recipient, 1 GiB", "the same with 4 MiB", "ms", "≈ 1"}, again("encrypted"), again("small"))
	})
	remove("encrypted", "encrypted-both", "small", "small-both")
	encrypt := func(name string) func() float64 {
		return func() float64 {
			defer remove("ours")
			return ours("encrypt", "--recipient", "jwe:"+public, name, "ours")
		}
	}
	for _, layers := range []int{1, 4, 16, 64} {
		imported(strconv.Itoa(layers), layers, 256<<20/layers)
	}
	for _, layers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("Layers%d", layers), func(b *testing.B) {
			compare(b, comparison{fmt.Sprintf("encrypt 256 MiB in layers: %d", layers), "4", "ms", "≤ 1.1"}, encrypt(strconv.Itoa(layers)), encrypt("4"))
		})
	}
	imported("large", 4, 256<<20)
	b.Run("Linear", func(b *testing.B) {
		compare(b, comparison{"encrypt 1 GiB in four layers", "256 MiB", "ms", "≤ 4.4"}, encrypt("large"), encrypt("4"))
	})
}
