package harness

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// LazyNode is a node that pulls lazily: a containerd with stargz-snapshotter's daemon, whose
// only host is the mirror of pilot serve. Both have their directories in Dir.
type LazyNode struct {
	*Node
	Copilot *Process
	Broker  string // its address
	Pilot   *Process
	OciConf string // the ocicrypt.conf that leads to pilot
	Mirror  string // its HOST:PORT
	Secret  string // of the mirror

	registries []string // that the mirror may ask
	Stargz     *Process
}

// NewLazyNode starts a broker with the KEK team-a, and a node that pulls from registries,
// as HOST:PORT. args are more of pilot's.
func NewLazyNode(t testing.TB, registries []string, args ...string) *LazyNode {
	t.Helper()
	dir := TempDir(t)
	n := &LazyNode{Node: &Node{T: t, Dir: dir}, Mirror: loopbacktest.FreeAddress(t), registries: registries}
	n.Copilot, n.Broker = StartBroker(t, dir+"/broker", "team-a")
	n.StartPilot(args...)
	n.Secret = strings.TrimSpace(Read(t, dir+"/secret"))
	Write(t, dir+"/hosts/_default/hosts.toml", fmt.Sprintf(
		"server = 'http://%s/lazy/v2'\noverride_path = true\ncapabilities = ['pull']\n[header]\n  Pilot-Secret = '%s'\n", n.Mirror, n.Secret))
	Write(t, dir+"/stargz.toml", fmt.Sprintf(`no_background_fetch = true
no_prometheus = true
[registry]
  config_path = '%s/hosts'
[blob]
  check_always = true
[snapshotter]
  allow_invalid_mounts_on_restart = true
`, dir))
	n.StartStargz()
	n.Node = StartNode(t, dir, Containerd2(), "", fmt.Sprintf(`
[proxy_plugins.pilot]
  type = 'diff'
  address = '%[1]s/diff.sock'
[proxy_plugins.stargz]
  type = 'snapshot'
  address = '%[1]s/stargz.sock'
  [proxy_plugins.stargz.exports]
    root = '%[1]s/stargz'
    enable_remote_snapshot_annotations = 'true'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot', 'walking']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%[2]s'
  snapshotter = 'stargz'
  differ = 'pilot'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%[2]s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'stargz'
  disable_snapshot_annotations = false
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
`, dir, Arch))
	return n
}

// StartPilot starts the node's pilot.
func (n *LazyNode) StartPilot(args ...string) {
	n.T.Helper()
	n.Pilot, n.OciConf = StartPilot(n.T, n.Dir, n.Broker, append([]string{"--mirror-listen", n.Mirror,
		"--mirror-secret-file", n.Dir + "/secret", "--mirror-allowed-upstreams", strings.Join(n.registries, ","), "--admin-listen", "unix://" + n.Dir + "/admin.sock"}, args...)...)
	Await(n.T, "the mirror", func() error {
		conn, err := net.Dial("tcp", n.Mirror)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// StartStargz starts the node's snapshotter.
func (n *LazyNode) StartStargz() {
	n.T.Helper()
	n.Stargz = Start(n.T, n.Dir, "stargz", exec.Command(filepath.Join(Tools, "bin/containerd-stargz-grpc"),
		"--address", n.Dir+"/stargz.sock", "--root", n.Dir+"/stargz", "--config", n.Dir+"/stargz.toml", "--log-level", "debug"))
	Await(n.T, "the snapshotter", Reachable(n.Dir+"/stargz.sock"))
	n.T.Cleanup(func() {
		n.Stargz.Cmd.Process.Signal(os.Interrupt) // it unmounts all layers
		<-n.Stargz.Done
	})
}
