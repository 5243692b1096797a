package workloads

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/node/host"
)

// images are those of all nodes, in one registry.
type images struct {
	pause, plain string
	encrypted    string // for team-a
	secret       string // that the encrypted one prints
	twin         string // a plain one that has the layers of the encrypted one
	borrowed     string // a plain one that claims the layers of the encrypted one
	swapped      string // in a repository whose images must be encrypted, and plain

	plainDigest, chain digest.Digest // the plain one's manifest, and the encrypted one's layers
}

// TestContainersOfTenants has several tenants on a node of each containerd.
func TestContainersOfTenants(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	i := images{pause: c.Pause(), encrypted: c.Image(harness.LayerKinds[1], "provider:pilot:team-a")}
	i.secret = c.Secrets[i.encrypted]
	i.plain, i.swapped = plain(t, c, "plain"), plain(t, c, "swapped")
	i.twin = twin(t, c, i.encrypted+"-plain")
	i.borrowed = borrow(t, c, i.encrypted, i.plain)
	i.plainDigest, i.chain = c.Digest(i.plain), chainOf(t, c, i.encrypted)
	issuer := harness.StartIssuer(t)
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd22(), harness.Containerd17()} {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			testNode(t, v, i, issuer)
		})
	}
}

// plain makes an image without layers in common with others.
func plain(t *testing.T, c *harness.CI, repository string) (name string) {
	t.Helper()
	name = c.Registry + "/" + repository + ":1"
	l := harness.NewLayout(t)
	layer, id := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, map[string][]byte{"hello": []byte(harness.Read(t, harness.Bin+"/hello")), repository: []byte(harness.NewSecret())})
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name, l.Manifest([]harness.Object{layer}, []string{id}))))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	return name
}

// twin makes an image with the layers of another, and a configuration of its own: the
// kubelet's images are known by that, so that images that share one are the same to CRI.
func twin(t *testing.T, c *harness.CI, of string) (name string) {
	t.Helper()
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", of))
	return c.Edit(of, "twin", func(m *ocispec.Manifest) {
		config := harness.Read(t, c.Blob(m.Config.Digest.String())) + "\n"
		m.Config.Digest, m.Config.Size = c.Put(of, "_layers", []byte(config)), int64(len(config))
	})
}

// borrow makes an image that claims the layers of an encrypted one.
func borrow(t *testing.T, c *harness.CI, encrypted, plain string) (name string) {
	t.Helper()
	var victim ocispec.Manifest
	c.Edit(encrypted, "unchanged", func(m *ocispec.Manifest) { victim = *m })
	config := harness.Read(t, c.Blob(victim.Config.Digest.String()))
	return c.Edit(plain, "borrowed", func(m *ocispec.Manifest) {
		m.Layers = append(m.Layers, m.Layers[0]) // as many as there are diff IDs
		m.Config.Digest = c.Put(plain, "_layers", []byte(config+" "))
		m.Config.Size = int64(len(config) + 1)
	})
}

// chainOf returns the chain ID of an image's layers.
func chainOf(t *testing.T, c *harness.CI, name string) digest.Digest {
	t.Helper()
	var m ocispec.Manifest
	var config ocispec.Image
	err := json.Unmarshal([]byte(harness.Read(t, c.Blob(c.Digest(name).String()))), &m)
	if err := errors.Join(err, json.Unmarshal([]byte(harness.Read(t, c.Blob(m.Config.Digest.String()))), &config)); err != nil {
		t.Fatal(err)
	}
	return identity.ChainID(config.RootFS.DiffIDs)
}

// grace is how long permissions are used while the broker is away.
const grace = "1h"

func testNode(t *testing.T, v harness.ContainerdVersion, i images, issuer *harness.Issuer) {
	n := &node{harness.NewSharedNode(t, v, i.pause, fmt.Sprintf(`workload-verdict-ttl = "1s"
kek-cache-ttl = "1s"
kek-cache-grace = %q
workload-token-keys = %q
`, grace, issuer.KeysFile()))}
	// While containerd runs, which ends before the test does.
	defer func() { harness.Output(t, n.Crictl("rmp", "-f", "-a")) }()
	n.Allow(t, "a/*", "accounts/web", "later/*")
	for _, image := range []string{i.encrypted, i.plain, i.swapped} {
		harness.Output(t, n.Crictl("pull", image))
	}
	a, b := n.pod(t, "a", "1"), n.pod(t, "b", "2")
	const denial = `namespace "b" may not use KEK "team-a"`

	t.Run("TenantsMayRunWhatThePolicyAllows", func(t *testing.T) {
		if out := n.run(t, a, i.encrypted); !strings.Contains(out, i.secret) {
			t.Errorf("it printed %q", out)
		}
		n.denied(t, b, i.encrypted, denial, i.encrypted, `workloads = ["b/*"]`, "for the workload b/")
	})
	t.Run("PlainImagesNeedNobody", func(t *testing.T) {
		asked := strings.Count(harness.Read(t, n.Broker.Dir+"/store/audit.log"), `"action":"use"`)
		n.created(t, b, i.plain)
		if now := strings.Count(harness.Read(t, n.Broker.Dir+"/store/audit.log"), `"action":"use"`); now != asked || asked == 0 {
			t.Errorf("the broker was asked %d times, and %d before", now, asked)
		}
	})
	t.Run("AnImageThatBorrowsLayersNeedsTheirKEK", func(t *testing.T) {
		harness.Output(t, n.Crictl("pull", i.borrowed))
		n.denied(t, b, i.borrowed, denial)
	})
	t.Run("PlainImagesOfTheSystemNeedNoProofOfTheirLayers", func(t *testing.T) {
		harness.Output(t, n.Crictl("pull", i.twin))
		n.denied(t, b, i.twin, denial, "nothing shows that the image's own has the same content")
		n.created(t, n.pod(t, "kube-system", "4"), i.twin)
		n.denied(t, n.pod(t, "kube-system", "5"), i.encrypted, `namespace "kube-system" may not use KEK "team-a"`)
	})
	t.Run("APlainImageInPlaceOfAnEncryptedOneDoesNotRun", func(t *testing.T) {
		n.created(t, a, i.swapped)
		repository := strings.TrimSuffix(i.swapped, ":1")
		harness.Write(t, n.Config, harness.Read(t, n.Config)+fmt.Sprintf("[[must-be-encrypted]]\nimages = [%q]\nkeks = [\"team-a\"]\n", repository))
		harness.Write(t, n.Dir+"/nri.conf/00-pilot.conf", harness.Read(t, n.Config))
		n.Pilot.Cmd.Process.Signal(syscall.SIGHUP)
		harness.Await(t, "the rule", func() error {
			cmd, _ := n.create(t, a, i.swapped)
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "must-be-encrypted") {
				return fmt.Errorf("the plain image: %v: %s", err, out)
			}
			return nil
		})
		n.denied(t, a, i.swapped, "must-be-encrypted", repository)
	})
	if v.Number > 2 { // 1.7 has no image volumes
		t.Run("ImageVolumesNeedTheirKEKToo", func(t *testing.T) {
			mount := harness.Object{"container_path": "/volume", "image": harness.Object{"image": i.encrypted}, "readonly": true}
			n.created(t, a, i.plain, mount)
			harness.Await(t, "the denial", func() error { return n.refuses(t, b, i.plain, []string{denial}, mount) })
		})
		t.Run("AnImageVolumeIsWhatItsSnapshotHas", func(t *testing.T) {
			dirs, err := filepath.Glob(n.Dir + "/state/*/image-volumes/" + a.id)
			if err != nil || len(dirs) != 1 {
				t.Fatal(dirs, err)
			}
			// As after a pull by the same name between containerd's two looks at it.
			at := filepath.Join(filepath.Dir(dirs[0]), b.id, i.plainDigest.Encoded())
			harness.Await(t, "the denial", func() error {
				n.Ctr("--namespace", "k8s.io", "snapshots", "rm", at).Run() // of the time before
				harness.Output(t, n.Ctr("--namespace", "k8s.io", "snapshots", "prepare", at, i.chain.String()))
				return n.refuses(t, b, i.plain, []string{denial}, harness.Object{"container_path": "/volume", "image": harness.Object{"image": i.plain}, "readonly": true})
			})
		})
	}
	t.Run("ServiceAccountIsThatOfTheSignedToken", func(t *testing.T) { testAccounts(t, n, i, issuer) })
	t.Run("LabelsNarrowWhatANamespaceMayUse", func(t *testing.T) {
		n.Broker.AddRules(t, `
[[rule]]
identities = ["spiffe://example.com/node/worker-1"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["labels/*"]
labels = "tier=gold, app in (web, api)"
`)
		type labels map[string]string
		gold := n.labelled(t, "labels", "gold", labels{"tier": "gold", "app": "web", "pod-name": "web-0"})
		harness.Await(t, "a container", func() error { cmd, _ := n.create(t, gold, i.encrypted); return cmd.Run() })
		for uid, l := range map[string]labels{"silver": {"tier": "silver", "app": "web"}, "unlabelled": nil, "db": {"tier": "gold", "app": "db"}} {
			n.denied(t, n.labelled(t, "labels", uid, l), i.encrypted, `namespace "labels" may not use KEK "team-a"`)
		}
		n.created(t, n.labelled(t, "labels", "gold2", labels{"tier": "gold", "app": "api", "pod-name": "api-0"}), i.encrypted)
		n.denied(t, n.labelled(t, "b", "gold-b", labels{"tier": "gold", "app": "web"}), i.encrypted, denial)
		log := harness.Read(t, n.Broker.Dir+"/store/audit.log")
		for _, want := range []string{`"labels":{"app":"web","tier":"gold"}`, `is for other labels: tier is \"silver\", not \"gold\"`} {
			if !strings.Contains(log, want) {
				t.Errorf("the audit log has no %s", want)
			}
		}
		if strings.Contains(log, "pod-name") {
			t.Error("the audit log has labels that no rule is about")
		}
	})
	t.Run("RevocationCountsForContainersThatAreCreatedAgain", func(t *testing.T) {
		n.Allow(t)
		harness.Await(t, "a denial", func() error {
			cmd, _ := n.create(t, a, i.encrypted)
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), `namespace \"a\" may not`) {
				return fmt.Errorf("%v: %s", err, out)
			}
			return nil
		})
		n.Allow(t, "a/*", "accounts/web", "later/*")
		harness.Await(t, "a container", func() error { cmd, _ := n.create(t, a, i.encrypted); return cmd.Run() })
	})
	t.Run("WithoutABrokerEarlierPermissionsCount", func(t *testing.T) {
		n.Broker.Process.Stop(t)
		n.created(t, a, i.encrypted)
		n.created(t, b, i.plain)
		n.denied(t, n.pod(t, "later", "3"), i.encrypted, "team-a", "the broker gives no usable answer")
		n.denied(t, b, i.encrypted, "team-a")
		n.Broker.Start(n.T)
	})
	t.Run("WithoutPilotPlainImagesRun", func(t *testing.T) {
		n.Pilot.Kill()
		n.created(t, b, i.plain)
		for _, p := range []pod{a, b} {
			n.denied(t, p, i.encrypted, "is encrypted, and pilot does not run")
		}
		n.denied(t, b, i.borrowed, "is encrypted, and pilot does not run")
		n.denied(t, b, i.twin, "is encrypted, and pilot does not run")
		n.created(t, n.pod(t, "kube-system", "6"), i.twin)
		// Also while containerd starts.
		n.Stop(t)
		n.Start(n.T)
		n.created(t, b, i.plain)
		n.denied(t, a, i.encrypted, "is encrypted, and pilot does not run")
	})
	t.Run("ImagesFromBeforeTheRecordNeedTheirKEK", func(t *testing.T) {
		if err := os.Remove(n.Dir + "/layers"); err != nil {
			t.Fatal(err)
		}
		n.StartPilot(n.T)
		harness.Await(t, "a container", func() error { cmd, _ := n.create(t, a, i.encrypted); return cmd.Run() })
		n.denied(t, b, i.encrypted, denial)
		n.denied(t, b, i.borrowed, denial)
	})
	t.Run("PilotThatHangsLetsPlainImagesRun", func(t *testing.T) {
		resume := n.Pilot.Pause(t)
		n.created(t, b, i.plain)
		n.denied(t, b, i.encrypted, "pilot gives no answer")
		resume()
		n.created(t, a, i.encrypted)
	})
	t.Run("WithoutThePluginNothingIsCreated", func(t *testing.T) {
		n.examined(t, "ok       workloads          containerd asks pilot about each container")
		plugins, err := host.Host{}.Processes("pilot")
		if err != nil {
			t.Fatal(err)
		}
		killed := 0
		for _, p := range plugins {
			if len(p.Args) == 2 && p.Args[1] == n.Dir+"/nri/00-pilot" {
				syscall.Kill(p.PID, syscall.SIGKILL)
				killed++
			}
		}
		if killed != 1 {
			t.Fatalf("%d plugins of %d programs", killed, len(plugins))
		}
		if v.Number > 2 {
			for range 2 { // containerd has not noticed the first time
				n.denied(t, a, i.encrypted, "pilot")
			}
			n.denied(t, b, i.plain, `required plugin "pilot" not present`)
			n.examined(t, "failed   workloads          containerd's plugin 00-pilot does not run, and containerd creates no container")
		}
		n.Stop(t)
		n.Start(n.T)
		n.created(t, a, i.encrypted)
		n.denied(t, b, i.encrypted, denial)
	})
}

// testAccounts has a policy for one service account, and pods with tokens of it.
func testAccounts(t *testing.T, n *node, i images, issuer *harness.Issuer) {
	const namespace = "accounts"
	claims := func(account, uid string) harness.Claims {
		return harness.Claims{
			"sub":           "system:serviceaccount:" + namespace + ":" + account,
			"kubernetes.io": harness.Object{"namespace": namespace, "pod": harness.Object{"name": "pod", "uid": uid}, "serviceaccount": harness.Object{"name": account}},
		}
	}
	token := func(account, uid string) string {
		return issuer.Token("https://kubernetes.default.svc", claims(account, uid))
	}
	stranger := harness.StartIssuer(t)
	for uid, test := range map[string]struct {
		volume, token string // as the kubelet projects it
		denied        string // empty: it is not
	}{
		"genuine":  {"kube-api-access-x2x4z", token("web", "genuine"), ""},
		"expired":  {"kube-api-access-x2x4z", issuer.Token("api", claims("web", "expired").With(harness.Claims{"exp": 1000, "nbf": 1, "iat": 1})), ""},
		"other":    {"kube-api-access-x2x4z", token("batch", "other"), `service account "batch"`},
		"none":     {"", "", "the pod has no token"},
		"borrowed": {"kube-api-access-x2x4z", token("web", "genuine"), "it is for another pod"},
		// By a ConfigMap that the pod projects.
		"forged":  {"kube-api-access-x2x4z", stranger.Token("api", claims("web", "forged")), "no key in workload-token-keys has signed it"},
		"invalid": {"kube-api-access-x2x4z", "web", "it is not a signed JSON Web Token"},
	} {
		if test.volume != "" {
			dir := filepath.Join(n.Dir, "kubelet/pods", uid, "volumes/kubernetes.io~projected", test.volume)
			harness.Write(t, filepath.Join(dir, "..2026_11_29_00_00_00.1", "token"), test.token)
			for name, to := range map[string]string{"..data": "..2026_11_29_00_00_00.1", "token": "..data/token"} {
				if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}
		p := n.pod(t, namespace, uid)
		if test.denied == "" {
			n.created(t, p, i.encrypted)
		} else {
			n.denied(t, p, i.encrypted, `namespace "accounts"`, "may not use KEK", test.denied)
		}
	}
	// In a volume that a pod can write.
	dir := filepath.Join(n.Dir, "kubelet/pods/writes/volumes")
	harness.Write(t, filepath.Join(dir, "kubernetes.io~empty-dir/own/token"), token("web", "writes"))
	if err := os.MkdirAll(filepath.Join(dir, "kubernetes.io~projected/own"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../kubernetes.io~empty-dir/own/token", filepath.Join(dir, "kubernetes.io~projected/own/token")); err != nil {
		t.Fatal(err)
	}
	n.denied(t, n.pod(t, namespace, "writes"), i.encrypted, "may not use KEK")
}

type node struct{ *harness.SharedNode }

// pod is a sandbox.
type pod struct {
	id, file, uid string
	namespaces    harness.Object // of its containers; default: the machine's network
}

func (n *node) pod(t *testing.T, namespace, uid string) pod {
	t.Helper()
	return n.labelled(t, namespace, uid, nil)
}

func (n *node) labelled(t *testing.T, namespace, uid string, labels map[string]string) pod {
	t.Helper()
	p := pod{uid: uid}
	p.id, p.file = n.LabelledSandbox(t, namespace, "pod-"+uid, uid, labels)
	return p
}

// examined expects a line of "pilot node doctor".
func (n *node) examined(t *testing.T, want string) {
	t.Helper()
	if n.Number < 3 {
		return // the program that runs it here has another name
	}
	if out := harness.CombinedOutput(t, harness.Command(t, "pilot", "node", "doctor", "--config", n.Config)); !strings.Contains(out, want) {
		t.Errorf("want %q in\n%s", want, out)
	}
}

// create returns a command that creates a container, and the container's name.
func (n *node) create(t *testing.T, p pod, image string, mounts ...harness.Object) (cmd *exec.Cmd, name string) {
	t.Helper()
	name = harness.ContainerID()
	if p.namespaces == nil {
		p.namespaces = harness.Object{"network": 2, "pid": 1}
	}
	b, err := json.Marshal(harness.Object{"metadata": harness.Object{"name": name}, "image": harness.Object{"image": image}, "command": []string{"/hello"}, "log_path": name + ".log", "mounts": mounts,
		"linux": harness.Object{"security_context": harness.Object{"namespace_options": p.namespaces}}})
	if err != nil {
		t.Fatal(err)
	}
	return n.Crictl("create", "--no-pull", p.id, harness.Write(t, filepath.Join(n.Dir, "pods", name+".json"), string(b)), p.file), name
}

// created creates a container. On a busy machine something may not answer in time, or
// containerd not have started yet, and the kubelet would try again.
func (n *node) created(t *testing.T, p pod, image string, mounts ...harness.Object) {
	t.Helper()
	harness.Await(t, "a container", func() error {
		cmd, _ := n.create(t, p, image, mounts...)
		out, err := cmd.CombinedOutput()
		late := func(said string) bool { return strings.Contains(string(out), said) }
		if err != nil && !late("answer") && !late("deadline") && !late("not initialized") {
			t.Fatalf("not created: %s", out)
		}
		return err
	})
}

// denied expects that a container can't be created, and why. On a busy machine that may first
// be that something has not answered in time.
func (n *node) denied(t *testing.T, p pod, image string, want ...string) {
	t.Helper()
	harness.Await(t, "the denial", func() error { return n.refuses(t, p, image, want) })
}

// refuses returns an error if something else is said about a container than that, and ends
// the test if it is created.
func (n *node) refuses(t *testing.T, p pod, image string, want []string, mounts ...harness.Object) error {
	t.Helper()
	cmd, _ := n.create(t, p, image, mounts...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("the container was created: %s", out)
	}
	said := strings.ReplaceAll(string(out), `\"`, `"`)
	for _, w := range want {
		if !strings.Contains(said, w) {
			return fmt.Errorf("want %q in\n%s", w, said)
		}
	}
	return nil
}

var errNothing = errors.New("it has printed nothing")

// run runs a container, and returns what it prints.
func (n *node) run(t *testing.T, p pod, image string) (printed string) {
	t.Helper()
	var id, name string
	harness.Await(t, "a container", func() error { // as in created
		var cmd *exec.Cmd
		cmd, name = n.create(t, p, image)
		out, err := cmd.Output()
		id = strings.TrimSpace(string(out))
		return err
	})
	harness.Output(t, n.Crictl("start", id))
	harness.Await(t, "the container's output", func() error {
		b, err := os.ReadFile(filepath.Join(n.Dir, "logs", p.uid, name+".log"))
		if printed = string(b); err == nil && printed == "" {
			err = errNothing
		}
		return err
	})
	return printed
}
