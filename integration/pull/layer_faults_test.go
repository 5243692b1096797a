package pull

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestDamagedLayerRecord has a record that was removed, truncated, or can't be read or
// written.
func TestDamagedLayerRecord(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	a, b := twoLayers(c, "a:1", harness.LayerKinds[1], "provider:pilot:team-a"), twoLayers(c, "b:1", harness.LayerKinds[0], "provider:pilot:team-a")
	records := filepath.Join(dir, "records")
	if err := os.Mkdir(records, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", records, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(records, syscall.MNT_DETACH) })
	record := filepath.Join(records, "layers")
	n := newRecordedNode(t, harness.Containerd2(), c.BrokerURL, "--layer-record", record)

	filler := filepath.Join(records, "filler")
	harness.FillDisk(t, filler)
	harness.ExpectFailure(t, n.Crictl("pull", a), "layer sha256:", "pilot can't record which key it needs", record, "no space left on device")
	n.pull(b + "-plain") // plain images do not depend on it
	n.expect(b+"-plain", "", "")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	n.pull(a)
	n.expect(a, "team-a/1", "")
	if mode := stat(t, record).Mode(); mode != 0o600 {
		t.Errorf("the record has the mode %s", mode)
	}

	// Removed while pilot runs: what it knows is in the next file.
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, n.Crictl("rmi", b+"-plain"))
	n.CollectGarbage(t)
	n.pull(b)
	n.restart(func(string) {})
	n.expect(a, "team-a/1", "")
	n.expect(b, "team-a/1", "")

	n.restart(func(string) {
		if err := os.Truncate(record, stat(t, record).Size()/2); err != nil {
			t.Fatal(err)
		}
	})
	n.expect(a, "team-a/1", "")
	if n.pilot.Logged(t, "record of layers damaged") != 1 {
		t.Error("the log does not say that the record was damaged")
	}
	if found, err := filepath.Glob(record + ".damaged-*"); err != nil || len(found) != 1 {
		t.Errorf("the damaged record: %q, %v", found, err)
	}

	// What containerd has no more is forgotten, a day after it was seen last.
	gone, kept := n.needs(a).Layers, n.needs(b).Layers
	harness.Output(t, n.Crictl("rmi", a))
	n.CollectGarbage(t)
	n.restart(func(string) { age(t, record) })
	harness.Await(t, "the layers of an image that was removed to be forgotten", func() error {
		text := harness.Read(t, record)
		for i := range gone {
			if !strings.Contains(text, kept[i].DiffID) {
				t.Fatalf("layer %s of an image that is there was forgotten: %s", kept[i].DiffID, text)
			}
			if strings.Contains(text, gone[i].DiffID) {
				return fmt.Errorf("layer %s is still in it", gone[i].DiffID)
			}
		}
		return nil
	})
	n.expect(b, "team-a/1", "")

	// Of another version, and another pilot's.
	args := append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + dir + "/second.sock", "--diff-listen", "unix://" + dir + "/second-diff.sock"}, "--broker", c.BrokerURL, "--layer-record")
	harness.ExpectFailure(t, harness.Command(t, "pilot", append(args, record)...), "layer-record", "another pilot uses it", "a layer-record of its own")
	newer := harness.Write(t, filepath.Join(dir, "newer"), fmt.Sprintf("{\"version\":2,\"keys\":[]}\n%064d\n", 0))
	harness.ExpectFailure(t, harness.Command(t, "pilot", append(args, newer)...), "layer-record", newer, "written by a newer version of pilot", "install that version, or move the file away")
	harness.ExpectFailure(t, harness.Command(t, "pilot", append(args, "layers")...), `layer-record = "layers" is not the absolute path of a file`)
}

// age makes a record one of a year ago.
func age(t *testing.T, record string) {
	t.Helper()
	text, _, _ := strings.Cut(harness.Read(t, record), "\n")
	text = regexp.MustCompile(`"seen":"[^"]*"`).ReplaceAllString(text, `"seen":"`+time.Now().AddDate(-1, 0, 0).Format(time.RFC3339)+`"`)
	harness.Write(t, record, text+"\n"+harness.SHA256(text)+"\n")
}

func stat(t *testing.T, name string) os.FileInfo {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// TestPlainImagesOfARuleAreRefused swaps encrypted images for others.
func TestPlainImagesOfARuleAreRefused(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.HPKE)
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	gzip := harness.LayerKinds[1]
	app, tool := twoLayers(c, "team/app:1", gzip, "provider:pilot:team-a"), twoLayers(c, "tool:1", gzip, "provider:pilot:team-b")
	both := twoLayers(c, "team/both:1", gzip, "provider:pilot:team-b")
	harness.Output(t, c.CtrPilot("images", "rewrap", "--recipient", "provider:pilot:team-a", both, both))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", both))
	wrong := twoLayers(c, "team/wrong:1", gzip, "provider:pilot:team-b")
	shared := twoLayers(c, "team/shared:1", gzip, "provider:pilot:team-a")
	public := c.Registry + "/team/public:1"
	// A broker that signs the public key of the same KEK.
	signer := filepath.Join(dir, "signer")
	key := sha256.Sum256([]byte("team-a"))
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", signer, "--dir", signer+"/store", "--host", "localhost", "--trust-domain", "example.com"))
	harness.Output(t, harness.Command(t, "copilot", "keys", "import", "--config", signer+"/copilot.toml", "--file", harness.Write(t, dir+"/key", string(key[:])), "team-a"))
	file := harness.Output(t, harness.Command(t, "copilot", "keys", "public", "--config", signer+"/copilot.toml", "team-a"))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--public-keys-ca", signer+"/ca.pem", "--recipient", "hpke:"+harness.Write(t, dir+"/team-a.pub", file), wrong+"-plain", public))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", public))
	// What is unpacked under its diff IDs is from a plain image, and its blobs are no layers.
	plain := twoLayers(c, "team/plain:1", gzip, "provider:pilot:team-a") + "-plain"
	lie := c.Edit(plain, "lie", func(m *ocispec.Manifest) {
		for i := range m.Layers {
			b := []byte(fmt.Sprint("no layer ", i))
			m.Layers[i] = ocispec.Descriptor{MediaType: gzip.OCI + "+encrypted", Digest: c.Put(plain, "_layers", b), Size: int64(len(b)), Annotations: map[string]string{
				"org.opencontainers.image.enc.keys.provider.pilot": base64.StdEncoding.EncodeToString([]byte(`{"method":"A256GCMKW","kekId":"team-a","kekVersion":1,"iv":"","wrappedKey":""}`)),
			}}
		}
	})

	// Somebody who may decrypt app has its keys, and makes another of them.
	evil := twoLayers(c, "evil:1", gzip, "provider:pilot:team-b") + "-plain"
	forged, forgedToo := forge(c, app, evil, "forged", ""), forge(c, app, evil, "forged-too", "team-b")
	// As tools write them that wrap no digest, that of the uncompressed layer, or another.
	tools := []string{twoLayers(c, "tools:0", gzip, "provider:pilot:team-b") + "-plain", twoLayers(c, "tools:1", gzip, "provider:pilot:team-b") + "-plain", twoLayers(c, "tools:2", gzip, "provider:pilot:team-b") + "-plain"}
	noDigest := encryptAs(c, app, tools[0], "no-digest", func([]byte) digest.Digest { return "" })
	ofTar := encryptAs(c, app, tools[1], "of-tar", uncompressed(t))
	ofOther := encryptAs(c, app, tools[2], "of-other", func([]byte) digest.Digest { return digest.FromString("before it was compressed anew") })

	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), containerd22(), harness.Containerd17()} {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			rules := fmt.Sprintf("[[must-be-encrypted]]\nimages = ['%s/team/**']\nkeks = ['team-a']\n", c.Registry)
			conf := harness.Write(t, filepath.Join(harness.TempDir(t), "pilot.toml"), rules)
			n := newRecordedNode(t, v, c.BrokerURL, "--config", conf)
			n.pull(app, both, ofTar, tool, tool+"-plain")
			for _, image := range []string{app, both, ofTar, tool + "-plain"} {
				if answer := n.needs(image); answer.Refused != "" {
					t.Errorf("%s: %s", image, answer.Refused)
				}
			}
			rule := []string{"layer sha256:", "must-be-encrypted", "images of " + c.Registry + "/team/** must be encrypted for team-a", "push the encrypted image again, or find out who has replaced it"}
			harness.ExpectFailure(t, n.Crictl("pull", wrong+"-plain"), append(rule, "fetched from 127.0.0.1/team/wrong", "it is plain")...)
			harness.ExpectFailure(t, n.Crictl("pull", wrong), append(rule, `it is opened by KEK "team-b"`)...)

			harness.ExpectFailure(t, n.Crictl("pull", public), append(rule, `it is opened by KEK "team-a", and wrapped with its public key`)...)
			const otherContent, withoutDigest = `KEK "team-a", but what is wrapped with it is not the digest of this layer: somebody who can decrypt another layer`, `KEK "team-a", but no digest of the layer is wrapped`
			harness.ExpectFailure(t, n.Crictl("pull", forged), append(rule, "it is opened by "+otherContent)...)
			harness.ExpectFailure(t, n.Crictl("pull", forgedToo), append(rule, "it is opened by "+otherContent)...)
			harness.ExpectFailure(t, n.Crictl("pull", ofOther), append(rule, "it is opened by "+otherContent)...)
			harness.ExpectFailure(t, n.Crictl("pull", noDigest), append(rule, "it is opened by "+withoutDigest)...)

			// Its layers are there from the encrypted image, so the differ sees none of them.
			n.pull(app + "-plain")
			if answer := n.needs(app + "-plain"); !strings.Contains(answer.Refused, "layer sha256:") || !strings.Contains(answer.Refused, "is plain") {
				t.Errorf("a plain image of layers that were unpacked: %+v", answer)
			}
			// The same layers are another image's too, which no rule is for.
			harness.Output(t, exec.Command("cp", "-a", c.Repository(shared), filepath.Join(filepath.Dir(filepath.Dir(c.Repository(shared))), "copy-"+filepath.Base(n.Dir))))
			copied := c.Registry + "/copy-" + filepath.Base(n.Dir) + ":1-plain"
			n.pull(copied, shared+"-plain")
			if answer := n.needs(copied); answer.Refused != "" {
				t.Errorf("%s: %s", copied, answer.Refused)
			}
			if answer := n.needs(shared + "-plain"); answer.Refused == "" {
				t.Errorf("%s is not refused", shared+"-plain")
			}

			// Without the rule.
			harness.Write(t, conf, "")
			if err := n.pilot.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			harness.Await(t, "the other configuration", func() error {
				if n.pilot.Logged(t, "configuration reloaded") == 0 {
					return fmt.Errorf("it is not read yet")
				}
				return nil
			})
			n.pull(wrong+"-plain", public, plain, lie, forged, forgedToo, noDigest, ofOther)

			// With the rule, and the record that was made without it.
			n.restart(func(string) { harness.Write(t, conf, rules) })
			for _, image := range []string{forged, forgedToo, noDigest, ofOther} {
				n.refused(image, otherContent)
			}

			// With the rule, and a new record, which has what manifests claim.
			n.restart(func(record string) {
				harness.Write(t, conf, rules)
				if err := os.Remove(record); err != nil {
					t.Error(err)
				}
			})
			n.fetch(public)
			n.fetch(forgedToo)
			for image, want := range map[string]string{forged: otherContent, forgedToo: otherContent, public: `is encrypted for KEK "team-a" with its public key`, lie: "was unpacked without a record of the key that opened it"} {
				n.refused(image, want)
			}
			for _, image := range []string{app, both, ofTar} {
				n.refused(image, "")
			}
		})
	}
}

// refused waits until an image is refused for a reason, or not at all: layers are read in a
// second, or the next time.
func (n *recordedNode) refused(image, want string) {
	n.t.Helper()
	harness.Await(n.t, image+" to be read", func() error {
		if got := n.needs(image).Refused; !strings.Contains(got, want) || want == "" && got != "" {
			return fmt.Errorf("%s: refused because of %q, want %q", image, got, want)
		}
		return nil
	})
}
