package integration

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
)

// engine is a Docker Engine on a containerd that has pilot.
type engine struct {
	t       testing.TB
	m       *machine
	node    *node // its containerd, from outside
	dockerd *process
	args    []string // of dockerd
}

// buildx is Docker's client for BuildKit in Debian 13.
const buildx = "/usr/libexec/docker/cli-plugins/docker-buildx"

// dockerTest is a broker, and images that a node may and may not decrypt.
type dockerTest struct {
	broker *madeBroker
	ci     *ci

	allowed, denied string // encrypted images
	index           string // an encrypted one for several platforms
	fresh, plain    string // an encrypted image, and the same in plain
	base            string // an encrypted one that is only built on
	pause           string // an encrypted one that runs until it is stopped
}

// newDockerTest makes them, and looks for the programs of scripts/install-tools.sh
// that the test needs besides the usual ones.
func newDockerTest(t testing.TB, install string, programs ...string) *dockerTest {
	t.Helper()
	for _, p := range append(programs, "trixie/usr/sbin/dockerd", "trixie"+buildx) {
		if _, err := os.Stat(filepath.Join(tools, p)); err != nil {
			t.Fatalf("%s is missing: install it with \"%s\"", p, install)
		}
	}
	b := initialized(t, "team-a", "team-b")
	write(t, b.dir+"/policy.toml", read(t, b.dir+"/policy.toml")+
		"[[rule]]\nidentities = [\"spiffe://example.com/node/*\"]\nkeks = [\"team-b\"]\nactions = [\"unwrap\", \"export\"]\ndeny = true\n")
	dir := tempDir(t)
	_, conf := pilot(t, dir+"/ci", "unix://"+b.dir+"/copilot.sock")
	c := newCI(t, dir+"/ci", conf)
	b.enroll(t, "docker1")
	d := &dockerTest{
		broker: b, ci: c,
		allowed: c.image(kinds[0], "provider:pilot:team-a"), // uncompressed: what is plain in it is found
		denied:  c.image(kinds[1], "provider:pilot:team-b"),
	}
	d.fresh = c.image(kinds[2], "provider:pilot:team-a")
	d.plain = d.fresh + "-plain"
	d.base = c.image(kinds[2], "provider:pilot:team-a")
	d.index = c.registry + "/index:1"
	l := newLayout(t)
	c.secrets[d.index] = newSecret()
	c.publish(l, d.index, l.index(kinds[1], c.secrets[d.index]), "provider:pilot:team-a")
	output(t, c.ctrPilot("images", "push", "--plain-http", d.plain))
	d.pause = c.registry + "/service:1"
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", c.pause(), d.pause))
	output(t, c.ctrPilot("images", "push", "--plain-http", d.pause))
	return d
}

// run does with an engine what its users do. With that daemon.json it has the
// containerd image store.
func (d *dockerTest) run(t *testing.T, e *engine, daemonJSON string) {
	secret := d.ci.secrets[d.allowed]
	runs := func(image string) {
		t.Helper()
		if out := output(t, e.docker("run", "--rm", "--network", "none", image)); !strings.Contains(out, "hello, "+secret) {
			t.Errorf("docker run: %s", out)
		}
	}
	serving := e.servePilot()
	e.serveDocker(daemonJSON)
	if report := e.doctor(); !strings.Contains(report, "containerd image store: encrypted images work") {
		t.Errorf("doctor: %s", report)
	}

	output(t, e.docker("pull", d.allowed))
	runs(d.allowed)
	if out := output(t, e.docker("run", "--rm", "--network", "none", d.index)); !strings.Contains(out, d.ci.secrets[d.index]) {
		t.Errorf("docker run of an index: %s", out)
	}

	// What leaves the engine is encrypted, and can be used with the KEK only.
	archive := write(t, filepath.Join(tempDir(t), "saved.tar"), output(t, e.docker("save", d.allowed)))
	if strings.Contains(read(t, archive), secret) {
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
	output(t, e.docker("image", "rm", "--force", d.allowed))
	load := e.docker("load")
	in, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	load.Stdin = in
	output(t, load)
	runs(d.allowed)
	pushed := d.name(t, "pushed")
	output(t, e.docker("tag", d.allowed, pushed))
	output(t, e.docker("push", pushed))
	d.pushedEncrypted(pushed, 2)

	// Two containers of one image, as compose starts them.
	output(t, e.docker("pull", d.pause))
	for _, name := range []string{"web-1", "web-2"} {
		output(t, e.docker("run", "--detach", "--network", "none", "--name", name, d.pause))
	}
	// They outlive a restart of containerd, which install asks for.
	e.node.stop(t)
	e.serveContainerd()
	await(t, "docker after a restart of containerd", func() error { return e.docker("pull", d.pause).Run() })
	if out := output(t, e.docker("ps", "--filter", "name=web-", "--format", "{{.Names}} {{.State}}")); strings.Count(out, "running") != 2 {
		t.Errorf("docker ps: %s", out)
	}
	output(t, e.docker("rm", "--force", "web-1", "web-2"))

	// What is committed or built has plain layers above the encrypted ones.
	output(t, e.docker("create", "--name", "changed", "--network", "none", d.allowed))
	output(t, e.docker("cp", write(t, d.broker.dir+"/added", "added"), "changed:/added"))
	committed, built, byBuildKit := d.name(t, "committed"), d.name(t, "built"), d.name(t, "by-buildkit")
	output(t, e.docker("commit", "changed", committed))
	output(t, e.docker("rm", "changed"))
	e.build(built, false, "FROM "+d.allowed+"\nRUN [\"/hello\"]\nWORKDIR /work\n")
	runs(built)
	for _, image := range []string{committed, built} {
		if out := output(t, e.node.ctrPilot("--namespace", "moby", "images", "layerinfo", image)); strings.Count(out, "provider.pilot") != 2 {
			t.Errorf("%s before it is encrypted:\n%s", image, out)
		}
		output(t, e.node.ctrPilot("--namespace", "moby", "images", "encrypt", "--recipient", "provider:pilot:team-a", image))
		output(t, e.docker("push", image))
		d.pushedEncrypted(image, 3)
	}

	// BuildKit pulls the base image itself, and loses the keys of its layers.
	e.build(byBuildKit, true, "FROM "+d.base+"\nRUN --network=none [\"/hello\"]\nWORKDIR /work\n")
	if out := output(t, e.docker("run", "--rm", "--network", "none", byBuildKit)); !strings.Contains(out, d.ci.secrets[d.base]) {
		t.Errorf("docker run of what BuildKit built: %s", out)
	}
	if out := output(t, e.node.ctrPilot("--namespace", "moby", "images", "layerinfo", byBuildKit)); strings.Contains(out, "provider.pilot") || strings.Count(out, "NO KEY") != 2 {
		t.Errorf("what BuildKit built:\n%s", out)
	}
	output(t, e.docker("push", byBuildKit))
	fails(t, d.ci.ctrPilot("images", "pull", "--plain-http", byBuildKit), "the layer has no recipients")
	output(t, e.node.ctrPilot("--namespace", "moby", "images", "encrypt", "--recipient", "provider:pilot:team-a",
		"--keys-from", d.base, "--plain-http", byBuildKit))
	output(t, e.docker("push", byBuildKit))
	d.pushedEncrypted(byBuildKit, 5) // one is an attestation

	// The node may not use that KEK.
	fails(t, e.docker("pull", d.denied), "pilot: layer sha256:", `KEK "team-b"`, "spiffe://example.com/node/docker1 may not")
	fails(t, e.docker("run", "--rm", d.denied), `KEK "team-b"`)

	// pilot is down.
	serving.stop(t)
	for _, image := range []string{d.fresh, d.plain} {
		fails(t, e.docker("pull", image), "dial unix:///run/pilot/diff.sock")
	}
	runs(d.allowed)
	e.servePilot()
	await(t, "a pull", func() error { return e.docker("pull", d.fresh).Run() })
	output(t, e.docker("pull", d.plain))

	// With a graph driver Docker unpacks layers by itself.
	e.serveDocker(`{"features": {"containerd-snapshotter": false}}`)
	for _, image := range []string{d.allowed, d.denied} {
		fails(t, e.docker("pull", image), "failed to register layer: archive/tar: invalid tar header")
	}
	output(t, e.docker("pull", d.plain))
	before := output(t, e.docker("save", d.plain))
	for range 2 {
		report := e.doctor()
		for _, want := range []string{"uses its graph-driver store", `set "features": {"containerd-snapshotter": true} in /etc/docker/daemon.json`} {
			if !strings.Contains(report, want) {
				t.Errorf("doctor: want %q in\n%s", want, report)
			}
		}
		// Docker 29 stays with the store in which it has images, and before
		// that it is the default.
		e.serveDocker("{}")
	}
	// What the doctor says helps.
	e.serveDocker(`{"features": {"containerd-snapshotter": true}}`)
	runs(d.allowed)
	output(t, e.docker("image", "rm", "--force", d.plain))
	load = e.docker("load")
	load.Stdin = strings.NewReader(before)
	output(t, load)
	if out := output(t, e.docker("run", "--rm", "--network", "none", d.plain)); !strings.Contains(out, d.ci.secrets[d.fresh]) {
		t.Errorf("docker run of what a graph driver had: %s", out)
	}
}

// build has docker build an image, with BuildKit or without.
func (e *engine) build(image string, buildKit bool, dockerfile string) {
	e.t.Helper()
	build := e.docker("build", "--tag", image, "-")
	build.Env = append(build.Env, "DOCKER_BUILDKIT=0")
	if buildKit {
		build.Env = append(build.Env, "DOCKER_BUILDKIT=1")
	}
	build.Stdin = strings.NewReader(dockerfile)
	output(e.t, build)
}

// name returns a name in the registry for an image that a test makes.
func (d *dockerTest) name(t testing.TB, name string) string {
	return d.ci.registry + "/" + strings.ToLower(t.Name()) + "-" + name + ":1"
}

// ownContainerd has an engine start a containerd of its own, where none runs. It
// can't pull an encrypted image then.
func (e *engine) ownContainerd(daemonJSON, encrypted string) {
	e.t.Helper()
	e.dockerd.stop(e.t)
	e.dockerd, e.args = nil, nil
	e.node.stop(e.t)
	e.serveDocker(daemonJSON)
	fails(e.t, e.docker("pull", encrypted), "failed to get stream processor for application/vnd.oci.image.layer.v1.tar+encrypted")
	report := e.doctor()
	for _, want := range []string{"starts a containerd of its own at /var/run/docker/containerd/containerd.sock", "systemctl enable --now containerd.service"} {
		if !strings.Contains(report, want) {
			e.t.Errorf("doctor: want %q in\n%s", want, report)
		}
	}
}

// pushedEncrypted checks that all layers of an image in the registry are
// encrypted, and have their keys.
func (d *dockerTest) pushedEncrypted(name string, layers int) {
	d.ci.t.Helper()
	if contains(d.ci.t, d.ci.storage, d.ci.secrets[d.allowed]) {
		d.ci.t.Error("the secret is in the registry")
	}
	output(d.ci.t, d.ci.ctrPilot("images", "pull", "--plain-http", name))
	if out := output(d.ci.t, d.ci.ctrPilot("images", "layerinfo", name)); strings.Count(out, "provider.pilot") != layers {
		d.ci.t.Errorf("the image that docker pushed: %s", out)
	}
}

// savedLayer is the descriptor of a layer in what docker save wrote.
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

// newEngine sets a machine up with pilot as the node docker1, and starts its
// containerd and its Docker.
func (d *dockerTest) newEngine(t testing.TB, m *machine) *engine {
	t.Helper()
	// Docker's graph driver overlay2 needs a file system below that is no overlay.
	data := tempDir(t)
	m.mount(data, "var/lib/docker", "", syscall.MS_BIND, "")
	m.mount(d.broker.dir, d.broker.dir, "", syscall.MS_BIND, "")
	install := output(t, m.pilot("node", "install", "--broker", d.broker.url(), "--broker-ca", d.broker.dir+"/ca.pem",
		"--broker-cert", d.broker.dir+"/docker1.pem", "--broker-key", d.broker.dir+"/docker1-key.pem"))
	if !strings.Contains(install, "Docker ") {
		t.Errorf("install does not see Docker: %s", install)
	}
	e := &engine{t: t, m: m, node: &node{t: t, socket: m.root + "/run/containerd/containerd.sock", ocicrypt: d.ci.ocicrypt}}
	e.args = []string{"--containerd", "/run/containerd/containerd.sock"}
	e.serveContainerd()
	return e
}

// serveContainerd starts the machine's containerd.
func (e *engine) serveContainerd() {
	e.t.Helper()
	e.node.process = e.m.start(e.t, "containerd")
	await(e.t, "containerd", func() error { return e.node.ctr("version").Run() })
}

// servePilot starts the machine's pilot.
func (e *engine) servePilot() *process {
	e.t.Helper()
	p := e.m.start(e.t, "pilot", "serve")
	await(e.t, "pilot", answers(e.m.root+"/run/pilot/diff.sock"))
	return p
}

// serveDocker starts dockerd with a daemon.json, and stops it before if it runs.
// It listens on its socket only, and touches nothing of the network.
func (e *engine) serveDocker(daemonJSON string) {
	e.t.Helper()
	if e.dockerd != nil {
		e.dockerd.stop(e.t)
	}
	write(e.t, e.m.root+"/etc/docker/daemon.json", daemonJSON)
	e.dockerd = e.m.start(e.t, "dockerd", append(e.args, "--host", "unix:///run/docker.sock",
		"--iptables=false", "--ip6tables=false", "--userland-proxy=false", "--bridge", "none", "--exec-opt", "native.cgroupdriver=cgroupfs")...)
	await(e.t, "dockerd", func() error { return e.docker("version").Run() })
}

// docker returns a command of the machine's docker.
func (e *engine) docker(args ...string) *exec.Cmd {
	e.t.Helper()
	return e.m.run("docker", args...)
}

// doctor returns what pilot's doctor says of Docker, which may be bad.
func (e *engine) doctor() string {
	e.t.Helper()
	out, _ := e.m.run("pilot", "node", "doctor", "--kek", "team-a").CombinedOutput()
	_, report, found := strings.Cut(string(out), " docker  ")
	if !found {
		e.t.Fatalf("the doctor says nothing of docker:\n%s", out)
	}
	return report
}

// TestDockerDebian13 runs Debian 13's Docker 26.1 on its containerd 1.7.24.
func TestDockerDebian13(t *testing.T) {
	t.Parallel()
	d := newDockerTest(t, "scripts/install-tools.sh "+tools)
	e := d.newEngine(t, newMachine(t, filepath.Join(tools, "trixie")))
	const daemonJSON = `{"features": {"containerd-snapshotter": true}}`
	d.run(t, e, daemonJSON)
	e.ownContainerd(daemonJSON, d.allowed)
}
