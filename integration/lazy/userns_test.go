package lazy

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// allowOthers lets the root of a container, who may not be ours, through to its files.
func (m *machine) allowOthers() {
	m.t.Helper()
	const dirs = "/state/io.containerd.runtime.v2.task/default"
	if err := os.MkdirAll(m.Dir+dirs, 0o711); err != nil {
		m.t.Fatal(err)
	}
	for _, dir := range []string{"", "/state", "/state/io.containerd.runtime.v2.task", dirs} {
		if err := os.Chmod(m.Dir+dir, 0o711); err != nil {
			m.t.Fatal(err)
		}
	}
}

// runMapped runs a container with a user namespace.
func (m *machine) runMapped(name string) *exec.Cmd {
	m.t.Helper()
	return m.Ctr("run", "--rm", "--snapshotter", "pilot-lazy", "--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", m.ref(name), harness.ContainerID())
}

// TestContainersWithUserNamespacesReadTheWholeImage has a container with a user namespace, as
// of a pod with hostUsers: false. containerd gives the files to its users, one by one, in a
// copy.
func TestContainersWithUserNamespacesReadTheWholeImage(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.allowOthers()
	secret := harness.NewSecret()
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte(secret)}, layer{"big": random(1, 8*mib)})
	m.pull("app:1")
	m.front.count()
	if got := harness.ContainerOutput(t, m.runMapped("app:1")); got != "hello, "+secret+"\n" {
		t.Errorf("the container prints %q", got)
	}
	// docs/lazy.md says so.
	if fetched := m.front.count(); fetched < 8*mib {
		t.Errorf("the registry has sent %d bytes: the image is not read whole any more", fetched)
	}
}

// TestLayerIsNotTakenForACopyOfAnImage has a layer sealed under the name by which containerd looks
// for the copy of another's image for a user namespace.
func TestLayerIsNotTakenForACopyOfAnImage(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.allowOthers()
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte("of the victim")})
	_, ids := m.configOf(m.manifest("app:1"))
	const users = `[{"containerID":0,"hostID":100000,"size":65536}]`
	name := "sha256:" + harness.SHA256(fmt.Sprintf(`{"Parent":%q,"IDMap":{"UidMap":%s,"GidMap":%s}}`, ids[0], users, users))
	m.encrypt("evil:1", layer{"hello": program(t), "secret": []byte("of the attacker")})
	m.sealAs("evil:1", "evil:forged", name)
	m.pull("evil:forged")
	m.pull("app:1")
	if out := harness.ExpectFailure(t, m.runMapped("app:1"), "no copy of an image"); strings.Contains(out, "of the attacker") {
		t.Error("the container has the attacker's files")
	}
	m.remove("evil:forged")
	if got := harness.ContainerOutput(t, m.runMapped("app:1")); got != "hello, of the victim\n" {
		t.Errorf("once that is removed, the container prints %q", got)
	}
}
