//go:build packages

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPackageUnits runs the services as systemd does, in their sandboxes: copilot while
// its database is away, and pilot while its certificate ends.
func TestPackageUnits(t *testing.T) {
	d := postgres(t)
	d.sql(t, `CREATE DATABASE copilot`)
	d.crash(t)
	if err := os.Chmod(d.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	b := boot(t, filepath.Join(tools, "trixie"), []string{"--private-network", "--bind=" + d.dir + ":/srv/postgres"}, func(m *machine) {
		for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
			m.copy(filepath.Join(tools, "bin", name))
		}
		write(t, m.root+"/etc/systemd/system/containerd.service.d/newest.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
		for _, name := range []string{"pilot", "pilot-decoder", "copilot"} {
			output(t, command(t, "install", "-D", filepath.Join(bin, name), filepath.Join(m.root, "usr/bin", name)))
		}
		for from, to := range map[string]string{
			"packaging/copilot.service": "usr/lib/systemd/system/copilot.service", "packaging/copilot.sysusers": "usr/lib/sysusers.d/copilot.conf", "packaging/copilot.tmpfiles": "usr/lib/tmpfiles.d/copilot.conf",
		} {
			output(t, command(t, "install", "-D", "-m", "0644", filepath.Join(repo, from), filepath.Join(m.root, to)))
		}
	})
	b.out("systemd-sysusers")
	b.out("systemd-tmpfiles", "--create", "copilot.conf")
	b.out("copilot", "init", "--node-ca", "--host", "localhost", "--trust-domain", "example.com")
	config := read(t, b.path("etc/copilot/copilot.toml"))
	write(t, b.path("etc/copilot/copilot.toml"), `database = "postgres://copilot@/copilot?host=/srv/postgres"`+"\n"+config)
	b.out("systemctl", "daemon-reload")

	b.out("systemctl", "enable", "--now", "copilot.service")
	ready := func() error {
		if status, body := ask(t, fmt.Sprintf("/proc/%d/root/run/copilot/copilot.sock", b.init), "GET", "/readyz", ""); status != 204 {
			return fmt.Errorf("readyz: %d %s", status, body)
		}
		return nil
	}
	if err := ready(); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("without its database: %v", err)
	}
	if out := b.out("systemctl", "status", "--no-pager", "copilot.service"); !strings.Contains(out, "active (running)") || !strings.Contains(out, "not ready: ") {
		t.Errorf("without its database:\n%s", out)
	}
	if out := said(t, b.run("copilot", "keys", "list")); !strings.Contains(out, "copilot is not ready") {
		t.Errorf("keys list: %s", out)
	}
	pid := b.pid("copilot.service")
	d.start(t)
	await(t, "copilot is ready", ready)
	b.out("copilot", "keys", "create", "team-a")
	if is := b.pid("copilot.service"); is != pid {
		t.Errorf("copilot was process %s, and is %s", pid, is)
	}

	b.out("copilot", "enroll", "--for", "40s", "--out", "/root", "worker-7")
	b.out("sh", "-ec", "mkdir -p /etc/pilot; mv /root/worker-7.pem /etc/pilot/node.pem; mv /root/worker-7-key.pem /etc/pilot/node-key.pem; cp /etc/copilot/ca.pem /etc/pilot/")
	first := certificate(t, b.path("etc/pilot/node.pem"))
	b.out("pilot", "node", "install", "--now", "--broker", "https://localhost:8443", "--broker-ca", "/etc/pilot/ca.pem", "--broker-cert", "/etc/pilot/node.pem", "--broker-key", "/etc/pilot/node-key.pem")
	await(t, "pilot renews its certificate", func() error {
		if certificate(t, b.path("etc/pilot/node.pem")).SerialNumber.Cmp(first.SerialNumber) == 0 {
			return fmt.Errorf("journal:\n%s", said(t, b.run("journalctl", "--no-pager", "-n", "20", "-u", "pilot.service")))
		}
		return nil
	})
	// A command of run has the network of this machine.
	if out := b.out("systemd-run", "--wait", "--pipe", "--quiet", "pilot", "node", "renew"); !strings.Contains(out, "spiffe://example.com/node/worker-7, valid until") {
		t.Error(out)
	}
	if out := said(t, b.run("journalctl", "--no-pager", "-u", "pilot.service")); strings.Contains(out, "level=warning") {
		t.Errorf("pilot's log:\n%s", out)
	}
}
