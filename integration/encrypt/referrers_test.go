package encrypt

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestSignaturesAreKeptOrNamed signs an image with skopeo, as cosign does, encrypts it, and
// has skopeo verify the signature of what is decrypted in another repository.
func TestSignaturesAreKeptOrNamed(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a")
	d := harness.NewDebian(t, dir, a.ociConf)
	registry, _ := harness.StartRegistry(t, dir)
	distribution, _ := harness.StartDistribution(t, dir)
	l := harness.NewLayout(t)
	plain := l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret())
	l.Write(dir+"/plain", "v1", plain)
	harness.Write(t, dir+"/passphrase", "secret")
	harness.Write(t, filepath.Join(d.Root, "etc/containers/registries.d/test.yaml"), "default-docker:\n  use-sigstore-attachments: true\n")
	harness.Output(t, d.Run("skopeo", "generate-sigstore-key", "--output-prefix", dir+"/key", "--passphrase-file", dir+"/passphrase"))
	harness.Output(t, d.Run("skopeo", "copy", "--dest-tls-verify=false", "--sign-by-sigstore-private-key", dir+"/key.private",
		"--sign-passphrase-file", dir+"/passphrase", "oci:"+dir+"/plain:v1", "docker://"+registry+"/app:signed"))
	policy := harness.Write(t, dir+"/policy.json", `{"default": [{"type": "sigstoreSigned", "keyPath": "`+dir+`/key.pub",
		"signedIdentity": {"type": "exactRepository", "dockerRepository": "`+registry+`/app"}}]}`)
	verify := func(name string) []string {
		return []string{"--policy", policy, "copy", "--src-tls-verify=false", "docker://" + name, "dir:" + dir + "/verified"}
	}
	harness.Output(t, d.Run("skopeo", verify(registry+"/app:signed")...))
	want := referrer{Subject: plain["digest"].(string), Name: strings.Replace(plain["digest"].(string), ":", "-", 1) + ".sig", Type: "sig"}

	for _, to := range []string{"docker://" + registry + "/app:enc", "docker://" + distribution + "/app:enc", "oci:" + dir + "/enc:x"} {
		r := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "docker://"+registry+"/app:signed", to)
		if len(r.Referrers) != 1 || r.Referrers[0] != want {
			t.Errorf("%s: %+v, want %+v", to, r.Referrers, want)
		}
	}
	out := harness.CombinedOutput(t, a.images("encrypt", "--force", "--recipient", "provider:pilot:team-a", "docker://"+registry+"/app:signed", "docker://"+registry+"/app:enc"))
	if line := "left out: " + want.Name + " (sig), which refers to " + want.Subject + ": sign the new image"; !strings.Contains(out, line) {
		t.Errorf("want %q in %s", line, out)
	}
	harness.ExpectFailure(t, d.Run("skopeo", verify(registry+"/app:enc")...), "signature")

	// The decrypted image is the one that was signed.
	want.Kept = true
	for _, to := range []string{registry + "/app:back", registry + "/other:back", distribution + "/other:back"} {
		r := a.crypt("decrypt", "--json", "docker://"+registry+"/app:enc", "docker://"+to)
		if len(r.Referrers) != 1 || r.Referrers[0] != want {
			t.Errorf("%s: %+v, want %+v", to, r.Referrers, want)
		}
		harness.Output(t, d.Run("skopeo", verify(to)...))
		os.RemoveAll(dir + "/verified")
	}
	if r := a.crypt("decrypt", "--json", "docker://"+registry+"/app:enc", "oci-archive:"+dir+"/back.tar:x"); len(r.Referrers) != 1 || r.Referrers[0].Kept {
		t.Errorf("in an archive: %+v", r.Referrers)
	}

	t.Run("in a directory of cosign save", func(t *testing.T) {
		const kinds = "dev.cosignproject.cosign/"
		saved := "oci:" + dir + "/saved"
		entries := func() (list []map[string]any) {
			var index struct{ Manifests []map[string]any }
			if err := json.Unmarshal([]byte(harness.Read(t, dir+"/saved/index.json")), &index); err != nil {
				t.Fatal(err)
			}
			return index.Manifests
		}
		kindsOf := func() map[string]any {
			of := map[string]any{}
			for _, e := range entries() {
				annotations, _ := e["annotations"].(map[string]any)
				of[e["digest"].(string)] = annotations["kind"]
			}
			return of
		}
		a.crypt("decrypt", "--json", "docker://"+registry+"/app:enc", saved+":v1")
		// cosign finds them, in the form that it writes.
		list := entries()
		if len(list) != 2 {
			t.Fatalf("%v", list)
		}
		kinded := map[string]any{plain["digest"].(string): kinds + "image"}
		for i, e := range list {
			kind := kinds + "image"
			if e["digest"] != plain["digest"] {
				kind = kinds + "sigs"
			}
			kinded[e["digest"].(string)] = kind
			list[i]["annotations"] = harness.Object{"kind": kind}
		}
		if got := kindsOf(); !maps.Equal(got, kinded) {
			t.Errorf("%v, want %v", got, kinded)
		}
		b, _ := json.Marshal(harness.Object{"schemaVersion": 2, "manifests": list})
		harness.Write(t, dir+"/saved/index.json", string(b))

		// Encrypted there, it is another image, which nobody has signed.
		if r := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", saved); len(r.Referrers) != 1 || r.Referrers[0].Kept || r.Referrers[0].Name != want.Name {
			t.Errorf("%+v", r.Referrers)
		}
		for digest, kind := range kindsOf() {
			if kind != nil {
				t.Errorf("%s is %s", digest, kind)
			}
		}
		// Decrypted, it is the one that was signed, in a registry and there.
		for _, to := range []string{"docker://" + registry + "/saved:back", saved} {
			if r := a.crypt("decrypt", "--json", saved, to); len(r.Referrers) != 1 || r.Referrers[0] != want {
				t.Errorf("%s: %+v, want %+v", to, r.Referrers, want)
			}
		}
		harness.Output(t, d.Run("skopeo", verify(registry+"/saved:back")...))
		if got := kindsOf(); !maps.Equal(got, kinded) {
			t.Errorf("%v, want %v", got, kinded)
		}
	})
}

// TestReferrersOfTwoRunsAreBothKept has two runs add to the list of what is about an image in
// a registry that has no referrers API. Both have read it before either writes.
func TestReferrersOfTwoRunsAreBothKept(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a")
	address, _ := harness.StartRegistry(t, dir)
	l := harness.NewLayout(t)
	plain := l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret())
	const manifest = "application/vnd.oci.image.manifest.v1+json"
	empty := l.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	var artifacts []harness.Object
	for i := range 2 {
		artifacts = append(artifacts, l.JSON(manifest, harness.Object{
			"schemaVersion": 2, "mediaType": manifest, "artifactType": fmt.Sprint("application/example.", i), "config": empty, "layers": []harness.Object{empty}, "subject": plain,
		}))
	}
	for i := range 2 {
		layout := fmt.Sprint(dir, "/", i)
		l.Write(layout, "v1", plain)
		a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+layout+":v1", "oci:"+layout+":enc")
		var index struct{ Manifests []any }
		if err := json.Unmarshal([]byte(harness.Read(t, layout+"/index.json")), &index); err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(harness.Object{"schemaVersion": 2, "manifests": append(index.Manifests, artifacts[i])})
		harness.Write(t, layout+"/index.json", string(b))
	}
	tag := strings.Replace(plain["digest"].(string), ":", "-", 1)
	var arrived, written atomic.Int32
	bothArrived, bothWritten := make(chan struct{}), make(chan struct{})
	wait := func(r *http.Request, n *atomic.Int32, both chan struct{}) {
		if n.Add(1) == 2 {
			close(both)
		}
		select {
		case <-both:
		case <-r.Context().Done():
		}
	}
	front := harness.FrontRegistry(t, address, func(h http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodPut || !strings.HasSuffix(r.URL.Path, "/manifests/"+tag) {
				h.ServeHTTP(w, r)
				return
			}
			wait(r, &arrived, bothArrived)
			answer := httptest.NewRecorder()
			h.ServeHTTP(answer, r)
			wait(r, &written, bothWritten)
			maps.Copy(w.Header(), answer.Header())
			w.WriteHeader(answer.Code)
		}
	})
	var runs sync.WaitGroup
	for i := range 2 {
		runs.Go(func() {
			out, err := a.images("decrypt", fmt.Sprintf("oci:%s/%d:enc", dir, i), fmt.Sprintf("docker://%s/app:%d", front, i)).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "kept: "+artifacts[i]["digest"].(string)) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	runs.Wait()
	list, _ := harness.RecordRegistry(t, address).Manifest("GET", "app", tag, "", "")
	for i, artifact := range artifacts {
		if !strings.Contains(list, artifact["digest"].(string)) {
			t.Errorf("that of run %d is lost: %s", i, list)
		}
	}
}

// TestReferrersFollowWhatTheyAreAbout has an artifact with a subject, as notation and oras
// make them, be about an image, and a signature about one platform of another.
func TestReferrersFollowWhatTheyAreAbout(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a", "team-b")
	address, _ := harness.StartRegistry(t, dir)
	w := harness.RecordRegistry(t, address)
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Index(harness.LayerKinds[1], harness.NewSecret()))
	enc := a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/enc:x")

	// The artifact, in the layout.
	const manifest, kind = "application/vnd.oci.image.manifest.v1+json", "application/vnd.cncf.notary.signature"
	signature := harness.NewLayout(t)
	empty := signature.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	index := harness.Read(t, dir+"/enc/blobs/sha256/"+strings.TrimPrefix(enc.Digest, "sha256:"))
	artifact := signature.JSON(manifest, harness.Object{
		"schemaVersion": 2, "mediaType": manifest, "artifactType": kind, "config": empty,
		"layers":  []harness.Object{signature.Blob("application/jose+json", []byte(`{"payload":""}`))},
		"subject": harness.Object{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": enc.Digest, "size": len(index)},
	})
	for name, b := range signature.Files {
		if name != "oci-layout" {
			harness.Write(t, filepath.Join(dir, "enc", name), string(b))
		}
	}
	var list struct{ Manifests []any }
	if err := json.Unmarshal([]byte(harness.Read(t, dir+"/enc/index.json")), &list); err != nil {
		t.Fatal(err)
	}
	b, _ := json.Marshal(harness.Object{"schemaVersion": 2, "manifests": append(list.Manifests, artifact)})
	harness.Write(t, dir+"/enc/index.json", string(b))

	want := referrer{Subject: enc.Digest, Name: artifact["digest"].(string), Type: kind, Kept: true}
	app := "docker://" + w.Address + "/app:"
	for i, step := range []struct{ from, to string }{{"oci:" + dir + "/enc:x", app + "1"}, {app + "1", app + "2"}, {app + "2", "docker://" + w.Address + "/other:1"}, {"docker://" + w.Address + "/other:1", "oci:" + dir + "/back:x"}} {
		r := a.rewrap(step.from, step.to)[0]
		if r.Result != "upToDate" || len(r.Referrers) != 1 || r.Referrers[0] != want {
			t.Errorf("step %d: %+v, want %+v", i, r, want)
		}
	}
	if doc, _ := w.Manifest("GET", "other", strings.Replace(enc.Digest, ":", "-", 1), "", ""); !strings.Contains(doc, want.Name) || !strings.Contains(doc, kind) {
		t.Errorf("the referrers tag: %s", doc)
	}
	want.Kept = false
	for _, place := range []string{app + "1", "oci:" + dir + "/back:x"} {
		r := a.rewrap("--from", "team-a", "--to", "team-b", place)[0]
		if r.Result != "changed" || len(r.Referrers) != 1 || r.Referrers[0] != want {
			t.Errorf("%s: %+v, want %+v", place, r, want)
		}
		harness.Output(t, a.images("layerinfo", "--require-encrypted", place))
	}

	// What is about the signature goes with it.
	about := signature.JSON(manifest, harness.Object{
		"schemaVersion": 2, "mediaType": manifest, "artifactType": "application/example.timestamp", "config": empty, "layers": []harness.Object{empty},
		"subject": harness.Object{"mediaType": manifest, "digest": artifact["digest"], "size": artifact["size"]},
	})
	hex := strings.TrimPrefix(about["digest"].(string), "sha256:")
	harness.Write(t, dir+"/enc/blobs/sha256/"+hex, string(signature.Files["blobs/sha256/"+hex]))
	b, _ = json.Marshal(harness.Object{"schemaVersion": 2, "manifests": append(list.Manifests, about, artifact)})
	harness.Write(t, dir+"/enc/index.json", string(b))
	for _, step := range [][2]string{{"oci:" + dir + "/enc:x", "docker://" + w.Address + "/both:1"}, {"docker://" + w.Address + "/both:1", "oci:" + dir + "/both:x"}} {
		r := a.rewrap(step[0], step[1])[0]
		if len(r.Referrers) != 2 || !r.Referrers[0].Kept || !r.Referrers[1].Kept || r.Referrers[0].Subject == r.Referrers[1].Subject {
			t.Errorf("%s: %+v", step, r)
		}
	}
	harness.Write(t, dir+"/enc/index.json", strings.Replace(string(b), about["digest"].(string), "sha256:"+strings.Repeat("0", 64), 1))

	// One that nobody can read does not keep the image from being copied.
	if err := os.Remove(dir + "/enc/blobs/sha256/" + strings.TrimPrefix(empty["digest"].(string), "sha256:")); err != nil {
		t.Fatal(err)
	}
	if r := a.rewrap("oci:"+dir+"/enc:x", "oci:"+dir+"/third:x")[0]; r.Result != "upToDate" || len(r.Referrers) != 1 || r.Referrers[0].Kept || !strings.Contains(r.Referrers[0].Error, "not found") {
		t.Errorf("%+v", r)
	}

	// One platform changes, and the signature of another stays good.
	var platforms struct {
		Manifests []struct {
			Digest   string
			Platform struct{ Architecture string }
		}
	}
	if err := json.Unmarshal([]byte(index), &platforms); err != nil {
		t.Fatal(err)
	}
	want = referrer{Type: "sig"}
	doc, mediaType := w.Manifest("GET", "app", artifact["digest"].(string), "", "")
	for _, m := range platforms.Manifests {
		if m.Platform.Architecture == "unknown" {
			continue
		}
		want.Subject, want.Name = m.Digest, strings.Replace(m.Digest, ":", "-", 1)+".sig"
		w.Manifest("PUT", "app", want.Name, mediaType, doc)
	}
	r := a.rewrap("--from", "team-a", "--to", "team-b", "--platform", "linux/s390x", app+"2")[0]
	kept := map[bool]int{}
	for _, found := range r.Referrers {
		kept[found.Kept]++
	}
	// Of the index, and of the platform that changes; of the other.
	if kept[false] != 2 || kept[true] != 1 {
		t.Errorf("%+v", r.Referrers)
	}

	t.Run("the registry can't list them", func(t *testing.T) {
		broken := harness.FrontRegistry(t, address, func(h http.Handler) http.HandlerFunc {
			return refuse("GET", "/referrers/", 500, "")(refuse("GET", "/manifests/sha256-", 500, "")(h))
		})
		out := harness.CombinedOutput(t, a.images("rewrap", "--from", "team-a", "--to", "team-b", "docker://"+broken+"/other:1"))
		if !strings.Contains(out, "warning: what refers to the image, such as signatures, could not be listed") || !strings.Contains(out, "layers: ") {
			t.Error(out)
		}
		// What is listed under tags is not all if the registry's own list fails.
		broken = harness.FrontRegistry(t, address, refuse("GET", "/referrers/", 500, ""))
		out = harness.CombinedOutput(t, a.images("rewrap", "--from", "team-b", "--to", "team-a", "docker://"+broken+"/other:1"))
		if !strings.Contains(out, "warning: what refers to the image, such as signatures, could not be listed") {
			t.Error(out)
		}
	})

	t.Run("the registry lists them on several pages", func(t *testing.T) {
		const kind = "application/example.page"
		pages := func(h http.Handler) http.HandlerFunc {
			return func(out http.ResponseWriter, r *http.Request) {
				if !strings.Contains(r.URL.Path, "/referrers/") {
					h.ServeHTTP(out, r)
					return
				}
				n := r.URL.Query().Get("page")
				if n == "" {
					n = "1"
					out.Header().Set("Link", `<`+r.URL.Path+`?page=2>; rel="next"`)
				}
				digest := "sha256:" + strings.Repeat(n, 64)
				if strings.HasSuffix(r.URL.Path, strings.Repeat("1", 64)) || strings.HasSuffix(r.URL.Path, strings.Repeat("2", 64)) {
					http.NotFound(out, r)
					return
				}
				out.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
				_ = json.NewEncoder(out).Encode(harness.Object{"schemaVersion": 2, "manifests": []harness.Object{
					{"mediaType": manifest, "artifactType": kind, "digest": digest, "size": 2},
				}})
			}
		}
		front := harness.FrontRegistry(t, address, pages)
		hosts := dir + "/hosts"
		harness.Write(t, hosts+"/"+front+"/hosts.toml", "server = \"http://"+front+"\"\n[host.\"http://"+front+"\"]\ncapabilities = [\"pull\", \"resolve\", \"push\"]\n")
		for name, flags := range map[string][]string{"by default": nil, "with hosts.toml as most have it": {"--hosts-dir", hosts}} {
			r := a.rewrap(append(flags, "--from", "team-a", "--to", "team-b", "docker://"+front+"/other:1", "docker://"+front+"/other:"+strings.Fields(name)[0])...)[0]
			found := map[string]bool{}
			for _, ref := range r.Referrers {
				found[ref.Name] = ref.Type == kind && !ref.Kept
			}
			for _, n := range []string{"1", "2"} {
				if !found["sha256:"+strings.Repeat(n, 64)] {
					t.Errorf("%s: page %s is missing: %+v", name, n, r)
				}
			}
		}
	})
}
