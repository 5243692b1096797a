package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// issuer is an OpenID Connect issuer, as a cluster is.
type issuer struct {
	*httptest.Server
	signer jose.Signer
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{}
	if i.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "1"}}, nil); err != nil {
		t.Fatal(err)
	}
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/keys" {
			json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}})
			return
		}
		json.NewEncoder(w).Encode(harness.Object{"issuer": i.URL, "jwks_uri": i.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}})
	}))
	t.Cleanup(i.Close)
	return i
}

// token returns a token of a subject's.
func (i *issuer) token(t testing.TB, subject string) string {
	t.Helper()
	now := time.Now()
	token, err := jwt.Signed(i.signer).Claims(jwt.Claims{Issuer: i.URL, Subject: subject, Audience: jwt.Audience{"copilot"},
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Hour))}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// fleet is many nodes that reconnect at the same time, and their results.
type fleet struct {
	nodes []*client.Client
	keks  []string

	connections, refused, requests, failed atomic.Int64

	mu     sync.Mutex
	served []time.Duration
	last   error
}

// run has each node request its KEKs at some moment of the first second, and retry as
// the kubelet does after a failed pull, until all have them.
func (h *fleet) run(ctx context.Context) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectStart: func(string, string) { h.connections.Add(1) },
		GotConn:      func(httptrace.GotConnInfo) { h.requests.Add(1) },
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			if err != nil {
				h.refused.Add(1)
			}
		},
	})
	begin := time.Now()
	var wg sync.WaitGroup
	for i, node := range h.nodes {
		wg.Go(func() {
			time.Sleep(mathrand.N(time.Second))
			for _, kek := range h.keks[:1+i%len(h.keks)] {
				for backOff := 10 * time.Second; ; backOff = min(2*backOff, 5*time.Minute) {
					_, err := node.KEK(ctx, kek, 1)
					if err == nil {
						break
					}
					h.failed.Add(1)
					h.mu.Lock()
					h.last = err
					h.mu.Unlock()
					select {
					case <-time.After(backOff):
					case <-ctx.Done():
						return
					}
				}
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			h.served = append(h.served, time.Since(begin))
		})
	}
	wg.Wait()
}

// within returns after how long a part of the nodes had their KEKs.
func (h *fleet) within(part float64) time.Duration {
	slices.Sort(h.served)
	if n := int(part*float64(len(h.nodes)) + .5); n <= len(h.served) {
		return h.served[n-1].Round(10 * time.Millisecond)
	}
	return -1
}

// TestAllNodesReconnectAtOnce has the nodes of a site connect to one copilot at the same time, each with
// an identity of its own. `make test-long` has up to
// 10,000 of them, and prints how long it takes.
func TestAllNodesReconnectAtOnce(t *testing.T) {
	t.Parallel()
	// A broker serves 100 in at most a 25th of the time that a connection waits for its
	// handshake.
	sizes := []int{100}
	if s := os.Getenv("PILOT_NODES"); s != "" {
		sizes = nil
		for _, n := range strings.Split(s, ",") {
			size, err := strconv.Atoi(n)
			if err != nil {
				t.Fatalf("PILOT_NODES: %v", err)
			}
			sizes = append(sizes, size)
		}
	}
	harness.MoreFiles(t, uint64(slices.Max(sizes))*3/2+1000)
	for _, size := range sizes {
		t.Run(fmt.Sprintf("%d tokens", size), func(t *testing.T) { powerCut(t, size, false) })
	}
	certificates := min(1000, slices.Max(sizes))
	t.Run(fmt.Sprintf("%d certificates", certificates), func(t *testing.T) { powerCut(t, certificates, true) })
}

func powerCut(t *testing.T, size int, certificates bool) {
	h := &fleet{keks: []string{"team-a", "team-b", "team-c"}}
	b := harness.NewTLSBroker(t, h.keks...)
	b.Process.Stop(t)
	i := newIssuer(t)
	add := func(file, text string) { harness.Write(t, file, harness.Read(t, file)+text) }
	add(b.Dir+"/copilot.toml", fmt.Sprintf("[issuers.site]\nurl = %q\naudience = \"copilot\"\n", i.URL))
	add(b.Dir+"/policy.toml", "[[rule]]\nidentities = [\"site:node-*\"]\nkeks = [\"**\"]\nactions = [\"export\"]\n")
	ca, err := pki.Load(b.Dir)
	if err != nil {
		t.Fatal(err)
	}
	identity := func(n int) string {
		if certificates {
			return fmt.Sprintf("spiffe://example.com/node/%d", n)
		}
		return fmt.Sprintf("site:node-%d", n)
	}
	for n := range size {
		conf := client.Config{URLs: []string{b.URL()}, CAFile: b.Dir + "/ca.pem"}
		if certificates {
			conf.CertFile, conf.KeyFile = fmt.Sprintf("%s/nodes/%d.pem", b.Dir, n), fmt.Sprintf("%s/nodes/%d-key.pem", b.Dir, n)
			if err := os.MkdirAll(b.Dir+"/nodes", 0o700); err != nil {
				t.Fatal(err)
			}
			if err := ca.IssueClient(pki.Client{Path: fmt.Sprintf("node/%d", n), Hold: time.Hour}, conf.CertFile, conf.KeyFile); err != nil {
				t.Fatal(err)
			}
		} else {
			conf.TokenFile = harness.Write(t, fmt.Sprintf("%s/nodes/%d", b.Dir, n), i.token(t, fmt.Sprintf("node-%d", n)))
		}
		node, err := client.New(conf)
		if err != nil {
			t.Fatal(err)
		}
		h.nodes = append(h.nodes, node)
	}
	b.Start(t)
	if size > 1000 {
		// Nodes have processors of their own: those here are served first.
		yields(t, b.Process.Cmd.Process.Pid)
	}
	before := cpu(t, b.Process.Cmd.Process.Pid)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	files, slowest := make(chan int), time.Duration(0)
	admin := harness.NewPilotClient(t, b.Dir+"/store").Admin
	go func() {
		most := 0
		defer func() { files <- most }()
		for {
			asked := time.Now()
			if r, err := admin.Get("http://copilot/healthz"); err == nil {
				r.Body.Close()
			}
			slowest = max(slowest, time.Since(asked))
			entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.Process.Cmd.Process.Pid))
			most = max(most, len(entries))
			select {
			case <-ctx.Done():
				return
			case <-time.After(500 * time.Millisecond):
			}
		}
	}()
	h.run(ctx)
	cancel()
	most := <-files
	used := cpu(t, b.Process.Cmd.Process.Pid) - before
	t.Logf("served 50%% %s, 99%% %s, all %s; %d connections, %d handshakes failed, %d requests, %d calls failed (%v); copilot: %s CPU (%s a node), %d MiB, %d files, /healthz within %s",
		h.within(.5), h.within(.99), h.within(1), h.connections.Load(), h.refused.Load(), h.requests.Load(), h.failed.Load(), h.last,
		used, (used / time.Duration(size)).Round(10*time.Microsecond), b.Process.Peak(t)>>20, most, slowest.Round(time.Millisecond))

	if len(h.served) != size {
		t.Errorf("%d of %d nodes have their KEKs: %v", len(h.served), size, h.last)
	}
	if size <= 1000 && h.failed.Load() > 0 {
		t.Errorf("%d calls failed: %v", h.failed.Load(), h.last)
	}
	harness.Output(t, b.Command(t, "audit", "verify"))
	audited := map[string]bool{}
	for line := range strings.Lines(harness.Read(t, filepath.Join(b.Dir, "store/audit.log"))) {
		var e struct{ Action, Who, KEK, Verdict string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Action == "export" && e.Verdict == "allowed" {
			audited[e.Who+" "+e.KEK] = true
		}
	}
	for n := range size {
		for _, kek := range h.keks[:1+n%len(h.keks)] {
			if !audited[identity(n)+" "+kek] {
				t.Fatalf("the audit log does not say that %s got %s", identity(n), kek)
			}
		}
	}
}

// yields gives a process only the processor time that others leave.
func yields(t testing.TB, pid int) {
	t.Helper()
	harness.Output(t, harness.Command(t, "sh", "-c", `renice -n 10 $(ls "/proc/$1/task")`, "sh", strconv.Itoa(pid)))
}

// cpu returns the processor time that a process has used.
func cpu(t testing.TB, pid int) time.Duration {
	t.Helper()
	_, rest, _ := strings.Cut(harness.Read(t, fmt.Sprintf("/proc/%d/stat", pid)), ") ")
	fields := strings.Fields(rest)
	var ticks time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ticks += time.Duration(n)
	}
	return ticks * time.Second / 100 // USER_HZ
}
