package lazy

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/ctrlplane/pilot/integration/harness"
)

// preserved waits until pilot has had containerd keep what it needs for each snapshot that is
// mounted. pilot does so when it starts, and once a minute.
func (m *machine) preserved() {
	m.t.Helper()
	m.Pilot.Stop(m.t)
	m.StartPilot()
	harness.Await(m.t, "the claims of all layers to be kept", func() error {
		client, err := containerd.New(m.Socket)
		if err != nil {
			return err
		}
		defer client.Close()
		mounted := 0
		err = client.SnapshotService("pilot-lazy").Walk(namespaces.WithNamespace(m.t.Context(), "default"), func(_ context.Context, info snapshots.Info) error {
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
	m.preserved()
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
	m.preserved()
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

// TestKeptClaimsAreStillChecked has the forged image removed whose snapshot another image
// keeps.
func TestKeptClaimsAreStillChecked(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.encrypt("victim:1", layer{"file": []byte("of the victim")})
	m.encrypt("evil:1", layer{"file": []byte("of the attacker")})
	_, ids := m.configOf(m.manifest("victim:1"))
	forged := m.sealAs("evil:1", "evil:forged", ids...)
	m.pull("evil:forged")
	holder := clone(t, forged)
	holder["layers"] = []any{m.pushBlob("evil", "application/vnd.oci.image.layer.v1.tar", []byte("no layer"))}
	m.push("evil:holder", holder)
	m.pull("evil:holder")
	m.preserved()
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
