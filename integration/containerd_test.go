package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// node is a containerd of its own.
type node struct {
	t        testing.TB
	dir      string
	socket   string
	ocicrypt string // the ocicrypt.conf that its stream processor and its users have
	version
	*process
}

// version is one of containerd's.
type version struct {
	name    string
	command []string // that runs it
	number  int      // of the configuration's format
	images  string   // the CRI plugin that has images
}

// containerd2, containerd17 and containerd16 are the versions to test with.
func containerd2() version {
	return version{"2.4.2", []string{filepath.Join(tools, "bin/containerd")}, 3, "io.containerd.cri.v1.images"}
}

// containerd17 is Debian 13's, with the libraries of that.
func containerd17() version {
	root := filepath.Join(tools, "trixie")
	libraries, err := filepath.Glob(root + "/usr/lib/*-linux-gnu")
	loader, loaderErr := filepath.Glob(root + "/usr/lib*/ld-linux-*")
	if err != nil || loaderErr != nil || len(libraries) == 0 || len(loader) == 0 {
		panic("no C library in " + root)
	}
	return version{"1.7", []string{loader[0], "--library-path", libraries[0], root + "/usr/bin/containerd"}, 2, "io.containerd.grpc.v1.cri"}
}

func containerd16() version {
	return version{"1.6", []string{"/usr/bin/containerd"}, 2, "io.containerd.grpc.v1.cri"}
}

// newNode starts a containerd whose stream processors are pilot-decoder with
// the key providers of ocicrypt and, if given, a directory of keys.
func newNode(t testing.TB, dir string, v version, ocicrypt, keys string) *node {
	t.Helper()
	args := ""
	if keys != "" {
		args = fmt.Sprintf("  args = ['--decryption-keys-path', '%s']\n", keys)
	}
	conf := fmt.Sprintf("[plugins.'%s'.image_decryption]\n  key_model = 'node'\n", v.images)
	if v.number > 2 {
		conf += fmt.Sprintf("[plugins.'%s']\n  use_local_image_pull = true\n", v.images)
	}
	// The README's configuration.
	for id, types := range map[string][]string{"tar": {"tar"}, "tar.gzip": {"tar+gzip", "tar+zstd"}} {
		var accepts []string
		for _, mt := range types {
			accepts = append(accepts, "'application/vnd.oci.image.layer.v1."+mt+"+encrypted'")
		}
		conf += fmt.Sprintf("[stream_processors.'io.containerd.ocicrypt.decoder.v1.%s']\n  accepts = [%s]\n  returns = 'application/vnd.oci.image.layer.v1.%s'\n  path = '%s/pilot-decoder'\n  env = ['OCICRYPT_KEYPROVIDER_CONFIG=%s']\n%s",
			id, strings.Join(accepts, ", "), types[0], bin, ocicrypt, args)
	}
	return startNode(t, dir, v, ocicrypt, conf)
}

// differNode is how a containerd with pilot as its differ is set up.
type differNode struct {
	v           version
	snapshotter string // default: overlayfs
	sandbox     string // the image of pods' sandboxes
	local       bool   // CRI pulls images itself, on containerd 2.x
	unpacks     int    // at once, on containerd 2.x; default: 3
}

// newDifferNode starts a containerd whose differ is the pilot of the same
// directory. No client of it has a key provider of its own.
func newDifferNode(t testing.TB, dir string, d differNode) *node {
	t.Helper()
	if d.snapshotter == "" {
		d.snapshotter = "overlayfs"
	}
	if d.unpacks == 0 {
		d.unpacks = 3
	}
	conf := fmt.Sprintf("[proxy_plugins.pilot]\n  type = 'diff'\n  address = '%s/diff.sock'\n", dir)
	conf += "[plugins.'io.containerd.service.v1.diff-service']\n  default = ['pilot', 'walking']\n"
	if d.v.number > 2 {
		conf += fmt.Sprintf("[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = %d\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/%s'\n  snapshotter = '%s'\n  differ = 'pilot'\n", d.unpacks, goarch, d.snapshotter)
		conf += fmt.Sprintf("[plugins.'%s']\n  snapshotter = '%s'\n  use_local_image_pull = %v\n", d.v.images, d.snapshotter, d.local)
		// A machine that is a container itself may not lower OOM scores.
		conf += "[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n"
		conf += fmt.Sprintf("[plugins.'%s'.pinned_images]\n  sandbox = '%s'\n", d.v.images, d.sandbox)
	} else {
		conf += fmt.Sprintf("[plugins.'%s']\n  sandbox_image = '%s'\n  restrict_oom_score_adj = true\n", d.v.images, d.sandbox)
		conf += fmt.Sprintf("[plugins.'%s'.containerd]\n  snapshotter = '%s'\n", d.v.images, d.snapshotter)
	}
	return startNode(t, dir, d.v, "", conf)
}

// startNode starts a containerd with that configuration besides its
// directories.
func startNode(t testing.TB, dir string, v version, ocicrypt, conf string) *node {
	t.Helper()
	n := &node{t: t, dir: dir, socket: filepath.Join(dir, "containerd.sock"), ocicrypt: ocicrypt, version: v}
	conf = fmt.Sprintf("version = %d\nroot = '%s/root'\nstate = '%s/state'\n[grpc]\n  address = '%s'\n", v.number, dir, dir, n.socket) + conf
	write(t, filepath.Join(dir, "config.toml"), conf)
	n.start(t)
	return n
}

// start starts the node's containerd.
func (n *node) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(n.command[0], append(n.command[1:], "--config", filepath.Join(n.dir, "config.toml"))...)
	// The newest has its shim beside itself.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(n.command[0])+":/usr/sbin:/usr/bin:/sbin:/bin")
	n.process = start(t, n.dir, "containerd-"+n.name, cmd)
	await(t, "containerd "+n.name, func() error {
		return exec.Command(filepath.Join(tools, "bin/ctr"), "--address", n.socket, "version").Run()
	})
}

// ctr returns a command of containerd's own ctr on this node.
func (n *node) ctr(args ...string) *exec.Cmd {
	n.t.Helper()
	return command(n.t, filepath.Join(tools, "bin/ctr"), append([]string{"--address", n.socket}, args...)...)
}

// ctrPilot returns a command of ctr-pilot on this node.
func (n *node) ctrPilot(args ...string) *exec.Cmd {
	n.t.Helper()
	cmd := command(n.t, "ctr-pilot", append([]string{"--address", n.socket}, args...)...)
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.ocicrypt)
	return cmd
}

// crictl returns a command of crictl on this node.
func (n *node) crictl(args ...string) *exec.Cmd {
	n.t.Helper()
	return command(n.t, filepath.Join(tools, "bin/crictl"), append([]string{"--runtime-endpoint", "unix://" + n.socket, "--timeout", "4m"}, args...)...)
}

// containers counts those that were named by containerID.
var containers atomic.Int32

// containerID returns a container's name that nobody else has: all containerds of
// a machine share runc's directory, also those of other tests.
func containerID() string {
	return fmt.Sprintf("pilot-it-%d-%d", os.Getpid(), containers.Add(1))
}

// target returns the digest that an image's name stands for.
func (n *node) target(name string) string {
	n.t.Helper()
	for line := range strings.Lines(output(n.t, n.ctrPilot("images", "list", "name=="+name))) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == name {
			return fields[2]
		}
	}
	n.t.Fatalf("there is no image %s", name)
	return ""
}

// nothingPending checks that nothing is left of work that failed: no ingest, no lease.
func (n *node) nothingPending() {
	n.t.Helper()
	for _, args := range [][]string{{"content", "active"}, {"leases", "list", "-q"}} {
		out := strings.TrimSpace(output(n.t, n.ctrPilot(args...)))
		if lines := strings.Split(out, "\n"); len(lines) > 1 || args[0] == "leases" && out != "" {
			n.t.Errorf("%s: left behind:\n%s", strings.Join(args, " "), out)
		}
	}
}
