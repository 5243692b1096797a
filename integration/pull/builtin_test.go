package pull

import (
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestBuiltin pulls with a containerd that has pilot's differ in it.
func TestBuiltin(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	n := harness.BuiltinNode(t, dir, c.Ocicrypt)
	for _, k := range harness.LayerKinds {
		image := c.Image(k, "provider:pilot:team-a")
		harness.Output(t, n.Crictl("pull", image))
		harness.Output(t, n.Crictl("rmi", image))
		for _, args := range [][]string{{"--local"}, {}} {
			harness.Output(t, n.Ctr(append([]string{"images", "pull", "--plain-http", image}, args...)...))
			if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
				t.Errorf("%s: %s", k.Name, out)
			}
			harness.Output(t, n.Ctr("images", "remove", "--sync", image))
		}
		harness.ExpectFailure(t, n.Crictl("pull", c.Tamper(image, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })), "pilot: layer sha256:", "HMAC does not match")
	}
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	harness.Output(t, n.Ctr("images", "pull", "--plain-http", image))
	harness.Output(t, n.Ctr("containers", "create", image, "c"))
	commitKeepsLease(t, n, "c")

	private, public := harness.KeyPair(t, dir+"/pair")
	forKey := c.Image(harness.LayerKinds[1], "jwe:"+public)
	harness.ExpectFailure(t, n.Crictl("pull", forKey), "jwe: no private key was given", n.Dir+`/keys" is missing`)
	harness.Write(t, n.Dir+"/keys/README", "The keys of this node.\n")
	harness.Write(t, n.Dir+"/keys/key.pem", harness.Read(t, private))
	harness.Output(t, n.Crictl("pull", forKey))
}
