package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// nodeCase is a configuration of containerd that nodes have, a file of
// testdata/nodes.
type nodeCase struct {
	file string
	// at is where the machine has it. Default: /etc/containerd/config.toml.
	at string
	// versions are those of containerd that start with it.
	versions []string
	// tools are the drop-ins of other tools that may come, by their names in
	// the directory that the file imports.
	tools map[string]string
	noCRI bool
}

var (
	allVersions = []string{"1.6", "1.7", "2.0.7", "2.2.9", "2.4.2"}
	versions2   = []string{"2.0.7", "2.2.9", "2.4.2"}
)

var nodeCases = []nodeCase{
	{file: "v2-cri.toml", versions: allVersions, tools: map[string]string{"/etc/containerd/conf.d/gpu.toml": "dropin-v2-runtime.toml"}},
	{file: "v2-cri-no-imports.toml", versions: allVersions},
	{file: "v2-decoder.toml", versions: allVersions},
	{file: "none-docker.toml", versions: allVersions, noCRI: true},
	{file: "none-cri.toml", versions: allVersions},
	{file: "v3-eks.toml", versions: versions2},
	{file: "v3-k3s.toml", versions: versions2, at: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", tools: map[string]string{
		"/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/gpu.toml":  "dropin-v3-runtime.toml",
		"/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/lazy.toml": "dropin-v3-snapshotter.toml",
	}},
	// Another tool's drop-in of another version than the file, and one whose
	// lists come after pilot's.
	{file: "v3-imports.toml", versions: versions2, tools: map[string]string{
		"/etc/containerd/conf.d/gpu.toml":    "dropin-v2-runtime.toml",
		"/etc/containerd/conf.d/z-lazy.toml": "dropin-v3-snapshotter.toml",
	}},
}

// upgrades are the versions to which a machine is upgraded.
var upgrades = map[string]string{"1.6": "2.4.2", "1.7": "2.2.9", "2.0.7": "2.2.9", "2.2.9": "2.4.2"}

func versionDir(version string) string {
	if version == "2.4.2" {
		return "bin"
	}
	return "containerd-" + version
}

// TestNodes sets up machines as they are, lives on with them, and puts them back:
// nothing of containerd's configuration changes but pilot's own lines, containerd
// starts after each step, and pulls plain and encrypted images. With PILOT_NODES=all
// it takes each version with each configuration, else each of them once.
func TestNodes(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	encrypted := c.image(kinds[1], "provider:pilot:team-a")
	plain := encrypted + "-plain"
	output(t, c.ctrPilot("images", "push", "--plain-http", plain))

	taken := map[string]bool{}
	for i, test := range nodeCases {
		for j, version := range test.versions {
			if os.Getenv("PILOT_NODES") != "all" {
				// Each configuration once, and each version.
				if want := test.versions[(i+2)%len(test.versions)]; version != want && (taken[version] || j == 0) {
					continue
				}
			}
			taken[version] = true
			t.Run(version+"/"+strings.TrimSuffix(test.file, ".toml"), func(t *testing.T) {
				t.Parallel()
				m := machines()[version](t)
				m.brokerAt(brokerURL)
				n := &installedNode{m: m, test: test, version: version, registry: c.registry, plain: plain, encrypted: encrypted}
				n.live(t)
			})
		}
	}
}

// installedNode is a machine in the course of its life.
type installedNode struct {
	m                *machine
	test             nodeCase
	version          string
	registry         string
	plain, encrypted string
}

func (n *installedNode) config() string {
	if n.test.at != "" {
		return n.test.at
	}
	return "/etc/containerd/config.toml"
}

func (n *installedNode) live(t *testing.T) {
	m := n.m
	os.RemoveAll(m.root + "/etc/containerd")
	original := read(t, filepath.Join("testdata/nodes", n.test.file))
	write(t, m.root+n.config(), original)
	hosts := fmt.Sprintf("server = 'http://%s'\n", n.registry)
	write(t, m.root+"/etc/containerd/certs.d/"+n.registry+"/hosts.toml", hosts)
	write(t, m.root+"/var/lib/rancher/k3s/agent/etc/containerd/certs.d/"+n.registry+"/hosts.toml", hosts)
	// The directory of keys of v2-decoder.toml.
	if err := os.MkdirAll(m.root+"/opt/keys", 0o755); err != nil {
		t.Fatal(err)
	}
	before := m.files()
	untouched := n.dump(t)

	install := []string{"node", "install", "--broker", "unix:///run/copilot/copilot.sock"}
	if n.test.at != "" {
		install = append(install, "--containerd-config", n.test.at)
	}
	output(t, m.pilot(install...))
	n.onlyPilotDiffers(t, "installed", untouched)
	n.works(t, "installed")

	after := m.files()
	output(t, m.pilot(install...))
	m.same(after)

	if n.test.tools != nil {
		for path, file := range n.test.tools {
			if n.version[0] != '1' || !strings.Contains(file, "v3") {
				write(t, m.root+path, read(t, filepath.Join("testdata/nodes", file)))
			}
		}
		n.refresh(t)
		n.onlyPilotDiffers(t, "tools added", nil)
		n.works(t, "tools added")
		for path := range n.test.tools {
			os.Remove(m.root + path)
		}
		n.refresh(t)
		n.onlyPilotDiffers(t, "tools removed", untouched)
		n.works(t, "tools removed")
	}

	// Written anew, as at boot by a node's agent.
	write(t, m.root+n.config(), original)
	n.refresh(t)
	n.onlyPilotDiffers(t, "written anew", untouched)

	// Written from what it comes to, as some tools do. containerd 1.x can't read
	// its own dump of a file without a version that disables cri.
	if !n.test.noCRI || n.version[0] != '1' {
		write(t, m.root+n.config(), n.rawDump(t))
		n.refresh(t)
		n.works(t, "dump written back")
		installed := m.files()
		fails(t, m.pilot("node", "uninstall"), n.config()+":", "take pilot out of these lines")
		m.same(installed)
		n.works(t, "not uninstalled")
		write(t, m.root+n.config(), original)
		n.refresh(t)
	}

	output(t, m.pilot("node", "uninstall"))
	m.same(before)
	n.onlyPilotDiffers(t, "uninstalled", untouched)
	if to := upgrades[n.version]; to != "" {
		output(t, m.pilot(install...))
		m.upgrade(versionDir(to))
		n.version = to
		n.refresh(t)
		n.onlyPilotDiffers(t, "upgraded", nil)
		output(t, m.pilot(install...))
		n.onlyPilotDiffers(t, "installed after the upgrade", nil)
		n.works(t, "upgraded")
		output(t, m.pilot("node", "uninstall"))
		m.same(before)
	}
}

// refresh does what systemd does before it starts containerd.
func (n *installedNode) refresh(t *testing.T) {
	t.Helper()
	output(t, n.m.run("pilot", "node", "refresh"))
}

func (n *installedNode) rawDump(t *testing.T) string {
	t.Helper()
	return output(t, n.m.run("containerd", "--config", n.config(), "config", "dump"))
}

func (n *installedNode) dump(t *testing.T) map[string]any {
	t.Helper()
	var dump map[string]any
	if err := toml.Unmarshal([]byte(n.rawDump(t)), &dump); err != nil {
		t.Fatal(err)
	}
	return settings("", dump)
}

// settings flattens a configuration.
func settings(prefix string, table map[string]any) map[string]any {
	flat := map[string]any{}
	for key, v := range table {
		if sub, ok := v.(map[string]any); ok {
			maps.Copy(flat, settings(prefix+key+"/", sub))
		} else {
			flat[prefix+key] = v
		}
	}
	return flat
}

// onlyPilotDiffers compares containerd's configuration with what it is without
// pilot's files, or with was.
func (n *installedNode) onlyPilotDiffers(t *testing.T, when string, was map[string]any) {
	t.Helper()
	is := n.dump(t)
	if was == nil {
		was = n.dumpWithout(t)
	}
	own := []string{"imports", "proxy_plugins/pilot/", "plugins/io.containerd.service.v1.diff-service/default", "plugins/io.containerd.transfer.v1.local/unpack_config", "stream_processors/io.containerd.ocicrypt.decoder.v1.tar"}
	if n.version != "1.6" {
		own = own[:4]
	}
	all := maps.Clone(was)
	maps.Copy(all, is)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.ContainsFunc(own, func(prefix string) bool { return strings.HasPrefix(key, prefix) }) && fmt.Sprint(was[key]) != fmt.Sprint(is[key]) {
			t.Errorf("%s: %s is %v, was %v", when, key, is[key], was[key])
		}
	}
}

// dumpWithout is dump while pilot's drop-in is away.
func (n *installedNode) dumpWithout(t *testing.T) map[string]any {
	t.Helper()
	for _, dir := range []string{"/etc/containerd/conf.d", "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d"} {
		for _, name := range []string{"pilot.toml", "zz-pilot.toml"} {
			file := n.m.root + dir + "/" + name
			if os.Rename(file, n.m.root+"/tmp/"+name) == nil {
				defer output(t, command(t, "mv", n.m.root+"/tmp/"+name, file))
			}
		}
	}
	return n.dump(t)
}

// works starts the machine, pulls a plain and an encrypted image with its main
// client, and stops it.
func (n *installedNode) works(t *testing.T, when string) {
	t.Helper()
	t.Run(strings.ReplaceAll(when, " ", "_"), func(t *testing.T) {
		m := n.m
		m.start(t, "pilot", "serve")
		await(t, "pilot", answers(m.root+"/run/pilot/keyprovider.sock"))
		m.start(t, "containerd", "--config", n.config())
		node := &node{t: t, dir: filepath.Dir(m.root), socket: m.root + "/run/containerd/containerd.sock"}
		if strings.Contains(n.config(), "k3s") {
			node.socket = m.root + "/run/k3s/containerd/containerd.sock"
		}
		await(t, "containerd", func() error { return node.ctr("version").Run() })
		for _, image := range []string{n.plain, n.encrypted} {
			if n.test.noCRI {
				output(t, node.ctrPilot("images", "pull", "--plain-http", image))
				output(t, node.ctrPilot("images", "remove", "--sync", image))
				continue
			}
			output(t, node.crictl("pull", image))
			output(t, node.crictl("rmi", image))
		}
		if !n.test.noCRI {
			if out := said(t, m.run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") {
				t.Errorf("doctor: %s", out)
			}
		}
	})
}
