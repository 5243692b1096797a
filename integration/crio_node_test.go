package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// crioMachine makes a machine with the files of CRI-O, but not its programs, and no
// containerd.
func crioMachine(t testing.TB) *machine {
	t.Helper()
	m := newMachine(t, filepath.Join(tools, "trixie"))
	m.onlyCRIO()
	return m
}

// onlyCRIO replaces the machine's containerd by what CRI-O has but its programs.
func (m *machine) onlyCRIO() {
	t := m.t
	t.Helper()
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
