package integration

import (
	"strings"
	"testing"
)

// TestProviderNames has pilot be two key providers of an ocicrypt.conf: it wraps
// and unwraps as either, also in the differ.
func TestProviderNames(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, url := broker(t, dir, "team-a", "team-b")
	pilot(t, dir+"/node", url, "--provider-name", "pilot, pilot-eu")
	socket := "unix://" + dir + "/node/keyprovider.sock"
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "`+socket+`"}, "pilot-eu": {"grpc": "`+socket+`"}, "pilot-us": {"grpc": "`+socket+`"}}}`)
	c := newCI(t, dir+"/ci", conf)
	n := newDifferNode(t, dir+"/node", differNode{v: containerd2()})
	for _, recipients := range [][]string{{"provider:pilot-eu:team-a"}, {"provider:pilot:team-b", "provider:pilot-eu:team-a"}} {
		name := c.image(kinds[1], recipients...)
		if out := output(t, c.ctrPilot("images", "layerinfo", name)); !strings.Contains(out, "pilot-eu") {
			t.Errorf("layerinfo:\n%s", out)
		}
		output(t, n.ctr("images", "pull", "--plain-http", name))
		if out := containerOutput(t, n.ctr("run", "--rm", name, containerID())); !strings.Contains(out, c.secrets[name]) {
			t.Errorf("run: %s", out)
		}
		for _, key := range []string{"", "provider:pilot-eu:team-a"} {
			args := []string{"images", "decrypt"}
			if key != "" {
				args = append(args, "--key", key)
			}
			output(t, c.ctrPilot(append(args, name, name+"-decrypted"+key[:min(1, len(key))])...))
		}
	}
	fails(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot-us:team-a", c.registry+"/image0:"+kinds[1].name+"-plain", "x"), `add "pilot-us" to provider-name`)
	fails(t, command(t, "pilot", "serve", "--config", "/dev/null", "--provider-name", "pilot,pilot"), `duplicate name "pilot"`)
	fails(t, command(t, "pilot", "serve", "--config", "/dev/null", "--provider-name", "pilot,"), "a name is empty")
}

// TestBrokenKeyProviders has $OCICRYPT_KEYPROVIDER_CONFIG name a file that is not
// there, or is none of key providers. That matters only to who needs one.
func TestBrokenKeyProviders(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	for name, conf := range map[string]string{
		"missing": dir + "/nonexistent.conf", "broken": write(t, dir+"/broken.conf", "{"), "other": write(t, dir+"/other.conf", "key-providers: []"), "directory": dir,
	} {
		t.Run(name, func(t *testing.T) {
			c := newCI(t, tempDir(t), conf)
			private, public := keyPair(t, dir+"/keys-"+name)
			image := c.image(kinds[1], "jwe:"+public)
			output(t, c.ctrPilot("images", "decrypt", "--key", private, image, image+"-again"))
			if got, want := c.target(image+"-again"), c.target(image+"-plain"); got != want {
				t.Errorf("decrypted to %s, was %s", got, want)
			}
			fails(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", image+"-plain", "x"),
				`key provider "pilot" is not configured`, "$OCICRYPT_KEYPROVIDER_CONFIG", conf)
		})
	}
}
