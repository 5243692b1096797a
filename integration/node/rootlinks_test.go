package node

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLinksOutOfRootAreNotFollowed installs pilot into root directories whose links lead outside, and
// uninstalls.
func TestLinksOutOfRootAreNotFollowed(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	// The links' targets on this machine.
	outside := filepath.Join(dir, "outside")
	for name, text := range map[string]string{"node.json": `{"files": [{"path": "/etc/pilot/pilot.toml", "mode": 420}]}`, "pilot.toml": "victim", "conf.d/pilot.toml": "victim", "pilot.service": "victim"} {
		harness.Write(t, filepath.Join(outside, name), text)
	}
	before := listed(t, outside)
	for name, links := range map[string]map[string]string{
		"absolute": {"etc/pilot": outside, "etc/systemd/system": outside, "var/lib/pilot": outside, "etc/containerd/conf.d": outside + "/conf.d"},
		"upwards":  {"etc/pilot": strings.Repeat("../", 20) + outside, "var/lib/pilot": "../../../../../../../../" + outside},
		"files":    {"etc/pilot/pilot.toml": outside + "/pilot.toml", "var/lib/pilot/node.json": outside + "/node.json"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()["1.7"](t)
			for link, to := range links {
				if err := os.RemoveAll(filepath.Join(m.Root, link)); err != nil {
					t.Fatal(err)
				}
				if err := os.MkdirAll(filepath.Dir(filepath.Join(m.Root, link)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(to, filepath.Join(m.Root, link)); err != nil {
					t.Fatal(err)
				}
			}
			// A link to a path that does not exist in the root may be an error.
			if out := harness.CombinedOutput(t, m.Pilot("node", "install")); name != "files" && !strings.Contains(out, "wrote /etc/pilot/pilot.toml") {
				t.Errorf("install: %s", out)
			}
			harness.Output(t, m.Pilot("node", "uninstall"))
			if after := listed(t, outside); !slices.Equal(after, before) || harness.Read(t, outside+"/pilot.toml") != "victim" {
				t.Errorf("outside has %q, had %q", after, before)
			}
		})
	}
}

// TestUninstallRemovesNoForeignFiles uninstalls with a record that names files that are not pilot's.
func TestUninstallRemovesNoForeignFiles(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["1.7"](t)
	harness.Output(t, m.Pilot("node", "install"))
	const state = "/var/lib/pilot/node.json"
	passwd := harness.Read(t, m.Root+"/etc/passwd")
	for _, path := range []string{"/etc/passwd", "../../etc/passwd", "/etc/pilot/../passwd"} {
		harness.Write(t, m.Root+state, `{"files": [{"path": "`+path+`", "before": "ZXZpbA==", "mode": 511, "sha256": "`+harness.SHA256(passwd)+`"}], "dirs": ["/etc/passwd"]}`)
		// It recognizes its own files without the record, and removes those.
		harness.CombinedOutput(t, m.Pilot("node", "uninstall"))
		if got := harness.Read(t, m.Root+"/etc/passwd"); got != passwd {
			t.Fatalf("%s: it is %q now", path, got)
		}
	}
	if _, err := os.Stat(m.Root + "/etc/containerd/conf.d/pilot.toml"); err == nil {
		t.Error("pilot's drop-in is left")
	}
	harness.ExpectFailure(t, m.Pilot("node", "uninstall"), state, "which is not a file of pilot")
}

// TestSpecialFilesInRoot has special files where configuration should be.
func TestSpecialFilesInRoot(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"/etc/pilot/pilot.toml", "/etc/pilot/ocicrypt.conf", "/var/lib/pilot/node.json", "/etc/containerd/config.toml", "/etc/systemd/system/pilot.service"} {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()["1.7"](t)
			os.Remove(m.Root + name)
			if err := os.MkdirAll(filepath.Dir(m.Root+name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Mkfifo(m.Root+name, 0o600); err != nil {
				t.Fatal(err)
			}
			before := m.Files()
			harness.ExpectFailure(t, m.Pilot("node", "install"), name, "pipe")
			m.CheckFiles(before)
			os.Remove(m.Root + name)
			if err := os.WriteFile(m.Root+name, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(m.Root+name, 1<<40); err != nil {
				t.Fatal(err)
			}
			harness.ExpectFailure(t, m.Pilot("node", "install"), name, "too large")
		})
	}
}
