package harness

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// LazyNode is a node that pulls lazily: a containerd with pilot's snapshotter, which reads
// from pilot serve. All have their directories in Dir.
type LazyNode struct {
	*Node
	Copilot *Process
	Broker  string // its address
	Pilot   *Process
	OciConf string // the ocicrypt.conf that leads to pilot
	Mirror  string // its HOST:PORT
	Secret  string // of the mirror

	registries  []string // that the mirror may ask
	Snapshotter *Process
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
	n.StartSnapshotter()
	n.Node = StartNode(t, dir, Containerd2(), "", fmt.Sprintf(`
[proxy_plugins.pilot]
  type = 'diff'
  address = '%[1]s/diff.sock'
[proxy_plugins.pilot-lazy]
  type = 'snapshot'
  address = '%[1]s/snapshotter.sock'
  [proxy_plugins.pilot-lazy.exports]
    root = '%[1]s/snapshotter'
    enable_remote_snapshot_annotations = 'true'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot', 'walking']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%[2]s'
  snapshotter = 'pilot-lazy'
  differ = 'pilot'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%[2]s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'pilot-lazy'
  disable_snapshot_annotations = false
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
`, dir, Arch))
	return n
}

// StartPilot starts the node's pilot.
func (n *LazyNode) StartPilot(args ...string) {
	n.T.Helper()
	n.Pilot, n.OciConf = StartPilot(n.T, n.Dir, n.Broker, append([]string{"--mirror-listen", n.Mirror, "--lazy-listen", "unix://" + n.LazySocket(),
		"--mirror-secret-file", n.Dir + "/secret", "--mirror-allowed-upstreams", strings.Join(n.registries, ","), "--admin-listen", "unix://" + n.Dir + "/admin.sock"}, args...)...)
	Await(n.T, "the mirror", Listening(n.Mirror))
}

// LazySocket is where the node's pilot serves parts of layers.
func (n *LazyNode) LazySocket() string { return n.Dir + "/lazy.sock" }

// StartSnapshotter starts the node's snapshotter. args are more of its.
func (n *LazyNode) StartSnapshotter(args ...string) {
	n.T.Helper()
	root := n.Dir + "/snapshotter"
	p := Start(n.T, n.Dir, "snapshotter", exec.Command("pilot", append([]string{"snapshotter",
		"--listen", root + ".sock", "--root", root, "--lazy", n.LazySocket(), "--log-level", "debug"}, args...)...))
	n.Snapshotter = p
	Await(n.T, "the snapshotter", Reachable(root+".sock"))
	n.T.Cleanup(func() {
		p.Kill()
		// It leaves its mounts to the containers that use them.
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
		if err != nil {
			n.T.Error(err)
		}
		for _, m := range slices.Backward(mounts) {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
				n.T.Errorf("unmount %s: %v", m.Mountpoint, err)
			}
		}
	})
}
