package broker

import (
	"crypto/tls"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/integration/harness"
)

// TestCertificatesRenewed renews the certificates of a copilot that runs, and
// replaces its CA, while a node uses it.
func TestCertificatesRenewed(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	node, key := b.Enroll(t, "worker-7")
	certs := func(verb string, args ...string) string {
		return harness.Output(t, harness.Command(t, "copilot", append([]string{"certs", verb, "--config-dir", b.Dir}, args...)...))
	}
	works := func(when string) {
		t.Helper()
		if status, body := b.Request(t, node, key, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			t.Errorf("%s: %d %s", when, status, body)
		}
	}
	// The serial number that copilot shows is the one in its file.
	shown := func(when string) {
		t.Helper()
		want, err := pki.ReadCertificate(b.Dir + "/server.pem")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := tls.Dial("tcp", b.Address, &tls.Config{InsecureSkipVerify: true}) // only its serial number is read
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := conn.ConnectionState().PeerCertificates[0].SerialNumber; got.Cmp(want.SerialNumber) != 0 {
			t.Errorf("%s: copilot shows certificate %v, and its file has %v", when, got, want.SerialNumber)
		}
	}
	works("at first")

	// As a service with a user of its own would have it.
	const user = 12345
	for _, name := range []string{"server.pem", "server-key.pem"} {
		if err := os.Chown(b.Dir+"/"+name, user, user); err != nil {
			t.Fatal(err)
		}
	}
	before := harness.Read(t, b.Dir+"/server-key.pem")
	certs("renew", b.Dir+"/server.pem", node)
	if harness.Read(t, b.Dir+"/server-key.pem") != before {
		t.Error("the private key was replaced")
	}
	shown("renewed")
	works("renewed")
	certs("renew", "--new-key", b.Dir+"/server.pem", node)
	if harness.Read(t, b.Dir+"/server-key.pem") == before {
		t.Error("the private key was not replaced")
	}
	shown("renewed, with a new key")
	works("renewed, with a new key")
	for name, mode := range map[string]os.FileMode{"server.pem": 0o644, "server-key.pem": 0o600} {
		info, err := os.Stat(b.Dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if owner := info.Sys().(*syscall.Stat_t); owner.Uid != user || owner.Gid != user || info.Mode() != mode {
			t.Errorf("%s belongs to %d:%d, mode %v", name, owner.Uid, owner.Gid, info.Mode())
		}
	}

	expiry := func(cert string) string {
		t.Helper()
		_, text := harness.RequestOverSocket(t, b.Dir+"/store/admin.sock", "GET", "/metrics", "")
		found := regexp.MustCompile(fmt.Sprintf(`copilot_cert_not_after_seconds\{cert=%q\} (\S+)`, cert)).FindStringSubmatch(text)
		if found == nil {
			t.Fatalf("no copilot_cert_not_after_seconds for %s", cert)
		}
		return found[1]
	}
	was := expiry("tls-cert")
	certs("renew", "--for", "30d", b.Dir+"/server.pem")
	if is := expiry("tls-cert"); is == was {
		t.Errorf("the metric is still %s", is)
	}
	expiry("tls-client-ca")

	// The node trusts the new ca.pem before it is given a certificate of the new CA.
	certs("rotate-ca")
	works("with both CAs")
	certs("renew", b.Dir+"/server.pem")
	works("copilot's certificate is the new CA's, the node's the old CA's")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "certs", "rotate-ca", "--config-dir", b.Dir, "--finish"), "worker-7.pem was not issued by the new CA", "admin.pem was not issued by the new CA")
	old := harness.Write(t, b.Dir+"/before/worker-7.pem", harness.Read(t, node))
	certs("renew", node, b.Dir+"/admin.pem", b.Dir+"/public-keys.pem")
	works("all certificates are the new CA's")
	if out := certs("rotate-ca", "--finish"); !strings.Contains(out, "removed the old CA") {
		t.Error(out)
	}
	works("the old CA is gone")
	if status, body := b.Request(t, old, key, "GET", "/api/v2/keks/team-a/key", ""); status != 0 {
		t.Errorf("a certificate of the old CA: %d %s", status, body)
	}
}
