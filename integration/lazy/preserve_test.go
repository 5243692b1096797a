package lazy

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/ctrlplane/pilot/integration/harness"
)

// preserved waits until pilot has had containerd keep what it needs for each snapshot that is
// mounted in a namespace. pilot does so when it starts, and once a minute.
func (m *machine) preserved(namespace string, args ...string) {
	m.t.Helper()
	m.Pilot.Stop(m.t)
	m.StartPilot(args...)
	harness.Await(m.t, "the claims of all layers to be kept", func() error {
		client, err := containerd.New(m.Socket)
		if err != nil {
			return err
		}
		defer client.Close()
		mounted := 0
		err = client.SnapshotService("pilot-lazy").Walk(namespaces.WithNamespace(m.t.Context(), namespace), func(_ context.Context, info snapshots.Info) error {
			if info.Labels["containerd.io/snapshot/remote"] != "" {
				if mounted++; info.Labels["containerd.io/gc.ref.content.pilot"] == "" {
					return errors.New(info.Name + " has no label")
				}
			}
			return nil
		})
		if err == nil && mounted == 0 {
			err = errors.New("no layer is mounted")
		}
		return err
	})
}

// kept returns the digests of what containerd keeps for pilot.
func (m *machine) kept() []string {
	m.t.Helper()
	return strings.Fields(harness.Output(m.t, m.Ctr("content", "ls", "--quiet", `labels."com.github.ctrlplane.pilot/claims"`)))
}

// TestImageOutlivesTheOneThatItSharesLayersWith has two images with the same layer, encrypted
// twice, and removes the one for which it was mounted, as the kubelet does with the oldest.
func TestImageOutlivesTheOneThatItSharesLayersWith(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	base := layer{"hello": program(t), "big": random(4, mib)}
	m.encrypt("one:1", base, layer{"secret": []byte("of the first")})
	m.encrypt("two:1", base, layer{"secret": []byte("of the second")})
	m.pull("one:1")
	m.pull("two:1")
	at := m.mount("two:1")
	m.preserved("default")
	m.remove("one:1")
	if n := len(m.kept()); n != 2 {
		t.Errorf("%d documents are kept, not one for each of the second image's layers", n)
	}

	// Also once pilot has forgotten what it knew.
	m.Pilot.Stop(t)
	m.StartPilot()
	if got := m.run("two:1"); got != "hello, of the second\n" {
		t.Errorf("the second image prints %q", got)
	}
	if b, err := os.ReadFile(at + "/big"); err != nil || string(b) != string(base["big"]) {
		t.Errorf("a file that was never read before: %v", err)
	}
	m.unmount(at)

	// The base comes back under its own name, and goes again.
	m.pull("one:1")
	if got := m.run("one:1"); got != "hello, of the first\n" {
		t.Errorf("the first image, pulled again, prints %q", got)
	}
	m.remove("two:1")
	m.remove("one:1")
	if list := m.kept(); len(list) > 0 {
		t.Errorf("%v are kept for no snapshot", list)
	}
}

// TestLayerIsReadWhereAnotherImageHasIt has repositories gone from which layers were first pulled,
// while other images have them: the same blob, or the layer encrypted apart.
func TestLayerIsReadWhereAnotherImageHasIt(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	base := layer{"hello": program(t), "big": random(4, 12*mib)}
	m.encrypt("dev:1", base, layer{"secret": []byte("of the first")})
	manifest := m.manifest("dev:1")
	for _, l := range append(layersOf(manifest), manifest["config"].(harness.Object)) {
		m.pushBlob("prod", "", m.blob(l["digest"].(string)))
	}
	m.push("prod:1", manifest)
	m.encrypt("apart:1", base, layer{"secret": []byte("of the second")})
	for _, name := range []string{"dev:1", "prod:1", "apart:1"} {
		m.pull(name)
	}
	m.preserved("default")
	gone := func(repositories ...string) {
		m.front.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
			for _, repository := range repositories {
				if strings.HasPrefix(r.URL.Path, "/v2/"+repository+"/") {
					http.NotFound(w, r)
					return
				}
			}
			forward.ServeHTTP(w, r)
		})
	}
	// Pilot forgets what it had of the layers.
	restart := func() {
		m.Pilot.Stop(t)
		m.StartPilot()
	}
	read := func(name string, from, to int) {
		t.Helper()
		at := m.mount(name)
		defer m.unmount(at)
		if b, err := readPart(at+"/big", from, to-from); err != nil || !bytes.Equal(b, base["big"][from:to]) {
			t.Errorf("%s has other bytes from %d on: %v", name, from, err)
		}
	}

	m.remove("dev:1")
	gone("dev")
	restart()
	if got := m.run("prod:1"); got != "hello, of the first\n" {
		t.Errorf("the image in another repository prints %q", got)
	}
	read("prod:1", 1*mib, 2*mib) // a chunk has 4 MiB
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, m.front.address+"/prod@sha256:") {
		t.Errorf("the log does not say where it is read:\n%s", log)
	}

	m.remove("prod:1")
	gone("dev", "prod")
	restart()
	if got := m.run("apart:1"); got != "hello, of the second\n" {
		t.Errorf("the image that was encrypted apart prints %q", got)
	}
	read("apart:1", 5*mib, 6*mib)

	at := m.mount("apart:1")
	gone("dev", "prod", "apart")
	if _, err := readPart(at+"/big", 9*mib, 10_000); !errors.Is(err, syscall.EIO) {
		t.Errorf("no repository has it: %v", err)
	}
}

// TestOtherRegistriesAreNotAsked has a setting that leaves out the registry of an image.
func TestOtherRegistriesAreNotAsked(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "--mirror-allowed-upstreams", "registry.example.com")
	m.encrypt("app:1", layer{"file": []byte("of the image")})
	m.pull("app:1")
	if n := m.fullPulls()["registry"]; n != 1 {
		t.Errorf("%g layers were pulled as a whole because of their registry", n)
	}
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, "is not one of mirror-allowed-upstreams") {
		t.Errorf("the log does not say so:\n%s", log)
	}
}

// pullFrom pulls an image from another registry, which has the same.
func (m *machine) pullFrom(f *front, name string) {
	m.t.Helper()
	harness.Output(m.t, m.Ctr("images", "pull", "--plain-http", "--snapshotter", "pilot-lazy", f.address+"/"+name))
}

// TestLayersAreReadFromAllowedRegistries has a layer mounted from a registry that is not allowed
// any more, while an image of one that is has it, too.
func TestLayersAreReadFromAllowedRegistries(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the image")})
	m.pull("app:1")
	other := newFront(t, m.registry)
	m.pullFrom(other, "app:1")
	m.Pilot.Stop(t)
	m.StartPilot("--mirror-allowed-upstreams", other.address)
	m.front.count()
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Errorf("it prints %q", got)
	}
	if n := m.front.count(); n > 0 {
		t.Errorf("the registry that is not allowed has sent %d bytes", n)
	}
}

// TestLiesOfAnotherRegistryRefuteNoLayer has another image's registry send other bytes while a
// layer is read as a whole, which its own registry does not give at that time.
func TestLiesOfAnotherRegistryRefuteNoLayer(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the image")})
	harness.Output(t, m.ctrPilot("images", "decrypt", "--plain-http", "docker://"+m.ref("app:1"), "docker://"+m.ref("app:plain")))
	m.pull("app:1")
	other := newFront(t, m.registry)
	m.Pilot.Stop(t)
	m.StartPilot("--mirror-allowed-upstreams", other.address+","+m.front.address)
	m.pullFrom(other, "app:1")
	// One with the same diff ID, which does not say what files it has.
	plain := m.manifest("app:plain")
	delete(layersOf(plain)[0], "annotations")
	m.push("app:plain", plain)
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("app:plain")))

	m.front.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) { http.NotFound(w, r) })
	lied := make(chan struct{}, 100)
	other.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Header.Get("Range") != "" {
			forward.ServeHTTP(w, r)
			return
		}
		answer := httptest.NewRecorder()
		forward.ServeHTTP(answer, r)
		b := answer.Body.Bytes()
		b[len(b)-1] ^= 1
		maps.Copy(w.Header(), answer.Header())
		lied <- struct{}{}
		w.WriteHeader(answer.Code)
		_, _ = w.Write(b)
	})
	if at, err := m.tryMount("app:1"); err == nil {
		m.unmount(at)
		t.Error("mounted, and nothing was read as a whole")
	}
	select {
	case <-lied:
	default:
		t.Error("the other registry was not asked for all of the layer")
	}
	m.front.set(nil)
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Errorf("once its own registry is back, it prints %q", got)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="FailedPrecondition"}`]; n != 0 {
		t.Errorf("the layer was refuted %g times", n)
	}
}

// TestImageThatIsNotReadStopsNoOther has an image whose configuration is too large, which might
// have the layer of any other.
func TestImageThatIsNotReadStopsNoOther(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the image")})
	m.encrypt("large:1", layer{"file": nil})
	large := m.manifest("large:1")
	config, _ := m.configOf(large)
	config["config"] = harness.Object{"Labels": harness.Object{"large": strings.Repeat("x", 17*mib)}}
	large["config"] = m.pushBlob("large", "application/vnd.oci.image.config.v1+json", mustJSON(t, config))
	m.push("large:1", large)
	harness.Output(t, m.Ctr("content", "fetch", "--plain-http", m.ref("large:1")))
	m.pull("app:1")
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Errorf("it prints %q", got)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]; n != 1 {
		t.Errorf("%g layers were read as a whole, not 1", n)
	}
	if reasons := m.fullPulls(); len(reasons) > 0 {
		t.Errorf("it is not lazy: %v", reasons)
	}
	m.pull("large:1")
	if at, err := m.tryMount("large:1"); err != nil {
		t.Errorf("the large image does not start: %v", err)
	} else {
		m.unmount(at)
	}
	if n := m.fullPulls()["diff ID"]; n != 1 {
		t.Errorf("%g layers of it were pulled as a whole", n)
	}
}

// TestFalseClaimIsNotKept has the image removed that has claimed another's layer for a first one,
// as which it has the chain ID of that layer and those below it.
func TestFalseClaimIsNotKept(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("victim:1", layer{"hello": program(t)}, layer{"secret": []byte("of the victim")})
	m.pull("victim:1")
	manifest := m.manifest("victim:1")
	_, ids := m.configOf(manifest)
	chain := identity.ChainID([]digest.Digest{digest.Digest(ids[0].(string)), digest.Digest(ids[1].(string))})
	evil := clone(t, manifest)
	evil["layers"] = []any{layersOf(manifest)[1]}
	evil["config"] = m.withDiffIDs("victim", manifest, chain.String())
	m.push("victim:evil", evil)
	m.pull("victim:evil")
	m.preserved("default")
	if _, err := m.tryMount("victim:1"); err == nil {
		t.Error("the test shows nothing, as the false claim is not seen")
	}
	m.remove("victim:evil")
	if got := m.run("victim:1"); got != "hello, of the victim\n" {
		t.Errorf("once the false claim is removed, it prints %q", got)
	}
}

// TestImageOfAnotherNamespaceOutlivesTheOneThatItSharesLayersWith is the same in two namespaces,
// which share what is mounted.
func TestImageOfAnotherNamespaceOutlivesTheOneThatItSharesLayersWith(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	base := layer{"hello": program(t)}
	m.encrypt("one:1", base, layer{"secret": []byte("of the first")})
	m.encrypt("two:1", base, layer{"secret": []byte("of the second")})
	m.pull("one:1")
	harness.Output(t, m.Ctr("--namespace", "other", "images", "pull", "--plain-http", "--snapshotter", "pilot-lazy", m.ref("two:1")))
	m.preserved("other")
	m.remove("one:1")
	if got := harness.ContainerOutput(t, m.Ctr("--namespace", "other", "run", "--rm", "--snapshotter", "pilot-lazy", m.ref("two:1"), harness.ContainerID())); got != "hello, of the second\n" {
		t.Errorf("it prints %q", got)
	}
}

// TestLargeClaimIsNotKept has an image with a large annotation, which would be larger in what is
// kept.
func TestLargeClaimIsNotKept(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the image")})
	m.encrypt("large:1", layer{"file": nil})
	large := m.manifest("large:1")
	annotations(layersOf(large)[0])["org.opencontainers.image.enc.x"] = strings.Repeat("<", 100<<10) // six bytes each in JSON
	m.push("large:1", large)
	m.pull("app:1")
	m.preserved("default")
	m.pull("large:1")
	m.Pilot.Stop(t)
	m.StartPilot() // it looks at once
	harness.Await(t, "the large image to be seen", func() error {
		if got := m.ask(http.MethodGet, m.lazyPath("large", layersOf(large)[0]["digest"].(string)), "0-1"); got.status != http.StatusPartialContent {
			return errors.New(got.body)
		}
		return nil
	})
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Errorf("it prints %q", got)
	}
	if list := m.kept(); len(list) != 1 {
		t.Errorf("%v are kept", list)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]; n != 0 {
		t.Errorf("%g layers were read as a whole", n)
	}
}

// TestRewrappedImageOutlivesItsOldKEK has the KEK revoked for which an image was wrapped that was
// replaced.
func TestRewrappedImageOutlivesItsOldKEK(t *testing.T) {
	t.Parallel()
	ttl := []string{"--kek-cache-ttl", "1s", "--kek-cache-grace", "0s"}
	m := newMachine(t, ttl...)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the image")})
	m.pull("app:1")
	m.preserved("default", ttl...)
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Fatalf("it prints %q", got)
	}
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", m.Dir+"/broker", "team-b"))
	harness.Output(t, m.ctrPilot("images", "rewrap", "--plain-http", "--from", "team-a", "--to", "team-b", "docker://"+m.ref("app:1")))
	m.pull("app:1")
	m.CollectGarbage(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "revoke", "--dir", m.Dir+"/broker", "--identity", "uid:0", "team-a"))
	path := m.lazyPath("app", layersOf(m.manifest("app:1"))[0]["digest"].(string))
	harness.Await(t, "the layer to be opened with the new KEK", func() error {
		if got := m.ask(http.MethodGet, path, "0-1"); got.status != http.StatusPartialContent || !strings.Contains(harness.Read(t, m.Pilot.Log), "kek=team-b") {
			return errors.New(got.body)
		}
		return nil
	})
	if got := m.run("app:1"); got != "hello, of the image\n" {
		t.Errorf("it prints %q", got)
	}
}

// TestKeptClaimsAreStillChecked has the forged image removed whose snapshot another image
// keeps.
func TestKeptClaimsAreStillChecked(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.occupy()
	m.preserved("default")
	m.remove("evil:forged")
	m.pull("victim:1")
	m.mustNotMount("victim:1")
	// So that it is mounted again, all of the attacker's have to go.
	m.remove("victim:1")
	m.remove("evil:holder")
	m.pull("victim:1")
	at := m.mount("victim:1")
	if b, err := os.ReadFile(at + "/file"); err != nil || string(b) != "of the victim" {
		t.Errorf("the victim's image: %q %v", b, err)
	}
}
