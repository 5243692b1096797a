// Package lazy tests lazy pulling: containerd with pilot's snapshotter, which reads
// parts of encrypted layers from pilot serve.
package lazy

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"

	"github.com/ctrlplane/pilot/integration/harness"
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, harness.Pilot, harness.Copilot, harness.CtrPilot, harness.Hello, harness.Containerd, harness.Registry, harness.Debian13))
}

// machine is a node that pulls lazily, with a registry.
type machine struct {
	*harness.LazyNode
	t        testing.TB
	registry string // its address
	storage  string
	front    *front // the registry as all see it
	mounts   int    // that were made
}

// newMachine starts all of it. args are more of pilot's.
func newMachine(t testing.TB, args ...string) *machine {
	t.Helper()
	registry, storage := harness.StartRegistry(t, harness.TempDir(t))
	f := newFront(t, registry)
	return &machine{harness.NewLazyNode(t, []string{f.address}, args...), t, registry, storage, f, 0}
}

// layer is the files of a layer.
type layer = map[string][]byte

// encrypt pushes an image of layers, converted to eStargz and encrypted. Without convert the
// layers are gzip as before.
func (m *machine) encrypt(name string, layers ...layer) {
	m.t.Helper()
	m.encryptWith(name, []string{"--estargz"}, layers...)
}

func (m *machine) encryptWith(name string, args []string, layers ...layer) {
	m.t.Helper()
	l := harness.NewLayout(m.t)
	var descs []harness.Object
	var ids []string
	for _, files := range layers {
		desc, id := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, files)
		descs, ids = append(descs, desc), append(ids, id)
	}
	config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{
		"architecture": harness.Arch, "os": "linux", "config": harness.Object{"Cmd": []string{"/hello"}},
		"rootfs": harness.Object{"type": "layers", "diff_ids": ids},
	})
	layout := filepath.Join(m.Dir, "layouts", strings.ReplaceAll(name, ":", "-"))
	l.Write(layout, "v1", l.JSON(manifestType, harness.Object{"schemaVersion": 2, "mediaType": manifestType, "config": config, "layers": descs}))
	args = append([]string{"images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a"}, args...)
	harness.Output(m.t, m.ctrPilot(append(args, "oci:"+layout+":v1", "docker://"+m.ref(name))...))
}

func (m *machine) ctrPilot(args ...string) *exec.Cmd {
	m.t.Helper()
	cmd := harness.Command(m.t, "ctr-pilot", args...)
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+m.OciConf, "HOME="+m.Dir)
	return cmd
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// ref returns the full name of an image such as app:1.
func (m *machine) ref(name string) string { return m.front.address + "/" + name }

// pull pulls an image into the snapshotter.
func (m *machine) pull(name string) {
	m.t.Helper()
	harness.Output(m.t, m.pullCommand(name))
}

func (m *machine) pullCommand(name string) *exec.Cmd {
	m.t.Helper()
	return m.Ctr("images", "pull", "--plain-http", "--snapshotter", "pilot-lazy", m.ref(name))
}

// run runs a container of an image that is there, and returns what it prints.
func (m *machine) run(name string) string {
	m.t.Helper()
	return harness.ContainerOutput(m.t, m.Ctr("run", "--rm", "--snapshotter", "pilot-lazy", m.ref(name), harness.ContainerID()))
}

// mount mounts an image that is there, and returns the directory.
func (m *machine) mount(name string) string {
	m.t.Helper()
	at, err := m.tryMount(name)
	if err != nil {
		m.t.Fatalf("mount %s: %v", name, err)
	}
	return at
}

// tryMount mounts an image, as containerd does for a container.
func (m *machine) tryMount(name string) (at string, err error) {
	m.t.Helper()
	client, err := containerd.New(m.Socket)
	if err != nil {
		return "", err
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "default")
	img, err := client.GetImage(ctx, m.ref(name))
	if err != nil {
		return "", err
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return "", err
	}
	m.mounts++
	at = filepath.Join(m.Dir, "mnt"+strconv.Itoa(m.mounts))
	list, err := client.SnapshotService("pilot-lazy").View(ctx, at, identity.ChainID(diffIDs).String(), snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "now"}))
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		return "", err
	}
	m.t.Cleanup(func() { _ = m.tryUnmount(at) })
	return at, mount.All(list, at)
}

// unmount ends what mount has begun.
func (m *machine) unmount(at string) {
	m.t.Helper()
	if err := m.tryUnmount(at); err != nil {
		m.t.Error(err)
	}
}

func (m *machine) tryUnmount(at string) error {
	if err := mount.UnmountAll(at, 0); err != nil {
		return err
	}
	client, err := containerd.New(m.Socket)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.SnapshotService("pilot-lazy").Remove(namespaces.WithNamespace(context.Background(), "default"), at)
}

// remove removes an image and what was made of it.
func (m *machine) remove(name string) {
	m.t.Helper()
	harness.Output(m.t, m.Ctr("images", "remove", "--sync", m.ref(name)))
	m.CollectGarbage(m.t)
}

// readPart reads a part of a file without the kernel's cache of it.
func readPart(name string, offset, length int) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, length)
	_, err = f.ReadAt(b, int64(offset))
	return b, err
}

// manifest returns the manifest of an image in the registry.
func (m *machine) manifest(name string) harness.Object {
	m.t.Helper()
	repository, tag, _ := strings.Cut(name, ":")
	req, err := http.NewRequestWithContext(m.t.Context(), http.MethodGet, "http://"+m.front.address+"/v2/"+repository+"/manifests/"+tag, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Accept", manifestType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	var o harness.Object
	if err := json.NewDecoder(resp.Body).Decode(&o); err != nil || resp.StatusCode != http.StatusOK {
		m.t.Fatalf("%s: %s %v", name, resp.Status, err)
	}
	return o
}

// push pushes a manifest.
func (m *machine) push(name string, manifest harness.Object) {
	m.t.Helper()
	repository, tag, _ := strings.Cut(name, ":")
	b, err := json.Marshal(manifest)
	if err != nil {
		m.t.Fatal(err)
	}
	m.put("/v2/"+repository+"/manifests/"+tag, manifestType, b)
}

// pushBlob pushes a blob into a repository and returns its descriptor.
func (m *machine) pushBlob(repository, mediaType string, b []byte) harness.Object {
	m.t.Helper()
	digest := "sha256:" + harness.SHA256(string(b))
	resp, err := http.Post("http://"+m.front.address+"/v2/"+repository+"/blobs/uploads/", "", nil)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	at, err := resp.Location()
	if err != nil {
		m.t.Fatal(err)
	}
	m.put(at.Path+"?"+at.RawQuery+"&digest="+digest, "application/octet-stream", b)
	return harness.Object{"mediaType": mediaType, "digest": digest, "size": len(b)}
}

func (m *machine) put(path, mediaType string, b []byte) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), http.MethodPut, "http://"+m.front.address+path, bytes.NewReader(b))
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		m.t.Fatalf("PUT %s: %s", path, resp.Status)
	}
}

// pushLayout pushes an image of a layout as it is.
func (m *machine) pushLayout(name string, l *harness.Layout, target harness.Object) {
	m.t.Helper()
	repository, tag, _ := strings.Cut(name, ":")
	for file, b := range l.Files {
		if strings.HasPrefix(file, "blobs/") {
			m.pushBlob(repository, "", b)
		}
	}
	digest := target["digest"].(string)
	m.put("/v2/"+repository+"/manifests/"+tag, target["mediaType"].(string), l.Files["blobs/sha256/"+strings.TrimPrefix(digest, "sha256:")])
}

// layersOf returns the layers of a manifest.
func layersOf(manifest harness.Object) (list []harness.Object) {
	for _, l := range manifest["layers"].([]any) {
		list = append(list, l.(harness.Object))
	}
	return list
}

// stored returns the registry's file of a blob.
func (m *machine) stored(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join(m.storage, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data")
}

// blob returns a blob of the registry.
func (m *machine) blob(digest string) []byte {
	m.t.Helper()
	return []byte(harness.Read(m.t, m.stored(digest)))
}

// metrics returns the values of pilot's metrics by name and labels.
func (m *machine) metrics() map[string]float64 {
	m.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", m.Dir+"/admin.sock")
	}}}
	resp, err := client.Get("http://pilot/metrics")
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	values := map[string]float64{}
	for line := range strings.Lines(string(b)) {
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			values[line[:i]], _ = strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
		}
	}
	return values
}

// fullPulls returns how many layers were pulled as a whole, by reason.
func (m *machine) fullPulls() map[string]float64 {
	m.t.Helper()
	reasons := map[string]float64{}
	for name, n := range m.metrics() {
		if reason, ok := strings.CutPrefix(name, `pilot_lazy_full_pulls_total{reason="`); ok && n > 0 {
			reasons[strings.TrimSuffix(reason, `"}`)] = n
		}
	}
	return reasons
}

// random returns bytes that do not compress, another sequence for each seed.
func random(seed uint32, size int) []byte {
	b := make([]byte, size)
	state := seed
	for i := range b {
		state = state*1664525 + 1013904223
		b[i] = byte(state >> 24)
	}
	return b
}

// program returns the program of the images that prints its secret.
func program(t testing.TB) []byte {
	t.Helper()
	return []byte(harness.Read(t, filepath.Join(harness.Bin, "hello")))
}

// reply is what the mirror answers.
type reply struct {
	status int
	header http.Header
	body   string
	err    error // of reading the body
}

// ask requests a range of a layer as the snapshotter does.
func (m *machine) ask(method, path, bytes string) reply {
	m.t.Helper()
	header := http.Header{}
	if bytes != "" {
		header["Range"] = []string{"bytes=" + bytes}
	}
	return m.request("unix", m.LazySocket(), method, path, header)
}

// askMirror makes a request to pilot's mirror, which all users of the node can reach.
func (m *machine) askMirror(path string, header http.Header) reply {
	m.t.Helper()
	return m.request("tcp", m.Mirror, http.MethodGet, path, header)
}

func (m *machine) request(network, address, method, path string, header http.Header) reply {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), harness.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://pilot"+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header = header
	transport := http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return reply{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(b), err}
}

// lazyPath returns the path of a layer for the snapshotter.
func (m *machine) lazyPath(repository, digest string) string {
	return "/lazy/v2/" + repository + "/blobs/" + digest + "?ns=" + m.front.address
}
