//go:build engines

package engines

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// builder is a BuildKit with a node's containerd as its worker.
type builder struct {
	*harness.Node
	address  string // of buildkitd
	contexts int
}

// newBuilder starts a buildkitd on a containerd, with more in its configuration.
func newBuilder(t testing.TB, n *harness.Node, registry string, more ...string) *builder {
	t.Helper()
	for _, name := range []string{"buildkitd", "buildctl"} {
		if _, err := os.Stat(filepath.Join(harness.Tools, "bin", name)); err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s engines\"", name, harness.Tools)
		}
	}
	b := &builder{Node: n, address: "unix://" + n.Dir + "/buildkitd.sock"}
	conf := harness.Write(t, filepath.Join(n.Dir, "buildkitd.toml"), fmt.Sprintf("[otel]\n  socketPath = '%s/otel.sock'\n[registry.'%s']\n  http = true\n", n.Dir, registry)+strings.Join(more, ""))
	harness.Start(t, n.Dir, "buildkitd", exec.Command(filepath.Join(harness.Tools, "bin/buildkitd"), "--config", conf, "--root", n.Dir+"/buildkit", "--addr", b.address,
		"--oci-worker=false", "--containerd-worker=true", "--containerd-worker-addr="+n.Socket, "--containerd-worker-net=host"))
	harness.Await(t, "buildkitd", func() error {
		return exec.Command(filepath.Join(harness.Tools, "bin/buildctl"), "--addr", b.address, "debug", "workers").Run()
	})
	// Otherwise its mounts would stay.
	t.Cleanup(func() { b.buildctl("prune", "--all").Run() })
	return b
}

func (b *builder) buildctl(args ...string) *exec.Cmd {
	b.T.Helper()
	return harness.Command(b.T, filepath.Join(harness.Tools, "bin/buildctl"), append([]string{"--addr", b.address}, args...)...)
}

// build returns a command that builds a Dockerfile, with files beside it.
func (b *builder) build(dockerfile string, files map[string]string, args ...string) *exec.Cmd {
	b.T.Helper()
	b.contexts++
	dir := filepath.Join(b.Dir, fmt.Sprintf("context%d", b.contexts))
	harness.Write(b.T, filepath.Join(dir, "Dockerfile"), dockerfile)
	for name, content := range files {
		harness.Write(b.T, filepath.Join(dir, name), content)
	}
	return b.buildctl(append([]string{"build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir}, args...)...)
}

// says runs a build that must succeed and print each of want.
func says(t testing.TB, cmd *exec.Cmd, want ...string) {
	t.Helper()
	out, err := cmd.CombinedOutput() // progress goes to standard error
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			t.Errorf("%v: want %q in\n%s", cmd.Args, w, out)
		}
	}
}

// in returns a command of the node in BuildKit's namespace.
func (b *builder) in(args ...string) *exec.Cmd {
	b.T.Helper()
	return b.CtrPilot(append([]string{"--namespace", "buildkit"}, args...)...)
}

// forget removes all that the builder has stored.
func (b *builder) forget(t testing.TB) {
	t.Helper()
	for name := range strings.Lines(harness.Output(t, b.in("images", "list", "-q"))) {
		harness.Output(t, b.in("images", "remove", "--sync", strings.TrimSpace(name)))
	}
	harness.Output(t, b.buildctl("prune", "--all"))
}

// manifestOf reads the manifest of an image in the registry.
func manifestOf(c *harness.CI, name string) (m ocispec.Manifest) {
	c.T.Helper()
	_, tag, _ := strings.Cut(strings.TrimPrefix(name, c.Registry+"/"), ":")
	link := harness.Read(c.T, filepath.Join(c.Repository(name), "_manifests/tags", tag, "current/link"))
	if err := json.Unmarshal([]byte(harness.Read(c.T, c.Blob(link))), &m); err != nil {
		c.T.Fatal(err)
	}
	return m
}

// builtOn checks that an image consists of the encrypted layers of its base, without their
// keys, and of plain layers.
func builtOn(t testing.TB, base, m ocispec.Manifest, plain int) {
	t.Helper()
	if len(m.Layers) != len(base.Layers)+plain {
		t.Fatalf("layers: %+v", m.Layers)
	}
	for i, l := range m.Layers {
		encrypted := strings.HasSuffix(l.MediaType, "+encrypted")
		if i < len(base.Layers) && (!encrypted || l.Digest != base.Layers[i].Digest || len(l.Annotations) > 0) || i >= len(base.Layers) && encrypted {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
}

// TestBuildKit builds on encrypted images, and makes the results pullable on nodes, as
// docs/buildkit.md describes.
func TestBuildKit(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	home := harness.TempDir(t)
	harness.StartPilot(t, home, c.BrokerURL)
	b := newBuilder(t, harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()}), c.Registry)
	b.Ocicrypt = c.Ocicrypt
	elsewhere := harness.TempDir(t)
	harness.StartPilot(t, elsewhere, c.BrokerURL)
	n := harness.NewDifferNode(t, elsewhere, harness.DifferConfig{Containerd: harness.Containerd2()})

	base := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	greeting := "hello, " + c.Secrets[base]
	top := harness.NewSecret()
	// A layer each of RUN and COPY.
	dockerfile := "FROM " + base + "\nRUN [\"/hello\"]\nCOPY top /top\n"
	files := map[string]string{"top": top}
	built := c.Registry + "/built:1"

	for _, k := range harness.LayerKinds {
		image := c.Image(k, "provider:pilot:team-a")
		says(t, b.build("FROM "+image+"\nRUN [\"/hello\"]\n", nil), "hello, "+c.Secrets[image])
	}
	l := harness.NewLayout(t)
	index := c.Registry + "/index:1"
	secret := harness.NewSecret()
	c.Publish(l, index, l.Index(harness.LayerKinds[1], secret), "provider:pilot:team-a")
	says(t, b.build("FROM "+index+"\nRUN [\"/hello\"]\n", nil), "hello, "+secret)

	t.Run("push", func(t *testing.T) {
		says(t, b.build(dockerfile, files, "--output", "type=image,push=true,name="+built), greeting)
		builtOn(t, manifestOf(c, base), manifestOf(c, built), 2)
		harness.ExpectFailure(t, n.Ctr("images", "pull", "--plain-http", built), "nor a manifest in namespace default has its key", "encrypt --keys-from BASE")
		harness.ExpectFailure(t, n.Crictl("pull", built), "nor a manifest in namespace k8s.io has its key")
		n.ExpectNoTraces(t)
		b.forget(t)
		harness.ExpectFailure(t, b.build("FROM "+built+"\nRUN [\"/hello\"]\n", nil), "nor a manifest in namespace buildkit has its key")
	})
	if t.Failed() {
		return
	}

	t.Run("usable", func(t *testing.T) {
		// In BuildKit's own containerd, so that nothing leaves it in plain.
		local, usable := c.Registry+"/usable:local", c.Registry+"/usable:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,name="+local), greeting)
		info := b.in("images", "layerinfo", local)
		if out, err := info.CombinedOutput(); err != nil || strings.Count(string(out), "NO KEY") != 2 || !strings.Contains(string(out), "2 layers are encrypted and have no key") {
			t.Errorf("%v: %v\n%s", info.Args, err, out)
		}
		encrypt := []string{"images", "encrypt", "--recipient", "provider:pilot:team-b"}
		harness.ExpectFailure(t, b.in(append(encrypt, local, usable)...), "it is encrypted and has no keys", "--keys-from")
		harness.ExpectFailure(t, b.in(append(encrypt, "--keys-from", built, "--plain-http", local, usable)...), "it is encrypted and has no keys")
		harness.ExpectFailure(t, b.in(append(encrypt, "--keys-from", c.Registry+"/none:1", "--plain-http", local, usable)...), "--keys-from "+c.Registry+"/none:1", "not found")
		harness.ExpectFailure(t, b.in(append(encrypt, "--plain-http", local, usable)...), "--plain-http is for images named docker:")
		// As an attacker who can write to the registry.
		swapped := c.Edit(base, "swapped", func(m *ocispec.Manifest) {
			m.Layers[0].Annotations, m.Layers[1].Annotations = m.Layers[1].Annotations, m.Layers[0].Annotations
		})
		harness.ExpectFailure(t, b.in(append(encrypt, "--keys-from", swapped, "--plain-http", local, usable)...), "can't be taken from the base image", "HMAC does not match")
		harness.Output(t, b.in(append(encrypt, "--keys-from", base, "--plain-http", local, usable)...))
		checkUsable(t, c, b, n, usable, greeting, base)
	})

	t.Run("archives", func(t *testing.T) {
		for _, format := range []string{"oci", "docker"} {
			archive, name := filepath.Join(dir, format+".tar"), c.Registry+"/"+format+":1"
			says(t, b.build(dockerfile, files, "--output", "type="+format+",name="+name+",dest="+archive))
			harness.ExpectFailure(t, n.Ctr("images", "import", archive), "nor a manifest in namespace default has its key")
			harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", archive))
			harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-b", "--keys-from", base, "--plain-http", name))
			harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
			checkUsable(t, c, b, n, name, greeting, base)
		}
		// Docker's media types are not used in encrypted images.
		name := c.Registry + "/dockertypes:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,oci-mediatypes=false,push=true,name="+name))
		builtOn(t, manifestOf(c, base), manifestOf(c, name), 2)
		harness.Output(t, b.in("images", "encrypt", "--recipient", "provider:pilot:team-b", "--keys-from", base, "--plain-http", name))
		checkUsable(t, c, b, n, name, greeting, base)
	})

	t.Run("plain", func(t *testing.T) {
		// Files that leave an encrypted image other than in its layers.
		name := c.Registry + "/copied:1"
		says(t, b.build("FROM "+base+" AS base\nFROM scratch\nCOPY --from=base /secret /a\nCOPY --from="+base+" /hello /b\n", nil,
			"--output", "type=image,compression=uncompressed,push=true,name="+name))
		m := manifestOf(c, name)
		builtOn(t, ocispec.Manifest{}, m, 2)
		if !strings.Contains(harness.Read(t, c.Blob(m.Layers[0].Digest.String())), c.Secrets[base]) {
			t.Error("what COPY --from took is not in the image's own layer as it is")
		}
		out := filepath.Join(dir, "local")
		says(t, b.build(dockerfile, files, "--output", "type=local,dest="+out))
		if got := harness.Read(t, out+"/secret"); got != c.Secrets[base] {
			t.Errorf("type=local: %s", got)
		}
		says(t, b.build(dockerfile, files, "--output", "type=tar,dest="+out+".tar"))
		if got := fileIn(t, out+".tar", "secret"); got != c.Secrets[base] {
			t.Errorf("type=tar: %s", got)
		}
	})

	t.Run("compression", func(t *testing.T) {
		name := c.Registry + "/compressed:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,compression=zstd,push=true,name="+name))
		builtOn(t, manifestOf(c, base), manifestOf(c, name), 2)
		for _, compression := range []string{"zstd", "gzip", "uncompressed"} {
			harness.ExpectFailure(t, b.build(dockerfile, files, "--output", "type=image,force-compression=true,compression="+compression+",push=true,name="+name), "unsupported media type", "+encrypted")
		}
	})

	t.Run("cache", func(t *testing.T) {
		cache := c.Registry + "/cache:1"
		says(t, b.build(dockerfile, files, "--export-cache", "type=registry,mode=max,ref="+cache))
		encrypted := 0
		for _, l := range manifestOf(c, cache).Layers {
			for key := range l.Annotations {
				if strings.Contains(key, ".enc.") {
					t.Errorf("layer with keys: %+v", l)
				}
			}
			if slices.ContainsFunc(manifestOf(c, base).Layers, func(b ocispec.Descriptor) bool { return b.Digest == l.Digest && b.MediaType == l.MediaType }) {
				encrypted++
			}
		}
		if encrypted != 2 {
			t.Errorf("the cache has %d of the base's layers", encrypted)
		}
		localCache := filepath.Join(dir, "localcache")
		says(t, b.build(dockerfile, files, "--export-cache", "type=local,mode=max,dest="+localCache))
		inline := c.Registry + "/inline:1"
		says(t, b.build(dockerfile, files, "--export-cache", "type=inline", "--output", "type=image,push=true,name="+inline))
		builtOn(t, manifestOf(c, base), manifestOf(c, inline), 2)
		for _, from := range []string{"type=registry,ref=" + cache, "type=local,src=" + localCache, "type=registry,ref=" + inline} {
			b.forget(t)
			// BuildKit may have containerd collect the base's manifest before it
			// unpacks the layers, unless the image is there.
			harness.Output(t, b.in("images", "pull", "--plain-http", base))
			says(t, b.build(dockerfile+"RUN [\"/hello\"]\n", files, "--import-cache", from), "CACHED", greeting)
		}
	})

	t.Run("hostile", func(t *testing.T) {
		// Other images of the repository name the same layers with each other's keys, and
		// are built on first.
		b.forget(t)
		var hostile []string
		for i := range 3 {
			hostile = append(hostile, c.Edit(base, fmt.Sprintf("hostile%d", i), func(m *ocispec.Manifest) {
				m.Annotations = map[string]string{"n": fmt.Sprint(i)}
				first, second := &m.Layers[0], &m.Layers[1]
				first.Annotations, second.Annotations = second.Annotations, first.Annotations
				if i == 1 { // HMACs of the right ones
					const public = "org.opencontainers.image.enc.pubopts"
					first.Annotations[public], second.Annotations[public] = second.Annotations[public], first.Annotations[public]
				}
			}))
		}
		harness.ExpectFailure(t, b.build("FROM "+hostile[0]+"\nRUN [\"/hello\"]\n", nil), "HMAC does not match")
		for _, name := range hostile {
			harness.ExpectFailure(t, b.build("FROM "+name+"\nRUN [\"/hello\"]\n", nil), "pilot: layer sha256:")
		}
		says(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), greeting)
	})

	t.Run("no right", func(t *testing.T) {
		d := harness.TempDir(t)
		_, other := harness.StartBroker(t, d+"/broker", "team-b")
		harness.StartPilot(t, d, other)
		b := newBuilder(t, harness.NewDifferNode(t, d, harness.DifferConfig{Containerd: harness.Containerd2()}), c.Registry)
		harness.ExpectFailure(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), "pilot: layer sha256:", "team-a")
	})

	t.Run("containerd 1.7", func(t *testing.T) {
		d := harness.TempDir(t)
		harness.StartPilot(t, d, c.BrokerURL)
		b := newBuilder(t, harness.NewDifferNode(t, d, harness.DifferConfig{Containerd: harness.Containerd17()}), c.Registry)
		says(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), greeting)
	})
}

// checkUsable checks that a node runs an image, which the builder pushes if it has it, and
// that all its layers are encrypted: those of its base for the same recipients as before
// and for team-b.
func checkUsable(t testing.TB, c *harness.CI, b *builder, n *harness.Node, name, greeting, base string) {
	t.Helper()
	if strings.Contains(harness.Output(t, b.in("images", "list", "-q")), name+"\n") {
		harness.Output(t, b.in("images", "push", "--plain-http", name))
	}
	m := manifestOf(c, name)
	for i, l := range m.Layers {
		recipients := 1
		if i < len(manifestOf(c, base).Layers) {
			recipients = 2
		}
		keys := l.Annotations["org.opencontainers.image.enc.keys.provider.pilot"]
		if !strings.HasSuffix(l.MediaType, "+encrypted") || keys == "" || len(strings.Split(keys, ",")) != recipients {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	harness.Output(t, n.Ctr("images", "pull", "--plain-http", name))
	if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", name, "c", "/hello")); !strings.Contains(out, greeting) {
		t.Errorf("%s: %s", name, out)
	}
	harness.Output(t, n.Ctr("images", "remove", "--sync", name))
	harness.Output(t, n.Crictl("pull", name))
	harness.Output(t, n.Crictl("rmi", name))
	b.forget(t)
	says(t, b.build("FROM "+name+"\nRUN [\"/hello\"]\n", nil), greeting)
	b.forget(t)
}

// fileIn returns a file in a tar archive.
func fileIn(t testing.TB, archive, name string) string {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s in %s: %v", name, archive, err)
		}
		if h.Name == name {
			content, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return string(content)
		}
	}
}

// TestBuiltinBuildKit builds on an encrypted image with a containerd that has pilot's
// differ compiled in.
func TestBuiltinBuildKit(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	b := newBuilder(t, harness.BuiltinNode(t, dir, c.Ocicrypt), c.Registry)
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	says(t, b.build("FROM "+image+"\nRUN [\"/hello\"]\n", nil), "hello, "+c.Secrets[image])
}
