package node

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/pelletier/go-toml/v2"
)

// nodeCase is a real configuration of containerd, a file of testdata/nodes.
type nodeCase struct {
	file string
	// at is its path on the machine. Default: /etc/containerd/config.toml.
	at string
	// versions are the versions of containerd that start with it.
	versions []string
	// tools are drop-ins of other tools, by their names in the directory that the file
	// imports.
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
	// Another tool's drop-in with another version than the file, and one that is read
	// after pilot's.
	{file: "v3-imports.toml", versions: versions2, tools: map[string]string{
		"/etc/containerd/conf.d/gpu.toml":    "dropin-v2-runtime.toml",
		"/etc/containerd/conf.d/z-lazy.toml": "dropin-v3-snapshotter.toml",
	}},
}

// upgrades maps a version to the one that a machine with it is upgraded to.
var upgrades = map[string]string{"1.6": "2.4.2", "1.7": "2.2.9", "2.0.7": "2.2.9", "2.2.9": "2.4.2"}

func versionDir(version string) string {
	if version == "2.4.2" {
		return "bin"
	}
	return "containerd-" + version
}

// TestNodes takes machines with real configurations through installing, changes by other
// tools, upgrades and uninstalling: only pilot's lines of containerd's configuration
// change, and after each step containerd starts and pulls plain and encrypted images. It
// tries each version and each configuration once; with PILOT_NODES=all, all pairs.
func TestNodes(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	encrypted := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	plain := encrypted + "-plain"
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))

	taken := map[string]bool{}
	for i, test := range nodeCases {
		for j, version := range test.versions {
			if os.Getenv("PILOT_NODES") != "all" {
				// Each configuration and each version once.
				if want := test.versions[(i+2)%len(test.versions)]; version != want && (taken[version] || j == 0) {
					continue
				}
			}
			taken[version] = true
			t.Run(version+"/"+strings.TrimSuffix(test.file, ".toml"), func(t *testing.T) {
				t.Parallel()
				m := harness.Machines()[version](t)
				m.BrokerAt(c.BrokerURL)
				n := &installedNode{m: m, test: test, version: version, registry: c.Registry, plain: plain, encrypted: encrypted}
				n.live(t)
			})
		}
	}
}

// installedNode is a machine on which pilot is installed and uninstalled.
type installedNode struct {
	m                *harness.Machine
	test             nodeCase
	version          string
	registry         string
	plain, encrypted string
	lazy             bool // installed with --lazy
	workloads        bool // installed with --workloads
}

func (n *installedNode) config() string {
	if n.test.at != "" {
		return n.test.at
	}
	return "/etc/containerd/config.toml"
}

func (n *installedNode) live(t *testing.T) {
	m := n.m
	os.RemoveAll(m.Root + "/etc/containerd")
	original := harness.Read(t, filepath.Join("../testdata/nodes", n.test.file))
	harness.Write(t, m.Root+n.config(), original)
	hosts := fmt.Sprintf("server = 'http://%s'\n", n.registry)
	harness.Write(t, m.Root+"/etc/containerd/certs.d/"+n.registry+"/hosts.toml", hosts)
	harness.Write(t, m.Root+"/var/lib/rancher/k3s/agent/etc/containerd/certs.d/"+n.registry+"/hosts.toml", hosts)
	// v2-decoder.toml names this directory.
	if err := os.MkdirAll(m.Root+"/opt/keys", 0o755); err != nil {
		t.Fatal(err)
	}
	before := m.Files()
	untouched := n.dump(t)

	install := []string{"node", "install", "--broker", "unix:///run/copilot/copilot.sock"}
	if n.test.at != "" {
		install = append(install, "--containerd-config", n.test.at)
	}
	harness.Output(t, m.Pilot(install...))
	n.onlyPilotDiffers(t, "installed", untouched)
	n.works(t, "installed")

	after := m.Files()
	harness.Output(t, m.Pilot(install...))
	m.CheckFiles(after)

	if n.test.tools != nil {
		for path, file := range n.test.tools {
			if n.version[0] != '1' || !strings.Contains(file, "v3") {
				harness.Write(t, m.Root+path, harness.Read(t, filepath.Join("../testdata/nodes", file)))
			}
		}
		n.refresh(t)
		n.onlyPilotDiffers(t, "tools added", nil)
		n.works(t, "tools added")
		for path := range n.test.tools {
			os.Remove(m.Root + path)
		}
		n.refresh(t)
		n.onlyPilotDiffers(t, "tools removed", untouched)
		n.works(t, "tools removed")
	}

	// Rewritten without pilot, as by a node's agent at boot.
	harness.Write(t, m.Root+n.config(), original)
	n.refresh(t)
	n.onlyPilotDiffers(t, "written anew", untouched)

	// Rewritten from a dump, as some tools do. containerd 1.x can't read its own dump of
	// a file without a version that disables cri.
	if !n.test.noCRI || n.version[0] != '1' {
		harness.Write(t, m.Root+n.config(), n.rawDump(t))
		n.refresh(t)
		n.works(t, "dump written back")
		installed := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "uninstall"), n.config()+":", "take pilot out of these lines")
		m.CheckFiles(installed)
		n.works(t, "not uninstalled")
		harness.Write(t, m.Root+n.config(), original)
		n.refresh(t)
	}

	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
	n.onlyPilotDiffers(t, "uninstalled", untouched)
	if to := upgrades[n.version]; to != "" {
		harness.Output(t, m.Pilot(install...))
		m.Upgrade(versionDir(to))
		if n.version == "1.6" {
			// pilot serves no differ, so containerd is not to ask it.
			harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "serves no differ", "pilot node install")
			n.version = to
			if dump := n.rawDump(t); strings.Contains(dump, "diff.sock") {
				t.Errorf("upgraded from 1.6: %s", dump)
			}
		} else {
			n.version = to
			n.refresh(t)
			n.onlyPilotDiffers(t, "upgraded", nil)
		}
		harness.Output(t, m.Pilot(install...))
		n.onlyPilotDiffers(t, "installed after the upgrade", nil)
		n.works(t, "upgraded")
		harness.Output(t, m.Pilot("node", "uninstall"))
		m.CheckFiles(before)
	}
}

// refresh runs what systemd runs before it starts containerd.
func (n *installedNode) refresh(t *testing.T) {
	t.Helper()
	harness.Output(t, n.m.Run("pilot", "node", "refresh"))
}

func (n *installedNode) rawDump(t *testing.T) string {
	t.Helper()
	return harness.Output(t, n.m.Run("containerd", "--config", n.config(), "config", "dump"))
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

// onlyPilotDiffers compares containerd's configuration with was, or with the one without
// pilot's drop-in if was is nil.
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
	if n.lazy {
		own = append(own, lazyOwn...)
	}
	if n.workloads {
		own = append(own, workloadsOwn...)
	}
	all := maps.Clone(was)
	maps.Copy(all, is)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		if !slices.ContainsFunc(own, func(prefix string) bool { return strings.HasPrefix(key, prefix) }) && fmt.Sprint(was[key]) != fmt.Sprint(is[key]) {
			t.Errorf("%s: %s is %v, was %v", when, key, is[key], was[key])
		}
	}
}

// dumpWithout is dump without pilot's drop-in.
func (n *installedNode) dumpWithout(t *testing.T) map[string]any {
	t.Helper()
	for _, dir := range []string{"/etc/containerd/conf.d", "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d"} {
		for _, name := range []string{"pilot.toml", "zz-pilot.toml"} {
			file := n.m.Root + dir + "/" + name
			if os.Rename(file, n.m.Root+"/tmp/"+name) == nil {
				defer harness.Output(t, harness.Command(t, "mv", n.m.Root+"/tmp/"+name, file))
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
		m.Start(t, "pilot", "serve")
		harness.Await(t, "pilot", harness.Reachable(m.Root+"/run/pilot/keyprovider.sock"))
		m.Start(t, "containerd", "--config", n.config())
		node := &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}
		if strings.Contains(n.config(), "k3s") {
			node.Socket = m.Root + "/run/k3s/containerd/containerd.sock"
		}
		harness.Await(t, "containerd", func() error { return node.Ctr("version").Run() })
		if !n.test.noCRI {
			node.AwaitCRI()
		}
		for _, image := range []string{n.plain, n.encrypted} {
			if n.test.noCRI {
				harness.Output(t, node.CtrPilot("images", "pull", "--plain-http", image))
				harness.Output(t, node.CtrPilot("images", "remove", "--sync", image))
				continue
			}
			harness.Output(t, node.Crictl("pull", image))
			harness.Output(t, node.Crictl("rmi", image))
		}
		if !n.test.noCRI {
			if out := harness.CombinedOutput(t, m.Run("pilot", "node", "doctor", "--kek", "team-a")); strings.Contains(out, "failed") {
				t.Errorf("doctor: %s", out)
			}
		}
	})
}
