package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// containerd starts a containerd on the machine and waits for its socket.
func (m *machine) containerd(t *testing.T, socket string, args ...string) *process {
	t.Helper()
	p := m.start(t, "containerd", args...)
	await(t, "containerd", answers(m.root+socket))
	return p
}

// TestNodeFollowsRunningContainerd installs on machines whose containerd is not
// the one that it would be by default.
func TestNodeFollowsRunningContainerd(t *testing.T) {
	t.Parallel()
	const (
		socket = "/run/containerd/containerd.sock"
		other  = "/run/other/containerd.sock"
	)
	apart := []string{"--config", "/opt/c/config.toml", "--address", other, "--root", "/var/lib/containerd/other", "--state", "/run/other"}
	with := func(t *testing.T) *machine {
		m := machines()["2.4.2"](t)
		write(t, m.root+"/opt/c/config.toml", "version = 3\n")
		return m
	}
	t.Run("elsewhere", func(t *testing.T) {
		m := with(t)
		before := m.files()
		m.containerd(t, other, apart...)
		fails(t, m.run("pilot", "node", "install", "--containerd-config", "/etc/containerd/config.toml"), "/opt/c/config.toml", "not the containerd that was named")
		m.same(before)
		output(t, m.run("pilot", "node", "install"))
		if got := read(t, m.root+"/opt/c/config.toml"); !strings.Contains(got, "/opt/c/conf.d/pilot*.toml") {
			t.Errorf("its configuration: %s", got)
		}
		if got := read(t, m.root+"/etc/pilot/pilot.toml"); !strings.Contains(got, other) {
			t.Errorf("pilot.toml: %s", got)
		}
		// Not restarted yet: that is what the doctor says, and how it knows.
		out := said(t, m.run("pilot", "node", "doctor"))
		if !strings.Contains(out, "/opt/c/config.toml was written at") || !strings.Contains(out, "containerd has not loaded pilot's differ") {
			t.Errorf("doctor: %s", out)
		}
		output(t, m.run("pilot", "node", "uninstall"))
		m.same(before)
	})
	t.Run("two", func(t *testing.T) {
		m := with(t)
		before := m.files()
		m.containerd(t, other, apart...)
		m.containerd(t, socket)
		fails(t, m.run("pilot", "node", "install"), "more than one containerd runs", "--containerd-address")
		m.same(before)
		output(t, m.run("pilot", "node", "install", "--containerd-address", other))
		if _, err := os.Stat(m.root + "/opt/c/conf.d/pilot.toml"); err != nil {
			t.Error(err)
		}
		output(t, m.run("pilot", "node", "uninstall"))
		m.same(before)
	})
	t.Run("by the unit", func(t *testing.T) {
		// None runs, as on a node image.
		m := with(t)
		write(t, m.root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/containerd "+strings.Join(apart, " ")+"\n")
		output(t, m.pilot("node", "install"))
		if _, err := os.Stat(m.root + "/opt/c/conf.d/pilot.toml"); err != nil {
			t.Error(err)
		}
	})
	t.Run("none", func(t *testing.T) {
		m := with(t)
		os.Remove(m.root + "/usr/bin/containerd")
		fails(t, m.pilot("node", "install"), "there is no /usr/bin/containerd", "--containerd-binary")
	})
	t.Run("upgraded and not restarted", func(t *testing.T) {
		m := with(t)
		m.containerd(t, socket)
		os.Remove(m.root + "/usr/bin/containerd")
		m.upgrade("containerd-2.2.9")
		if out := said(t, m.run("pilot", "node", "doctor")); !strings.Contains(out, "it is containerd 2.2, and 2.4 answers at "+socket) {
			t.Errorf("doctor: %s", out)
		}
	})
}

// k3s is a stand-in of k3s' agent: it makes containerd's configuration, from a
// template if there is one, and starts its containerd.
const k3s = `#!/bin/sh
cd /var/lib/rancher/k3s/agent/etc/containerd
for t in config-v3.toml.tmpl; do
	if [ -e $t ]; then sed -e '/{{ template "base" . }}/{r base.toml
d}' $t >config.toml; else cp base.toml config.toml; fi
done
containerd -c /var/lib/rancher/k3s/agent/etc/containerd/config.toml &
trap "kill $!" TERM
wait
`

// TestNodeOnK3s installs on k3s of before and after it imported a directory, with
// another containerd beside it that is not the kubelet's.
func TestNodeOnK3s(t *testing.T) {
	t.Parallel()
	const dir = "/var/lib/rancher/k3s/agent/etc/containerd/"
	const socket = "/run/k3s/containerd/containerd.sock"
	base := read(t, "testdata/nodes/v3-k3s.toml")
	for name, test := range map[string]struct{ base, writes string }{
		"drop-ins": {base, "config-v3.toml.d/pilot.toml"},
		"template": {strings.ReplaceAll(base, "imports =", "#"), "config-v3.toml.tmpl"},
	} {
		t.Run(name, func(t *testing.T) {
			m := machines()["2.2.9"](t)
			write(t, m.root+dir+"base.toml", test.base)
			write(t, m.root+"/usr/local/bin/k3s", k3s)
			os.Chmod(m.root+"/usr/local/bin/k3s", 0o755)
			m.containerd(t, "/run/containerd/containerd.sock")
			agent := m.start(t, "k3s")
			await(t, "k3s' containerd", answers(m.root+socket))

			out := said(t, m.run("pilot", "node", "install"))
			if !strings.Contains(out, "k3s") || !strings.Contains(out, dir+test.writes) {
				t.Errorf("install: %s", out)
			}
			before := read(t, m.root+"/etc/containerd/config.toml")
			agent.stop(t)
			await(t, "k3s' containerd to end", func() error {
				if answers(m.root+socket)() == nil {
					return os.ErrExist
				}
				return nil
			})
			m.start(t, "k3s")
			await(t, "k3s' containerd", answers(m.root+socket))
			m.start(t, "pilot", "serve")
			await(t, "pilot", answers(m.root+"/run/pilot/keyprovider.sock"))
			var report struct {
				Steps []struct{ Name, Result, Detail string }
			}
			cmd := m.run("pilot", "node", "doctor", "--json")
			b, _ := cmd.Output() // there is no broker
			if err := json.Unmarshal(b, &report); err != nil {
				t.Fatal(err)
			}
			for _, step := range report.Steps {
				if step.Name == "containerd-config" && (step.Result != "ok" || !strings.Contains(step.Detail, dir)) {
					t.Errorf("doctor: %+v", step)
				}
			}
			if got := read(t, m.root+"/etc/containerd/config.toml"); got != before {
				t.Errorf("the other containerd's configuration: %s", got)
			}
			output(t, m.run("pilot", "node", "uninstall"))
			if _, err := os.Stat(m.root + dir + test.writes); err == nil {
				t.Error("the drop-in is left")
			}
		})
	}
}

// TestNodeRefusals installs where pilot can't be set up, or would not last.
func TestNodeRefusals(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]string{
		"bottlerocket": "Bottlerocket generates it from settings",
		"talos":        "configure it as docs/containerd.md shows",
	} {
		t.Run(id, func(t *testing.T) {
			m := machines()["2.2.9"](t)
			os.Remove(m.root + "/etc/os-release")
			write(t, m.root+"/etc/os-release", "NAME=x\nID="+id+"\n")
			before := m.files()
			fails(t, m.pilot("node", "install"), want)
			m.same(before)
		})
	}
	t.Run("k3s stopped", func(t *testing.T) {
		m := machines()["2.2.9"](t)
		os.Remove(m.root + "/usr/bin/containerd")
		os.Remove(m.root + "/lib/systemd/system/containerd.service")
		write(t, m.root+"/etc/systemd/system/k3s.service", "[Service]\nExecStart=/usr/local/bin/k3s server\n")
		fails(t, m.pilot("node", "install"), "k3s: its containerd does not run: start k3s")
	})
}

// TestNodeBrokenBefore has an earlier version's drop-in repaired, with which
// containerd 2.0 to 2.2 forgot its CRI configuration.
func TestNodeBrokenBefore(t *testing.T) {
	t.Parallel()
	m := machines()["2.2.9"](t)
	const conf = "/etc/containerd/config.toml"
	write(t, m.root+conf, read(t, "testdata/nodes/v2-cri.toml"))
	n := &installedNode{m: m, version: "2.2.9"}
	untouched := n.dump(t)
	output(t, m.pilot("node", "install"))
	// As it was written then, and noted.
	dropIn := m.root + "/etc/containerd/conf.d/pilot.toml"
	const head = "# Written by \"pilot node install\"; \"pilot node uninstall\" removes it.\n"
	text := strings.Replace(read(t, dropIn), head, head+"version = 3\n", 1)
	m.renote("/etc/containerd/conf.d/pilot.toml", text)
	if dump := m.loads(); strings.Contains(dump, "registry.internal") {
		t.Fatal("containerd 2.2 knows better now")
	}
	m.containerd(t, "/run/containerd/containerd.sock")
	if out := said(t, m.run("pilot", "node", "doctor")); !strings.Contains(out, "containerd has lost or changed other settings") || !strings.Contains(out, "pilot node install") {
		t.Errorf("doctor: %s", out)
	}
	output(t, m.pilot("node", "install"))
	n.onlyPilotDiffers(t, "repaired", untouched)
}

// renote writes a file of pilot's on the machine as if it had been installed so.
func (m *machine) renote(path, text string) {
	m.t.Helper()
	state := m.root + "/var/lib/pilot/node.json"
	was := sum(read(m.t, m.root+path))
	write(m.t, m.root+path, text)
	write(m.t, state, strings.ReplaceAll(read(m.t, state), was, sum(text)))
}

// TestNodeLists has the doctor find entries that pilot's lists hide, and those of
// a tool that is gone.
func TestNodeLists(t *testing.T) {
	t.Parallel()
	m := machines()["2.2.9"](t)
	write(t, m.root+"/etc/containerd/config.toml", read(t, "testdata/nodes/v3-imports.toml"))
	lazy := m.root + "/etc/containerd/conf.d/lazy.toml"
	doctor := func(want string) {
		t.Helper()
		p := m.containerd(t, "/run/containerd/containerd.sock")
		out := said(t, m.run("pilot", "node", "doctor"))
		if !strings.Contains(out, want) {
			t.Errorf("doctor: want %q in %s", want, out)
		}
		p.stop(t)
	}
	output(t, m.pilot("node", "install"))
	m.start(t, "pilot", "serve")
	await(t, "pilot", answers(m.root+"/run/pilot/keyprovider.sock"))
	write(t, lazy, read(t, "testdata/nodes/dropin-v3-snapshotter.toml"))
	doctor("pilot's drop-in hides the entry of unpack_config for snapshotter lazy")
	output(t, m.pilot("node", "install"))
	doctor("ok       containerd-config")
	os.Remove(lazy)
	doctor("unpack_config has an entry for snapshotter lazy, which does not exist")
	output(t, m.run("pilot", "node", "refresh"))
	doctor("ok       containerd-config")
	if got := read(t, filepath.Join(m.root, "/etc/containerd/conf.d/pilot.toml")); strings.Contains(got, "lazy") {
		t.Errorf("the drop-in: %s", got)
	}
}
