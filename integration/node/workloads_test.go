package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// workloadsOwn are the settings that an installation with --workloads may change besides
// those of pilot's differ, by what settings returns.
var workloadsOwn = []string{
	"plugins/io.containerd.nri.v1.nri/disable", "plugins/io.containerd.nri.v1.nri/default_validator/enable", "plugins/io.containerd.nri.v1.nri/default_validator/required_plugins",
}

const nriPlugin = "/opt/nri/plugins/00-pilot"

// TestWorkloadsInstallChangesOnlyPilotsSettings installs with --workloads, turns that off and
// on, and uninstalls.
func TestWorkloadsInstallChangesOnlyPilotsSettings(t *testing.T) {
	t.Parallel()
	for version, file := range map[string]string{"1.7": "v2-cri.toml", "2.0.7": "v3-imports.toml", "2.2.9": "v2-cri-no-imports.toml", "2.4.2": "v3-eks.toml"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()[version](t)
			n := &installedNode{m: m, version: version, workloads: true}
			os.RemoveAll(m.Root + "/etc/containerd")
			original := harness.Read(t, "../testdata/nodes/"+file)
			if version == "2.4.2" {
				original += "\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  required_plugins = ['other']\n"
			}
			harness.Write(t, m.Root+n.config(), original)
			before, untouched := m.Files(), n.dump(t)

			install := func(args ...string) string {
				t.Helper()
				return harness.Output(t, m.Pilot(append([]string{"node", "install", "--containerd-config", n.config()}, args...)...))
			}
			if version >= "2.2" {
				inOrder(t, install("--workloads", "--dry-run"), nriPlugin, "required_plugins")
			}
			install("--workloads")
			n.onlyPilotDiffers(t, "installed", untouched)
			n.asks(t, "installed")
			after := m.Files()
			// Without the flag it stays.
			for _, args := range [][]string{{"--workloads"}, nil} {
				if out := install(args...); !strings.Contains(out, "nothing to change") {
					t.Errorf("%s: %s", args, out)
				}
			}
			m.CheckFiles(after)
			n.refresh(t)
			m.CheckFiles(after)

			// pilot's differ does not fit any more.
			for _, setting := range []string{"plugin_config_path = '/etc/nri/other'", "disable = true"} {
				harness.Write(t, m.Root+n.config(), original+"\n[proxy_plugins.pilot]\n  type = 'snapshot'\n  address = '/run/other.sock'\n[plugins.'io.containerd.nri.v1.nri']\n  "+setting+"\n")
				out := harness.CombinedOutput(t, m.Run("pilot", "node", "refresh"))
				n.asks(t, setting)
				if !strings.Contains(out, "there is a proxy plugin pilot") || version != "2.0.7" && !strings.Contains(out, "it still asks pilot about each container") {
					t.Errorf("%s: %s", setting, out)
				}
				if at := n.dump(t)["plugins/io.containerd.nri.v1.nri/plugin_config_path"]; strings.Contains(setting, "/other") && at != "/etc/nri/other" {
					t.Errorf("NRI's other settings: plugin_config_path is %v", at)
				}
			}
			harness.Write(t, m.Root+n.config(), original)
			n.refresh(t)
			n.onlyPilotDiffers(t, "fits again", untouched)
			n.asks(t, "fits again")

			// containerd starts its plugins from elsewhere.
			if version == "2.2.9" {
				const dir = "/etc/nri/plugins"
				harness.Write(t, m.Root+n.config(), original+"\n[plugins.'io.containerd.nri.v1.nri']\n  plugin_path = '"+dir+"'\n")
				n.refresh(t)
				if info, err := os.Stat(m.Root + dir + "/00-pilot"); err != nil || info.Mode().Perm() != 0o755 {
					t.Errorf("the plugin is not in %s: %v", dir, err)
				}
				if _, err := os.Stat(m.Root + nriPlugin); err == nil {
					t.Errorf("%s is left", nriPlugin)
				}
				harness.Write(t, m.Root+n.config(), original)
				n.refresh(t)
				n.asks(t, "there again")
			}

			if version >= "2.2" {
				inOrder(t, install("--workloads=false", "--dry-run"), "required_plugins", nriPlugin)
			}
			install("--workloads=false")
			without := &installedNode{m: m, version: version}
			without.onlyPilotDiffers(t, "off", untouched)
			for path, text := range map[string]string{nriPlugin: "", "/etc/pilot/pilot.toml": "workloads-listen"} {
				if b, err := os.ReadFile(m.Root + path); err == nil && strings.Contains(string(b), text) {
					t.Errorf("off: %s is\n%s", path, b)
				}
			}
			install("--workloads")
			n.onlyPilotDiffers(t, "on again", untouched)
			n.asks(t, "on again")
			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
			if _, err := os.Stat(m.Root + "/opt/nri"); err == nil {
				t.Error("/opt/nri is left")
			}

			// The record is lost.
			install("--workloads")
			if err := os.Remove(m.Root + "/var/lib/pilot/node.json"); err != nil {
				t.Fatal(err)
			}
			if out := harness.CombinedOutput(t, m.Pilot("node", "install", "--containerd-config", n.config())); !strings.Contains(out, "are adopted") || !strings.Contains(out, nriPlugin) {
				t.Errorf("the record was lost: %s", out)
			}
			n.asks(t, "adopted")
			harness.Output(t, m.Pilot("node", "uninstall"))
			if _, err := os.Stat(m.Root + nriPlugin); err == nil {
				t.Errorf("%s is left", nriPlugin)
			}
		})
	}
}

// inOrder checks that a plan requires pilot's plugin only while that is there: an
// installation may be killed in between.
func inOrder(t *testing.T, plan, first, second string) {
	t.Helper()
	if _, rest, _ := strings.Cut(plan, first); !strings.Contains(rest, second) {
		t.Errorf("%s is not before %s:\n%s", first, second, plan)
	}
}

// asks checks that containerd asks pilot's plugin.
func (n *installedNode) asks(t *testing.T, when string) {
	t.Helper()
	dump := n.dump(t)
	want := map[string]string{"plugins/io.containerd.nri.v1.nri/disable": "false"}
	if n.version >= "2.2" {
		want["plugins/io.containerd.nri.v1.nri/default_validator/enable"] = "true"
		want["plugins/io.containerd.nri.v1.nri/default_validator/required_plugins"] = "[pilot]"
	}
	if n.version == "2.4.2" {
		want["plugins/io.containerd.nri.v1.nri/default_validator/required_plugins"] = "[other pilot]"
	}
	for key, value := range want {
		if got := fmt.Sprint(dump[key]); got != value {
			t.Errorf("%s: %s is %s, not %s", when, key, got, value)
		}
	}
	info, err := os.Stat(n.m.Root + nriPlugin)
	if err != nil || info.Mode().Perm() != 0o755 || !strings.HasPrefix(harness.Read(t, n.m.Root+nriPlugin), "#!/usr/local/bin/pilot nri-plugin\n") {
		t.Errorf("%s: the plugin is not there: %v", when, err)
	}
	if conf := harness.Read(t, n.m.Root+"/etc/pilot/pilot.toml"); !strings.Contains(conf, `workloads-listen = "unix:///run/pilot/workloads.sock"`) {
		t.Errorf("%s: pilot.toml is\n%s", when, conf)
	}
}

// TestContainersAreCreatedOnceSettingsAreCorrected breaks pilot.toml while containerd is
// restarted: no container is created until it is corrected, and no other restart is needed.
func TestContainersAreCreatedOnceSettingsAreCorrected(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	plain := c.Pause()
	for version, sandbox := range map[string]string{
		"1.7":   "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\n  restrict_oom_score_adj = true\n  sandbox_image = '%s'\n",
		"2.4.2": "version = 3\n[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '%s'\n",
	} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()[version](t)
			harness.Write(t, m.Root+"/etc/containerd/config.toml", fmt.Sprintf(sandbox, plain)+"[plugins.'io.containerd.nri.v1.nri']\n"+harness.NRIPatience)
			n := &lazyNode{m: m, Node: &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}}
			m.BrokerAt(c.BrokerURL)
			harness.Output(t, m.Pilot("node", "install", "--workloads", "--broker", "unix:///run/copilot/copilot.sock"))
			n.startPilotAt(t, "workloads.sock")
			n.startContainerd(t)
			// While containerd runs, which ends before the test does.
			defer func() { harness.Output(t, n.Crictl("rmp", "-f", "-a")) }()
			const namespaces = `"linux":{"security_context":{"namespace_options":{"network":2,"pid":1}}}`
			pod := harness.Write(t, n.Dir+"/pod.json", `{"metadata":{"name":"web","namespace":"prod","uid":"1","attempt":1},"log_directory":"/var/log/pods/web",`+namespaces+`}`)
			id := strings.TrimSpace(harness.Output(t, n.Crictl("runp", pod)))
			create := func() *exec.Cmd {
				t.Helper()
				name := harness.ContainerID()
				return n.Crictl("create", "--no-pull", id, harness.Write(t, n.Dir+"/"+name+".json",
					fmt.Sprintf(`{"metadata":{"name":%q},"image":{"image":%q},"log_path":"%[1]s.log",%[3]s}`, name, plain, namespaces)), pod)
			}
			harness.Await(t, "a container", func() error { return create().Run() })
			// The plugin decides itself, by what pilot has recorded.
			n.pilot.Stop(t)
			harness.Await(t, "a container without pilot", func() error { return create().Run() })

			conf := m.Root + "/etc/pilot/pilot.toml"
			text := harness.Read(t, conf)
			harness.Write(t, conf, text+"nonsense = 1\n")
			n.restartContainerd(t)
			harness.ExpectFailure(t, create(), "no container is created until pilot's plugin can read its settings", "nonsense: unknown setting")
			harness.Write(t, conf, text)
			harness.Await(t, "a container with the settings corrected", func() error { return create().Run() })
		})
	}
}

// TestWorkloadsInstallRefuses has nodes on which pods could do without pilot's plugin.
func TestWorkloadsInstallRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		version, config, file string
		want                  []string
	}{
		"containerd 1.6":           {"1.6", "", "", []string{"containerd 1.6 asks no plugin", "1.7 or later"}},
		"pods that need no plugin": {"2.2.9", "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  tolerate_missing_plugins_annotation = 'example.com/none'\n", "", []string{"tolerate_missing_plugins_annotation", "example.com/none", "remove that setting"}},
		"plugins that would start": {"1.7", "version = 2\n", "/opt/nri/plugins/10-other", []string{"NRI is off", "10-other"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := harness.Machines()[test.version](t)
			if test.config != "" {
				harness.Write(t, m.Root+"/etc/containerd/config.toml", test.config)
			}
			if test.file != "" {
				harness.Write(t, m.Root+test.file, "#!/bin/sh\n")
			}
			before := m.Files()
			harness.ExpectFailure(t, m.Pilot("node", "install", "--workloads"), test.want...)
			m.CheckFiles(before)
		})
	}
}
