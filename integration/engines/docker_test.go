package engines

import (
	"archive/tar"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// engine is a Docker Engine on a containerd with pilot.
type engine struct {
	t       testing.TB
	m       *harness.Machine
	node    *harness.Node // its containerd, from outside
	dockerd *harness.Process
	args    []string // of dockerd
}

// buildx is Docker's client for BuildKit in Debian 13.
const buildx = "/usr/libexec/docker/cli-plugins/docker-buildx"

// dockerTest has a broker, and images that the node may and may not decrypt.
type dockerTest struct {
	broker *harness.TLSBroker
	ci     *harness.CI

	allowed, denied string // encrypted images
	index           string // an encrypted one for several platforms
	fresh, plain    string // an encrypted image, and the same in plain
	base            string // an encrypted one that is only built on
	pause           string // an encrypted one that runs until it is stopped
}

// newDockerTest starts the broker and makes the images, and checks that the programs of
// scripts/install-tools.sh exist that the test needs.
func newDockerTest(t testing.TB, install string, programs ...string) *dockerTest {
	t.Helper()
	for _, p := range append(programs, "trixie/usr/sbin/dockerd", "trixie"+buildx) {
		if _, err := os.Stat(filepath.Join(harness.Tools, p)); err != nil {
			t.Fatalf("%s is missing: install it with \"%s\"", p, install)
		}
	}
	b := harness.NewTLSBroker(t, "team-a", "team-b")
	b.AddRules(t, "[[rule]]\nidentities = [\"spiffe://example.com/node/*\"]\nkeks = [\"team-b\"]\nactions = [\"unwrap\", \"export\"]\ndeny = true\n")
	dir := harness.TempDir(t)
	_, conf := harness.StartPilot(t, dir+"/ci", "unix://"+b.Dir+"/copilot.sock")
	c := harness.NewCI(t, dir+"/ci", conf)
	b.Enroll(t, "docker1")
	d := &dockerTest{
		broker: b, ci: c,
		allowed: c.Image(harness.LayerKinds[0], "provider:pilot:team-a"), // uncompressed: what is plain in it is found
		denied:  c.Image(harness.LayerKinds[1], "provider:pilot:team-b"),
	}
	d.fresh = c.Image(harness.LayerKinds[2], "provider:pilot:team-a")
	d.plain = d.fresh + "-plain"
	d.base = c.Image(harness.LayerKinds[2], "provider:pilot:team-a")
	d.index = c.Registry + "/index:1"
	l := harness.NewLayout(t)
	c.Secrets[d.index] = harness.NewSecret()
	c.Publish(l, d.index, l.Index(harness.LayerKinds[1], c.Secrets[d.index]), "provider:pilot:team-a")
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", d.plain))
	d.pause = c.Registry + "/service:1"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", c.Pause(), d.pause))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", d.pause))
	return d
}

// run uses an engine as its users do. daemonJSON selects the containerd image store.
func (d *dockerTest) run(t *testing.T, e *engine, daemonJSON string) {
	secret := d.ci.Secrets[d.allowed]
	runs := func(image string) {
		t.Helper()
		if out := harness.Output(t, e.docker("run", "--rm", "--network", "none", image)); !strings.Contains(out, "hello, "+secret) {
			t.Errorf("docker run: %s", out)
		}
	}
	serving := e.servePilot()
	e.serveDocker(daemonJSON)
	if report := e.doctor(); !strings.Contains(report, "containerd image store: encrypted images work") {
		t.Errorf("doctor: %s", report)
	}

	harness.Output(t, e.docker("pull", d.allowed))
	runs(d.allowed)
	if out := harness.Output(t, e.docker("run", "--rm", "--network", "none", d.index)); !strings.Contains(out, d.ci.Secrets[d.index]) {
		t.Errorf("docker run of an index: %s", out)
	}

	// Images that leave the engine are encrypted, and need the KEK.
	archive := harness.Write(t, filepath.Join(harness.TempDir(t), "saved.tar"), harness.Output(t, e.docker("save", d.allowed)))
	if strings.Contains(harness.Read(t, archive), secret) {
		t.Error("the secret is in what docker save wrote")
	}
	layers := savedLayers(t, archive)
	if len(layers) != 2 {
		t.Errorf("docker save wrote %d layers", len(layers))
	}
	for _, l := range layers {
		if !strings.HasSuffix(l.MediaType, "+encrypted") || l.Annotations["org.opencontainers.image.enc.keys.provider.pilot"] == "" {
			t.Errorf("docker save wrote the layer %+v", l)
		}
	}
	harness.Output(t, e.docker("image", "rm", "--force", d.allowed))
	load := e.docker("load")
	in, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	load.Stdin = in
	harness.Output(t, load)
	runs(d.allowed)
	pushed := d.name(t, "pushed")
	harness.Output(t, e.docker("tag", d.allowed, pushed))
	harness.Output(t, e.docker("push", pushed))
	d.pushedEncrypted(pushed, 2)

	// Two containers of one image, as compose would start them.
	harness.Output(t, e.docker("pull", d.pause))
	for _, name := range []string{"web-1", "web-2"} {
		harness.Output(t, e.docker("run", "--detach", "--network", "none", "--name", name, d.pause))
	}
	// They survive the restart of containerd that install requests.
	e.node.Stop(t)
	e.serveContainerd()
	harness.Await(t, "docker after a restart of containerd", func() error { return e.docker("pull", d.pause).Run() })
	if out := harness.Output(t, e.docker("ps", "--filter", "name=web-", "--format", "{{.Names}} {{.State}}")); strings.Count(out, "running") != 2 {
		t.Errorf("docker ps: %s", out)
	}
	harness.Output(t, e.docker("rm", "--force", "web-1", "web-2"))

	// Committed and built images have plain layers above the encrypted ones.
	harness.Output(t, e.docker("create", "--name", "changed", "--network", "none", d.allowed))
	harness.Output(t, e.docker("cp", harness.Write(t, d.broker.Dir+"/added", "added"), "changed:/added"))
	committed, built, byBuildKit := d.name(t, "committed"), d.name(t, "built"), d.name(t, "by-buildkit")
	harness.Output(t, e.docker("commit", "changed", committed))
	harness.Output(t, e.docker("rm", "changed"))
	e.build(built, false, "FROM "+d.allowed+"\nRUN [\"/hello\"]\nWORKDIR /work\n")
	runs(built)
	for _, image := range []string{committed, built} {
		if out := harness.Output(t, e.node.CtrPilot("--namespace", "moby", "images", "layerinfo", image)); strings.Count(out, "provider.pilot") != 2 {
			t.Errorf("%s before it is encrypted:\n%s", image, out)
		}
		harness.Output(t, e.node.CtrPilot("--namespace", "moby", "images", "encrypt", "--recipient", "provider:pilot:team-a", image))
		harness.Output(t, e.docker("push", image))
		d.pushedEncrypted(image, 3)
	}

	// BuildKit pulls the base image itself, and loses the keys of its layers.
	e.build(byBuildKit, true, "FROM "+d.base+"\nRUN --network=none [\"/hello\"]\nWORKDIR /work\n")
	if out := harness.Output(t, e.docker("run", "--rm", "--network", "none", byBuildKit)); !strings.Contains(out, d.ci.Secrets[d.base]) {
		t.Errorf("docker run of what BuildKit built: %s", out)
	}
	if out := harness.Output(t, e.node.CtrPilot("--namespace", "moby", "images", "layerinfo", byBuildKit)); strings.Contains(out, "provider.pilot") || strings.Count(out, "NO KEY") != 2 {
		t.Errorf("what BuildKit built:\n%s", out)
	}
	harness.Output(t, e.docker("push", byBuildKit))
	harness.ExpectFailure(t, d.ci.CtrPilot("images", "pull", "--plain-http", byBuildKit), "the layer has no recipients")
	harness.Output(t, e.node.CtrPilot("--namespace", "moby", "images", "encrypt", "--recipient", "provider:pilot:team-a",
		"--keys-from", d.base, "--plain-http", byBuildKit))
	harness.Output(t, e.docker("push", byBuildKit))
	d.pushedEncrypted(byBuildKit, 5) // one is an attestation

	// The node may not use that KEK.
	harness.ExpectFailure(t, e.docker("pull", d.denied), "pilot: layer sha256:", `KEK "team-b"`, "spiffe://example.com/node/docker1 may not")
	// Docker 26.1 may lose what the pull before fetched while it checks the image, and
	// reports that instead.
	out := ""
	for range 10 {
		out = harness.CombinedOutput(t, e.docker("run", "--rm", d.denied))
		if !strings.Contains(out, "failed to check image") {
			break
		}
	}
	if !strings.Contains(out, `KEK "team-b"`) {
		t.Errorf("docker run of an image that the node may not decrypt: %s", out)
	}

	// pilot is down.
	serving.Stop(t)
	for _, image := range []string{d.fresh, d.plain} {
		harness.ExpectFailure(t, e.docker("pull", image), "dial unix:///run/pilot/diff.sock")
	}
	runs(d.allowed)
	e.servePilot()
	harness.Await(t, "a pull", func() error { return e.docker("pull", d.fresh).Run() })
	harness.Output(t, e.docker("pull", d.plain))

	// With a graph driver Docker unpacks layers by itself.
	e.serveDocker(`{"features": {"containerd-snapshotter": false}}`)
	for _, image := range []string{d.allowed, d.denied} {
		harness.ExpectFailure(t, e.docker("pull", image), "failed to register layer: archive/tar: invalid tar header")
	}
	harness.Output(t, e.docker("pull", d.plain))
	before := harness.Output(t, e.docker("save", d.plain))
	for range 2 {
		report := e.doctor()
		for _, want := range []string{"uses its graph-driver store", `set "features": {"containerd-snapshotter": true} in /etc/docker/daemon.json`} {
			if !strings.Contains(report, want) {
				t.Errorf("doctor: want %q in\n%s", want, report)
			}
		}
		// Docker 29 keeps the store that has images, and earlier versions use this one by
		// default.
		e.serveDocker("{}")
	}
	// The doctor's fix works.
	e.serveDocker(`{"features": {"containerd-snapshotter": true}}`)
	runs(d.allowed)
	harness.Output(t, e.docker("image", "rm", "--force", d.plain))
	load = e.docker("load")
	load.Stdin = strings.NewReader(before)
	harness.Output(t, load)
	if out := harness.Output(t, e.docker("run", "--rm", "--network", "none", d.plain)); !strings.Contains(out, d.ci.Secrets[d.fresh]) {
		t.Errorf("docker run of what a graph driver had: %s", out)
	}
}

// build builds an image with docker, with or without BuildKit.
func (e *engine) build(image string, buildKit bool, dockerfile string) {
	e.t.Helper()
	build := e.docker("build", "--tag", image, "-")
	build.Env = append(build.Env, "DOCKER_BUILDKIT=0")
	if buildKit {
		build.Env = append(build.Env, "DOCKER_BUILDKIT=1")
	}
	build.Stdin = strings.NewReader(dockerfile)
	harness.Output(e.t, build)
}

// name returns a name in the registry for an image of a test.
func (d *dockerTest) name(t testing.TB, name string) string {
	return d.ci.Registry + "/" + strings.ToLower(t.Name()) + "-" + name + ":1"
}

// ownContainerd lets an engine start its own containerd, where none runs. It can't pull an
// encrypted image then.
func (e *engine) ownContainerd(daemonJSON, encrypted string) {
	e.t.Helper()
	e.dockerd.Stop(e.t)
	e.dockerd, e.args = nil, nil
	e.node.Stop(e.t)
	e.serveDocker(daemonJSON)
	harness.ExpectFailure(e.t, e.docker("pull", encrypted), "failed to get stream processor for application/vnd.oci.image.layer.v1.tar+encrypted")
	report := e.doctor()
	for _, want := range []string{"starts its own containerd at /var/run/docker/containerd/containerd.sock", "systemctl enable --now containerd.service"} {
		if !strings.Contains(report, want) {
			e.t.Errorf("doctor: want %q in\n%s", want, report)
		}
	}
}

// pushedEncrypted checks that all layers of an image in the registry are
// encrypted, and have their keys.
func (d *dockerTest) pushedEncrypted(name string, layers int) {
	d.ci.T.Helper()
	if harness.ContainsText(d.ci.T, d.ci.Storage, d.ci.Secrets[d.allowed]) {
		d.ci.T.Error("the secret is in the registry")
	}
	harness.Output(d.ci.T, d.ci.CtrPilot("images", "pull", "--plain-http", name))
	if out := harness.Output(d.ci.T, d.ci.CtrPilot("images", "layerinfo", name)); strings.Count(out, "provider.pilot") != layers {
		d.ci.T.Errorf("the image that docker pushed: %s", out)
	}
}

// savedLayer returns the descriptor of a layer in an archive of "docker save".
type savedLayer struct {
	MediaType   string
	Annotations map[string]string
}

func savedLayers(t testing.TB, archive string) []savedLayer {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var layers []savedLayer
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return layers
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.LimitReader(tr, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		var manifest struct{ Layers []savedLayer }
		if strings.HasPrefix(h.Name, "blobs/") && json.Unmarshal(b, &manifest) == nil {
			layers = append(layers, manifest.Layers...)
		}
	}
}

// newEngine sets up a machine as the node docker1, and starts its containerd and Docker.
func (d *dockerTest) newEngine(t testing.TB, m *harness.Machine) *engine {
	t.Helper()
	// Docker's graph driver overlay2 does not work on overlayfs.
	data := harness.TempDir(t)
	m.Mount(data, "var/lib/docker", "", syscall.MS_BIND, "")
	m.Mount(d.broker.Dir, d.broker.Dir, "", syscall.MS_BIND, "")
	install := harness.Output(t, m.Pilot("node", "install", "--broker", d.broker.URL(), "--broker-ca", d.broker.Dir+"/ca.pem",
		"--broker-cert", d.broker.Dir+"/docker1.pem", "--broker-key", d.broker.Dir+"/docker1-key.pem"))
	if !strings.Contains(install, "Docker ") {
		t.Errorf("install does not see Docker: %s", install)
	}
	e := &engine{t: t, m: m, node: &harness.Node{T: t, Socket: m.Root + "/run/containerd/containerd.sock", Ocicrypt: d.ci.Ocicrypt}}
	e.args = []string{"--containerd", "/run/containerd/containerd.sock"}
	e.serveContainerd()
	return e
}

// serveContainerd starts the machine's containerd.
func (e *engine) serveContainerd() {
	e.t.Helper()
	e.node.Process = e.m.Start(e.t, "containerd")
	harness.Await(e.t, "containerd", func() error { return e.node.Ctr("version").Run() })
}

// servePilot starts the machine's pilot.
func (e *engine) servePilot() *harness.Process {
	e.t.Helper()
	p := e.m.Start(e.t, "pilot", "serve")
	harness.Await(e.t, "pilot", harness.Reachable(e.m.Root+"/run/pilot/diff.sock"))
	return p
}

// serveDocker restarts dockerd with a daemon.json. It listens on its socket only, and does
// not change the network.
func (e *engine) serveDocker(daemonJSON string) {
	e.t.Helper()
	if e.dockerd != nil {
		e.dockerd.Stop(e.t)
	}
	harness.Write(e.t, e.m.Root+"/etc/docker/daemon.json", daemonJSON)
	e.dockerd = e.m.Start(e.t, "dockerd", append(e.args, "--host", "unix:///run/docker.sock",
		"--iptables=false", "--ip6tables=false", "--userland-proxy=false", "--bridge", "none", "--exec-opt", "native.cgroupdriver=cgroupfs")...)
	harness.Await(e.t, "dockerd", func() error { return e.docker("version").Run() })
}

// docker returns a command of the machine's docker.
func (e *engine) docker(args ...string) *exec.Cmd {
	e.t.Helper()
	return e.m.Run("docker", args...)
}

// doctor returns the doctor's report, of a machine that may fail.
func (e *engine) doctor() string {
	e.t.Helper()
	out, _ := e.m.Run("pilot", "node", "doctor", "--kek", "team-a").CombinedOutput()
	_, report, found := strings.Cut(string(out), " docker  ")
	if !found {
		e.t.Fatalf("the doctor says nothing of docker:\n%s", out)
	}
	return report
}

// TestDockerDebian13 runs Debian 13's Docker 26.1 on its containerd 1.7.24.
func TestDockerDebian13(t *testing.T) {
	t.Parallel()
	d := newDockerTest(t, "scripts/install-tools.sh "+harness.Tools)
	e := d.newEngine(t, harness.NewMachine(t, filepath.Join(harness.Tools, "trixie")))
	const daemonJSON = `{"features": {"containerd-snapshotter": true}}`
	d.run(t, e, daemonJSON)
	e.ownContainerd(daemonJSON, d.allowed)
}
