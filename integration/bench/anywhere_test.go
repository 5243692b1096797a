package bench

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// anywhereLayers and anywhereSize are those of the image that is encrypted: 1 GiB before
// its layers are compressed.
const (
	anywhereLayers = 4
	anywhereSize   = 256 << 20
)

// anywhere runs ctr-pilot and Debian 13's skopeo where there is no containerd.
type anywhere struct {
	b               *testing.B
	dir             string
	debian          *harness.Debian
	private, public string
}

// place is where images are: a directory of layouts, or a registry.
type place struct {
	title  string
	prefix string   // of images' names
	files  []string // patterns of the files that images consist of
}

func (p place) image(name string) string { return p.prefix + name + ":app" }

// BenchmarkAnywhere compares ctr-pilot with skopeo, from layout to layout and from
// registry to registry. skopeo compresses layers that are not.
func BenchmarkAnywhere(b *testing.B) {
	dir := benchDir(b)
	a := &anywhere{b: b, dir: dir, debian: harness.NewDebian(b, dir, "")}
	if err := os.Mkdir(a.temporary(), 0o755); err != nil {
		b.Fatal(err)
	}
	a.private, a.public = harness.KeyPair(b, dir+"/keys")
	address, storage := harness.StartRegistry(b, dir)
	storage += "/docker/registry/v2"
	layouts := place{"OCI layout to OCI layout", "oci:" + dir + "/layouts/", []string{dir + "/layouts/*"}}
	registry := place{"registry to registry", "docker://" + address + "/", []string{storage + "/repositories/*", storage + "/blobs/sha256/*/*"}}
	for _, k := range harness.LayerKinds[:2] {
		removeAll := a.cleaner(append(slices.Clone(layouts.files), registry.files...))
		size := a.write(k, dir+"/layouts/plain")
		b.Run("Layout/"+k.Name, func(b *testing.B) {
			a.compare(b, layouts, k, size, map[string]string{"tar": "≥ 5", "gzip": "≥ 3"}[k.Name])
			what := "encrypt 1 GiB in four layers, " + k.Name + ", " + layouts.title
			b.Run("Yardstick", func(b *testing.B) {
				compare(b, comparison{what, "SHA-256, HMAC-SHA-256, AES-CTR and two copies in memory", "MB/s", "≥ 0.7"}, a.encrypt(layouts, size), func() float64 {
					return rate(size, func() { yardstick(b, size) })
				})
			})
		})
		a.run(a.skopeo("--preserve-digests", layouts.image("plain"), registry.image("plain")))
		if err := os.RemoveAll(dir + "/layouts/plain"); err != nil {
			b.Fatal(err)
		}
		b.Run("Registry/"+k.Name, func(b *testing.B) {
			a.compare(b, registry, k, size, "≥ 3")
			b.Run("Memory", func(b *testing.B) {
				measure(b, comparison{"encrypt 1 GiB in four layers, " + k.Name + ", " + registry.title + ", peak memory", "target: 64 MiB", "MB", "≤ 1"}, (64<<20)/1e6, func() float64 {
					defer a.cleaner(registry.files)()
					return a.run(a.ctrPilot("encrypt", "--recipient", "jwe:"+a.public, registry.image("plain"), registry.image("new")))
				})
			})
		})
		removeAll()
	}
}

// compare compares the encryption of an image, which has a size in bytes, and its
// decryption if skopeo does not compress it again.
func (a *anywhere) compare(b *testing.B, p place, k harness.LayerKind, size int, target string) {
	what := "1 GiB in four layers, " + k.Name + ", " + p.title
	b.Run("Encrypt", func(b *testing.B) {
		compare(b, comparison{"encrypt " + what, "skopeo", "MB/s", target}, a.encrypt(p, size), a.rate(p, size, func() *exec.Cmd {
			return a.skopeo("--encryption-key", "jwe:"+a.public, p.image("plain"), p.image("new"))
		}))
	})
	if k.Name == "tar" {
		return
	}
	b.Run("Decrypt", func(b *testing.B) {
		defer a.cleaner(p.files)()
		a.run(a.ctrPilot("encrypt", "--recipient", "jwe:"+a.public, p.image("plain"), p.image("encrypted")))
		compare(b, comparison{"decrypt " + what, "skopeo", "MB/s", "≥ 3"}, a.rate(p, size, func() *exec.Cmd {
			return a.ctrPilot("decrypt", "--key", a.private, p.image("encrypted"), p.image("new"))
		}), a.rate(p, size, func() *exec.Cmd {
			return a.skopeo("--decryption-key", a.private, p.image("encrypted"), p.image("new"))
		}))
	})
}

// encrypt returns a measurement of ctr-pilot's encryption.
func (a *anywhere) encrypt(p place, size int) func() float64 {
	return a.rate(p, size, func() *exec.Cmd {
		return a.ctrPilot("encrypt", "--recipient", "jwe:"+a.public, p.image("plain"), p.image("new"))
	})
}

// rate returns a measurement of a command that makes an image, which is removed again.
func (a *anywhere) rate(p place, size int, cmd func() *exec.Cmd) func() float64 {
	return func() float64 {
		defer a.cleaner(p.files)()
		return rate(size, func() { a.run(cmd()) })
	}
}

// write writes the image as a layout and returns the size of its layers in bytes.
func (a *anywhere) write(k harness.LayerKind, dir string) (size int) {
	l, m := harness.NewLayout(a.b), newMaterial(a.b)
	layers := make([][]byte, anywhereLayers)
	for i := range layers {
		layers[i] = m.layer(anywhereSize)
	}
	l.Write(dir, "app", l.ImageOf(k, layers))
	for _, blob := range l.Files {
		size += len(blob)
	}
	return size
}

// cleaner returns a function that removes the files of these patterns that are not there
// now.
func (a *anywhere) cleaner(patterns []string) func() {
	list := func() (all []string) {
		for _, p := range patterns {
			files, err := filepath.Glob(p)
			if err != nil {
				a.b.Fatal(err)
			}
			all = append(all, files...)
		}
		return all
	}
	before := list()
	return func() {
		for _, file := range list() {
			if !slices.Contains(before, file) {
				if err := os.RemoveAll(file); err != nil {
					a.b.Fatal(err)
				}
			}
		}
	}
}

func (a *anywhere) temporary() string { return a.dir + "/tmp" }

func (a *anywhere) ctrPilot(args ...string) *exec.Cmd {
	cmd := harness.Command(a.b, "ctr-pilot", append([]string{"--address", a.dir + "/nobody.sock", "images"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+a.temporary(), "HOME="+a.dir)
	return cmd
}

func (a *anywhere) skopeo(args ...string) *exec.Cmd {
	return a.debian.Run("skopeo", append([]string{"copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"}, args...)...)
}

// run runs a program and returns the peak of its memory in megabytes of 10^6 bytes. It may
// leave no temporary file, at no time.
func (a *anywhere) run(cmd *exec.Cmd) (peak float64) {
	a.b.Helper()
	return runWatched(a.b, cmd, func() {
		if files, err := os.ReadDir(a.temporary()); err != nil || len(files) > 0 {
			a.b.Fatalf("%s has temporary files: %v, %v", cmd, files, err)
		}
	})
}

// runWatched runs a program and returns the peak of its memory in megabytes of 10^6 bytes. It
// calls watch again and again meanwhile.
func runWatched(b *testing.B, cmd *exec.Cmd, watch func()) (peak float64) {
	b.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if err != nil {
				b.Fatalf("%s: %v\n%s", cmd, err, out.Bytes())
			}
			return peak
		case <-tick.C:
			peak = max(peak, peakMemory(cmd.Process.Pid))
			watch()
		}
	}
}

// peakMemory returns the most memory that a process has had in megabytes of 10^6 bytes, or
// 0 if it has ended. What wait reports includes this process, from which it was forked.
func peakMemory(pid int) float64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := bytes.Cut(status, []byte("VmHWM:"))
	var kib float64
	fmt.Sscan(string(rest), &kib)
	return kib * 1024 / 1e6
}

// yardstick does to size bytes in memory what encrypting has to do at the least.
func yardstick(b *testing.B, size int) {
	b.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		b.Fatal(err)
	}
	plain := make([]byte, 1<<20)
	var wg sync.WaitGroup
	for range anywhereLayers {
		wg.Go(func() {
			mac, sum, ctr := hmac.New(sha256.New, key), sha256.New(), cipher.NewCTR(block, make([]byte, aes.BlockSize))
			in, out := make([]byte, len(plain)), make([]byte, len(plain))
			for range size / anywhereLayers / len(plain) {
				copy(in, plain)
				ctr.XORKeyStream(out, in)
				mac.Write(out)
				sum.Write(out)
				copy(in, out)
			}
		})
	}
	wg.Wait()
}
