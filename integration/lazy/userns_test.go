package lazy

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestContainersWithUserNamespacesReadTheWholeImage has a container with a user namespace, as
// of a pod with hostUsers: false. containerd gives the files to its users, one by one, in a
// copy.
func TestContainersWithUserNamespacesReadTheWholeImage(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	const dirs = "/state/io.containerd.runtime.v2.task/default"
	if err := os.MkdirAll(m.Dir+dirs, 0o711); err != nil {
		t.Fatal(err)
	}
	// Its root may not be ours.
	for _, dir := range []string{"", "/state", "/state/io.containerd.runtime.v2.task", dirs} {
		if err := os.Chmod(m.Dir+dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	secret := harness.NewSecret()
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte(secret)}, layer{"big": random(1, 8*mib)})
	m.pull("app:1")
	m.front.count()
	mapped := []string{"run", "--rm", "--snapshotter", "pilot-lazy", "--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", m.ref("app:1"), harness.ContainerID()}
	if got := harness.ContainerOutput(t, m.Ctr(mapped...)); got != "hello, "+secret+"\n" {
		t.Errorf("the container prints %q", got)
	}
	// docs/lazy.md says so.
	if fetched := m.front.count(); fetched < 8*mib {
		t.Errorf("the registry has sent %d bytes: the image is not read whole any more", fetched)
	}
}
