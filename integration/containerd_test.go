package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// node is a containerd of its own.
type node struct {
	t        *testing.T
	dir      string
	socket   string
	ocicrypt string // the ocicrypt.conf that its stream processor and its users have
	*process
}

// version is one of containerd's.
type version struct {
	name    string
	command []string // that runs it
	cri     string   // its configuration of CRI, as TOML
	number  int      // of the configuration's format
}

// containerds returns the versions to test with. The newest is the first.
func containerds() []version {
	return []version{
		{"2.4.2", []string{filepath.Join(tools, "bin/containerd")}, `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  use_local_image_pull = true
[plugins.'io.containerd.cri.v1.images'.image_decryption]
  key_model = 'node'
`, 3},
		{"1.6", []string{"/usr/bin/containerd"}, `
[plugins.'io.containerd.grpc.v1.cri'.image_decryption]
  key_model = 'node'
`, 2},
	}
}

// newNode starts a containerd whose stream processors are pilot-decoder with
// the key providers of ocicrypt and, if given, a directory of keys.
func newNode(t *testing.T, dir string, v version, ocicrypt, keys string) *node {
	t.Helper()
	n := &node{t: t, dir: dir, socket: filepath.Join(dir, "containerd.sock"), ocicrypt: ocicrypt}
	args := ""
	if keys != "" {
		args = fmt.Sprintf("  args = ['--decryption-keys-path', '%s']\n", keys)
	}
	conf := fmt.Sprintf("version = %d\nroot = '%s/root'\nstate = '%s/state'\n[grpc]\n  address = '%s'\n%s", v.number, dir, dir, n.socket, v.cri)
	// The README's configuration.
	for id, types := range map[string][]string{"tar": {"tar"}, "tar.gzip": {"tar+gzip", "tar+zstd"}} {
		var accepts []string
		for _, mt := range types {
			accepts = append(accepts, "'application/vnd.oci.image.layer.v1."+mt+"+encrypted'")
		}
		conf += fmt.Sprintf("[stream_processors.'io.containerd.ocicrypt.decoder.v1.%s']\n  accepts = [%s]\n  returns = 'application/vnd.oci.image.layer.v1.%s'\n  path = '%s/pilot-decoder'\n  env = ['OCICRYPT_KEYPROVIDER_CONFIG=%s']\n%s",
			id, strings.Join(accepts, ", "), types[0], bin, ocicrypt, args)
	}
	file := write(t, filepath.Join(dir, "config.toml"), conf)
	cmd := exec.Command(v.command[0], append(v.command[1:], "--config", file)...)
	// Each finds the shim beside itself.
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(v.command[0])+":/usr/sbin:/usr/bin:/sbin:/bin")
	n.process = start(t, dir, "containerd-"+v.name, cmd)
	await(t, "containerd "+v.name, func() error {
		return exec.Command(filepath.Join(tools, "bin/ctr"), "--address", n.socket, "version").Run()
	})
	return n
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
	return command(n.t, filepath.Join(tools, "bin/crictl"), append([]string{"--runtime-endpoint", "unix://" + n.socket, "--timeout", "30s"}, args...)...)
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
