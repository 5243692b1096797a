package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const containerdConfig = "/etc/containerd/config.toml"

// configured makes a machine with a configuration of containerd's.
func configured(t *testing.T, version, text string) *machine {
	t.Helper()
	m := machines()[version](t)
	os.RemoveAll(m.root + "/etc/containerd")
	write(t, m.root+containerdConfig, text)
	return m
}

// script puts a script in the place of the machine's containerd, which is
// containerd.real from then on.
func (m *machine) script(text string) {
	m.t.Helper()
	program := m.root + "/usr/bin/containerd"
	if _, err := os.Stat(program + ".real"); err != nil {
		output(m.t, command(m.t, "mv", program, program+".real"))
	}
	write(m.t, program, "#!/bin/sh\n"+text)
	if err := os.Chmod(program, 0o755); err != nil {
		m.t.Fatal(err)
	}
}

// TestNodeTrustsNoOtherUser has a user start a program under the name of a
// containerd of theirs, which must not be run as root.
func TestNodeTrustsNoOtherUser(t *testing.T) {
	t.Parallel()
	for name, asUser := range map[string][]string{
		"user":      {"setpriv", "--reuid=65534", "--clear-groups"},
		"half root": {"setpriv", "--ruid=65534"},
	} {
		t.Run(name, func(t *testing.T) {
			m := configured(t, "2.4.2", "version = 3\n")
			before := m.files()
			write(t, m.root+"/opt/evil/containerd", "#!/bin/sh\ntouch /run/evil\nexec /usr/bin/containerd \"$@\"\n")
			os.Chmod(m.root+"/opt/evil/containerd", 0o755)
			output(t, command(t, "cp", "/bin/cat", m.root+"/opt/evil/program"))
			output(t, command(t, "mkfifo", m.root+"/opt/evil/input"))
			output(t, command(t, "chown", "-R", "65534", m.root+"/opt/evil"))
			p := m.start(t, asUser[0], append(asUser[1:], "bash", "-c", "exec -a /opt/evil/containerd /opt/evil/program <>/opt/evil/input")...)
			await(t, "the user's program", func() error {
				found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
				for _, file := range found {
					if text, err := os.ReadFile(file); err == nil && string(text) == "/opt/evil/containerd\x00" {
						return nil
					}
				}
				return os.ErrNotExist
			})
			out := output(t, m.run("pilot", "node", "install"))
			if _, err := os.Stat(m.root + "/run/evil"); err == nil {
				t.Errorf("the user's program was run as root: %s", out)
			}
			if state := read(t, m.root+"/var/lib/pilot/node.json"); strings.Contains(state, "evil") {
				t.Errorf("noted: %s", state)
			}
			output(t, m.run("pilot", "node", "uninstall"))
			m.same(before)
			p.stop(t)
		})
	}
}

// TestNodePilotIsALink installs with a link of root's to a pilot that a user can
// replace.
func TestNodePilotIsALink(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.4.2", "version = 3\n")
	before := m.files()
	output(t, command(t, "install", "-D", filepath.Join(bin, "pilot"), m.root+"/opt/theirs/pilot"))
	output(t, command(t, "chown", "65534", m.root+"/opt/theirs"))
	output(t, command(t, "ln", "-s", "/opt/theirs/pilot", m.root+"/usr/local/sbin/pilot"))
	fails(t, m.run("/usr/local/bin/pilot", "node", "install", "--pilot-binary", "/usr/local/sbin/pilot"), "others than root can change /opt/theirs")
	m.same(before)
}

// TestNodeFindsTheConfiguration installs for a containerd that was started with a
// relative path, and for one that is named and is not there.
func TestNodeFindsTheConfiguration(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.4.2", "version = 3\n")
	write(t, m.root+"/opt/c/config.toml", "version = 3\n")
	before := m.files()
	m.start(t, "sh", "-c", "cd /opt/c; exec containerd --config config.toml")
	await(t, "containerd", answers(m.root+"/run/containerd/containerd.sock"))
	fails(t, m.run("pilot", "node", "install", "--containerd-address", "/run/none.sock"), "/run/none.sock is not known", "/run/containerd/containerd.sock")
	m.same(before)
	output(t, m.run("pilot", "node", "install", "--containerd-address", "/run/containerd/containerd.sock"))
	if got := read(t, m.root+"/opt/c/config.toml"); !strings.Contains(got, "/opt/c/conf.d/pilot*.toml") {
		t.Errorf("its configuration: %s", got)
	}
	// Those that come and go while it looks are no other containerds.
	m.start(t, "sh", "-c", "while :; do containerd --version; containerd --help; done")
	for range 5 {
		output(t, m.run("pilot", "node", "install"))
	}
	output(t, m.run("pilot", "node", "uninstall"))
	m.same(before)
}

// TestNodeOddImports installs with imports as nobody should write them.
func TestNodeOddImports(t *testing.T) {
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
		write(t, m.root+containerdConfig, text)
		n := &installedNode{m: m, version: "2.2.9"}
		before, untouched := m.files(), n.dump(t)
		output(t, m.pilot("node", "install"))
		n.onlyPilotDiffers(t, name, untouched)
		if dump := m.loads(); !strings.Contains(dump, "pilot") {
			t.Errorf("%s: %s", name, dump)
		}
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
	}
	// This one was written as it would break containerd, and put back.
	write(t, m.root+containerdConfig, "version = 2\n\"imp\\u006frts\" = ['/etc/containerd/x/a*.toml']\n")
	before := m.files()
	fails(t, m.pilot("node", "install"), containerdConfig+": its imports are written in a way", `add "/etc/containerd/conf.d/pilot*.toml"`)
	m.same(before)
}

// TestNodeChangedMeanwhile has another tool write containerd's configuration while
// pilot is installed: what it wrote stays.
func TestNodeChangedMeanwhile(t *testing.T) {
	t.Parallel()
	const another = "# of another tool\n"
	t.Run("before it is written", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		m.script(`case "$*" in *pilot-trial*)
	grep -q another ` + containerdConfig + ` || echo "` + strings.TrimSpace(another) + `" >>` + containerdConfig + `;;
esac
exec /usr/bin/containerd.real "$@"
`)
		before := m.files()
		fails(t, m.run("pilot", "node", "install"), containerdConfig+": somebody else has changed it in the meantime", "run this again")
		if got := read(t, m.root+containerdConfig); got != "version = 2\n"+another {
			t.Errorf("it is %q", got)
		}
		write(t, m.root+containerdConfig, "version = 2\n")
		m.same(before)
	})
	t.Run("before it is put back", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		m.script(`case "$*" in "--config ` + containerdConfig + ` config dump")
	grep -q another ` + containerdConfig + ` || echo "` + strings.TrimSpace(another) + `" >>` + containerdConfig + `
	exit 1;;
esac
exec /usr/bin/containerd.real "$@"
`)
		before := m.files()
		fails(t, m.run("pilot", "node", "install"), containerdConfig+" is not put back", `"pilot node uninstall" puts back what is left`)
		m.script("exec /usr/bin/containerd.real \"$@\"\n")
		output(t, m.run("pilot", "node", "uninstall"))
		if got := read(t, m.root+containerdConfig); got != "version = 2\n"+another {
			t.Errorf("it is %q", got)
		}
		write(t, m.root+containerdConfig, "version = 2\n")
		m.same(before)
	})
	t.Run("by hand", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\n")
		output(t, m.pilot("node", "install"))
		edited := strings.ReplaceAll(read(t, m.root+containerdConfig), "'", `"`)
		write(t, m.root+containerdConfig, edited)
		fails(t, m.pilot("node", "uninstall"), "take /etc/containerd/conf.d/pilot*.toml out of its imports yourself")
		if got := read(t, m.root+containerdConfig); got != edited {
			t.Errorf("it is %q", got)
		}
	})
}

// TestNodeContainerdHangs has containerd's program not answer: nothing waits for
// it longer than systemd waits for containerd to start.
func TestNodeContainerdHangs(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	output(t, m.pilot("node", "install"))
	installed := m.files()
	// The program that hangs is not the one that is killed.
	m.script("case \"$*\" in *config*) sleep 1000;; *) exec /usr/bin/containerd.real \"$@\";; esac\n")
	began := time.Now()
	fails(t, m.run("pilot", "node", "refresh"), "containerd's configuration")
	if took := time.Since(began); took > 85*time.Second {
		t.Errorf("refresh took %v", took)
	}
	m.same(installed)
	// Slow is what a busy node is; refresh gives up as a whole, and changes nothing.
	m.script("case \"$*\" in *config*) sleep 15;; esac\nexec /usr/bin/containerd.real \"$@\"\n")
	write(t, m.root+containerdConfig, "version = 2\n")
	installed = m.files()
	began = time.Now()
	fails(t, m.run("pilot", "node", "refresh"), "stays as it was")
	if took := time.Since(began); took > 85*time.Second {
		t.Errorf("refresh took %v", took)
	}
	m.same(installed)
}

// TestNodeRefreshFollowsUnit has the unit start another program than when pilot
// was installed, as after an upgrade to the release of upstream.
func TestNodeRefreshFollowsUnit(t *testing.T) {
	t.Parallel()
	m := configured(t, "1.7", "version = 2\n")
	output(t, m.pilot("node", "install"))
	output(t, command(t, "install", filepath.Join(tools, "containerd-2.2.9/containerd"), m.root+"/usr/local/bin/containerd"))
	write(t, m.root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
	output(t, m.run("pilot", "node", "refresh"))
	if got := read(t, m.root+"/etc/containerd/conf.d/pilot.toml"); !strings.Contains(got, "unpack_config") {
		t.Errorf("for 2.2, which the unit starts: %s", got)
	}
}

// TestNodeOfEarlierVersion refreshes what a version of pilot installed that did
// not note for which containerd, while another than containerd.service's runs.
func TestNodeOfEarlierVersion(t *testing.T) {
	t.Parallel()
	const ofK3s = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.files()
	output(t, m.pilot("node", "install"))
	var state map[string]any
	if err := json.Unmarshal([]byte(read(t, m.root+"/var/lib/pilot/node.json")), &state); err != nil {
		t.Fatal(err)
	}
	delete(state, "containerd")
	noted, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	write(t, m.root+"/var/lib/pilot/node.json", string(noted))
	installed := m.files()
	write(t, m.root+ofK3s, read(t, "testdata/nodes/v3-k3s.toml"))
	m.containerd(t, "/run/k3s/containerd/containerd.sock", "-c", ofK3s)
	output(t, m.run("pilot", "node", "refresh"))
	m.same(installed)
	if _, err := os.Stat(m.root + filepath.Dir(ofK3s) + "/config-v3.toml.d"); err == nil {
		t.Error("k3s' containerd was set up")
	}
	output(t, m.run("pilot", "node", "uninstall"))
	m.same(before)
}

// TestNodeNowhereToTry installs on a machine whose /tmp is
// read-only.
func TestNodeNowhereToTry(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.files()
	m.mount("tmpfs", "tmp", "tmpfs", syscall.MS_RDONLY, "")
	output(t, m.pilot("node", "install"))
	output(t, m.pilot("node", "uninstall"))
	m.same(before)
}

// TestNodeKilled kills an installation at any time: containerd can read its
// configuration, and uninstalling puts everything back.
func TestNodeKilled(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", read(t, "testdata/nodes/v2-cri-no-imports.toml"))
	before := m.files()
	began := time.Now()
	output(t, m.pilot("node", "install"))
	took := time.Since(began)
	output(t, m.pilot("node", "uninstall"))
	m.same(before)
	// What a writer leaves that is killed while it writes.
	output(t, m.pilot("node", "install"))
	for _, file := range []string{"/etc/containerd/.config.toml.pilot-new", "/etc/containerd/conf.d/.pilot.toml.pilot-new", "/var/lib/pilot/.node.json.pilot-new"} {
		write(t, m.root+file, "half a f")
	}
	output(t, m.pilot("node", "uninstall"))
	m.same(before)
	// The same, killed before and in its first write.
	for _, retry := range []bool{false, true} {
		for _, begun := range []bool{false, true} {
			if err := os.MkdirAll(m.root+"/var/lib/pilot", 0o700); err != nil {
				t.Fatal(err)
			}
			if begun {
				write(t, m.root+"/var/lib/pilot/.node.json.pilot-new", "half a f")
			}
			if retry {
				output(t, m.pilot("node", "install"))
			}
			output(t, m.pilot("node", "uninstall"))
			m.same(before)
		}
	}
	const times = 10
	for i := range times {
		cmd := m.pilot("node", "install")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(took * time.Duration(i+1) / times)
		cmd.Process.Kill()
		cmd.Wait()
		m.loads()
		if i%2 == 0 {
			output(t, m.run("pilot", "node", "refresh"))
		} else {
			output(t, m.pilot("node", "install"))
		}
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
		if t.Failed() {
			t.Fatalf("killed after %d/%d of %v", i+1, times, took)
		}
	}
}
