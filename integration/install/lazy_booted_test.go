//go:build packages

package install

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLazyNodeBoots sets up a machine that systemd runs with --lazy, restarts pilot and
// reboots the machine with lazily mounted layers, and takes everything back.
func TestLazyNodeBoots(t *testing.T) {
	b := harness.NewTLSBroker(t, "team-a")
	cert, key := b.Enroll(t, "worker-7")
	dir, certs, state := harness.TempDir(t), harness.TempDir(t), harness.TempDir(t)
	for name, from := range map[string]string{"ca.pem": b.Dir + "/ca.pem", "node.pem": cert, "node-key.pem": key} {
		harness.Write(t, certs+"/"+name, harness.Read(t, from))
	}
	if err := os.Chmod(certs+"/node-key.pem", 0o600); err != nil {
		t.Fatal(err)
	}
	_, ociConf := harness.StartPilot(t, dir+"/ci", "unix://"+b.Dir+"/copilot.sock")
	c := harness.NewCI(t, dir+"/ci", ociConf)
	secret := harness.NewSecret()
	image := c.Registry + "/lazy:1"
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", image+"-plain", l.Image(harness.LayerKinds[1], false, harness.Arch, secret))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--estargz", "--recipient", "provider:pilot:team-a", image+"-plain", image))
	for _, name := range []string{image, image + "-plain"} {
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	}

	m := harness.Boot(t, filepath.Join(harness.Tools, "trixie"), []string{"--bind=/dev/fuse", "--bind=" + certs + ":/srv/certs", "--bind=" + state + ":/var/lib/pilot"}, func(m *harness.Machine) {
		for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
			m.AddProgram(filepath.Join(harness.Tools, "bin", name))
		}
		harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/newest.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
		m.AddProgram(filepath.Join(harness.Bin, "pilot"))
	})
	before := m.Files()
	// As the machine's own, which has fewer rights than this test.
	command := func(args ...string) *exec.Cmd {
		return m.Run("systemd-run", append([]string{"--quiet", "--wait", "--pipe", "--collect", "ctr", "--namespace", "k8s.io"}, args...)...)
	}
	ctr := func(args ...string) string {
		t.Helper()
		return harness.Output(t, command(args...))
	}
	run := func(args ...string) string {
		t.Helper()
		return ctr(append([]string{"run", "--privileged", "--cpu-shares", "0", "--net-host"}, args...)...)
	}
	printed := func(args ...string) string {
		t.Helper()
		return harness.ContainerOutput(t, command(append([]string{"run", "--rm", "--privileged", "--cpu-shares", "0", "--net-host"}, args...)...))
	}
	n := &harness.Node{T: t, Dir: dir, Socket: fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", m.Init)}
	// A container that ran before goes on.
	harness.Output(t, n.Crictl("pull", image+"-plain"))
	run("--detach", image+"-plain", "earlier", "/hello", "pause")
	m.Output("pilot", "node", "install", "--lazy", "--now", "--broker", b.URL(),
		"--broker-ca", "/srv/certs/ca.pem", "--broker-cert", "/srv/certs/node.pem", "--broker-key", "/srv/certs/node-key.pem")
	for _, unit := range []string{"pilot.service", "pilot-lazy.socket", "pilot-snapshotter.service"} {
		m.Output("systemctl", "is-active", unit)
		m.Output("systemctl", "is-enabled", unit)
	}
	if out := ctr("tasks", "list"); !strings.Contains(out, "earlier") || !strings.Contains(out, "RUNNING") {
		t.Errorf("the container that ran before: %s", out)
	}
	if out := m.Output("pilot", "node", "doctor", "--kek", "team-a"); !strings.Contains(out, "without being pulled") {
		t.Errorf("doctor: %s", out)
	}
	snapshotter := m.PID("pilot-snapshotter")
	harness.Output(t, n.Crictl("pull", image))
	run("--detach", "--snapshotter", "pilot-lazy", image, "running", "/hello", "pause")

	refused := harness.ExpectFailure(t, m.Run("pilot", "node", "uninstall", "--now"), "nothing was changed", "k8s.io/running", "--force")
	if strings.Contains(refused, "earlier") {
		t.Errorf("uninstall names a container that has overlayfs: %s", refused)
	}
	m.Output("systemctl", "is-active", "pilot-snapshotter")
	m.Output("systemctl", "restart", "pilot")
	if out := harness.ContainerOutput(t, command("tasks", "exec", "--exec-id", "after", "running", "/hello")); !strings.Contains(out, secret) {
		t.Errorf("after pilot was restarted, the container prints %s", out)
	}
	// Installing again does not restart what containers need.
	m.Output("pilot", "node", "install", "--now")
	if now := m.PID("pilot-snapshotter"); now != snapshotter || now == "0" {
		t.Errorf("the snapshotter was process %s, and is %s", snapshotter, now)
	}

	// A pod's container reads on until it has ended, and pilot ends after it.
	m.Output("mkdir", "/srv/read")
	run("--detach", "--snapshotter", "pilot-lazy", "--runc-systemd-cgroup", "--cgroup", "kubepods.slice:cri-containerd:pod",
		"--mount", "type=bind,src=/srv/read,dst=/read,options=rbind:rw", image, "pod", "/hello", "pause", "/read/secret")
	m.Reboot(t)
	if got := m.Output("cat", "/srv/read/secret"); got != secret {
		t.Errorf("at shutdown the container has read %s", got)
	}
	m.Output("rm", "-r", "/srv/read")
	n.Socket = fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", m.Init)
	var last uint64
	for _, unit := range []string{"pilot.service", "pilot-snapshotter.service", "containerd.service"} {
		at, err := strconv.ParseUint(m.Output("systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", unit), 10, 64)
		if err != nil || at == 0 || at < last {
			t.Errorf("%s was started at %d, before those it needs: %v", unit, at, err)
		}
		last = at
	}
	if out := printed("--snapshotter", "pilot-lazy", image, "again"); !strings.Contains(out, secret) {
		t.Errorf("after the reboot the image prints %s", out)
	}

	ctr("container", "rm", "running", "pod") // which the reboot has ended
	// Lazy pulling is switched off while a container has a lazily pulled image.
	run("--detach", "--snapshotter", "pilot-lazy", image, "lasting", "/hello", "pause")
	if out := m.Output("pilot", "node", "install", "--lazy=false", "--now"); !strings.Contains(out, "k8s.io/lasting") || !strings.Contains(out, image) {
		t.Errorf("install --lazy=false says %s", out)
	}
	if out := m.Output("pilot", "node", "doctor", "--kek", "team-a"); !strings.Contains(out, "lazy pulling is switched off") {
		t.Errorf("doctor: %s", out)
	}
	if out := harness.ContainerOutput(t, command("tasks", "exec", "--exec-id", "off", "lasting", "/hello")); !strings.Contains(out, secret) {
		t.Errorf("after lazy pulling was switched off, the container prints %s", out)
	}
	harness.Output(t, n.Crictl("pull", image))
	if out := printed(image, "unpacked"); !strings.Contains(out, secret) {
		t.Errorf("pulled in full, the image prints %s", out)
	}
	harness.Output(t, n.Crictl("rmi", image))
	ctr("task", "rm", "-f", "lasting")
	ctr("container", "rm", "lasting")
	// Installations that are killed are completed by the next one.
	// systemd starts a service five times in ten seconds, and no more.
	often := func() {
		for _, unit := range []string{"containerd.service", "pilot.service"} {
			m.Run("systemctl", "reset-failed", unit).Run() // which may not be loaded
		}
	}
	killed := func(args ...string) {
		t.Helper()
		for _, after := range []string{"0.1", "0.3", "0.6", "1", "1.5", "2.5"} {
			often()
			m.Run("timeout", append([]string{"--signal=KILL", after, "pilot", "node", "install"}, args...)...).Run()
		}
		often()
		m.Output("pilot", append([]string{"node", "install"}, args...)...)
	}
	killed("--now")
	for _, path := range []string{"/var/lib/pilot/snapshotter", "/run/pilot/snapshotter.sock", "/etc/systemd/system/pilot-snapshotter.service"} {
		if err := m.Run("test", "-e", path).Run(); err == nil {
			t.Errorf("after lazy pulling was switched off, %s is left", path)
		}
	}
	if out := m.Output("pilot", "node", "doctor", "--kek", "team-a"); strings.Contains(out, "pilot-lazy") {
		t.Errorf("doctor, without lazy pulling: %s", out)
	}
	killed("--lazy", "--now")
	if out := m.Output("pilot", "node", "doctor", "--kek", "team-a"); !strings.Contains(out, "without being pulled") {
		t.Errorf("doctor, with lazy pulling again: %s", out)
	}
	// While what pilot's snapshotter has left can't be removed, only that is tried again.
	const leftover = "/run/left/rootfs"
	often()
	m.Output("mkdir", "-p", leftover, "/var/lib/pilot/snapshotter/x")
	m.Output("mount", "-t", "overlay", "overlay", "-o", "lowerdir=/var/lib/pilot/snapshotter/x:/srv", leftover)
	harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--lazy=false", "--now"), "run/left")
	containerd := m.PID("containerd")
	harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--now"), "run/left")
	if now := m.PID("containerd"); now != containerd || now == "0" {
		t.Errorf("containerd was restarted: %s, was %s", now, containerd)
	}
	m.Output("umount", leftover)
	often()
	m.Output("pilot", "node", "install", "--now")
	m.Output("pilot", "node", "install", "--lazy", "--now")
	harness.Output(t, n.Crictl("pull", image))
	run("--detach", "--snapshotter", "pilot-lazy", image, "ended", "/hello", "pause")
	ctr("task", "rm", "-f", "ended")

	m.Output("pilot", "node", "uninstall", "--now")
	ctr("container", "rm", "ended")
	m.CheckFiles(before)
	if out := harness.Output(t, n.Crictl("images", "-o", "json")); strings.Contains(out, image+`"`) || !strings.Contains(out, image+`-plain"`) {
		t.Errorf("the images after uninstall: %s", out)
	}
	for _, path := range []string{"/var/lib/pilot/snapshotter", "/run/pilot/snapshotter.sock"} {
		if err := m.Run("test", "-e", path).Run(); err == nil {
			t.Errorf("%s is left", path)
		}
	}
	if mounts := m.Output("cat", "/proc/self/mountinfo"); strings.Contains(mounts, "stargz") {
		t.Errorf("mounts are left: %s", mounts)
	}
	if now := m.PID("pilot-snapshotter"); now != "0" {
		t.Error("the snapshotter still runs")
	}
	harness.Output(t, n.Crictl("pull", image+"-plain"))

	// pilot does not start.
	often()
	const broken = "/etc/systemd/system/pilot.service.d/broken.conf"
	harness.Write(t, m.Root+broken, "[Service]\nExecStart=\nExecStart=/bin/false\n")
	harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--now"), "systemctl restart pilot.service", "from its next start on containerd.service can't pull any image", "pilot node uninstall --now")
	m.Output("rm", broken)

	// pilot, or containerd, was stopped before pilot is uninstalled.
	for _, units := range []string{"pilot.service pilot-diff.socket pilot-keyprovider.socket", "containerd.service"} {
		often()
		m.Output("pilot", "node", "install", "--now")
		m.Output("systemctl", append([]string{"stop"}, strings.Fields(units)...)...)
		if units == "containerd.service" {
			m.Output("rm", "/usr/lib/systemd/system/containerd.service")
		}
		m.Output("pilot", "node", "uninstall", "--now")
		if now := m.PID("pilot"); now != "0" {
			t.Errorf("%s stopped: pilot still runs", units)
		}
		if err := m.Run("test", "-e", "/var/lib/pilot/layers").Run(); err == nil {
			t.Errorf("%s stopped: the record of layers is left", units)
		}
	}
}
