package encrypt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestImageCommandsWithKeyFile uses ctr-pilot's commands for encrypted images with a key of
// the user's own.
func TestImageCommandsWithKeyFile(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	private, public := harness.KeyPair(t, dir+"/keys")
	other, _ := harness.KeyPair(t, dir+"/other")
	secret := harness.NewSecret()
	ref := c.Registry + "/app:"
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--all-platforms", l.Tar(dir+"/image.tar", ref+"plain", l.Index(harness.LayerKinds[1], secret))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, ref+"plain", ref+"encrypted"))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", ref+"encrypted"))
	harness.Output(t, c.CtrPilot("images", "export", "--all-platforms", dir+"/encrypted.tar", ref+"encrypted"))
	if strings.Contains(harness.Read(t, dir+"/encrypted.tar"), secret) {
		t.Error("the secret is in the archive")
	}

	t.Run("selection", func(t *testing.T) {
		harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--layer", "-1", "--platform", "linux/s390x", ref+"plain", ref+"selected"))
		out := harness.Output(t, c.CtrPilot("images", "layerinfo", ref+"selected"))
		if strings.Count(out, "jwe") != 2 { // the scheme and the recipient
			t.Errorf("layerinfo:\n%s", out)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "jwe") && (!strings.HasPrefix(line, "1 ") || !strings.Contains(line, "linux/s390x")) {
				t.Errorf("encrypted: %s", line)
			}
		}
		harness.Output(t, c.CtrPilot("images", "decrypt", "--key", private, ref+"selected"))
		if got, want := c.Target(ref+"selected"), c.Target(ref+"plain"); got != want {
			t.Errorf("decrypted to %s, was %s", got, want)
		}
		harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--layer", "7", ref+"plain", "x"), "no layer 7")
		harness.ExpectFailure(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, "--platform", "linux/riscv64", ref+"plain", "x"), "no platform linux/riscv64")
	})

	t.Run("import", func(t *testing.T) {
		n := harness.NewNode(t, harness.TempDir(t), harness.Containerd2(), conf, "")
		harness.ExpectFailure(t, n.CtrPilot("images", "import", "--key", other, dir+"/encrypted.tar"), "layer sha256:")
		out := harness.Output(t, n.CtrPilot("images", "import", "--key", private, "--all-platforms", dir+"/encrypted.tar"))
		if !strings.Contains(out, "unpacking "+ref+"encrypted") {
			t.Errorf("import: %s", out)
		}
		if out := harness.ContainerOutput(t, n.CtrPilot("run", "--rm", "--key", private, ref+"encrypted", harness.ContainerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		foreign := harness.NewLayout(t)
		index := foreign.JSON("application/vnd.oci.image.index.v1+json", harness.Object{"schemaVersion": 2, "manifests": []harness.Object{foreign.Image(harness.LayerKinds[0], false, "s390x", secret)}})
		out = harness.Output(t, n.CtrPilot("images", "import", "--all-platforms", foreign.Tar(dir+"/foreign.tar", "example.com/foreign:1", index)))
		if !strings.Contains(out, "not for this platform") {
			t.Errorf("import of another platform's: %s", out)
		}
		n.ExpectNothingPending()
	})

	t.Run("use", func(t *testing.T) {
		n := harness.NewNode(t, harness.TempDir(t), harness.Containerd2(), conf, "")
		harness.ExpectFailure(t, n.CtrPilot("images", "pull", "--plain-http", ref+"encrypted"), "no private key was given")
		harness.ExpectFailure(t, n.CtrPilot("images", "pull", "--plain-http", "--key", other, ref+"encrypted"), "layer sha256:")
		// It is fetched, but not unpacked. Each of these does.
		harness.ExpectFailure(t, n.CtrPilot("run", "--rm", ref+"encrypted", harness.ContainerID()), "not authorized")
		harness.ExpectFailure(t, n.CtrPilot("containers", "create", "--key", other, ref+"encrypted", "c"), "not authorized")
		mnt := filepath.Join(n.Dir, "mnt")
		if err := os.Mkdir(mnt, 0o700); err != nil {
			t.Fatal(err)
		}
		harness.Output(t, n.CtrPilot("images", "mount", "--key", private, ref+"encrypted", mnt))
		if got := harness.Read(t, mnt+"/secret"); got != secret {
			t.Errorf("mounted: %s", got)
		}
		harness.Output(t, n.CtrPilot("images", "unmount", "--rm", mnt))
		harness.Output(t, n.CtrPilot("containers", "create", "--key", private, ref+"encrypted", "created"))
		harness.Output(t, n.CtrPilot("containers", "delete", "created"))
		// It is unpacked now.
		harness.ExpectFailure(t, n.CtrPilot("run", "--rm", ref+"encrypted", harness.ContainerID()), "not authorized")
		if out := harness.ContainerOutput(t, n.CtrPilot("run", "--rm", "--skip-decrypt-auth", ref+"encrypted", harness.ContainerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		harness.Output(t, n.CtrPilot("images", "remove", "--sync", ref+"encrypted"))
		harness.Output(t, n.CtrPilot("images", "pull", "--plain-http", "--key", private, ref+"encrypted"))
		if out := harness.ContainerOutput(t, n.CtrPilot("run", "--rm", "--key", private, ref+"encrypted", harness.ContainerID())); !strings.Contains(out, secret) {
			t.Errorf("run: %s", out)
		}
		n.ExpectNothingPending()
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
			harness.Output(t, c.CtrPilot(args...))
		}
		if out := harness.Output(t, c.CtrPilot("images", "check")); !strings.Contains(out, "complete") || strings.Contains(out, "incomplete") {
			t.Errorf("images check:\n%s", out)
		}
	})

	t.Run("no bytes", func(t *testing.T) {
		l := harness.NewLayout(t)
		image := l.Image(harness.LayerKinds[0], false, harness.Arch, secret)
		doc := string(l.Files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")])
		l.Blob("", nil)
		i := strings.Index(doc, `"layers": [`) + len(`"layers": [`)
		doc = doc[:i] + `{"mediaType":"` + harness.LayerKinds[0].OCI + `","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},` + doc[i:]
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/empty.tar", ref+"empty", l.Blob(image["mediaType"].(string), []byte(doc)))))
		harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "jwe:"+public, ref+"empty", ref+"empty-encrypted"))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", ref+"empty-encrypted"))
		harness.Output(t, c.CtrPilot("images", "decrypt", "--key", private, ref+"empty-encrypted"))
		if got, want := c.Target(ref+"empty-encrypted"), c.Target(ref+"empty"); got != want {
			t.Errorf("decrypted to %s, was %s", got, want)
		}
	})

	t.Run("key providers", func(t *testing.T) {
		missing := &harness.Node{T: t, Socket: c.Socket, Ocicrypt: "/nonexistent"}
		harness.Output(t, missing.CtrPilot("version")) // which needs none
	})
	c.ExpectNothingPending()
}
