package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const nodeState = "/var/lib/pilot/node.json"

// lost are the ways in which the record of an installation is lost.
var lost = map[string]func(t *testing.T, m *harness.Machine){
	"missing": func(t *testing.T, m *harness.Machine) {
		if err := os.RemoveAll(m.Root + filepath.Dir(nodeState)); err != nil {
			t.Fatal(err)
		}
	},
	"truncated": func(t *testing.T, m *harness.Machine) {
		text := harness.Read(t, m.Root+nodeState)
		harness.Write(t, m.Root+nodeState, text[:len(text)/2])
	},
}

// TestNodeStateLost loses the record of installations on several kinds of machines:
// installing takes the files over, and uninstalling removes them.
func TestNodeStateLost(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		version, file, at string
		stays             []string // besides directories, with another text than before
	}{
		"imports inserted": {version: "2.2.9", file: "v2-cri-no-imports.toml"},
		"import added":     {version: "2.4.2", file: "v3-eks.toml"},
		"decoder":          {version: "1.6", file: "v2-decoder.toml"},
		"environment":      {version: "1.7", file: "v2-decoder.toml"},
		"short names":      {version: "1.7", file: "none-docker.toml"},
		"k3s":              {version: "2.2.9", file: "v3-k3s.toml", at: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"},
		"no file":          {version: "2.2.9", stays: []string{containerdConfig}},
	} {
		for how, lose := range lost {
			if how == "truncated" && test.version != "1.6" {
				continue // once is enough
			}
			t.Run(name+"/"+how, func(t *testing.T) {
				m := harness.Machines()[test.version](t)
				os.RemoveAll(m.Root + "/etc/containerd")
				var args []string
				if test.at == "" {
					test.at = containerdConfig
				} else {
					args = []string{"--containerd-config", test.at}
				}
				if test.file != "" {
					harness.Write(t, m.Root+test.at, harness.Read(t, "../testdata/nodes/"+test.file))
				}
				if err := os.MkdirAll(m.Root+"/opt/keys", 0o755); err != nil { // of v2-decoder.toml
					t.Fatal(err)
				}
				before, configBefore := m.Files(), ""
				if test.file != "" {
					configBefore = harness.Read(t, m.Root+test.at)
				}
				install := append([]string{"node", "install", "--broker", "https://copilot.example.com"}, args...)
				harness.Output(t, m.Pilot(install...))
				installed := m.Files()

				lose(t, m)
				harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), nodeState, "pilot node install")
				if out := harness.CombinedOutput(t, m.Pilot(append([]string{"node", "install"}, args...)...)); !strings.Contains(out, nodeState+": it is") || !strings.Contains(out, "are adopted: /") {
					t.Errorf("install: %s", out)
				}
				after := m.Files()
				for path, sum := range installed {
					if path != m.Root+nodeState && after[path] != sum {
						t.Errorf("%s: %q, was %q", path, after[path], sum)
					}
				}
				if out := harness.Output(t, m.Pilot(append([]string{"node", "install"}, args...)...)); !strings.Contains(out, "nothing to change") {
					t.Errorf("a second time: %s", out)
				}
				harness.Output(t, m.Run("pilot", "node", "refresh"))

				lose(t, m)
				out := harness.Output(t, m.Pilot("node", "uninstall"))
				left := m.Files()
				for path, sum := range before {
					if left[path] != sum {
						t.Errorf("%s: %q, was %q", path, left[path], sum)
					}
				}
				for path := range left {
					name := strings.TrimPrefix(path, m.Root)
					if _, was := before[path]; !was && !strings.Contains(out, "  "+name+"\n") && !strings.Contains(out, "  "+name+"/") {
						t.Errorf("%s is left, and not named in %s", name, out)
					}
				}
				for _, path := range test.stays {
					if !strings.Contains(out, "  "+path+"\n") {
						t.Errorf("%s is not named in %s", path, out)
					}
				}
				if test.file != "" && harness.Read(t, m.Root+test.at) != configBefore {
					t.Errorf("left: %s", harness.Read(t, m.Root+test.at))
				}
				if out := harness.Output(t, m.Pilot("node", "uninstall")); !strings.Contains(out, "nothing is installed") {
					t.Errorf("uninstalled twice: %s", out)
				}
			})
		}
	}
}

// TestNodeStateLostAndChanged loses the record on a machine with files that were changed
// since they were installed, and which must stay.
func TestNodeStateLostAndChanged(t *testing.T) {
	t.Parallel()
	const dropIn = "/etc/containerd/conf.d/pilot.toml"
	m := configured(t, "2.4.2", "version = 3\n")
	harness.Output(t, m.Pilot("node", "install"))
	written := harness.Read(t, m.Root+dropIn)
	os.Remove(m.Root + nodeState)
	for text, want := range map[string]string{
		written + "# mine\n": dropIn + ": it exists, and pilot did not write it: move it away",
		strings.Replace(written, "\n\n", "\n\noom_score = 1\n\n", 1): "remove what is in the way from containerd's files",
	} {
		harness.Write(t, m.Root+dropIn, text)
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install"), dropIn, want)
		harness.ExpectFailure(t, m.Pilot("node", "uninstall"), dropIn+":", "take pilot out of these lines")
		m.CheckFiles(before)
	}
	harness.Write(t, m.Root+dropIn, written)
	unit := m.Root + "/etc/systemd/system/pilot.service"
	harness.Write(t, unit, harness.Read(t, unit)+"Nice=1\n")
	harness.Write(t, m.Root+"/etc/pilot/pilot.toml", "broker = 'https://other.example.com'\n")
	out := harness.Output(t, m.Pilot("node", "uninstall"))
	for _, path := range []string{"/etc/systemd/system/pilot.service", "/etc/pilot/pilot.toml", "/etc/systemd/system/multi-user.target.wants/pilot.service"} {
		if !strings.Contains(out, "  "+path+"\n") {
			t.Errorf("%s is not named in %s", path, out)
		}
	}
	if strings.Contains(m.CheckUnits(), "diff.sock") {
		t.Error("pilot is still configured")
	}

	// Without pilot's files the record can't be rebuilt.
	harness.Write(t, m.Root+nodeState, "{")
	before := m.Files()
	for _, command := range []string{"install", "uninstall"} {
		harness.ExpectFailure(t, m.Pilot("node", command), nodeState+": it is damaged", "remove it")
	}
	m.CheckFiles(before)
}
