//go:build packages

package install

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestPackageUnits runs the services as systemd does, in their sandboxes: copilot while
// its database is away, and pilot while its certificate ends.
func TestPackageUnits(t *testing.T) {
	d := harness.StartPostgres(t)
	d.Sql(t, `CREATE DATABASE copilot`)
	d.Crash(t)
	if err := os.Chmod(d.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	b := harness.Boot(t, filepath.Join(harness.Tools, "trixie"), []string{"--private-network", "--bind=" + d.Dir + ":/srv/postgres"}, func(m *harness.Machine) {
		for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
			m.AddProgram(filepath.Join(harness.Tools, "bin", name))
		}
		harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/newest.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
		for _, name := range []string{"pilot", "pilot-decoder", "copilot"} {
			harness.Output(t, harness.Command(t, "install", "-D", filepath.Join(harness.Bin, name), filepath.Join(m.Root, "usr/bin", name)))
		}
		for from, to := range map[string]string{
			"packaging/copilot.service": "usr/lib/systemd/system/copilot.service", "packaging/copilot.sysusers": "usr/lib/sysusers.d/copilot.conf", "packaging/copilot.tmpfiles": "usr/lib/tmpfiles.d/copilot.conf",
		} {
			harness.Output(t, harness.Command(t, "install", "-D", "-m", "0644", filepath.Join(harness.Repo, from), filepath.Join(m.Root, to)))
		}
	})
	b.Output("systemd-sysusers")
	b.Output("systemd-tmpfiles", "--create", "copilot.conf")
	b.Output("copilot", "init", "--node-ca", "--host", "localhost", "--trust-domain", "example.com")
	config := harness.Read(t, b.Path("etc/copilot/copilot.toml"))
	harness.Write(t, b.Path("etc/copilot/copilot.toml"), `database = "postgres://copilot@/copilot?host=/srv/postgres"`+"\n"+config)
	b.Output("systemctl", "daemon-reload")

	b.Output("systemctl", "enable", "--now", "copilot.service")
	ready := func() error {
		if status, body := harness.RequestOverSocket(t, fmt.Sprintf("/proc/%d/root/run/copilot/copilot.sock", b.Init), "GET", "/readyz", ""); status != 204 {
			return fmt.Errorf("readyz: %d %s", status, body)
		}
		return nil
	}
	if err := ready(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("without its database: %v", err)
	}
	if out := b.Output("systemctl", "status", "--no-pager", "copilot.service"); !strings.Contains(out, "active (running)") || !strings.Contains(out, "not ready: ") {
		t.Errorf("without its database:\n%s", out)
	}
	if out := harness.CombinedOutput(t, b.Run("copilot", "keys", "list")); !strings.Contains(out, "copilot is not ready") {
		t.Errorf("keys list: %s", out)
	}
	pid := b.PID("copilot.service")
	d.Start(t)
	harness.Await(t, "copilot is ready", ready)
	b.Output("copilot", "keys", "create", "team-a")
	if is := b.PID("copilot.service"); is != pid {
		t.Errorf("copilot was process %s, and is %s", pid, is)
	}

	b.Output("copilot", "enroll", "--for", "40s", "--out", "/root", "worker-7")
	b.Output("sh", "-ec", "mkdir -p /etc/pilot; mv /root/worker-7.pem /etc/pilot/node.pem; mv /root/worker-7-key.pem /etc/pilot/node-key.pem; cp /etc/copilot/ca.pem /etc/pilot/")
	first := harness.Certificate(t, b.Path("etc/pilot/node.pem"))
	b.Output("pilot", "node", "install", "--now", "--broker", "https://localhost:8443", "--broker-ca", "/etc/pilot/ca.pem", "--broker-cert", "/etc/pilot/node.pem", "--broker-key", "/etc/pilot/node-key.pem")
	harness.Await(t, "pilot renews its certificate", func() error {
		if harness.Certificate(t, b.Path("etc/pilot/node.pem")).SerialNumber.Cmp(first.SerialNumber) == 0 {
			return fmt.Errorf("journal:\n%s", harness.CombinedOutput(t, b.Run("journalctl", "--no-pager", "-n", "20", "-u", "pilot.service")))
		}
		return nil
	})
	// A command of run has the network of this machine.
	if out := b.Output("systemd-run", "--wait", "--pipe", "--quiet", "pilot", "node", "renew"); !strings.Contains(out, "spiffe://example.com/node/worker-7, valid until") {
		t.Error(out)
	}
	if out := harness.CombinedOutput(t, b.Run("journalctl", "--no-pager", "-u", "pilot.service")); strings.Contains(out, "level=warning") {
		t.Errorf("pilot's log:\n%s", out)
	}
}
