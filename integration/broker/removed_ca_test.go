package broker

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestRemovedCA keeps connections open while the CA of their certificates is removed from
// tls-client-ca: requests on them are refused from then on, and those of clients of the
// other CA are not.
func TestRemovedCA(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	stays, staysKey := b.Enroll(t, "stays")
	goes, goesKey := b.Enroll(t, "goes")
	// The removed node's CA is another one, of the same trust domain.
	other := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", other, "--dir", other+"/store", "--host", "127.0.0.1", "--trust-domain", "example.com"))
	os.Remove(goes)
	os.Remove(goesKey)
	harness.Output(t, harness.Command(t, "copilot", "enroll", "--config-dir", other, "--out", b.Dir, "goes"))
	own := harness.Read(t, b.Dir+"/ca.pem")
	conf := harness.Read(t, b.Dir+"/copilot.toml")
	harness.Write(t, b.Dir+"/clients.pem", own+harness.Read(t, other+"/ca.pem"))
	harness.Write(t, b.Dir+"/copilot.toml", strings.Replace(conf, b.Dir+"/ca.pem", b.Dir+"/clients.pem", 1))
	b.Process.Stop(t)
	b.Start(t)

	type client struct {
		http.Client
		reused bool
	}
	connect := func(cert, key string, http2 bool) *client {
		return &client{Client: http.Client{Timeout: harness.Timeout, Transport: &http.Transport{
			TLSClientConfig: b.ClientTLS(t, cert, key), ForceAttemptHTTP2: http2,
		}}}
	}
	ask := func(c *client) (int, string) {
		req, err := http.NewRequest("GET", b.URL()+"/api/v2/keks/team-a/key", nil)
		if err != nil {
			t.Fatal(err)
		}
		c.reused = false
		req = req.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			GotConn: func(info httptrace.GotConnInfo) { c.reused = info.Reused },
		}))
		resp, err := c.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	var staying, going []*client
	for _, http2 := range []bool{false, true} {
		staying = append(staying, connect(stays, staysKey, http2))
		going = append(going, connect(goes, goesKey, http2))
	}
	for i, c := range append(staying[:2:2], going...) {
		for range 2 {
			if status, body := ask(c); status != 200 {
				t.Fatalf("client %d: %d %s", i, status, body)
			}
		}
		if !c.reused {
			t.Fatal("no connection is open")
		}
	}
	harness.Write(t, b.Dir+"/clients.pem", own)
	for _, c := range going {
		harness.Await(t, "an open connection gets no more answers", func() error {
			status, body := ask(c)
			if status == 200 {
				return fmt.Errorf("%d on a connection that was open: %t", status, c.reused)
			}
			if !c.reused || status != 401 || !strings.Contains(body, "from a CA that is in tls-client-ca now") {
				t.Errorf("%d %s on a connection that was open: %t", status, body, c.reused)
			}
			return nil
		})
		if status, body := ask(c); status != 0 || c.reused {
			t.Errorf("a new connection: %d %s", status, body)
		}
	}
	for i, c := range staying {
		if status, body := ask(c); status != 200 || !c.reused {
			t.Errorf("the other CA's client %d: %d %s on a connection that was open: %t", i, status, body, c.reused)
		}
	}
	if log := harness.Read(t, b.Dir+"/store/audit.log"); !strings.Contains(log, `"status":401`) || !strings.Contains(log, "x509: certificate signed by unknown authority") {
		t.Error("the audit log does not have it")
	}
}
