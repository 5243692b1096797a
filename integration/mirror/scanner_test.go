//go:build engines

package mirror

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// tool returns a command of a program that is installed for these tests, without the
// settings and credentials of who runs them.
func (n *node) tool(name string, env []string, args ...string) *exec.Cmd {
	n.t.Helper()
	program := filepath.Join(harness.Tools, "bin", name)
	if _, err := os.Stat(program); err != nil {
		n.t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s engines\"", name, harness.Tools)
	}
	cmd := harness.Command(n.t, program, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + harness.TempDir(n.t)}, env...)
	return cmd
}

// packages are what syft finds in an image.
type packages struct {
	Artifacts []struct{ Name, Version string }
	Source    struct {
		Metadata struct{ ManifestDigest string }
	}
}

// TestSyftScansFromMirror has syft list the packages of an encrypted image by tag and by
// plain digest, with the secret and with a client certificate. It can't read the image from
// the registry itself.
func TestSyftScansFromMirror(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	n.start()
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object {
		kind := harness.LayerKinds[1]
		base, baseID := l.Layer(kind, kind.OCI, map[string][]byte{
			"etc/os-release":      []byte("ID=debian\nNAME=Debian\nVERSION_ID=13\n"),
			"var/lib/dpkg/status": []byte("Package: hidden-package\nStatus: install ok installed\nArchitecture: all\nMaintainer: Nobody <nobody@example.com>\nVersion: 4.2-1\nDescription: none\n\n"),
		})
		app, appID := l.Layer(kind, kind.OCI, map[string][]byte{
			"app/hidden_module-7.1.dist-info/METADATA": []byte("Metadata-Version: 2.1\nName: hidden-module\nVersion: 7.1\n"),
		})
		return l.Manifest([]harness.Object{base, app}, []string{baseID, appID})
	})
	n.encrypt(layout, "team/app:enc")
	syft := func(image string, env ...string) *exec.Cmd {
		return n.tool("syft", append(env, "SYFT_CHECK_FOR_APP_UPDATE=false"), "scan", "-o", "json", "registry:"+image)
	}
	scan := func(env ...string) {
		t.Helper()
		for _, name := range []string{"team/app:enc", "team/app@" + plain} {
			var found packages
			if err := json.Unmarshal([]byte(harness.Output(t, syft(n.mirror+"/"+name, env...))), &found); err != nil {
				t.Fatal(err)
			}
			versions := map[string]string{}
			for _, p := range found.Artifacts {
				versions[p.Name] = p.Version
			}
			if len(versions) != 2 || versions["hidden-package"] != "4.2-1" || versions["hidden-module"] != "7.1" {
				t.Errorf("%s has %v", name, versions)
			}
			if found.Source.Metadata.ManifestDigest != plain {
				t.Errorf("%s is %s, not %s", name, found.Source.Metadata.ManifestDigest, plain)
			}
		}
	}
	const plainHTTP = "SYFT_REGISTRY_INSECURE_USE_HTTP=true"
	login := []string{plainHTTP, "SYFT_REGISTRY_AUTH_AUTHORITY=" + n.mirror, "SYFT_REGISTRY_AUTH_USERNAME=pilot", "SYFT_REGISTRY_AUTH_PASSWORD="}
	scan(append(login[:3:3], login[3]+n.secret)...)
	harness.ExpectFailure(t, syft(n.mirror+"/team/app:enc", append(login[:3:3], login[3]+"wrong")...), "does not know the caller")
	harness.ExpectFailure(t, syft(n.registry+"/team/app:enc", plainHTTP), "unsupported layer media type")
	n.pilot.Stop(t)

	n.startWith(n.registry, certs.args()...)
	scan("SYFT_REGISTRY_CA_CERT="+certs.ca.File, "SYFT_REGISTRY_AUTH_AUTHORITY="+n.mirror, "SYFT_REGISTRY_AUTH_TLS_CERT="+certs.client.Cert, "SYFT_REGISTRY_AUTH_TLS_KEY="+certs.client.Key)
	harness.ExpectFailure(t, syft(n.mirror+"/team/app:enc", "SYFT_REGISTRY_CA_CERT="+certs.ca.File), "certificate required")
}
