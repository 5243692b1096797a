package encrypt

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
)

// lazyResult is the JSON of encrypt about lazy pulling.
type lazyResult struct {
	Digest string
	Layers int
	Reused struct{ Layers int }
	Lazy   struct {
		Layers, Converted int
		Digest            string
		NotLazy           []struct{ Digest, Reason string }
	}
}

func (a anywhere) lazy(args ...string) lazyResult {
	a.t.Helper()
	var r lazyResult
	out := harness.Output(a.t, a.images(append([]string{"encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a"}, args...)...))
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		a.t.Fatal(err)
	}
	return r
}

// lazyLayers returns which layers of an image have a seal.
func (a anywhere) lazyLayers(name string) (list []bool) {
	a.t.Helper()
	var info struct{ Layers []struct{ Lazy bool } }
	if err := json.Unmarshal([]byte(harness.Output(a.t, a.images("layerinfo", "--json", name))), &info); err != nil {
		a.t.Fatal(err)
	}
	for _, l := range info.Layers {
		list = append(list, l.Lazy)
	}
	return list
}

// TestLazyImagesOnEachTransport converts an image to eStargz from each place into each, and
// encrypts what was converted from each place. Everything reads it.
func TestLazyImagesOnEachTransport(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newEverywhere(t, dir, "team-a", "team-b")
	d, registry := a.debian, a.registry
	secret := harness.NewSecret()
	write := func(name string, image func(l *harness.Layout) harness.Object) {
		l := harness.NewLayout(t)
		l.Write(dir+"/"+name, "v1", image(l))
	}
	write("plain", func(l *harness.Layout) harness.Object { return l.Index(harness.LayerKinds[2], secret) }) // two platforms and an attestation
	write("one", func(l *harness.Layout) harness.Object {
		return l.Image(harness.LayerKinds[0], false, harness.Arch, secret)
	})
	write("docker", func(l *harness.Layout) harness.Object {
		return l.Image(harness.LayerKinds[1], true, harness.Arch, secret)
	})
	harness.Output(t, d.Run("skopeo", "copy", "oci:"+dir+"/one:v1", "docker-archive:"+dir+"/docker.tar:app:v1"))
	harness.Output(t, d.Run("skopeo", "copy", "--all", "oci:"+dir+"/plain:v1", "oci-archive:"+dir+"/plain.tar:v1"))
	harness.Output(t, d.Run("skopeo", "copy", "--all", "--dest-tls-verify=false", "oci:"+dir+"/plain:v1", "docker://"+registry+"/plain:v1"))

	to := a.targets
	converted := map[string]string{}
	for i, from := range []string{"oci:" + dir + "/plain:v1", "oci-archive:" + dir + "/plain.tar:v1", "docker-archive:" + dir + "/docker.tar", "docker://" + registry + "/plain:v1", "oci:" + dir + "/docker:v1"} {
		to := to[i%len(to)]
		r := a.lazy("--estargz", from, to)
		if r.Lazy.Converted == 0 || r.Lazy.Layers != r.Lazy.Converted || len(r.Lazy.NotLazy) > 0 {
			t.Errorf("%s to %s: %+v", from, to, r)
		}
		lazy := a.lazyLayers(to)
		if n := len(slices.DeleteFunc(slices.Clone(lazy), func(l bool) bool { return !l })); n < r.Lazy.Layers {
			t.Errorf("%s: layers %v", to, lazy)
		}
		harness.Output(t, a.images("layerinfo", "--require-encrypted", to))
		plain := fmt.Sprintf("oci:%s/back%d:x", dir, i)
		if back := a.crypt("decrypt", "--json", to, plain); back.Digest != r.Lazy.Digest {
			t.Errorf("%s came back as %s, and was converted to %s", to, back.Digest, r.Lazy.Digest)
		}
		if !strings.Contains(blobs(t, fmt.Sprintf("%s/back%d", dir, i)), secret) {
			t.Errorf("the secret is not in what was decrypted from %s", to)
		}
		converted[from] = r.Lazy.Digest
		harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", to, fmt.Sprintf("oci:%s/skopeo%d:x", dir, i)))
		if !strings.Contains(blobs(t, fmt.Sprintf("%s/skopeo%d", dir, i)), secret) {
			t.Errorf("the secret is not in what skopeo decrypted from %s", to)
		}
		// More recipients keep the seal.
		harness.Output(t, a.images("rewrap", "--recipient", "provider:pilot:team-b", to))
		if got := a.lazyLayers(to); !slices.Equal(got, lazy) {
			t.Errorf("rewrapped, %s has the seals %v, and had %v", to, got, lazy)
		}
		if i != 2 {
			continue
		}
		// From what is eStargz already, in each place.
		for j, again := range []string{"oci:%s/again%d:x", "oci-archive:%s/again%d.tar:x", "docker://" + registry + "/again%[2]d:x"} {
			again = fmt.Sprintf(again, dir, i)
			harness.Output(t, d.Run("skopeo", "copy", "--all", "--dest-tls-verify=false", plain, again))
			for _, args := range [][]string{{again}, {"--estargz", again}, {"--like", to, again}} {
				r2 := a.lazy(append(args, fmt.Sprintf("oci:%s/third%d%d:x", dir, i, j))...)
				if r2.Lazy.Layers != r.Lazy.Layers || r2.Lazy.Converted != 0 || len(r2.Lazy.NotLazy) > 0 || args[0] == "--like" && r2.Reused.Layers != r2.Layers {
					t.Errorf("%v: %+v", args, r2)
				}
			}
		}
	}
	first := "oci:" + dir + "/plain:v1"
	if again := a.lazy("--estargz", first, "oci:"+dir+"/twice:x").Lazy.Digest; again != converted[first] {
		t.Errorf("the same image was converted to %s and %s", converted[first], again)
	}
	if all := blobs(t, dir+"/enc") + harness.Read(t, dir+"/enc.tar"); strings.Contains(all, secret) {
		t.Error("the secret is in what was encrypted")
	}
	if left, _ := filepath.Glob(dir + "/tmp/*"); len(left) > 0 {
		t.Errorf("temporary files: %s", left)
	}

	t.Run("a rebuilt image", func(t *testing.T) {
		v1, v2 := buildLayouts(t, dir, secret)
		to := "docker://" + registry + "/rebuilt:x"
		a.lazy("--estargz", v1, to)
		out := harness.CombinedOutput(t, a.images("encrypt", "--force", "--estargz", "--recipient", "provider:pilot:team-a", v2, to))
		for _, want := range []string{"(3 layers encrypted, 2 of them taken over", ", 3 of them for lazy pulling;", "converted: 3 layers to eStargz; decrypting gives back sha256:"} {
			if !strings.Contains(out, want) {
				t.Errorf("%q is not in %s", want, out)
			}
		}
		info := harness.CombinedOutput(t, a.images("layerinfo", to))
		if !strings.Contains(info, "lazy: 3 of 3 layers are sealed for lazy pulling") {
			t.Error(info)
		}
	})
	t.Run("selected layers", func(t *testing.T) {
		before := harness.Read(t, dir+"/one/index.json")
		r := a.lazy("--estargz", "--layer", "0", "oci:"+dir+"/one:v1", "oci:"+dir+"/some:x")
		if r.Lazy.Converted != 1 || !slices.Equal(a.lazyLayers("oci:"+dir+"/some:x"), []bool{true, false}) {
			t.Errorf("%+v", r)
		}
		// Into the directory that it is in, only what is encrypted is written.
		a.lazy("--estargz", "oci:"+dir+"/one:v1", "oci:"+dir+"/one:enc")
		var gone []string
		files, err := os.ReadDir(dir + "/one/blobs/sha256")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if b := harness.Read(t, dir+"/one/blobs/sha256/"+f.Name()); strings.Contains(b, "STARGZ") {
				gone = append(gone, f.Name())
			}
		}
		if len(gone) > 0 || before == harness.Read(t, dir+"/one/index.json") {
			t.Errorf("readable eStargz layers are in the directory: %v", gone)
		}
	})
	t.Run("what can't be sealed", func(t *testing.T) {
		out := harness.CombinedOutput(t, a.images("encrypt", "--recipient", "provider:pilot:team-a", "oci:"+falseTOC(t, dir+"/back2")+":x", "oci:"+dir+"/false:x"))
		if !strings.Contains(out, "not lazy: layer sha256:") || !strings.Contains(out, "which nodes pull in full: annotation containerd.io/snapshot/stargz/toc.digest is") {
			t.Error(out)
		}
	})
	t.Run("full disk", func(t *testing.T) {
		small := dir + "/small"
		if err := os.Mkdir(small, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		defer syscall.Unmount(small, syscall.MNT_DETACH)
		cmd := a.images("encrypt", "--estargz", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/one:v1", "oci:"+dir+"/full:x")
		cmd.Env = append(cmd.Env, "TMPDIR="+small)
		harness.ExpectFailure(t, cmd, "temporary file in "+small, "no space left on device", "TMPDIR")
		// What would be refused anyway is refused before anything is converted.
		cmd = a.images("encrypt", "--estargz", "--recipient", "provider:pilot:nobody", "oci:"+dir+"/one:v1", "oci:"+dir+"/full:x")
		cmd.Env = append(cmd.Env, "TMPDIR="+small)
		harness.ExpectFailure(t, cmd, `KEK "nobody"`, "no such KEK")
		if _, err := os.Stat(dir + "/full"); err == nil {
			t.Error("something was written")
		}
	})
}

// falseTOC copies the layout of an image, and changes what its layers say of their tables of
// contents.
func falseTOC(t testing.TB, layout string) string {
	t.Helper()
	to := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "cp", "-r", layout+"/.", to))
	var index ocispec.Index
	if err := json.Unmarshal([]byte(harness.Read(t, to+"/index.json")), &index); err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(harness.Read(t, to+"/blobs/sha256/"+index.Manifests[0].Digest.Encoded())), &m); err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		l.Annotations["containerd.io/snapshot/stargz/toc.digest"] = digest.FromString("x").String()
	}
	doc, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	index.Manifests[0].Digest, index.Manifests[0].Size = digest.FromBytes(doc), int64(len(doc))
	harness.Write(t, to+"/blobs/sha256/"+digest.FromBytes(doc).Encoded(), string(doc))
	if doc, err = json.Marshal(index); err != nil {
		t.Fatal(err)
	}
	harness.Write(t, to+"/index.json", string(doc))
	return to
}

// TestConversionLeavesNothingReadable kills an encryption while it converts.
func TestConversionLeavesNothingReadable(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a")
	registry, _ := harness.StartRegistry(t, dir)
	d := harness.NewDebian(t, dir, a.ociConf)
	l := harness.NewLayout(t)
	content := make([]byte, 4<<20)
	rand.Read(content)
	layer, id := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"file": content})
	l.Write(dir+"/plain", "v1", l.Manifest([]harness.Object{layer}, []string{id}))
	harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "oci:"+dir+"/plain:v1", "docker://"+registry+"/plain:v1"))
	// A registry that stops in the middle of the layer.
	stalled := make(chan struct{})
	forward := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}, ModifyResponse: func(r *http.Response) error {
		if r.ContentLength > 1<<20 && r.Request.Method == http.MethodGet {
			r.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(r.Body, 3<<20), until(stalled)), r.Body}
		}
		return nil
	}}
	s := httptest.NewServer(forward)
	defer s.Close()
	defer close(stalled)
	from := "docker://" + strings.TrimPrefix(s.URL, "http://") + "/plain:v1"
	cmd := a.images("encrypt", "--estargz", "--recipient", "provider:pilot:team-a", from, "oci:"+dir+"/enc:x")
	interrupt(t, cmd, syscall.SIGKILL, func() error {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
		if err != nil {
			return err
		}
		for _, fd := range fds {
			name, err := os.Readlink(fd)
			if err != nil || !strings.HasPrefix(name, dir+"/tmp/") {
				continue
			}
			info, err := os.Stat(fd)
			if err == nil && info.Size() > 1<<20 && strings.HasSuffix(name, " (deleted)") {
				return nil
			}
		}
		return fmt.Errorf("no temporary file of a mebibyte among %v", fds)
	})
	if left, _ := filepath.Glob(dir + "/tmp/*"); len(left) > 0 {
		t.Errorf("temporary files: %s", left)
	}
	if _, err := os.Stat(dir + "/enc"); err == nil && strings.Contains(blobs(t, dir+"/enc"), string(content[:64])) {
		t.Error("the layer is readable in the target")
	}
}

// until reads nothing until a channel is closed, and then the end.
type until chan struct{}

func (u until) Read([]byte) (int, error) {
	<-u
	return 0, io.EOF
}

// estargzImage adds an image with a layer that is eStargz.
func estargzImage(t testing.TB, l *harness.Layout, secret string) harness.Object {
	t.Helper()
	var archive, blob bytes.Buffer
	tw := tar.NewWriter(&archive)
	if err := tw.WriteHeader(&tar.Header{Name: "secret", Mode: 0o644, Size: int64(len(secret))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, secret); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	w := estargz.NewWriter(&blob)
	if err := w.AppendTar(&archive); err != nil {
		t.Fatal(err)
	}
	toc, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	layer := l.Blob("application/vnd.oci.image.layer.v1.tar+gzip", blob.Bytes())
	layer["annotations"] = harness.Object{"containerd.io/snapshot/stargz/toc.digest": toc.String()}
	return l.Manifest([]harness.Object{layer}, []string{w.DiffID()})
}

// TestLazyImageInContainerdRuns converts and encrypts an image in containerd, and pulls it
// in full.
func TestLazyImageInContainerdRuns(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	l, secret := harness.NewLayout(t), harness.NewSecret()
	name := c.Registry + "/app:lazy"
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name+"-plain", l.Image(harness.LayerKinds[2], true, harness.Arch, secret))))
	blobs := func() []string { return strings.Fields(harness.Output(t, c.Ctr("content", "ls", "-q"))) }
	before := blobs()
	out := harness.Output(t, c.CtrPilot("images", "encrypt", "--json", "--estargz", "--recipient", "provider:pilot:team-a", name+"-plain", name))
	var r lazyResult
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Lazy.Converted != 2 || r.Lazy.Layers != 2 {
		t.Errorf("%s: %v", out, err)
	}
	// Two layers, a manifest and a configuration.
	if more := slices.DeleteFunc(blobs(), func(d string) bool { return slices.Contains(before, d) }); len(more) != 4 {
		t.Errorf("these blobs came into containerd: %s", more)
	}
	harness.Output(t, c.CtrPilot("images", "rm", "--sync", name+"-plain"))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	harness.Output(t, c.CtrPilot("images", "decrypt", name, name+"-back"))
	if back := harness.Output(t, c.CtrPilot("images", "ls", "name=="+name+"-back")); !strings.Contains(back, r.Lazy.Digest) {
		t.Errorf("%s came back, and not %s", back, r.Lazy.Digest)
	}
	harness.Output(t, c.CtrPilot("images", "rm", "--sync", name, name+"-back"))
	harness.Output(t, c.CtrPilot("images", "pull", "--plain-http", name))
	if out := harness.ContainerOutput(t, c.CtrPilot("run", "--rm", name, harness.ContainerID())); !strings.Contains(out, secret) {
		t.Error(out)
	}
}
