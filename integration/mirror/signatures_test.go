package mirror

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestSignatureMadeBeforeEncryptionIsValid has podman require a signature of the plain
// image, and pull by the registry's name, which leads to the mirror. The signature is a tag
// beside the encrypted image, as skopeo and cosign make it.
func TestSignatureMadeBeforeEncryptionIsValid(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.startByName()
	layout, plain := n.plain(harness.LayerKinds[1], harness.NewSecret())
	d := harness.NewDebian(t, n.dir, "/nonexistent")
	harness.Write(t, filepath.Join(d.Root, "etc/containers/registries.d/test.yaml"), "default-docker:\n  use-sigstore-attachments: true\n")
	harness.Write(t, n.dir+"/passphrase", "secret")
	for _, key := range []string{"key", "other"} {
		harness.Output(t, d.Run("skopeo", "generate-sigstore-key", "--output-prefix", n.dir+"/"+key, "--passphrase-file", n.dir+"/passphrase"))
	}
	harness.Output(t, d.Run("skopeo", "copy", "-q", "--dest-tls-verify=false", "--sign-by-sigstore-private-key", n.dir+"/key.private", "--sign-passphrase-file", n.dir+"/passphrase",
		"--sign-identity", "registry.test/team/app:1", "oci:"+layout+":v1", "docker://"+n.registry+"/team/app:plain"))
	harness.Output(t, n.ctrPilot("images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a", "docker://"+n.registry+"/team/app:plain", "docker://"+n.registry+"/team/app:1"))
	// Encrypted, it is in another repository too, without the signature.
	n.encrypt(layout, "team/unsigned:1")

	harness.Write(t, d.Root+"/etc/containers/registries.conf", fmt.Sprintf("[[registry]]\nlocation = 'registry.test'\n[[registry.mirror]]\nlocation = '%s/registry.test'\ninsecure = true\n", n.mirror))
	harness.Output(t, d.Run("podman", "login", "--tls-verify=false", "-u", "pilot", "-p", n.secret, n.mirror))
	required := func(key string) {
		harness.Write(t, filepath.Join(d.Root, "etc/containers/policy.json"),
			fmt.Sprintf(`{"default": [{"type": "reject"}], "transports": {"docker": {"registry.test": [{"type": "sigstoreSigned", "keyPath": "%s/%s.pub", "signedIdentity": {"type": "matchRepository"}}]}}}`, n.dir, key))
	}
	images := []string{"registry.test/team/app:1", "registry.test/team/app@" + plain}
	required("other")
	for _, image := range images {
		harness.ExpectFailure(t, d.Run("podman", "pull", "-q", image), "signature")
	}
	required("key")
	harness.ExpectFailure(t, d.Run("podman", "pull", "-q", "registry.test/team/unsigned:1"), "signature")
	for _, image := range images {
		id := strings.TrimSpace(harness.Output(t, d.Run("podman", "pull", "-q", image)))
		if got := strings.TrimSpace(harness.Output(t, d.Run("podman", "image", "inspect", "--format", "{{.Digest}}", id))); got != plain {
			t.Errorf("%s is stored as %s", image, got)
		}
	}
}
