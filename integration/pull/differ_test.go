package pull

import (
	"compress/gzip"
	"errors"
	"io"
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
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestDifferServesEachClient pulls and runs with each client, none of which knows of
// encryption.
func TestDifferServesEachClient(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	images := map[string]string{}
	for _, k := range harness.LayerKinds {
		images[k.Name] = c.Image(k, "provider:pilot:team-a")
		plain := images[k.Name] + "-plain"
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
		images["plain "+k.Name] = plain
		c.Secrets[plain] = c.Secrets[images[k.Name]]
	}
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	index := c.Registry + "/index:1"
	c.Publish(l, index, l.Index(harness.LayerKinds[1], secret), "provider:pilot:team-a")
	images["index"], c.Secrets[index] = index, secret

	sandbox := c.Pause()
	for _, test := range []struct {
		name        string
		v           harness.ContainerdVersion
		snapshotter string
		local       bool // pulls by CRI itself
	}{
		{"2.4.2", harness.Containerd2(), "overlayfs", false},
		{"2.4.2 native", harness.Containerd2(), "native", false},
		{"2.4.2 local pull", harness.Containerd2(), "overlayfs", true},
		{"1.7", harness.Containerd17(), "overlayfs", false},
		{"1.7 native", harness.Containerd17(), "native", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			home := harness.TempDir(t)
			// pilot is there first.
			harness.StartPilot(t, home, c.BrokerURL)
			n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: test.v, Snapshotter: test.snapshotter, Sandbox: sandbox, Local: test.local})
			for name, image := range images {
				if testing.Short() && (test.snapshotter != "overlayfs" || test.local) && name != "gzip" {
					continue // the others pull all kinds
				}
				said := "hello, " + c.Secrets[image]
				harness.Output(t, n.Crictl("pull", image))
				if out := n.RunPod(t, image); !strings.Contains(out, said) {
					t.Errorf("crictl, %s: %s", name, out)
				}
				harness.Output(t, n.Crictl("rmi", image))

				for client, pull := range map[string][]string{
					"ctr":         {"images", "pull", "--plain-http", image},
					"ctr --local": {"images", "pull", "--local", "--plain-http", image},
				} {
					if test.v.Number < 3 && client == "ctr" {
						continue // 1.7's transfer service unpacks with the built-in differ only
					}
					harness.Output(t, n.Ctr(append(pull, "--snapshotter", test.snapshotter)...))
					if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", "--snapshotter", test.snapshotter, image, harness.ContainerID())); !strings.Contains(out, said) {
						t.Errorf("%s, %s: %s", client, name, out)
					}
					harness.Output(t, n.Ctr("images", "remove", "--sync", image))
				}

				harness.Output(t, n.CtrPilot("images", "pull", "--plain-http", "--snapshotter", test.snapshotter, image))
				if out := harness.ContainerOutput(t, n.CtrPilot("run", "--rm", "--skip-decrypt-auth", "--snapshotter", test.snapshotter, image, harness.ContainerID())); !strings.Contains(out, said) {
					t.Errorf("ctr-pilot, %s: %s", name, out)
				}
				harness.Output(t, n.CtrPilot("images", "remove", "--sync", image))
			}
			n.ExpectNoTraces(t)
		})
	}
}

// TestSnapshotDiffWorksWithDiffer has containerd compare snapshots with pilot.
func TestSnapshotDiffWorksWithDiffer(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17()} {
		home := harness.TempDir(t)
		harness.StartPilot(t, home, c.BrokerURL)
		n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
		harness.Output(t, n.Ctr("images", "pull", "--local", "--plain-http", image))
		harness.Output(t, n.Ctr("containers", "create", image, "c"))
		mounts := harness.Output(t, n.Ctr("snapshots", "mounts", "/mnt", "c"))
		_, upper, _ := strings.Cut(mounts, "upperdir=")
		upper, _, _ = strings.Cut(upper, ",")
		harness.Write(t, filepath.Join(upper, "added"), "something new")
		z, err := gzip.NewReader(strings.NewReader(harness.Output(t, n.Ctr("snapshots", "diff", "c"))))
		if err != nil {
			t.Fatal(err)
		}
		diff, err := io.ReadAll(z)
		if err != nil || !strings.Contains(string(diff), "something new") {
			t.Errorf("%s: the difference has %d bytes, %v", v.Name, len(diff), err)
		}
		commitKeepsLease(t, n, "c")
		n.ExpectNoTraces(t)
	}
}

// commitKeepsLease checks that what a snapshot adds is kept by the lease of
// the caller, or containerd's garbage collector may remove it at once.
func commitKeepsLease(t testing.TB, n *harness.Node, snapshot string) {
	t.Helper()
	client, err := containerd.New(n.Socket)
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
		t.Errorf("%s: the lease keeps %v, %v, and not %s", n.Name, kept, err, desc.Digest)
	}
	if err := client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		t.Error(err)
	}
}

// TestDifferErrorsSayWhy pulls what can't be decrypted.
func TestDifferErrorsSayWhy(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	_, otherURL := harness.StartBroker(t, dir+"/other")
	_, public := harness.KeyPair(t, dir+"/keys")
	forKey := c.Image(harness.LayerKinds[1], "jwe:"+public)
	var tampered []string
	for _, k := range harness.LayerKinds {
		image := c.Image(k, "provider:pilot:team-a")
		tampered = append(tampered,
			c.Tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b }),
			c.Tamper(image, func(b []byte) []byte { return append(b, b...) }))
	}
	good := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	wrong := wrongDiffID(c, "provider:pilot:team-a")
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17()} {
		t.Run(v.Name, func(t *testing.T) {
			home := harness.TempDir(t)
			starts := 0
			start := func(broker string) *harness.Process {
				t.Helper()
				starts++
				p := harness.StartActivatedPilot(t, home, broker)
				harness.Await(t, "pilot", func() error { // for which containerd waits a second
					if p.Logged(t, "pilot serves") < starts {
						return errors.New("it does not serve yet")
					}
					return nil
				})
				return p
			}
			process := start(c.BrokerURL)
			n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
			for _, image := range tampered {
				harness.ExpectFailure(t, n.Crictl("pull", image), "pilot: layer sha256:", "HMAC does not match")
			}
			harness.ExpectFailure(t, n.Crictl("pull", wrong), "diff")
			harness.ExpectFailure(t, n.Crictl("pull", forKey), "pilot: layer sha256:", "no private key was given")
			if out := harness.Output(t, n.Crictl("images")); strings.Contains(out, c.Registry) {
				t.Errorf("images:\n%s", out)
			}
			n.ExpectNoSnapshots(t)

			process.Stop(t)
			process = start(otherURL)
			said := harness.ExpectFailure(t, n.Crictl("pull", good), "pilot: layer sha256:", `KEK "team-a"`, "no such KEK", "copilot keys create")
			// One id leads from the client's error to pilot's log and to the audit log.
			if trace := regexp.MustCompile(`\(trace ([0-9a-f]{32})\)`).FindStringSubmatch(said); trace == nil {
				t.Errorf("the error names no trace: %s", said)
			} else {
				line := regexp.MustCompile(`level=warning.*layer not decrypted.*trace=` + trace[1])
				if found := line.FindString(harness.Read(t, process.Log)); !strings.Contains(found, "kek=team-a") || !strings.Contains(found, "digest=") || !strings.Contains(found, "no such KEK") {
					t.Errorf("pilot's log has no such line with trace %s: %q", trace[1], found)
				}
				// The refusal of one layer serves the others, and names its trace.
				asked := trace[1]
				if other := regexp.MustCompile(`\(requested in trace ([0-9a-f]{32})\)`).FindStringSubmatch(said); other != nil {
					asked = other[1]
				}
				if log := harness.Read(t, dir+"/other/audit.log"); !strings.Contains(log, `"trace":"`+asked+`"`) {
					t.Errorf("the audit log has no line with trace %s: %s", asked, said)
				}
			}
			process.Stop(t)
			process = start("unix://" + home + "/nobody.sock")
			harness.ExpectFailure(t, n.Crictl("pull", good), "pilot: layer sha256:", `KEK "team-a"`, "copilot at unix://"+home+"/nobody.sock")
			process.Stop(t)
			start(c.BrokerURL)
			harness.Output(t, n.Crictl("pull", good))
			harness.Output(t, n.Crictl("rmi", good))
			n.ExpectNoSnapshots(t)
		})
	}
}

// wrongDiffID makes an encrypted image whose configuration names another diff
// ID than its first layer has.
func wrongDiffID(c *harness.CI, recipient string) string {
	c.T.Helper()
	name := c.Registry + "/wrong:1"
	l := harness.NewLayout(c.T)
	layer, _ := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, map[string][]byte{"file": []byte("content")})
	c.Publish(l, name, l.Manifest([]harness.Object{layer}, []string{"sha256:" + strings.Repeat("0", 64)}), recipient)
	return name
}

// TestDifferKilled kills pilot while it unpacks, and restarts both sides.
func TestDifferKilled(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	image := c.BigImage("provider:pilot:team-a")
	for _, snapshotter := range []string{"overlayfs", "native"} {
		t.Run(snapshotter, func(t *testing.T) {
			if snapshotter != "overlayfs" {
				harness.Long(t)
			}
			home := harness.TempDir(t)
			process := harness.StartActivatedPilot(t, home, c.BrokerURL)
			n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2(), Snapshotter: snapshotter})
			killed := 0
			for tries := 0; killed < 3 && tries < 40; tries++ {
				pull := n.Crictl("pull", image)
				if err := pull.Start(); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { done <- pull.Wait() }()
				if !n.Unpacking(snapshotter, done) {
					if err := <-done; err == nil {
						harness.Output(t, n.Crictl("rmi", image)) // it was faster
					} else {
						// containerd waits before it connects again.
						time.Sleep(500 * time.Millisecond)
					}
					continue
				}
				process.Kill()
				if err := <-done; err != nil {
					killed++
				} else {
					harness.Output(t, n.Crictl("rmi", image))
				}
				process = harness.StartActivatedPilot(t, home, c.BrokerURL)
			}
			if killed < 3 {
				t.Fatalf("pilot was killed in the middle of %d pulls only", killed)
			}
			pulls := func() {
				t.Helper()
				harness.Await(t, "a pull", func() error { return n.Crictl("pull", image).Run() })
				n.ExpectNoTraces(t)
			}
			pulls()

			// containerd and pilot are restarted in turn.
			harness.Output(t, n.Crictl("rmi", image))
			n.Stop(t)
			n.Start(t)
			pulls()
			harness.Output(t, n.Crictl("rmi", image))
			process.Stop(t)
			process = harness.StartActivatedPilot(t, home, c.BrokerURL)
			pulls()
			if peak := process.Peak(t); peak > 64<<20 {
				t.Errorf("pilot took %d MiB of memory for layers of %d MiB", peak>>20, harness.BigLayer>>20)
			}
		})
	}
}

// TestDifferReadsBlobsOverAPI has a pilot that does not see the files of the content store
// read blobs over containerd's API.
func TestDifferReadsBlobsOverAPI(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	home := harness.TempDir(t)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	hidden := exec.Command("unshare", "--mount", "sh", "-ec", `mount -t tmpfs tmpfs "$1"; exec pilot serve --config /dev/null --broker "$2" --listen "unix://$3/k.sock" --diff-listen "unix://$3/diff.sock" --containerd "$3/containerd.sock" --layer-record "$3/layers" --log-level debug`,
		"sh", home+"/root/io.containerd.content.v1.content", c.BrokerURL, home)
	harness.Start(t, home, "pilot", hidden)
	harness.Await(t, "pilot", harness.Reachable(home+"/diff.sock"))
	for _, k := range harness.LayerKinds {
		image := c.Image(k, "provider:pilot:team-a")
		harness.Output(t, n.Crictl("pull", image))
		if out := harness.ContainerOutput(t, n.Ctr("--namespace", "k8s.io", "run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
			t.Errorf("%s: %s", k.Name, out)
		}
	}
	if log := harness.Read(t, home+"/pilot.log"); !strings.Contains(log, "blob is read over the content API") {
		t.Errorf("the files were read after all:\n%s", log)
	}
}

// TestPullWithoutPilot pulls while pilot is not there.
func TestPullWithoutPilot(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	encrypted := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	plain := encrypted + "-plain"
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17()} {
		for _, image := range []string{plain, encrypted} {
			// systemd holds the socket: a pull waits for pilot, about a second,
			// which is what containerd gives a connection. Where pilot takes
			// longer to start, it is started earlier the next time.
			home := harness.TempDir(t)
			process := harness.StartActivatedPilot(t, home, c.BrokerURL)
			n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
			for tries := 1; ; tries++ {
				process.Stop(t)
				pull := n.Crictl("pull", image)
				if err := pull.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(300 * time.Millisecond / time.Duration(tries*tries))
				process = harness.StartActivatedPilot(t, home, c.BrokerURL)
				err := pull.Wait()
				if err == nil {
					break
				}
				if tries == 10 {
					t.Errorf("%s, %s: %v", v.Name, image, err)
					break
				}
				harness.Await(t, "a pull", func() error { return n.Crictl("pull", image).Run() })
				harness.Output(t, n.Crictl("rmi", image))
			}

			// Nobody does: it fails, and works again soon after pilot is back.
			home = harness.TempDir(t)
			process, _ = harness.StartPilot(t, home, c.BrokerURL)
			n = harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: v})
			process.Stop(t)
			harness.ExpectFailure(t, n.Crictl("pull", image), home+"/diff.sock")
			harness.StartPilot(t, home, c.BrokerURL)
			harness.Await(t, "a pull", func() error { return n.Crictl("pull", image).Run() })
			n.ExpectNoTraces(t)
		}
	}
}
