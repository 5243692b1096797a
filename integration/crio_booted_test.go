//go:build engines

package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// crioPrograms gives the machine CRI-O's programs.
func (m *machine) crioPrograms() {
	m.t.Helper()
	for _, name := range []string{"crio", "pinns"} {
		m.copy(tool(m.t, name))
	}
}

// TestCRIONode sets a machine with CRI-O up with one command, pulls, and puts it
// back.
func TestCRIONode(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.image(kinds[1], "provider:pilot:team-a")
	m := crioMachine(t)
	m.crioPrograms()
	before := m.files()
	m.brokerAt(brokerURL)

	diff := output(t, m.pilot("node", "install", "--dry-run"))
	if !strings.Contains(diff, "+++ /etc/systemd/system/crio.service.d/pilot.conf") || strings.Contains(diff, "/etc/containerd") {
		t.Errorf("dry run: %s", diff)
	}
	m.same(before)
	output(t, m.pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
	after := m.files()
	if out := output(t, m.pilot("node", "install")); !strings.Contains(out, "nothing to change: the files are as they should be") {
		t.Errorf("a second time: %s", out)
	}
	m.same(after)
	if out := said(t, command(t, "systemd-analyze", "verify", "--man=no", "--root="+m.root, "crio.service", "pilot.service", "pilot-keyprovider.socket")); strings.Contains(newerSystemd.ReplaceAllString(strings.ReplaceAll(out, m.root, ""), ""), "pilot") {
		t.Errorf("systemd-analyze verify: %s", out)
	}

	m.start(t, "pilot", "serve")
	await(t, "pilot", answers(m.root+"/run/pilot/keyprovider.sock"))
	// As systemd starts it.
	_, variable, _ := strings.Cut(read(t, m.root+"/etc/systemd/system/crio.service.d/pilot.conf"), "\nEnvironment=")
	m.start(t, "env", strings.TrimSpace(variable), "crio")
	n := &node{t: t, dir: filepath.Dir(m.root), socket: m.root + "/run/crio/crio.sock"}
	await(t, "CRI-O", func() error { return n.crictl("info").Run() })
	if out := output(t, m.run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") || !strings.Contains(out, "ok       unwrap") {
		t.Errorf("doctor: %s", out)
	}
	output(t, n.crictl("pull", image))
	if !contains(t, m.root+"/var/lib/containers", c.secrets[image]) {
		t.Error("the secret is not in CRI-O's storage")
	}

	output(t, m.pilot("node", "uninstall"))
	m.same(before)
}

// TestCRIOBooted sets up a machine that systemd runs, pulls, and puts it back.
func TestCRIOBooted(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.image(kinds[1], "provider:pilot:team-a")
	const brokerSocket = "/var/lib/copilot.sock"
	b := boot(t, filepath.Join(tools, "trixie"), []string{"--bind=" + strings.TrimPrefix(brokerURL, "unix://") + ":" + brokerSocket}, func(m *machine) {
		m.copy(filepath.Join(bin, "pilot"))
		m.onlyCRIO()
		m.crioPrograms()
		write(t, m.root+brokerSocket, "")
		output(t, command(t, "systemctl", "--root="+m.root, "enable", "crio.service"))
	})
	n := &node{t: t, dir: dir, socket: fmt.Sprintf("/proc/%d/root/run/crio/crio.sock", b.init)}
	before := b.files()

	b.out("pilot", "node", "install", "--now", "--broker", "unix://"+brokerSocket)
	if out := b.out("pilot", "node", "doctor", "--kek", "team-a"); !strings.Contains(out, "ok       unwrap") {
		t.Errorf("doctor: %s", out)
	}
	output(t, n.crictl("pull", image))
	if !contains(t, b.root+"/var/lib/containers", c.secrets[image]) {
		t.Error("the secret is not in CRI-O's storage")
	}
	output(t, n.crictl("rmi", "-a"))
	b.out("pilot", "node", "uninstall", "--now")
	b.same(before)
	fails(t, n.crictl("pull", image), "missing private key needed for decryption")

	// CRI-O is not restarted yet.
	b.out("pilot", "node", "install", "--broker", "unix://"+brokerSocket)
	b.out("systemctl", "daemon-reload")
	b.out("systemctl", "start", "pilot.service")
	fails(t, b.run("pilot", "node", "doctor", "--kek", "team-a"), "which crio.service sets: it was not restarted since", "systemctl restart crio.service")
	b.out("systemctl", "restart", "crio.service")
	b.out("pilot", "node", "doctor", "--kek", "team-a")
	output(t, n.crictl("pull", image))
}
