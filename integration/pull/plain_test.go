package pull

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// plainReport is the JSON of encrypt or of layerinfo.
type plainReport struct {
	Image          string
	Layers         any
	FullyEncrypted bool
	Plain          []struct{ Platform, Manifest, Digest, MediaType, Reason string }
	LeftOut        []struct{ Platform, Digest string }
}

// reasons returns why blobs are plain, by their digests, configurations aside.
func (e plainReport) reasons() map[string]string {
	all := map[string]string{}
	for _, p := range e.Plain {
		if p.Reason != "config" {
			all[p.Digest] = p.Reason
		}
	}
	return all
}

func parseReport(t testing.TB, text string) (e plainReport) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return e
}

// TestWhatStaysPlainIsNamed encrypts images of which something can't be encrypted, or is not to be.
func TestWhatStaysPlainIsNamed(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := harness.NewCI(t, dir+"/ci", conf)
	private, public := harness.KeyPair(t, dir+"/keys")
	ref := c.Registry + "/app:"
	secret := harness.NewSecret()

	l := harness.NewLayout(t)
	var layers []harness.Object
	for _, mediaType := range []string{
		"application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+bzip2", "application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/vnd.oci.image.layer.nydus.blob.v1", "application/vnd.sylabs.sif.layer.v1.sif",
		"application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.helm.chart.content.v1.tar+gzip", "application/vnd.erofs.layer.v1", "application/spdx+json",
		"Application/vnd.OCI.image.layer.v1.tar+GZIP", "application/vnd.oci.image.layer.v1.tar; charset=binary",
	} {
		layers = append(layers, l.Blob(mediaType, []byte(mediaType+" "+secret)))
	}
	layers[2]["urls"] = []string{"https://example.com/layer"}
	all := l.Manifest(layers, nil)
	all["platform"] = harness.Object{"architecture": harness.Arch, "os": "linux"}
	other := l.Image(harness.LayerKinds[0], false, "s390x", secret)
	attested := l.Manifest([]harness.Object{l.Blob("application/vnd.in-toto+json", []byte(`{"statement": "`+secret+`"}`))}, nil)
	attested["platform"] = harness.Object{"architecture": "unknown", "os": "unknown"}
	attested["annotations"] = harness.Object{"vnd.docker.reference.digest": all["digest"], "vnd.docker.reference.type": "attestation-manifest"}
	signature := l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/vnd.example.signature",
		"config": l.Blob("application/vnd.oci.empty.v1+json", []byte("{}")), "layers": []harness.Object{l.Blob("text/plain", []byte(secret))}, "subject": harness.Object{"mediaType": all["mediaType"], "digest": all["digest"], "size": all["size"]},
	})
	index := func(manifests ...harness.Object) harness.Object {
		return l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests})
	}
	imported := func(name string, target harness.Object) {
		t.Helper()
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", ref+name, target)))
	}
	encrypt := func(args ...string) []string {
		return append([]string{"images", "encrypt", "--recipient", "jwe:" + public}, args...)
	}
	missing := func(name string) {
		t.Helper()
		if out := harness.Output(t, c.CtrPilot("images", "list", "-q", "name=="+ref+name)); strings.Contains(out, ref) {
			t.Errorf("there is an image %s", out)
		}
	}
	readable := func(name string) bool {
		t.Helper()
		harness.Output(t, c.CtrPilot("images", "export", "--all-platforms", dir+"/out.tar", ref+name))
		return strings.Contains(harness.Read(t, dir+"/out.tar"), secret)
	}
	restored := func(name, plain string) {
		t.Helper()
		harness.Output(t, c.CtrPilot("images", "decrypt", "--key", private, ref+name, ref+name+"-decrypted"))
		if got, want := c.Target(ref+name+"-decrypted"), c.Target(ref+plain); got != want {
			t.Errorf("%s came back as %s, was %s", name, got, want)
		}
	}

	t.Run("everything", func(t *testing.T) {
		imported("all", index(attested, all, other, signature))
		harness.ExpectFailure(t, c.CtrPilot("images", "layerinfo", "--require-encrypted", ref+"all"), "not fully encrypted", "application/vnd.in-toto+json")
		if info := parseReport(t, harness.Output(t, c.CtrPilot("images", "layerinfo", "--json", ref+"all"))); info.FullyEncrypted || len(info.reasons()) != len(layers)+4 {
			t.Errorf("plain: %+v", info)
		}
		out := parseReport(t, harness.Output(t, c.CtrPilot(encrypt("--json", ref+"all", ref+"all-encrypted")...)))
		if got := out.reasons(); len(got) != 1 || got[layers[2]["digest"].(string)] != "urls" || len(out.LeftOut) > 0 {
			t.Errorf("plain: %+v", out)
		}
		if readable("all-encrypted") {
			t.Error("the secret is in the image")
		}
		harness.Output(t, c.CtrPilot("images", "layerinfo", "--require-encrypted", ref+"all-encrypted"))
		// A registry takes all of it, and gives it back.
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", ref+"all-encrypted"))
		if harness.ContainsText(t, c.Storage, secret) {
			t.Error("the secret is in the registry")
		}
		restored("all-encrypted", "all")
		harness.Output(t, c.CtrPilot("images", "rewrap", "--key", private, "--recipient", "jwe:"+public, ref+"all-encrypted", ref+"all-rewrapped"))
		restored("all-rewrapped", "all")
	})

	t.Run("selection", func(t *testing.T) {
		out := harness.CombinedOutput(t, c.CtrPilot(encrypt("--platform", "linux/"+harness.Arch, ref+"all", ref+"selected")...))
		if strings.Count(out, "stays readable: ") != 4 || strings.Count(out, "not selected by --layer or --platform") != 3 {
			t.Error(out)
		}
		harness.ExpectFailure(t, c.CtrPilot("images", "layerinfo", "--require-encrypted", ref+"selected"), "not fully encrypted")
		harness.Output(t, c.CtrPilot("images", "layerinfo", "--require-encrypted", "--platform", "linux/"+harness.Arch, ref+"selected"))
		restored("selected", "all")
		for _, command := range [][]string{encrypt(), {"images", "decrypt"}, {"images", "rewrap"}, {"images", "layerinfo"}} {
			args := append(command, "--platform", "linux/riscv64", ref+"selected")
			harness.ExpectFailure(t, c.CtrPilot(args...), "the image has no platform linux/riscv64")
		}
	})

	t.Run("attestations", func(t *testing.T) {
		harness.ExpectFailure(t, c.CtrPilot(encrypt("--attestations", "burn", ref+"all", ref+"no")...), "use encrypt, drop or keep")
		out := parseReport(t, harness.Output(t, c.CtrPilot(encrypt("--attestations", "keep", "--json", ref+"all", ref+"kept")...)))
		if got := out.reasons(); len(got) != 2 {
			t.Errorf("kept: %v", got)
		}
		restored("kept", "all")
		out = parseReport(t, harness.Output(t, c.CtrPilot(encrypt("--attestations", "drop", "--json", ref+"all", ref+"dropped")...)))
		if len(out.reasons()) != 1 || len(out.LeftOut) != 1 || out.LeftOut[0].Digest != attested["digest"] {
			t.Errorf("dropped: %+v", out)
		}
		restored("dropped", "all")
	})

	t.Run("refused", func(t *testing.T) {
		absent := harness.Object{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "sha256:" + strings.Repeat("ab", 32), "size": 5, "urls": []string{"https://example.com/windows"}}
		image := l.Image(harness.LayerKinds[0], false, harness.Arch, secret)
		var manifest harness.Object
		if err := json.Unmarshal(l.Files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")], &manifest); err != nil {
			t.Fatal(err)
		}
		manifest["layers"] = append(manifest["layers"].([]any), absent)
		blob := l.Blob("application/vnd.example", []byte("example"))
		imported("refused", index(l.JSON("application/vnd.oci.image.manifest.v1+json", manifest), blob))
		harness.ExpectFailure(t, c.CtrPilot(encrypt(ref+"refused", ref+"no")...), "would stay readable", absent["digest"].(string), "https://example.com/windows", "a foreign layer",
			blob["digest"].(string), "neither a manifest nor an index", "2 would stay readable, so nothing was encrypted", "--allow-plain")
		missing("no")
		cmd := c.CtrPilot(encrypt("--json", ref+"refused", ref+"no")...)
		text, err := cmd.Output()
		if report := parseReport(t, string(text)); err == nil || len(report.reasons()) != 2 || report.Image != "" {
			t.Errorf("%v, %+v", err, report)
		}
		missing("no")
		c.ExpectNothingPending()
		out := harness.Output(t, c.CtrPilot(encrypt("--allow-plain", ref+"refused", ref+"allowed")...))
		if !strings.Contains(out, "(2 layers encrypted)") {
			t.Error(out)
		}
		harness.ExpectFailure(t, c.CtrPilot("images", "layerinfo", "--require-encrypted", ref+"allowed"), absent["digest"].(string), "not encrypted")
		restored("allowed", "refused")
	})

	// A machine that pulled one platform encrypts that, and pushes it elsewhere in
	// the same registry, where the plain layers of the other are.
	t.Run("absent platform", func(t *testing.T) {
		plain := c.Registry + "/plain:1"
		here, elsewhere := l.Image(harness.LayerKinds[0], false, harness.Arch, secret+"1"), l.Image(harness.LayerKinds[0], false, "s390x", secret+"2")
		about := l.Manifest([]harness.Object{l.Blob("application/vnd.in-toto+json", []byte(`{"statement": "`+secret+` 3"}`))}, nil)
		about["platform"] = harness.Object{"architecture": "unknown", "os": "unknown"}
		about["annotations"] = harness.Object{"vnd.docker.reference.digest": here["digest"]}
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", plain, index(here, elsewhere, about))))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", plain))
		n := harness.NewNode(t, harness.TempDir(t), harness.Containerd2(), conf, "")
		harness.Output(t, n.CtrPilot("content", "fetch", "--plain-http", "--platform", "linux/"+harness.Arch, plain))
		secretRepo := c.Registry + "/secret:1"
		out := harness.CombinedOutput(t, n.CtrPilot(encrypt(plain, secretRepo)...))
		if strings.Count(out, "left out: ") != 2 || !strings.Contains(out, "of linux/s390x: its content is not here") {
			t.Error(out)
		}
		harness.Output(t, n.CtrPilot("images", "push", "--plain-http", secretRepo))
		links, err := filepath.Glob(c.Storage + "/docker/registry/v2/repositories/secret/_layers/sha256/*")
		if err != nil || len(links) == 0 {
			t.Fatalf("no layers in the registry, %v", err)
		}
		for _, link := range links {
			if b, err := os.ReadFile(c.Blob("sha256:" + filepath.Base(link))); err != nil || strings.Contains(string(b), secret) {
				t.Errorf("%s is plain, %v", link, err)
			}
		}
		harness.Output(t, n.CtrPilot("images", "layerinfo", "--require-encrypted", secretRepo))
		harness.Output(t, n.CtrPilot("images", "decrypt", "--key", private, secretRepo, c.Registry+"/back:1"))
		if got, want := n.Target(c.Registry+"/back:1"), n.Target(plain); got != want {
			t.Errorf("came back as %s, was %s", got, want)
		}

		out = harness.CombinedOutput(t, n.CtrPilot(encrypt("--keep-absent", plain, c.Registry+"/secret:2")...))
		if strings.Count(out, "stays readable: ") != 2 || !strings.Contains(out, "linux/s390x, manifest") {
			t.Error(out)
		}
		harness.ExpectFailure(t, n.CtrPilot("images", "layerinfo", "--require-encrypted", c.Registry+"/secret:2"), "linux/s390x, manifest", "is not fully encrypted")
		harness.ExpectFailure(t, n.CtrPilot(encrypt("--platform", "linux/s390x", plain, c.Registry+"/secret:3")...), "linux/s390x", "is not here")
	})
}

// TestImageVolume mounts encrypted artifacts into containers, as Kubernetes' image
// volumes do.
func TestImageVolume(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	l := harness.NewLayout(t)
	hello, err := os.ReadFile(filepath.Join(harness.Bin, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	// A program that prints what is mounted.
	program, programID := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{"hello": hello})
	link, linkID := addLayer(l, harness.LayerKinds[0].OCI, tarred(t, tar.Header{Name: "secret", Typeflag: tar.TypeSymlink, Linkname: "/data/secret"}))
	config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{"architecture": harness.Arch, "os": "linux", "config": harness.Object{"Cmd": []string{"/hello"}},
		"rootfs": harness.Object{"type": "layers", "diff_ids": []string{programID, linkID}}})
	app := c.Registry + "/app:1"
	c.Publish(l, app, l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []harness.Object{program, link},
	}), "provider:pilot:team-a")

	ndir := harness.TempDir(t)
	harness.StartPilot(t, ndir, c.BrokerURL)
	n := harness.NewDifferNode(t, ndir, harness.DifferConfig{Containerd: harness.Containerd2(), Sandbox: c.Pause()})
	harness.Output(t, n.Crictl("pull", app))
	for name, test := range map[string]struct {
		configType, layerType string
		fails                 string // encrypted or not, if containerd does not mount it
	}{
		"image":              {"application/vnd.oci.image.config.v1+json", harness.LayerKinds[1].OCI, ""},
		"model in tar":       {"application/vnd.cncf.model.config.v1+json", harness.LayerKinds[1].OCI, "not found"},
		"model of ModelPack": {"application/vnd.cncf.model.config.v1+json", "application/vnd.cncf.model.weight.v1.tar", "mismatched image rootfs and manifest layers"},
	} {
		t.Run(name, func(t *testing.T) {
			secret := harness.NewSecret()
			k := harness.LayerKinds[1]
			if strings.HasSuffix(test.layerType, ".tar") {
				k = harness.LayerKinds[0]
			}
			data, id := l.Layer(k, test.layerType, map[string][]byte{"secret": []byte(secret)})
			config := l.JSON(test.configType, harness.Object{"architecture": harness.Arch, "os": "linux", "rootfs": harness.Object{"type": "layers", "diff_ids": []string{id}}})
			ref := c.Registry + "/volume:" + strings.ReplaceAll(name, " ", "-")
			c.Publish(l, ref, l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{
				"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/vnd.example", "config": config, "layers": []harness.Object{data},
			}), "provider:pilot:team-a")
			harness.Output(t, c.CtrPilot("images", "push", "--plain-http", ref+"-plain"))
			for _, image := range []string{ref, ref + "-plain"} {
				harness.Output(t, n.Crictl("pull", image))
				if image == ref && harness.ContainsText(t, n.Dir+"/root/io.containerd.content.v1.content", secret) {
					t.Error("the content store has it in plain")
				}
				volume := harness.Object{"container_path": "/data", "readonly": true, "image": harness.Object{"image": image}}
				if test.fails != "" {
					harness.ExpectFailure(t, n.PodCommand(t, app, volume), test.fails)
					harness.Output(t, n.Crictl("rmp", "-f", "-a"))
				} else if out := n.RunPod(t, app, volume); !strings.Contains(out, secret) {
					t.Errorf("%s: %s", image, out)
				}
				harness.Output(t, n.Crictl("rmi", image))
			}
		})
	}
}
