//go:build engines

package integration

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

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// builder is a BuildKit whose worker is a node's containerd.
type builder struct {
	*node
	address  string // of buildkitd
	contexts int
}

// newBuilder starts a buildkitd on a containerd that has pilot as its differ.
func newBuilder(t testing.TB, n *node, registry string) *builder {
	t.Helper()
	for _, name := range []string{"buildkitd", "buildctl"} {
		if _, err := os.Stat(filepath.Join(tools, "bin", name)); err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s engines\"", name, tools)
		}
	}
	b := &builder{node: n, address: "unix://" + n.dir + "/buildkitd.sock"}
	conf := write(t, filepath.Join(n.dir, "buildkitd.toml"), fmt.Sprintf("[otel]\n  socketPath = '%s/otel.sock'\n[registry.'%s']\n  http = true\n", n.dir, registry))
	start(t, n.dir, "buildkitd", exec.Command(filepath.Join(tools, "bin/buildkitd"), "--config", conf, "--root", n.dir+"/buildkit", "--addr", b.address,
		"--oci-worker=false", "--containerd-worker=true", "--containerd-worker-addr="+n.socket, "--containerd-worker-net=host"))
	await(t, "buildkitd", func() error {
		return exec.Command(filepath.Join(tools, "bin/buildctl"), "--addr", b.address, "debug", "workers").Run()
	})
	// What it built with stays mounted otherwise.
	t.Cleanup(func() { b.buildctl("prune", "--all").Run() })
	return b
}

func (b *builder) buildctl(args ...string) *exec.Cmd {
	b.t.Helper()
	return command(b.t, filepath.Join(tools, "bin/buildctl"), append([]string{"--addr", b.address}, args...)...)
}

// build returns a command that builds a Dockerfile, with files beside it.
func (b *builder) build(dockerfile string, files map[string]string, args ...string) *exec.Cmd {
	b.t.Helper()
	b.contexts++
	dir := filepath.Join(b.dir, fmt.Sprintf("context%d", b.contexts))
	write(b.t, filepath.Join(dir, "Dockerfile"), dockerfile)
	for name, content := range files {
		write(b.t, filepath.Join(dir, name), content)
	}
	return b.buildctl(append([]string{"build", "--progress", "plain", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir}, args...)...)
}

// says runs a build that has to succeed and print each of want.
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

// in returns the node's command in BuildKit's namespace.
func (b *builder) in(args ...string) *exec.Cmd {
	b.t.Helper()
	return b.ctrPilot(append([]string{"--namespace", "buildkit"}, args...)...)
}

// forget makes the builder as if it had never built anything.
func (b *builder) forget(t testing.TB) {
	t.Helper()
	for name := range strings.Lines(output(t, b.in("images", "list", "-q"))) {
		output(t, b.in("images", "remove", "--sync", strings.TrimSpace(name)))
	}
	output(t, b.buildctl("prune", "--all"))
}

// manifestOf reads the manifest of an image in the registry.
func (c *ci) manifestOf(name string) (m ocispec.Manifest) {
	c.t.Helper()
	_, tag, _ := strings.Cut(strings.TrimPrefix(name, c.registry+"/"), ":")
	link := read(c.t, filepath.Join(c.repository(name), "_manifests/tags", tag, "current/link"))
	if err := json.Unmarshal([]byte(read(c.t, c.blob(link))), &m); err != nil {
		c.t.Fatal(err)
	}
	return m
}

// builtOn checks that an image consists of the encrypted layers of its base,
// without their keys, and of layers that anybody can read.
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

// TestBuildKit builds on encrypted images, and makes images of the outcome that
// nodes can pull. What it finds of the outcome, docs/buildkit.md says.
func TestBuildKit(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a", "team-b")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	home := tempDir(t)
	pilot(t, home, brokerURL)
	b := newBuilder(t, newDifferNode(t, home, differNode{v: containerd2()}), c.registry)
	b.ocicrypt = ociConf
	elsewhere := tempDir(t)
	pilot(t, elsewhere, brokerURL)
	n := newDifferNode(t, elsewhere, differNode{v: containerd2()})

	base := c.image(kinds[1], "provider:pilot:team-a")
	greeting := "hello, " + c.secrets[base]
	top := newSecret()
	// A layer each of RUN and COPY.
	dockerfile := "FROM " + base + "\nRUN [\"/hello\"]\nCOPY top /top\n"
	files := map[string]string{"top": top}
	built := c.registry + "/built:1"

	for _, k := range kinds {
		image := c.image(k, "provider:pilot:team-a")
		says(t, b.build("FROM "+image+"\nRUN [\"/hello\"]\n", nil), "hello, "+c.secrets[image])
	}
	l := newLayout(t)
	index := c.registry + "/index:1"
	secret := newSecret()
	c.publish(l, index, l.index(kinds[1], secret), "provider:pilot:team-a")
	says(t, b.build("FROM "+index+"\nRUN [\"/hello\"]\n", nil), "hello, "+secret)

	t.Run("push", func(t *testing.T) {
		says(t, b.build(dockerfile, files, "--output", "type=image,push=true,name="+built), greeting)
		builtOn(t, c.manifestOf(base), c.manifestOf(built), 2)
		fails(t, n.ctr("images", "pull", "--plain-http", built), "nor a manifest in namespace default has its key", "encrypt --keys-from BASE")
		fails(t, n.crictl("pull", built), "nor a manifest in namespace k8s.io has its key")
		n.noTraces(t)
		b.forget(t)
		fails(t, b.build("FROM "+built+"\nRUN [\"/hello\"]\n", nil), "nor a manifest in namespace buildkit has its key")
	})
	if t.Failed() {
		return
	}

	t.Run("usable", func(t *testing.T) {
		// In BuildKit's own containerd, so that nothing plain leaves it.
		local, usable := c.registry+"/usable:local", c.registry+"/usable:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,name="+local), greeting)
		info := b.in("images", "layerinfo", local)
		if out, err := info.CombinedOutput(); err != nil || strings.Count(string(out), "NO KEY") != 2 || !strings.Contains(string(out), "2 layers are encrypted and have no key") {
			t.Errorf("%v: %v\n%s", info.Args, err, out)
		}
		encrypt := []string{"images", "encrypt", "--recipient", "provider:pilot:team-b"}
		fails(t, b.in(append(encrypt, local, usable)...), "it is encrypted and has no keys", "--keys-from")
		fails(t, b.in(append(encrypt, "--keys-from", built, "--plain-http", local, usable)...), "it is encrypted and has no keys")
		fails(t, b.in(append(encrypt, "--keys-from", c.registry+"/none:1", "--plain-http", local, usable)...), "--keys-from "+c.registry+"/none:1", "not found")
		fails(t, b.in(append(encrypt, "--plain-http", local, usable)...), "--plain-http is for --keys-from")
		// As by somebody who can write to the registry.
		swapped := c.edit(base, "swapped", func(m *ocispec.Manifest) {
			m.Layers[0].Annotations, m.Layers[1].Annotations = m.Layers[1].Annotations, m.Layers[0].Annotations
		})
		fails(t, b.in(append(encrypt, "--keys-from", swapped, "--plain-http", local, usable)...), "can't be taken from the base image", "HMAC does not match")
		output(t, b.in(append(encrypt, "--keys-from", base, "--plain-http", local, usable)...))
		c.usable(t, b, n, usable, greeting, base)
	})

	t.Run("archives", func(t *testing.T) {
		for _, format := range []string{"oci", "docker"} {
			archive, name := filepath.Join(dir, format+".tar"), c.registry+"/"+format+":1"
			says(t, b.build(dockerfile, files, "--output", "type="+format+",name="+name+",dest="+archive))
			fails(t, n.ctr("images", "import", archive), "nor a manifest in namespace default has its key")
			output(t, c.ctrPilot("images", "import", "--no-unpack", archive))
			output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-b", "--keys-from", base, "--plain-http", name))
			output(t, c.ctrPilot("images", "push", "--plain-http", name))
			c.usable(t, b, n, name, greeting, base)
		}
		// Docker's media types around it are none of an encrypted image's.
		name := c.registry + "/dockertypes:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,oci-mediatypes=false,push=true,name="+name))
		builtOn(t, c.manifestOf(base), c.manifestOf(name), 2)
		output(t, b.in("images", "encrypt", "--recipient", "provider:pilot:team-b", "--keys-from", base, "--plain-http", name))
		c.usable(t, b, n, name, greeting, base)
	})

	t.Run("plain", func(t *testing.T) {
		// Files that leave an encrypted image by another way than its layers.
		name := c.registry + "/copied:1"
		says(t, b.build("FROM "+base+" AS base\nFROM scratch\nCOPY --from=base /secret /a\nCOPY --from="+base+" /hello /b\n", nil,
			"--output", "type=image,compression=uncompressed,push=true,name="+name))
		m := c.manifestOf(name)
		builtOn(t, ocispec.Manifest{}, m, 2)
		if !strings.Contains(read(t, c.blob(m.Layers[0].Digest.String())), c.secrets[base]) {
			t.Error("what COPY --from took is not in the image's own layer as it is")
		}
		out := filepath.Join(dir, "local")
		says(t, b.build(dockerfile, files, "--output", "type=local,dest="+out))
		if got := read(t, out+"/secret"); got != c.secrets[base] {
			t.Errorf("type=local: %s", got)
		}
		says(t, b.build(dockerfile, files, "--output", "type=tar,dest="+out+".tar"))
		if got := fileIn(t, out+".tar", "secret"); got != c.secrets[base] {
			t.Errorf("type=tar: %s", got)
		}
	})

	t.Run("compression", func(t *testing.T) {
		name := c.registry + "/compressed:1"
		says(t, b.build(dockerfile, files, "--output", "type=image,compression=zstd,push=true,name="+name))
		builtOn(t, c.manifestOf(base), c.manifestOf(name), 2)
		for _, compression := range []string{"zstd", "gzip", "uncompressed"} {
			fails(t, b.build(dockerfile, files, "--output", "type=image,force-compression=true,compression="+compression+",push=true,name="+name), "unsupported media type", "+encrypted")
		}
	})

	t.Run("cache", func(t *testing.T) {
		cache := c.registry + "/cache:1"
		says(t, b.build(dockerfile, files, "--export-cache", "type=registry,mode=max,ref="+cache))
		encrypted := 0
		for _, l := range c.manifestOf(cache).Layers {
			for key := range l.Annotations {
				if strings.Contains(key, ".enc.") {
					t.Errorf("layer with keys: %+v", l)
				}
			}
			if slices.ContainsFunc(c.manifestOf(base).Layers, func(b ocispec.Descriptor) bool { return b.Digest == l.Digest && b.MediaType == l.MediaType }) {
				encrypted++
			}
		}
		if encrypted != 2 {
			t.Errorf("the cache has %d of the base's layers", encrypted)
		}
		localCache := filepath.Join(dir, "localcache")
		says(t, b.build(dockerfile, files, "--export-cache", "type=local,mode=max,dest="+localCache))
		inline := c.registry + "/inline:1"
		says(t, b.build(dockerfile, files, "--export-cache", "type=inline", "--output", "type=image,push=true,name="+inline))
		builtOn(t, c.manifestOf(base), c.manifestOf(inline), 2)
		for _, from := range []string{"type=registry,ref=" + cache, "type=local,src=" + localCache, "type=registry,ref=" + inline} {
			b.forget(t)
			// BuildKit may have containerd collect the base's manifest before it
			// unpacks the layers, unless the image is there.
			output(t, b.in("images", "pull", "--plain-http", base))
			says(t, b.build(dockerfile+"RUN [\"/hello\"]\n", files, "--import-cache", from), "CACHED", greeting)
		}
	})

	t.Run("hostile", func(t *testing.T) {
		// Others of the same repository name the same layers with the keys of
		// each other, and are built on first.
		b.forget(t)
		var hostile []string
		for i := range 3 {
			hostile = append(hostile, c.edit(base, fmt.Sprintf("hostile%d", i), func(m *ocispec.Manifest) {
				m.Annotations = map[string]string{"n": fmt.Sprint(i)}
				first, second := &m.Layers[0], &m.Layers[1]
				first.Annotations, second.Annotations = second.Annotations, first.Annotations
				if i == 1 { // HMACs of the right ones
					const public = "org.opencontainers.image.enc.pubopts"
					first.Annotations[public], second.Annotations[public] = second.Annotations[public], first.Annotations[public]
				}
			}))
		}
		fails(t, b.build("FROM "+hostile[0]+"\nRUN [\"/hello\"]\n", nil), "HMAC does not match")
		for _, name := range hostile {
			fails(t, b.build("FROM "+name+"\nRUN [\"/hello\"]\n", nil), "pilot: layer sha256:")
		}
		says(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), greeting)
	})

	t.Run("no right", func(t *testing.T) {
		d := tempDir(t)
		_, other := broker(t, d+"/broker", "team-b")
		pilot(t, d, other)
		b := newBuilder(t, newDifferNode(t, d, differNode{v: containerd2()}), c.registry)
		fails(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), "pilot: layer sha256:", "team-a")
	})

	t.Run("containerd 1.7", func(t *testing.T) {
		d := tempDir(t)
		pilot(t, d, brokerURL)
		b := newBuilder(t, newDifferNode(t, d, differNode{v: containerd17()}), c.registry)
		says(t, b.build("FROM "+base+"\nRUN [\"/hello\"]\n", nil), greeting)
	})
}

// usable checks that a node runs an image, which the builder pushes if it has it,
// and that all its layers are encrypted, those of its base for whom they were and
// for team-b.
func (c *ci) usable(t testing.TB, b *builder, n *node, name, greeting, base string) {
	t.Helper()
	if strings.Contains(output(t, b.in("images", "list", "-q")), name+"\n") {
		output(t, b.in("images", "push", "--plain-http", name))
	}
	m := c.manifestOf(name)
	for i, l := range m.Layers {
		recipients := 1
		if i < len(c.manifestOf(base).Layers) {
			recipients = 2
		}
		keys := l.Annotations["org.opencontainers.image.enc.keys.provider.pilot"]
		if !strings.HasSuffix(l.MediaType, "+encrypted") || keys == "" || len(strings.Split(keys, ",")) != recipients {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	output(t, n.ctr("images", "pull", "--plain-http", name))
	if out := containerOutput(t, n.ctr("run", "--rm", name, "c", "/hello")); !strings.Contains(out, greeting) {
		t.Errorf("%s: %s", name, out)
	}
	output(t, n.ctr("images", "remove", "--sync", name))
	output(t, n.crictl("pull", name))
	output(t, n.crictl("rmi", name))
	b.forget(t)
	says(t, b.build("FROM "+name+"\nRUN [\"/hello\"]\n", nil), greeting)
	b.forget(t)
}

// fileIn returns a file of a tar archive.
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

// TestBuiltinBuildKit builds on an encrypted image with a containerd that has
// pilot's differ in it.
func TestBuiltinBuildKit(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	b := newBuilder(t, builtinNode(t, dir, ociConf), c.registry)
	image := c.image(kinds[1], "provider:pilot:team-a")
	says(t, b.build("FROM "+image+"\nRUN [\"/hello\"]\n", nil), "hello, "+c.secrets[image])
}
