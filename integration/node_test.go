package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestNodeInstall sets machines up with one command, pulls and runs with each
// client, and puts them back.
func TestNodeInstall(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	var images []string
	for _, k := range kinds {
		images = append(images, c.image(k, "provider:pilot:team-a"))
	}
	for version, make := range machines() {
		t.Run(version, func(t *testing.T) {
			m := make(t)
			before := m.files()
			m.brokerAt(brokerURL)

			diff := output(t, m.pilot("node", "install", "--dry-run"))
			if !strings.Contains(diff, "+++ /etc/containerd/conf.d/pilot.toml") {
				t.Errorf("dry run: %s", diff)
			}
			m.same(before)
			output(t, m.pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
			after := m.files()
			if out := output(t, m.pilot("node", "install")); !strings.Contains(out, "nothing to change") {
				t.Errorf("a second time: %s", out)
			}
			m.same(after)
			units := []string{"pilot.service", "pilot-keyprovider.socket"}
			if version != "1.6" {
				units = append(units, "pilot-diff.socket")
			}
			// What it says of other units is not our concern.
			if out := said(t, command(t, "systemd-analyze", append([]string{"verify", "--man=no", "--root=" + m.root}, units...)...)); strings.Contains(newerSystemd.ReplaceAllString(strings.ReplaceAll(out, m.root, ""), ""), "pilot") {
				t.Errorf("systemd-analyze verify: %s", out)
			}

			n := m.up(t)
			if out := output(t, m.run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") || !strings.Contains(out, "ok       layer") {
				t.Errorf("doctor: %s", out)
			}
			for _, image := range images {
				output(t, n.crictl("pull", image))
				if out := containerOutput(t, m.run("ctr", "--namespace", "k8s.io", "run", "--rm", image, "c")); !strings.Contains(out, c.secrets[image]) {
					t.Errorf("crictl, %s: %s", image, out)
				}
				output(t, n.crictl("rmi", image))
				pulls := [][]string{{"ctr-pilot", "images", "pull", "--plain-http", image}}
				if version != "1.6" {
					pulls = append(pulls, []string{"ctr", "images", "pull", "--local", "--plain-http", image})
				}
				if version == "2.4.2" {
					pulls = append(pulls, []string{"ctr", "images", "pull", "--plain-http", image})
				}
				for _, pull := range pulls {
					output(t, m.run(pull[0], pull[1:]...))
					if out := containerOutput(t, m.run("ctr", "run", "--rm", image, "c")); !strings.Contains(out, c.secrets[image]) {
						t.Errorf("%s, %s: %s", pull, image, out)
					}
					output(t, m.run("ctr", "images", "remove", "--sync", image))
				}
			}

			output(t, m.pilot("node", "uninstall"))
			m.same(before)
			if out := output(t, m.pilot("node", "uninstall")); !strings.Contains(out, "nothing is installed") {
				t.Errorf("uninstalled twice: %s", out)
			}
		})
	}
}

// newerSystemd is what an older one says of settings that it does not know.
var newerSystemd = regexp.MustCompile(`(?m)^.*Unknown key '(RestartSteps|RestartMaxDelaySec)'.*$`)

// loads checks that the machine's containerd can read its configuration, and
// returns it.
func (m *machine) loads() string {
	m.t.Helper()
	return output(m.t, m.run("containerd", "config", "dump"))
}

// TestNodeAgain installs, changes things as an admin or a newer containerd
// would, and installs or uninstalls again.
func TestNodeAgain(t *testing.T) {
	t.Parallel()
	const conf = "/etc/containerd/config.toml"
	t.Run("rewritten", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		output(t, m.pilot("node", "install"))
		write(t, m.root+conf, strings.ReplaceAll(read(t, m.root+conf), "'", `"`))
		fails(t, m.pilot("node", "uninstall"), conf+" was changed since")
		if strings.Contains(m.loads(), "diff.sock") {
			t.Error("pilot is still configured")
		}
		write(t, m.root+conf, "version = 3\n")
		output(t, m.pilot("node", "uninstall"))
	})
	t.Run("still needed", func(t *testing.T) {
		// What has containerd ask pilot can't be undone, so nothing else is.
		m := machines()["2.4.2"](t)
		output(t, m.pilot("node", "install"))
		dropIn := m.root + "/etc/containerd/conf.d/pilot.toml"
		write(t, dropIn, read(t, dropIn)+"# mine\n")
		before := m.files()
		fails(t, m.pilot("node", "uninstall"), "/etc/containerd/conf.d/pilot.toml was changed since")
		m.same(before)
	})
	t.Run("a package comes", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		output(t, m.pilot("node", "install"))
		write(t, m.root+"/usr/lib/systemd/system/pilot.service", "[Service]\nExecStart=/usr/bin/pilot serve\n")
		before := m.files()
		fails(t, m.pilot("node", "install"), "/etc/systemd/system/pilot.service", "of an earlier installation", "pilot node uninstall --keep-config")
		m.same(before)
	})
	t.Run("made, then added to", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		os.Remove(m.root + conf)
		output(t, m.pilot("node", "install"))
		write(t, m.root+conf, read(t, m.root+conf)+"oom_score = 1\n")
		output(t, m.pilot("node", "uninstall"))
		if got := read(t, m.root+conf); !strings.Contains(got, "oom_score = 1") || strings.Contains(got, "pilot") {
			t.Errorf("left: %s", got)
		}
		m.loads()
	})
	t.Run("replaced between", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		output(t, m.pilot("node", "install"))
		write(t, m.root+conf, "version = 3\noom_score = 7\n")
		output(t, m.pilot("node", "install"))
		if dump := m.loads(); !strings.Contains(dump, "diff.sock") {
			t.Errorf("pilot is not configured: %s", dump)
		}
		output(t, m.pilot("node", "uninstall"))
		if got := read(t, m.root+conf); got != "version = 3\noom_score = 7\n" {
			t.Errorf("left: %s", got)
		}
	})
	t.Run("other socket", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		write(t, m.root+conf, "version = 3\n[grpc]\n  address = '/run/other.sock'\n")
		output(t, m.pilot("node", "install"))
		if got := read(t, m.root+"/etc/pilot/pilot.toml"); !strings.Contains(got, `containerd = "/run/other.sock"`) {
			t.Errorf("pilot.toml: %s", got)
		}
	})
	t.Run("newer containerd", func(t *testing.T) {
		m := machines()["1.6"](t)
		before := m.files()
		output(t, m.pilot("node", "install", "--broker", "https://copilot.example.com"))
		m.upgrade("bin")
		output(t, m.pilot("node", "install"))
		if got := read(t, m.root+"/etc/pilot/pilot.toml"); strings.Contains(got, "off") || !strings.Contains(got, "copilot.example.com") {
			t.Errorf("pilot.toml: %s", got)
		}
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
	})
	t.Run("links", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		outside := tempDir(t)
		write(t, m.root+"/opt/cm/config.toml", read(t, m.root+conf))
		os.Chown(m.root+"/opt/cm/config.toml", 1000, 33)
		for link, to := range map[string]string{conf: "/opt/cm/config.toml", "/etc/pilot": outside} {
			os.Remove(m.root + link)
			if err := os.Symlink(to, m.root+link); err != nil {
				t.Fatal(err)
			}
		}
		before := m.files()
		output(t, m.pilot("node", "install"))
		if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
			t.Errorf("it wrote outside of the root: %v, %v", entries, err)
		}
		if info, err := os.Stat(m.root + "/opt/cm/config.toml"); err != nil || info.Sys().(*syscall.Stat_t).Uid != 1000 {
			t.Errorf("the file's owner has changed: %v", err)
		}
		m.loads()
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
	})
	t.Run("unusable settings", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		before := m.files()
		for _, args := range [][]string{{"--broker-ca", "ca.pem"}, {"--broker-cert", "/cert.pem"}, {"--pilot-binary", "./pilot"}, {"--containerd-config", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}} {
			fails(t, m.pilot(append([]string{"node", "install"}, args...)...))
		}
		m.same(before)
	})
	t.Run("two at once", func(t *testing.T) {
		m := machines()["2.4.2"](t)
		before := m.files()
		first, second := m.pilot("node", "install"), m.pilot("node", "install")
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
		if !strings.Contains(m.loads(), "diff.sock") {
			t.Error("pilot is not configured")
		}
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
	})
}

// TestNodeErofs sets a machine up whose images are unpacked to EROFS.
func TestNodeErofs(t *testing.T) {
	t.Parallel()
	if !strings.Contains(read(t, "/proc/filesystems"), "\terofs\n") {
		t.Skip("this machine's kernel has no EROFS")
	}
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	// Debian 13 has an mkfs.erofs that reads tar.
	m := newMachine(t, filepath.Join(tools, "trixie"))
	m.upgrade("bin")
	write(t, m.root+"/etc/containerd/config.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'erofs'\n")
	m.brokerAt(brokerURL)
	output(t, m.pilot("node", "install", "--broker", "unix:///run/copilot/copilot.sock"))
	n := m.up(t)
	output(t, m.run("pilot", "node", "doctor", "--kek", "team-a"))
	for _, k := range kinds {
		image := c.image(k, "provider:pilot:team-a")
		plain := image + "-plain"
		output(t, c.ctrPilot("images", "push", "--plain-http", plain))
		c.secrets[plain] = c.secrets[image]
		for _, name := range []string{image, plain} {
			output(t, n.crictl("pull", name))
			output(t, n.crictl("rmi", name))
			for _, pull := range [][]string{{"images", "pull", "--plain-http", name}, {"images", "pull", "--local", "--plain-http", name}} {
				output(t, m.run("ctr", append(pull, "--snapshotter", "erofs")...))
				if out := containerOutput(t, m.run("ctr", "run", "--rm", "--snapshotter", "erofs", name, "c")); !strings.Contains(out, c.secrets[name]) {
					t.Errorf("%s, %s: %s", pull, name, out)
				}
				output(t, m.run("ctr", "images", "remove", "--sync", name))
			}
		}
		fails(t, n.crictl("pull", c.tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })), "pilot: layer sha256:", "HMAC does not match")
	}

	// Layers that are EROFS file systems themselves.
	hello, err := os.ReadFile(filepath.Join(bin, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	for _, mediaType := range []string{"application/vnd.erofs.layer.v1", "application/vnd.erofs.layer.v1+zstd"} {
		secret := newSecret()
		write(t, m.root+"/root/layer/hello", string(hello))
		if err := os.Chmod(m.root+"/root/layer/hello", 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, m.root+"/root/layer/secret", secret)
		output(t, m.run("mkfs.erofs", "/root/layer.erofs", "/root/layer"))
		plain := []byte(read(t, m.root+"/root/layer.erofs"))
		blob := plain
		if strings.HasSuffix(mediaType, "zstd") {
			blob = zstandard(t, plain)
		}
		l := newLayout(t)
		config := l.json("application/vnd.oci.image.config.v1+json", object{
			"architecture": goarch, "os": "linux", "config": object{"Cmd": []string{"/hello"}},
			"rootfs": object{"type": "layers", "diff_ids": []string{digest.FromBytes(plain).String()}},
		})
		image := l.json("application/vnd.oci.image.manifest.v1+json", object{
			"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []object{l.blob(mediaType, blob)},
		})
		name := fmt.Sprintf("%s/native:%d", c.registry, len(blob))
		c.publish(l, name, image, "provider:pilot:team-a")
		if info := output(t, c.ctrPilot("images", "layerinfo", "--json", "--require-encrypted", name)); !strings.Contains(info, mediaType+"+encrypted") {
			t.Errorf("layerinfo: %s", info)
		}
		output(t, n.crictl("pull", name))
		output(t, n.crictl("rmi", name))
		for _, pull := range [][]string{{"images", "pull", "--plain-http", name}, {"images", "pull", "--local", "--plain-http", name}} {
			output(t, m.run("ctr", append(pull, "--snapshotter", "erofs")...))
			if out := containerOutput(t, m.run("ctr", "run", "--rm", "--snapshotter", "erofs", name, "c")); !strings.Contains(out, secret) {
				t.Errorf("%s, %s: %s", pull, name, out)
			}
			output(t, m.run("ctr", "images", "remove", "--sync", name))
		}
		fails(t, m.run("ctr", "images", "pull", "--plain-http", "--local", "--snapshotter", "overlayfs", name), "is for the snapshotter erofs")
		for _, change := range []func(b []byte) []byte{
			func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
			func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
			func(b []byte) []byte { return b[:len(b)-1] },
		} {
			fails(t, n.crictl("pull", c.tamper(name, change)), "pilot: layer sha256:", "HMAC does not match")
		}
	}
}

// said runs a command that may fail and returns what it says.
func said(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, _ := cmd.CombinedOutput()
	return string(out)
}

// TestNodeConflicts installs on machines whose own settings are in the way, and
// on some whose are not.
func TestNodeConflicts(t *testing.T) {
	t.Parallel()
	const conf = "etc/containerd/config.toml"
	for name, test := range map[string]struct {
		version string
		files   map[string]string
		want    string // empty: it works
	}{
		"other proxy plugin": {"2.4.2", map[string]string{conf: "version = 3\n[proxy_plugins.pilot]\n  type = 'snapshot'\n  address = '/x.sock'\n"}, "/etc/containerd/config.toml: there is a proxy plugin pilot of type snapshot at /x.sock: remove it"},
		"other differ":       {"2.4.2", map[string]string{conf: "version = 3\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/" + goarch + "'\n  snapshotter = 'overlayfs'\n  differ = 'other'\n"}, "with the differ other"},
		"own drop-in":        {"2.4.2", map[string]string{"etc/containerd/conf.d/pilot.toml": "version = 3\n"}, "/etc/containerd/conf.d/pilot.toml: it exists, and is not what was installed: move it away"},
		"later drop-in":      {"2.4.2", map[string]string{conf: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "etc/containerd/conf.d/zzz.toml": "version = 3\n[plugins.'io.containerd.service.v1.diff-service']\n  default = ['walking']\n"}, "is the plugin io.containerd.service.v1.diff-service configured by another of its files?"},
		"ocicrypt.conf":      {"2.4.2", map[string]string{"etc/pilot/ocicrypt.conf": `{"key-providers": {}}`}, "/etc/pilot/ocicrypt.conf: it names no key provider pilot"},
		"pilot.toml":         {"2.4.2", map[string]string{"etc/pilot/pilot.toml": "diff-listen = 'off'\n"}, `/etc/pilot/pilot.toml: diff-listen is "off": remove it`},
		"unit":               {"2.4.2", map[string]string{"etc/systemd/system/pilot.service": "[Service]\nExecStart=/x\n"}, "/etc/systemd/system/pilot.service: it exists"},
		"key model":          {"1.6", map[string]string{conf: "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.image_decryption]\n  key_model = ''\n"}, `image_decryption.key_model is "": make it "node"`},
		"other decoder":      {"1.6", map[string]string{conf: "version = 2\n[stream_processors.mine]\n  accepts = ['application/vnd.oci.image.layer.v1.tar+encrypted']\n  returns = 'application/vnd.oci.image.layer.v1.tar'\n  path = '/x'\n"}, "the stream processor mine at /x takes encrypted layers: remove it"},
		"broken":             {"2.4.2", map[string]string{conf: "version = \n"}, "/etc/containerd/config.toml: toml: "},

		"no file":      {"2.4.2", map[string]string{conf: ""}, ""},
		"imports":      {"2.4.2", map[string]string{conf: "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"}, ""},
		"other import": {"1.7", map[string]string{conf: "version = 2\nimports = ['/etc/containerd/mine.toml']\n", "etc/containerd/mine.toml": "version = 2\n"}, ""},
		"sync_fs":      {"1.7", map[string]string{conf: "version = 2\n[plugins.'io.containerd.service.v1.diff-service']\n  default = ['walking']\n  sync_fs = true\n"}, ""},
		"own settings": {"2.4.2", map[string]string{"etc/pilot/pilot.toml": "broker = 'https://copilot.example.com'\n", "etc/pilot/ocicrypt.conf": `{"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}, "other": {}}}`}, ""},
		"snapshotters": {"2.4.2", map[string]string{conf: "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := machines()[test.version](t)
			for file, text := range test.files {
				if text == "" {
					os.Remove(filepath.Join(m.root, file))
				} else {
					write(t, filepath.Join(m.root, file), text)
				}
			}
			before := m.files()
			if test.want != "" {
				fails(t, m.pilot("node", "install"), test.want)
				m.same(before)
				return
			}
			output(t, m.pilot("node", "install"))
			after := m.files()
			output(t, m.pilot("node", "install"))
			m.same(after)
			output(t, m.pilot("node", "uninstall"))
			m.same(before)
		})
	}
}

// TestNodeKeepConfig uninstalls as the removal of a package does, and installs
// again.
func TestNodeKeepConfig(t *testing.T) {
	t.Parallel()
	m := machines()["2.4.2"](t)
	before := m.files()
	output(t, m.pilot("node", "install", "--broker", "https://copilot.example.com"))
	installed := m.files()
	output(t, m.pilot("node", "uninstall", "--keep-config"))
	if strings.Contains(m.loads(), "diff.sock") {
		t.Error("pilot is still configured")
	}
	for _, name := range []string{"pilot.toml", "ocicrypt.conf"} {
		if path := m.root + "/etc/pilot/" + name; m.files()[path] != installed[path] {
			t.Errorf("%s: %q, was %q", name, m.files()[path], installed[path])
		}
	}
	if out := output(t, m.pilot("node", "uninstall", "--keep-config")); !strings.Contains(out, "nothing is installed") {
		t.Errorf("a second time: %s", out)
	}
	output(t, m.pilot("node", "install"))
	again := m.files()
	for path, sum := range installed {
		if filepath.Base(path) != "node.json" && again[path] != sum { // it notes files in another order
			t.Errorf("%s: %q, was %q", path, again[path], sum)
		}
	}
	output(t, m.pilot("node", "uninstall"))
	m.same(before)
}

// TestNodeChanged uninstalls where files were changed since.
func TestNodeChanged(t *testing.T) {
	t.Parallel()
	m := machines()["2.4.2"](t)
	conf := m.root + "/etc/containerd/config.toml"
	before := read(t, conf)
	output(t, m.pilot("node", "install", "--broker", "https://copilot.example.com"))
	write(t, conf, read(t, conf)+"# mine\n")
	write(t, m.root+"/etc/pilot/pilot.toml", "broker = 'https://other.example.com'\n")
	fails(t, m.pilot("node", "uninstall"), "/etc/pilot/pilot.toml was changed since it was installed, and stays")
	if got := read(t, conf); got != before+"# mine\n" {
		t.Errorf("containerd's configuration: %s", got)
	}
	if _, err := os.Stat(m.root + "/etc/containerd/conf.d/pilot.toml"); err == nil {
		t.Error("the drop-in is left")
	}
	os.Remove(m.root + "/etc/pilot/pilot.toml")
	output(t, m.pilot("node", "uninstall"))
	if out := output(t, m.pilot("node", "uninstall")); !strings.Contains(out, "nothing is installed") {
		t.Errorf("after that: %s", out)
	}
}
