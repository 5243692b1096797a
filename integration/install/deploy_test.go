//go:build node

package install

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// pod is a pod of the DaemonSet's, without a kubelet.
type pod struct {
	*harness.BootedMachine
	name string
}

// daemonSetManifest is the DaemonSet's, and what the test's pods have of it.
const daemonSetManifest = "packaging/kubernetes/pilot/daemonset.yaml"

// startPod starts a pod of an image with what the DaemonSet's have: its arguments,
// the node's processes, all rights, a file system that can't be written.
func startPod(b *harness.BootedMachine, c *harness.APIServer, name, image, broker string, more ...string) *pod {
	b.T.Helper()
	url := strings.TrimPrefix(c.URL, "https://")
	host, port, err := net.SplitHostPort(url)
	if err != nil {
		b.T.Fatal(err)
	}
	args := []string{"--namespace", "k8s.io", "run", "--detach", "--log-uri", "file:///var/log/" + name, "--privileged", "--cpu-shares", "0", "--net-host", "--with-ns", "pid:/proc/1/ns/pid", "--read-only",
		"--env", "KUBERNETES_SERVICE_HOST=" + host, "--env", "KUBERNETES_SERVICE_PORT=" + port, "--env", "POD_NAMESPACE=pilot-system",
		"--mount", "type=bind,src=/pod/account,dst=/var/run/secrets/kubernetes.io/serviceaccount,options=rbind:ro",
		"--mount", "type=bind,src=/pod/broker,dst=/run/broker,options=rbind:ro",
		image, name, "/usr/bin/pilot", "node", "deploy", "--broker=" + broker}
	for _, arg := range []string{"--broker-ca-from=/run/broker/ca.pem", "--broker-token-from=/run/broker/token"} {
		if !strings.Contains(harness.Read(b.T, filepath.Join(harness.Repo, daemonSetManifest)), "- "+arg+"\n") {
			b.T.Errorf("%s has no argument %s", daemonSetManifest, arg)
		}
		args = append(args, arg)
	}
	args = append(args, more...)
	// As the machine's own, which has fewer rights than this test.
	harness.Output(b.T, b.Run("systemd-run", append([]string{"--quiet", "--wait", "--pipe", "--collect", "ctr"}, args...)...))
	b.T.Cleanup(func() {
		if b.T.Failed() {
			b.T.Logf("%s:\n%s", name, harness.CombinedOutput(b.T, exec.Command("cat", b.Root+"/var/log/"+name)))
		}
	})
	return &pod{b, name}
}

func (p *pod) log() string {
	p.T.Helper()
	return harness.Read(p.T, p.Root+"/var/log/"+p.name)
}

// ready waits until the readiness probe succeeds.
func (p *pod) ready() {
	p.T.Helper()
	var probes int
	harness.Await(p.T, p.name+" is ready", func() error {
		probes++
		out, err := p.BootedMachine.Run("ctr", "--namespace", "k8s.io", "tasks", "exec", "--exec-id", fmt.Sprint("probe", probes), p.name, "/usr/bin/pilot", "node", "deploy", "--check").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// stop stops the pod as the kubelet does.
func (p *pod) stop() {
	p.T.Helper()
	harness.Output(p.T, p.BootedMachine.Run("ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGTERM", p.name))
	harness.Await(p.T, p.name+" ends", func() error {
		return p.BootedMachine.Run("ctr", "--namespace", "k8s.io", "tasks", "delete", p.name).Run()
	})
	harness.Output(p.T, p.BootedMachine.Run("ctr", "--namespace", "k8s.io", "containers", "delete", p.name))
}

// deployedImage makes an image of the programs in dir and imports it on the
// machine.
func deployedImage(b *harness.BootedMachine, dir, tag string) string {
	b.T.Helper()
	out := harness.TempDir(b.T) + "/image"
	build := harness.Command(b.T, "go", "run", "-buildvcs=false", ".", "-out", out, "-version", tag, "-user", "0:0", "-license", harness.Repo+"/LICENSE", "pilot,pilot-decoder", harness.Arch+"="+dir)
	build.Dir = filepath.Join(harness.Repo, "packaging/ociimage")
	harness.Output(b.T, build)
	harness.Output(b.T, harness.Command(b.T, "tar", "-C", out, "-cf", b.Root+"/var/tmp/"+tag+".tar", "."))
	harness.Output(b.T, b.Run("ctr", "--namespace", "k8s.io", "images", "import", "--base-name", "registry.example.com/pilot", "/var/tmp/"+tag+".tar"))
	return "registry.example.com/pilot:" + tag
}

// TestDeploy has a DaemonSet's pod set up a machine that runs, be replaced and
// upgraded, and clean up.
func TestDeploy(t *testing.T) {
	t.Parallel()
	c := harness.NewAPIServer(t)
	b := harness.NewTLSBroker(t, "team-a")
	b.Process.Stop(t)
	appendTo(t, b.Dir+"/copilot.toml", fmt.Sprintf("\n[issuers.cluster]\nurl = %q\nkeys-url = %q\naudience = \"copilot\"\nca = %q\n", c.URL, c.URL+"/openid/v1/jwks", c.Dir+"/account/ca.crt"))
	appendTo(t, b.Dir+"/policy.toml", "\n[[rule]]\nidentities = [\"cluster:system:serviceaccount:pilot-system:pilot@node/worker-7\"]\nkeks = [\"team-*\"]\nactions = [\"unwrap\"]\n")
	b.Start(t)
	harness.Write(t, c.Dir+"/broker/ca.pem", harness.Read(t, b.Dir+"/ca.pem"))
	dir := harness.TempDir(t)
	_, ociConf := harness.StartPilot(t, dir+"/ci", "unix://"+b.Dir+"/copilot.sock")
	ci := harness.NewCI(t, dir+"/ci", ociConf)

	for _, version := range []string{"1.7", "2.4.2"} {
		t.Run(version, func(t *testing.T) {
			m := harness.Boot(t, filepath.Join(harness.Tools, "trixie"), []string{"--bind=" + c.Dir + ":/pod", "--bind=/dev/fuse", "--tmpfs=/var/lib/pilot/snapshotter"}, func(m *harness.Machine) {
				if version == "2.4.2" {
					for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
						harness.Output(t, harness.Command(t, "install", filepath.Join(harness.Tools, "bin", name), m.Root+"/usr/bin/"+name))
					}
				}
				harness.Write(t, m.Root+"/etc/containerd/config.toml", "version = 2\noom_score = 1\n")
			})
			image := deployedImage(m, harness.Bin, "v1")
			before := m.Files()
			n := &harness.Node{T: t, Dir: dir, Socket: fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", m.Init)}
			pull := func() {
				t.Helper()
				encrypted := ci.Image(harness.LayerKinds[1], "provider:pilot:team-a")
				harness.Output(t, n.Crictl("pull", encrypted))
				harness.Output(t, n.Crictl("rmi", encrypted))
			}
			encrypted := ci.Image(harness.LayerKinds[1], "provider:pilot:team-a")
			harness.ExpectFailure(t, n.Crictl("pull", encrypted))

			first := startPod(m, c, "first", image, b.URL())
			first.ready()
			for _, unit := range []string{"pilot.service", "pilot-diff.socket", "pilot-keyprovider.socket"} {
				harness.Output(t, m.Run("systemctl", "is-active", unit))
				harness.Output(t, m.Run("systemctl", "is-enabled", unit))
			}
			pull()
			// containerd's configuration is written anew, as at boot.
			configured := harness.Read(t, m.Root+"/etc/containerd/config.toml")
			harness.Write(t, m.Root+"/etc/containerd/config.toml", "version = 2\noom_score = 1\n")
			harness.Output(t, m.Run("systemctl", "restart", "containerd"))
			harness.Await(t, "containerd", func() error { return m.Run("ctr", "version").Run() })
			if got := harness.Read(t, m.Root+"/etc/containerd/config.toml"); got != configured {
				t.Errorf("pilot is not in containerd's configuration again: %s", got)
			}
			pull()
			containerd, daemon := m.PID("containerd"), m.PID("pilot")
			onMachine := fmt.Sprintf("/proc/%d/root/run/pilot/broker-token", m.Init)
			if got := harness.Read(t, onMachine); got != harness.Read(t, c.Dir+"/broker/token") {
				t.Errorf("the token on the node is %q", got)
			}

			renewed := c.Token(t)
			harness.Write(t, c.Dir+"/broker/token", renewed)
			harness.Await(t, "the new token", func() error {
				if has, err := os.ReadFile(onMachine); err != nil || string(has) != renewed {
					return fmt.Errorf("the node has another: %v", err)
				}
				return nil
			})
			pull()

			// Replaced.
			installed := m.Files()
			first.stop()
			if !strings.Contains(first.log(), "pilot stays on this node") {
				t.Errorf("the pod that was replaced says: %s", first.log())
			}
			second := startPod(m, c, "second", image, b.URL())
			second.ready()
			m.CheckFiles(installed)
			if now := m.PID("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.PID("pilot"); now != daemon {
				t.Errorf("pilot was restarted: %s, was %s", now, daemon)
			}
			second.stop()

			// Upgraded.
			newer := harness.TempDir(t)
			for _, name := range []string{"pilot", "pilot-decoder"} {
				harness.Write(t, newer+"/"+name, harness.Read(t, harness.Bin+"/"+name)+"newer")
			}
			third := startPod(m, c, "third", deployedImage(m, newer, "v2"), b.URL())
			third.ready()
			if !strings.HasSuffix(harness.Read(t, m.Root+"/usr/local/bin/pilot"), "newer") {
				t.Error("the program is the old one")
			}
			if now := m.PID("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.PID("pilot"); now == daemon || now == "0" {
				t.Errorf("pilot runs the old program: %s, was %s", now, daemon)
			}
			pull()
			third.stop()

			// Cut short between the configuration and the restart.
			harness.Output(t, m.Run("mkdir", "/run/pilot-restart"))
			harness.Output(t, m.Run("touch", "/run/pilot-restart/containerd.service"))
			fourth := startPod(m, c, "fourth", "registry.example.com/pilot:v2", b.URL())
			fourth.ready()
			if now := m.PID("containerd"); now == containerd {
				t.Errorf("containerd was not restarted")
			}
			pull()
			fourth.stop()

			// Lazily, and no longer.
			lazy := startPod(m, c, "lazy", "registry.example.com/pilot:v2", b.URL(), "--lazy")
			lazy.ready()
			harness.Output(t, m.Run("systemctl", "is-active", "pilot-lazy.socket", "pilot-snapshotter.service"))
			// Its policy lets the node unwrap only, so doctor does not succeed.
			if out, _ := m.Run("pilot", "node", "doctor").CombinedOutput(); !strings.Contains(string(out), "was unpacked into pilot-lazy and read") {
				t.Errorf("doctor: %s", out)
			}
			pull()
			lazy.stop()
			fourth = startPod(m, c, "again", "registry.example.com/pilot:v2", b.URL(), "--lazy=false")
			fourth.ready()
			for _, path := range []string{"/run/pilot/snapshotter.sock", "/etc/systemd/system/pilot-snapshotter.service"} {
				if err := m.Run("test", "-e", path).Run(); err == nil {
					t.Errorf("after lazy pulling was switched off, %s is left", path)
				}
			}
			pull()

			// Deleted.
			c.Set(harness.Object{"uid": "1"}, harness.Object{"uid": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"})
			fourth.stop()
			if !strings.Contains(fourth.log(), "removing pilot from this node") {
				t.Errorf("the pod of the deleted namespace says: %s", fourth.log())
			}
			c.Set(harness.Object{"uid": "1"}, harness.Object{"uid": "2"})
			m.CheckFiles(before)
			for _, name := range []string{"/usr/local/bin/pilot", "/usr/local/bin/pilot-decoder", "/run/pilot/broker-token", "/etc/pilot"} {
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/root%s", m.Init, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", name, err)
				}
			}
			if now := m.PID("pilot"); now != "0" {
				t.Error("pilot still runs")
			}
			harness.ExpectFailure(t, n.Crictl("pull", encrypted))
			harness.Output(t, m.Run("ctr", "--namespace", "k8s.io", "images", "list"))

			// Deleted while it pulls lazily: pilot's program goes too.
			lazy = startPod(m, c, "lazy-again", "registry.example.com/pilot:v2", b.URL(), "--lazy")
			lazy.ready()
			pull()
			c.Set(harness.Object{"uid": "1"}, harness.Object{"uid": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"})
			lazy.stop()
			if log := lazy.log(); !strings.Contains(log, "removing pilot from this node") || strings.Contains(log, "no such file") {
				t.Errorf("the pod of the deleted namespace, which pulled lazily, says: %s", log)
			}
			c.Set(harness.Object{"uid": "1"}, harness.Object{"uid": "2"})
			m.CheckFiles(before)
			if out := strings.TrimSpace(harness.Output(t, m.Run("ls", "-A", "/var/lib/pilot/snapshotter"))); out != "" {
				t.Errorf("left in the snapshotter's directory: %s", out)
			}
			if err := m.Run("test", "-e", "/var/lib/pilot/layers").Run(); err == nil {
				t.Error("the record of layers is left")
			}
		})
	}
}

func appendTo(t testing.TB, name, text string) {
	t.Helper()
	harness.Write(t, name, harness.Read(t, name)+text)
}
