package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/audit"
	broker "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// tlsBroker is a real broker that answers TLS on 127.0.0.1 and has the KEK
// team-a.
type tlsBroker struct{ url, auditLog string }

func startTLSBroker(t *testing.T, server certtest.Files, clients *certtest.Authority) tlsBroker {
	t.Helper()
	dir := t.TempDir()
	servertest.CreateKEKs(t, dir, "team-a")
	address := loopbacktest.FreeAddress(t)
	policy := filepath.Join(dir, "policy.toml")
	if err := os.WriteFile(policy, []byte("[[rule]]\nidentities = ['**']\nkeks = ['**']\nactions = ['export']\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	servertest.Serve(t, broker.Config{
		Dir: dir, Listen: []string{address}, TLSCert: server.Cert, TLSKey: server.Key, TLSClientCA: clients.File, Policy: policy,
	})
	return tlsBroker{"https://" + address, filepath.Join(dir, "audit.log")}
}

// audited returns the audit log's entries of an action.
func (b tlsBroker) audited(t *testing.T, action string) []audit.Entry {
	t.Helper()
	log, err := os.ReadFile(b.auditLog)
	if err != nil {
		t.Fatal(err)
	}
	var list []audit.Entry
	for line := range bytes.Lines(log) {
		var e audit.Entry
		if err := json.Unmarshal(line, &e); err == nil && e.Action == action {
			list = append(list, e)
		}
	}
	return list
}

// newTLSClient returns a client and its transport.
func newTLSClient(t *testing.T, conf Config) (*Client, *http.Transport) {
	t.Helper()
	conf.Timeout = time.Minute
	c, err := New(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.brokers[0].http.CloseIdleConnections)
	return c, c.brokers[0].http.Transport.(*http.Transport)
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca, other := certtest.NewAuthority(t), certtest.NewAuthority(t)
	b := startTLSBroker(t, ca.Issue(t, certtest.Named("broker")), ca)
	right, wrong := ca.Issue(t, certtest.Named("node")), other.Issue(t, certtest.Named("node"))
	expired := ca.Issue(t, x509.Certificate{NotAfter: time.Now().Add(-time.Minute)})
	for _, test := range []struct {
		name         string
		conf         Config
		is           error // nil: it works
		want, reason string
	}{
		{"right", Config{CAFile: ca.File, CertFile: right.Cert, KeyFile: right.Key}, nil, "", ""},
		{"no certificate", Config{CAFile: ca.File}, ErrUnavailable, "set broker-cert and broker-key", "didn't provide a certificate"},
		{"another CA's certificate", Config{CAFile: ca.File, CertFile: wrong.Cert, KeyFile: wrong.Key}, ErrUnavailable, "does not accept broker-cert", "unknown authority"},
		{"an expired certificate", Config{CAFile: ca.File, CertFile: expired.Cert, KeyFile: expired.Key}, ErrUnavailable, "broker-cert has expired on", "expired"},
		{"a broker of another CA", Config{CAFile: other.File, CertFile: right.Cert, KeyFile: right.Key}, ErrUnavailable, "unknown authority", "bad certificate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.conf.URLs = []string{b.url}
			c, transport := newTLSClient(t, test.conf)
			var connections atomic.Int32
			transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
				connections.Add(1)
				return new(net.Dialer).DialContext(ctx, network, address)
			}
			before := len(b.audited(t, "connect"))
			kek, err := c.KEK(t.Context(), "team-a", 0)
			// A broker's alert may come too late to be read, and then it is
			// asked again.
			if got := connections.Load(); got < 1 || got > maxTries || test.is == nil && got != 1 {
				t.Errorf("%d connections, want 1", got)
			}
			if test.is == nil {
				if err != nil || len(kek.Key) != 32 {
					t.Errorf("got %d bytes, %v", len(kek.Key), err)
				}
				return
			}
			// On a busy machine all of them may come too late.
			for end := time.Now().Add(time.Minute); errors.Is(err, test.is) && !strings.Contains(err.Error(), test.want) && time.Now().Before(end); {
				_, err = c.KEK(t.Context(), "team-a", 0)
			}
			if !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %v: %q", err, test.is, test.want)
			}
			// The broker notices when the client is gone already.
			for range 6000 { // a minute
				for _, line := range b.audited(t, "connect")[before:] {
					if line.Verdict == "denied" && strings.Contains(line.Reason, test.reason) && strings.HasPrefix(line.From, "127.0.0.1:") {
						return
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("audited: %+v, want one denied for %q", b.audited(t, "connect")[before:], test.reason)
		})
	}
	if got := len(b.audited(t, "export")); got != 1 {
		t.Errorf("%d KEKs were handed out, want 1", got)
	}
}

// TestReplacedCertificates replaces the files of both sides while both run.
func TestReplacedCertificates(t *testing.T) {
	t.Parallel()
	ca := certtest.NewAuthority(t)
	server, node := ca.Issue(t, certtest.Named("first broker")), ca.Issue(t, certtest.Named("first node"))
	b := startTLSBroker(t, server, ca)
	c, transport := newTLSClient(t, Config{URLs: []string{b.url}, CAFile: ca.File, CertFile: node.Cert, KeyFile: node.Key})
	var answered atomic.Value
	transport.TLSClientConfig.VerifyConnection = func(state tls.ConnectionState) error {
		answered.Store(state.PeerCertificates[0].Subject.CommonName)
		return nil
	}
	expect := func(which string) {
		t.Helper()
		var got any
		// A connection counts as used until net/http's own goroutine has seen the answer's end.
		for began := time.Now(); got != which+" broker" && time.Since(began) < time.Minute; {
			c.brokers[0].http.CloseIdleConnections()
			if _, err := c.KEK(t.Context(), "team-a", 0); err != nil {
				t.Fatal(err)
			}
			got = answered.Load()
		}
		if got != which+" broker" {
			t.Errorf("the certificate of %q answers, want the %s", got, which)
		}
		lines := b.audited(t, "export")
		if got := lines[len(lines)-1].Who; got != "cn:"+which+" node" {
			t.Errorf("%q asks, want the %s", got, which)
		}
	}
	expect("first")
	ca.Reissue(t, server, certtest.Named("second broker"))
	ca.Reissue(t, node, certtest.Named("second node"))
	expect("second")
}

// TestIdentity checks how the holder of a certificate stands in the audit log.
func TestIdentity(t *testing.T) {
	t.Parallel()
	ca := certtest.NewAuthority(t)
	b := startTLSBroker(t, ca.Issue(t, certtest.Named("broker")), ca)
	subject := pkix.Name{CommonName: "node-7"}
	names := []string{"node-7.example.com", "other.example.com"}
	web := &url.URL{Scheme: "https", Host: "example.com"}
	spiffe := &url.URL{Scheme: "spiffe", Host: "example.com", Path: "/node/7"}
	for _, test := range []struct {
		template x509.Certificate
		want     string
	}{
		{x509.Certificate{Subject: subject, DNSNames: names, URIs: []*url.URL{web, spiffe}}, "spiffe://example.com/node/7"},
		{x509.Certificate{Subject: subject, DNSNames: names, URIs: []*url.URL{web}}, "dns:node-7.example.com"},
		{x509.Certificate{Subject: subject}, "cn:node-7"},
	} {
		files := ca.Issue(t, test.template)
		c, _ := newTLSClient(t, Config{URLs: []string{b.url}, CAFile: ca.File, CertFile: files.Cert, KeyFile: files.Key})
		if _, err := c.KEK(t.Context(), "team-a", 0); err != nil {
			t.Errorf("%s: %v", test.want, err)
			continue
		}
		lines := b.audited(t, "export")
		if got := lines[len(lines)-1].Who; got != test.want {
			t.Errorf("audited as %q, want %q", got, test.want)
		}
	}
}

// TestHangUpAfterHandshakeNamesTheCertificate has a broker end connections before it
// could be asked anything, as one that refuses a certificate and whose alert is lost.
func TestHangUpAfterHandshakeNamesTheCertificate(t *testing.T) {
	t.Parallel()
	ca := certtest.NewAuthority(t)
	server, node := ca.Issue(t, certtest.Named("broker")), ca.Issue(t, certtest.Named("node"))
	pair, err := tls.LoadX509KeyPair(server.Cert, server.Key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}).HandshakeContext(t.Context())
			conn.Close()
		}
	}()
	const hint = "it closed the connection at once, as a broker does that rejects broker-cert"
	with, transport := newTLSClient(t, Config{URLs: []string{"https://" + l.Addr().String()}, CAFile: ca.File, CertFile: node.Cert, KeyFile: node.Key})
	without, _ := newTLSClient(t, Config{URLs: []string{with.brokers[0].url}, CAFile: ca.File})
	// No request is on its way before the end of the connection is read.
	ended := make(chan struct{}, 100)
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return endedConn{conn, ended}, err
	}
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
		<-ended
		time.Sleep(10 * time.Millisecond) // until it is noticed, or else the next try shows it
	}})
	for end := time.Now().Add(time.Minute); ; {
		_, err := with.KEK(ctx, "team-a", 0)
		if errors.Is(err, ErrUnavailable) && strings.Contains(err.Error(), hint) {
			break
		}
		if err == nil || time.Now().After(end) {
			t.Fatalf("got %v, want %q", err, hint)
		}
	}
	if _, err := without.KEK(t.Context(), "team-a", 0); !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "broker-cert") {
		t.Errorf("without a certificate: %v", err)
	}
}

// endedConn says when the peer's end of the connection was read.
type endedConn struct {
	net.Conn
	ended chan struct{}
}

func (c endedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.ended <- struct{}{}
	}
	return n, err
}

// TestAlertsAboutCertificates compares our list of alerts with the names that crypto/tls
// has for all of them.
func TestAlertsAboutCertificates(t *testing.T) {
	for n := range 256 {
		name := tls.AlertError(n).Error()
		want := strings.Contains(name, "certificate") || strings.Contains(name, "access denied")
		if got := slices.Contains(refusesCertificate, uint8(n)); got != want {
			t.Errorf("alert %d (%s): %v, want %v", n, name, got, want)
		}
	}
}
