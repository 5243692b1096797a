package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// rotate gives a KEK of the broker in dir a new version.
func rotate(t testing.TB, dir, kek string) {
	t.Helper()
	output(t, command(t, "copilot", "keys", "rotate", "--dir", dir, kek))
}

// wrappedFor returns the digests of an image's layers, and who each is wrapped for.
func (n *node) wrappedFor(name string) (digests, recipients []string) {
	n.t.Helper()
	var info struct {
		Layers []struct {
			Digest     string
			Encrypted  bool
			Recipients []string
		}
	}
	if err := json.Unmarshal([]byte(output(n.t, n.ctrPilot("images", "layerinfo", "--json", name))), &info); err != nil {
		n.t.Fatal(err)
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
func (n *node) expectRecipients(name, want string, before []string) {
	n.t.Helper()
	digests, recipients := n.wrappedFor(name)
	if len(recipients) == 0 || slices.ContainsFunc(recipients, func(r string) bool { return r != want }) {
		n.t.Errorf("%s has recipients %q, want %s", name, recipients, want)
	}
	if !slices.Equal(digests, before) {
		n.t.Errorf("%s has layers %s, had %s", name, digests, before)
	}
}

// TestRewrap moves images in containerd to new versions of KEKs and to other
// recipients. Their layers' files are away meanwhile.
func TestRewrap(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	copilot, brokerURL := broker(t, dir+"/broker", "team-a", "team-b", "team-c")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newNode(t, dir+"/ci", containerd2(), ociConf, "")
	private, public := keyPair(t, dir+"/keys")
	other, _ := keyPair(t, dir+"/other")
	l := newLayout(t)
	plain := "example.com/app:plain"
	output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(dir+"/image.tar", plain, l.index(kinds[1], newSecret()))))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, "example.com/app:1"))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, plain, "example.com/app:jwe"))

	digests, _ := c.wrappedFor("example.com/app:1")
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
		return c.ctrPilot(append([]string{"images", "rewrap"}, args...)...)
	}
	unchanged := func(name string, do func()) {
		t.Helper()
		before := c.target(name)
		do()
		if got := c.target(name); got != before {
			t.Errorf("%s is %s, was %s", name, got, before)
		}
		c.nothingPending()
	}
	away(false)
	unchanged("example.com/app:1", func() {
		if out := output(t, rewrap("example.com/app:1")); !strings.Contains(out, "is up to date") {
			t.Errorf("up to date: %s", out)
		}
	})
	rotate(t, dir+"/broker", "team-a")
	unchanged("example.com/app:1", func() {
		if out := output(t, rewrap("--dry-run", "example.com/app:1")); !strings.Contains(out, "would change (3 layers: provider:pilot:team-a@1 -> provider:pilot:team-a@2") {
			t.Errorf("dry run: %s", out)
		}
	})
	output(t, rewrap("example.com/app:1", "example.com/app:2"))
	c.expectRecipients("example.com/app:1", "team-a@1", digests)
	c.expectRecipients("example.com/app:2", "team-a@2", digests)
	fails(t, rewrap("example.com/app:1", "example.com/app:2"), "there is an image example.com/app:2 already")
	output(t, rewrap("example.com/app:1"))
	c.expectRecipients("example.com/app:1", "team-a@2", digests)

	output(t, rewrap("--from", "team-a", "--to", "team-b", "example.com/app:1"))
	c.expectRecipients("example.com/app:1", "team-b@1", digests)
	output(t, rewrap("--recipient", "provider:pilot:team-c", "--recipient", "jwe:"+public, "example.com/app:1"))
	c.expectRecipients("example.com/app:1", "[jwe] team-b@1 team-c@1", digests)
	output(t, rewrap("--remove", "provider:pilot:team-b", "--remove", "jwe", "example.com/app:1"))
	c.expectRecipients("example.com/app:1", "team-c@1", digests)

	unchanged("example.com/app:1", func() {
		fails(t, rewrap("--remove", "provider:pilot:team-c", "example.com/app:1"), "layer sha256:", "no recipient would be left")
		fails(t, rewrap("--remove", "provider:pilot:team-x", "example.com/app:1"), "no layer has the recipient provider:pilot:team-x, only provider:pilot:team-c@1")
		fails(t, rewrap("--from", "team-a", "--to", "team-b", "example.com/app:1"), `no layer has the recipient KEK "team-a"`)
		fails(t, rewrap("--from", "team-c", "--to", "team-x", "example.com/app:1"), `KEK "team-x"`, "no such KEK")
		fails(t, rewrap("--key", "provider:pilot:team-a", "example.com/app:1"), `wrapped with KEK "team-c"`)
		fails(t, rewrap("--remove", "jwe", plain), "it has no encrypted layers")
		fails(t, rewrap("example.com/nobody:1"), "not found")
	})
	unchanged("example.com/app:jwe", func() {
		fails(t, rewrap("--recipient", "provider:pilot:team-a", "--key", other, "example.com/app:jwe"), "no key unwraps the layer key")
	})
	output(t, rewrap("--recipient", "provider:pilot:team-a", "--key", private, "--remove", "jwe", "example.com/app:jwe"))
	away(true)
	for _, name := range []string{"example.com/app:1", "example.com/app:2", "example.com/app:jwe"} {
		output(t, c.ctrPilot("images", "decrypt", name, name+"-plain"))
		if got, want := c.target(name+"-plain"), c.target(plain); got != want {
			t.Errorf("%s: decrypted to %s, was %s", name, got, want)
		}
	}

	// Several: what fails does not stop the others.
	rotate(t, dir+"/broker", "team-a")
	list := write(t, dir+"/list", "example.com/app:2 # moved\nexample.com/nobody:1\n")
	out := fails(t, rewrap("--file", list, "example.com/*:jwe", "example.com/app:1", "example.com/app:?-plain"),
		"example.com/nobody:1: ", "not found", "example.com/app:jwe sha256:", "example.com/app:1 sha256:", "is up to date",
		"6 images: 2 changed, 1 up to date, 2 not encrypted, 1 failed", "ctr-pilot: 1 failed")
	if t.Failed() {
		t.Log(out)
	}
	c.expectRecipients("example.com/app:2", "team-a@3", digests)
	fails(t, rewrap("--remove", "provider:pilot:team-b", "example.com/*"), "0 failed", "no layer has the recipient provider:pilot:team-b, only ")
	output(t, rewrap("--recipient", "provider:pilot:team-b", "example.com/app:2"))

	// Without the broker nothing changes.
	copilot.stop(t)
	for _, args := range [][]string{{}, {"--from", "team-b", "--to", "team-a"}, {"--recipient", "provider:pilot:team-a"}} {
		unchanged("example.com/app:2", func() {
			fails(t, rewrap(append(args, "example.com/app:2")...), "copilot at ", "gives no usable answer")
		})
	}
}

// BenchmarkRewrap shows that it does not matter how large layers are.
func BenchmarkRewrap(b *testing.B) {
	dir := benchDir(b)
	_, brokerURL := broker(b, dir+"/broker", "team-a", "team-b")
	_, ociConf := pilot(b, dir+"/ci", brokerURL)
	n := newNode(b, dir+"/ci", containerd2(), ociConf, "")
	address, _ := registry(b, dir)
	for name, size := range map[string]int{"small": 10 << 20 / 4, "large": 256 << 20} {
		l, m := newLayout(b), newMaterial(b)
		var contents [][]byte
		for range 4 {
			contents = append(contents, m.layer(size))
		}
		name = address + "/app:" + name
		output(b, n.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", name, l.bulk(kinds[0], contents))))
		output(b, exec.Command("rm", dir+"/image.tar"))
		output(b, n.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", name))
		output(b, n.ctrPilot("images", "push", "--plain-http", name))
	}
	for _, flags := range [][]string{nil, {"--registry", "--plain-http"}} {
		rewrap := func(name string) func() float64 {
			from, to := "team-a", "team-b"
			return func() float64 {
				args := append([]string{"images", "rewrap", "--from", from, "--to", to}, flags...)
				from, to = to, from
				return took(func() { output(b, n.ctrPilot(append(args, address+"/app:"+name)...)) })
			}
		}
		name, where := "Containerd", "in containerd"
		if flags != nil {
			name, where = "Registry", "in a registry"
		}
		b.Run(name, func(b *testing.B) {
			compare(b, comparison{"rewrap an image of 1 GiB " + where, "the same with 10 MiB", "ms", "≈ 1"}, rewrap("large"), rewrap("small"))
		})
	}
}
