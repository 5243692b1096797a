package mirror

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// stored returns the registry's file of a blob.
func (n *node) stored(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join(n.storage, "docker/registry/v2/blobs/sha256", hex[:2], hex, "data")
}

// encryptedLayers returns the digests of the layers of an encrypted image.
func (n *node) encryptedLayers(repository, tag string) []string {
	n.t.Helper()
	return layers(n.t, harness.Read(n.t, n.stored(n.tagged(repository, tag))))
}

// TestTamperedLayerNeverComesWhole changes a layer in the registry's storage, below the
// digest that the mirror asks for.
func TestTamperedLayerNeverComesWhole(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	small, large := []byte(strings.Repeat("small", 100)), random(4<<20)
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object {
		return l.ImageOf(harness.LayerKinds[0], [][]byte{small, large})
	})
	n.encrypt(layout, "app:enc")
	digests := layers(t, harness.Read(t, file(layout, plain)))
	if r := n.get(manifestPath("app", "enc")); digestOf(r.body) != plain {
		t.Fatalf("%d %s", r.status, r.body)
	}
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte {
			if at < 0 {
				at += len(b)
			}
			b[at] ^= 1
			return b
		}
	}
	for i, encrypted := range n.encryptedLayers("app", "enc") {
		name := n.stored(encrypted)
		was := harness.Read(t, name)
		for what, change := range map[string]func([]byte) []byte{
			"first bit":    flip(0),
			"middle bit":   flip(len(was) / 2),
			"last bit":     flip(-1),
			"one byte off": func(b []byte) []byte { return b[:len(b)-1] },
			"one byte on":  func(b []byte) []byte { return append(b, 0) },
			"empty":        func([]byte) []byte { return nil },
		} {
			harness.Write(t, name, string(change([]byte(was))))
			r := n.get(blobPath("app", digests[i]))
			if r.status == http.StatusOK && (r.err == nil || len(r.body) >= len(was)) {
				t.Errorf("layer %d, %s: the whole of it is served: %d bytes", i, what, len(r.body))
			}
			// A small layer is verified before anything is answered.
			if i == 0 {
				r.expect(t, what, http.StatusBadGateway, "errors")
			}
			harness.Write(t, name, was)
		}
		if r := n.get(blobPath("app", digests[i])); digestOf(r.body) != digests[i] {
			t.Errorf("layer %d does not come back: %d %.300s", i, r.status, r.body)
		}
	}
	// Over HTTP/2 too, an answer does not end as a whole one does.
	certs := newCertificates(t)
	n.pilot.Stop(t)
	n.startWith(n.registry, certs.args()...)
	pair, err := tls.LoadX509KeyPair(certs.client.Cert, certs.client.Key)
	if err != nil {
		t.Fatal(err)
	}
	h2 := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: certs.ca.Pool(), Certificates: []tls.Certificate{pair}}}
	url := "https://" + n.mirror + blobPath("app", digests[1])
	if r := ask(t, h2, http.MethodGet, url, nil); digestOf(r.body) != digests[1] || r.proto != "HTTP/2.0" {
		t.Errorf("%s: %d %v", r.proto, r.status, r.err)
	}
	name := n.stored(n.encryptedLayers("app", "enc")[1])
	was := []byte(harness.Read(t, name))
	harness.Write(t, name, string(flip(-1)(slices.Clone(was))))
	if r := ask(t, h2, http.MethodGet, url, nil); r.err == nil || len(r.body) >= len(was) {
		t.Errorf("%s: %d, %d bytes, %v", r.proto, r.status, len(r.body), r.err)
	}

	log := harness.Read(t, n.pilot.Log)
	if !strings.Contains(log, "layer not decrypted") || !strings.Contains(log, "HMAC does not match") || !strings.Contains(log, "kek=team-a") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	if metrics := n.metrics(); !strings.Contains(metrics, `pilot_mirror_blobs_total{encrypted="true",result="DataLoss"} `) ||
		strings.Contains(metrics, `pilot_mirror_blobs_total{encrypted="true",result="DataLoss"} 0`) {
		t.Error("the metrics have no DataLoss")
	}
}

// push pushes a manifest.
func (n *node) push(repository, tag string, manifest map[string]any) {
	n.t.Helper()
	b, err := json.Marshal(manifest)
	if err != nil {
		n.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(n.t.Context(), http.MethodPut, "http://"+n.registry+manifestPath(repository, tag), bytes.NewReader(b))
	if err != nil {
		n.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		n.t.Fatal(resp.Status)
	}
}

// TestForgedImageIsRefused has somebody who can write to the registry exchange layers and
// keys of an image. The manifest that the mirror makes of it is another one, and what is
// not authentic is not served whole.
func TestForgedImageIsRefused(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	layout, plain := n.image("plain", func(l *harness.Layout) harness.Object {
		return l.ImageOf(harness.LayerKinds[0], [][]byte{random(1 << 20), []byte(strings.Repeat("b", 1<<20))})
	})
	n.encrypt(layout, "app:enc")
	n.get(manifestPath("app", "enc")).expect(t, "manifest", http.StatusOK)
	digest := n.tagged("app", "enc")
	doc := harness.Read(t, n.stored(digest))
	push := func(tag string, change func(layers []any)) {
		t.Helper()
		var m map[string]any
		if err := json.Unmarshal([]byte(doc), &m); err != nil {
			t.Fatal(err)
		}
		change(m["layers"].([]any))
		n.push("app", tag, m)
	}
	layer := func(list []any, i int) map[string]any { return list[i].(map[string]any) }
	const pubopts = "org.opencontainers.image.enc.pubopts"

	push("keys", func(list []any) { // each layer with the other's key
		a, b := layer(list, 0), layer(list, 1)
		a["annotations"], b["annotations"] = b["annotations"], a["annotations"]
	})
	r := n.get(manifestPath("app", "keys"))
	if r.status == http.StatusOK && digestOf(r.body) == plain {
		t.Error("with exchanged keys it is still the image")
	}
	if r.status == http.StatusOK {
		for _, d := range layers(t, r.body) {
			if b := n.get(blobPath("app", d)); b.status == http.StatusOK && b.err == nil {
				t.Errorf("with another's key, %d bytes are served", len(b.body))
			}
		}
	}
	// The image itself is as it was, although its plain layers have the same digests.
	r = n.get(manifestPath("app", "enc"))
	if digestOf(r.body) != plain {
		t.Errorf("the image is %d %s now", r.status, r.body)
	}
	for _, d := range layers(t, r.body) {
		if b := n.get(blobPath("app", d)); digestOf(b.body) != d {
			t.Errorf("layer %s: %d %.200s", d, b.status, b.body)
		}
	}

	push("hmac", func(list []any) {
		annotations := layer(list, 0)["annotations"].(map[string]any)
		b, err := base64.StdEncoding.DecodeString(annotations[pubopts].(string))
		if err != nil {
			t.Fatal(err)
		}
		var options map[string]any
		if err := json.Unmarshal(b, &options); err != nil {
			t.Fatal(err)
		}
		options["hmac"] = base64.StdEncoding.EncodeToString(make([]byte, 32))
		b, _ = json.Marshal(options)
		annotations[pubopts] = base64.StdEncoding.EncodeToString(b)
	})
	r = n.get(manifestPath("app", "hmac"))
	for _, d := range layers(t, r.body) {
		b := n.get(blobPath("app", d))
		if b.status == http.StatusOK && b.err == nil && digestOf(b.body) != d {
			t.Errorf("with another HMAC, %d bytes are served", len(b.body))
		}
	}
	push("nonsense", func(list []any) {
		for name := range layer(list, 0)["annotations"].(map[string]any) {
			if strings.Contains(name, "enc.keys") {
				layer(list, 0)["annotations"].(map[string]any)[name] = "%%%,AAAA"
			}
		}
	})
	n.get(manifestPath("app", "nonsense")).expect(t, "nonsense", http.StatusForbidden, "DENIED", "base64")
	push("urls", func(list []any) { // where nobody answers
		layer(list, 0)["urls"] = []string{"http://127.0.0.1:1/steal"}
	})
	r = n.get(manifestPath("app", "urls"))
	r.expect(t, "urls", http.StatusOK)
	for _, d := range layers(t, r.body) {
		n.get(blobPath("app", d)).expect(t, "a layer with a URL", http.StatusOK)
	}
}

// TestRevokedKEKStopsTheMirror takes the KEK away while an image is remembered.
func TestRevokedKEKStopsTheMirror(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start("--kek-cache-ttl", "1s", "--kek-cache-grace", "0s")
	layout, plain := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	layer := layers(t, harness.Read(t, file(layout, plain)))[1]
	paths := []string{manifestPath("app", "enc"), manifestPath("app", plain), blobPath("app", layer)}
	for _, path := range paths {
		n.get(path).expect(t, path, http.StatusOK)
	}
	harness.Output(t, harness.Command(t, "copilot", "keys", "disable", "--dir", n.dir+"/broker", "team-a"))
	for _, path := range paths {
		var r reply
		harness.Await(t, path+" is refused", func() error {
			if r = n.request(http.MethodGet, path, http.Header{"Pilot-Secret": {n.secret}, "Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}); r.status != http.StatusForbidden {
				return fmt.Errorf("%d", r.status)
			}
			return nil
		})
		// It is found in the logs by the caller's trace.
		r.expect(t, path, http.StatusForbidden, "DENIED", "layer sha256:", "team-a", "(trace 0af7651916cd43dd8448eb211c80319c)")
		n.head(path).expect(t, "HEAD "+path, http.StatusForbidden)
	}
	log := harness.Read(t, n.pilot.Log)
	found := slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
		return strings.Contains(line, `msg="layer not decrypted"`) && strings.Contains(line, "digest=\"sha256:") && strings.Contains(line, "kek=team-a") &&
			strings.Contains(line, "image=\""+n.registry+"/app") && strings.Contains(line, "trace=0af7651916cd43dd8448eb211c80319c")
	})
	if !found {
		t.Errorf("the log does not say so:\n%s", log)
	}
	if metrics := n.metrics(); strings.Contains(metrics, `pilot_mirror_blobs_total{encrypted="true",result="FailedPrecondition"} 0`) {
		t.Error("the metrics have no refusal")
	}
	harness.Output(t, harness.Command(t, "copilot", "keys", "enable", "--dir", n.dir+"/broker", "team-a"))
	harness.Await(t, "it is served again", func() error {
		if r := n.get(paths[2]); r.status != http.StatusOK {
			return fmt.Errorf("%d", r.status)
		}
		return nil
	})
}

// TestBrokerThatIsDownIsNoRefusal has clients try again rather than give up.
func TestBrokerThatIsDownIsNoRefusal(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start("--kek-cache-ttl", "1s", "--kek-cache-grace", "0s", "--broker-timeout", "5s")
	layout, _ := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	n.get(manifestPath("app", "enc")).expect(t, "manifest", http.StatusOK)
	resume := n.copilot.Pause(t)
	harness.Await(t, "the KEK is forgotten", func() error {
		if r := n.get(manifestPath("app", "enc")); r.status != http.StatusServiceUnavailable || r.header.Get("Retry-After") == "" {
			return fmt.Errorf("%d %s", r.status, r.body)
		}
		return nil
	})
	resume()
	harness.Await(t, "the broker is back", func() error {
		if r := n.get(manifestPath("app", "enc")); r.status != http.StatusOK {
			return fmt.Errorf("%d %s", r.status, r.body)
		}
		return nil
	})
}
