package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/url"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// TestRequestAsksForMore signs a request for a certificate that asks for another name,
// for other names, to be a CA and to be a server.
func TestRequestAsksForMore(t *testing.T) {
	dir := t.TempDir()
	ca, err := Create(dir, "example.com", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	extension := func(id asn1.ObjectIdentifier, v any) pkix.Extension {
		value, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return pkix.Extension{Id: id, Critical: true, Value: value}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}},
		DNSNames:       []string{"copilot.example.com"},
		EmailAddresses: []string{"admin@example.com"},
		IPAddresses:    []net.IP{net.IPv4(127, 0, 0, 1)},
		URIs:           []*url.URL{{Scheme: "spiffe", Host: "example.com", Path: "/admin"}},
		ExtraExtensions: []pkix.Extension{
			extension(asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ IsCA bool }{true}),                                               // basic constraints
			extension(asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.BitString{Bytes: []byte{0x06}, BitLength: 7}),                       // key usage: sign certificates
			extension(asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}, {2, 5, 29, 37, 0}}), // server, any
			extension(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, "unknown"),
		},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "node.pem")
	if err := ca.SignClient(Client{"node/worker-7", time.Minute}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), file); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(dir, "plain.pem")
	if err := ca.IssueClient(Client{"node/worker-7", time.Minute}, plain, filepath.Join(dir, "plain-key.pem")); err != nil {
		t.Fatal(err)
	}
	got, want := certificate(t, file), certificate(t, plain)
	if !got.PublicKey.(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Error("it is for another key")
	}
	if got.IsCA || got.KeyUsage != want.KeyUsage || !reflect.DeepEqual(got.ExtKeyUsage, want.ExtKeyUsage) || len(got.UnknownExtKeyUsage) > 0 {
		t.Errorf("CA %v, key usage %v, extended %v %v", got.IsCA, got.KeyUsage, got.ExtKeyUsage, got.UnknownExtKeyUsage)
	}
	if got.Subject.String() != want.Subject.String() || !reflect.DeepEqual(got.URIs, want.URIs) || len(got.DNSNames)+len(got.IPAddresses)+len(got.EmailAddresses) > 0 {
		t.Errorf("it is for %s, %v %v %v %v", got.Subject, got.URIs, got.DNSNames, got.IPAddresses, got.EmailAddresses)
	}
	ids := func(c *x509.Certificate) (list []string) {
		for _, e := range c.Extensions {
			list = append(list, e.Id.String())
		}
		return list
	}
	if !reflect.DeepEqual(ids(got), ids(want)) {
		t.Errorf("it has extensions %v, want %v", ids(got), ids(want))
	}
}
