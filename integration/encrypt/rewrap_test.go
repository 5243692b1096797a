package encrypt

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// wrappedFor returns the digests of an image's layers, and the recipients of each.
func wrappedFor(n *harness.Node, name string) (digests, recipients []string) {
	n.T.Helper()
	var info struct {
		Layers []struct {
			Digest     string
			Encrypted  bool
			Recipients []string
		}
	}
	if err := json.Unmarshal([]byte(harness.Output(n.T, n.CtrPilot("images", "layerinfo", "--json", name))), &info); err != nil {
		n.T.Fatal(err)
	}
	for _, l := range info.Layers {
		digests = append(digests, l.Digest)
		if l.Encrypted {
			recipients = append(recipients, strings.Join(l.Recipients, " "))
		}
	}
	return digests, recipients
}

// expectRecipients checks that all of an image's layers are wrapped for these, and
// that they are those of before.
func expectRecipients(n *harness.Node, name, want string, before []string) {
	n.T.Helper()
	digests, recipients := wrappedFor(n, name)
	if len(recipients) == 0 || slices.ContainsFunc(recipients, func(r string) bool { return r != want }) {
		n.T.Errorf("%s has recipients %q, want %s", name, recipients, want)
	}
	if !slices.Equal(digests, before) {
		n.T.Errorf("%s has layers %s, had %s", name, digests, before)
	}
}

// TestRewrap moves images in containerd to new versions of KEKs and to other
// recipients, while the files of their layers are missing.
func TestRewrap(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	copilot, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a", "team-b", "team-c")
	_, ociConf := harness.StartPilot(t, dir+"/ci", brokerURL)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), ociConf, "")
	private, public := harness.KeyPair(t, dir+"/keys")
	other, _ := harness.KeyPair(t, dir+"/other")
	l := harness.NewLayout(t)
	plain := "example.com/app:plain"
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", plain, l.Index(harness.LayerKinds[1], harness.NewSecret()))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, "example.com/app:1"))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, plain, "example.com/app:jwe"))

	digests, _ := wrappedFor(c, "example.com/app:1")
	away := func(there bool) {
		t.Helper()
		for _, d := range digests {
			file := filepath.Join(dir, "ci/root/io.containerd.content.v1.content/blobs/sha256", strings.TrimPrefix(d, "sha256:"))
			from, to := file, filepath.Join(dir, filepath.Base(file))
			if there {
				from, to = to, from
			}
			if err := os.Rename(from, to); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
	}
	rewrap := func(args ...string) *exec.Cmd {
		t.Helper()
		return c.CtrPilot(append([]string{"images", "rewrap"}, args...)...)
	}
	unchanged := func(name string, do func()) {
		t.Helper()
		before := c.Target(name)
		do()
		if got := c.Target(name); got != before {
			t.Errorf("%s is %s, was %s", name, got, before)
		}
		c.ExpectNothingPending()
	}
	away(false)
	unchanged("example.com/app:1", func() {
		if out := harness.Output(t, rewrap("example.com/app:1")); !strings.Contains(out, "is up to date") {
			t.Errorf("up to date: %s", out)
		}
	})
	harness.RotateKEK(t, dir+"/broker", "team-a")
	unchanged("example.com/app:1", func() {
		if out := harness.Output(t, rewrap("--dry-run", "example.com/app:1")); !strings.Contains(out, "would change (3 layers: provider:pilot:team-a@1 -> provider:pilot:team-a@2") {
			t.Errorf("dry run: %s", out)
		}
	})
	harness.Output(t, rewrap("example.com/app:1", "example.com/app:2"))
	expectRecipients(c, "example.com/app:1", "team-a@1", digests)
	expectRecipients(c, "example.com/app:2", "team-a@2", digests)
	harness.ExpectFailure(t, rewrap("example.com/app:1", "example.com/app:2"), "image example.com/app:2 already exists")
	harness.Output(t, rewrap("example.com/app:1"))
	expectRecipients(c, "example.com/app:1", "team-a@2", digests)

	harness.Output(t, rewrap("--from", "team-a", "--to", "team-b", "example.com/app:1"))
	expectRecipients(c, "example.com/app:1", "team-b@1", digests)
	harness.Output(t, rewrap("--recipient", "provider:pilot:team-c", "--recipient", "jwe:"+public, "example.com/app:1"))
	expectRecipients(c, "example.com/app:1", "[jwe] team-b@1 team-c@1", digests)
	harness.Output(t, rewrap("--remove", "provider:pilot:team-b", "--remove", "jwe", "example.com/app:1"))
	expectRecipients(c, "example.com/app:1", "team-c@1", digests)

	unchanged("example.com/app:1", func() {
		harness.ExpectFailure(t, rewrap("--remove", "provider:pilot:team-c", "example.com/app:1"), "layer sha256:", "no recipient would be left")
		harness.ExpectFailure(t, rewrap("--remove", "provider:pilot:team-x", "example.com/app:1"), "no layer has the recipient provider:pilot:team-x, only provider:pilot:team-c@1")
		harness.ExpectFailure(t, rewrap("--from", "team-a", "--to", "team-b", "example.com/app:1"), `no layer has the recipient KEK "team-a"`)
		harness.ExpectFailure(t, rewrap("--from", "team-c", "--to", "team-x", "example.com/app:1"), `KEK "team-x"`, "no such KEK")
		harness.ExpectFailure(t, rewrap("--key", "provider:pilot:team-a", "example.com/app:1"), `wrapped with KEK "team-c"`)
		harness.ExpectFailure(t, rewrap("--remove", "jwe", plain), "it has no encrypted layers")
		harness.ExpectFailure(t, rewrap("example.com/nobody:1"), "not found")
	})
	unchanged("example.com/app:jwe", func() {
		harness.ExpectFailure(t, rewrap("--recipient", "provider:pilot:team-a", "--key", other, "example.com/app:jwe"), "no key unwraps the layer key")
	})
	harness.Output(t, rewrap("--recipient", "provider:pilot:team-a", "--key", private, "--remove", "jwe", "example.com/app:jwe"))
	away(true)
	for _, name := range []string{"example.com/app:1", "example.com/app:2", "example.com/app:jwe"} {
		harness.Output(t, c.CtrPilot("images", "decrypt", name, name+"-plain"))
		if got, want := c.Target(name+"-plain"), c.Target(plain); got != want {
			t.Errorf("%s: decrypted to %s, was %s", name, got, want)
		}
	}

	// Several: what fails does not stop the others.
	harness.RotateKEK(t, dir+"/broker", "team-a")
	list := harness.Write(t, dir+"/list", "example.com/app:2 # moved\nexample.com/nobody:1\n")
	out := harness.ExpectFailure(t, rewrap("--file", list, "example.com/*:jwe", "example.com/app:1", "example.com/app:?-plain"),
		"example.com/nobody:1: ", "not found", "example.com/app:jwe sha256:", "example.com/app:1 sha256:", "is up to date",
		"6 images: 2 changed, 1 up to date, 2 not encrypted, 1 failed", "ctr-pilot: 1 failed")
	if t.Failed() {
		t.Log(out)
	}
	expectRecipients(c, "example.com/app:2", "team-a@3", digests)
	harness.ExpectFailure(t, rewrap("--remove", "provider:pilot:team-b", "example.com/*"), "0 failed", "no layer has the recipient provider:pilot:team-b, only ")
	harness.Output(t, rewrap("--recipient", "provider:pilot:team-b", "example.com/app:2"))

	// Without the broker nothing changes.
	copilot.Stop(t)
	for _, args := range [][]string{{}, {"--from", "team-b", "--to", "team-a"}, {"--recipient", "provider:pilot:team-a"}} {
		unchanged("example.com/app:2", func() {
			harness.ExpectFailure(t, rewrap(append(args, "example.com/app:2")...), "copilot at ", "gives no usable answer")
		})
	}
}
