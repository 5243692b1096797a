//go:build node

package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

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
