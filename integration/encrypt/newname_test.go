package encrypt

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestNoImageReplaced gives results the names of other images, and has a name
// become another image while the command works.
func TestNoImageReplaced(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), "", "")
	// A key provider that runs a script when it is asked, which is in the middle of
	// the command.
	script := dir + "/meanwhile"
	c.Ocicrypt = harness.Write(t, dir+"/ocicrypt.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "/bin/sh", "args": ["-c", "test ! -e %s || sh %[1]s >&2; exec %s/pilot keyprovider --config /dev/null --broker %s"]}}}}`, script, harness.Bin, brokerURL))
	for i, name := range []string{"example.com/app:1", "example.com/other:1"} {
		l := harness.NewLayout(t)
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(fmt.Sprintf("%s/%d.tar", dir, i), name, l.Image(harness.LayerKinds[i], false, harness.Arch, harness.NewSecret()))))
	}
	app, other := c.Target("example.com/app:1"), c.Target("example.com/other:1")
	encrypt := func(args ...string) *exec.Cmd {
		return c.CtrPilot(append([]string{"images", "encrypt", "--recipient", "provider:pilot:team-a"}, args...)...)
	}
	harness.Output(t, encrypt("example.com/app:1", "example.com/app:encrypted"))
	encrypted := c.Target("example.com/app:encrypted")
	byDigest := "example.com/app@" + app
	harness.Output(t, c.CtrPilot("images", "tag", "example.com/app:1", byDigest))
	unchanged := func() {
		t.Helper()
		for name, want := range map[string]string{"example.com/app:1": app, "example.com/other:1": other, "example.com/app:encrypted": encrypted, byDigest: app} {
			if got := c.Target(name); got != want {
				t.Errorf("%s is %s, and was %s", name, got, want)
			}
		}
	}

	const exists, advice = `image example.com/other:1 already exists`, "replace it with --force"
	harness.ExpectFailure(t, encrypt("example.com/app:1", "example.com/other:1"), exists, advice)
	harness.ExpectFailure(t, c.CtrPilot("images", "decrypt", "example.com/app:encrypted", "example.com/other:1"), exists, advice)
	for _, force := range []string{"--force=false", "--force"} {
		harness.ExpectFailure(t, encrypt(force, byDigest), "is named by its digest, which changes: give it a new name")
		harness.ExpectFailure(t, encrypt(force, "example.com/app:1", "example.com/app@"+other), "is named by its digest")
		harness.ExpectFailure(t, c.CtrPilot("images", "decrypt", force, "example.com/app:encrypted", "example.com/app@"+app), "is named by its digest")
	}
	unchanged()

	for what, name := range map[string]string{"its own name": "", "a new name": "example.com/app:new"} {
		t.Run(what, func(t *testing.T) {
			args := []string{"example.com/app:1"}
			moved := args[0]
			if name != "" {
				args, moved = append(args, name), name
			}
			harness.Write(t, script, fmt.Sprintf("%s/bin/ctr --address %s images tag --force --local example.com/other:1 %s && rm %s", harness.Tools, c.Socket, moved, script))
			harness.ExpectFailure(t, encrypt(args...), map[bool]string{true: "it was changed to " + other + " while this command ran", false: "already exists"}[name == ""])
			if _, err := os.Stat(script); err == nil {
				t.Fatal("the script was not run")
			}
			if got := c.Target(moved); got != other {
				t.Errorf("%s is %s, and was made %s", moved, got, other)
			}
			harness.Output(t, c.CtrPilot("images", "tag", "--force", "example.com/app:encrypted", "example.com/app:1"))
			harness.Output(t, c.CtrPilot("images", "decrypt", "example.com/app:1"))
			if name != "" {
				harness.Output(t, c.CtrPilot("images", "remove", name))
			}
			unchanged()
		})
	}
	harness.Output(t, encrypt("--force", "example.com/app:1", "example.com/other:1"))
	harness.Output(t, c.CtrPilot("images", "decrypt", "--force", "example.com/other:1", "example.com/app:encrypted"))
	if got := c.Target("example.com/app:encrypted"); got != app {
		t.Errorf("replaced with --force it is %s, not %s", got, app)
	}
	c.ExpectNothingPending()
}

// TestErrorAdvisesHowToFetchMissingLayers encrypts and decrypts an image that a node pulled after its plain
// twin, so that it has no layers, and does what the error advises.
func TestErrorAdvisesHowToFetchMissingLayers(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
	_, conf := harness.StartPilot(t, dir+"/ci", brokerURL)
	harness.StartPilot(t, dir+"/node", brokerURL)
	c := harness.NewCI(t, dir+"/ci", conf)
	n := harness.NewDifferNode(t, dir+"/node", harness.DifferConfig{Containerd: harness.Containerd2(), Local: true})
	n.Ocicrypt = conf
	name := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name+"-plain"))
	harness.Output(t, n.Crictl("pull", name+"-plain"))
	harness.Output(t, n.Crictl("pull", name))
	in := func(args ...string) *exec.Cmd {
		return n.CtrPilot(append([]string{"--namespace", "k8s.io"}, args...)...)
	}
	stored := func(digest string) bool {
		_, err := os.Stat(filepath.Join(n.Dir, "root/io.containerd.content.v1.content/blobs/sha256", strings.TrimPrefix(digest, "sha256:")))
		return err == nil
	}
	layer := strings.Fields(strings.Split(harness.Output(t, in("images", "layerinfo", name)), "\n")[1])[1]
	if stored(layer) {
		t.Fatal("the layers are there, so this tests nothing")
	}

	// More recipients take no layer.
	harness.Output(t, in("images", "encrypt", "--recipient", "provider:pilot:team-b", name, name+"-both"))
	if out := harness.Output(t, in("images", "layerinfo", name+"-both")); strings.Count(out, "team-a@1, team-b@1") != 2 {
		t.Errorf("layerinfo:\n%s", out)
	}

	said := harness.ExpectFailure(t, in("images", "decrypt", name, name+"-decrypted"), "is not here", "fetches what is missing")
	_, advice, _ := strings.Cut(said, `"ctr-pilot `)
	advice, _, _ = strings.Cut(advice, `"`)
	harness.Output(t, n.CtrPilot(strings.Fields(strings.Replace(advice, "fetch", "fetch --plain-http", 1))...))
	harness.Output(t, in("images", "decrypt", name, name+"-decrypted"))
	// They stay when the garbage collector has run.
	harness.Output(t, in("images", "remove", "--sync", name+"-both"))
	if !stored(layer) {
		t.Error("the layers that were fetched are gone")
	}
}

// TestErrorNamesWhereTheImageIs names images that are in another namespace or under a longer
// name, and layers that some platform does not have.
func TestErrorNamesWhereTheImageIs(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	_, public := harness.ECKeyPairs(t, dir+"/keys", 1)
	conf := "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'example.com']\n  endpoint = ['https://mirror.example.com']\n"
	c := harness.StartNode(t, dir+"/ci", harness.Containerd2(), harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`), conf)
	l := harness.NewLayout(t)
	two := l.Image(harness.LayerKinds[0], false, "s390x", harness.NewSecret())
	base, baseID := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"base": []byte("base")})
	var layers []harness.Object
	var ids []string
	layers, ids = append(layers, base), append(ids, baseID)
	for i := range 5 {
		layer, id := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"file": []byte(fmt.Sprint(i, harness.NewSecret()))})
		layers, ids = append(layers, layer), append(ids, id)
	}
	six := l.Manifest(layers, ids)
	six["platform"] = harness.Object{"architecture": harness.Arch, "os": "linux"}
	index := l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []harness.Object{six, two}})
	harness.Output(t, c.CtrPilot("--namespace", "k8s.io", "images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", "docker.io/library/app:latest", index)))
	b := harness.NewLayout(t)
	onlyBase, _ := b.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"base": []byte("base")})
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", b.Tar(dir+"/base.tar", "example.com/base:1", b.Manifest([]harness.Object{onlyBase}, []string{baseID}))))

	for _, args := range [][]string{{"layerinfo"}, {"encrypt", "--recipient", "jwe:" + public[0]}, {"decrypt"}, {"rewrap"}} {
		harness.ExpectFailure(t, c.CtrPilot(append(append([]string{"images"}, args...), "app")...), `image "app": not found in namespace default`, `there is docker.io/library/app:latest in namespace k8s.io: choose that with "ctr-pilot --namespace k8s.io"`)
	}
	in := func(args ...string) *exec.Cmd {
		return c.CtrPilot(append([]string{"--namespace", "k8s.io"}, args...)...)
	}
	harness.ExpectFailure(t, in("images", "layerinfo", "library/app"), "there is docker.io/library/app:latest")
	harness.ExpectFailure(t, in("images", "layerinfo", "nobody"), `image "nobody": not found in namespace k8s.io`)

	encrypted := func(name string) (layers []string) {
		for line := range strings.Lines(harness.Output(t, in("images", "layerinfo", name))) {
			if f := strings.Fields(line); strings.Contains(line, "jwe") {
				layers = append(layers, f[0]+" "+f[2])
			}
		}
		return layers
	}
	for name, test := range map[string]struct {
		args []string
		want string
		warn []string
	}{
		"range":   {[]string{"--layer", "2-4"}, "2 3 4", []string{"platform linux/s390x has 2 layers, and no layer 2", "no layer 3", "no layer 4"}},
		"several": {[]string{"--layer", "0,-1"}, "0 5 0 1", nil},
		"base":    {[]string{"--all-but-base", "example.com/base:1"}, "1 2 3 4 5 0 1", []string{"platform linux/s390x has no layer of the base image"}},
	} {
		if name == "base" {
			harness.Output(t, c.Ctr("images", "export", "--local", dir+"/b.tar", "example.com/base:1"))
			harness.Output(t, in("images", "import", "--no-unpack", dir+"/b.tar"))
		}
		cmd := in(append(append([]string{"images", "encrypt", "--recipient", "jwe:" + public[0]}, test.args...), "docker.io/library/app:latest", "example.com/app:"+name)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
			continue
		}
		for _, w := range test.warn {
			if !strings.Contains(string(out), w) {
				t.Errorf("%s: want %q in\n%s", name, w, out)
			}
		}
		if test.warn == nil && strings.Contains(string(out), "warning") {
			t.Errorf("%s: %s", name, out)
		}
		var got []string
		for _, l := range encrypted("example.com/app:" + name) {
			got = append(got, strings.Fields(l)[0])
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: encrypted layers %q, not %q", name, got, test.want)
		}
	}
	harness.ExpectFailure(t, in("images", "encrypt", "--recipient", "jwe:"+public[0], "--layer", "0", "--all-but-base", "example.com/base:1", "docker.io/library/app:latest", "x"), "mutually exclusive")
	harness.ExpectFailure(t, in("images", "encrypt", "--recipient", "jwe:"+public[0], "--all-but-base", "docker.io/library/app:latest", "docker.io/library/app:latest", "x"), "no layer was encrypted: it has none, or the flags leave out all")

	// An archive that Docker's graph drivers can't load.
	export := in("images", "export", "--all-platforms", dir+"/encrypted.tar", "example.com/app:several")
	if out, err := export.CombinedOutput(); err != nil || !strings.Contains(string(out), `fails with "invalid tar header" where Docker uses a graph driver`) {
		t.Errorf("export: %v\n%s", err, out)
	}

	// containerd has deprecation warnings, and not every command shows them.
	if out := harness.Output(t, c.CtrPilot("deprecations", "list")); !strings.Contains(out, "io.containerd.deprecation/cri-registry-mirrors") {
		t.Fatalf("deprecations: %s", out)
	}
	list := c.CtrPilot("images", "list")
	if out, err := list.CombinedOutput(); err != nil || strings.Contains(string(out), "DEPRECATION") {
		t.Errorf("images list: %v\n%s", err, out)
	}
	list = c.CtrPilot("images", "list")
	list.Env = append(list.Env, "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=false")
	if out, err := list.CombinedOutput(); err != nil || !strings.Contains(string(out), "DEPRECATION") {
		t.Errorf("images list with warnings: %v\n%s", err, out)
	}
}
