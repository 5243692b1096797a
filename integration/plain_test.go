package integration

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
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

// TestPlain encrypts images of which something can't be encrypted, or is not to be.
func TestPlain(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`)
	c := newCI(t, dir+"/ci", conf)
	private, public := keyPair(t, dir+"/keys")
	ref := c.registry + "/app:"
	secret := newSecret()

	l := newLayout(t)
	var layers []object
	for _, mediaType := range []string{
		"application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+bzip2", "application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/vnd.oci.image.layer.nydus.blob.v1", "application/vnd.sylabs.sif.layer.v1.sif",
		"application/vnd.cncf.model.weight.v1.raw", "application/vnd.cncf.helm.chart.content.v1.tar+gzip", "application/vnd.erofs.layer.v1", "application/spdx+json",
		"Application/vnd.OCI.image.layer.v1.tar+GZIP", "application/vnd.oci.image.layer.v1.tar; charset=binary",
	} {
		layers = append(layers, l.blob(mediaType, []byte(mediaType+" "+secret)))
	}
	layers[2]["urls"] = []string{"https://example.com/layer"}
	all := l.manifest(layers, nil)
	all["platform"] = object{"architecture": goarch, "os": "linux"}
	other := l.image(kinds[0], false, "s390x", secret)
	attested := l.manifest([]object{l.blob("application/vnd.in-toto+json", []byte(`{"statement": "`+secret+`"}`))}, nil)
	attested["platform"] = object{"architecture": "unknown", "os": "unknown"}
	attested["annotations"] = object{"vnd.docker.reference.digest": all["digest"], "vnd.docker.reference.type": "attestation-manifest"}
	signature := l.json("application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/vnd.example.signature",
		"config": l.blob("application/vnd.oci.empty.v1+json", []byte("{}")), "layers": []object{l.blob("text/plain", []byte(secret))}, "subject": object{"mediaType": all["mediaType"], "digest": all["digest"], "size": all["size"]},
	})
	index := func(manifests ...object) object {
		return l.json("application/vnd.oci.image.index.v1+json", object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests})
	}
	imported := func(name string, target object) {
		t.Helper()
		output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(dir+"/image.tar", ref+name, target)))
	}
	encrypt := func(args ...string) []string {
		return append([]string{"images", "encrypt", "--recipient", "jwe:" + public}, args...)
	}
	missing := func(name string) {
		t.Helper()
		if out := output(t, c.ctrPilot("images", "list", "-q", "name=="+ref+name)); strings.Contains(out, ref) {
			t.Errorf("there is an image %s", out)
		}
	}
	readable := func(name string) bool {
		t.Helper()
		output(t, c.ctrPilot("images", "export", "--all-platforms", dir+"/out.tar", ref+name))
		return strings.Contains(read(t, dir+"/out.tar"), secret)
	}
	restored := func(name, plain string) {
		t.Helper()
		output(t, c.ctrPilot("images", "decrypt", "--key", private, ref+name, ref+name+"-decrypted"))
		if got, want := c.target(ref+name+"-decrypted"), c.target(ref+plain); got != want {
			t.Errorf("%s came back as %s, was %s", name, got, want)
		}
	}

	t.Run("everything", func(t *testing.T) {
		imported("all", index(attested, all, other, signature))
		fails(t, c.ctrPilot("images", "layerinfo", "--require-encrypted", ref+"all"), "not fully encrypted", "application/vnd.in-toto+json")
		if info := parseReport(t, output(t, c.ctrPilot("images", "layerinfo", "--json", ref+"all"))); info.FullyEncrypted || len(info.reasons()) != len(layers)+4 {
			t.Errorf("plain: %+v", info)
		}
		out := parseReport(t, output(t, c.ctrPilot(encrypt("--json", ref+"all", ref+"all-encrypted")...)))
		if got := out.reasons(); len(got) != 1 || got[layers[2]["digest"].(string)] != "urls" || len(out.LeftOut) > 0 {
			t.Errorf("plain: %+v", out)
		}
		if readable("all-encrypted") {
			t.Error("the secret is in the image")
		}
		output(t, c.ctrPilot("images", "layerinfo", "--require-encrypted", ref+"all-encrypted"))
		// A registry takes all of it, and gives it back.
		output(t, c.ctrPilot("images", "push", "--plain-http", ref+"all-encrypted"))
		if contains(t, c.storage, secret) {
			t.Error("the secret is in the registry")
		}
		restored("all-encrypted", "all")
		output(t, c.ctrPilot("images", "rewrap", "--key", private, "--recipient", "jwe:"+public, ref+"all-encrypted", ref+"all-rewrapped"))
		restored("all-rewrapped", "all")
	})

	t.Run("selection", func(t *testing.T) {
		out := said(t, c.ctrPilot(encrypt("--platform", "linux/"+goarch, ref+"all", ref+"selected")...))
		if strings.Count(out, "stays readable: ") != 4 || strings.Count(out, "not selected by --layer or --platform") != 3 {
			t.Error(out)
		}
		fails(t, c.ctrPilot("images", "layerinfo", "--require-encrypted", ref+"selected"), "not fully encrypted")
		output(t, c.ctrPilot("images", "layerinfo", "--require-encrypted", "--platform", "linux/"+goarch, ref+"selected"))
		restored("selected", "all")
		for _, command := range [][]string{encrypt(), {"images", "decrypt"}, {"images", "rewrap"}, {"images", "layerinfo"}} {
			args := append(command, "--platform", "linux/riscv64", ref+"selected")
			fails(t, c.ctrPilot(args...), "the image has no platform linux/riscv64")
		}
	})

	t.Run("attestations", func(t *testing.T) {
		fails(t, c.ctrPilot(encrypt("--attestations", "burn", ref+"all", ref+"no")...), "use encrypt, drop or keep")
		out := parseReport(t, output(t, c.ctrPilot(encrypt("--attestations", "keep", "--json", ref+"all", ref+"kept")...)))
		if got := out.reasons(); len(got) != 2 {
			t.Errorf("kept: %v", got)
		}
		restored("kept", "all")
		out = parseReport(t, output(t, c.ctrPilot(encrypt("--attestations", "drop", "--json", ref+"all", ref+"dropped")...)))
		if len(out.reasons()) != 1 || len(out.LeftOut) != 1 || out.LeftOut[0].Digest != attested["digest"] {
			t.Errorf("dropped: %+v", out)
		}
		restored("dropped", "all")
	})

	t.Run("refused", func(t *testing.T) {
		absent := object{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "sha256:" + strings.Repeat("ab", 32), "size": 5, "urls": []string{"https://example.com/windows"}}
		image := l.image(kinds[0], false, goarch, secret)
		var manifest object
		if err := json.Unmarshal(l.files["blobs/sha256/"+strings.TrimPrefix(image["digest"].(string), "sha256:")], &manifest); err != nil {
			t.Fatal(err)
		}
		manifest["layers"] = append(manifest["layers"].([]any), absent)
		blob := l.blob("application/vnd.example", []byte("example"))
		imported("refused", index(l.json("application/vnd.oci.image.manifest.v1+json", manifest), blob))
		fails(t, c.ctrPilot(encrypt(ref+"refused", ref+"no")...), "would stay readable", absent["digest"].(string), "https://example.com/windows", "a foreign layer",
			blob["digest"].(string), "neither a manifest nor an index", "2 would stay readable, so nothing was encrypted", "--allow-plain")
		missing("no")
		cmd := c.ctrPilot(encrypt("--json", ref+"refused", ref+"no")...)
		text, err := cmd.Output()
		if report := parseReport(t, string(text)); err == nil || len(report.reasons()) != 2 || report.Image != "" {
			t.Errorf("%v, %+v", err, report)
		}
		missing("no")
		c.nothingPending()
		out := output(t, c.ctrPilot(encrypt("--allow-plain", ref+"refused", ref+"allowed")...))
		if !strings.Contains(out, "(2 layers encrypted)") {
			t.Error(out)
		}
		fails(t, c.ctrPilot("images", "layerinfo", "--require-encrypted", ref+"allowed"), absent["digest"].(string), "not encrypted")
		restored("allowed", "refused")
	})

	// A machine that pulled one platform encrypts that, and pushes it elsewhere in
	// the same registry, where the plain layers of the other are.
	t.Run("absent platform", func(t *testing.T) {
		plain := c.registry + "/plain:1"
		here, elsewhere := l.image(kinds[0], false, goarch, secret+"1"), l.image(kinds[0], false, "s390x", secret+"2")
		about := l.manifest([]object{l.blob("application/vnd.in-toto+json", []byte(`{"statement": "`+secret+` 3"}`))}, nil)
		about["platform"] = object{"architecture": "unknown", "os": "unknown"}
		about["annotations"] = object{"vnd.docker.reference.digest": here["digest"]}
		output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(dir+"/image.tar", plain, index(here, elsewhere, about))))
		output(t, c.ctrPilot("images", "push", "--plain-http", plain))
		n := newNode(t, tempDir(t), containerd2(), conf, "")
		output(t, n.ctrPilot("content", "fetch", "--plain-http", "--platform", "linux/"+goarch, plain))
		secretRepo := c.registry + "/secret:1"
		out := said(t, n.ctrPilot(encrypt(plain, secretRepo)...))
		if strings.Count(out, "left out: ") != 2 || !strings.Contains(out, "of linux/s390x: its content is not here") {
			t.Error(out)
		}
		output(t, n.ctrPilot("images", "push", "--plain-http", secretRepo))
		links, err := filepath.Glob(c.storage + "/docker/registry/v2/repositories/secret/_layers/sha256/*")
		if err != nil || len(links) == 0 {
			t.Fatalf("no layers in the registry, %v", err)
		}
		for _, link := range links {
			if b, err := os.ReadFile(c.blob("sha256:" + filepath.Base(link))); err != nil || strings.Contains(string(b), secret) {
				t.Errorf("%s is plain, %v", link, err)
			}
		}
		output(t, n.ctrPilot("images", "layerinfo", "--require-encrypted", secretRepo))
		output(t, n.ctrPilot("images", "decrypt", "--key", private, secretRepo, c.registry+"/back:1"))
		if got, want := n.target(c.registry+"/back:1"), n.target(plain); got != want {
			t.Errorf("came back as %s, was %s", got, want)
		}

		out = said(t, n.ctrPilot(encrypt("--keep-absent", plain, c.registry+"/secret:2")...))
		if strings.Count(out, "stays readable: ") != 2 || !strings.Contains(out, "linux/s390x, manifest") {
			t.Error(out)
		}
		fails(t, n.ctrPilot("images", "layerinfo", "--require-encrypted", c.registry+"/secret:2"), "linux/s390x, manifest", "is not fully encrypted")
		fails(t, n.ctrPilot(encrypt("--platform", "linux/s390x", plain, c.registry+"/secret:3")...), "linux/s390x", "is not here")
	})
}

// TestImageVolume mounts encrypted artifacts into containers, as Kubernetes' image
// volumes do.
func TestImageVolume(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	l := newLayout(t)
	hello, err := os.ReadFile(filepath.Join(bin, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	// A program that prints what is mounted.
	program, programID := l.layer(kinds[0], kinds[0].oci, map[string][]byte{"hello": hello})
	link, linkID := l.packed(kinds[0].oci, tarred(t, tar.Header{Name: "secret", Typeflag: tar.TypeSymlink, Linkname: "/data/secret"}))
	config := l.json("application/vnd.oci.image.config.v1+json", object{"architecture": goarch, "os": "linux", "config": object{"Cmd": []string{"/hello"}},
		"rootfs": object{"type": "layers", "diff_ids": []string{programID, linkID}}})
	app := c.registry + "/app:1"
	c.publish(l, app, l.json("application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []object{program, link},
	}), "provider:pilot:team-a")

	ndir := tempDir(t)
	pilot(t, ndir, brokerURL)
	n := newDifferNode(t, ndir, differNode{v: containerd2(), sandbox: c.pause()})
	output(t, n.crictl("pull", app))
	for name, test := range map[string]struct {
		configType, layerType string
		fails                 string // encrypted or not, if containerd does not mount it
	}{
		"image":              {"application/vnd.oci.image.config.v1+json", kinds[1].oci, ""},
		"model in tar":       {"application/vnd.cncf.model.config.v1+json", kinds[1].oci, "not found"},
		"model of ModelPack": {"application/vnd.cncf.model.config.v1+json", "application/vnd.cncf.model.weight.v1.tar", "mismatched image rootfs and manifest layers"},
	} {
		t.Run(name, func(t *testing.T) {
			secret := newSecret()
			k := kinds[1]
			if strings.HasSuffix(test.layerType, ".tar") {
				k = kinds[0]
			}
			data, id := l.layer(k, test.layerType, map[string][]byte{"secret": []byte(secret)})
			config := l.json(test.configType, object{"architecture": goarch, "os": "linux", "rootfs": object{"type": "layers", "diff_ids": []string{id}}})
			ref := c.registry + "/volume:" + strings.ReplaceAll(name, " ", "-")
			c.publish(l, ref, l.json("application/vnd.oci.image.manifest.v1+json", object{
				"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "application/vnd.example", "config": config, "layers": []object{data},
			}), "provider:pilot:team-a")
			output(t, c.ctrPilot("images", "push", "--plain-http", ref+"-plain"))
			for _, image := range []string{ref, ref + "-plain"} {
				output(t, n.crictl("pull", image))
				if image == ref && contains(t, n.dir+"/root/io.containerd.content.v1.content", secret) {
					t.Error("the content store has it in plain")
				}
				volume := object{"container_path": "/data", "readonly": true, "image": object{"image": image}}
				if test.fails != "" {
					fails(t, n.podCommand(t, app, volume), test.fails)
					output(t, n.crictl("rmp", "-f", "-a"))
				} else if out := n.pod(t, app, volume); !strings.Contains(out, secret) {
					t.Errorf("%s: %s", image, out)
				}
				output(t, n.crictl("rmi", image))
			}
		})
	}
}
