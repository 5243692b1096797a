//go:build engines

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocker29 runs Docker Engine 29 on containerd 2.4.2.
func TestDocker29(t *testing.T) {
	t.Parallel()
	d := newDockerTest(t, "scripts/install-tools.sh "+tools+" engines", "docker/dockerd", "docker/docker", "docker/runc")
	m := machines()["2.4.2"](t)
	for _, name := range []string{"dockerd", "docker", "runc"} {
		m.copy(filepath.Join(tools, "docker", name))
	}
	output(t, command(t, "install", "-D", filepath.Join(tools, "trixie", buildx), m.root+buildx))
	e := d.newEngine(t, m)
	d.run(t, e, "{}")
	const daemonJSON = `{"features": {"containerd-snapshotter": true}}`
	e.ownContainerd(daemonJSON, d.allowed)

	// It has a containerd inside where it finds none.
	e.dockerd.stop(t)
	if err := os.Remove(m.root + "/usr/bin/containerd"); err != nil {
		t.Fatal(err)
	}
	e.serveDocker(daemonJSON)
	if report := e.doctor(); !strings.Contains(report, "starts a containerd of its own") || !strings.Contains(report, "install containerd") {
		t.Errorf("doctor: %s", report)
	}
}
