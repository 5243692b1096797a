//go:build engines

package mirror

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestSignaturesVerifyFromMirror signs images where they are built, encrypts them into
// another repository, copies the signatures, and has sigstore's libraries verify them
// through the mirror: signatures under cosign's tags, and bundles, which are referrers.
func TestSignaturesVerifyFromMirror(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	n.start()
	d := harness.NewDebian(t, n.dir, "/nonexistent")
	harness.Write(t, d.Root+"/etc/containers/registries.d/test.yaml", "default-docker:\n  use-sigstore-attachments: true\n")
	harness.Write(t, n.dir+"/passphrase", "secret")
	harness.Output(t, d.Run("skopeo", "generate-sigstore-key", "--output-prefix", n.dir+"/tag", "--passphrase-file", n.dir+"/passphrase"))
	harness.Output(t, harness.Command(t, "openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", n.dir+"/bundle.pem"))
	harness.Output(t, harness.Command(t, "openssl", "pkey", "-in", n.dir+"/bundle.pem", "-pubout", "-out", n.dir+"/bundle.pub"))

	verify := func(key, image string, args ...string) *exec.Cmd {
		return n.tool("sigstore", nil, append(args, "verify", n.dir+"/"+key+".pub", image)...)
	}
	bySecret := []string{"--user", "pilot:" + n.secret}
	kinds := []struct{ name, other, suffix string }{{"tag", "bundle", ".sig"}, {"bundle", "tag", ""}}
	plain := map[string]string{}
	for _, k := range kinds {
		layout, digest := n.image(k.name, func(l *harness.Layout) harness.Object {
			return l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret())
		})
		plain[k.name] = digest
		built, encrypted := n.registry+"/build/"+k.name, n.registry+"/team/"+k.name
		push := []string{"copy", "-q", "--dest-tls-verify=false", "oci:" + layout + ":v1", "docker://" + built + ":1"}
		if k.name == "tag" {
			push = append(push, "--sign-by-sigstore-private-key", n.dir+"/tag.private", "--sign-passphrase-file", n.dir+"/passphrase")
		}
		harness.Output(t, d.Run("skopeo", push...))
		if k.name == "bundle" {
			harness.Output(t, n.tool("sigstore", nil, "sign-bundle", n.dir+"/bundle.pem", built+"@"+digest))
		}
		harness.Output(t, n.ctrPilot("images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a", "docker://"+built+":1", "docker://"+encrypted+":1"))
		harness.ExpectFailure(t, verify(k.name, n.mirror+"/team/"+k.name+"@"+digest, bySecret...), "no valid signature")
		tag := ":" + strings.Replace(digest, ":", "-", 1) + k.suffix
		harness.Output(t, d.Run("skopeo", "copy", "-q", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+built+tag, "docker://"+encrypted+tag))
	}
	all := func(args ...string) {
		t.Helper()
		for _, k := range kinds {
			for _, image := range []string{"/team/" + k.name + ":1", "/team/" + k.name + "@" + plain[k.name]} {
				if out := harness.Output(t, verify(k.name, n.mirror+image, args...)); out != k.name+"\n" {
					t.Errorf("%s: %s", image, out)
				}
				harness.ExpectFailure(t, verify(k.other, n.mirror+image, args...), k.name+": ", "no valid signature")
			}
		}
	}
	all(bySecret...)
	for _, k := range kinds {
		// The encrypted image is another, which nobody signed.
		harness.ExpectFailure(t, verify(k.name, n.registry+"/team/"+k.name+":1"), "no valid signature")
		harness.ExpectFailure(t, verify(k.name, n.mirror+"/team/"+k.name+"@"+n.tagged("team/"+k.name, "1"), bySecret...), "no valid signature")
	}
	n.pilot.Stop(t)

	n.startWith(n.registry, certs.args()...)
	all("--ca", certs.ca.File, "--cert", certs.client.Cert, "--key", certs.client.Key)
}
