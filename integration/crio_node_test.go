package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// crioMachine makes a machine with CRI-O and no containerd.
func crioMachine(t testing.TB) *machine {
	t.Helper()
	m := newMachine(t, filepath.Join(tools, "trixie"))
	m.onlyCRIO()
	return m
}

// onlyCRIO replaces the machine's containerd by CRI-O.
func (m *machine) onlyCRIO() {
	t := m.t
	t.Helper()
	for _, name := range []string{"crio", "pinns"} {
		m.copy(tool(t, name))
	}
	for _, name := range []string{"usr/bin/containerd", "etc/containerd"} {
		if err := os.RemoveAll(filepath.Join(m.root, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, m.root+"/usr/lib/systemd/system/crio.service", "[Service]\nType=notify\nEnvironmentFile=-/etc/sysconfig/crio\nExecStart=/usr/local/bin/crio\n\n[Install]\nWantedBy=multi-user.target\n")
	write(t, m.root+"/etc/crio/crio.conf.d/10-test.conf", `[crio]
storage_driver = "vfs"
[crio.runtime]
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
disable_hostport_mapping = true
[crio.runtime.runtimes.crun]
monitor_cgroup = "pod"
`)
	// CRI-O makes it.
	if err := os.MkdirAll(m.root+"/etc/crio/policies", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, m.root+"/etc/containers/policy.json", `{"default": [{"type": "insecureAcceptAnything"}]}`)
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

// TestCRIONodeConflicts installs where something is in the way.
func TestCRIONodeConflicts(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ file, text, want string }{
		"another drop-in":  {"etc/systemd/system/crio.service.d/keys.conf", "[Service]\nEnvironment=\"OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\"\n", "/etc/systemd/system/crio.service.d/keys.conf: Environment=\"OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\": move the file that it names"},
		"environment file": {"etc/sysconfig/crio", "OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\n", "/etc/sysconfig/crio: OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf: move the file that it names"},
		"own drop-in":      {"etc/systemd/system/crio.service.d/pilot.conf", "[Service]\n", "/etc/systemd/system/crio.service.d/pilot.conf: it exists, and is not what was installed: move it away"},
		"ocicrypt.conf":    {"etc/pilot/ocicrypt.conf", `{"key-providers": {}}`, "/etc/pilot/ocicrypt.conf: it names no key provider pilot"},
		"pilot.toml":       {"etc/pilot/pilot.toml", "diff-listen = 'unix:///run/pilot/diff.sock'\n", `/etc/pilot/pilot.toml: diff-listen is "unix:///run/pilot/diff.sock", not "off": change it there`},

		"same variable": {"etc/sysconfig/crio", "#OCICRYPT_KEYPROVIDER_CONFIG=/x\nOCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf\n", ""},
		"own settings":  {"etc/pilot/pilot.toml", "broker = 'https://copilot.example.com'\ndiff-listen = 'off'\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := crioMachine(t)
			write(t, filepath.Join(m.root, test.file), test.text)
			before := m.files()
			if test.want != "" {
				fails(t, m.pilot("node", "install"), test.want)
				m.same(before)
				return
			}
			output(t, m.pilot("node", "install"))
			output(t, m.pilot("node", "uninstall"))
			m.same(before)
		})
	}
	t.Run("containerd too", func(t *testing.T) {
		m := newMachine(t, filepath.Join(tools, "trixie"))
		write(t, m.root+"/usr/lib/systemd/system/crio.service", "[Service]\nExecStart=/usr/local/bin/crio\n")
		if diff := output(t, m.pilot("node", "install", "--dry-run")); !strings.Contains(diff, "containerd") || strings.Contains(diff, "crio") {
			t.Errorf("dry run: %s", diff)
		}
	})
}
