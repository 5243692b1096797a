package node

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestDoctorCauses examines nodes that get no KEK from their broker, each for another
// reason, and checks that the doctor names the fix, and the machine to run it on.
func TestDoctorCauses(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	cert, key := b.Enroll(t, "worker-7")
	ca := b.Dir + "/ca.pem"
	const restart = "on the broker's machine: systemctl restart copilot.service"
	n := 0
	// examine starts a pilot with those settings, examines it, and stops it.
	examine := func(kek string, settings ...string) (harness.DoctorReport, *harness.Process) {
		t.Helper()
		n++
		home := fmt.Sprintf("%s/node-%d", b.Dir, n)
		p := harness.Start(t, home, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock",
			"--diff-listen", "off", "--admin-listen", "unix://" + home + "/admin.sock", "--broker-timeout", "6s"}, settings...)...))
		harness.Await(t, "pilot", harness.Reachable(home+"/keyprovider.sock"))
		cmd := exec.Command("pilot", append([]string{"node", "doctor", "--json", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock",
			"--diff-listen", "off", "--containerd", "/nowhere/containerd.sock", "--broker-timeout", "6s", "--kek", kek}, settings...)...)
		out, _ := cmd.Output() // there is no containerd, so it fails
		r := harness.DoctorReport{Output: string(out)}
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		for _, s := range r.Steps {
			if s.Name == "key-provider" && s.Result != "ok" {
				t.Errorf("the key provider is %s: %s", s.Result, s.Detail)
			}
		}
		if warnings := p.Logged(t, "request failed"); warnings > 0 {
			t.Errorf("the doctor has left %d warnings in pilot's log:\n%s", warnings, harness.Read(t, p.Log))
		}
		if metrics := harness.Output(t, harness.Command(t, "curl", "-s", "--unix-socket", home+"/admin.sock", "http://pilot/metrics")); !strings.Contains(metrics, `pilot_key_requests_total{operation="unwrap",result="NotFound"} 0`) {
			t.Error("no metric of key requests")
		} else {
			for line := range strings.Lines(metrics) {
				if strings.HasPrefix(line, "pilot_key_requests_total") && !strings.HasSuffix(line, " 0\n") {
					t.Errorf("the doctor was counted: %s", line)
				}
			}
		}
		p.Stop(t)
		return r, p
	}
	identified := func(cert, key, ca string) []string {
		return []string{"--broker", b.URL(), "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key}
	}
	step := func(r harness.DoctorReport, name string) (result, detail string, fix []string) {
		for _, s := range r.Steps {
			if s.Name == name {
				return s.Result, s.Detail, s.Fix
			}
		}
		t.Errorf("no step %s in\n%s", name, r.Output)
		return "", "", nil
	}

	good, _ := examine("team-a", identified(cert, key, ca)...)
	for _, name := range []string{"broker", "certificates"} {
		if result, detail, _ := step(good, name); result != "ok" {
			t.Errorf("%s: %s", name, detail)
		}
	}

	expired, expiredKey := b.Enroll(t, "expired", "--for", "1s")
	harness.Await(t, "it expires", func() error {
		if time.Now().Before(harness.Certificate(t, expired).NotAfter.Add(time.Second)) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	early := notYetValid(t, b)
	other := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", other, "--dir", other+"/store", "--host", "127.0.0.1", "--trust-domain", "example.com"))
	harness.Output(t, harness.Command(t, "copilot", "enroll", "--config-dir", other, "--out", other, "stranger"))
	b.SetPolicy(t, strings.Replace(harness.Read(t, b.Dir+"/policy.toml"), `keks = ["**"]`, `keks = ["team-a", "absent"]`, 1))
	harness.Output(t, b.Command(t, "keys", "create", "team-b"))
	_, port, _ := strings.Cut(b.Address, ":")
	for name, test := range map[string]struct {
		kek      string
		settings []string
		detail   string
		fix      string
	}{
		"expired":       {"team-a", identified(expired, expiredKey, ca), "broker-cert has expired", "on the broker's machine: copilot certs renew expired.pem"},
		"not yet valid": {"team-a", identified(early, key, ca), "broker-cert is not valid yet", "date -u (on this machine and on the broker's: compare the clocks)"},
		"another CA's":  {"team-a", identified(other+"/stranger.pem", other+"/stranger-key.pem", ca), "the broker does not accept broker-cert", "openssl x509 -noout -issuer -subject -dates -in " + other + "/stranger.pem"},
		"wrong CA":      {"team-a", identified(cert, key, other+"/ca.pem"), "unknown authority", "copy /etc/copilot/ca.pem of the broker's machine to " + other + "/ca.pem"},
		"wrong name": {"team-a", []string{"--broker", "https://localhost:" + port, "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key},
			"localhost", "correct broker in /dev/null: its certificate is for 127.0.0.1"},
		"DNS": {"team-a", []string{"--broker", "https://copilot.invalid:" + port, "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key},
			"copilot.invalid", "getent hosts copilot.invalid"},
		"refused": {"team-a", []string{"--broker", "https://" + loopbacktest.FreeAddress(t), "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key},
			"connection refused", restart},
		"plain":     {"team-a", []string{"--broker", "http://" + b.Address}, "", "on the broker's machine: journalctl -u copilot.service -n 30"},
		"forbidden": {"team-b", identified(cert, key, ca), "not allowed", "on the broker's machine: copilot policy check spiffe://example.com/node/worker-7 team-b unwrap"},
		"absent":    {"absent", identified(cert, key, ca), "no such KEK", "on the broker's machine: copilot keys create absent"},
	} {
		r, _ := examine(test.kek, test.settings...)
		result, detail, fix := step(r, "broker")
		if result != "failed" || !strings.Contains(detail, test.detail) || !slices.Contains(fix, test.fix) {
			t.Errorf("%s: %s %s, want %q; fix %q, want %q", name, result, detail, test.detail, fix, test.fix)
		}
		if test.fix != restart && slices.Contains(fix, restart) {
			t.Errorf("%s: it has the broker of all nodes restarted", name)
		}
	}

	// Certificates that expire soon, and one that has expired.
	soon, soonKey := b.Enroll(t, "soon", "--for", "10d")
	harness.Output(t, harness.Command(t, "copilot", "certs", "renew", "--config-dir", b.Dir, "--for", "10d", b.Dir+"/server.pem"))
	r, _ := examine("team-a", identified(soon, soonKey, ca)...)
	result, detail, fix := step(r, "certificates")
	if result != "warning" || !strings.Contains(detail, "broker-cert expires on") || !slices.Contains(fix, "pilot node renew") || !slices.Contains(fix, "on the broker's machine: copilot certs renew /etc/copilot/server.pem") {
		t.Errorf("%s %s: %q", result, detail, fix)
	}
	if slices.Contains(fix, "on the broker's machine: copilot certs rotate-ca") {
		t.Error("the CA lasts for years")
	}
	r, _ = examine("team-a", identified(expired, expiredKey, ca)...)
	if result, detail, fix := step(r, "certificates"); result != "failed" || !strings.Contains(detail, "broker-cert has expired on") || slices.Contains(fix, "pilot node renew") {
		t.Errorf("%s %s: %q", result, detail, fix)
	}
	harness.Output(t, harness.Command(t, "copilot", "certs", "rotate-ca", "--config-dir", b.Dir, "--for", "10d"))
	first, _, _ := strings.Cut(harness.Read(t, ca), "-----END CERTIFICATE-----\n")
	r, _ = examine("team-a", identified(cert, key, harness.Write(t, b.Dir+"/short/ca.pem", first+"-----END CERTIFICATE-----\n"))...)
	if result, detail, fix := step(r, "certificates"); result != "warning" || !strings.Contains(detail, "broker-ca expires on") || !slices.Contains(fix, "on the broker's machine: copilot certs rotate-ca") {
		t.Errorf("%s %s: %q", result, detail, fix)
	}
}

// notYetValid makes a certificate for the key of worker-7 that is valid from tomorrow on.
func notYetValid(t *testing.T, b *harness.TLSBroker) (file string) {
	t.Helper()
	block, _ := pem.Decode([]byte(harness.Read(t, b.Dir+"/ca-key.pem")))
	caKey, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	today := harness.Certificate(t, b.Dir+"/worker-7.pem")
	tomorrow := *today
	tomorrow.SerialNumber, tomorrow.NotBefore = big.NewInt(7), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &tomorrow, harness.Certificate(t, b.Dir+"/ca.pem"), today.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	return harness.Write(t, b.Dir+"/early.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// TestDoctorNamesDestroyedVersion requests a KEK version that was destroyed.
func TestDoctorNamesDestroyedVersion(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	cert, key := b.Enroll(t, "worker-7")
	home := b.Dir + "/node"
	harness.StartPilot(t, home, b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--kek-cache-size", "0", "--diff-listen", "off")
	k := harness.NewPilotClient(t, home)
	annotation, err := k.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	harness.Output(t, b.Command(t, "keys", "rotate", "team-a"))
	harness.Output(t, b.Command(t, "keys", "destroy", "--key-version", "1", "--after", "0s", "--yes", "team-a"))
	if err := k.Unwrap(t.Context(), annotation); err == nil || !strings.Contains(err.Error(), "no such KEK version 1: it was destroyed") || strings.Contains(err.Error(), "keys create") {
		t.Errorf("a destroyed version: %v", err)
	}
}
