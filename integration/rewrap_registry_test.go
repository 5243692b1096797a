package integration

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// watched is a registry whose requests are watched.
type watched struct {
	t       testing.TB
	address string

	mu       sync.Mutex
	requests []string
	before   func(method, path string) // is called before a request is answered
}

func watch(t testing.TB, registry string) *watched {
	t.Helper()
	w := &watched{t: t}
	forward := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
		// So that the lists of tags have several pages.
		r.Out.URL.RawQuery = strings.Replace(r.Out.URL.RawQuery, "n=1000", "n=2", 1)
	}}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.requests = append(w.requests, r.Method+" "+r.URL.Path)
		before := w.before
		w.mu.Unlock()
		if before != nil {
			before(r.Method, r.URL.Path)
		}
		forward.ServeHTTP(out, r)
	}))
	t.Cleanup(s.Close)
	w.address = strings.TrimPrefix(s.URL, "http://")
	return w
}

// during calls f and returns the requests that were made meanwhile.
func (w *watched) during(before func(method, path string), f func()) []string {
	w.mu.Lock()
	w.requests, w.before = nil, before
	w.mu.Unlock()
	f()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.before = nil
	return w.requests
}

// do sends a request for a manifest of a repository.
func (w *watched) do(method, repository, ref, mediaType, body string) (content, gotType string) {
	w.t.Helper()
	req, err := http.NewRequest(method, "http://"+w.address+"/v2/"+repository+"/manifests/"+ref, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	req.Header["Accept"] = []string{"application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode > 299 {
		w.t.Fatalf("%s %s: %s %s %v", method, req.URL, resp.Status, b, err)
	}
	return string(b), resp.Header.Get("Content-Type")
}

// manifest is an index or a manifest.
type manifest struct {
	MediaType string
	Manifests []struct {
		Digest   string
		Platform struct{ Architecture string }
	}
	Layers []struct {
		Digest      string
		Annotations map[string]string
	}
}

// keks returns the digests of the layers of an image in the registry, and the KEKs
// and versions that they are wrapped for, by architecture.
func (w *watched) keks(repository, ref string) (digests []string, keks map[string]string) {
	w.t.Helper()
	keks = map[string]string{}
	var visit func(ref, architecture string)
	visit = func(ref, architecture string) {
		doc, _ := w.do("GET", repository, ref, "", "")
		var m manifest
		if err := json.Unmarshal([]byte(doc), &m); err != nil {
			w.t.Fatal(err)
		}
		for _, child := range m.Manifests {
			visit(child.Digest, child.Platform.Architecture)
		}
		for _, l := range m.Layers {
			digests = append(digests, l.Digest)
			b, err := base64.StdEncoding.DecodeString(l.Annotations["org.opencontainers.image.enc.keys.provider.pilot"])
			if err != nil || len(b) == 0 {
				continue
			}
			var a struct {
				KEKID      string
				KEKVersion int
			}
			if err := json.Unmarshal(b, &a); err != nil {
				w.t.Fatal(err)
			}
			keks[architecture] = a.KEKID + "@" + string(rune('0'+a.KEKVersion))
		}
	}
	visit(ref, "")
	return digests, keks
}

// TestRewrapRegistry moves images in a registry, without a containerd, and without
// asking for a layer.
func TestRewrapRegistry(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	copilot, brokerURL := broker(t, dir+"/broker", "team-a", "team-b")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newNode(t, dir+"/ci", containerd2(), ociConf, "")
	address, _ := registry(t, dir)
	w := watch(t, address)
	app := w.address + "/team/app:"
	l := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(dir+"/image.tar", app+"plain", l.index(kinds[1], newSecret()))))
	single := newLayout(t)
	output(t, c.ctrPilot("images", "import", "--no-unpack", single.tar(dir+"/single.tar", app+"single-plain", single.image(kinds[0], false, goarch, newSecret()))))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"plain", app+"1"))
	output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"single-plain", app+"single"))
	for _, tag := range []string{"1", "single", "plain"} {
		output(t, c.ctrPilot("images", "push", "--plain-http", app+tag))
	}
	for _, tag := range []string{"2", "3", "4", "5"} {
		output(t, c.ctrPilot("images", "tag", app+"1", app+tag))
		output(t, c.ctrPilot("images", "push", "--plain-http", app+tag))
	}
	rewrap := func(args ...string) *exec.Cmd {
		t.Helper()
		cmd := command(t, "ctr-pilot", append([]string{"--address", dir + "/nobody.sock", "images", "rewrap", "--registry", "--plain-http"}, args...)...)
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+ociConf, "TMPDIR="+dir)
		return cmd
	}
	unchanged := func(tag string, do func()) {
		t.Helper()
		before, _ := w.do("GET", "team/app", tag, "", "")
		do()
		if got, _ := w.do("GET", "team/app", tag, "", ""); got != before {
			t.Errorf("%s is\n%s\nwas\n%s", tag, got, before)
		}
		if left, _ := filepath.Glob(dir + "/ctr-pilot-*"); len(left) > 0 {
			t.Errorf("left behind: %s", left)
		}
	}
	had, _ := w.keks("team/app", "1")

	unchanged("1", func() {
		if out := output(t, rewrap(app+"1")); !strings.Contains(out, "is up to date") {
			t.Errorf("up to date: %s", out)
		}
		rotate(t, dir+"/broker", "team-a")
		if out := output(t, rewrap("--dry-run", app+"1")); !strings.Contains(out, "would change (3 layers: ") {
			t.Errorf("dry run: %s", out)
		}
	})
	requests := w.during(nil, func() { output(t, rewrap(app+"1")) })
	// What the tag is, the index, two manifests and an attestation; three manifests
	// that are new, twice what the tag is, and its new index.
	counts := map[string]int{}
	for _, r := range requests {
		method, path, _ := strings.Cut(r, " ")
		counts[method]++
		if !strings.Contains(path, "/manifests/") {
			t.Errorf("request %s", r)
		}
	}
	if counts["GET"] != 4 || counts["PUT"] != 4 || counts["HEAD"] != 6 {
		t.Errorf("requests: %q", requests)
	}
	has, keks := w.keks("team/app", "1")
	if !slices.Equal(had, has) || keks["s390x"] != "team-a@2" || keks[goarch] != "team-a@2" {
		t.Errorf("layers %s, were %s, wrapped with %v", has, had, keks)
	}
	output(t, c.ctrPilot("images", "remove", "--sync", app+"1"))
	output(t, c.ctrPilot("content", "fetch", "--plain-http", "--all-platforms", app+"1"))
	output(t, c.ctrPilot("images", "decrypt", app+"1", app+"decrypted"))
	if got, want := c.target(app+"decrypted"), c.target(app+"plain"); got != want {
		t.Errorf("decrypted to %s, was %s", got, want)
	}

	// The platform of a single image is in its configuration.
	requests = w.during(nil, func() { output(t, rewrap("--platform", "linux/"+goarch, app+"single")) })
	if blobs := slices.DeleteFunc(requests, func(r string) bool { return !strings.Contains(r, "/blobs/") }); len(blobs) != 1 || !strings.HasPrefix(blobs[0], "GET ") {
		t.Errorf("for a platform, blobs: %q", blobs)
	}
	requests = w.during(nil, func() { output(t, rewrap("--platform", "linux/s390x", app+"2", app+"s390x")) })
	if _, keks = w.keks("team/app", "s390x"); keks["s390x"] != "team-a@2" || keks[goarch] != "team-a@1" {
		t.Errorf("one platform: %v, requests %q", keks, requests)
	}

	t.Run("names", func(t *testing.T) {
		fails(t, rewrap(app+"2", app+"1"), "there is an image "+app+"1 already")
		fails(t, rewrap(app+"2", w.address+"/team/other:2"), "in another repository")
		fails(t, rewrap(app+"nobody"), "not found")
		byDigest := w.address + "/team/app@" + c.target(app+"2")
		fails(t, rewrap(byDigest), "give it a new name")
		output(t, rewrap(byDigest, app+"by-digest"))
		if _, keks := w.keks("team/app", "by-digest"); keks["s390x"] != "team-a@2" {
			t.Errorf("by digest: %v", keks)
		}
	})
	t.Run("moved meanwhile", func(t *testing.T) {
		other, mediaType := w.do("GET", "team/app", "plain", "", "")
		var once sync.Once
		w.during(func(method, path string) {
			if method == "PUT" && strings.Contains(path, "sha256:") {
				once.Do(func() { w.do("PUT", "team/app", "3", mediaType, other) })
			}
		}, func() { fails(t, rewrap(app+"3"), app+"3 was changed meanwhile and stays as it is") })
		if now, _ := w.do("GET", "team/app", "3", "", ""); now != other {
			t.Error("the other's work was overwritten")
		}
	})
	t.Run("tampered", func(t *testing.T) {
		doc, mediaType := w.do("GET", "team/app", "single", "", "")
		at := strings.Index(doc, `keys.provider.pilot":"`) + 60
		changed := doc[:at] + string(doc[at]^1) + doc[at+1:]
		if doc[at] == 'Z' || doc[at] == '9' || doc[at] == '/' {
			changed = doc[:at] + "A" + doc[at+1:]
		}
		w.do("PUT", "team/app", "tampered", mediaType, changed)
		unchanged("tampered", func() { fails(t, rewrap("--from", "team-a", "--to", "team-a", app+"tampered"), "layer sha256:") })
	})
	t.Run("stopped", func(t *testing.T) {
		cmd := rewrap(app+"2", app+"4", app+"5")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		unchanged("4", func() {
			w.during(func(_, path string) {
				if strings.HasSuffix(path, "/4") {
					cmd.Process.Signal(syscall.SIGINT)
					await(t, "it has ended", func() error {
						if err := cmd.Process.Signal(syscall.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
							return fmt.Errorf("it has not: %v", err)
						}
						return nil
					})
				}
			}, func() {
				if err := cmd.Run(); err == nil {
					t.Error("it exited with 0")
				}
			})
		})
		if !strings.Contains(out.String(), "3 images: 1 changed, 0 up to date, 0 not encrypted, 0 failed, 2 not tried") || !strings.Contains(out.String(), app+"2 sha256:") {
			t.Errorf("stopped:\n%s", out.String())
		}
	})
	t.Run("pattern", func(t *testing.T) {
		// "tampered" fails, and the others are done.
		out := fails(t, rewrap(app+"*"), "ctr-pilot: "+app+"tampered: ", "10 images: 3 changed, 4 up to date, 2 not encrypted, 1 failed")
		for _, tag := range []string{"1", "2", "4", "5", "s390x", "by-digest", "single"} {
			if _, keks := w.keks("team/app", tag); !strings.Contains(out, app+tag+" ") || len(keks) == 0 || slices.ContainsFunc([]string{keks[goarch] + keks[""]}, func(s string) bool { return s != "team-a@2" }) {
				t.Errorf("%s: %v", tag, keks)
			}
		}
	})
	t.Run("no broker", func(t *testing.T) {
		copilot.stop(t)
		unchanged("1", func() { fails(t, rewrap("--from", "team-a", "--to", "team-b", app+"1"), "gives no usable answer") })
	})
}

// refuse is a registry that answers as f says, unless that returns 0, and otherwise as
// the registry that it is in front of.
func refuse(t testing.TB, registry string, f func(*http.Request) (status int, body string)) (address string) {
	t.Helper()
	forward := &httputil.ReverseProxy{ErrorLog: log.New(io.Discard, "", 0), Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}}
	s := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		status, body := f(r)
		if status == 0 {
			forward.ServeHTTP(out, r)
			return
		}
		out.Header().Set("Content-Type", "application/json")
		out.WriteHeader(status)
		io.WriteString(out, body)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}
