package broker

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// renews lets copilot renew nodes' certificates.
func renews(t testing.TB, b *harness.TLSBroker, ca, key string) {
	t.Helper()
	b.Process.Stop(t)
	config, _, _ := strings.Cut(harness.Read(t, b.Dir+"/copilot.toml"), "node-ca")
	harness.Write(t, b.Dir+"/copilot.toml", config+fmt.Sprintf("node-ca = %q\nnode-ca-key = %q\n", b.Dir+"/"+ca, b.Dir+"/"+key))
	b.Start(t)
}

// renew is the command that renews the certificate of a node.
func renew(t testing.TB, b *harness.TLSBroker, cert, key string, args ...string) *exec.Cmd {
	t.Helper()
	return harness.Command(t, "pilot", append([]string{"node", "renew", "--config", "/dev/null", "--broker", b.URL(), "--broker-ca", b.Dir + "/ca.pem",
		"--broker-cert", cert, "--broker-key", key}, args...)...)
}

// TestNodeRenews renews certificates of nodes, and tries to renew others.
func TestNodeRenews(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a", "team-b")
	cert, key := b.Enroll(t, "worker-1", "--for", "30d")
	harness.ExpectFailure(t, renew(t, b, cert, key), "this broker does not renew certificates", "copilot certs renew")

	harness.Output(t, harness.Command(t, "copilot", "certs", "node-ca", "--config-dir", b.Dir))
	renews(t, b, "node-ca.pem", "node-ca-key.pem")
	for name, mode := range map[string]os.FileMode{cert: 0o640, key: 0o600} {
		if err := os.Chown(name, 12345, 54321); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	before, keyBefore := harness.Certificate(t, cert), harness.Read(t, key)
	works := func(cert, key, when string) {
		t.Helper()
		if status, body := b.Request(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			t.Errorf("%s: %d %s", when, status, body)
		}
	}
	if out := harness.Output(t, renew(t, b, cert, key)); !strings.Contains(out, "spiffe://example.com/node/worker-1, valid until") {
		t.Error(out)
	}
	after := harness.Certificate(t, cert)
	if after.SerialNumber.Cmp(before.SerialNumber) == 0 || harness.Read(t, key) == keyBefore || before.PublicKey.(*ecdsa.PublicKey).Equal(after.PublicKey) {
		t.Error("the certificate or the key is the one before")
	}
	if len(after.URIs) != 1 || after.URIs[0].String() != "spiffe://example.com/node/worker-1" || after.Subject.String() != before.Subject.String() ||
		len(after.ExtKeyUsage) != 1 || after.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || after.IsCA {
		t.Errorf("%v %v %v", after.URIs, after.Subject, after.ExtKeyUsage)
	}
	if is, was := after.NotAfter.Sub(after.NotBefore), before.NotAfter.Sub(before.NotBefore); is > was || is < was-time.Minute {
		t.Errorf("it is valid for %s, and the one before was for %s", is, was)
	}
	if err := after.CheckSignatureFrom(harness.Certificate(t, b.Dir+"/node-ca.pem")); err != nil {
		t.Error(err)
	}
	for name, mode := range map[string]os.FileMode{cert: 0o640, key: 0o600} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 12345 || owner.Gid != 54321 || info.Mode() != mode {
			t.Errorf("%s belongs to %d:%d, mode %v", name, owner.Uid, owner.Gid, info.Mode())
		}
	}
	works(cert, key, "renewed")
	log := harness.Read(t, b.Dir+"/store/audit.log")
	if !strings.Contains(log, `"action":"renew","who":"spiffe://example.com/node/worker-1"`) || !strings.Contains(log, fmt.Sprintf("certificate %x instead of %x", after.SerialNumber, before.SerialNumber)) {
		t.Error("the audit log does not have it")
	}
	// The admin's command takes up what the node CA has issued.
	harness.Output(t, harness.Command(t, "copilot", "certs", "renew", "--config-dir", b.Dir, cert))
	works(cert, key, "renewed by the admin")

	// It is interrupted after the key was replaced.
	whole := harness.Read(t, key)
	harness.Await(t, "the next certificate is a newer one", func() error {
		if time.Since(before.NotBefore) < pki.Backdate+2*time.Second {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	harness.Output(t, renew(t, b, cert, key))
	harness.Write(t, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: before.Raw})))
	home := b.Dir + "/home"
	serves, _ := harness.StartPilot(t, home, b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--diff-listen", "off")
	if _, err := harness.NewPilotClient(t, home).Wrap(t.Context()); err != nil || harness.Read(t, key) == whole {
		t.Errorf("between the two replacements: %v", err)
	}
	harness.Await(t, "the replacement is completed", func() error {
		if harness.Certificate(t, cert).SerialNumber.Cmp(before.SerialNumber) == 0 {
			return fmt.Errorf("log:\n%s", harness.Read(t, serves.Log))
		}
		return nil
	})
	works(cert, key, "completed")

	harness.Await(t, "it renews too often", func() error {
		out, err := renew(t, b, cert, key, "--broker-timeout", "2s").CombinedOutput()
		if err != nil && strings.Contains(string(out), "too many requests") {
			return nil
		}
		return fmt.Errorf("%v: %s", err, out)
	})

	// Nothing can be written.
	locked, lockedKey := b.Enroll(t, "locked")
	ro := b.Dir + "/ro"
	harness.Write(t, ro+"/locked.pem", harness.Read(t, locked))
	harness.Write(t, ro+"/locked-key.pem", harness.Read(t, lockedKey))
	harness.Output(t, harness.Command(t, "unshare", "-m", "sh", "-c", `mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && ! pilot node renew --config /dev/null --broker "$2" --broker-ca "$3" --broker-cert "$1/locked.pem" --broker-key "$1/locked-key.pem" 2>"$4" && grep -q "can't be written" "$4"`,
		"sh", ro, b.URL(), b.Dir+"/ca.pem", b.Dir+"/ro.log"))

	refused := func(name, cert, key, reason string) {
		t.Helper()
		was, keyWas := harness.Read(t, cert), harness.Read(t, key)
		harness.ExpectFailure(t, renew(t, b, cert, key), "this certificate is not renewed")
		if harness.Read(t, cert) != was || harness.Read(t, key) != keyWas {
			t.Errorf("%s: the files were changed", name)
		}
		if log := harness.Read(t, b.Dir+"/store/audit.log"); !strings.Contains(log, reason) {
			t.Errorf("%s: the audit log does not say %q", name, reason)
		}
	}
	// Revoked for one of the KEKs, which it may not even use.
	cert, key = b.Enroll(t, "worker-2")
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", "spiffe://example.com/node/worker-2", "team-b"))
	refused("revoked", cert, key, "the KEK team-b was revoked for spiffe://example.com/node/worker-2")
	harness.Output(t, b.Command(t, "keys", "revoke", "--undo", "--identity", "spiffe://example.com/node/worker-2", "team-b"))
	harness.Output(t, renew(t, b, cert, key))
	// Denied by the policy, or not named in it.
	stolen, stolenKey := b.Enroll(t, "stolen")
	b.AddRules(t, `
[[rule]]
identities = ["spiffe://example.com/node/stolen"]
keks = ["**"]
actions = ["wrap", "unwrap", "export", "admin"]
deny = true
`)
	refused("denied", stolen, stolenKey, "the policy lets spiffe://example.com/node/stolen use no KEK")
	nobody, nobodyKey := b.Enroll(t, "x", "--role", "stranger")
	refused("of no rule", nobody, nobodyKey, "the policy lets spiffe://example.com/stranger/x use no KEK")
	refused("an admin", b.Dir+"/admin.pem", b.Dir+"/admin-key.pem", "may admin KEKs")
	// An expired one.
	cert, key = b.Enroll(t, "worker-3", "--for", "1s")
	harness.Await(t, "it expires", func() error {
		if time.Now().Before(harness.Certificate(t, cert).NotAfter.Add(time.Second)) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	harness.ExpectFailure(t, renew(t, b, cert, key), "broker-cert has expired", "copilot certs renew", "copy the result back")

	hostileRequests(t, b)
	otherCA(t, b)
}

// hostileRequests asks for more than a renewal.
func hostileRequests(t *testing.T, b *harness.TLSBroker) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	admin, _ := url.Parse("spiffe://example.com/admin")
	request := func(key crypto.Signer, template *x509.CertificateRequest) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	encoded := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	forged := request(ec, &x509.CertificateRequest{})
	forged[len(forged)-1] ^= 1
	caExtension, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	i := 0
	for name, test := range map[string]struct {
		csr    string
		status int
		want   string
	}{
		"RSA 1024":            {encoded("CERTIFICATE REQUEST", request(small, &x509.CertificateRequest{})), 400, "1024 bits"},
		"another name":        {encoded("CERTIFICATE REQUEST", request(ec, &x509.CertificateRequest{URIs: []*url.URL{admin}})), 400, "it asks for names"},
		"another subject":     {encoded("CERTIFICATE REQUEST", request(ec, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}})), 400, "it asks for names"},
		"a host":              {encoded("CERTIFICATE REQUEST", request(ec, &x509.CertificateRequest{DNSNames: []string{"copilot.example.com"}})), 400, "it asks for names"},
		"a CA":                {encoded("CERTIFICATE REQUEST", request(ec, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: caExtension}}})), 400, "it asks for names"},
		"somebody else's key": {encoded("CERTIFICATE REQUEST", forged), 400, "bad certificate signing request"},
		"no request":          {encoded("CERTIFICATE", harness.Certificate(t, b.Dir+"/admin.pem").Raw), 400, "no certificate signing request"},
		"nothing":             {"", 400, "no certificate signing request"},
		"large":               {encoded("CERTIFICATE REQUEST", make([]byte, 20<<10)), 400, "the limit is 16384"},
		"giant":               {strings.Repeat("A", 128<<10), 413, ""}, // as much as is read: see copilot_test.go
		"a giant RSA key":     {encoded("CERTIFICATE REQUEST", giantRSA(t)), 400, "bits"},
	} {
		i++
		cert, key := b.Enroll(t, fmt.Sprintf("hostile-%d", i))
		body, err := json.Marshal(harness.Object{"csr": test.csr})
		if err != nil {
			t.Fatal(err)
		}
		if status, answer := b.Request(t, cert, key, "POST", "/api/v2/certificate/renew", string(body)); status != test.status || !strings.Contains(answer, test.want) {
			t.Errorf("%s: %d %.500s, want %d and %q", name, status, answer, test.status, test.want)
		}
	}

	// An attribute that is not an extension, such as a challenge password, has no effect.
	cert, key := b.Enroll(t, "attributes")
	body, err := json.Marshal(harness.Object{"csr": encoded("CERTIFICATE REQUEST", challenging(t, ec))})
	if err != nil {
		t.Fatal(err)
	}
	status, answer := b.Request(t, cert, key, "POST", "/api/v2/certificate/renew", string(body))
	var got struct{ Certificate string }
	if json.Unmarshal([]byte(answer), &got); status != 200 {
		t.Fatalf("a challenge password: %d %s", status, answer)
	}
	harness.Write(t, b.Dir+"/a.pem", got.Certificate)
	if c := harness.Certificate(t, b.Dir+"/a.pem"); c.URIs[0].Path != "/node/attributes" || len(c.Extensions) != len(harness.Certificate(t, cert).Extensions) {
		t.Errorf("%v, extensions %v", c.URIs, c.Extensions)
	}

	// By a token, or over a socket, nobody has a certificate to renew.
	if status, answer := harness.RequestOverSocket(t, b.Dir+"/copilot.sock", "POST", "/api/v2/certificate/renew", string(body)); status != 400 {
		t.Errorf("over a socket: %d %s", status, answer)
	}
}

// giantRSA returns a request with a key that would take long to verify, which nobody
// has.
func giantRSA(t *testing.T) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	var csr pkcs10
	if _, err := asn1.Unmarshal(der, &csr); err != nil {
		t.Fatal(err)
	}
	n := new(big.Int).Lsh(big.NewInt(1), 64<<10)
	giant, err := asn1.Marshal(struct {
		N *big.Int
		E int
	}{n.Add(n, big.NewInt(1)), 65537})
	if err != nil {
		t.Fatal(err)
	}
	csr.Info.Key.Key = asn1.BitString{Bytes: giant, BitLength: 8 * len(giant)}
	if der, err = asn1.Marshal(csr); err != nil {
		t.Fatal(err)
	}
	return der
}

// pkcs10 is a certificate signing request (RFC 2986).
type pkcs10 struct {
	Info struct {
		Version int
		Subject asn1.RawValue
		Key     struct {
			Algorithm pkix.AlgorithmIdentifier
			Key       asn1.BitString
		}
		Attributes asn1.RawValue `asn1:"tag:0"`
	}
	Algorithm pkix.AlgorithmIdentifier
	Signature asn1.BitString
}

// challenging returns a request with a challenge password (RFC 2985, section 5.4.1).
func challenging(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	var csr pkcs10
	if _, err := asn1.Unmarshal(der, &csr); err != nil {
		t.Fatal(err)
	}
	attribute, err := asn1.Marshal(struct {
		ID     asn1.ObjectIdentifier
		Values []string `asn1:"set"`
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, []string{"admin"}})
	if err != nil {
		t.Fatal(err)
	}
	csr.Info.Attributes = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: attribute}
	info, err := asn1.Marshal(csr.Info)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, hash[:])
	if err != nil {
		t.Fatal(err)
	}
	csr.Signature = asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	if der, err = asn1.Marshal(csr); err != nil {
		t.Fatal(err)
	}
	return der
}

// otherCA shows a certificate of a CA that is trusted, and not copilot's.
func otherCA(t *testing.T, b *harness.TLSBroker) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	domain, _ := url.Parse("spiffe://example.com")
	id, _ := url.Parse("spiffe://example.com/node/spire")
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "SPIRE"}, URIs: []*url.URL{domain}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, ec.Public(), ec)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, ca, ec.Public(), ec)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	trusted := harness.Read(t, b.Dir+"/ca.pem")
	harness.Write(t, b.Dir+"/ca.pem", trusted+string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})))
	defer harness.Write(t, b.Dir+"/ca.pem", trusted)
	cert := harness.Write(t, b.Dir+"/spire.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	key := harness.Write(t, b.Dir+"/spire-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	if status, body := b.Request(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("a certificate of SPIRE: %d %s", status, body)
	}
	harness.ExpectFailure(t, renew(t, b, cert, key), "this certificate is not renewed")
	if log := harness.Read(t, b.Dir+"/store/audit.log"); !strings.Contains(log, "it was not issued by this CA") {
		t.Error("the audit log does not say why SPIRE's certificate is not renewed")
	}
}

// TestNodeRenewsWhileCAIsReplaced renews while the CA is exchanged: that which copilot
// uses itself, and one for nodes.
func TestNodeRenewsWhileCAIsReplaced(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	certs := func(args ...string) string {
		return harness.Output(t, harness.Command(t, "copilot", append([]string{"certs", args[0], "--config-dir", b.Dir}, args[1:]...)...))
	}
	issued := func(name, cert, by string) {
		t.Helper()
		if err := harness.Certificate(t, cert).CheckSignatureFrom(harness.Certificate(t, by)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if status, body := b.Request(t, cert, strings.TrimSuffix(cert, ".pem")+"-key.pem", "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	// The key of the CA itself.
	renews(t, b, "ca.pem", "ca-key.pem")
	cert, key := b.Enroll(t, "worker-1")
	before := harness.Write(t, b.Dir+"/before/ca.pem", harness.Read(t, b.Dir+"/ca.pem"))
	certs("rotate-ca")
	issued("before it renews", cert, before)
	harness.Output(t, renew(t, b, cert, key))
	issued("renewed", cert, b.Dir+"/ca.pem") // its first certificate is the new CA's
	certs("renew", b.Dir+"/server.pem", b.Dir+"/admin.pem", b.Dir+"/public-keys.pem")
	certs("rotate-ca", "--finish")
	issued("the old CA is gone", cert, b.Dir+"/ca.pem")

	// A CA for nodes, without the key of the CA.
	if err := os.Rename(b.Dir+"/ca-key.pem", b.Dir+"/before/ca-key.pem"); err != nil {
		t.Fatal(err)
	}
	certs("node-ca")
	renews(t, b, "node-ca.pem", "node-ca-key.pem")
	harness.Output(t, renew(t, b, cert, key))
	issued("by the CA for nodes", cert, b.Dir+"/node-ca.pem")
	before = harness.Write(t, b.Dir+"/before/node-ca.pem", harness.Read(t, b.Dir+"/node-ca.pem"))
	certs("node-ca")
	issued("before it renews again", cert, before)
	cert2, key2 := cert, key
	harness.Output(t, renew(t, b, cert2, key2))
	issued("by the new CA for nodes", cert2, b.Dir+"/node-ca.pem")
	if out := certs("node-ca", "--finish"); !strings.Contains(out, "removed the old CA for nodes") {
		t.Error(out)
	}
	issued("the old CA for nodes is gone", cert2, b.Dir+"/node-ca.pem")
	if n := strings.Count(harness.Read(t, b.Dir+"/ca.pem"), "BEGIN CERTIFICATE"); n != 2 {
		t.Errorf("ca.pem has %d CAs", n)
	}
	// No rotation of the CA takes the CA for nodes with it.
	if err := os.Rename(b.Dir+"/before/ca-key.pem", b.Dir+"/ca-key.pem"); err != nil {
		t.Fatal(err)
	}
	certs("rotate-ca")
	certs("renew", b.Dir+"/server.pem", b.Dir+"/admin.pem", b.Dir+"/public-keys.pem")
	certs("rotate-ca", "--finish")
	issued("the CA was replaced", cert2, b.Dir+"/node-ca.pem")

	// A CA that is not trusted, and one whose key others can read.
	b.Process.Stop(t)
	serve := func() *exec.Cmd {
		return harness.Command(t, "copilot", "serve", "--config", b.Dir+"/copilot.toml", "--listen", b.Address)
	}
	trusted := harness.Read(t, b.Dir+"/ca.pem")
	harness.Write(t, b.Dir+"/ca.pem", trusted[:strings.Index(trusted, "-----END CERTIFICATE-----\n")+len("-----END CERTIFICATE-----\n")])
	harness.ExpectFailure(t, serve(), "node-ca", "is not in "+b.Dir+"/ca.pem")
	harness.Write(t, b.Dir+"/ca.pem", trusted)
	if err := os.Chmod(b.Dir+"/node-ca-key.pem", 0o644); err != nil {
		t.Fatal(err)
	}
	harness.ExpectFailure(t, serve(), "node-ca", "is readable by others")
}

// TestPilotRenews runs pilot with a certificate that expires soon, until after that.
func TestPilotRenews(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	harness.Output(t, harness.Command(t, "copilot", "certs", "node-ca", "--config-dir", b.Dir))
	renews(t, b, "node-ca.pem", "node-ca-key.pem")
	cert, key := b.Enroll(t, "worker-7", "--for", "45s")
	first := harness.Certificate(t, cert)
	home := b.Dir + "/node"
	p, _ := harness.StartPilot(t, home, b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key,
		"--kek-cache-size", "0", "--diff-listen", "off", "--admin-listen", "unix://"+home+"/admin.sock")
	k := harness.NewPilotClient(t, home)
	annotation, err := k.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// The mirror alone does the same.
	cert, key = b.Enroll(t, "mirror-1", "--for", "45s")
	mirrorHome := b.Dir + "/mirror"
	mirror := harness.Start(t, mirrorHome, "pilot-mirror", exec.Command("pilot", "mirror", "--config", "/dev/null", "--mirror-listen", loopbacktest.FreeAddress(t), "--mirror-secret-file", mirrorHome+"/secret",
		"--broker", b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--admin-listen", "unix://"+mirrorHome+"/admin.sock"))
	for time.Now().Before(first.NotAfter.Add(5 * time.Second)) {
		if err := k.Unwrap(t.Context(), annotation); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if p.Logged(t, "broker-cert renewed") == 0 || p.Logged(t, "level=warning") > 0 {
		t.Errorf("log:\n%s", harness.Read(t, p.Log))
	}
	if at := k.Metric(t, `pilot_cert_not_after_seconds{cert="broker-cert"}`); at <= float64(first.NotAfter.Unix()) {
		t.Errorf("the metric is %v", at)
	}
	harness.Await(t, "the mirror's renewal", func() error {
		if mirror.Logged(t, "broker-cert renewed") == 0 {
			return fmt.Errorf("log:\n%s", harness.Read(t, mirror.Log))
		}
		return nil
	})
	if at := harness.NewPilotClient(t, mirrorHome).Metric(t, `pilot_cert_not_after_seconds{cert="broker-cert"}`); at <= float64(first.NotAfter.Unix()) {
		t.Errorf("the mirror's metric is %v", at)
	}

	// If it is not renewed, the log says so, once for each reason.
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", "spiffe://example.com/node/worker-7", "team-a"))
	harness.Await(t, "the log says that it was not renewed", func() error {
		if p.Logged(t, "broker-cert not renewed") == 0 {
			return fmt.Errorf("log:\n%s", harness.Read(t, p.Log))
		}
		return nil
	})
}
