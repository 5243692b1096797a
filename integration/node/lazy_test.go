package node

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
)

// lazyOwn are the settings that an installation with --lazy may change besides those of
// pilot's differ, by what settings returns.
var lazyOwn = []string{
	"proxy_plugins/pilot-lazy/",
	"plugins/io.containerd.cri.v1.images/snapshotter", "plugins/io.containerd.cri.v1.images/disable_snapshot_annotations",
	"plugins/io.containerd.grpc.v1.cri/containerd/snapshotter", "plugins/io.containerd.grpc.v1.cri/containerd/disable_snapshot_annotations",
}

// TestLazyInstallChangesOnlyPilotsSettings installs with --lazy beside real configurations
// of containerd, and uninstalls.
func TestLazyInstallChangesOnlyPilotsSettings(t *testing.T) {
	t.Parallel()
	for i, test := range nodeCases {
		versions := slices.DeleteFunc(slices.Clone(test.versions), func(v string) bool { return v == "1.6" })
		for j, version := range versions {
			// Each configuration once, which is each version too.
			if os.Getenv("PILOT_NODES") != "all" && j != i%len(versions) {
				continue
			}
			t.Run(version+"/"+strings.TrimSuffix(test.file, ".toml"), func(t *testing.T) {
				t.Parallel()
				m := harness.Machines()[version](t)
				n := &installedNode{m: m, test: test, version: version, lazy: true}
				os.RemoveAll(m.Root + "/etc/containerd")
				original := harness.Read(t, filepath.Join("../testdata/nodes", test.file))
				harness.Write(t, m.Root+n.config(), original)
				before, untouched := m.Files(), n.dump(t)
				install := []string{"node", "install", "--lazy", "--containerd-config", n.config()}
				harness.Output(t, m.Pilot(install...))
				n.onlyPilotDiffers(t, "installed", untouched)
				n.isLazy(t, "installed")
				after := m.Files()
				// Without the flag it stays.
				for _, again := range [][]string{install, {"node", "install", "--containerd-config", n.config()}} {
					if out := harness.Output(t, m.Pilot(again...)); !strings.Contains(out, "nothing to change") {
						t.Errorf("%s: %s", again, out)
					}
				}
				m.CheckFiles(after)

				for path, file := range test.tools {
					if version[0] != '1' || !strings.Contains(file, "v3") {
						harness.Write(t, m.Root+path, harness.Read(t, filepath.Join("../testdata/nodes", file)))
					}
				}
				n.refresh(t)
				n.onlyPilotDiffers(t, "tools added", nil)
				n.isLazy(t, "tools added")
				for path := range test.tools {
					os.Remove(m.Root + path)
				}
				n.refresh(t)
				n.onlyPilotDiffers(t, "tools removed", untouched)

				if to := upgrades[version]; to != "" {
					m.Upgrade(versionDir(to))
					n.version = to
					n.refresh(t)
					n.onlyPilotDiffers(t, "upgraded", nil)
					n.isLazy(t, "upgraded")
				}
				harness.Output(t, m.Pilot("node", "uninstall"))
				m.CheckFiles(before)

				// The record is lost.
				harness.Output(t, m.Pilot(install...))
				if err := os.Remove(m.Root + "/var/lib/pilot/node.json"); err != nil {
					t.Fatal(err)
				}
				if out := harness.CombinedOutput(t, m.Pilot("node", "install", "--containerd-config", n.config())); !strings.Contains(out, "are adopted") {
					t.Errorf("the record was lost: %s", out)
				}
				n.isLazy(t, "adopted")
			})
		}
	}
}

// isLazy checks that containerd's configuration has the kubelet pull lazily.
func (n *installedNode) isLazy(t *testing.T, when string) {
	t.Helper()
	dump := n.dump(t)
	cri := "plugins/io.containerd.cri.v1.images/"
	if n.version[0] == '1' {
		cri = "plugins/io.containerd.grpc.v1.cri/containerd/"
	}
	want := map[string]string{
		"proxy_plugins/pilot-lazy/type":                                       "snapshot",
		"proxy_plugins/pilot-lazy/exports/enable_remote_snapshot_annotations": "true",
	}
	if !n.test.noCRI {
		want[cri+"snapshotter"], want[cri+"disable_snapshot_annotations"] = "pilot-lazy", "false"
	}
	for key, value := range want {
		if got := fmt.Sprint(dump[key]); got != value {
			t.Errorf("%s: %s is %s, not %s", when, key, got, value)
		}
	}
	if unpack := fmt.Sprint(dump["plugins/io.containerd.transfer.v1.local/unpack_config"]); n.version[0] != '1' && !strings.Contains(unpack, "snapshotter:pilot-lazy") {
		t.Errorf("%s: unpack_config is %s", when, unpack)
	}
}

// TestLazyInstallRefuses has nodes that can't pull lazily.
func TestLazyInstallRefuses(t *testing.T) {
	t.Parallel()
	t.Run("containerd 1.6", func(t *testing.T) {
		m := harness.Machines()["1.6"](t)
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy"), "containerd 1.6 can't pull encrypted images lazily", "1.7 or later")
		m.CheckFiles(before)
	})
	t.Run("containerd 1.7.15", func(t *testing.T) {
		m := harness.Machines()["1.7"](t)
		script(m, "case $* in --version) echo containerd github.com/containerd/containerd v1.7.15 0; exit; esac\nexec /usr/bin/containerd.real \"$@\"\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy"), "with containerd 1.7.15", "upgrade containerd to 1.7.16 or later")
		m.CheckFiles(before)
	})
	t.Run("another snapshotter", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Write(t, m.Root+"/etc/containerd/config.toml", "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy"), "the kubelet's images have the snapshotter native", "make it overlayfs")
		m.CheckFiles(before)
	})
	t.Run("a template of k3s", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		const conf = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"
		var lines []string
		for line := range strings.Lines(harness.Read(t, "../testdata/nodes/v3-k3s.toml")) {
			if !strings.HasPrefix(line, "imports") {
				lines = append(lines, line)
			}
		}
		harness.Write(t, m.Root+conf, strings.Join(lines, ""))
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy", "--containerd-config", conf), conf, "config-v3.toml.tmpl")
		m.CheckFiles(before)
		harness.Output(t, m.Pilot("node", "install", "--containerd-config", conf))
	})
	t.Run("CRI-O", func(t *testing.T) {
		m := harness.NewCRIOMachine(t)
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy"), "CRI-O has no snapshotters")
		m.CheckFiles(before)
	})
	t.Run("a pilot.toml of the owner's", func(t *testing.T) {
		m := harness.Machines()["2.4.2"](t)
		harness.Write(t, m.Root+"/etc/pilot/pilot.toml", "log-level = \"debug\"\n")
		before := m.Files()
		harness.ExpectFailure(t, m.Pilot("node", "install", "--lazy"), "/etc/pilot/pilot.toml", `lazy-listen is not set, not "unix:///run/pilot/lazy.sock"`)
		m.CheckFiles(before)
	})
}

// lazyImage makes an encrypted eStargz image, and returns its name in the registry.
func lazyImage(c *harness.CI, name, secret string) string {
	c.T.Helper()
	l := harness.NewLayout(c.T)
	name = c.Registry + "/" + name
	harness.Output(c.T, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name+"-plain", l.Image(harness.LayerKinds[1], false, harness.Arch, secret))))
	harness.Output(c.T, c.CtrPilot("images", "encrypt", "--estargz", "--recipient", "provider:pilot:team-a", name+"-plain", name))
	harness.Output(c.T, c.CtrPilot("images", "push", "--plain-http", name))
	return name
}

// lazyNode is a machine that pulls lazily.
type lazyNode struct {
	*harness.Node
	m                              *harness.Machine
	pilot, snapshotter, containerd *harness.Process
}

// newLazyNode installs pilot on a machine with --lazy, and starts it.
func newLazyNode(t testing.TB, m *harness.Machine, broker string) *lazyNode {
	t.Helper()
	// The machine's root is an overlay, on which there can be no other.
	m.Mount("tmpfs", "var/lib/pilot/snapshotter", "tmpfs", 0, "")
	m.BrokerAt(broker)
	harness.Output(t, m.Pilot("node", "install", "--lazy", "--broker", "unix:///run/copilot/copilot.sock"))
	n := &lazyNode{m: m, Node: &harness.Node{T: t, Dir: filepath.Dir(m.Root), Socket: m.Root + "/run/containerd/containerd.sock"}}
	n.startPilot(t)
	n.startSnapshotter(t)
	n.startContainerd(t)
	return n
}

func (n *lazyNode) startPilot(t testing.TB) {
	t.Helper()
	n.startPilotAt(t, "lazy.sock")
}

// startPilotAt starts pilot, and waits for one of its sockets.
func (n *lazyNode) startPilotAt(t testing.TB, socket string) {
	t.Helper()
	n.pilot = n.m.Start(t, "pilot", "serve")
	harness.Await(t, "pilot", harness.Reachable(n.m.Root+"/run/pilot/"+socket))
}

func (n *lazyNode) startSnapshotter(t testing.TB) {
	t.Helper()
	n.snapshotter = n.m.Start(t, "pilot", "snapshotter")
	harness.Await(t, "the snapshotter", harness.Reachable(n.m.Root+"/run/pilot/snapshotter.sock"))
}

func (n *lazyNode) startContainerd(t testing.TB) {
	t.Helper()
	n.containerd = n.m.Start(t, "containerd")
	n.AwaitCRI()
}

// run runs a container of an image, and returns what it prints.
func (n *lazyNode) run(t testing.TB, image string) string {
	t.Helper()
	return harness.ContainerOutput(t, n.m.Run("ctr", "--namespace", "k8s.io", "run", "--rm", "--snapshotter", "pilot-lazy", image, harness.ContainerID()))
}

// doctor returns what the doctor prints, and checks how it ends.
func (n *lazyNode) doctor(t testing.TB, ok bool, args ...string) string {
	t.Helper()
	cmd := n.m.Run("pilot", append([]string{"node", "doctor", "--kek", "team-a"}, args...)...)
	out, err := cmd.CombinedOutput()
	if (err == nil) != ok {
		t.Errorf("doctor: %v\n%s", err, out)
	}
	return string(out)
}

// expectStep checks the lines of a step: its result, and what they say.
func expectStep(t testing.TB, out, result, step string, said ...string) {
	t.Helper()
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[1] != step || fields[0] != result {
			continue
		}
		if !slices.ContainsFunc(said, func(s string) bool { return !strings.Contains(out, s) }) {
			return
		}
	}
	t.Errorf("no step %s that is %s and says %q in\n%s", step, result, said, out)
}

// layers returns the layers of an image that are in containerd's content store.
func (n *lazyNode) layers(t testing.TB) (pulled int) {
	t.Helper()
	for line := range strings.Lines(harness.Output(t, n.Ctr("--namespace", "k8s.io", "content", "list"))) {
		if strings.Contains(line, "containerd.io/distribution.source") && !strings.Contains(line, "containerd.io/gc.ref") {
			pulled++
		}
	}
	return pulled
}

// TestLazyNode pulls images on nodes that are set up with --lazy, and takes away what it
// takes one by one.
func TestLazyNode(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	secret := harness.NewSecret()
	sealed := lazyImage(c, "sealed:1", secret)
	gzip := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	plain := gzip + "-plain"
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
	unsealed := c.Edit(sealed, "unsealed", func(m *ocispec.Manifest) {
		for i := range m.Layers {
			delete(m.Layers[i].Annotations, "org.opencontainers.image.enc.pilot.lazy")
		}
	})
	versions := []string{"1.7", "2.4.2"}
	if os.Getenv("PILOT_NODES") == "all" {
		versions = append(versions, "2.0.7", "2.2.9")
	}
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			n := newLazyNode(t, harness.Machines()[version](t), c.BrokerURL)
			out := n.doctor(t, true)
			expectStep(t, out, "ok", "snapshotter", "/run/pilot/snapshotter.sock")
			expectStep(t, out, "ok", "lazy", "without being pulled")

			harness.Output(t, n.Crictl("pull", sealed))
			if pulled := n.layers(t); pulled != 0 {
				t.Errorf("%d layers were pulled", pulled)
			}
			if out := n.run(t, sealed); !strings.Contains(out, secret) {
				t.Errorf("the lazily pulled image prints %s", out)
			}
			expectStep(t, n.doctor(t, true, sealed), "ok", "image", "is mounted, and was not pulled")
			harness.Output(t, n.Crictl("pull", gzip))
			if out := n.run(t, gzip); !strings.Contains(out, c.Secrets[gzip]) {
				t.Errorf("the other image prints %s", out)
			}
			expectStep(t, n.doctor(t, true, gzip), "warning", "image", "was pulled in full: it is not eStargz")
			harness.Output(t, n.Crictl("pull", plain))
			expectStep(t, n.doctor(t, true, plain), "warning", "image", "is not encrypted")
			expectStep(t, n.doctor(t, false, c.Registry+"/nothing:1"), "failed", "image", "containerd has no image")
			if version != "2.4.2" {
				n.uninstall(t, sealed, gzip, plain)
				return
			}

			// The same layer without its seal can't be pulled lazily where it is mounted
			// already, so the image goes.
			harness.Output(t, n.Crictl("rmi", sealed))
			harness.Output(t, n.Crictl("pull", unsealed))
			expectStep(t, n.doctor(t, true, unsealed), "warning", "image", "was pulled in full: pilot says: ", "not sealed")
			harness.Output(t, n.Crictl("rmi", unsealed))
			harness.Output(t, n.Crictl("pull", sealed))

			// The node is restarted, while somebody is in a lazily mounted layer.
			pulled := n.layers(t)
			within := n.m.Start(t, "sh", "-c", "cd $(grep -o '/var/lib/pilot/snapshotter/[^ ]*/fs' /proc/self/mountinfo | head -n 1) && touch /tmp/within && exec sleep 1000")
			harness.Await(t, "somebody in a layer", func() error { return n.m.Run("test", "-e", "/tmp/within").Run() })
			n.containerd.Stop(t)
			n.snapshotter.Kill()
			n.pilot.Stop(t)
			n.startSnapshotter(t) // which waits for nothing
			within.Stop(t)
			n.startContainerd(t)
			harness.ExpectFailure(t, n.m.Run("ctr", "--namespace", "k8s.io", "run", "--rm", "--snapshotter", "pilot-lazy", sealed, harness.ContainerID()), "pilot node doctor IMAGE", "unavailable")
			expectStep(t, n.doctor(t, false, sealed), "failed", "image", "is mounted, and no container of it starts: pilot does not answer")
			n.startPilot(t)
			if out := n.run(t, sealed); !strings.Contains(out, secret) {
				t.Errorf("mounted again, the image prints %s", out)
			}
			if now := n.layers(t); now != pulled {
				t.Errorf("there were %d layers before the restart, and are %d", pulled, now)
			}

			// What keeps images from being pulled lazily.
			n.snapshotter.Stop(t)
			out = n.doctor(t, false)
			expectStep(t, out, "failed", "snapshotter", "systemctl start pilot-snapshotter.service")
			expectStep(t, out, "skipped", "lazy", "depends on snapshotter")
			n.startSnapshotter(t)

			if err := os.Chmod(n.m.Root+"/run/pilot/lazy.sock", 0o666); err != nil {
				t.Fatal(err)
			}
			expectStep(t, n.doctor(t, false), "failed", "lazy", "has mode 0666")
			if err := os.Chmod(n.m.Root+"/run/pilot/lazy.sock", 0o600); err != nil {
				t.Fatal(err)
			}

			// The machine shares /dev with the host, so only the mount namespace differs.
			fuse := n.m.Root + "/dev/fuse"
			if err := syscall.Mount("/dev/null", fuse, "", syscall.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			out = n.doctor(t, false)
			if err := syscall.Unmount(fuse, 0); err != nil {
				t.Fatal(err)
			}
			expectStep(t, out, "failed", "lazy", "/dev/fuse is not", "modprobe fuse")

			conf := n.m.Root + "/etc/pilot/pilot.toml"
			was := harness.Read(t, conf)
			harness.Write(t, conf, strings.ReplaceAll(was, "lazy-listen", "#lazy-listen"))
			expectStep(t, n.doctor(t, false), "failed", "lazy", "lazy-listen is off in /etc/pilot/pilot.toml")
			harness.Write(t, conf, was)

			dropIn := n.m.Root + "/etc/containerd/conf.d/pilot.toml"
			was = harness.Read(t, dropIn)
			for old, b := range map[string][2]string{
				"disable_snapshot_annotations = false":        {"disable_snapshot_annotations = true", "disable_snapshot_annotations of io.containerd.cri.v1.images is not false"},
				"enable_remote_snapshot_annotations = 'true'": {"other = 'true'", "does not export enable_remote_snapshot_annotations"},
				"address = '/run/pilot/snapshotter.sock'":     {"address = '/run/elsewhere.sock'", "there is no proxy plugin pilot-lazy of type snapshot at /run/pilot/snapshotter.sock"},
			} {
				if !strings.Contains(was, old) {
					t.Errorf("no %q in %s", old, was)
				}
				harness.Write(t, dropIn, strings.ReplaceAll(was, old, b[0]))
				expectStep(t, n.doctor(t, false), "failed", "lazy", b[1], "pilot node install --now")
			}
			harness.Write(t, dropIn, was)
			expectStep(t, n.doctor(t, true), "ok", "lazy")

			// containerd reaches a registry by a file that was not there when pilot was installed.
			harness.Write(t, n.m.Root+"/etc/containerd/certs.d/registry.test/hosts.toml", "server = 'https://registry.test'\n")
			expectStep(t, n.doctor(t, true), "warning", "lazy", "containerd reaches registries as /etc/containerd/certs.d/registry.test says, and pilot does not", "set mirror-hosts-dir")
			for _, want := range []string{"/etc/pilot/pilot.toml", "nothing to change"} {
				if out := harness.Output(t, n.m.Pilot("node", "install")); !strings.Contains(out, want) {
					t.Errorf("no %q in %s", want, out)
				}
			}
			if text := harness.Read(t, conf); !strings.Contains(text, `mirror-hosts-dir = "/etc/containerd/certs.d"`) {
				t.Errorf("pilot.toml is\n%s", text)
			}
			expectStep(t, n.doctor(t, true), "ok", "lazy")
			n.uninstall(t, sealed, gzip, plain)
		})
	}
}

// uninstall takes pilot from a node, and checks that it still has an image that was pulled in
// full, and that the kubelet would pull the lazy one again, and a plain one whose layers
// were not pulled because their snapshots were there.
func (n *lazyNode) uninstall(t testing.TB, lazy, full, plain string) {
	t.Helper()
	out := harness.Output(t, n.m.Pilot("node", "uninstall"))
	n.containerd.Stop(t)
	harness.ExpectFailure(t, n.m.Run("pilot", "snapshotter", "--remove"), "pilot's snapshotter is running")
	n.snapshotter.Stop(t)
	n.startContainerd(t)
	// Another test may have containers below a directory of that name.
	harness.CombinedOutput(t, n.m.Run("pilot", "snapshotter", "--remove", "--force"))
	images := harness.Output(t, n.Crictl("images", "-o", "json"))
	if strings.Contains(images, lazy+`"`) || !strings.Contains(images, full+`"`) || strings.Contains(images, plain+`"`) {
		t.Errorf("after uninstall, which says %s\ncontainerd has the images %s", out, images)
	}
	if mounts := harness.Output(t, n.m.Run("cat", "/proc/self/mountinfo")); strings.Contains(mounts, "stargz") {
		t.Errorf("mounts are left: %s", mounts)
	}
	harness.Output(t, n.Crictl("pull", plain))
}
