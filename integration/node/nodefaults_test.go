package node

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

const containerdConfig = "/etc/containerd/config.toml"

// configured makes a machine with a configuration of containerd.
func configured(t *testing.T, version, text string) *harness.Machine {
	t.Helper()
	m := harness.Machines()[version](t)
	os.RemoveAll(m.Root + "/etc/containerd")
	harness.Write(t, m.Root+containerdConfig, text)
	return m
}

// script replaces the machine's containerd with a script, and renames containerd to
// containerd.real.
func script(m *harness.Machine, text string) {
	m.T.Helper()
	program := m.Root + "/usr/bin/containerd"
	if _, err := os.Stat(program + ".real"); err != nil {
		harness.Output(m.T, harness.Command(m.T, "mv", program, program+".real"))
	}
	harness.Write(m.T, program, "#!/bin/sh\n"+text)
	if err := os.Chmod(program, 0o755); err != nil {
		m.T.Fatal(err)
	}
}

// TestNodeTrustsNoOtherUser lets a user start a program as containerd, which root must
// not run.
func TestNodeTrustsNoOtherUser(t *testing.T) {
	t.Parallel()
	for name, asUser := range map[string][]string{
		"user":      {"setpriv", "--reuid=65534", "--clear-groups"},
		"half root": {"setpriv", "--ruid=65534"},
	} {
		t.Run(name, func(t *testing.T) {
			m := configured(t, "2.4.2", "version = 3\n")
			before := m.Files()
			harness.Write(t, m.Root+"/opt/evil/containerd", "#!/bin/sh\ntouch /run/evil\nexec /usr/bin/containerd \"$@\"\n")
			os.Chmod(m.Root+"/opt/evil/containerd", 0o755)
			harness.Output(t, harness.Command(t, "cp", "/bin/cat", m.Root+"/opt/evil/program"))
			harness.Output(t, harness.Command(t, "mkfifo", m.Root+"/opt/evil/input"))
			harness.Output(t, harness.Command(t, "chown", "-R", "65534", m.Root+"/opt/evil"))
			p := m.Start(t, asUser[0], append(asUser[1:], "bash", "-c", "exec -a /opt/evil/containerd /opt/evil/program <>/opt/evil/input")...)
			harness.Await(t, "the user's program", func() error {
				found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
				for _, file := range found {
					if text, err := os.ReadFile(file); err == nil && string(text) == "/opt/evil/containerd\x00" {
						return nil
					}
				}
				return os.ErrNotExist
			})
			out := harness.Output(t, m.Run("pilot", "node", "install"))
			if _, err := os.Stat(m.Root + "/run/evil"); err == nil {
				t.Errorf("the user's program was run as root: %s", out)
			}
			if state := harness.Read(t, m.Root+"/var/lib/pilot/node.json"); strings.Contains(state, "evil") {
				t.Errorf("noted: %s", state)
			}
			harness.Output(t, m.Run("pilot", "node", "uninstall"))
			m.CheckFiles(before)
			p.Stop(t)
		})
	}
}

// TestNodePilotIsALink installs through root's link to a pilot that a user can replace.
func TestNodePilotIsALink(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.4.2", "version = 3\n")
	before := m.Files()
	harness.Output(t, harness.Command(t, "install", "-D", filepath.Join(harness.Bin, "pilot"), m.Root+"/opt/theirs/pilot"))
	harness.Output(t, harness.Command(t, "chown", "65534", m.Root+"/opt/theirs"))
	harness.Output(t, harness.Command(t, "ln", "-s", "/opt/theirs/pilot", m.Root+"/usr/local/sbin/pilot"))
	harness.ExpectFailure(t, m.Run("/usr/local/bin/pilot", "node", "install", "--pilot-binary", "/usr/local/sbin/pilot"), "users other than root can change /opt/theirs")
	m.CheckFiles(before)
}

// TestNodeFindsTheConfiguration installs for a containerd that was started with a relative
// path, and for one that is named and does not run.
func TestNodeFindsTheConfiguration(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.4.2", "version = 3\n")
	harness.Write(t, m.Root+"/opt/c/config.toml", "version = 3\n")
	before := m.Files()
	m.Start(t, "sh", "-c", "cd /opt/c; exec containerd --config config.toml")
	harness.Await(t, "containerd", harness.Reachable(m.Root+"/run/containerd/containerd.sock"))
	harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--containerd-address", "/run/none.sock"), "/run/none.sock is unknown", "/run/containerd/containerd.sock")
	m.CheckFiles(before)
	harness.ExpectFailure(t, m.Run("pilot", "node", "install", "--now", "--containerd-address", "/run/containerd/containerd.sock"), "systemd, which does not run here")
	m.CheckFiles(before)
	harness.Output(t, m.Run("pilot", "node", "install", "--containerd-address", "/run/containerd/containerd.sock"))
	if got := harness.Read(t, m.Root+"/opt/c/config.toml"); !strings.Contains(got, "/opt/c/conf.d/pilot*.toml") {
		t.Errorf("its configuration: %s", got)
	}
	// Short-lived processes of containerd are not other containerds.
	m.Start(t, "sh", "-c", "while :; do containerd --version; containerd --help; done")
	for range 5 {
		harness.Output(t, m.Run("pilot", "node", "install"))
	}
	// pilot and containerd's plugin decide by the record until they have stopped.
	record := harness.Write(t, m.Root+"/var/lib/pilot/layers", "of layers")
	out := harness.Output(t, m.Run("pilot", "node", "uninstall"))
	if got := harness.Read(t, record); got != "of layers" {
		t.Errorf("the record of layers has become %q", got)
	}
	_, last, ok := strings.Cut(out, "  rm -f /var/lib/pilot/layers")
	if !ok {
		t.Fatalf("uninstall does not say how to remove the record of layers: %s", out)
	}
	harness.Output(t, m.Run("sh", "-ec", "rm -f /var/lib/pilot/layers"+last))
	m.CheckFiles(before)
}

// TestNodeUnusualImports installs with unusual lists of imports.
func TestNodeUnusualImports(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "")
	for name, text := range map[string]string{
		"quoted":    "version = 2\n\"imports\" = [\"/etc/containerd/x/a*.toml\"]\n",
		"CRLF":      "version = 2\r\nimports = [\"/etc/containerd/x/a*.toml\"]\r\n\r\n[debug]\r\n",
		"many":      "version = 2\nimports = [\n # '/a.toml',\n \"\"\"/etc/containerd/x/a*.toml\"\"\" # c\n , '/etc/containerd/y/a*.toml' ]\n",
		"anything":  "version = 2\nimports = [\"/etc/containerd/conf.d/*\"]\n",
		"dotted":    "plugins.\"io.containerd.grpc.v1.cri\".sandbox_image = \"x/y:1\"\nversion = 2\ngrpc.uid = 0\n",
		"in a line": "version = 2\nplugins = { \"io.containerd.grpc.v1.cri\" = { sandbox_image = \"x/y:1\" } }\n",
	} {
		harness.Write(t, m.Root+containerdConfig, text)
		n := &installedNode{m: m, version: "2.2.9"}
		before, untouched := m.Files(), n.dump(t)
		harness.Output(t, m.Pilot("node", "install"))
		n.onlyPilotDiffers(t, name, untouched)
		if dump := m.CheckUnits(); !strings.Contains(dump, "pilot") {
			t.Errorf("%s: %s", name, dump)
		}
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
	}
	// This edit would break containerd, and is reverted.
	harness.Write(t, m.Root+containerdConfig, "version = 2\n\"imp\\u006frts\" = ['/etc/containerd/x/a*.toml']\n")
	before := m.Files()
	harness.ExpectFailure(t, m.Pilot("node", "install"), containerdConfig+": pilot can't edit its list of imports", `add "/etc/containerd/conf.d/pilot*.toml"`)
	m.CheckFiles(before)
}

// TestNodeChangedMeanwhile lets another tool write containerd's configuration while pilot
// is installed: what the tool wrote stays.
func TestNodeChangedMeanwhile(t *testing.T) {
	t.Parallel()
	const another = "# of another tool\n"
	t.Run("before it is written", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		script(m, `case "$*" in *pilot-trial*)
	grep -q another `+containerdConfig+` || echo "`+strings.TrimSpace(another)+`" >>`+containerdConfig+`;;
esac
exec /usr/bin/containerd.real "$@"
`)
		before := m.Files()
		harness.ExpectFailure(t, m.Run("pilot", "node", "install"), containerdConfig+": it was changed in the meantime", "run this again")
		if got := harness.Read(t, m.Root+containerdConfig); got != "version = 2\n"+another {
			t.Errorf("it is %q", got)
		}
		harness.Write(t, m.Root+containerdConfig, "version = 2\n")
		m.CheckFiles(before)
	})
	t.Run("before it is put back", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		script(m, `case "$*" in "--config `+containerdConfig+` config dump")
	grep -q another `+containerdConfig+` || echo "`+strings.TrimSpace(another)+`" >>`+containerdConfig+`
	exit 1;;
esac
exec /usr/bin/containerd.real "$@"
`)
		before := m.Files()
		harness.ExpectFailure(t, m.Run("pilot", "node", "install"), containerdConfig+" could not be reverted", `run "pilot node uninstall" to revert the rest`)
		script(m, "exec /usr/bin/containerd.real \"$@\"\n")
		harness.Output(t, m.Run("pilot", "node", "uninstall"))
		if got := harness.Read(t, m.Root+containerdConfig); got != "version = 2\n"+another {
			t.Errorf("it is %q", got)
		}
		harness.Write(t, m.Root+containerdConfig, "version = 2\n")
		m.CheckFiles(before)
	})
	t.Run("by hand", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		harness.Output(t, m.Pilot("node", "install"))
		edited := strings.ReplaceAll(harness.Read(t, m.Root+containerdConfig), "'", `"`)
		harness.Write(t, m.Root+containerdConfig, edited)
		harness.ExpectFailure(t, m.Pilot("node", "uninstall"), "remove /etc/containerd/conf.d/pilot*.toml from its imports yourself")
		if got := harness.Read(t, m.Root+containerdConfig); got != edited {
			t.Errorf("it is %q", got)
		}
	})
}

// TestNodeContainerdHangs uses a containerd whose program hangs: nothing waits for it
// longer than systemd waits for containerd to start.
func TestNodeContainerdHangs(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	harness.Output(t, m.Pilot("node", "install"))
	installed := m.Files()
	// The process that hangs is a child of the one that is killed.
	script(m, "case \"$*\" in *config*) sleep 1000;; *) exec /usr/bin/containerd.real \"$@\";; esac\n")
	began := time.Now()
	harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "containerd's configuration")
	if took := time.Since(began); took > 85*time.Second {
		t.Errorf("refresh took %v", took)
	}
	m.CheckFiles(installed)
	// As on a busy node: refresh runs out of time, sooner or later, and changes nothing.
	script(m, "case \"$*\" in *config*) sleep 15;; esac\nexec /usr/bin/containerd.real \"$@\"\n")
	harness.Write(t, m.Root+containerdConfig, "version = 2\n")
	installed = m.Files()
	began = time.Now()
	harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "containerd's configuration")
	if took := time.Since(began); took > 85*time.Second {
		t.Errorf("refresh took %v", took)
	}
	m.CheckFiles(installed)
}

// TestNodeRefreshFollowsUnit changes the program that the unit starts, as after switching
// to upstream's containerd.
func TestNodeRefreshFollowsUnit(t *testing.T) {
	t.Parallel()
	m := configured(t, "1.7", "version = 2\n")
	harness.Output(t, m.Pilot("node", "install"))
	harness.Output(t, harness.Command(t, "install", filepath.Join(harness.Tools, "containerd-2.2.9/containerd"), m.Root+"/usr/local/bin/containerd"))
	harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
	harness.Output(t, m.Run("pilot", "node", "refresh"))
	if got := harness.Read(t, m.Root+"/etc/containerd/conf.d/pilot.toml"); !strings.Contains(got, "unpack_config") {
		t.Errorf("for 2.2, which the unit starts: %s", got)
	}
}

// TestNodeOfEarlierVersion refreshes the installation of a version of pilot that did not
// record its containerd, while another than containerd.service's runs.
func TestNodeOfEarlierVersion(t *testing.T) {
	t.Parallel()
	const ofK3s = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.Files()
	harness.Output(t, m.Pilot("node", "install"))
	var state map[string]any
	if err := json.Unmarshal([]byte(harness.Read(t, m.Root+"/var/lib/pilot/node.json")), &state); err != nil {
		t.Fatal(err)
	}
	delete(state, "containerd")
	noted, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	harness.Write(t, m.Root+"/var/lib/pilot/node.json", string(noted))
	installed := m.Files()
	harness.Write(t, m.Root+ofK3s, harness.Read(t, "../testdata/nodes/v3-k3s.toml"))
	containerd(t, m, "/run/k3s/containerd/containerd.sock", "-c", ofK3s)
	harness.Output(t, m.Run("pilot", "node", "refresh"))
	m.CheckFiles(installed)
	if _, err := os.Stat(m.Root + filepath.Dir(ofK3s) + "/config-v3.toml.d"); err == nil {
		t.Error("k3s' containerd was set up")
	}
	harness.Output(t, m.Run("pilot", "node", "uninstall"))
	m.CheckFiles(before)
}

// TestNodeWithReadOnlyTmp installs on a machine whose /tmp is read-only.
func TestNodeWithReadOnlyTmp(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.Files()
	m.Mount("tmpfs", "tmp", "tmpfs", syscall.MS_RDONLY, "")
	harness.Output(t, m.Pilot("node", "install"))
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
}

// requiresWhatIsThere checks that containerd asks pilot only if something starts that: else it
// pulls nothing. It requires pilot's NRI plugin only if that is there: else it creates no
// container.
func requiresWhatIsThere(t *testing.T, m *harness.Machine) {
	t.Helper()
	b, err := os.ReadFile(m.Root + "/etc/containerd/conf.d/pilot.toml")
	if err != nil {
		return
	}
	for _, path := range []string{"multi-user.target.wants/pilot.service", "containerd.service.d/pilot.conf"} {
		if _, err := os.Lstat(m.Root + "/etc/systemd/system/" + path); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(string(b), "required_plugins") {
		return
	}
	if _, err := os.Stat(m.Root + nriPlugin); err != nil {
		t.Error(err)
	}
}

// TestNodeKilled kills an installation at any moment: containerd can read its
// configuration, and uninstalling restores everything.
func TestNodeKilled(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", harness.Read(t, "../testdata/nodes/v2-cri-no-imports.toml"))
	before := m.Files()
	began := time.Now()
	harness.Output(t, m.Pilot("node", "install"))
	took := time.Since(began)
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
	// The file that a killed writer leaves.
	harness.Output(t, m.Pilot("node", "install"))
	for _, file := range []string{"/etc/containerd/.config.toml.pilot-new", "/etc/containerd/conf.d/.pilot.toml.pilot-new", "/var/lib/pilot/.node.json.pilot-new"} {
		harness.Write(t, m.Root+file, "half a f")
	}
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
	// An installation that is killed when it has written its record alone leaves nothing that
	// has containerd ask pilot, now or later.
	harness.Output(t, m.Pilot("node", "install"))
	recorded := harness.Read(t, m.Root+"/var/lib/pilot/node.json")
	harness.Output(t, m.Pilot("node", "uninstall"))
	harness.Write(t, m.Root+"/var/lib/pilot/node.json", recorded)
	harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "was interrupted", "pilot node install")
	requiresWhatIsThere(t, m)
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
	// The same, killed before and during its first write.
	for _, retry := range []bool{false, true} {
		for _, begun := range []bool{false, true} {
			if err := os.MkdirAll(m.Root+"/var/lib/pilot", 0o700); err != nil {
				t.Fatal(err)
			}
			if begun {
				harness.Write(t, m.Root+"/var/lib/pilot/.node.json.pilot-new", "half a f")
			}
			if retry {
				harness.Output(t, m.Pilot("node", "install"))
			}
			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
		}
	}
	const times = 10
	for i := range times {
		cmd := m.Pilot("node", "install", "--workloads")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(took * time.Duration(i+1) / times)
		cmd.Process.Kill()
		cmd.Wait()
		m.CheckUnits()
		requiresWhatIsThere(t, m)
		if i%2 == 0 {
			if out, err := m.Run("pilot", "node", "refresh").CombinedOutput(); err != nil && !strings.Contains(string(out), "was interrupted") {
				t.Fatalf("refresh: %v: %s", err, out)
			}
			requiresWhatIsThere(t, m)
		} else {
			harness.Output(t, m.Pilot("node", "install"))
		}
		cmd = m.Pilot("node", "uninstall")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(took * time.Duration(i+1) / times)
		cmd.Process.Kill()
		cmd.Wait()
		requiresWhatIsThere(t, m)
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
		if t.Failed() {
			t.Fatalf("killed after %d/%d of %v", i+1, times, took)
		}
	}
}
