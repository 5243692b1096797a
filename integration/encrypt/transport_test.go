package encrypt

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// anywhere runs ctr-pilot where there is no containerd but its own.
type anywhere struct {
	t       testing.TB
	dir     string
	ociConf string
}

func (a anywhere) images(args ...string) *exec.Cmd {
	a.t.Helper()
	cmd := harness.Command(a.t, "ctr-pilot", append([]string{"--address", a.dir + "/nobody.sock", "images"}, args...)...)
	cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+a.ociConf, "TMPDIR="+a.dir+"/tmp", "HOME="+a.dir)
	return cmd
}

// cryptResult is the JSON of encrypt and decrypt.
type cryptResult struct {
	Image  string
	Digest string
	Layers int
	Reused struct{ Layers, Bytes int64 }
	Moved  struct{ Written, Copied, Mounted, Present int64 }
	// Referrers are those of the image before.
	Referrers []referrer
}

type referrer struct {
	Subject, Name, Type, Error string
	Kept                       bool
}

// newAnywhere starts a broker with KEKs, and a pilot that uses it.
func newAnywhere(t testing.TB, dir string, keks ...string) anywhere {
	t.Helper()
	_, broker := harness.StartBroker(t, dir+"/broker", keks...)
	_, ociConf := harness.StartPilot(t, dir, broker)
	if err := os.MkdirAll(dir+"/tmp", 0o777); err != nil {
		t.Fatal(err)
	}
	return anywhere{t, dir, ociConf}
}

// everywhere is anywhere with skopeo, and an image in each transport that can be written to.
type everywhere struct {
	anywhere
	debian                 *harness.Debian
	registry, distribution string   // addresses
	targets                []string // names of the images
}

func newEverywhere(t testing.TB, dir string, keks ...string) everywhere {
	t.Helper()
	e := everywhere{anywhere: newAnywhere(t, dir, keks...)}
	e.debian = harness.NewDebian(t, dir, e.ociConf)
	e.registry, _ = harness.StartRegistry(t, dir)
	e.distribution, _ = harness.StartDistribution(t, dir)
	e.targets = []string{"oci:" + dir + "/enc:x", "oci-archive:" + dir + "/enc.tar:x", "docker://" + e.registry + "/enc:x", "docker://" + e.distribution + "/enc:x"}
	return e
}

func (a anywhere) crypt(args ...string) cryptResult {
	a.t.Helper()
	var r cryptResult
	if err := json.Unmarshal([]byte(harness.Output(a.t, a.images(args...))), &r); err != nil {
		a.t.Fatal(err)
	}
	return r
}

// TestTransportsWithoutContainerd encrypts an image from each transport into each that
// can be written, decrypts it, and has skopeo read what was written.
func TestTransportsWithoutContainerd(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newEverywhere(t, dir, "team-a")
	d, registry, distribution := a.debian, a.registry, a.distribution
	l := harness.NewLayout(t)
	secret := harness.NewSecret()
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))
	harness.Output(t, d.Run("skopeo", "copy", "oci:"+dir+"/plain:v1", "oci-archive:"+dir+"/plain.tar:v1"))
	harness.Output(t, d.Run("skopeo", "copy", "oci:"+dir+"/plain:v1", "docker-archive:"+dir+"/docker.tar:app:v1"))
	for _, address := range []string{registry, distribution} {
		harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "oci:"+dir+"/plain:v1", "docker://"+address+"/plain:v1"))
	}

	for i, from := range []string{"oci:" + dir + "/plain:v1", "oci-archive:" + dir + "/plain.tar:v1", "docker-archive:" + dir + "/docker.tar", "docker://" + registry + "/plain:v1", "docker://" + distribution + "/plain:v1"} {
		plain := ""
		for j, to := range a.targets {
			result := a.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", from, to)
			if result.Layers != 2 || result.Image != to || result.Moved.Written == 0 {
				t.Errorf("%s to %s: %+v", from, to, result)
			}
			info := harness.Output(t, a.images("layerinfo", "--require-encrypted", to))
			if strings.Count(info, "team-a@1") != 2 {
				t.Errorf("%s: %s", to, info)
			}
			back := filepath.Join(dir, "back", string(rune('a'+4*i+j)))
			decrypted := a.crypt("decrypt", "--json", to, "oci:"+back+":x")
			if plain == "" {
				plain = decrypted.Digest
			}
			if decrypted.Digest != plain {
				t.Errorf("%s from %s came back as %s, and not as %s", to, from, decrypted.Digest, plain)
			}
			if !strings.Contains(blobs(t, back), secret) {
				t.Errorf("the secret is not in what was decrypted from %s", to)
			}
			// skopeo decrypts the same.
			args := []string{"copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", to, "oci:" + back + "-skopeo:x"}
			harness.Output(t, d.Run("skopeo", args...))
			if !strings.Contains(blobs(t, back+"-skopeo"), secret) {
				t.Errorf("the secret is not in what skopeo decrypted from %s", to)
			}
		}
	}
	if strings.Contains(blobs(t, dir+"/enc"), secret) || strings.Contains(harness.Read(t, dir+"/enc.tar"), secret) {
		t.Error("the secret is in what was encrypted")
	}
	if left, _ := filepath.Glob(dir + "/tmp/*"); len(left) > 0 {
		t.Errorf("temporary files: %s", left)
	}

	t.Run("taken", func(t *testing.T) {
		for _, to := range []string{"oci:" + dir + "/enc:x", "oci-archive:" + dir + "/enc.tar:y", "docker://" + registry + "/enc:x"} {
			harness.ExpectFailure(t, a.images("encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", to), "already exists", "--force")
		}
	})
	t.Run("an archive in the place of a directory", func(t *testing.T) {
		requests := harness.ExpectFailure(t, a.images("encrypt", "--force", "--recipient", "provider:pilot:nobody", "oci:"+dir+"/plain:v1", "oci-archive:"+dir+"/tmp:x"), "tmp is no file")
		if strings.Contains(requests, "nobody") {
			t.Errorf("it began to work: %s", requests)
		}
	})
	t.Run("within a registry", func(t *testing.T) {
		// The configuration is mounted, and the layers are new.
		r := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "docker://"+registry+"/plain:v1", "docker://"+registry+"/mounted:x")
		if r.Moved.Mounted == 0 || r.Moved.Copied != 0 {
			t.Errorf("%+v", r)
		}
		r = a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "docker://"+registry+"/plain:v1", "docker://"+registry+"/plain:enc")
		if r.Moved.Present == 0 || r.Moved.Copied+r.Moved.Mounted != 0 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("in place", func(t *testing.T) {
		// The plain image is still there afterwards. Nothing readable is left by one that
		// only gets a recipient.
		harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "oci:"+dir+"/plain:v1", "docker://"+registry+"/place:v1"))
		harness.Output(t, d.Run("skopeo", "copy", "oci:"+dir+"/plain:v1", "oci:"+dir+"/place:v1"))
		for _, name := range []string{"docker://" + registry + "/place:v1", "oci:" + dir + "/place:v1"} {
			for _, warned := range []bool{true, false} {
				out, err := a.images("encrypt", "--recipient", "provider:pilot:team-a", name).CombinedOutput()
				if err != nil || strings.Contains(string(out), "stays readable: the previous image") != warned {
					t.Errorf("%s: %v, %s", name, err, out)
				}
			}
			// A KEK that the layers are wrapped for already is not added once more.
			if _, keks := a.layers(name); keks != "team-a@1" {
				t.Errorf("%s: wrapped for %s", name, keks)
			}
		}
	})
	t.Run("without a key provider", func(t *testing.T) {
		// Settings in flags, in a file and in variables. What no flag says, an ocicrypt.conf
		// that names pilot does.
		broker := "unix://" + dir + "/broker/copilot.sock"
		toml := harness.Write(t, dir+"/pilot.toml", "broker = \""+broker+"\"\nmirror-listen = \"127.0.0.1:0\"\nlog-level = \"debug\"\n")
		alone := a
		alone.ociConf = ""
		for i, flags := range [][]string{{"--broker", broker}, {"--config", toml}, {"--broker", broker, "--provider-name", "ours"}} {
			provider := "pilot"
			if i == 2 {
				provider = "ours"
			}
			enc := fmt.Sprintf("oci:%s/alone:%d", dir, i)
			alone.crypt(append([]string{"encrypt", "--json", "--recipient", "provider:" + provider + ":team-a", "oci:" + dir + "/plain:v1", enc}, flags...)...)
			alone.rewrap(append([]string{enc}, flags...)...)
			alone.crypt(append([]string{"decrypt", "--json", enc, fmt.Sprintf("oci:%s/alone:plain%d", dir, i)}, flags...)...)
		}
		broken := a
		broken.ociConf = harness.Write(t, dir+"/broken.conf", `{"key-providers": {"pilot": {"cmd": {"path": "/bin/false"}}}}`)
		decrypt := []string{"decrypt", "--json", "--force", "oci:" + dir + "/alone:0", "oci:" + dir + "/alone:plain"}
		harness.ExpectFailure(t, broken.images(decrypt...), "/bin/false")
		broken.crypt(append(decrypt, "--broker", broker)...)
		byVariable := alone.images(decrypt...)
		byVariable.Env = append(byVariable.Env, "PILOT_BROKER="+broker)
		harness.Output(t, byVariable)

		encrypt := func(flags ...string) *exec.Cmd {
			return alone.images(append([]string{"encrypt", "--recipient", "provider:pilot:nobody", "oci:" + dir + "/plain:v1", "oci:" + dir + "/none:x"}, flags...)...)
		}
		for _, bad := range []struct {
			status int
			want   string
			cmd    *exec.Cmd
		}{
			{3, "no such KEK", encrypt("--broker", broker)},
			{1, "if --broker https://HOST:PORT, PILOT_BROKER or broker in /etc/pilot/pilot.toml names it", encrypt()},
			{1, "start copilot on this machine", encrypt("--broker", "unix:///nonexistent/copilot.sock")},
			{2, "no such file", encrypt("--config", dir+"/absent.toml")},
			{2, "KEKs would cross the network unencrypted", encrypt("--broker", "http://copilot.example.com")},
			{2, "brokr: unknown setting: did you mean broker?", encrypt("--config", harness.Write(t, dir+"/mistyped.toml", "brokr = \"x\"\n"))},
			{2, "which is skopeo's: use --recipient", encrypt("--encryption-key", "provider:pilot:team-a")},
		} {
			harness.ExpectFailure(t, bad.cmd, bad.want)
			if got := bad.cmd.ProcessState.ExitCode(); got != bad.status {
				t.Errorf("%s: exit status %d, want %d", bad.want, got, bad.status)
			}
		}
	})
	t.Run("bad names", func(t *testing.T) {
		for name, want := range map[string]string{
			"oci:" + dir + "/nothing:v1":             "no such file",
			"oci:" + dir + "/plain:v2":               `it has no image "v2", only v1`,
			"oci-archive:" + dir + "/docker.tar":     "use docker-archive:",
			"docker-archive:" + dir + "/plain.tar":   "use oci-archive:",
			"docker://" + registry + "/plain:absent": "not found",
			"docker://app:1":                         "docker://registry.example.com/app:1",
			"oci-archve:" + dir + "/plain.tar":       "did you mean oci-archive?",
			"docker-daemon:app:1":                    "docker save --output FILE",
		} {
			harness.ExpectFailure(t, a.images("encrypt", "--recipient", "provider:pilot:team-a", name, "oci:"+dir+"/none:x"), want)
		}
		harness.ExpectFailure(t, a.images("encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker-archive:"+dir+"/none.tar"), "oci-archive:")
		if _, err := os.Stat(dir + "/none"); !os.IsNotExist(err) {
			t.Errorf("a layout was made for nothing: %v", err)
		}
	})
}

// TestTransportsWithContainerd moves an image from a layout into containerd and back.
func TestTransportsWithContainerd(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	l := harness.NewLayout(t)
	secret := harness.NewSecret()
	plain := l.Image(harness.LayerKinds[1], false, harness.Arch, secret)
	l.Write(dir+"/plain", "v1", plain)
	name := c.Registry + "/app:enc"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "containerd:"+name))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	harness.Output(t, c.CtrPilot("images", "decrypt", "containerd:"+name, "oci-archive:"+dir+"/back.tar:v1"))
	index := harness.Output(t, harness.Command(t, "tar", "-xOf", dir+"/back.tar", "index.json"))
	if !strings.Contains(index, plain["digest"].(string)) {
		t.Errorf("another image came back: %s", index)
	}
	// What is in containerd outlives its garbage collection.
	harness.Output(t, c.CtrPilot("images", "rm", "--sync", c.Registry+"/nothing"))
	harness.Output(t, c.CtrPilot("images", "decrypt", name, c.Registry+"/app:again"))
}
