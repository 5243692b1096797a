//go:build node

package integration

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// pod is a pod of the DaemonSet's, without a kubelet.
type pod struct {
	*booted
	name string
}

// daemonSetManifest is the DaemonSet's, and what the test's pods have of it.
const daemonSetManifest = "packaging/kubernetes/pilot/daemonset.yaml"

// pod starts a pod of an image with what the DaemonSet's have: its arguments,
// the node's processes, all rights, a file system that can't be written.
func (b *booted) pod(c *cluster, name, image, broker string) *pod {
	b.t.Helper()
	url := strings.TrimPrefix(c.URL, "https://")
	host, port, err := net.SplitHostPort(url)
	if err != nil {
		b.t.Fatal(err)
	}
	args := []string{"--namespace", "k8s.io", "run", "--detach", "--log-uri", "file:///var/log/" + name, "--privileged", "--cpu-shares", "0", "--net-host", "--with-ns", "pid:/proc/1/ns/pid", "--read-only",
		"--env", "KUBERNETES_SERVICE_HOST=" + host, "--env", "KUBERNETES_SERVICE_PORT=" + port, "--env", "POD_NAMESPACE=pilot-system",
		"--mount", "type=bind,src=/pod/account,dst=/var/run/secrets/kubernetes.io/serviceaccount,options=rbind:ro",
		"--mount", "type=bind,src=/pod/broker,dst=/run/broker,options=rbind:ro",
		image, name, "/usr/bin/pilot", "node", "deploy", "--broker=" + broker}
	for _, arg := range []string{"--broker-ca-from=/run/broker/ca.pem", "--broker-token-from=/run/broker/token"} {
		if !strings.Contains(read(b.t, filepath.Join(repo, daemonSetManifest)), "- "+arg+"\n") {
			b.t.Errorf("%s has no argument %s", daemonSetManifest, arg)
		}
		args = append(args, arg)
	}
	// As the machine's own, which has fewer rights than this test.
	output(b.t, b.run("systemd-run", append([]string{"--quiet", "--wait", "--pipe", "--collect", "ctr"}, args...)...))
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("%s:\n%s", name, said(b.t, exec.Command("cat", b.root+"/var/log/"+name)))
		}
	})
	return &pod{b, name}
}

func (p *pod) log() string {
	p.t.Helper()
	return read(p.t, p.root+"/var/log/"+p.name)
}

// ready waits until the readiness probe succeeds.
func (p *pod) ready() {
	p.t.Helper()
	var probes int
	await(p.t, p.name+" is ready", func() error {
		probes++
		out, err := p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "exec", "--exec-id", fmt.Sprint("probe", probes), p.name, "/usr/bin/pilot", "node", "deploy", "--check").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// stop stops the pod as the kubelet does.
func (p *pod) stop() {
	p.t.Helper()
	output(p.t, p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGTERM", p.name))
	await(p.t, p.name+" ends", func() error {
		return p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "delete", p.name).Run()
	})
	output(p.t, p.booted.run("ctr", "--namespace", "k8s.io", "containers", "delete", p.name))
}

// deployedImage makes an image of the programs in dir and imports it on the
// machine.
func (b *booted) deployedImage(dir, tag string) string {
	b.t.Helper()
	out := tempDir(b.t) + "/image"
	build := command(b.t, "go", "run", "-buildvcs=false", ".", "-out", out, "-version", tag, "-user", "0:0", "-license", repo+"/LICENSE", "pilot,pilot-decoder", goarch+"="+dir)
	build.Dir = filepath.Join(repo, "packaging/ociimage")
	output(b.t, build)
	output(b.t, command(b.t, "tar", "-C", out, "-cf", b.root+"/var/tmp/"+tag+".tar", "."))
	output(b.t, b.run("ctr", "--namespace", "k8s.io", "images", "import", "--base-name", "registry.example.com/pilot", "/var/tmp/"+tag+".tar"))
	return "registry.example.com/pilot:" + tag
}

// TestDeploy has a DaemonSet's pod set up a machine that runs, be replaced and
// upgraded, and clean up.
func TestDeploy(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	b := initialized(t, "team-a")
	b.process.stop(t)
	appendTo(t, b.dir+"/copilot.toml", fmt.Sprintf("\n[issuers.cluster]\nurl = %q\naudience = \"copilot\"\nca = %q\n", c.URL, c.dir+"/account/ca.crt"))
	appendTo(t, b.dir+"/policy.toml", "\n[[rule]]\nidentities = [\"cluster:system:serviceaccount:pilot-system:pilot\"]\nkeks = [\"team-*\"]\nactions = [\"unwrap\"]\n")
	b.start(t)
	write(t, c.dir+"/broker/ca.pem", read(t, b.dir+"/ca.pem"))
	dir := tempDir(t)
	_, ociConf := pilot(t, dir+"/ci", "unix://"+b.dir+"/copilot.sock")
	ci := newCI(t, dir+"/ci", ociConf)

	for _, version := range []string{"1.7", "2.4.2"} {
		t.Run(version, func(t *testing.T) {
			m := boot(t, filepath.Join(tools, "trixie"), []string{"--bind=" + c.dir + ":/pod"}, func(m *machine) {
				if version == "2.4.2" {
					for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
						output(t, command(t, "install", filepath.Join(tools, "bin", name), m.root+"/usr/bin/"+name))
					}
				}
				write(t, m.root+"/etc/containerd/config.toml", "version = 2\noom_score = 1\n")
			})
			image := m.deployedImage(bin, "v1")
			before := m.files()
			n := &node{t: t, dir: dir, socket: fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", m.init)}
			pull := func() {
				t.Helper()
				encrypted := ci.image(kinds[1], "provider:pilot:team-a")
				output(t, n.crictl("pull", encrypted))
				output(t, n.crictl("rmi", encrypted))
			}
			encrypted := ci.image(kinds[1], "provider:pilot:team-a")
			fails(t, n.crictl("pull", encrypted))

			first := m.pod(c, "first", image, b.url())
			first.ready()
			for _, unit := range []string{"pilot.service", "pilot-diff.socket", "pilot-keyprovider.socket"} {
				output(t, m.run("systemctl", "is-active", unit))
				output(t, m.run("systemctl", "is-enabled", unit))
			}
			pull()
			// containerd's configuration is written anew, as at boot.
			configured := read(t, m.root+"/etc/containerd/config.toml")
			write(t, m.root+"/etc/containerd/config.toml", "version = 2\noom_score = 1\n")
			output(t, m.run("systemctl", "restart", "containerd"))
			await(t, "containerd", func() error { return m.run("ctr", "version").Run() })
			if got := read(t, m.root+"/etc/containerd/config.toml"); got != configured {
				t.Errorf("pilot is not in containerd's configuration again: %s", got)
			}
			pull()
			containerd, daemon := m.pid("containerd"), m.pid("pilot")
			onMachine := fmt.Sprintf("/proc/%d/root/run/pilot/broker-token", m.init)
			if got := read(t, onMachine); got != read(t, c.dir+"/broker/token") {
				t.Errorf("the token on the node is %q", got)
			}

			renewed := c.token(t)
			write(t, c.dir+"/broker/token", renewed)
			await(t, "the new token", func() error {
				if has, err := os.ReadFile(onMachine); err != nil || string(has) != renewed {
					return fmt.Errorf("the node has another: %v", err)
				}
				return nil
			})
			pull()

			// Replaced.
			installed := m.files()
			first.stop()
			if !strings.Contains(first.log(), "pilot stays on this node") {
				t.Errorf("the pod that was replaced says: %s", first.log())
			}
			second := m.pod(c, "second", image, b.url())
			second.ready()
			m.same(installed)
			if now := m.pid("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.pid("pilot"); now != daemon {
				t.Errorf("pilot was restarted: %s, was %s", now, daemon)
			}
			second.stop()

			// Upgraded.
			newer := tempDir(t)
			for _, name := range []string{"pilot", "pilot-decoder"} {
				write(t, newer+"/"+name, read(t, bin+"/"+name)+"newer")
			}
			third := m.pod(c, "third", m.deployedImage(newer, "v2"), b.url())
			third.ready()
			if !strings.HasSuffix(read(t, m.root+"/usr/local/bin/pilot"), "newer") {
				t.Error("the program is the old one")
			}
			if now := m.pid("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.pid("pilot"); now == daemon || now == "0" {
				t.Errorf("pilot runs the old program: %s, was %s", now, daemon)
			}
			pull()
			third.stop()

			// Cut short between the configuration and the restart.
			output(t, m.run("mkdir", "/run/pilot-restart"))
			output(t, m.run("touch", "/run/pilot-restart/containerd.service"))
			fourth := m.pod(c, "fourth", "registry.example.com/pilot:v2", b.url())
			fourth.ready()
			if now := m.pid("containerd"); now == containerd {
				t.Errorf("containerd was not restarted")
			}
			pull()

			// Deleted.
			c.set(object{"uid": "1"}, object{"uid": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"})
			fourth.stop()
			if !strings.Contains(fourth.log(), "pilot is removed from this node") {
				t.Errorf("the pod of the deleted namespace says: %s", fourth.log())
			}
			c.set(object{"uid": "1"}, object{"uid": "2"})
			m.same(before)
			for _, name := range []string{"/usr/local/bin/pilot", "/usr/local/bin/pilot-decoder", "/run/pilot/broker-token", "/etc/pilot"} {
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/root%s", m.init, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", name, err)
				}
			}
			if now := m.pid("pilot"); now != "0" {
				t.Error("pilot still runs")
			}
			fails(t, n.crictl("pull", encrypted))
			output(t, m.run("ctr", "--namespace", "k8s.io", "images", "list"))
		})
	}
}

// set changes what the cluster has.
func (c *cluster) set(daemonSet, namespace object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.daemonSet, c.namespace = daemonSet, namespace
}

func appendTo(t testing.TB, name, text string) {
	t.Helper()
	write(t, name, read(t, name)+text)
}
