package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLazyAndWorkloadsTogether sets a node up with both, and switches each off and on while a
// container has a lazily pulled image. The record of the installation is lost meanwhile.
func TestLazyAndWorkloadsTogether(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	secret := harness.NewSecret()
	sealed := lazyImage(c, "sealed:1", secret)
	const plugins = "/srv/nri"
	for version, config := range map[string]string{
		"1.7":   "version = 2\n[plugins.'io.containerd.nri.v1.nri']\n  disable = true\n  plugin_path = '" + plugins + "'\n" + harness.NRIPatience,
		"2.4.2": "version = 3\n[plugins.'io.containerd.nri.v1.nri']\n  plugin_path = '" + plugins + "'\n" + harness.NRIPatience,
	} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()[version](t)
			harness.Write(t, m.Root+"/etc/containerd/config.toml", config)
			n := &lazyNode{m: m, Node: &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}}
			m.Mount("tmpfs", "var/lib/pilot/snapshotter", "tmpfs", 0, "")
			m.BrokerAt(c.BrokerURL)
			before := m.Files()
			// On the machine, not from outside, so that it looks at what runs.
			install := func(args ...string) string {
				t.Helper()
				return harness.CombinedOutput(t, m.Run("pilot", append([]string{"node", "install"}, args...)...))
			}
			asks := func(when string, want bool) {
				t.Helper()
				plugin := exists(m.Root + plugins + "/00-pilot")
				setting := strings.Contains(harness.Read(t, m.Root+"/etc/pilot/pilot.toml"), "workloads-listen")
				required := strings.Contains(harness.Output(t, m.Run("containerd", "config", "dump")), "required_plugins = ['pilot']")
				if plugin != want || setting != want || required != (want && version == "2.4.2") {
					t.Errorf("%s: plugin %t, setting %t, required %t", when, plugin, setting, required)
				}
			}

			install("--workloads", "--lazy", "--broker", "unix:///run/copilot/copilot.sock")
			n.startPilot(t)
			n.startSnapshotter(t)
			n.startContainerd(t)
			asks("installed", true)
			out := n.doctor(t, true)
			for _, step := range []string{"containerd-config", "lazy", "workloads"} {
				expectStep(t, out, "ok", step)
			}
			harness.Output(t, n.Crictl("pull", sealed))
			running := n.starts(t, "pilot-lazy", sealed)

			// Lazy pulling ends, and containerd goes on asking.
			install("--lazy=false")
			n.restartContainerd(t)
			asks("lazy pulling switched off", true)
			out = n.doctor(t, true)
			expectStep(t, out, "ok", "lazy", "switched off", running)
			expectStep(t, out, "ok", "workloads")

			// Asking ends, and is switched on again, while the snapshotter stays.
			install("--workloads=false")
			asks("switched off", false)
			n.restartContainerd(t)
			n.reads(t, running, secret)
			out = n.doctor(t, true)
			expectStep(t, out, "ok", "lazy", "switched off", running)
			if strings.Contains(out, "workloads") {
				t.Errorf("asking is switched off, and doctor says %s", out)
			}
			install("--workloads")
			asks("switched on again", true)

			if err := os.Remove(m.Root + "/var/lib/pilot/node.json"); err != nil {
				t.Fatal(err)
			}
			if out := install(); !strings.Contains(out, "are adopted") || !strings.Contains(out, "stays for the containers that have it") {
				t.Errorf("the record was lost: %s", out)
			}
			asks("adopted", true)
			n.reads(t, running, secret)

			n.pilot.Stop(t)
			n.startPilot(t)
			n.restartContainerd(t)
			n.ends(t, running)
			if out := install(); !strings.Contains(out, "removed /etc/systemd/system/pilot-snapshotter.service") {
				t.Errorf("no container has pilot's snapshotter: %s", out)
			}
			asks("lazy pulling is gone", true)
			n.snapshotter.Stop(t)
			n.restartContainerd(t)
			harness.CombinedOutput(t, m.Run("pilot", "snapshotter", "--remove", "--force"))
			expectStep(t, n.doctor(t, true), "ok", "workloads")
			harness.Output(t, m.Pilot("node", "uninstall"))
			// Directories stay, as the record was lost.
			for path := range m.Files() {
				if _, was := before[path]; !was && !strings.HasSuffix(path, ".d") && !strings.HasSuffix(path, ".wants") && filepath.Base(path) != "pilot" {
					t.Errorf("%s is left", path)
				}
			}
			if exists(m.Root + plugins + "/00-pilot") {
				t.Error("the plugin is left")
			}
		})
	}
}

// TestWorkloadsAreNotSwitchedOffBesideAnOwnersSetting has an owner who has edited pilot.toml.
func TestWorkloadsAreNotSwitchedOffBesideAnOwnersSetting(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["2.4.2"](t)
	harness.Output(t, m.Pilot("node", "install", "--workloads"))
	conf := m.Root + "/etc/pilot/pilot.toml"
	text := harness.Read(t, conf)
	harness.Write(t, conf, text+"log-level = \"debug\"\n")
	harness.ExpectFailure(t, m.Pilot("node", "install", "--workloads=false"), "/etc/pilot/pilot.toml", "workloads-listen is set", "remove it there")
	harness.Write(t, conf, strings.Replace(text, "workloads-listen", "#", 1)+"log-level = \"debug\"\n")
	harness.Output(t, m.Pilot("node", "install", "--workloads=false"))
	if exists(m.Root + nriPlugin) {
		t.Error("the plugin is left")
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
