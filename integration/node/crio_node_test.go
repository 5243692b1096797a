package node

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestCRIONodeConflicts installs where something is in the way.
func TestCRIONodeConflicts(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ file, text, want string }{
		"another drop-in":  {"etc/systemd/system/crio.service.d/keys.conf", "[Service]\nEnvironment=\"OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\"\n", "/etc/systemd/system/crio.service.d/keys.conf: Environment=\"OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\": move the file it names"},
		"environment file": {"etc/sysconfig/crio", "OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf\n", "/etc/sysconfig/crio: OCICRYPT_KEYPROVIDER_CONFIG=/etc/ocicrypt.conf: move the file it names"},
		"own drop-in":      {"etc/systemd/system/crio.service.d/pilot.conf", "[Service]\n", "/etc/systemd/system/crio.service.d/pilot.conf: it exists, and pilot did not write it: move it away"},
		"ocicrypt.conf":    {"etc/pilot/ocicrypt.conf", `{"key-providers": {}}`, "/etc/pilot/ocicrypt.conf: it has no key provider pilot"},
		"pilot.toml":       {"etc/pilot/pilot.toml", "diff-listen = 'unix:///run/pilot/diff.sock'\n", `/etc/pilot/pilot.toml: diff-listen is "unix:///run/pilot/diff.sock", not "off": change it there`},

		"same variable":             {"etc/sysconfig/crio", "#OCICRYPT_KEYPROVIDER_CONFIG=/x\nOCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf\n", ""},
		"a containerd that is gone": {"etc/containerd/config.toml", "version = 2\n", ""},
		"own settings":              {"etc/pilot/pilot.toml", "broker = 'https://copilot.example.com'\ndiff-listen = 'off'\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := harness.NewCRIOMachine(t)
			harness.Write(t, filepath.Join(m.Root, test.file), test.text)
			before := m.Files()
			if test.want != "" {
				harness.ExpectFailure(t, m.Pilot("node", "install"), test.want)
				m.CheckFiles(before)
				return
			}
			harness.Output(t, m.Pilot("node", "install"))
			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
		})
	}
	t.Run("containerd too", func(t *testing.T) {
		m := harness.NewMachine(t, filepath.Join(harness.Tools, "trixie"))
		harness.Write(t, m.Root+"/usr/lib/systemd/system/crio.service", "[Service]\nExecStart=/usr/local/bin/crio\n")
		if diff := harness.Output(t, m.Pilot("node", "install", "--dry-run")); !strings.Contains(diff, "containerd") || strings.Contains(diff, "crio") {
			t.Errorf("dry run: %s", diff)
		}
	})
}
