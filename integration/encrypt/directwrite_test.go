package encrypt

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// directNode is a containerd with a plain image of two layers of directLayer bytes.
type directNode struct {
	*harness.Node
	t        *testing.T
	contents string // the directory of the content store
	public   string
	private  string
}

const (
	directLayer = 24 << 20
	directPlain = "example.com/plain:1"
)

func newDirectNode(t *testing.T, v harness.ContainerdVersion, conf string) *directNode {
	t.Helper()
	dir := harness.TempDir(t)
	contents := dir + "/ci/root/io.containerd.content.v1.content"
	if err := os.MkdirAll(contents, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", contents, "tmpfs", 0, "size=256m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(contents, 0); err != nil {
			t.Error(err)
		}
	})
	ociConf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	n := &directNode{Node: harness.StartNode(t, dir+"/ci", v, ociConf, conf), t: t, contents: contents}
	n.private, n.public = harness.KeyPair(t, dir+"/keys")
	l := harness.NewLayout(t)
	k := harness.LayerKinds[0]
	var layers []harness.Object
	var ids []string
	for i := range 2 {
		layer, id := l.Layer(k, k.OCI, map[string][]byte{fmt.Sprint("big", i): make([]byte, directLayer)})
		layers, ids = append(layers, layer), append(ids, id)
	}
	small, id := l.Layer(k, k.OCI, map[string][]byte{"small": nil})
	image := l.Tar(dir+"/image.tar", directPlain, l.Manifest(append(layers, small), append(ids, id)))
	harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", image))
	n.CollectGarbage(t)
	return n
}

func (n *directNode) encrypt(name string) *exec.Cmd {
	return n.CtrPilot("images", "encrypt", "--recipient", "jwe:"+n.public, directPlain, name)
}

// written returns how many bytes containerd has written so far, to files and sockets.
func (n *directNode) written() (bytes int) {
	n.t.Helper()
	_, rest, _ := strings.Cut(harness.Read(n.t, fmt.Sprintf("/proc/%d/io", n.Cmd.Process.Pid)), "wchar:")
	if _, err := fmt.Sscan(rest, &bytes); err != nil {
		n.t.Fatal(err)
	}
	return bytes
}

func (n *directNode) blobs() []string {
	n.t.Helper()
	files, err := filepath.Glob(n.contents + "/blobs/sha256/*")
	if err != nil {
		n.t.Fatal(err)
	}
	return files
}

// expectOnly checks that there are these blobs and no ingests.
func (n *directNode) expectOnly(want []string) {
	n.t.Helper()
	if got := n.blobs(); !slices.Equal(got, want) {
		n.t.Errorf("blobs %q, want %q", got, want)
	}
	if ingests, _ := filepath.Glob(n.contents + "/ingest/*"); len(ingests) > 0 {
		n.t.Errorf("ingests are left: %q", ingests)
	}
}

// expectIntact checks that blobs are what their names say, and read-only.
func (n *directNode) expectIntact() {
	n.t.Helper()
	for _, file := range n.blobs() {
		info, err := os.Stat(file)
		if err != nil {
			n.t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256([]byte(harness.Read(n.t, file)))); got != filepath.Base(file) || info.Mode() != 0o444 {
			n.t.Errorf("%s has the digest %s and the mode %v", file, got, info.Mode())
		}
	}
}

// expectDecrypts checks that an encrypted image outlives containerd and its garbage
// collector, and becomes the plain one again.
func (n *directNode) expectDecrypts(name string) {
	n.t.Helper()
	want := n.Target(directPlain)
	harness.Output(n.t, n.CtrPilot("images", "remove", "--sync", directPlain))
	n.Stop(n.t)
	n.Start(n.t)
	n.CollectGarbage(n.t)
	harness.Output(n.t, n.CtrPilot("images", "decrypt", "--key", n.private, name, directPlain))
	if got := n.Target(directPlain); got != want {
		n.t.Errorf("%s became %s, want %s", name, got, want)
	}
	n.expectIntact()
	n.ExpectNothingPending()
}

var directVersions = []func() harness.ContainerdVersion{harness.Containerd2, harness.Containerd17, harness.Containerd16}

// TestContainerdTakesBlobsFromItsFiles encrypts an image whose layers do not pass through
// containerd, kills that and fills the disk.
func TestContainerdTakesBlobsFromItsFiles(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	for _, version := range directVersions {
		t.Run(version().Name, func(t *testing.T) {
			if version().Name == harness.Containerd17().Name { // between the others
				harness.Long(t)
			}
			t.Parallel()
			n := newDirectNode(t, version(), "")
			before := n.blobs()

			halfWay := func() bool {
				files, _ := filepath.Glob(n.contents + "/ingest/*/data")
				return slices.ContainsFunc(files, func(file string) bool {
					info, err := os.Stat(file)
					return err == nil && info.Size() > directLayer/4
				})
			}
			// Which may be before containerd has taken the blob.
			newBlob := func() bool { return len(n.blobs()) > len(before) }
			n.stop(halfWay, syscall.SIGKILL)
			n.expectOnly(before)
			n.stop(newBlob, syscall.SIGKILL)
			n.expectOnly(before)
			n.stop(newBlob, syscall.SIGTERM)
			n.expectOnly(before)

			reserved, filler := n.contents+"/reserved", n.contents+"/filler"
			harness.Write(t, reserved, strings.Repeat("x", directLayer*3/2))
			harness.FillDisk(t, filler)
			os.Remove(reserved)
			harness.ExpectFailure(t, n.encrypt("example.com/full:1"), "no space left on device")
			n.ExpectNothingPending()
			n.expectOnly(before)
			os.Remove(filler)

			written := n.written()
			harness.Output(t, n.encrypt("example.com/enc:1"))
			if written = n.written() - written; written > directLayer/4 {
				t.Errorf("containerd wrote %d bytes", written)
			}
			n.expectIntact()
			n.ExpectNothingPending()
			n.expectOnly(n.blobs())
			n.expectDecrypts("example.com/enc:1")
		})
	}
}

// stop stops an encryption by a signal at a time, while containerd answers nothing. If it is
// killed, its lease expires.
func (n *directNode) stop(when func() bool, signal syscall.Signal) {
	n.t.Helper()
	for range 20 {
		cmd := n.encrypt("example.com/stopped:1")
		if err := cmd.Start(); err != nil {
			n.t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { cmd.Wait(); close(done) }()
		for ended := false; !ended && !when(); {
			select {
			case <-done:
				ended = true
			case <-time.After(time.Millisecond):
			}
		}
		resume := n.Pause(n.t)
		cmd.Process.Signal(signal)
		if signal == syscall.SIGKILL {
			<-done
		}
		resume()
		<-done
		if signal == syscall.SIGKILL {
			for _, lease := range strings.Fields(harness.Output(n.t, n.Ctr("leases", "list", "-q"))) {
				harness.Output(n.t, n.Ctr("leases", "delete", "--sync", lease))
			}
		}
		n.ExpectNothingPending()
		if out := harness.Output(n.t, n.CtrPilot("images", "list", "-q")); !strings.Contains(out, "stopped") {
			return
		}
		harness.Output(n.t, n.CtrPilot("images", "remove", "--sync", "example.com/stopped:1"))
	}
	n.t.Fatal("it was always done before it was stopped")
}

// TestContainerdGetsBlobsOverItsAPI encrypts where containerd does not take blobs from its
// files: it shares none between namespaces, or the files are not to be seen.
func TestContainerdGetsBlobsOverItsAPI(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	for _, version := range directVersions {
		t.Run(version().Name, func(t *testing.T) {
			if version().Name == harness.Containerd17().Name { // between the others
				harness.Long(t)
			}
			t.Parallel()
			n := newDirectNode(t, version(), "[plugins.'io.containerd.metadata.v1.bolt']\n  content_sharing_policy = 'isolated'\n")
			written := n.written()
			harness.Output(t, n.encrypt("example.com/isolated:1"))
			if written = n.written() - written; written < 2*directLayer {
				t.Errorf("containerd wrote only %d bytes", written)
			}
			n.expectIntact()
			n.ExpectNothingPending()
			n.expectOnly(n.blobs())

			cmd := n.encrypt("example.com/hidden:1")
			hidden := exec.Command("unshare", append([]string{"--mount", "sh", "-ec", `mount -t tmpfs tmpfs "$1"; shift; exec "$@"`, "sh", n.contents}, cmd.Args...)...)
			hidden.Env = cmd.Env
			written = n.written()
			harness.Output(t, hidden)
			if written = n.written() - written; written < 2*directLayer {
				t.Errorf("containerd wrote only %d bytes", written)
			}
			n.expectIntact()
			n.expectDecrypts("example.com/isolated:1")

			// A user who may write the files and is not their owner can't make them read-only.
			cmd = n.encrypt("example.com/writable:1")
			caps := "+dac_override,+dac_read_search"
			other := exec.Command("setpriv", append([]string{"--reuid=1", "--regid=1", "--clear-groups", "--inh-caps=" + caps, "--ambient-caps=" + caps}, cmd.Args...)...)
			other.Env = cmd.Env
			harness.Output(t, other)
			harness.Output(t, n.CtrPilot("images", "decrypt", "--key", n.private, "example.com/writable:1", "example.com/plain:2"))
		})
	}
}
