//go:build engines

package engines

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// crioPrograms adds CRI-O's programs to the machine.
func crioPrograms(m *harness.Machine) {
	m.T.Helper()
	for _, name := range []string{"crio", "pinns"} {
		m.AddProgram(tool(m.T, name))
	}
}

// TestCRIONode sets up a machine with CRI-O with one command, pulls, and uninstalls.
func TestCRIONode(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	m := harness.NewCRIOMachine(t)
	crioPrograms(m)
	before := m.Files()
	m.BrokerAt(c.BrokerURL)

	diff := harness.Output(t, m.Pilot("node", "install", "--dry-run"))
	if !strings.Contains(diff, "+++ /etc/systemd/system/crio.service.d/pilot.conf") || strings.Contains(diff, "/etc/containerd") {
		t.Errorf("dry run: %s", diff)
	}
	m.CheckFiles(before)
	harness.Output(t, m.Pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
	after := m.Files()
	if out := harness.Output(t, m.Pilot("node", "install")); !strings.Contains(out, "nothing to change: the files are as they should be") {
		t.Errorf("a second time: %s", out)
	}
	m.CheckFiles(after)
	if out := harness.CombinedOutput(t, harness.Command(t, "systemd-analyze", "verify", "--man=no", "--root="+m.Root, "crio.service", "pilot.service", "pilot-keyprovider.socket")); strings.Contains(harness.UnknownSettings.ReplaceAllString(strings.ReplaceAll(out, m.Root, ""), ""), "pilot") {
		t.Errorf("systemd-analyze verify: %s", out)
	}

	m.Start(t, "pilot", "serve")
	harness.Await(t, "pilot", harness.Reachable(m.Root+"/run/pilot/keyprovider.sock"))
	// As systemd would start it.
	_, variable, _ := strings.Cut(harness.Read(t, m.Root+"/etc/systemd/system/crio.service.d/pilot.conf"), "\nEnvironment=")
	m.Start(t, "env", strings.TrimSpace(variable), "crio")
	n := &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/crio/crio.sock"}
	harness.Await(t, "CRI-O", func() error { return n.Crictl("info").Run() })
	if out := harness.Output(t, m.Run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") || !strings.Contains(out, "ok       unwrap") {
		t.Errorf("doctor: %s", out)
	}
	harness.Output(t, n.Crictl("pull", image))
	if !harness.ContainsText(t, m.Root+"/var/lib/containers", c.Secrets[image]) {
		t.Error("the secret is not in CRI-O's storage")
	}

	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
}

// TestCRIOBooted sets up a booted machine, pulls, and uninstalls.
func TestCRIOBooted(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	const brokerSocket = "/var/lib/copilot.sock"
	b := harness.Boot(t, filepath.Join(harness.Tools, "trixie"), []string{"--bind=" + strings.TrimPrefix(c.BrokerURL, "unix://") + ":" + brokerSocket}, func(m *harness.Machine) {
		m.AddProgram(filepath.Join(harness.Bin, "pilot"))
		m.OnlyCRIO()
		crioPrograms(m)
		harness.Write(t, m.Root+brokerSocket, "")
		harness.Output(t, harness.Command(t, "systemctl", "--root="+m.Root, "enable", "crio.service"))
	})
	n := &harness.Node{T: t, Dir: dir, Socket: fmt.Sprintf("/proc/%d/root/run/crio/crio.sock", b.Init)}
	before := b.Files()

	b.Output("pilot", "node", "install", "--now", "--broker", "unix://"+brokerSocket)
	if out := b.Output("pilot", "node", "doctor", "--kek", "team-a"); !strings.Contains(out, "ok       unwrap") {
		t.Errorf("doctor: %s", out)
	}
	harness.Output(t, n.Crictl("pull", image))
	if !harness.ContainsText(t, b.Root+"/var/lib/containers", c.Secrets[image]) {
		t.Error("the secret is not in CRI-O's storage")
	}
	harness.Output(t, n.Crictl("rmi", "-a"))
	b.Output("pilot", "node", "uninstall", "--now")
	b.CheckFiles(before)
	harness.ExpectFailure(t, n.Crictl("pull", image), "missing private key needed for decryption")

	// CRI-O is not restarted yet.
	b.Output("pilot", "node", "install", "--broker", "unix://"+brokerSocket)
	b.Output("systemctl", "daemon-reload")
	b.Output("systemctl", "start", "pilot.service")
	harness.ExpectFailure(t, b.Run("pilot", "node", "doctor", "--kek", "team-a"), "which crio.service sets: it was not restarted since", "systemctl restart crio.service")
	b.Output("systemctl", "restart", "crio.service")
	b.Output("pilot", "node", "doctor", "--kek", "team-a")
	harness.Output(t, n.Crictl("pull", image))
}
