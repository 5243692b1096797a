package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/opencontainers/go-digest"
)

// TestNodeInstall sets machines up with one command, pulls and runs with each client, and
// uninstalls.
func TestNodeInstall(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	var images []string
	for _, k := range harness.LayerKinds {
		images = append(images, c.Image(k, "provider:pilot:team-a"))
	}
	for version, make := range harness.Machines() {
		t.Run(version, func(t *testing.T) {
			m := make(t)
			before := m.Files()
			m.BrokerAt(c.BrokerURL)

			diff := harness.Output(t, m.Pilot("node", "install", "--dry-run"))
			if !strings.Contains(diff, "+++ /etc/containerd/conf.d/pilot.toml") {
				t.Errorf("dry run: %s", diff)
			}
			m.CheckFiles(before)
			harness.Output(t, m.Pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
			after := m.Files()
			if out := harness.Output(t, m.Pilot("node", "install")); !strings.Contains(out, "nothing to change") {
				t.Errorf("a second time: %s", out)
			}
			m.CheckFiles(after)
			units := []string{"pilot.service", "pilot-keyprovider.socket"}
			if version != "1.6" {
				units = append(units, "pilot-diff.socket")
			}
			// Problems of other units do not matter here.
			if out := harness.CombinedOutput(t, harness.Command(t, "systemd-analyze", append([]string{"verify", "--man=no", "--root=" + m.Root}, units...)...)); strings.Contains(harness.UnknownSettings.ReplaceAllString(strings.ReplaceAll(out, m.Root, ""), ""), "pilot") {
				t.Errorf("systemd-analyze verify: %s", out)
			}

			n := up(t, m)
			if out := harness.Output(t, m.Run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") || !strings.Contains(out, "ok       layer") {
				t.Errorf("doctor: %s", out)
			}
			for i, image := range images {
				if testing.Short() && version != "1.6" && version != "2.4.2" && harness.LayerKinds[i].Name != "gzip" {
					continue // these two pull all kinds, by the stream processor and by the differ
				}
				harness.Output(t, n.Crictl("pull", image))
				if out := harness.ContainerOutput(t, m.Run("ctr", "--namespace", "k8s.io", "run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
					t.Errorf("crictl, %s: %s", image, out)
				}
				harness.Output(t, n.Crictl("rmi", image))
				pulls := [][]string{{"ctr-pilot", "images", "pull", "--plain-http", image}}
				if version != "1.6" {
					pulls = append(pulls, []string{"ctr", "images", "pull", "--local", "--plain-http", image})
				}
				if version == "2.4.2" {
					pulls = append(pulls, []string{"ctr", "images", "pull", "--plain-http", image})
				}
				for _, pull := range pulls {
					harness.Output(t, m.Run(pull[0], pull[1:]...))
					if out := harness.ContainerOutput(t, m.Run("ctr", "run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
						t.Errorf("%s, %s: %s", pull, image, out)
					}
					harness.Output(t, m.Run("ctr", "images", "remove", "--sync", image))
				}
			}

			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
			if out := harness.Output(t, m.Pilot("node", "uninstall")); !strings.Contains(out, "nothing is installed") {
				t.Errorf("uninstalled twice: %s", out)
			}
		})
	}
}

// TestNodeInstallsAgainOverChanges installs, changes files as an admin or a newer containerd would, and
// installs or uninstalls again.
func TestNodeInstallsAgainOverChanges(t *testing.T) {
	t.Parallel()
	const conf = "/etc/containerd/config.toml"
	t.Run("rewritten", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Output(t, m.Pilot("node", "install"))
		harness.Write(t, m.Root+conf, strings.ReplaceAll(harness.Read(t, m.Root+conf), "'", `"`))
		harness.ExpectFailure(t, m.Pilot("node", "uninstall"), conf+" was changed since")
		if strings.Contains(m.CheckUnits(), "diff.sock") {
			t.Error("pilot is still configured")
		}
		harness.Write(t, m.Root+conf, "version = 3\n")
		harness.Output(t, m.Pilot("node", "uninstall"))
	})
	t.Run("still needed", func(t *testing.T) {
		// The drop-in can't be removed, so nothing else is.
		m := harness.Machines()["2.4.2"](t)
		harness.Output(t, m.Pilot("node", "install"))
		dropIn := m.Root + "/etc/containerd/conf.d/pilot.toml"
		harness.Write(t, dropIn, harness.Read(t, dropIn)+"# mine\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "uninstall"), "/etc/containerd/conf.d/pilot.toml was changed since")
		m.CheckFiles(before)
	})
	t.Run("a package comes", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Output(t, m.Pilot("node", "install"))
		harness.Write(t, m.Root+"/usr/lib/systemd/system/pilot.service", "[Service]\nExecStart=/usr/bin/pilot serve\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install"), "/etc/systemd/system/pilot.service", "from an earlier installation", "pilot node uninstall --keep-config")
		m.CheckFiles(before)
	})
	t.Run("made, then added to", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		os.Remove(m.Root + conf)
		harness.Output(t, m.Pilot("node", "install"))
		harness.Write(t, m.Root+conf, harness.Read(t, m.Root+conf)+"oom_score = 1\n")
		harness.Output(t, m.Pilot("node", "uninstall"))
		if got := harness.Read(t, m.Root+conf); !strings.Contains(got, "oom_score = 1") || strings.Contains(got, "pilot") {
			t.Errorf("left: %s", got)
		}
		m.CheckUnits()
	})
	t.Run("replaced between", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Output(t, m.Pilot("node", "install"))
		harness.Write(t, m.Root+conf, "version = 3\noom_score = 7\n")
		harness.Output(t, m.Pilot("node", "install"))
		if dump := m.CheckUnits(); !strings.Contains(dump, "diff.sock") {
			t.Errorf("pilot is not configured: %s", dump)
		}
		harness.Output(t, m.Pilot("node", "uninstall"))
		if got := harness.Read(t, m.Root+conf); got != "version = 3\noom_score = 7\n" {
			t.Errorf("left: %s", got)
		}
	})
	t.Run("other socket", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Write(t, m.Root+conf, "version = 3\n[grpc]\n  address = '/run/other.sock'\n")
		harness.Output(t, m.Pilot("node", "install"))
		if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); !strings.Contains(got, `containerd = "/run/other.sock"`) {
			t.Errorf("pilot.toml: %s", got)
		}
		// The default one again.
		harness.Write(t, m.Root+conf, "version = 3\n")
		harness.Output(t, m.Pilot("node", "install"))
		if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); strings.Contains(got, "containerd = ") {
			t.Errorf("pilot.toml: %s", got)
		}
	})
	t.Run("newer containerd", func(t *testing.T) {
		m := harness.Machines()["1.6"](t)
		before := m.Files()
		harness.Output(t, m.Pilot("node", "install", "--broker", "https://copilot.example.com"))
		m.Upgrade("bin")
		harness.Output(t, m.Pilot("node", "install"))
		if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); strings.Contains(got, "off") || !strings.Contains(got, "copilot.example.com") {
			t.Errorf("pilot.toml: %s", got)
		}
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
	})
	t.Run("links", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		outside := harness.TempDir(t)
		harness.Write(t, m.Root+"/opt/cm/config.toml", harness.Read(t, m.Root+conf))
		os.Chown(m.Root+"/opt/cm/config.toml", 1000, 33)
		for link, to := range map[string]string{conf: "/opt/cm/config.toml", "/etc/pilot": outside} {
			os.Remove(m.Root + link)
			if err := os.Symlink(to, m.Root+link); err != nil {
				t.Fatal(err)
			}
		}
		before := m.Files()
		harness.Output(t, m.Pilot("node", "install"))
		if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
			t.Errorf("it wrote outside of the root: %v, %v", entries, err)
		}
		if info, err := os.Stat(m.Root + "/opt/cm/config.toml"); err != nil || info.Sys().(*syscall.Stat_t).Uid != 1000 {
			t.Errorf("the file's owner has changed: %v", err)
		}
		m.CheckUnits()
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
	})
	t.Run("unusable settings", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		before := m.Files()
		for _, args := range [][]string{{"--broker-ca", "ca.pem"}, {"--broker-cert", "/cert.pem"}, {"--pilot-binary", "./pilot"}, {"--containerd-config", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}} {
			harness.ExpectFailure(t, m.Pilot(append([]string{"node", "install"}, args...)...))
		}
		m.CheckFiles(before)
	})
	t.Run("not as root", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		for _, command := range []string{"install", "uninstall", "refresh"} {
			harness.ExpectFailure(t, m.Run("setpriv", "--reuid=65534", "--clear-groups", "pilot", "node", command), "node "+command+" needs root: run sudo pilot node "+command)
		}
	})
	t.Run("without systemd", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		for _, dir := range []string{"/usr/lib/systemd", "/lib/systemd"} {
			os.RemoveAll(m.Root + dir)
		}
		for _, command := range []string{"install", "uninstall"} {
			if out := harness.Output(t, m.Run("pilot", "node", command)); !strings.Contains(out, "there is no systemd here") || strings.Contains(out, "systemctl") {
				t.Errorf("%s: %s", command, out)
			}
		}
	})
	t.Run("two at once", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		before := m.Files()
		first, second := m.Pilot("node", "install"), m.Pilot("node", "install")
		for _, cmd := range []*exec.Cmd{first, second} {
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
		}
		for _, cmd := range []*exec.Cmd{first, second} {
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		}
		if !strings.Contains(m.CheckUnits(), "diff.sock") {
			t.Error("pilot is not configured")
		}
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
	})
}

// TestNodeErofs sets up a machine that unpacks images to EROFS.
func TestNodeErofs(t *testing.T) {
	t.Parallel()
	if !strings.Contains(harness.Read(t, "/proc/filesystems"), "\terofs\n") {
		t.Skip("this machine's kernel has no EROFS")
	}
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	// Debian 13 has an mkfs.erofs that reads tar.
	m := harness.NewMachine(t, filepath.Join(harness.Tools, "trixie"))
	m.Upgrade("bin")
	harness.Write(t, m.Root+"/etc/containerd/config.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'erofs'\n")
	m.BrokerAt(c.BrokerURL)
	harness.Output(t, m.Pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
	n := up(t, m)
	harness.Output(t, m.Run("pilot", "node", "doctor", "--kek", "team-a"))
	for _, k := range harness.LayerKinds {
		image := c.Image(k, "provider:pilot:team-a")
		plain := image + "-plain"
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
		c.Secrets[plain] = c.Secrets[image]
		for _, name := range []string{image, plain} {
			harness.Output(t, n.Crictl("pull", name))
			harness.Output(t, n.Crictl("rmi", name))
			for _, pull := range [][]string{{"images", "pull", "--plain-http", name}, {"images", "pull", "--local", "--plain-http", name}} {
				harness.Output(t, m.Run("ctr", append(pull, "--snapshotter", "erofs")...))
				if out := harness.ContainerOutput(t, m.Run("ctr", "run", "--rm", "--snapshotter", "erofs", name, harness.ContainerID())); !strings.Contains(out, c.Secrets[name]) {
					t.Errorf("%s, %s: %s", pull, name, out)
				}
				harness.Output(t, m.Run("ctr", "images", "remove", "--sync", name))
			}
		}
		harness.ExpectFailure(t, n.Crictl("pull", c.Tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })), "pilot: layer sha256:", "HMAC does not match")
	}

	// Layers that are EROFS file systems.
	hello, err := os.ReadFile(filepath.Join(harness.Bin, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	for _, mediaType := range []string{"application/vnd.erofs.layer.v1", "application/vnd.erofs.layer.v1+zstd"} {
		secret := harness.NewSecret()
		harness.Write(t, m.Root+"/root/layer/hello", string(hello))
		if err := os.Chmod(m.Root+"/root/layer/hello", 0o755); err != nil {
			t.Fatal(err)
		}
		harness.Write(t, m.Root+"/root/layer/secret", secret)
		harness.Output(t, m.Run("mkfs.erofs", "/root/layer.erofs", "/root/layer"))
		plain := []byte(harness.Read(t, m.Root+"/root/layer.erofs"))
		blob := plain
		if strings.HasSuffix(mediaType, "zstd") {
			blob = harness.Zstd(t, plain)
		}
		l := harness.NewLayout(t)
		config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{
			"architecture": harness.Arch, "os": "linux", "config": harness.Object{"Cmd": []string{"/hello"}},
			"rootfs": harness.Object{"type": "layers", "diff_ids": []string{digest.FromBytes(plain).String()}},
		})
		image := l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []harness.Object{l.Blob(mediaType, blob)},
		})
		name := fmt.Sprintf("%s/native:%d", c.Registry, len(blob))
		c.Publish(l, name, image, "provider:pilot:team-a")
		if info := harness.Output(t, c.CtrPilot("images", "layerinfo", "--json", "--require-encrypted", name)); !strings.Contains(info, mediaType+"+encrypted") {
			t.Errorf("layerinfo: %s", info)
		}
		harness.Output(t, n.Crictl("pull", name))
		harness.Output(t, n.Crictl("rmi", name))
		for _, pull := range [][]string{{"images", "pull", "--plain-http", name}, {"images", "pull", "--local", "--plain-http", name}} {
			harness.Output(t, m.Run("ctr", append(pull, "--snapshotter", "erofs")...))
			if out := harness.ContainerOutput(t, m.Run("ctr", "run", "--rm", "--snapshotter", "erofs", name, harness.ContainerID())); !strings.Contains(out, secret) {
				t.Errorf("%s, %s: %s", pull, name, out)
			}
			harness.Output(t, m.Run("ctr", "images", "remove", "--sync", name))
		}
		harness.ExpectFailure(t, m.Run("ctr", "images", "pull", "--plain-http", "--local", "--snapshotter", "overlayfs", name), "is for the snapshotter erofs")
		for _, change := range []func(b []byte) []byte{
			func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
			func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
			func(b []byte) []byte { return b[:len(b)-1] },
		} {
			harness.ExpectFailure(t, n.Crictl("pull", c.Tamper(name, change)), "pilot: layer sha256:", "HMAC does not match")
		}
	}
}

// TestNodeConflicts installs on machines with settings that are in the way, and with
// others that are not.
func TestNodeConflicts(t *testing.T) {
	t.Parallel()
	const conf = "etc/containerd/config.toml"
	for name, test := range map[string]struct {
		version string
		files   map[string]string
		want    string // empty: it works
	}{
		"other proxy plugin": {"2.4.2", map[string]string{conf: "version = 3\n[proxy_plugins.pilot]\n  type = 'snapshot'\n  address = '/x.sock'\n"}, "/etc/containerd/config.toml: there is a proxy plugin pilot of type snapshot at /x.sock: remove it"},
		"other differ":       {"2.4.2", map[string]string{conf: "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/" + harness.Arch + "'\n  snapshotter = 'overlayfs'\n  differ = 'other'\n"}, "with the differ other"},
		"own drop-in":        {"2.4.2", map[string]string{"etc/containerd/conf.d/pilot.toml": "version = 3\n"}, "/etc/containerd/conf.d/pilot.toml: it exists, and pilot did not write it: move it away"},
		"later drop-in":      {"2.4.2", map[string]string{conf: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "etc/containerd/conf.d/zzz.toml": "version = 3\n[plugins.'io.containerd.service.v1.diff-service']\n  default = ['walking']\n"}, "is the plugin io.containerd.service.v1.diff-service configured by another of its files?"},
		"ocicrypt.conf":      {"2.4.2", map[string]string{"etc/pilot/ocicrypt.conf": `{"key-providers": {}}`}, "/etc/pilot/ocicrypt.conf: it has no key provider pilot"},
		"pilot.toml":         {"2.4.2", map[string]string{"etc/pilot/pilot.toml": "diff-listen = 'off'\n"}, `/etc/pilot/pilot.toml: diff-listen is "off": remove it`},
		"unit":               {"2.4.2", map[string]string{"etc/systemd/system/pilot.service": "[Service]\nExecStart=/x\n"}, "/etc/systemd/system/pilot.service: it exists"},
		"key model":          {"1.6", map[string]string{conf: "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.image_decryption]\n  key_model = ''\n"}, `image_decryption.key_model is "": make it "node"`},
		"other decoder":      {"1.6", map[string]string{conf: "version = 2\n[stream_processors.mine]\n  accepts = ['application/vnd.oci.image.layer.v1.tar+encrypted']\n  returns = 'application/vnd.oci.image.layer.v1.tar'\n  path = '/x'\n"}, "the stream processor mine at /x accepts encrypted layers: remove it"},
		"broken":             {"2.4.2", map[string]string{conf: "version = \n"}, "/etc/containerd/config.toml: toml: "},

		"no file":      {"2.4.2", map[string]string{conf: ""}, ""},
		"imports":      {"2.4.2", map[string]string{conf: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"}, ""},
		"other import": {"1.7", map[string]string{conf: "version = 2\nimports = ['/etc/containerd/mine.toml']\n", "etc/containerd/mine.toml": "version = 2\n"}, ""},
		"sync_fs":      {"1.7", map[string]string{conf: "version = 2\n[plugins.'io.containerd.service.v1.diff-service']\n  default = ['walking']\n  sync_fs = true\n"}, ""},
		"own settings": {"2.4.2", map[string]string{"etc/pilot/pilot.toml": "broker = 'https://copilot.example.com'\n", "etc/pilot/ocicrypt.conf": `{"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}, "other": {}}}`}, ""},
		"snapshotters": {"2.4.2", map[string]string{conf: "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := harness.Machines()[test.version](t)
			for file, text := range test.files {
				if text == "" {
					os.Remove(filepath.Join(m.Root, file))
				} else {
					harness.Write(t, filepath.Join(m.Root, file), text)
				}
			}
			before := m.Files()
			if test.want != "" {
				harness.ExpectFailure(t, m.Pilot("node", "install"), test.want)
				m.CheckFiles(before)
				return
			}
			harness.Output(t, m.Pilot("node", "install"))
			after := m.Files()
			harness.Output(t, m.Pilot("node", "install"))
			m.CheckFiles(after)
			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
		})
	}
}

// TestNodeKeepConfig uninstalls as the removal of a package does, and installs again.
func TestNodeKeepConfig(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["2.4.2"](t)
	before := m.Files()
	harness.Output(t, m.Pilot("node", "install", "--broker", "https://copilot.example.com"))
	installed := m.Files()
	harness.Output(t, m.Pilot("node", "uninstall", "--keep-config"))
	if strings.Contains(m.CheckUnits(), "diff.sock") {
		t.Error("pilot is still configured")
	}
	for _, name := range []string{"pilot.toml", "ocicrypt.conf"} {
		if path := m.Root + "/etc/pilot/" + name; m.Files()[path] != installed[path] {
			t.Errorf("%s: %q, was %q", name, m.Files()[path], installed[path])
		}
	}
	if out := harness.Output(t, m.Pilot("node", "uninstall", "--keep-config")); !strings.Contains(out, "nothing is installed") {
		t.Errorf("a second time: %s", out)
	}
	harness.Output(t, m.Pilot("node", "install"))
	again := m.Files()
	for path, sum := range installed {
		if filepath.Base(path) != "node.json" && again[path] != sum { // it notes files in another order
			t.Errorf("%s: %q, was %q", path, again[path], sum)
		}
	}
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
}

// TestNodeUninstallKeepsChangedFiles uninstalls after files were changed.
func TestNodeUninstallKeepsChangedFiles(t *testing.T) {
	t.Parallel()
	m := harness.Machines()["2.4.2"](t)
	conf := m.Root + "/etc/containerd/config.toml"
	before := harness.Read(t, conf)
	harness.Output(t, m.Pilot("node", "install", "--broker", "https://copilot.example.com"))
	harness.Write(t, conf, harness.Read(t, conf)+"# mine\n")
	if err := os.Chmod(conf, 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Write(t, m.Root+"/etc/pilot/pilot.toml", "broker = 'https://other.example.com'\n")
	harness.ExpectFailure(t, m.Pilot("node", "uninstall"), "/etc/pilot/pilot.toml was changed since it was installed, and stays")
	if got := harness.Read(t, conf); got != before+"# mine\n" {
		t.Errorf("containerd's configuration: %s", got)
	}
	if info, err := os.Stat(conf); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("containerd's configuration has %v, %v", info.Mode(), err)
	}
	if _, err := os.Stat(m.Root + "/etc/containerd/conf.d/pilot.toml"); err == nil {
		t.Error("the drop-in is left")
	}
	os.Remove(m.Root + "/etc/pilot/pilot.toml")
	harness.Output(t, m.Pilot("node", "uninstall"))
	if out := harness.Output(t, m.Pilot("node", "uninstall")); !strings.Contains(out, "nothing is installed") {
		t.Errorf("after that: %s", out)
	}
}

// up starts pilot and containerd with the installed configuration.
func up(t testing.TB, m *harness.Machine) *harness.Node {
	t.Helper()
	m.Start(t, "pilot", "serve")
	harness.Await(t, "pilot", harness.Reachable(m.Root+"/run/pilot/keyprovider.sock"))
	m.Start(t, "containerd")
	n := &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}
	n.AwaitCRI()
	return n
}
