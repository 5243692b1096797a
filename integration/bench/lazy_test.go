package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	fsconfig "github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/plugin/snapshotter"
)

const (
	// lazyImage is the size of the image that is pulled lazily, in bytes, in four layers.
	lazyImage = 1 << 30
	// linkRate is how many bytes a second the registry sends.
	linkRate = 100_000_000
)

// link is the network to a registry: all answers share its rate.
type link struct {
	sent atomic.Int64

	mu   sync.Mutex
	free time.Time // when it can send more
}

func (l *link) wrap(h http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(linked{w, l}, r) }
}

type linked struct {
	http.ResponseWriter
	link *link
}

func (w linked) Write(p []byte) (done int, err error) {
	for err == nil && done < len(p) {
		n := min(len(p)-done, 64<<10)
		w.link.mu.Lock()
		if now := time.Now(); w.link.free.Before(now) {
			w.link.free = now
		}
		w.link.free = w.link.free.Add(time.Duration(n) * time.Second / linkRate)
		until := w.link.free
		w.link.mu.Unlock()
		time.Sleep(time.Until(until))
		n, err = w.ResponseWriter.Write(p[done : done+n])
		done += n
	}
	w.link.sent.Add(int64(done))
	return done, err
}

// lazyBench is a node that pulls lazily, with an image in a registry: plain, as eStargz, and
// encrypted.
type lazyBench struct {
	*harness.LazyNode
	b        *testing.B
	registry string // without the link
	link     link
	front    string // with it
	restart  func() // restarts stargz-snapshotter's snapshotter, if there is one
}

func newLazyBench(b *testing.B, size int, layers int) *lazyBench {
	b.Helper()
	n := &lazyBench{b: b}
	n.registry, _ = harness.StartRegistry(b, harness.TempDir(b))
	n.front = harness.FrontRegistry(b, n.registry, n.link.wrap)
	n.LazyNode = harness.NewLazyNode(b, []string{n.registry, n.front})
	m := newMaterial(b)
	var contents [][]byte
	for range layers {
		contents = append(contents, m.layer(size/layers))
	}
	last := &contents[layers-1]
	*last = m.with(*last, "hello", []byte(harness.Read(b, filepath.Join(harness.Bin, "hello"))))
	*last = m.with(*last, "secret", []byte("lazily"))
	l := harness.NewLayout(b)
	l.Write(n.Dir+"/layout", "v1", l.ImageOf(harness.LayerKinds[1], contents))
	n.encrypt("app:enc", "--estargz")
	return n
}

// encrypt encrypts the layout's image into the registry, and fails if a layer is not lazy.
func (n *lazyBench) encrypt(name string, args ...string) {
	n.b.Helper()
	cmd := harness.Command(n.b, "ctr-pilot", append(append([]string{"images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a"}, args...), "oci:"+n.Dir+"/layout:v1", "docker://"+n.registry+"/"+name)...)
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.OciConf, "HOME="+n.Dir)
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("not lazy")) {
		n.b.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// decrypt puts the image into the registry as it was before it was encrypted.
func (n *lazyBench) decrypt() {
	n.b.Helper()
	cmd := harness.Command(n.b, "ctr-pilot", "images", "decrypt", "--plain-http", "docker://"+n.registry+"/app:enc", "docker://"+n.registry+"/app:plain")
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.OciConf, "HOME="+n.Dir)
	harness.Output(n.b, cmd)
}

// firstRead pulls an image, reads the first small file that it finds, or all, and removes the
// image. It returns how long it takes to have read, in milliseconds, and how many megabytes
// the registry has sent.
func (n *lazyBench) firstRead(snapshotter, name string, all bool) (ms, bytes float64) {
	n.b.Helper()
	n.Pilot.Stop(n.b)
	n.StartPilot()
	n.link.sent.Store(0)
	at := filepath.Join(n.Dir, "mnt")
	if err := os.MkdirAll(at, 0o700); err != nil {
		n.b.Fatal(err)
	}
	ms = took(func() {
		harness.Output(n.b, n.Ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, name))
		harness.Output(n.b, n.Ctr("images", "mount", "--snapshotter", snapshotter, name, at))
		err := filepath.WalkDir(at, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			if _, err := os.ReadFile(path); err != nil || all {
				return err
			}
			return fs.SkipAll
		})
		if err != nil {
			n.b.Fatal(err)
		}
	})
	bytes = float64(n.link.sent.Load()) / 1e6
	harness.Output(n.b, n.Ctr("images", "unmount", "--rm", "--snapshotter", snapshotter, at))
	harness.Output(n.b, n.Ctr("images", "remove", "--sync", name))
	n.CollectGarbage(n.b)
	// The snapshotters remember layers by the image's name.
	n.Snapshotter.Stop(n.b)
	n.StartSnapshotter()
	n.restart()
	return ms, bytes
}

// registrySources finds layers in the registry by containerd's labels.
func registrySources(labels map[string]string) ([]source.Source, error) {
	const ours = "containerd.io/snapshot/remote/stargz."
	return source.FromDefaultLabels(func(image reference.Spec) ([]docker.RegistryHost, error) {
		return docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))(image.Hostname())
	})(map[string]string{
		ours + "reference": labels[snapshotters.TargetRefLabel], ours + "digest": labels[snapshotters.TargetLayerDigestLabel],
		ours + "layers": labels[snapshotters.TargetImageLayersLabel],
	})
}

// startStargz starts a snapshotter of stargz-snapshotter's that reads plain eStargz from the
// registry, and that containerd knows as stargz.
func (n *lazyBench) startStargz() {
	n.b.Helper()
	root := n.Dir + "/stargz"
	stop := func() {}
	n.restart = func() {
		stop()
		files, err := stargzfs.NewFilesystem(root+"/files", fsconfig.Config{NoBackgroundFetch: true, NoPrometheus: true, BlobConfig: fsconfig.BlobConfig{CheckAlways: true}}, stargzfs.WithGetSources(registrySources))
		if err != nil {
			n.b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		s, err := snapshot.NewSnapshotter(ctx, root+"/snapshots", files, snapshot.AsynchronousRemove)
		if err != nil {
			n.b.Fatal(err)
		}
		l, err := net.Listen("unix", root+".sock")
		if err != nil {
			n.b.Fatal(err)
		}
		var served sync.WaitGroup
		served.Go(func() { _ = snapshotter.Serve(ctx, s, l) })
		stop = func() {
			cancel()
			served.Wait()
			if err := s.Close(); err != nil {
				n.b.Error(err)
			}
		}
	}
	if err := os.Mkdir(root, 0o700); err != nil {
		n.b.Fatal(err)
	}
	n.restart()
	n.b.Cleanup(func() { stop() })
	n.Process.Stop(n.b)
	harness.Write(n.b, n.Dir+"/config.toml", harness.Read(n.b, n.Dir+"/config.toml")+fmt.Sprintf(`
[proxy_plugins.stargz]
  type = 'snapshot'
  address = '%[1]s.sock'
  [proxy_plugins.stargz.exports]
    root = '%[1]s'
    enable_remote_snapshot_annotations = 'true'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%[2]s'
  snapshotter = 'stargz'
`, root, harness.Arch))
	n.Start(n.b)
}

// BenchmarkLazy pulls an image to its first read.
func BenchmarkLazy(b *testing.B) {
	n := newLazyBench(b, lazyImage, 4)
	n.startStargz()
	encrypted, plain := n.front+"/app:enc", n.front+"/app:plain"
	n.decrypt()
	const until = "pull to first read, %d MiB, encrypted and lazy"
	for _, c := range []struct {
		name, what, unit, peer, target string
		snapshotter                    string
		all                            bool
	}{
		{"Time", until, "ms", "full pull of the plain image", "≤ 0.05", "overlayfs", false},
		{"Bytes", until, "MB", "full pull of the plain image", "≤ 0.01", "overlayfs", false},
		{"TimeOfEStargz", until, "ms", "plain eStargz with stargz-snapshotter", "≤ 1.15", "stargz", false},
		{"AllFiles", "pull and read all files once, %d MiB, encrypted and lazy", "ms", "plain eStargz with stargz-snapshotter", "≤ 1.05", "stargz", true},
	} {
		b.Run(c.name, func(b *testing.B) {
			figure := func(snapshotter, name string) func() float64 {
				return func() float64 {
					ms, bytes := n.firstRead(snapshotter, name, c.all)
					if c.unit == "ms" {
						return ms
					}
					return bytes
				}
			}
			compare(b, comparison{fmt.Sprintf(c.what, lazyImage>>20), c.peer, c.unit, c.target},
				figure("pilot-lazy", encrypted), figure(c.snapshotter, plain))
		})
	}
}

// BenchmarkLazyPod pulls an image and starts a pod of it by crictl, to its first output.
func BenchmarkLazyPod(b *testing.B) {
	n := newLazyBench(b, lazyImage, 4)
	n.decrypt()
	dir := harness.TempDir(b)
	pause := harness.StartCI(b, dir, "team-a").Pause()
	stock := &harness.SharedNode{Node: harness.NewDifferNode(b, dir+"/stock", harness.DifferConfig{Containerd: harness.Containerd2(), Sandbox: pause, Stock: true})}
	n.Process.Stop(b)
	harness.Write(b, n.Dir+"/config.toml", harness.Read(b, n.Dir+"/config.toml")+fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '%s'\n", pause))
	n.Start(b)
	lazy := &harness.SharedNode{Node: n.Node}

	pods := 0
	start := func(node *harness.SharedNode, image string) float64 {
		pods++
		uid := fmt.Sprintf("bench-%d-%d", os.Getpid(), pods)
		harness.Output(b, node.Crictl("pull", pause))
		container := harness.Write(b, filepath.Join(node.Dir, uid+".json"), fmt.Sprintf(`{"metadata": {"name": %q}, "image": {"image": %q}, "command": ["/hello"], "log_path": "log", "linux": {"security_context": {"namespace_options": {"network": 2, "pid": 1}}}}`, harness.ContainerID(), image))
		ms := took(func() {
			harness.Output(b, node.Crictl("pull", image))
			sandbox, file := node.Sandbox(b, "default", "pod", uid)
			id := strings.TrimSpace(harness.Output(b, node.Crictl("create", "--no-pull", sandbox, container, file)))
			harness.Output(b, node.Crictl("start", id))
			for log := filepath.Join(node.Dir, "logs", uid, "log"); ; time.Sleep(time.Millisecond) {
				if text, err := os.ReadFile(log); err == nil && bytes.Contains(text, []byte("hello, lazily")) {
					return
				} else if b.Context().Err() != nil {
					b.Fatalf("no output: %q, %v", text, err)
				}
			}
		})
		harness.Output(b, node.Crictl("rmp", "-f", "-a"))
		harness.Output(b, node.Crictl("rmi", image))
		node.CollectGarbage(b)
		return ms
	}
	compare(b, comparison{fmt.Sprintf("pull to the first output of a pod, %d MiB, encrypted and lazy", lazyImage>>20), "full pull of the plain image", "ms", "≤ 0.08"}, func() float64 {
		n.Pilot.Stop(b)
		n.StartPilot()
		ms := start(lazy, n.front+"/app:enc")
		n.Snapshotter.Stop(b)
		n.StartSnapshotter()
		return ms
	}, func() float64 { return start(stock, n.front+"/app:plain") })
}

// layersOf returns the digests and sizes of the layers of the image, as the registry or the
// mirror has it.
func (n *lazyBench) layersOf(host string) (digests []string, sizes []int64) {
	n.b.Helper()
	req, err := http.NewRequestWithContext(n.b.Context(), http.MethodGet, "http://"+host+"/v2/app/manifests/enc?ns="+n.registry, nil)
	if err != nil {
		n.b.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json")
	req.Header.Set("Pilot-Secret", n.Secret)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		n.b.Fatal(err)
	}
	defer resp.Body.Close()
	var m struct {
		Layers []struct {
			Digest string
			Size   int64
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		n.b.Fatal(err)
	}
	for _, l := range m.Layers {
		digests, sizes = append(digests, l.Digest), append(sizes, l.Size)
	}
	return digests, sizes
}

// ranges requests random ranges of 64 KiB, by 16 callers, and returns megabytes a second.
// They connect to the address.
func (n *lazyBench) ranges(network, address, base string, digests []string, sizes []int64) float64 {
	n.b.Helper()
	const callers, each, length = 16, 50, 64 << 10
	client := http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: callers, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}}}
	defer client.CloseIdleConnections()
	return rate(callers*each*length, func() {
		var g errgroup.Group
		for range callers {
			g.Go(func() error {
				for range each {
					i := rand.IntN(len(digests))
					at := rand.Int64N(sizes[i] - length)
					req, err := http.NewRequestWithContext(n.b.Context(), http.MethodGet, "http://registry"+base+digests[i]+"?ns="+n.registry, nil)
					if err != nil {
						return err
					}
					req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", at, at+length-1))
					resp, err := client.Do(req)
					if err != nil {
						return err
					}
					got, err := io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if err != nil || got != length || resp.StatusCode != http.StatusPartialContent {
						return fmt.Errorf("%s, %d bytes: %v", resp.Status, got, err)
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			n.b.Fatal(err)
		}
	})
}

// BenchmarkLazyRanges requests random ranges from pilot, and from the registry.
func BenchmarkLazyRanges(b *testing.B) {
	n := newLazyBench(b, 256<<20, 4)
	harness.Output(b, n.Ctr("images", "pull", "--plain-http", "--snapshotter", "pilot-lazy", n.registry+"/app:enc"))
	digests, sizes := n.layersOf(n.registry)
	compare(b, comparison{"random ranges of 64 KiB, 16 callers, through pilot", "the registry", "MB/s", "≥ 0.9"},
		func() float64 { return n.ranges("unix", n.LazySocket(), "/lazy/v2/app/blobs/", digests, sizes) },
		func() float64 { return n.ranges("tcp", n.registry, "/v2/app/blobs/", digests, sizes) })
}

// BenchmarkLazyMemory reports pilot's peak memory with 64 layers mounted, and four whole
// blobs on their way.
func BenchmarkLazyMemory(b *testing.B) {
	n := newLazyBench(b, 512<<20, 64)
	harness.Output(b, n.Ctr("images", "pull", "--plain-http", "--snapshotter", "pilot-lazy", n.registry+"/app:enc"))
	digests, sizes := n.layersOf(n.registry)
	plain, _ := n.layersOf(n.Mirror)
	var g errgroup.Group
	for i := range 4 {
		g.Go(func() error {
			req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "http://"+n.Mirror+"/v2/app/blobs/"+plain[i]+"?ns="+n.registry, nil)
			if err != nil {
				return err
			}
			req.Header.Set("Pilot-Secret", n.Secret)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if got, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK || got != sizes[i] {
				return fmt.Errorf("whole blob: %s, %d bytes: %v", resp.Status, got, err)
			}
			return nil
		})
	}
	n.ranges("unix", n.LazySocket(), "/lazy/v2/app/blobs/", digests, sizes)
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	peak := float64(n.Pilot.Peak(b)) / 1e6
	measure(b, comparison{"memory of pilot serve, 64 layers mounted and four blobs at once", "target: 48 MiB", "MB", "≤ 1"}, (48<<20)/1e6, func() float64 { return peak })
}
