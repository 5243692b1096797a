package lazy

import (
	"context"
	"errors"
	"os"
	"strings"
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
