package node

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// containerd starts a containerd on the machine and waits for its socket.
func containerd(t *testing.T, m *harness.Machine, socket string, args ...string) *harness.Process {
	t.Helper()
	p := m.Start(t, "containerd", args...)
	harness.Await(t, "containerd", harness.Reachable(m.Root+socket))
	return p
}

// TestNodeFollowsRunningContainerd installs on machines that run another containerd than
// the default one.
func TestNodeFollowsRunningContainerd(t *testing.T) {
	t.Parallel()
	const (
		socket = "/run/containerd/containerd.sock"
		other  = "/run/other/containerd.sock"
	)
	apart := []string{"--config", "/opt/c/config.toml", "--address", other, "--root", "/var/lib/containerd/other", "--state", "/run/other"}
	with := func(t *testing.T) *harness.Machine {
		m := harness.Machines()["2.4.2"](t)
		harness.Write(t, m.Root+"/opt/c/config.toml", "version = 3\n")
		return m
	}
	t.Run("elsewhere", func(t *testing.T) {
		m := with(t)
		before := m.Files()
		containerd(t, m, other, apart...)
		harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--containerd-config", "/etc/containerd/config.toml"), "/opt/c/config.toml", "not the containerd that was named")
		m.CheckFiles(before)
		harness.Output(t, m.Run("pilot", "node", "install"))
		if got := harness.Read(t, m.Root+"/opt/c/config.toml"); !strings.Contains(got, "/opt/c/conf.d/pilot*.toml") {
			t.Errorf("its configuration: %s", got)
		}
		if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); !strings.Contains(got, other) {
			t.Errorf("pilot.toml: %s", got)
		}
		// Not restarted yet: the doctor reports that, with the times.
		out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor"))
		if !strings.Contains(out, "/opt/c/config.toml was written at") || !strings.Contains(out, "containerd has not loaded pilot's differ") {
			t.Errorf("doctor: %s", out)
		}
		harness.Output(t, m.Run("pilot", "node", "uninstall"))
		m.CheckFiles(before)
	})
	t.Run("two", func(t *testing.T) {
		m := with(t)
		before := m.Files()
		containerd(t, m, other, apart...)
		containerd(t, m, socket)
		harness.ExpectFailure(t, m.Run("pilot", "node", "install"), "more than one containerd runs", "--containerd-address")
		m.CheckFiles(before)
		harness.Output(t, m.Run("pilot", "node", "install", "--containerd-address", other))
		if _, err := os.Stat(m.Root + "/opt/c/conf.d/pilot.toml"); err != nil {
			t.Error(err)
		}
		harness.Output(t, m.Run("pilot", "node", "uninstall"))
		m.CheckFiles(before)
	})
	t.Run("by the unit", func(t *testing.T) {
		// No containerd runs, as in a node image.
		m := with(t)
		harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/containerd "+strings.Join(apart, " ")+"\n")
		harness.Output(t, m.Pilot("node", "install"))
		if _, err := os.Stat(m.Root + "/opt/c/conf.d/pilot.toml"); err != nil {
			t.Error(err)
		}
	})
	t.Run("none", func(t *testing.T) {
		m := with(t)
		os.Remove(m.Root + "/usr/bin/containerd")
		harness.ExpectFailure(t, m.Pilot("node", "install"), "there is no /usr/bin/containerd", "--containerd-binary")
	})
	t.Run("upgraded and not restarted", func(t *testing.T) {
		m := with(t)
		containerd(t, m, socket)
		os.Remove(m.Root + "/usr/bin/containerd")
		m.Upgrade("containerd-2.2.9")
		if out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor")); !strings.Contains(out, "it is containerd 2.2, and 2.4 runs at "+socket) {
			t.Errorf("doctor: %s", out)
		}
	})
}

// k3s stands in for k3s's agent: it makes containerd's configuration, from a template if
// there is one, and starts its containerd.
const k3s = `#!/bin/sh
if [ "$1" = --version ]; then echo "k3s version v1.30.1+k3s1 (0123abcd)"; exit; fi
cd /var/lib/rancher/k3s/agent/etc/containerd
for t in config-v3.toml.tmpl; do
	if [ -e $t ]; then sed -e '/{{ template "base" . }}/{r base.toml
d}' $t >config.toml; else cp base.toml config.toml; fi
done
containerd -c /var/lib/rancher/k3s/agent/etc/containerd/config.toml &
trap "kill $!" TERM
wait
`

// TestNodeOnK3s installs on k3s before and after it imported a directory, beside another
// containerd that the kubelet does not use.
func TestNodeOnK3s(t *testing.T) {
	t.Parallel()
	const dir = "/var/lib/rancher/k3s/agent/etc/containerd/"
	const socket = "/run/k3s/containerd/containerd.sock"
	base := harness.Read(t, "../testdata/nodes/v3-k3s.toml")
	for name, test := range map[string]struct{ base, writes string }{
		"drop-ins": {base, "config-v3.toml.d/pilot.toml"},
		"template": {strings.ReplaceAll(base, "imports =", "#"), "config-v3.toml.tmpl"},
	} {
		t.Run(name, func(t *testing.T) {
			m := harness.Machines()["2.2.9"](t)
			harness.Write(t, m.Root+dir+"base.toml", test.base)
			harness.Write(t, m.Root+"/usr/local/bin/k3s", k3s)
			os.Chmod(m.Root+"/usr/local/bin/k3s", 0o755)
			containerd(t, m, "/run/containerd/containerd.sock")
			agent := m.Start(t, "k3s")
			harness.Await(t, "k3s' containerd", harness.Reachable(m.Root+socket))

			out := harness.CombinedOutput(t, m.Run("pilot", "node", "install"))
			if !strings.Contains(out, "k3s") || !strings.Contains(out, dir+test.writes) {
				t.Errorf("install: %s", out)
			}
			before := harness.Read(t, m.Root+"/etc/containerd/config.toml")
			agent.Stop(t)
			harness.Await(t, "k3s' containerd to end", func() error {
				if harness.Reachable(m.Root+socket)() == nil {
					return os.ErrExist
				}
				return nil
			})
			m.Start(t, "k3s")
			harness.Await(t, "k3s' containerd", harness.Reachable(m.Root+socket))
			if out := harness.Output(t, m.Run("pilot", "node", "install")); !strings.Contains(out, "nothing to change") {
				t.Errorf("a second time: %s", out)
			}
			harness.Output(t, m.Run("pilot", "node", "refresh"))
			m.Start(t, "pilot", "serve")
			harness.Await(t, "pilot", harness.Reachable(m.Root+"/run/pilot/keyprovider.sock"))
			var report struct {
				Steps []struct{ Name, Result, Detail string }
			}
			cmd := m.Run("pilot", "node", "doctor", "--json")
			b, _ := cmd.Output() // there is no broker
			if err := json.Unmarshal(b, &report); err != nil {
				t.Fatal(err)
			}
			for _, step := range report.Steps {
				if step.Name == "containerd-config" && (step.Result != "ok" || !strings.Contains(step.Detail, dir)) {
					t.Errorf("doctor: %+v", step)
				}
			}
			if got := harness.Read(t, m.Root+"/etc/containerd/config.toml"); got != before {
				t.Errorf("the other containerd's configuration: %s", got)
			}
			harness.Output(t, m.Run("pilot", "node", "uninstall"))
			if _, err := os.Stat(m.Root + dir + test.writes); err == nil {
				t.Error("the drop-in is left")
			}
		})
	}
}

// TestNodeRefusals installs where pilot can't be set up, or the change would not last.
func TestNodeRefusals(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]string{
		"bottlerocket": "Bottlerocket generates containerd's configuration from settings",
		"talos":        "configure it as docs/containerd.md shows",
	} {
		t.Run(id, func(t *testing.T) {
			m := harness.Machines()["2.2.9"](t)
			os.Remove(m.Root + "/etc/os-release")
			harness.Write(t, m.Root+"/etc/os-release", "NAME=x\nID="+id+"\n")
			before := m.Files()
			harness.ExpectFailure(t, m.Pilot("node", "install"), want)
			m.CheckFiles(before)
		})
	}
	t.Run("k3s with an early template", func(t *testing.T) {
		m := harness.Machines()["2.2.9"](t)
		const dir, program = "/var/lib/rancher/k3s/agent/etc/containerd/", "/usr/local/bin/k3s"
		harness.Write(t, m.Root+dir+"config.toml", strings.ReplaceAll(harness.Read(t, "../testdata/nodes/v3-k3s.toml"), "imports =", "#"))
		version := func(v string) {
			harness.Write(t, m.Root+program, "#!/bin/sh\necho k3s version "+v+"\n")
			os.Chmod(m.Root+program, 0o755)
		}
		before := m.Files()
		install := []string{"node", "install", "--containerd-config", dir + "config.toml"}
		version("v1.27.4+k3s1")
		harness.ExpectFailure(t, m.Pilot(install...), "k3s v1.27.4 can't extend its own template", "upgrade it")
		m.CheckFiles(before)
		if _, err := os.Stat(m.Root + dir + "config-v3.toml.tmpl"); err == nil {
			t.Error("the template is there")
		}
		version("v1.27.5+k3s1")
		harness.Output(t, m.Pilot(install...))
		if _, err := os.Stat(m.Root + dir + "config-v3.toml.tmpl"); err != nil {
			t.Error(err)
		}
	})
	t.Run("k3s with a template of its owner's", func(t *testing.T) {
		m := harness.Machines()["2.2.9"](t)
		const dir = "/var/lib/rancher/k3s/agent/etc/containerd/"
		base := strings.ReplaceAll(harness.Read(t, "../testdata/nodes/v3-k3s.toml"), "imports =", "#")
		const lines = "[proxy_plugins.pilot]\n  type = 'diff'\n  address = '/run/pilot/diff.sock'\n"
		for _, added := range []string{"", lines} {
			harness.Write(t, m.Root+dir+"config-v3.toml.tmpl", "{{ template \"base\" . }}\n"+added)
			harness.Write(t, m.Root+dir+"config.toml", base+added)
			before := m.Files()
			harness.ExpectFailure(t, m.Pilot("node", "install", "--containerd-config", dir+"config.toml"), "config-v3.toml.tmpl", "set pilot up by hand")
			m.CheckFiles(before)
		}
	})
	t.Run("k3s stopped", func(t *testing.T) {
		m := harness.Machines()["2.2.9"](t)
		os.Remove(m.Root + "/usr/bin/containerd")
		os.Remove(m.Root + "/lib/systemd/system/containerd.service")
		harness.Write(t, m.Root+"/etc/systemd/system/k3s.service", "[Service]\nExecStart=/usr/local/bin/k3s server\n")
		harness.ExpectFailure(t, m.Pilot("node", "install"), "k3s: its containerd does not run: start k3s")
	})
	t.Run("k3s stopped beside another", func(t *testing.T) {
		m := harness.Machines()["2.2.9"](t)
		harness.Write(t, m.Root+"/etc/systemd/system/k3s.service", "[Service]\nExecStart=/usr/local/bin/k3s server\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Run("pilot", "node", "install"), "k3s: its containerd does not run: start k3s", "--containerd-config")
		m.CheckFiles(before)
		harness.Output(t, m.Run("pilot", "node", "install", "--containerd-config", "/etc/containerd/config.toml"))
	})
}

// TestNodeRepairsDropInOfEarlierVersion repairs the drop-in of an earlier version, with which containerd
// 2.0 to 2.2 lost its CRI configuration.
func TestNodeRepairsDropInOfEarlierVersion(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["2.2.9"](t)
	const conf = "/etc/containerd/config.toml"
	harness.Write(t, m.Root+conf, harness.Read(t, "../testdata/nodes/v2-cri.toml"))
	n := &installedNode{m: m, version: "2.2.9"}
	untouched := n.dump(t)
	harness.Output(t, m.Pilot("node", "install"))
	// As that version wrote and recorded it.
	dropIn := m.Root + "/etc/containerd/conf.d/pilot.toml"
	const head = "# Written by \"pilot node install\"; \"pilot node uninstall\" removes it.\n"
	text := strings.Replace(harness.Read(t, dropIn), head, head+"version = 3\n", 1)
	renote(m, "/etc/containerd/conf.d/pilot.toml", text)
	if dump := m.CheckUnits(); strings.Contains(dump, "registry.internal") {
		t.Fatal("containerd 2.2 knows better now")
	}
	containerd(t, m, "/run/containerd/containerd.sock")
	if out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor")); !strings.Contains(out, "containerd has lost or changed other settings") || !strings.Contains(out, "pilot node install") {
		t.Errorf("doctor: %s", out)
	}
	harness.Output(t, m.Pilot("node", "install"))
	n.onlyPilotDiffers(t, "repaired", untouched)
}

// renote writes a file of pilot on the machine and its record, as if it had been installed
// with that content.
func renote(m *harness.Machine, path, text string) {
	m.T.Helper()
	state := m.Root + "/var/lib/pilot/node.json"
	was := harness.SHA256(harness.Read(m.T, m.Root+path))
	harness.Write(m.T, m.Root+path, text)
	harness.Write(m.T, state, strings.ReplaceAll(harness.Read(m.T, state), was, harness.SHA256(text)))
}

// TestNodeListEntriesThatAreHidden lets the doctor find entries that pilot's lists hide, and entries of a tool
// that is gone.
func TestNodeListEntriesThatAreHidden(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["2.2.9"](t)
	harness.Write(t, m.Root+"/etc/containerd/config.toml", harness.Read(t, "../testdata/nodes/v3-imports.toml"))
	lazy := m.Root + "/etc/containerd/conf.d/lazy.toml"
	doctor := func(want string) {
		t.Helper()
		p := containerd(t, m, "/run/containerd/containerd.sock")
		out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor"))
		if !strings.Contains(out, want) {
			t.Errorf("doctor: want %q in %s", want, out)
		}
		p.Stop(t)
	}
	harness.Output(t, m.Pilot("node", "install"))
	m.Start(t, "pilot", "serve")
	harness.Await(t, "pilot", harness.Reachable(m.Root+"/run/pilot/keyprovider.sock"))
	harness.Write(t, lazy, harness.Read(t, "../testdata/nodes/dropin-v3-snapshotter.toml"))
	doctor("pilot's drop-in hides the entry of unpack_config for snapshotter lazy")
	harness.Output(t, m.Pilot("node", "install"))
	doctor("ok       containerd-config")
	os.Remove(lazy)
	doctor("unpack_config has an entry for snapshotter lazy, which does not exist")
	harness.Output(t, m.Run("pilot", "node", "refresh"))
	doctor("ok       containerd-config")
	const dropIn = "/etc/containerd/conf.d/pilot.toml"
	got := harness.Read(t, m.Root+dropIn)
	if strings.Contains(got, "lazy") {
		t.Errorf("the drop-in: %s", got)
	}
	renote(m, dropIn, strings.Replace(got, "'walking'", "'gone', 'walking'", 1))
	p := containerd(t, m, "/run/containerd/containerd.sock")
	out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor"))
	if !strings.Contains(out, "the diff service has the differ gone, which does not exist") {
		t.Errorf("doctor: %s", out)
	}
	harness.Output(t, m.Run("pilot", "node", "refresh"))
	p.Stop(t)

	// Disabled, so pilot does not start with the machine.
	link := m.Root + "/etc/systemd/system/multi-user.target.wants/pilot.service"
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	doctor("pilot.service: gone since pilot was installed")
	harness.Output(t, m.Pilot("node", "install"))
	doctor("ok       containerd-config")
}
