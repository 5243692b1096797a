package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCommands uses ctr-pilot's commands for encrypted images with a key of
// the user's own.
func TestCommands(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newCI(t, dir+"/ci", conf)
	private, public := keyPair(t, dir+"/keys")
	other, _ := keyPair(t, dir+"/other")
	secret := newSecret()
	ref := c.registry + "/app:"
	l := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--all-platforms", l.tar(dir+"/image.tar", ref+"plain", l.index(kinds[1], secret))))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, ref+"plain", ref+"encrypted"))
	output(t, c.ctrPilot("images", "push", "--plain-http", ref+"encrypted"))
	output(t, c.ctrPilot("images", "export", "--all-platforms", dir+"/encrypted.tar", ref+"encrypted"))
	if strings.Contains(read(t, dir+"/encrypted.tar"), secret) {
		t.Error("the secret is in the archive")
	}

	t.Run("selection", func(t *testing.T) {
		output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--layer", "-1", "--platform", "linux/s390x", ref+"plain", ref+"selected"))
		out := output(t, c.ctrPilot("images", "layerinfo", ref+"selected"))
		if strings.Count(out, "jwe") != 2 { // the scheme and the recipient
			t.Errorf("layerinfo:\n%s", out)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "jwe") && (!strings.HasPrefix(line, "1 ") || !strings.Contains(line, "linux/s390x")) {
				t.Errorf("encrypted: %s", line)
			}
		}
		output(t, c.ctrPilot("images", "decrypt", "--key", private, ref+"selected"))
		if got, want := c.target(ref+"selected"), c.target(ref+"plain"); got != want {
			t.Errorf("decrypted to %s, was %s", got, want)
		}
		fails(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--layer", "7", ref+"plain", "x"), "no layer 7")
		fails(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--platform", "linux/riscv64", ref+"plain", "x"), "no platform linux/riscv64")
	})

	t.Run("import", func(t *testing.T) {
		n := newNode(t, tempDir(t), containerd2(), conf, "")
		fails(t, n.ctrPilot("images", "import", "--key", other, dir+"/encrypted.tar"), "layer sha256:")
		out := output(t, n.ctrPilot("images", "import", "--key", private, "--all-platforms", dir+"/encrypted.tar"))
		if !strings.Contains(out, "unpacking "+ref+"encrypted") {
			t.Errorf("import: %s", out)
		}
		if out := containerOutput(t, n.ctrPilot("run", "--rm", "--key", private, ref+"encrypted", containerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		foreign := newLayout(t)
		index := foreign.json("application/vnd.oci.image.index.v1+json", object{"schemaVersion": 2, "manifests": []object{foreign.image(kinds[0], false, "s390x", secret)}})
		out = output(t, n.ctrPilot("images", "import", "--all-platforms", foreign.tar(dir+"/foreign.tar", "example.com/foreign:1", index)))
		if !strings.Contains(out, "not for this platform") {
			t.Errorf("import of another platform's: %s", out)
		}
		n.nothingPending()
	})

	t.Run("use", func(t *testing.T) {
		n := newNode(t, tempDir(t), containerd2(), conf, "")
		fails(t, n.ctrPilot("images", "pull", "--plain-http", ref+"encrypted"), "no private key was given")
		fails(t, n.ctrPilot("images", "pull", "--plain-http", "--key", other, ref+"encrypted"), "layer sha256:")
		// It is fetched, but not unpacked. Each of these does.
		fails(t, n.ctrPilot("run", "--rm", ref+"encrypted", containerID()), "not authorized")
		fails(t, n.ctrPilot("containers", "create", "--key", other, ref+"encrypted", "c"), "not authorized")
		mnt := filepath.Join(n.dir, "mnt")
		if err := os.Mkdir(mnt, 0o700); err != nil {
			t.Fatal(err)
		}
		output(t, n.ctrPilot("images", "mount", "--key", private, ref+"encrypted", mnt))
		if got := read(t, mnt+"/secret"); got != secret {
			t.Errorf("mounted: %s", got)
		}
		output(t, n.ctrPilot("images", "unmount", "--rm", mnt))
		output(t, n.ctrPilot("containers", "create", "--key", private, ref+"encrypted", "created"))
		output(t, n.ctrPilot("containers", "delete", "created"))
		// It is unpacked now.
		fails(t, n.ctrPilot("run", "--rm", ref+"encrypted", containerID()), "not authorized")
		if out := containerOutput(t, n.ctrPilot("run", "--rm", "--skip-decrypt-auth", ref+"encrypted", containerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		output(t, n.ctrPilot("images", "remove", "--sync", ref+"encrypted"))
		output(t, n.ctrPilot("images", "pull", "--plain-http", "--key", private, ref+"encrypted"))
		if out := containerOutput(t, n.ctrPilot("run", "--rm", "--key", private, ref+"encrypted", containerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		n.nothingPending()
	})

	// containerd's garbage collector finds all that an image consists of.
	t.Run("garbage", func(t *testing.T) {
		for _, args := range [][]string{
			{"images", "encrypt", "--recipient", "jwe:" + public, ref + "plain"}, // in place
			{"images", "remove", "--sync", ref + "encrypted"},
			{"images", "decrypt", "--key", private, ref + "plain"},
			{"images", "tag", ref + "plain", ref + "other"},
			{"images", "remove", "--sync", ref + "plain"},
		} {
			output(t, c.ctrPilot(args...))
		}
		if out := output(t, c.ctrPilot("images", "check")); !strings.Contains(out, "complete") || strings.Contains(out, "incomplete") {
			t.Errorf("images check:\n%s", out)
		}
	})

	t.Run("no bytes", func(t *testing.T) {
		l := newLayout(t)
		image := l.image(kinds[0], false, goarch, secret)
		doc := string(l.files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")])
		l.blob("", nil)
		i := strings.Index(doc, `"layers": [`) + len(`"layers": [`)
		doc = doc[:i] + `{"mediaType":"` + kinds[0].oci + `","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},` + doc[i:]
		output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/empty.tar", ref+"empty", l.blob(image["mediaType"].(string), []byte(doc)))))
		output(t, c.ctrPilot("images", "encrypt", "--recipient", "jwe:"+public, ref+"empty", ref+"empty-encrypted"))
		output(t, c.ctrPilot("images", "push", "--plain-http", ref+"empty-encrypted"))
		output(t, c.ctrPilot("images", "decrypt", "--key", private, ref+"empty-encrypted"))
		if got, want := c.target(ref+"empty-encrypted"), c.target(ref+"empty"); got != want {
			t.Errorf("decrypted to %s, was %s", got, want)
		}
	})

	t.Run("key providers", func(t *testing.T) {
		missing := &node{t: t, socket: c.socket, ocicrypt: "/nonexistent"}
		output(t, missing.ctrPilot("version")) // which needs none
	})
	c.nothingPending()
}
