//go:build engines

package engines

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestDocker29 runs Docker Engine 29 on containerd 2.4.2.
func TestDocker29(t *testing.T) {
	t.Parallel()
	d := newDockerTest(t, "scripts/install-tools.sh "+harness.Tools+" engines", "docker/dockerd", "docker/docker", "docker/runc")
	m := harness.Machines()["2.4.2"](t)
	for _, name := range []string{"dockerd", "docker", "runc"} {
		m.AddProgram(filepath.Join(harness.Tools, "docker", name))
	}
	harness.Output(t, harness.Command(t, "install", "-D", filepath.Join(harness.Tools, "trixie", buildx), m.Root+buildx))
	e := d.newEngine(t, m)
	d.run(t, e, "{}")
	const daemonJSON = `{"features": {"containerd-snapshotter": true}}`
	e.ownContainerd(daemonJSON, d.allowed)

	// Docker starts its own containerd if it finds none.
	e.dockerd.Stop(t)
	if err := os.Remove(m.Root + "/usr/bin/containerd"); err != nil {
		t.Fatal(err)
	}
	e.serveDocker(daemonJSON)
	if report := e.doctor(); !strings.Contains(report, "starts its own containerd") || !strings.Contains(report, "install containerd") {
		t.Errorf("doctor: %s", report)
	}
}
