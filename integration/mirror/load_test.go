package mirror

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// stuck opens a connection to the mirror, asks for a path and reads no more than the
// answer's head.
func (n *node) stuck(path string) net.Conn {
	n.t.Helper()
	conn := n.connect()
	// So that the answer does not fit into the kernel's buffers.
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		n.t.Fatal(err)
	}
	n.send(conn, path)
	return conn
}

// connect opens a connection to the mirror.
func (n *node) connect() net.Conn {
	n.t.Helper()
	conn, err := net.Dial("tcp", n.mirror)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// send asks the mirror for a path over a connection.
func (n *node) send(conn net.Conn, path string) {
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nPilot-Secret: %s\r\n\r\n", path, n.mirror, n.secret)
}

// TestHundredSlowCallersHoldUpNobody has callers that take nothing of a layer: others are
// served beside them, the mirror's memory stays bounded, and what they hold is given back
// when they go.
func TestHundredSlowCallersHoldUpNobody(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	n, f, plain, layer := bigNode(t)
	n.get(manifestPath("big", plain)).expect(t, "manifest", http.StatusOK)
	before := n.pilot.Peak(t)
	var conns []net.Conn
	for range 150 {
		conns = append(conns, n.stuck(blobPath("big", layer)))
	}
	harness.Await(t, "the mirror sends as many as it may", func() error {
		if now := f.underWay(); now < 16 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	// Manifests need no turn, and a layer gets one once those before it have lost theirs.
	n.get(manifestPath("big", "enc")).expect(t, "manifest beside them", http.StatusOK)
	if r := n.get(blobPath("big", layer)); r.status != http.StatusOK || digestOf(r.body) != layer {
		t.Errorf("layer beside them: %d %v %.300s", r.status, r.err, r.body)
	}
	if now := f.underWay(); now > 32 {
		t.Errorf("the registry sends %d layers at once", now)
	}
	if grown := n.pilot.Peak(t) - before; grown > 160<<20 {
		t.Errorf("the mirror takes %d MiB more for them", grown>>20)
	}
	for _, c := range conns {
		c.Close()
	}
	harness.Await(t, "the registry has nothing more to send", func() error {
		if now := f.underWay(); now > 0 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	harness.NewPilotClient(t, n.dir).CheckLeaks(t, "go_goroutines", 60)
}

// TestCallerThatHangsUpEndsTheRequestToTheRegistry reads the beginning of a layer.
func TestCallerThatHangsUpEndsTheRequestToTheRegistry(t *testing.T) {
	t.Parallel()
	n, f, plain, layer := bigNode(t)
	n.get(manifestPath("big", plain)).expect(t, "manifest", http.StatusOK)
	for range 10 {
		conn := n.stuck(blobPath("big", layer))
		if _, err := io.CopyN(io.Discard, bufio.NewReader(conn), 20<<10); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	harness.Await(t, "the registry has nothing more to send", func() error {
		if now := f.underWay(); now > 0 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
}

// TestManyCallersAtOnce has callers pull the same layer at the same time.
func TestManyCallersAtOnce(t *testing.T) {
	t.Parallel()
	n, _, plain, layer := bigNode(t)
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() {
			for path, want := range map[string]string{manifestPath("big", "enc"): plain, blobPath("big", layer): layer} {
				if r := n.get(path); digestOf(r.body) != want {
					t.Errorf("%s: %d %v, %d bytes", path, r.status, r.err, len(r.body))
				}
			}
		})
	}
	wg.Wait()
}

// TestBodiesThatNeverComeHoldNoConnection announces bodies, which the mirror has no use for,
// and sends none: as a caller and as somebody else.
func TestBodiesThatNeverComeHoldNoConnection(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	var wg sync.WaitGroup
	for _, c := range []struct {
		method, secret string
		status         int
	}{
		{http.MethodPost, "", http.StatusUnauthorized},
		{http.MethodGet, "", http.StatusUnauthorized},
		{http.MethodPost, n.secret, http.StatusMethodNotAllowed},
		{http.MethodGet, n.secret, http.StatusBadRequest},
	} {
		for _, body := range []string{"Content-Length: 100", "Transfer-Encoding: chunked"} {
			wg.Go(func() {
				conn, err := net.Dial("tcp", n.mirror)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(harness.Timeout))
				fmt.Fprintf(conn, "%s /v2/ HTTP/1.1\r\nHost: %s\r\nPilot-Secret: %s\r\n%s\r\n\r\n", c.method, n.mirror, c.secret, body)
				r := bufio.NewReader(conn)
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Errorf("%s with %s: %v", c.method, body, err)
					return
				}
				if resp.StatusCode != c.status {
					t.Errorf("%s with %s: %s, want %d", c.method, body, resp.Status, c.status)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					t.Errorf("%s with %s: %v", c.method, body, err)
				}
				if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
					t.Errorf("%s with %s: the connection stays open: %v", c.method, body, err)
				}
			})
		}
	}
	wg.Wait()
}

// TestSlowRegistryHoldsUpNoOther has callers ask a registry that sends its manifests and
// layers byte by byte, and its list of tags not at all.
func TestSlowRegistryHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	layout, plain := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	var reading, listing atomic.Int32
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch tag := path.Base(r.URL.Path); {
		case strings.Contains(r.URL.Path, "/slow/blobs/"):
		case strings.Contains(r.URL.Path, "/blobs/"):
			w.WriteHeader(http.StatusNotFound)
			return
		case tag == "list":
			listing.Add(1)
			<-r.Context().Done()
			return
		case !strings.Contains(tag, ":"):
			w.Header().Set("Docker-Content-Digest", digestOf(tag))
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Content-Length", "10000")
		w.WriteHeader(http.StatusOK)
		if r.Method == http.MethodHead {
			return
		}
		reading.Add(1)
		for r.Context().Err() == nil {
			fmt.Fprint(w, " ")
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-time.After(time.Second):
			}
		}
	}))
	t.Cleanup(func() {
		n.pilot.Kill()
		slow.Close()
	})
	ns := "?ns=" + strings.TrimPrefix(slow.URL, "http://")
	for i := range 10 {
		n.stuck(manifestPath("app", fmt.Sprintf("slow%d", i)) + ns)
		n.stuck(manifestPath("app", digestOf(fmt.Sprintf("slow%d", i))) + ns)
		n.stuck(blobPath("app", digestOf(fmt.Sprint(i))) + ns)
		for j := range 5 {
			n.stuck(blobPath("slow", digestOf(fmt.Sprint(i, j))) + ns)
		}
	}
	harness.Await(t, "the mirror waits for the slow registry", func() error {
		if reading.Load() < 4+3+28 || listing.Load() < 1 {
			return fmt.Errorf("%d manifests and layers, %d lists", reading.Load(), listing.Load())
		}
		return nil
	})
	n.get(manifestPath("app", plain)).expect(t, "by digest, which is searched for", http.StatusOK)
	n.get(manifestPath("app", "enc")).expect(t, "by tag", http.StatusOK)
	n.get(manifestPath("app", n.tagged("app", "enc"))).expect(t, "the encrypted one", http.StatusOK)
	n.get("/v2/app/tags/list").expect(t, "tags", http.StatusOK)
	layer := blobPath("app", layers(t, harness.Read(t, file(layout, plain)))[1])
	n.get(layer).expect(t, "layer", http.StatusOK)

	// By another name it has the other turns too. The slowest lose theirs, after ten seconds.
	before := reading.Load()
	for i := range 10 {
		n.stuck(blobPath("slow", digestOf(fmt.Sprint(i))) + strings.Replace(ns, "127.0.0.1", "localhost", 1))
	}
	harness.Await(t, "the mirror waits for the slow registry", func() error {
		if now := reading.Load() - before; now < 4 {
			return fmt.Errorf("%d layers", now)
		}
		return nil
	})
	n.get(layer).expect(t, "layer, when no turn is free", http.StatusOK)
	if n.pilot.Logged(t, "too slow while others waited") == 0 {
		t.Error("the log does not say what was ended")
	}
}

// TestStrangersTakeNothingFromCallers opens more connections than the mirror has and says
// nothing, or asks without the secret, and does not let go.
func TestStrangersTakeNothingFromCallers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	n.start(certs.args()...)
	caller := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: certs.ca.Pool()}}
	request := func() reply {
		t.Helper()
		return ask(t, caller, http.MethodGet, "https://"+n.mirror+"/v2/", http.Header{"Pilot-Secret": {n.secret}})
	}
	request().expect(t, "before", http.StatusOK)
	for range 100 {
		conn := tls.Client(n.connect(), &tls.Config{RootCAs: certs.ca.Pool(), ServerName: "127.0.0.1"})
		conn.NetConn().SetDeadline(time.Now().Add(harness.Timeout))
		fmt.Fprintf(conn, "GET /v2/ HTTP/1.1\r\nHost: %s\r\n\r\n", n.mirror)
		answer, err := io.ReadAll(conn)
		if !strings.HasPrefix(string(answer), "HTTP/1.1 401 ") || err != nil {
			t.Fatalf("without the secret: %q %v, and not the end of the connection", answer, err)
		}
	}
	for range 1200 {
		n.connect()
	}
	// On the connection that is there, and on a new one: those who say nothing are not
	// waited for, which would take ten seconds.
	began := time.Now()
	request().expect(t, "beside strangers", http.StatusOK)
	caller.CloseIdleConnections()
	request().expect(t, "a new connection beside strangers", http.StatusOK)
	if took := time.Since(began); took > 9*time.Second {
		t.Errorf("a caller waits for %v", took)
	}
	for range 100 {
		fmt.Fprint(n.connect(), "nonsense")
	}
	harness.Await(t, "handshakes fail", func() error {
		if n.pilot.Logged(t, "TLS handshake error") == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	request().expect(t, "after nonsense", http.StatusOK)
	if lines := n.pilot.Logged(t, "handshake error"); lines > 3 {
		t.Errorf("the log has %d lines of handshakes that failed", lines)
	}
}

// TestLongAnswersTakeBoundedMemory has many callers ask for a long list of tags, and a
// registry whose tokens and manifests do not end.
func TestLongAnswersTakeBoundedMemory(t *testing.T) {
	t.Parallel()
	n, f, _, _ := bigNode(t)
	list := `{"name":"big","tags":["` + strings.Repeat(`a","`, 7<<20/4) + `b"]}`
	f.set(func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if r.URL.Path == "/v2/big/tags/list" {
			io.WriteString(w, list)
			return
		}
		forward.ServeHTTP(w, r)
	})
	before := n.pilot.Peak(t)
	var wg sync.WaitGroup
	for range 32 {
		conn := n.connect()
		wg.Go(func() {
			n.send(conn, "/v2/big/tags/list")
			_ = conn.SetDeadline(time.Now().Add(harness.Timeout))
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if size, err := io.Copy(io.Discard, resp.Body); resp.StatusCode != http.StatusOK || size != int64(len(list)) || err != nil {
				t.Errorf("%s, %d bytes, %v", resp.Status, size, err)
			}
		})
	}
	wg.Wait()
	if grown := n.pilot.Peak(t) - before; grown > 256<<20 {
		t.Errorf("the mirror takes %d MiB more for lists", grown>>20)
	}
	before = n.pilot.Peak(t)
	var sent atomic.Int64
	endless := func(w http.ResponseWriter) {
		for range 1 << 10 {
			n, err := w.Write(bytes.Repeat([]byte("x"), 1<<20))
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}
	f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		if r.URL.Path != "/token" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, `{"token":"`)
		endless(w)
	})
	if r := n.get(manifestPath("big", "enc")); r.status == http.StatusOK {
		t.Errorf("without a token: %d", r.status)
	}
	if grown := n.pilot.Peak(t) - before; grown > 64<<20 {
		t.Errorf("the mirror takes %d MiB more for a token", grown>>20)
	}
	f.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		if r.Method == http.MethodGet {
			endless(w)
		}
	})
	if r := n.get(manifestPath("big", "endless")); r.status == http.StatusOK {
		t.Errorf("an endless manifest: %d", r.status)
	}
	if sent.Load() > 128<<20 {
		t.Errorf("the mirror has read %d MiB", sent.Load()>>20)
	}
}

// TestInlinedDataIsNotRemembered has images whose encrypted layer comes with data in its
// descriptor, as somebody who can push may write it.
func TestInlinedDataIsNotRemembered(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	n := newNode(t)
	n.start()
	layout, _ := n.plain(harness.LayerKinds[0], harness.NewSecret())
	n.encrypt(layout, "app:enc")
	doc := harness.Read(t, n.stored(n.tagged("app", "enc")))
	const images, size = 12, 2900 << 10
	for i := range images {
		var m map[string]any
		if err := json.Unmarshal([]byte(doc), &m); err != nil {
			t.Fatal(err)
		}
		m["layers"].([]any)[0].(map[string]any)["data"] = append([]byte(fmt.Sprint(i)), make([]byte, size)...)
		n.push("app", "data", m)
		n.get(manifestPath("app", "data")).expect(t, "manifest", http.StatusOK)
	}
	// Remembered, the data would have images*size bytes, 34 MiB.
	admin := harness.NewPilotClient(t, n.dir)
	harness.Await(t, "the mirror frees the data", func() error {
		resp, err := admin.Admin.Get("http://pilot/debug/pprof/heap?gc=1")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if heap := admin.Metric(t, "go_memstats_heap_alloc_bytes"); heap > images*size*2/3 {
			return fmt.Errorf("the heap has %g MiB", heap/(1<<20))
		}
		return nil
	})
}
