package docs

import (
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestQuadletUnits has podman make services of the units that the packages have as
// examples. TestPackageDocs starts them, as docs/podman.md shows.
func TestQuadletUnits(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	for _, name := range []string{"podman-copilot.container", "podman-pilot.container"} {
		harness.Write(t, dir+"/"+name, harness.Read(t, harness.Repo+"/packaging/podman/"+name))
	}
	quadlet := harness.NewDebian(t, dir, "").Run("/usr/libexec/podman/quadlet", "-dryrun")
	quadlet.Env = append(quadlet.Env, "QUADLET_UNIT_DIRS="+dir)
	out := harness.CombinedOutput(t, quadlet) // it warns of keys that it does not know
	if strings.Contains(out, "unsupported key") {
		t.Error(out)
	}
	for _, want := range []string{
		"---podman-copilot.service---", "--network host", "-v copilot:/var/lib/copilot", "/copilot:v1 serve --insecure-loopback --listen 127.0.0.1:8080",
		"---podman-pilot.service---", "/pilot:v1 serve --original-defaults",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}
