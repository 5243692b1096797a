package pull

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestCRI pulls as the kubelet does, with the keys of the node.
func TestCRI(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	private, public := harness.KeyPair(t, dir+"/keys")
	forNode := map[string]string{}
	for _, k := range harness.LayerKinds {
		forNode[k.Name] = c.Image(k, "provider:pilot:team-a")
	}
	forKey := c.Image(harness.LayerKinds[1], "jwe:"+public)
	flipped := c.Tamper(forNode["gzip"], func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	cut := c.Tamper(forNode["tar"], func(b []byte) []byte { return b[:len(b)-512] })
	// Nobody answers here.
	silent, err := net.Listen("unix", filepath.Join(dir, "silent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()

	all := t
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd16()} {
		t.Run(v.Name, func(t *testing.T) {
			home := harness.TempDir(t)
			_, conf := harness.StartPilot(t, home, c.BrokerURL, "--kek-cache-size", "0")
			n := harness.NewNode(t, home, v, conf, filepath.Dir(private))
			n.T = t
			for name, image := range forNode {
				harness.Output(t, n.Crictl("pull", image))
				if out := harness.ContainerOutput(t, n.CtrPilot("--namespace", "k8s.io", "run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
					t.Errorf("%s: %s", name, out)
				}
				harness.Output(t, n.Crictl("rmi", image))
			}
			harness.Output(t, n.Crictl("pull", forKey))
			harness.Output(t, n.Crictl("rmi", forKey))

			for _, tampered := range []string{flipped, cut} {
				// containerd 1.6 may find the snapshot of a layer that the image
				// before had, and collect it before it builds on it.
				n.CollectGarbage(t)
				harness.ExpectFailure(t, n.Crictl("pull", tampered), "layer sha256:", "HMAC does not match")
			}
			if out := harness.Output(t, n.Crictl("images")); strings.Contains(out, "tampered") {
				t.Errorf("a tampered image is there:\n%s", out)
			}

			// A client that passes no payload, as containerd's own pull does.
			harness.ExpectFailure(t, n.Ctr("images", "pull", "--local", "--plain-http", forNode["tar"]),
				"pilot-decoder: containerd passed no decryption payload")

			c.Broker.Stop(t)
			harness.ExpectFailure(t, n.Crictl("pull", forNode["tar"]), "layer sha256:", `KEK "team-a"`, "copilot at "+c.BrokerURL)
			os.Rename(conf, conf+".away")
			harness.ExpectFailure(t, n.Crictl("pull", forNode["tar"]), `key provider "pilot" is not configured`)
			harness.Write(t, conf, `{"key-providers": {"pilot": {"grpc": "unix://`+home+`/nobody.sock"}}}`)
			harness.ExpectFailure(t, n.Crictl("pull", forNode["tar"]), "layer sha256:", home+"/nobody.sock")
			c.Broker, _ = harness.StartBroker(all, dir+"/broker")
		})
	}
}

// TestDecoderErrorsReachTheUser pulls an image without its KEK again and again,
// since containerd may look for the decoder's error before it is there.
func TestDecoderErrorsReachTheUser(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	_, otherURL := harness.StartBroker(t, dir+"/other")
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	_, conf := harness.StartPilot(t, dir+"/node", otherURL)
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd16()} {
		n := harness.NewNode(t, filepath.Join(dir, v.Name), v, conf, "")
		for range 15 {
			harness.ExpectFailure(t, n.Crictl("pull", image), "pilot-decoder: layer sha256:", `KEK "team-a"`, "no such KEK")
			if t.Failed() {
				break
			}
		}
		if out := harness.Output(t, n.CtrPilot("--namespace", "k8s.io", "snapshots", "list")); strings.Contains(out, "sha256:") {
			t.Errorf("containerd %s has snapshots:\n%s", v.Name, out)
		}
	}
}
