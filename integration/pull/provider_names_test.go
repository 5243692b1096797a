package pull

import (
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestProviderNames has pilot be two key providers of an ocicrypt.conf: it wraps
// and unwraps as either, also in the differ.
func TestProviderNames(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, url := harness.StartBroker(t, dir, "team-a", "team-b")
	harness.StartPilot(t, dir+"/node", url, "--provider-name", "pilot, pilot-eu")
	socket := "unix://" + dir + "/node/keyprovider.sock"
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "`+socket+`"}, "pilot-eu": {"grpc": "`+socket+`"}, "pilot-us": {"grpc": "`+socket+`"}}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	n := harness.NewDifferNode(t, dir+"/node", harness.DifferConfig{Containerd: harness.Containerd2()})
	for _, recipients := range [][]string{{"provider:pilot-eu:team-a"}, {"provider:pilot:team-b", "provider:pilot-eu:team-a"}} {
		name := c.Image(harness.LayerKinds[1], recipients...)
		if out := harness.Output(t, c.CtrPilot("images", "layerinfo", name)); !strings.Contains(out, "pilot-eu") {
			t.Errorf("layerinfo:\n%s", out)
		}
		harness.Output(t, n.Ctr("images", "pull", "--plain-http", name))
		if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", name, harness.ContainerID())); !strings.Contains(out, c.Secrets[name]) {
			t.Errorf("run: %s", out)
		}
		for _, key := range []string{"", "provider:pilot-eu:team-a"} {
			args := []string{"images", "decrypt"}
			if key != "" {
				args = append(args, "--key", key)
			}
			harness.Output(t, c.CtrPilot(append(args, name, name+"-decrypted"+key[:min(1, len(key))])...))
		}
	}
	harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot-us:team-a", c.Registry+"/image0:"+harness.LayerKinds[1].Name+"-plain", "x"), `add "pilot-us" to provider-name`)
	harness.ExpectFailure(t, harness.Command(t, "pilot", "serve", "--config", "/dev/null", "--provider-name", "pilot,pilot"), `duplicate name "pilot"`)
	harness.ExpectFailure(t, harness.Command(t, "pilot", "serve", "--config", "/dev/null", "--provider-name", "pilot,"), "a name is empty")
}

// TestBrokenKeyProviders has $OCICRYPT_KEYPROVIDER_CONFIG name a file that is not
// there, or is none of key providers. That matters only to who needs one.
func TestBrokenKeyProviders(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	for name, conf := range map[string]string{
		"missing": dir + "/nonexistent.conf", "broken": harness.Write(t, dir+"/broken.conf", "{"), "other": harness.Write(t, dir+"/other.conf", "key-providers: []"), "directory": dir,
	} {
		t.Run(name, func(t *testing.T) {
			c := harness.NewCI(t, harness.TempDir(t), conf)
			private, public := harness.KeyPair(t, dir+"/keys-"+name)
			image := c.Image(harness.LayerKinds[1], "jwe:"+public)
			harness.Output(t, c.CtrPilot("images", "decrypt", "--key", private, image, image+"-again"))
			if got, want := c.Target(image+"-again"), c.Target(image+"-plain"); got != want {
				t.Errorf("decrypted to %s, was %s", got, want)
			}
			harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", image+"-plain", "x"),
				`key provider "pilot" is not configured`, "$OCICRYPT_KEYPROVIDER_CONFIG", conf)
		})
	}
}
