package handshake

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestFailureOverACertificateIsDenied has clients fail in each way, in both versions of
// TLS.
func TestFailureOverACertificateIsDenied(t *testing.T) {
	ca, foreign := certtest.NewAuthority(t), certtest.NewAuthority(t)
	own := ca.Issue(t, x509.Certificate{})
	clients, err := certfile.LoadAuthorities(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := certfile.Server(own.Cert, own.Key, clients, false)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	failures := make(chan Failure)
	l := NewTurns(prometheus.NewCounter(prometheus.CounterOpts{})).Listener(plain, conf, func(f Failure) { failures <- f })
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.Close()
			}
		}
	}()
	strange := foreign.Issue(t, x509.Certificate{})
	pair, err := tls.LoadX509KeyPair(strange.Cert, strange.Key)
	if err != nil {
		t.Fatal(err)
	}
	stolen, err := tls.LoadX509KeyPair(own.Cert, own.Key)
	if err != nil {
		t.Fatal(err)
	}
	stolen.PrivateKey = pair.PrivateKey // which is not its own
	shake := func(conf *tls.Config) func(net.Conn) {
		return func(c net.Conn) {
			client := tls.Client(c, conf)
			client.Handshake()
			client.Read(make([]byte, 1)) // in TLS 1.3, the server's verdict comes after
		}
	}
	type test struct {
		client       func(net.Conn)
		denied, mute bool
	}
	tests := map[string]test{
		"HTTP": {client: func(c net.Conn) {
			c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
			if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("HTTP: %v %v", resp, err)
			}
		}},
		"nonsense":    {client: func(c net.Conn) { c.Write([]byte("nonsense")) }},
		"silence":     {client: func(net.Conn) {}, mute: true},
		"old version": {client: shake(&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10})},
		"other ciphers": {client: shake(&tls.Config{
			InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256},
		})},
	}
	if fipstest.Only() {
		delete(tests, "old version") // this client has none, too
	}
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		tests["no certificate, "+name] = test{client: shake(&tls.Config{InsecureSkipVerify: true, MaxVersion: version}), denied: true}
		tests["foreign CA, "+name] = test{client: shake(&tls.Config{InsecureSkipVerify: true, MaxVersion: version, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &pair, nil
		}}), denied: true}
		tests["another's certificate, "+name] = test{client: shake(&tls.Config{InsecureSkipVerify: true, MaxVersion: version, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &stolen, nil
		}}), denied: true}
		tests["rejects the server, "+name] = test{client: shake(&tls.Config{RootCAs: foreign.Pool(), ServerName: "127.0.0.1", MaxVersion: version}), denied: true}
	}
	for name, test := range tests {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			test.client(c)
			c.Close()
			close(done)
		}()
		f := <-failures
		<-done
		if f.Denied != test.denied || f.Silent() != test.mute || f.From != c.LocalAddr().String() {
			t.Errorf("%s: %+v, silent %t", name, f, f.Silent())
		}
	}
}

// TestRequestForAnotherHelloShowsNoCertificate has clients whose first hello offers no
// key share that the server can use.
func TestRequestForAnotherHelloShowsNoCertificate(t *testing.T) {
	ca := certtest.NewAuthority(t)
	own := ca.Issue(t, x509.Certificate{})
	clients, err := certfile.LoadAuthorities(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := certfile.Server(own.Cert, own.Key, clients, false)
	if err != nil {
		t.Fatal(err)
	}
	usual := conf.GetConfigForClient
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := usual(hello)
		c.CurvePreferences = []tls.CurveID{tls.CurveP384} // Go's client offers it, and no share of it at first
		return c, err
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	failures, accepted := make(chan Failure, 1), make(chan net.Conn, 1)
	l := NewTurns(prometheus.NewCounter(prometheus.CounterOpts{})).Listener(plain, conf, func(f Failure) { failures <- f })
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	pair, err := tls.LoadX509KeyPair(own.Cert, own.Key)
	if err != nil {
		t.Fatal(err)
	}
	connect := func(wrap func(net.Conn) net.Conn, certs ...tls.Certificate) {
		t.Helper()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			client := tls.Client(wrap(c), &tls.Config{InsecureSkipVerify: true, Certificates: certs})
			client.Handshake()
			client.Read(make([]byte, 1))
		}()
	}
	plainly := func(c net.Conn) net.Conn { return c }
	connect(plainly, pair)
	select {
	case c := <-accepted:
		if s := c.(*tls.Conn).ConnectionState(); !s.HelloRetryRequest {
			t.Error("the first hello was enough")
		}
		c.Close()
	case f := <-failures:
		t.Errorf("with a certificate: %+v", f)
	}
	connect(plainly)
	if f := <-failures; !f.Denied {
		t.Errorf("without a certificate: %+v", f)
	}
	connect(func(c net.Conn) net.Conn { return &repeater{Conn: c} })
	if f := <-failures; f.Denied {
		t.Errorf("with the same hello again: %+v", f)
	}
}

// repeater is the connection of a client that sends its first hello again instead of its
// second.
type repeater struct {
	net.Conn
	hello []byte
}

func (r *repeater) Write(b []byte) (int, error) {
	if r.hello == nil {
		r.hello = bytes.Clone(b)
	} else if b[0] == recordHandshake {
		r.hello[2] = b[2] // the version of records: 3.1 in the first one
		if _, err := r.Conn.Write(r.hello); err != nil {
			return 0, err
		}
		return len(b), nil
	}
	return r.Conn.Write(b)
}
