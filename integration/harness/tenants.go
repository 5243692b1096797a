package harness

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// SharedNode is a node whose containerd asks pilot about each container.
type SharedNode struct {
	*Node
	Broker *TLSBroker
	Pilot  *Process
	Config string // pilot.toml
}

// NewSharedNode starts a node, and a broker for it with the KEK team-a, which has the same
// key in all brokers. sandbox is the image of sandboxes, and settings are lines of its
// pilot.toml.
func NewSharedNode(t testing.TB, v ContainerdVersion, sandbox, settings string) *SharedNode {
	t.Helper()
	return NewSharedNodeWith(t, DifferConfig{Containerd: v, Sandbox: sandbox}, settings)
}

// NewSharedNodeWith does as NewSharedNode, with more of containerd's settings.
func NewSharedNodeWith(t testing.TB, d DifferConfig, settings string) *SharedNode {
	t.Helper()
	n := &SharedNode{Node: &Node{T: t, Dir: TempDir(t)}, Broker: NewTLSBroker(t)}
	kek := sha256.Sum256([]byte("team-a"))
	Output(t, n.Broker.Command(t, "keys", "import", "--file", Write(t, n.Dir+"/kek", string(kek[:])), "team-a"))
	cert, key := n.Broker.Enroll(t, "worker-1", "--role", "node")
	n.Config = Write(t, n.Dir+"/pilot.toml", fmt.Sprintf(`broker = %q
broker-ca = "%s/ca.pem"
broker-cert = %q
broker-key = %q
listen = "unix://%[5]s/keyprovider.sock"
diff-listen = "unix://%[5]s/diff.sock"
admin-listen = "unix://%[5]s/admin.sock"
layer-record = "%[5]s/layers"
workloads-listen = "unix://%[5]s/workloads.sock"
containerd = "%[5]s/containerd.sock"
kubelet-dir = "%[5]s/kubelet"
%[6]s`, n.Broker.URL(), n.Broker.Dir, cert, key, n.Dir, settings))
	n.StartPilot(t)
	if d.Containerd.Name == "2.2.9" {
		// As where it is below /var/run.
		if err := errors.Join(os.Mkdir(n.Dir+"/run", 0o755), os.Symlink("run", n.Dir+"/state")); err != nil {
			t.Fatal(err)
		}
	}
	d.NRI = NRIPlugin(t, n.Dir, n.Config, d.Containerd)
	n.Node = NewDifferNode(t, n.Dir, d)
	return n
}

// NRIPatience are lines of NRI's section. containerd drops plugins that are late, and by
// default that is one that a busy machine holds up for 2 s.
const NRIPatience = "  plugin_registration_timeout = '60s'\n  plugin_request_timeout = '10s'\n"

// NRIPlugin installs pilot's NRI plugin for a containerd in dir, and returns the lines of
// NRI's section for it.
func NRIPlugin(t testing.TB, dir, config string, v ContainerdVersion) string {
	t.Helper()
	Write(t, dir+"/nri.conf/00-pilot.conf", Read(t, config))
	if err := os.Chmod(Write(t, dir+"/nri/00-pilot", "#!"+Bin+"/pilot nri-plugin\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	lines := fmt.Sprintf("  disable = false\n  plugin_path = '%[1]s/nri'\n  plugin_config_path = '%[1]s/nri.conf'\n", dir) + NRIPatience
	if v.Number > 2 {
		lines += "[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['pilot']\n"
	}
	return lines
}

// StartPilot starts the node's pilot.
func (n *SharedNode) StartPilot(t testing.TB) {
	t.Helper()
	n.Pilot = Start(t, n.Dir, "pilot", exec.Command("pilot", "serve", "--config", n.Config))
	Await(t, "pilot", Reachable(n.Dir+"/workloads.sock"))
}

// Allow has the broker's policy allow the node to pull with team-a, and these workloads to
// use it.
func (n *SharedNode) Allow(t testing.TB, workloads ...string) {
	t.Helper()
	text := `
[[rule]]
identities = ["spiffe://example.com/node/*"]
keks = ["**"]
actions = ["unwrap", "export"]
`
	if len(workloads) > 0 {
		text += fmt.Sprintf(`
[[rule]]
identities = ["spiffe://example.com/node/worker-1"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["%s"]
`, strings.Join(workloads, `", "`))
	}
	n.Broker.SetPolicy(t, text)
}

// Allowing does as Allow, and returns the node.
func (n *SharedNode) Allowing(t testing.TB, workloads ...string) *SharedNode {
	t.Helper()
	n.Allow(t, workloads...)
	return n
}

// Sandbox makes the sandbox of a pod, and returns its ID and the file that describes it.
func (n *SharedNode) Sandbox(t testing.TB, namespace, name, uid string) (id, file string) {
	t.Helper()
	return n.LabelledSandbox(t, namespace, name, uid, nil)
}

// LabelledSandbox is Sandbox for a pod with labels.
func (n *SharedNode) LabelledSandbox(t testing.TB, namespace, name, uid string, labels map[string]string) (id, file string) {
	t.Helper()
	b, err := json.Marshal(Object{
		"metadata": Object{"name": name, "namespace": namespace, "uid": uid, "attempt": 1}, "labels": labels, "log_directory": filepath.Join(n.Dir, "logs", uid),
		"linux": Object{"security_context": Object{"namespace_options": Object{"network": 2, "pid": 1}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file = Write(t, filepath.Join(n.Dir, "pods", uid+".json"), string(b))
	return strings.TrimSpace(Output(t, n.Crictl("runp", file))), file
}
