package integration

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
)

// noTraces checks that nothing is left of pulls that are over: no mount or
// directory of pilot's, no snapshot being made, no ingest.
func (n *node) noTraces(t testing.TB) {
	t.Helper()
	if entries, err := os.ReadDir(filepath.Join(n.dir, "mounts")); err != nil || len(entries) > 0 {
		t.Errorf("left in pilot's directory for mounts: %v, %v", entries, err)
	}
	for _, namespace := range []string{"default", "k8s.io"} {
		for _, snapshotter := range []string{"overlayfs", "native"} {
			if out := output(t, n.ctr("--namespace", namespace, "snapshots", "--snapshotter", snapshotter, "list")); strings.Contains(out, "extract-") {
				t.Errorf("left behind:\n%s", out)
			}
		}
		if out := output(t, n.ctr("--namespace", namespace, "content", "active")); strings.Count(out, "\n") > 1 {
			t.Errorf("left behind:\n%s", out)
		}
	}
}

// collect has containerd collect garbage.
func (n *node) collect(t testing.TB) {
	t.Helper()
	lease := strings.TrimSpace(output(t, n.ctr("--namespace", "k8s.io", "leases", "create")))
	output(t, n.ctr("--namespace", "k8s.io", "leases", "delete", "--sync", lease))
}

// noSnapshots checks that there is no snapshot at all, once the good layers of
// images that failed are collected.
func (n *node) noSnapshots(t testing.TB) {
	t.Helper()
	n.collect(t)
	n.noTraces(t)
	for _, namespace := range []string{"default", "k8s.io"} {
		if out := output(t, n.ctr("--namespace", namespace, "snapshots", "list")); strings.Contains(out, "sha256:") {
			t.Errorf("namespace %s has snapshots:\n%s", namespace, out)
		}
	}
}

// podCommand returns a command that makes a sandbox and a container of an image that
// is there, as the kubelet does.
func (n *node) podCommand(t testing.TB, image string, mounts ...object) *exec.Cmd {
	t.Helper()
	host := object{"namespace_options": object{"network": 2, "pid": 1}}
	sandbox := object{"metadata": object{"name": "pod", "namespace": "test", "uid": "1", "attempt": 1}, "log_directory": filepath.Join(n.dir, "logs"), "linux": object{"security_context": host}}
	container := object{"metadata": object{"name": "app"}, "image": object{"image": image}, "log_path": "app.log", "linux": object{"security_context": host}, "mounts": mounts}
	file := func(name string, o object) string {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return write(t, filepath.Join(n.dir, name), string(b))
	}
	return n.crictl("run", "--no-pull", file("container.json", container), file("sandbox.json", sandbox))
}

// pod runs a container of an image that is there, in a sandbox, and returns what it
// prints.
func (n *node) pod(t testing.TB, image string, mounts ...object) string {
	t.Helper()
	logs := filepath.Join(n.dir, "logs")
	id := strings.TrimSpace(output(t, n.podCommand(t, image, mounts...)))
	defer func() {
		output(t, n.crictl("rmp", "-f", "-a"))
		os.RemoveAll(logs)
	}()
	var said string
	await(t, "the container's end", func() error {
		if out := output(t, n.crictl("ps", "-a", "--id", id, "-o", "json")); !strings.Contains(out, "CONTAINER_EXITED") {
			return fmt.Errorf("it has not: %s", out)
		}
		// What it printed may come later.
		b, err := os.ReadFile(filepath.Join(logs, "app.log"))
		if said = string(b); err == nil && said == "" {
			err = errors.New("its log is empty")
		}
		return err
	})
	return said
}

// pause puts the image of pods' sandboxes into the registry and returns its
// name.
func (c *ci) pause() string {
	c.t.Helper()
	name := c.registry + "/pause:1"
	l := newLayout(c.t)
	image := l.image(kinds[0], false, goarch, "")
	manifest := string(l.files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")])
	_, rest, _ := strings.Cut(manifest, `"config": `)
	var config struct{ Digest string }
	if err := json.NewDecoder(strings.NewReader(rest)).Decode(&config); err != nil {
		c.t.Fatal(err)
	}
	doc := strings.Replace(string(l.files["blobs/sha256/"+strings.TrimPrefix(config.Digest, "sha256:")]), `"/hello"`, `"/hello","pause"`, 1)
	newConfig := l.blob("application/vnd.oci.image.config.v1+json", []byte(doc))
	manifest = strings.Replace(manifest, config.Digest, newConfig["digest"].(string), 1)
	manifest = strings.Replace(manifest, fmt.Sprintf(`"size": %d`, len(doc)-len(`,"pause"`)), fmt.Sprintf(`"size": %d`, len(doc)), 1)
	output(c.t, c.ctrPilot("images", "import", "--no-unpack", l.tar(c.dir+"/image.tar", name, l.blob(image["mediaType"].(string), []byte(manifest)))))
	output(c.t, c.ctrPilot("images", "push", "--plain-http", name))
	return name
}

// TestDiffer pulls and runs with each client, none of which knows of
// encryption.
func TestDiffer(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	images := map[string]string{}
	for _, k := range kinds {
		images[k.name] = c.image(k, "provider:pilot:team-a")
		plain := images[k.name] + "-plain"
		output(t, c.ctrPilot("images", "push", "--plain-http", plain))
		images["plain "+k.name] = plain
		c.secrets[plain] = c.secrets[images[k.name]]
	}
	secret := newSecret()
	l := newLayout(t)
	index := c.registry + "/index:1"
	c.publish(l, index, l.index(kinds[1], secret), "provider:pilot:team-a")
	images["index"], c.secrets[index] = index, secret

	sandbox := c.pause()
	for _, test := range []struct {
		name        string
		v           version
		snapshotter string
		local       bool // pulls by CRI itself
	}{
		{"2.4.2", containerd2(), "overlayfs", false},
		{"2.4.2 native", containerd2(), "native", false},
		{"2.4.2 local pull", containerd2(), "overlayfs", true},
		{"1.7", containerd17(), "overlayfs", false},
		{"1.7 native", containerd17(), "native", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			home := tempDir(t)
			// pilot is there first.
			pilot(t, home, brokerURL)
			n := newDifferNode(t, home, differNode{v: test.v, snapshotter: test.snapshotter, sandbox: sandbox, local: test.local})
			for name, image := range images {
				said := "hello, " + c.secrets[image]
				output(t, n.crictl("pull", image))
				if out := n.pod(t, image); !strings.Contains(out, said) {
					t.Errorf("crictl, %s: %s", name, out)
				}
				output(t, n.crictl("rmi", image))

				for client, pull := range map[string][]string{
					"ctr":         {"images", "pull", "--plain-http", image},
					"ctr --local": {"images", "pull", "--local", "--plain-http", image},
				} {
					if test.v.number < 3 && client == "ctr" {
						continue // 1.7's transfer service unpacks with the built-in differ only
					}
					output(t, n.ctr(append(pull, "--snapshotter", test.snapshotter)...))
					if out := containerOutput(t, n.ctr("run", "--rm", "--snapshotter", test.snapshotter, image, containerID())); !strings.Contains(out, said) {
						t.Errorf("%s, %s: %s", client, name, out)
					}
					output(t, n.ctr("images", "remove", "--sync", image))
				}

				output(t, n.ctrPilot("images", "pull", "--plain-http", "--snapshotter", test.snapshotter, image))
				if out := containerOutput(t, n.ctrPilot("run", "--rm", "--skip-decrypt-auth", "--snapshotter", test.snapshotter, image, containerID())); !strings.Contains(out, said) {
					t.Errorf("ctr-pilot, %s: %s", name, out)
				}
				output(t, n.ctrPilot("images", "remove", "--sync", image))
			}
			n.noTraces(t)
		})
	}
}

// TestDifferCommit has containerd compare snapshots with pilot.
func TestDifferCommit(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.image(kinds[1], "provider:pilot:team-a")
	for _, v := range []version{containerd2(), containerd17()} {
		home := tempDir(t)
		pilot(t, home, brokerURL)
		n := newDifferNode(t, home, differNode{v: v})
		output(t, n.ctr("images", "pull", "--local", "--plain-http", image))
		output(t, n.ctr("containers", "create", image, "c"))
		mounts := output(t, n.ctr("snapshots", "mounts", "/mnt", "c"))
		_, upper, _ := strings.Cut(mounts, "upperdir=")
		upper, _, _ = strings.Cut(upper, ",")
		write(t, filepath.Join(upper, "added"), "something new")
		z, err := gzip.NewReader(strings.NewReader(output(t, n.ctr("snapshots", "diff", "c"))))
		if err != nil {
			t.Fatal(err)
		}
		diff, err := io.ReadAll(z)
		if err != nil || !strings.Contains(string(diff), "something new") {
			t.Errorf("%s: the difference has %d bytes, %v", v.name, len(diff), err)
		}
		n.commitKeepsLease(t, "c")
		n.noTraces(t)
	}
}

// commitKeepsLease checks that what a snapshot adds is kept by the lease of
// whoever asked for it, or containerd's garbage collector may take it at once.
func (n *node) commitKeepsLease(t testing.TB, snapshot string) {
	t.Helper()
	client, err := containerd.New(n.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(t.Context(), "default")
	lease, err := client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	desc, err := rootfs.CreateDiff(leases.WithLease(ctx, lease.ID), snapshot, client.SnapshotService("overlayfs"), client.DiffService())
	if err != nil {
		t.Fatal(err)
	}
	kept, err := client.LeasesService().ListResources(ctx, lease)
	if err != nil || !slices.Contains(kept, leases.Resource{ID: desc.Digest.String(), Type: "content"}) {
		t.Errorf("%s: the lease keeps %v, %v, and not %s", n.name, kept, err, desc.Digest)
	}
	if err := client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		t.Error(err)
	}
}

// TestDifferFails pulls what can't be decrypted.
func TestDifferFails(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, otherURL := broker(t, dir+"/other")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	_, public := keyPair(t, dir+"/keys")
	forKey := c.image(kinds[1], "jwe:"+public)
	var tampered []string
	for _, k := range kinds {
		image := c.image(k, "provider:pilot:team-a")
		tampered = append(tampered,
			c.tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b }),
			c.tamper(image, func(b []byte) []byte { return append(b, b...) }))
	}
	good := c.image(kinds[1], "provider:pilot:team-a")
	wrong := c.wrongDiffID("provider:pilot:team-a")
	for _, v := range []version{containerd2(), containerd17()} {
		t.Run(v.name, func(t *testing.T) {
			home := tempDir(t)
			process := activated(t, home, brokerURL)
			n := newDifferNode(t, home, differNode{v: v})
			for _, image := range tampered {
				fails(t, n.crictl("pull", image), "pilot: layer sha256:", "HMAC does not match")
			}
			fails(t, n.crictl("pull", wrong), "diff")
			fails(t, n.crictl("pull", forKey), "pilot: layer sha256:", "no private key was given")
			if out := output(t, n.crictl("images")); strings.Contains(out, c.registry) {
				t.Errorf("images:\n%s", out)
			}
			n.noSnapshots(t)

			process.stop(t)
			process = activated(t, home, otherURL)
			said := fails(t, n.crictl("pull", good), "pilot: layer sha256:", `KEK "team-a"`, "no such KEK", "copilot keys create")
			// One id leads from the client's error to pilot's log and to the audit log.
			if trace := regexp.MustCompile(`\(trace ([0-9a-f]{32})\)`).FindStringSubmatch(said); trace == nil {
				t.Errorf("the error names no trace: %s", said)
			} else {
				line := regexp.MustCompile(`level=warning.*layer not decrypted.*trace=` + trace[1])
				if found := line.FindString(read(t, process.log)); !strings.Contains(found, "kek=team-a") || !strings.Contains(found, "digest=") || !strings.Contains(found, "no such KEK") {
					t.Errorf("pilot's log has no such line with trace %s: %q", trace[1], found)
				}
				// The refusal of one layer serves the others, and names its trace.
				asked := trace[1]
				if other := regexp.MustCompile(`\(requested in trace ([0-9a-f]{32})\)`).FindStringSubmatch(said); other != nil {
					asked = other[1]
				}
				if log := read(t, dir+"/other/audit.log"); !strings.Contains(log, `"trace":"`+asked+`"`) {
					t.Errorf("the audit log has no line with trace %s: %s", asked, said)
				}
			}
			process.stop(t)
			process = activated(t, home, "unix://"+home+"/nobody.sock")
			fails(t, n.crictl("pull", good), "pilot: layer sha256:", `KEK "team-a"`, "copilot at unix://"+home+"/nobody.sock")
			process.stop(t)
			activated(t, home, brokerURL)
			output(t, n.crictl("pull", good))
			output(t, n.crictl("rmi", good))
			n.noSnapshots(t)
		})
	}
}

// wrongDiffID makes an encrypted image whose configuration names another diff
// ID than its first layer has.
func (c *ci) wrongDiffID(recipient string) string {
	c.t.Helper()
	name := c.registry + "/wrong:1"
	l := newLayout(c.t)
	layer, _ := l.layer(kinds[1], kinds[1].oci, map[string][]byte{"file": []byte("content")})
	c.publish(l, name, l.manifest([]object{layer}, []string{"sha256:" + strings.Repeat("0", 64)}), recipient)
	return name
}

// bigLayer is the size of a layer of the big image, in bytes.
const bigLayer = 60 << 20

// big makes an encrypted image of four such layers.
func (c *ci) big(recipient string) string {
	c.t.Helper()
	name := c.registry + "/big:1"
	l := newLayout(c.t)
	var layers []object
	var ids []string
	for i := range 4 {
		content := make([]byte, bigLayer)
		for j := range content {
			content[j] = byte(i + j + j>>8 + j>>16)
		}
		layer, id := l.layer(kinds[0], kinds[0].oci, map[string][]byte{fmt.Sprintf("file%d", i): content})
		layers, ids = append(layers, layer), append(ids, id)
	}
	c.publish(l, name, l.manifest(layers, ids), recipient)
	return name
}

// unpacking waits until a file of the big image is there, but not whole. It
// reports false if the pull is over before.
func (n *node) unpacking(snapshotter string, done chan error) bool {
	n.t.Helper()
	pattern := n.dir + "/root/io.containerd.snapshotter.v1." + snapshotter + "/snapshots/*/"
	if snapshotter == "overlayfs" {
		pattern += "fs/"
	}
	for {
		files, err := filepath.Glob(pattern + "file*")
		if err != nil {
			n.t.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil && info.Size() < bigLayer {
				return true
			}
		}
		select {
		case err := <-done:
			done <- err
			return false
		case <-time.After(time.Millisecond):
		}
	}
}

// TestDifferKilled kills pilot while it unpacks, and restarts both sides.
func TestDifferKilled(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	image := c.big("provider:pilot:team-a")
	for _, snapshotter := range []string{"overlayfs", "native"} {
		t.Run(snapshotter, func(t *testing.T) {
			home := tempDir(t)
			process := activated(t, home, brokerURL)
			n := newDifferNode(t, home, differNode{v: containerd2(), snapshotter: snapshotter})
			killed := 0
			for tries := 0; killed < 3 && tries < 40; tries++ {
				pull := n.crictl("pull", image)
				if err := pull.Start(); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { done <- pull.Wait() }()
				if !n.unpacking(snapshotter, done) {
					if err := <-done; err == nil {
						output(t, n.crictl("rmi", image)) // it was faster
					} else {
						// containerd waits before it connects again.
						time.Sleep(500 * time.Millisecond)
					}
					continue
				}
				process.kill()
				if err := <-done; err != nil {
					killed++
				} else {
					output(t, n.crictl("rmi", image))
				}
				process = activated(t, home, brokerURL)
			}
			if killed < 3 {
				t.Fatalf("pilot was killed in the middle of %d pulls only", killed)
			}
			pulls := func() {
				t.Helper()
				await(t, "a pull", func() error { return n.crictl("pull", image).Run() })
				n.noTraces(t)
			}
			pulls()

			// containerd and pilot are restarted in turn.
			output(t, n.crictl("rmi", image))
			n.stop(t)
			n.start(t)
			pulls()
			output(t, n.crictl("rmi", image))
			process.stop(t)
			process = activated(t, home, brokerURL)
			pulls()
			if peak := process.peak(t); peak > 64<<20 {
				t.Errorf("pilot took %d MiB of memory for layers of %d MiB", peak>>20, bigLayer>>20)
			}
		})
	}
}

// TestDifferOverAPI has a pilot that does not see the files of the content store
// read blobs over containerd's API.
func TestDifferOverAPI(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	home := tempDir(t)
	n := newDifferNode(t, home, differNode{v: containerd2()})
	hidden := exec.Command("unshare", "--mount", "sh", "-ec", `mount -t tmpfs tmpfs "$1"; exec pilot serve --config /dev/null --broker "$2" --listen "unix://$3/k.sock" --diff-listen "unix://$3/diff.sock" --containerd "$3/containerd.sock" --log-level debug`,
		"sh", home+"/root/io.containerd.content.v1.content", brokerURL, home)
	start(t, home, "pilot", hidden)
	await(t, "pilot", answers(home+"/diff.sock"))
	for _, k := range kinds {
		image := c.image(k, "provider:pilot:team-a")
		output(t, n.crictl("pull", image))
		if out := containerOutput(t, n.ctr("--namespace", "k8s.io", "run", "--rm", image, containerID())); !strings.Contains(out, c.secrets[image]) {
			t.Errorf("%s: %s", k.name, out)
		}
	}
	if log := read(t, home+"/pilot.log"); !strings.Contains(log, "blob is read over the content API") {
		t.Errorf("the files were read after all:\n%s", log)
	}
}

// TestDifferAway pulls while pilot is not there.
func TestDifferAway(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	encrypted := c.image(kinds[1], "provider:pilot:team-a")
	plain := encrypted + "-plain"
	output(t, c.ctrPilot("images", "push", "--plain-http", plain))
	for _, v := range []version{containerd2(), containerd17()} {
		for _, image := range []string{plain, encrypted} {
			// systemd holds the socket: a pull waits for pilot, about a second,
			// which is what containerd gives a connection. Where pilot takes
			// longer to start it is tried again.
			home := tempDir(t)
			process := activated(t, home, brokerURL)
			n := newDifferNode(t, home, differNode{v: v})
			for tries := 1; ; tries++ {
				process.stop(t)
				pull := n.crictl("pull", image)
				if err := pull.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(300 * time.Millisecond)
				process = activated(t, home, brokerURL)
				err := pull.Wait()
				if err == nil {
					break
				}
				if tries == 5 {
					t.Errorf("%s, %s: %v", v.name, image, err)
					break
				}
				await(t, "a pull", func() error { return n.crictl("pull", image).Run() })
				output(t, n.crictl("rmi", image))
			}

			// Nobody does: it fails, and works again soon after pilot is back.
			home = tempDir(t)
			process, _ = pilot(t, home, brokerURL)
			n = newDifferNode(t, home, differNode{v: v})
			process.stop(t)
			fails(t, n.crictl("pull", image), home+"/diff.sock")
			pilot(t, home, brokerURL)
			await(t, "a pull", func() error { return n.crictl("pull", image).Run() })
			n.noTraces(t)
		}
	}
}
