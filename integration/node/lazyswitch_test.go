package node

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLazyPullingIsSwitchedOnAndOff has nodes on which containerd removes layers once they
// are unpacked, as on EKS. What only the earlier snapshotter has unpacked is pulled again,
// and containers go on.
func TestLazyPullingIsSwitchedOnAndOff(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	secret := harness.NewSecret()
	sealed := lazyImage(c, "sealed:1", secret)
	gzip := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	plain, full := gzip+"-plain", c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
	for version, images := range map[string]string{"1.7": "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n", "2.4.2": "version = 3\n[plugins.'io.containerd.cri.v1.images']\n"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()[version](t)
			harness.Write(t, m.Root+"/etc/containerd/config.toml", images+"  discard_unpacked_layers = true\n")
			n := &lazyNode{m: m, Node: &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}}
			m.Mount("tmpfs", "var/lib/pilot/snapshotter", "tmpfs", 0, "")
			m.BrokerAt(c.BrokerURL)
			before := m.Files()
			n.startContainerd(t)
			n.pulls(t, plain)
			earlier := n.starts(t, "overlayfs", plain)
			// On the machine, not from outside, so that it looks at what runs.
			install := func(args ...string) string {
				t.Helper()
				return harness.Output(t, m.Run("pilot", append([]string{"node", "install"}, args...)...))
			}
			expect := func(out string, lines ...string) {
				t.Helper()
				for _, line := range lines {
					if !strings.Contains(out, line) {
						t.Errorf("no %q in %s", line, out)
					}
				}
			}

			out := install("--lazy", "--broker", "unix:///run/copilot/copilot.sock")
			expect(out, "does not have the layers of these images", "  "+plain+" (namespace k8s.io)", "pilot node forget-images")
			n.startPilot(t)
			n.startSnapshotter(t)
			n.restartContainerd(t)
			expectStep(t, n.doctor(t, true), "warning", "snapshotter", plain, "pilot node forget-images")
			harness.ExpectFailure(t, m.Run("ctr", "--namespace", "k8s.io", "run", "--rm", "--snapshotter", "pilot-lazy", plain, harness.ContainerID()), "")
			expect(harness.CombinedOutput(t, m.Run("pilot", "node", "forget-images")), "image removed from containerd", plain)
			if out := n.images(t); strings.Contains(out, plain) {
				t.Errorf("the image without layers is still there: %s", out)
			}
			expectStep(t, n.doctor(t, true), "ok", "snapshotter")
			n.reads(t, earlier, c.Secrets[gzip])
			n.pulls(t, plain)
			expect(n.run(t, plain), c.Secrets[gzip])
			n.pulls(t, full)
			n.pulls(t, sealed)
			running := n.starts(t, "pilot-lazy", sealed)
			harness.CombinedOutput(t, m.Run("pilot", "node", "forget-images"))
			expect(n.images(t), plain, full, sealed)

			// Off, with a container that has a lazily pulled image.
			expect(install("--lazy=false"), full, sealed, "pilot node forget-images", "stays for the containers that have it")
			expect(install(), "stays for the containers that have it") // nothing has been restarted
			n.restartContainerd(t)
			harness.CombinedOutput(t, m.Run("pilot", "node", "forget-images"))
			// overlayfs has the plain one only for as long as the earlier container is there.
			if out := n.images(t); strings.Contains(out, c.Registry) {
				t.Errorf("after lazy pulling was switched off, the images are %s", out)
			}
			expectStep(t, n.doctor(t, true), "ok", "lazy", "switched off", running)
			n.pilot.Stop(t)
			n.startPilot(t)
			n.reads(t, running, secret)
			n.reads(t, earlier, c.Secrets[gzip])
			for _, image := range []string{full, sealed} {
				n.pulls(t, image)
				n.ends(t, n.starts(t, "overlayfs", image))
			}
			expect(install(), "stays for the containers that have it")
			n.ends(t, running)
			n.CollectGarbage(t)
			if out := harness.Output(t, n.Ctr("--namespace", "k8s.io", "snapshots", "--snapshotter", "pilot-lazy", "list")); strings.Contains(out, "sha256:") {
				t.Errorf("no container has pilot's snapshotter, which has %s", out)
			}

			// Nothing needs the snapshotter any more.
			expect(install(), "removed /etc/systemd/system/pilot-snapshotter.service", "systemctl stop pilot-snapshotter.service", "systemctl stop pilot-lazy.socket", "pilot snapshotter --remove")
			expect(install(), "nothing to change", "pilot snapshotter --remove")
			n.snapshotter.Stop(t)
			n.pilot.Stop(t)
			n.startPilotAt(t, "diff.sock")
			n.restartContainerd(t)
			// Another test may have containers below a directory of that name.
			harness.CombinedOutput(t, m.Run("pilot", "snapshotter", "--remove", "--force"))
			if out := install(); strings.Contains(out, "pilot-snapshotter") {
				t.Errorf("once it was removed, install says %s", out)
			}
			out = n.doctor(t, true)
			if strings.Contains(out, "lazy") || strings.Contains(out, "snapshotter ") {
				t.Errorf("doctor: %s", out)
			}
			n.reads(t, earlier, c.Secrets[gzip])

			// And on again.
			install("--lazy")
			n.pilot.Stop(t)
			n.startPilot(t)
			n.startSnapshotter(t)
			n.restartContainerd(t)
			harness.CombinedOutput(t, m.Run("pilot", "node", "forget-images"))
			for image, secret := range map[string]string{full: c.Secrets[full], sealed: secret} {
				n.pulls(t, image)
				expect(n.run(t, image), secret)
			}
			expectStep(t, n.doctor(t, true, sealed), "ok", "image", "is mounted, and was not pulled")
			n.ends(t, earlier)
			harness.Output(t, m.Pilot("node", "uninstall"))
			n.snapshotter.Stop(t)
			n.restartContainerd(t)
			harness.CombinedOutput(t, m.Run("pilot", "snapshotter", "--remove", "--force"))
			n.CollectGarbage(t)
			for _, image := range []string{full, sealed, plain} {
				if image == plain {
					n.pulls(t, image)
				}
				// overlayfs may still have them from when lazy pulling was off.
				if strings.Contains(n.images(t), image+`"`) {
					n.ends(t, n.starts(t, "overlayfs", image))
				}
			}
			m.CheckFiles(before)
		})
	}
}

// pulls pulls an image as the kubelet does, and has containerd remove what it needs no more.
func (n *lazyNode) pulls(t testing.TB, image string) {
	t.Helper()
	harness.Output(t, n.Crictl("pull", image))
	n.CollectGarbage(t)
	if pulled := n.layers(t); pulled != 0 {
		t.Errorf("%d layers are there", pulled)
	}
}

// starts starts a container that goes on.
func (n *lazyNode) starts(t testing.TB, snapshotter, image string) (id string) {
	t.Helper()
	id = harness.ContainerID()
	harness.Output(t, n.m.Run("ctr", "--namespace", "k8s.io", "run", "--detach", "--snapshotter", snapshotter, image, id, "/hello", "pause"))
	t.Cleanup(func() { n.m.Run("ctr", "--namespace", "k8s.io", "task", "rm", "-f", id).Run() })
	return id
}

func (n *lazyNode) restartContainerd(t testing.TB) {
	t.Helper()
	n.containerd.Stop(t)
	n.startContainerd(t)
}

// images returns the kubelet's images.
func (n *lazyNode) images(t testing.TB) string {
	t.Helper()
	return harness.Output(t, n.Crictl("images", "-o", "json"))
}

// reads checks that a container can read its secret.
func (n *lazyNode) reads(t testing.TB, id, secret string) {
	t.Helper()
	for line := range strings.Lines(harness.Output(t, n.m.Run("ctr", "--namespace", "k8s.io", "task", "list"))) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == id {
			if got := harness.Read(t, "/proc/"+fields[1]+"/root/secret"); got != secret {
				t.Errorf("%s reads %q", id, got)
			}
			return
		}
	}
	t.Errorf("%s does not run", id)
}

// ends ends a container, and removes it.
func (n *lazyNode) ends(t testing.TB, id string) {
	t.Helper()
	harness.Output(t, n.m.Run("ctr", "--namespace", "k8s.io", "task", "rm", "-f", id))
	harness.Output(t, n.m.Run("ctr", "--namespace", "k8s.io", "container", "rm", id))
}
