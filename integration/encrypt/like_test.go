package encrypt

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// build makes an image of three layers: the version, which is what changes when it is built
// again, a program, and the secret that it prints. containerd downloads no layer that it
// has unpacked on the same layers below, so what changes is at the bottom.
func build(t testing.TB, secret, version string) (*harness.Layout, harness.Object) {
	t.Helper()
	l, k := harness.NewLayout(t), harness.LayerKinds[1]
	var layers []harness.Object
	var ids []string
	for _, file := range [][2]string{{"version", version}, {"hello", harness.Read(t, filepath.Join(harness.Bin, "hello"))}, {"secret", secret}} {
		layer, id := l.Layer(k, k.OCI, map[string][]byte{file[0]: []byte(file[1])})
		layers, ids = append(layers, layer), append(ids, id)
	}
	return l, l.Manifest(layers, ids)
}

// buildLayouts writes versions of an image as OCI layouts, and returns their names.
func buildLayouts(t testing.TB, dir, secret string) (v1, v2 string) {
	t.Helper()
	for _, version := range []string{"v1", "v2"} {
		l, image := build(t, secret, version)
		l.Write(filepath.Join(dir, version), version, image)
	}
	return "oci:" + dir + "/v1:v1", "oci:" + dir + "/v2:v2"
}

// layerDigests returns those of an image's layers, in order.
func (a anywhere) layerDigests(name string) []string {
	a.t.Helper()
	var info struct{ Layers []struct{ Digest string } }
	if err := json.Unmarshal([]byte(harness.Output(a.t, a.images("layerinfo", "--json", name))), &info); err != nil {
		a.t.Fatal(err)
	}
	var list []string
	for _, l := range info.Layers {
		list = append(list, l.Digest)
	}
	slices.Sort(list)
	return list
}

// common counts what two sorted lists have in common.
func common(a, b []string) (n int) {
	for _, s := range a {
		if slices.Contains(b, s) {
			n++
		}
	}
	return n
}

// TestLikeReusesLayersOnEachTransport encrypts a rebuilt image over the one before it, and
// like the one before under another name, in each place that images can be written to.
func TestLikeReusesLayersOnEachTransport(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	_, broker := harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
	_, ociConf := harness.StartPilot(t, dir, broker)
	d := harness.NewDebian(t, dir, ociConf)
	registry, _ := harness.StartRegistry(t, dir)
	a := anywhere{t, dir, ociConf}
	secret := harness.NewSecret()
	v1, v2 := buildLayouts(t, dir, secret)
	plain := a.crypt("decrypt", "--json", v2, "oci:"+dir+"/same:x").Digest

	places := []string{"oci:" + dir + "/enc:x", "oci-archive:" + dir + "/enc.tar:x", "docker://" + registry + "/enc:x"}
	for i, to := range places {
		first := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", v1, to)
		if first.Reused.Layers != 0 {
			t.Errorf("%s: %+v", to, first)
		}
		was := a.layerDigests(to)
		second := a.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-b", v2, to)
		if second.Layers != 3 || second.Reused.Layers != 2 || second.Reused.Bytes == 0 || common(was, a.layerDigests(to)) != 2 {
			t.Errorf("%s: %+v", to, second)
		}
		if m := second.Moved; (m.Present >= second.Reused.Bytes) != (i != 1) || (m.Copied >= second.Reused.Bytes) != (i == 1) {
			t.Errorf("%s: %+v", to, second)
		}
		info := harness.Output(t, a.images("layerinfo", "--require-encrypted", to))
		if strings.Count(info, "team-b@1") != 3 || strings.Contains(info, "team-a") {
			t.Errorf("%s: %s", to, info)
		}
		back := fmt.Sprintf("%s/back%d", dir, i)
		if got := a.crypt("decrypt", "--json", to, "oci:"+back+":x").Digest; got != plain {
			t.Errorf("%s came back as %s", to, got)
		}
		harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-b", to, "oci:"+back+"-skopeo:x"))
		if !strings.Contains(blobs(t, back+"-skopeo"), secret) {
			t.Errorf("the secret is not in what skopeo decrypted from %s", to)
		}
		// The same again, from that place to each other.
		for j, next := range []string{"oci:%s/next%d%d:x", "oci-archive:%s/next%d%d.tar:x", "docker://" + registry + "/next%[2]d%[3]d:x"} {
			next = fmt.Sprintf(next, dir, i, j)
			r := a.crypt("encrypt", "--json", "--like", to, "--recipient", "provider:pilot:team-a", v1, next)
			if r.Reused.Layers != 2 || common(was, a.layerDigests(next)) != 2 {
				t.Errorf("%s like %s: %+v", next, to, r)
			}
			if mounted := i == 2 && j == 2; (r.Moved.Mounted >= r.Reused.Bytes) != mounted || (r.Moved.Copied >= r.Reused.Bytes) == mounted {
				t.Errorf("%s like %s: %+v", next, to, r)
			}
		}
		out := harness.CombinedOutput(t, a.images("encrypt", "--force", "--recipient", "provider:pilot:team-b", v2, to))
		if !strings.Contains(out, "3 layers encrypted, 3 of them taken over with ") {
			t.Errorf("%s: %s", to, out)
		}
		if r := a.crypt("encrypt", "--json", "--force", "--like", "none", "--recipient", "provider:pilot:team-b", v2, to); r.Reused.Layers != 0 || common(was, a.layerDigests(to)) != 0 {
			t.Errorf("%s like none: %+v", to, r)
		}
	}

	t.Run("an index with an attestation", func(t *testing.T) {
		l := harness.NewLayout(t)
		l.Write(dir+"/index", "v1", l.Index(harness.LayerKinds[2], secret))
		from, to := "oci:"+dir+"/index:v1", "docker://"+registry+"/index:x"
		digest := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", from, to).Digest
		r := a.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", from, to)
		if r.Layers != 3 || r.Reused.Layers != 3 || r.Digest == digest || r.Moved.Copied != 0 {
			t.Errorf("%+v", r)
		}
		r = a.crypt("encrypt", "--json", "--platform", "linux/s390x", "--like", to, "--recipient", "provider:pilot:team-a", from, to+"-s390x")
		if r.Layers != 2 || r.Reused.Layers != 2 {
			t.Errorf("one platform: %+v", r)
		}
	})
	t.Run("what can't be used", func(t *testing.T) {
		plain := "docker://" + registry + "/plain:x"
		harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", v1, plain))
		for i, test := range []struct{ like, want string }{
			{"docker://" + registry + "/enc:absent", "no layer is taken over from docker://" + registry + "/enc:absent: "},
			{"oci:" + dir + "/enc:absent", "no layer is taken over"},
			{plain, "it has no encrypted layers"},
		} {
			out := harness.CombinedOutput(t, a.images("encrypt", "--like", test.like, "--recipient", "provider:pilot:team-a", v1, fmt.Sprintf("oci:%s/unlike:%d", dir, i)))
			if !strings.Contains(out, test.want) || !strings.Contains(out, "3 layers encrypted;") {
				t.Errorf("%s: %s", test.like, out)
			}
		}
		for _, like := range []string{"docker://127.0.0.1:1/enc:x", "oci:" + dir + "/nothing:x", "docker-archive:" + dir + "/enc.tar", "oci:"} {
			harness.ExpectFailure(t, a.images("encrypt", "--like", like, "--recipient", "provider:pilot:team-a", v1, "oci:"+dir+"/unlike:x"), "--like")
		}
	})
	t.Run("one that skopeo encrypted", func(t *testing.T) {
		skopeo := "docker://" + registry + "/skopeo:x"
		harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "--encryption-key", "provider:pilot:team-a", v1, skopeo))
		r := a.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", v2, skopeo)
		if r.Reused.Layers != 2 || r.Moved.Present < r.Reused.Bytes {
			t.Errorf("%+v", r)
		}
		if got := a.crypt("decrypt", "--json", skopeo, "oci:"+dir+"/skopeo:x").Digest; got != plain {
			t.Errorf("it came back as %s", got)
		}
	})
	t.Run("only the manifest is there", func(t *testing.T) {
		to := "oci:" + dir + "/partly:x"
		a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", v1, to)
		was := a.layerDigests(to)
		for _, digest := range was[:2] {
			if err := os.Remove(dir + "/partly/blobs/sha256/" + strings.TrimPrefix(digest, "sha256:")); err != nil {
				t.Fatal(err)
			}
		}
		cmd := a.images("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", v1, to)
		out := harness.CombinedOutput(t, cmd)
		if !strings.Contains(out, "encrypted anew: layer sha256:") || !strings.Contains(out, "(and 1 more)") || common(was, a.layerDigests(to)) != 1 {
			t.Error(out)
		}
		a.crypt("decrypt", "--json", to, "oci:"+dir+"/partly-back:x")

		// Not even that.
		manifest := a.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", v1, to).Digest
		if err := os.Remove(dir + "/partly/blobs/sha256/" + strings.TrimPrefix(manifest, "sha256:")); err != nil {
			t.Fatal(err)
		}
		out = harness.CombinedOutput(t, a.images("encrypt", "--force", "--recipient", "provider:pilot:team-a", v1, to))
		if !strings.Contains(out, "no layer is taken over from "+to) || !strings.Contains(out, "3 layers encrypted;") {
			t.Error(out)
		}
	})
}

// TestLikeMovesOnlyWhatChanged encrypts a rebuilt image in containerd, and from a layout
// straight into a registry, and has a node that has the one before pull and run it.
func TestLikeMovesOnlyWhatChanged(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	harness.StartPilot(t, dir+"/node", c.BrokerURL)
	n := harness.NewDifferNode(t, dir+"/node", harness.DifferConfig{Containerd: harness.Containerd2()})
	w := harness.RecordRegistry(t, c.Registry)
	encrypt := []string{"images", "encrypt", "--json", "--force", "--plain-http", "--recipient", "provider:pilot:team-a"}

	for _, where := range []string{"containerd", "registry"} {
		name, secret := w.Address+"/"+where+":enc", harness.NewSecret()
		for i, v := range []string{"v1", "v2"} {
			var out string
			l, image := build(t, secret, where+v)
			pushed := w.Record(nil, func() {
				if where == "registry" {
					l.Write(dir+"/"+v, v, image)
					out = harness.Output(t, c.CtrPilot(append(encrypt, "oci:"+dir+"/"+v+":"+v, "docker://"+name)...))
					return
				}
				plain := name + "-" + v
				harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", plain, image)))
				out = harness.Output(t, c.CtrPilot(append(slices.Delete(slices.Clone(encrypt), 4, 5), plain, name)...))
				// What was taken over stays when the image before is collected.
				harness.Output(t, c.CtrPilot("images", "rm", "--sync", plain))
				harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
			})
			var r cryptResult
			if err := json.Unmarshal([]byte(out), &r); err != nil || r.Layers != 3 || r.Reused.Layers != int64(2*i) {
				t.Errorf("%s, %s: %s", where, v, out)
			}
			// What is in a registry is fetched into containerd.
			if where == "containerd" && i == 1 {
				l, image := build(t, secret, "v3")
				harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "v3", image)))
				harness.Output(t, c.CtrPilot("images", "rm", "--sync", name))
				out := harness.Output(t, c.CtrPilot(append(slices.Clone(encrypt), "--like", "docker://"+name, "v3", "v3-enc")...))
				if !strings.Contains(out, `"layers": 2`) {
					t.Errorf("like one in a registry: %s", out)
				}
				harness.Output(t, c.CtrPilot("images", "rm", "--sync", "v3"))
				harness.Output(t, c.CtrPilot("images", "decrypt", "v3-enc", "oci:"+dir+"/v3:x"))
				// And the other way round.
				out = harness.Output(t, c.CtrPilot(append(slices.Clone(encrypt), "--like", "v3-enc", "oci:"+dir+"/v3:x", "docker://"+w.Address+"/v3:x")...))
				if strings.Count(out, `"layers": 3`) != 2 {
					t.Errorf("like one in containerd: %s", out)
				}
			}
			pulled := w.Record(nil, func() { harness.Output(t, n.Ctr("images", "pull", "--plain-http", name)) })
			// All layers and the configuration, and then one layer and the configuration.
			if put, got := matching(pushed, "PUT /v2/"+where+"/blobs/"), matching(pulled, "GET /v2/"+where+"/blobs/"); put != 4-2*i || got != 4-2*i {
				t.Errorf("%s, %s: %d blobs were pushed and %d pulled: %q %q", where, v, put, got, pushed, pulled)
			}
			if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", name, harness.ContainerID(), "/hello")); !strings.Contains(out, secret) {
				t.Errorf("%s, %s: %s", where, v, out)
			}
		}
	}
}

func matching(requests []string, prefix string) (n int) {
	for _, r := range requests {
		if strings.HasPrefix(r, prefix) {
			n++
		}
	}
	return n
}

// TestLikeNeedsTheRightToUnwrap has machines with different rights at the broker encrypt a
// rebuilt image.
func TestLikeNeedsTheRightToUnwrap(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	b := harness.NewTLSBroker(t, "team-a")
	v1, v2 := buildLayouts(t, dir, harness.NewSecret())
	machine := func(name string, args ...string) anywhere {
		cert, key := b.Enroll(t, name, args...)
		toml := harness.Write(t, dir+"/"+name+".toml", fmt.Sprintf("broker = %q\nbroker-ca = \"%s/ca.pem\"\nbroker-cert = %q\nbroker-key = %q\n", b.URL(), b.Dir, cert, key))
		conf := harness.Write(t, dir+"/"+name+".conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": %q, "args": ["keyprovider", "--config", %q]}}}}`, filepath.Join(harness.Bin, "pilot"), toml))
		return anywhere{t, dir, conf}
	}
	// A machine that may only wrap encrypts all layers anew, and asks once.
	ci, laptop, to := machine("builder", "--role", "ci"), machine("laptop"), "oci:"+dir+"/enc:x"
	ci.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", v1, to)
	was := laptop.layerDigests(to)
	audited := func(name, action, verdict string) (n int) {
		for line := range strings.Lines(harness.Read(t, b.Dir+"/store/audit.log")) {
			if strings.Contains(line, "/ci/"+name+`"`) && strings.Contains(line, `"action":"`+action+`"`) && strings.Contains(line, `"verdict":"`+verdict+`"`) {
				n++
			}
		}
		return n
	}
	denied := func() int { return audited("builder", "unwrap", "denied") }
	before := denied()
	out := harness.CombinedOutput(t, ci.images("encrypt", "--force", "--recipient", "provider:pilot:team-a", v2, to))
	if !strings.Contains(out, "encrypted anew: layer sha256:") || !strings.Contains(out, "not allowed") || !strings.Contains(out, "(3 layers encrypted;") || common(was, ci.layerDigests(to)) != 0 {
		t.Error(out)
	}
	if n := denied() - before; n != 1 {
		t.Errorf("%d denials in the audit log", n)
	}
	was, before = laptop.layerDigests(to), denied()
	if out := harness.CombinedOutput(t, ci.images("encrypt", "--force", "--like", "none", "--recipient", "provider:pilot:team-a", v2, to+"2")); strings.Contains(out, "anew") || denied() != before {
		t.Errorf("%d denials: %s", denied()-before, out)
	}
	// One that may unwrap takes over what the other encrypted.
	if r := laptop.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", v1, to); r.Reused.Layers != 2 || common(was, laptop.layerDigests(to)) != 2 {
		t.Errorf("%+v", r)
	}
	// The right to unwrap is enough: it gets no KEK.
	policy := harness.Read(t, b.Dir+"/policy.toml") + "\n[[rule]]\nidentities = [\"spiffe://example.com/ci/rebuilder\"]\nkeks = [\"team-a\"]\nactions = [\"unwrap\"]\n"
	harness.Write(t, b.Dir+"/policy.toml", policy)
	b.Process.Stop(t)
	b.Start(t)
	rebuilder := machine("rebuilder", "--role", "ci")
	was = laptop.layerDigests(to)
	if r := rebuilder.crypt("encrypt", "--json", "--force", "--recipient", "provider:pilot:team-a", v2, to); r.Reused.Layers != 2 || common(was, laptop.layerDigests(to)) != 2 {
		t.Errorf("%+v", r)
	}
	if unwrapped, exported := audited("rebuilder", "unwrap", "allowed"), audited("rebuilder", "export", "allowed"); unwrapped != 3 || exported != 0 { // what changed has the same size
		t.Errorf("it unwrapped %d keys and got %d KEKs", unwrapped, exported)
	}
	// Without a broker nothing is taken over, and nothing needs to be: the recipient is a
	// public key.
	_, public := harness.KeyPair(t, dir+"/keys")
	b.Process.Stop(t)
	out = harness.CombinedOutput(t, laptop.images("encrypt", "--force", "--recipient", "jwe:"+public, v1, to))
	if !strings.Contains(out, "encrypted anew: layer sha256:") || !strings.Contains(out, "(3 layers encrypted;") {
		t.Error(out)
	}
}

// TestLikeOfATamperedImage has somebody who can write to the registry change the image that
// is encrypted again. What comes out is the new image all the same.
func TestLikeOfATamperedImage(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	v1, v2 := buildLayouts(t, dir, harness.NewSecret())
	a := anywhere{t, dir, c.Ocicrypt}
	plain := a.crypt("decrypt", "--json", v2, "oci:"+dir+"/same:x").Digest
	name := c.Registry + "/app:enc"
	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", v1, "docker://"+name)
	const seal, pubopts, keys = "org.opencontainers.image.enc.pilot.seal", "org.opencontainers.image.enc.pubopts", "org.opencontainers.image.enc.keys.provider.pilot"
	swap := func(annotations ...string) func(m *ocispec.Manifest) {
		return func(m *ocispec.Manifest) {
			for _, key := range annotations {
				x, y := m.Layers[1].Annotations, m.Layers[2].Annotations
				x[key], y[key] = y[key], x[key]
			}
		}
	}
	for suffix, test := range map[string]struct {
		change func(m *ocispec.Manifest)
		reused int64
	}{
		"same":    {func(*ocispec.Manifest) {}, 2},
		"seals":   {swap(seal), 2}, // found by reading
		"hmacs":   {swap(pubopts), 0},
		"keys":    {swap(keys), 0},
		"all":     {swap(seal, pubopts, keys), 0},
		"forged":  {func(m *ocispec.Manifest) { m.Layers[1].Digest = c.Put(name, "_layers", make([]byte, m.Layers[1].Size)) }, 1},
		"no keys": {func(m *ocispec.Manifest) { delete(m.Layers[1].Annotations, keys) }, 1},
		"sizes":   {func(m *ocispec.Manifest) { m.Layers[1].Size++ }, 1},
	} {
		tampered := c.Edit(name, strings.ReplaceAll(suffix, " ", "-"), test.change)
		to := "oci:" + dir + "/out:" + suffix
		if r := a.crypt("encrypt", "--json", "--like", "docker://"+tampered, "--recipient", "provider:pilot:team-a", v2, to); r.Layers != 3 || r.Reused.Layers != test.reused {
			t.Errorf("%s: %+v", suffix, r)
		}
		if got := a.crypt("decrypt", "--json", to, "oci:"+dir+"/back:"+suffix).Digest; got != plain {
			t.Errorf("%s: %s came back, and not %s", suffix, got, plain)
		}
	}
	// Neither is a blob that is not what its digest says, wherever it was copied to.
	layers := a.layerDigests("docker://" + name)
	blob := c.Blob(layers[0])
	if err := os.WriteFile(blob, make([]byte, len(harness.Read(t, blob))), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, to := range []string{"oci:" + dir + "/blob:x", "oci-archive:" + dir + "/blob.tar:x", "docker://" + c.Registry + "/blob:x", "containerd:blob"} {
		encrypt := c.CtrPilot("images", "encrypt", "--like", "docker://"+name, "--recipient", "provider:pilot:team-a", v1, to)
		out := harness.CombinedOutput(t, encrypt)
		mounted := i == 2 // within a registry, which answers for it
		if strings.Contains(out, "encrypted anew: layer "+layers[0]) == mounted {
			t.Errorf("%s: %s", to, out)
		}
		if decrypt := c.CtrPilot("images", "decrypt", to, fmt.Sprintf("oci:%s/back-blob%d:x", dir, i)); mounted {
			harness.ExpectFailure(t, decrypt, layers[0])
		} else {
			harness.Output(t, decrypt)
		}
	}
	// The archive holds what was given up, which nobody minds.
	if files := harness.Output(t, harness.Command(t, "tar", "-tf", dir+"/blob.tar")); !strings.Contains(files, "discarded/") {
		t.Errorf("files %q", files)
	}
	d := harness.NewDebian(t, dir, c.Ocicrypt)
	harness.Output(t, d.Run("skopeo", "copy", "--decryption-key", "provider:pilot:team-a", "oci-archive:"+dir+"/blob.tar:x", "oci:"+dir+"/back-skopeo:x"))
	harness.Output(t, c.Ctr("images", "import", "--no-unpack", dir+"/blob.tar"))
}
