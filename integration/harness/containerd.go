package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Node is a containerd of its own.
type Node struct {
	T        testing.TB
	Dir      string
	Socket   string
	Ocicrypt string // the ocicrypt.conf that its stream processor and its users have
	ContainerdVersion
	*Process
}

// ContainerdVersion is one of containerd's.
type ContainerdVersion struct {
	Name    string
	Command []string // that runs it
	Number  int      // of the configuration's format
	images  string   // the CRI plugin that has images
}

// Containerd2, Containerd17 and Containerd16 are the versions to test with.
func Containerd2() ContainerdVersion {
	return ContainerdVersion{"2.4.2", []string{filepath.Join(Tools, "bin/containerd")}, 3, "io.containerd.cri.v1.images"}
}

// Containerd22 is the first with validators of NRI.
func Containerd22() ContainerdVersion {
	return ContainerdVersion{"2.2.9", []string{filepath.Join(Tools, "containerd-2.2.9/containerd")}, 3, "io.containerd.cri.v1.images"}
}

// Containerd20 is the first 2.x.
func Containerd20() ContainerdVersion {
	return ContainerdVersion{"2.0.7", []string{filepath.Join(Tools, "containerd-2.0.7/containerd")}, 3, "io.containerd.cri.v1.images"}
}

// Containerd17 is Debian 13's, with the libraries of that.
func Containerd17() ContainerdVersion {
	root := filepath.Join(Tools, "trixie")
	libraries, err := filepath.Glob(root + "/usr/lib/*-linux-gnu")
	loader, loaderErr := filepath.Glob(root + "/usr/lib*/ld-linux-*")
	if err != nil || loaderErr != nil || len(libraries) == 0 || len(loader) == 0 {
		panic("no C library in " + root)
	}
	return ContainerdVersion{"1.7", []string{loader[0], "--library-path", libraries[0], root + "/usr/bin/containerd"}, 2, "io.containerd.grpc.v1.cri"}
}

func Containerd16() ContainerdVersion {
	return ContainerdVersion{"1.6", []string{"/usr/bin/containerd"}, 2, "io.containerd.grpc.v1.cri"}
}

// NewNode starts a containerd whose stream processors are pilot-decoder with
// the key providers of ocicrypt and, if given, a directory of keys.
func NewNode(t testing.TB, dir string, v ContainerdVersion, ocicrypt, keys string) *Node {
	t.Helper()
	args := ""
	if keys != "" {
		args = fmt.Sprintf("  args = ['--decryption-keys-path', '%s']\n", keys)
	}
	conf := fmt.Sprintf("[plugins.'%s'.image_decryption]\n  key_model = 'node'\n", v.images)
	if v.Number > 2 {
		conf += fmt.Sprintf("[plugins.'%s']\n  use_local_image_pull = true\n", v.images)
	}
	// The README's configuration.
	for id, types := range map[string][]string{"tar": {"tar"}, "tar.gzip": {"tar+gzip", "tar+zstd"}} {
		var accepts []string
		for _, mt := range types {
			accepts = append(accepts, "'application/vnd.oci.image.layer.v1."+mt+"+encrypted'")
		}
		conf += fmt.Sprintf("[stream_processors.'io.containerd.ocicrypt.decoder.v1.%s']\n  accepts = [%s]\n  returns = 'application/vnd.oci.image.layer.v1.%s'\n  path = '%s/pilot-decoder'\n  env = ['OCICRYPT_KEYPROVIDER_CONFIG=%s']\n%s",
			id, strings.Join(accepts, ", "), types[0], Bin, ocicrypt, args)
	}
	return StartNode(t, dir, v, ocicrypt, conf)
}

// DifferConfig is how a containerd with pilot as its differ is set up.
type DifferConfig struct {
	Containerd  ContainerdVersion
	Snapshotter string // default: overlayfs
	Sandbox     string // the image of pods' sandboxes
	Local       bool   // CRI pulls images itself, on containerd 2.x
	Unpacks     int    // at once, on containerd 2.x; default: 3
	NRI         string // more lines of NRI's section
	More        string // more sections
	Stock       bool   // without pilot
}

// NewDifferNode starts a containerd whose differ is the pilot of the same
// directory. No client of it has a key provider of its own.
func NewDifferNode(t testing.TB, dir string, d DifferConfig) *Node {
	t.Helper()
	if d.Snapshotter == "" {
		d.Snapshotter = "overlayfs"
	}
	if d.Unpacks == 0 {
		d.Unpacks = 3
	}
	differ := "pilot"
	conf := d.NRI + d.More + fmt.Sprintf("[proxy_plugins.pilot]\n  type = 'diff'\n  address = '%s/diff.sock'\n", dir)
	conf += "[plugins.'io.containerd.service.v1.diff-service']\n  default = ['pilot', 'walking']\n"
	if d.Stock {
		differ, conf = "walking", d.NRI+d.More
	}
	if d.Containerd.Number > 2 {
		conf += fmt.Sprintf("[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = %d\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/%s'\n  snapshotter = '%s'\n  differ = '%s'\n", d.Unpacks, Arch, d.Snapshotter, differ)
		conf += fmt.Sprintf("[plugins.'%s']\n  snapshotter = '%s'\n  use_local_image_pull = %v\n", d.Containerd.images, d.Snapshotter, d.Local)
		// A machine that is a container itself may not lower OOM scores.
		conf += "[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n"
		conf += fmt.Sprintf("[plugins.'%s'.pinned_images]\n  sandbox = '%s'\n", d.Containerd.images, d.Sandbox)
	} else {
		conf += fmt.Sprintf("[plugins.'%s']\n  sandbox_image = '%s'\n  restrict_oom_score_adj = true\n", d.Containerd.images, d.Sandbox)
		conf += fmt.Sprintf("[plugins.'%s'.containerd]\n  snapshotter = '%s'\n", d.Containerd.images, d.Snapshotter)
	}
	return StartNode(t, dir, d.Containerd, "", conf)
}

// StartNode starts a containerd with that configuration besides its
// directories.
func StartNode(t testing.TB, dir string, v ContainerdVersion, ocicrypt, conf string) *Node {
	t.Helper()
	n := &Node{T: t, Dir: dir, Socket: filepath.Join(dir, "containerd.sock"), Ocicrypt: ocicrypt, ContainerdVersion: v}
	conf = fmt.Sprintf("version = %d\nroot = '%s/root'\nstate = '%s/state'\n[grpc]\n  address = '%s'\n", v.Number, dir, dir, n.Socket) +
		// Its default is one for the machine, where two that start at once fail.
		fmt.Sprintf("[plugins.'io.containerd.nri.v1.nri']\n  socket_path = '%s/nri.sock'\n", dir) + conf
	Write(t, filepath.Join(dir, "config.toml"), conf)
	n.Start(t)
	n.AwaitCRI()
	return n
}

// Start starts the node's containerd.
func (n *Node) Start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(n.Command[0], append(n.Command[1:], "--config", filepath.Join(n.Dir, "config.toml"))...)
	// The newest has its shim beside itself.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(n.Command[0])+":/usr/sbin:/usr/bin:/sbin:/bin")
	n.Process = Start(t, n.Dir, "containerd-"+n.Name, cmd)
	Await(t, "containerd "+n.Name, Reachable(n.Socket))
	Await(t, "containerd "+n.Name, func() error {
		return exec.Command(filepath.Join(Tools, "bin/ctr"), "--address", n.Socket, "version").Run()
	})
}

// Ctr returns a command of containerd's own ctr on this node.
func (n *Node) Ctr(args ...string) *exec.Cmd {
	n.T.Helper()
	return Command(n.T, filepath.Join(Tools, "bin/ctr"), append([]string{"--address", n.Socket}, args...)...)
}

// CtrPilot returns a command of ctr-pilot on this node.
func (n *Node) CtrPilot(args ...string) *exec.Cmd {
	n.T.Helper()
	cmd := Command(n.T, "ctr-pilot", append([]string{"--address", n.Socket}, args...)...)
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.Ocicrypt)
	return cmd
}

// Crictl returns a command of crictl on this node.
func (n *Node) Crictl(args ...string) *exec.Cmd {
	n.T.Helper()
	return Command(n.T, filepath.Join(Tools, "bin/crictl"), append([]string{"--runtime-endpoint", "unix://" + n.Socket, "--timeout", "4m"}, args...)...)
}

// AwaitCRI waits for containerd's CRI, which begins after its other services.
func (n *Node) AwaitCRI() {
	n.T.Helper()
	Await(n.T, "CRI", func() error { return n.Crictl("version").Run() })
}

// containers counts those that were named by ContainerID.
var containers atomic.Int32

// ContainerID returns a unique container name: all containerds of a machine, also those
// of other tests, share runc's directory.
func ContainerID() string {
	return fmt.Sprintf("pilot-it-%d-%d", os.Getpid(), containers.Add(1))
}

// Target returns the digest that an image's name stands for.
func (n *Node) Target(name string) string {
	n.T.Helper()
	for line := range strings.Lines(Output(n.T, n.CtrPilot("images", "list", "name=="+name))) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == name {
			return fields[2]
		}
	}
	n.T.Fatalf("there is no image %s", name)
	return ""
}

// ExpectNothingPending checks that nothing is left of work that failed: no ingest, no lease.
func (n *Node) ExpectNothingPending() {
	n.T.Helper()
	for _, args := range [][]string{{"content", "active"}, {"leases", "list", "-q"}} {
		out := strings.TrimSpace(Output(n.T, n.CtrPilot(args...)))
		if lines := strings.Split(out, "\n"); len(lines) > 1 || args[0] == "leases" && out != "" {
			n.T.Errorf("%s: left behind:\n%s", strings.Join(args, " "), out)
		}
	}
}

// ExpectNoTraces checks that nothing is left of pulls that are over: no mount or
// directory of pilot's, no snapshot being made, no ingest.
func (n *Node) ExpectNoTraces(t testing.TB) {
	t.Helper()
	if entries, err := os.ReadDir(filepath.Join(n.Dir, "mounts")); err != nil || len(entries) > 0 {
		t.Errorf("left in pilot's directory for mounts: %v, %v", entries, err)
	}
	for _, namespace := range []string{"default", "k8s.io"} {
		for _, snapshotter := range []string{"overlayfs", "native"} {
			if out := Output(t, n.Ctr("--namespace", namespace, "snapshots", "--snapshotter", snapshotter, "list")); strings.Contains(out, "extract-") {
				t.Errorf("left behind:\n%s", out)
			}
		}
		if out := Output(t, n.Ctr("--namespace", namespace, "content", "active")); strings.Count(out, "\n") > 1 {
			t.Errorf("left behind:\n%s", out)
		}
	}
}

// CollectGarbage has containerd collect garbage.
func (n *Node) CollectGarbage(t testing.TB) {
	t.Helper()
	lease := strings.TrimSpace(Output(t, n.Ctr("--namespace", "k8s.io", "leases", "create")))
	Output(t, n.Ctr("--namespace", "k8s.io", "leases", "delete", "--sync", lease))
}

// ExpectNoSnapshots checks that there is no snapshot at all, once the good layers of
// images that failed are collected.
func (n *Node) ExpectNoSnapshots(t testing.TB) {
	t.Helper()
	n.CollectGarbage(t)
	n.ExpectNoTraces(t)
	for _, namespace := range []string{"default", "k8s.io"} {
		if out := Output(t, n.Ctr("--namespace", namespace, "snapshots", "list")); strings.Contains(out, "sha256:") {
			t.Errorf("namespace %s has snapshots:\n%s", namespace, out)
		}
	}
}

// PodCommand returns a command that makes a sandbox and a container of an image that
// is there, as the kubelet does.
func (n *Node) PodCommand(t testing.TB, image string, mounts ...Object) *exec.Cmd {
	t.Helper()
	host := Object{"namespace_options": Object{"network": 2, "pid": 1}}
	sandbox := Object{"metadata": Object{"name": "pod", "namespace": "test", "uid": "1", "attempt": 1}, "log_directory": filepath.Join(n.Dir, "logs"), "linux": Object{"security_context": host}}
	container := Object{"metadata": Object{"name": "app"}, "image": Object{"image": image}, "log_path": "app.log", "linux": Object{"security_context": host}, "mounts": mounts}
	file := func(name string, o Object) string {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return Write(t, filepath.Join(n.Dir, name), string(b))
	}
	return n.Crictl("run", "--no-pull", file("container.json", container), file("sandbox.json", sandbox))
}

// RunPod runs a container of an image that is there, in a sandbox, and returns what it
// prints.
func (n *Node) RunPod(t testing.TB, image string, mounts ...Object) string {
	t.Helper()
	logs := filepath.Join(n.Dir, "logs")
	id := strings.TrimSpace(Output(t, n.PodCommand(t, image, mounts...)))
	defer func() {
		Output(t, n.Crictl("rmp", "-f", "-a"))
		os.RemoveAll(logs)
	}()
	var said string
	Await(t, "the container's end", func() error {
		if out := Output(t, n.Crictl("ps", "-a", "--id", id, "-o", "json")); !strings.Contains(out, "CONTAINER_EXITED") {
			return fmt.Errorf("it has not: %s", out)
		}
		// What it printed may come later.
		b, err := os.ReadFile(filepath.Join(logs, "app.log"))
		if said = string(b); err == nil && said == "" {
			err = errors.New("its log is empty")
		}
		return err
	})
	return said
}

// Unpacking waits until a file of the big image is there, but not whole. It
// reports false if the pull is over before.
func (n *Node) Unpacking(snapshotter string, done chan error) bool {
	n.T.Helper()
	pattern := n.Dir + "/root/io.containerd.snapshotter.v1." + snapshotter + "/snapshots/*/"
	if snapshotter == "overlayfs" {
		pattern += "fs/"
	}
	for {
		files, err := filepath.Glob(pattern + "file*")
		if err != nil {
			n.T.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil && info.Size() < BigLayer {
				return true
			}
		}
		select {
		case err := <-done:
			done <- err
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// BuiltinNode builds a containerd with pilot's differ in it, and starts a node with
// it, whose directory of keys is keys in its own.
func BuiltinNode(t testing.TB, dir, ociConf string) *Node {
	t.Helper()
	GoBuild(t, "integration/testdata/containerd", filepath.Join(dir, "bin", "containerd"), ".")
	if err := os.Symlink(filepath.Join(Tools, "bin/containerd-shim-runc-v2"), filepath.Join(dir, "bin/containerd-shim-runc-v2")); err != nil {
		t.Fatal(err)
	}
	home := TempDir(t)
	v := Containerd2()
	v.Name, v.Command = "2.4.2 with pilot", []string{filepath.Join(dir, "bin/containerd")}
	return StartNode(t, home, v, "", fmt.Sprintf(`
[plugins.'io.containerd.differ.v1.pilot']
  key_providers = '%s'
  decryption_keys_path = '%s/keys'
  layers_at_once = 2
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
# What is left of an earlier set-up does no harm.
[stream_processors.'io.containerd.ocicrypt.decoder.v1.tar.gzip']
  accepts = ['application/vnd.oci.image.layer.v1.tar+gzip+encrypted']
  returns = 'application/vnd.oci.image.layer.v1.tar+gzip'
  path = '/bin/false'
`, ociConf, home, Arch))
}
