package integration

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

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestDoctorCauses examines nodes that get no KEK from their broker, each for a reason of
// its own, and looks whether what it says mends that, on the right machine.
func TestDoctorCauses(t *testing.T) {
	t.Parallel()
	b := initialized(t, "team-a")
	cert, key := b.enroll(t, "worker-7")
	ca := b.dir + "/ca.pem"
	const restart = "on the broker's machine: systemctl restart copilot.service"
	n := 0
	// examine starts a pilot with those settings, examines it, and stops it.
	examine := func(kek string, settings ...string) (report, *process) {
		t.Helper()
		n++
		home := fmt.Sprintf("%s/node-%d", b.dir, n)
		p := start(t, home, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock",
			"--diff-listen", "off", "--admin-listen", "unix://" + home + "/admin.sock", "--broker-timeout", "3s"}, settings...)...))
		await(t, "pilot", answers(home+"/keyprovider.sock"))
		cmd := exec.Command("pilot", append([]string{"node", "doctor", "--json", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock",
			"--diff-listen", "off", "--containerd", "/nowhere/containerd.sock", "--broker-timeout", "3s", "--kek", kek}, settings...)...)
		out, _ := cmd.Output() // there is no containerd, so it fails
		r := report{text: string(out)}
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		for _, s := range r.Steps {
			if s.Name == "key-provider" && s.Result != "ok" {
				t.Errorf("the key provider is %s: %s", s.Result, s.Detail)
			}
		}
		if warnings := p.logged(t, "request failed"); warnings > 0 {
			t.Errorf("the doctor has left %d warnings in pilot's log:\n%s", warnings, read(t, p.log))
		}
		if metrics := output(t, command(t, "curl", "-s", "--unix-socket", home+"/admin.sock", "http://pilot/metrics")); !strings.Contains(metrics, `pilot_key_requests_total{operation="unwrap",result="NotFound"} 0`) {
			t.Error("no metric of key requests")
		} else {
			for line := range strings.Lines(metrics) {
				if strings.HasPrefix(line, "pilot_key_requests_total") && !strings.HasSuffix(line, " 0\n") {
					t.Errorf("the doctor was counted: %s", line)
				}
			}
		}
		p.stop(t)
		return r, p
	}
	identified := func(cert, key, ca string) []string {
		return []string{"--broker", b.url(), "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key}
	}
	step := func(r report, name string) (result, detail string, mend []string) {
		for _, s := range r.Steps {
			if s.Name == name {
				return s.Result, s.Detail, s.Mend
			}
		}
		t.Errorf("no step %s in\n%s", name, r.text)
		return "", "", nil
	}

	good, _ := examine("team-a", identified(cert, key, ca)...)
	for _, name := range []string{"broker", "certificates"} {
		if result, detail, _ := step(good, name); result != "ok" {
			t.Errorf("%s: %s", name, detail)
		}
	}

	expired, expiredKey := b.enroll(t, "expired", "--for", "1s")
	await(t, "it expires", func() error {
		if time.Now().Before(certificate(t, expired).NotAfter.Add(time.Second)) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	early := notYetValid(t, b)
	other := tempDir(t)
	output(t, command(t, "copilot", "init", "--config-dir", other, "--dir", other+"/store", "--host", "127.0.0.1", "--trust-domain", "example.com"))
	output(t, command(t, "copilot", "enroll", "--config-dir", other, "--out", other, "stranger"))
	write(t, b.dir+"/policy.toml", strings.Replace(read(t, b.dir+"/policy.toml"), `keks = ["**"]`, `keks = ["team-a", "absent"]`, 1))
	output(t, b.command(t, "keys", "create", "team-b"))
	await(t, "the policy counts", func() error {
		if status, body := b.as(t, cert, key, "GET", "/api/v2/keks/team-b/key", ""); status != 403 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	_, port, _ := strings.Cut(b.address, ":")
	for name, test := range map[string]struct {
		kek      string
		settings []string
		detail   string
		mend     string
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
		"plain":     {"team-a", []string{"--broker", "http://" + b.address}, "", "on the broker's machine: journalctl -u copilot.service -n 30"},
		"forbidden": {"team-b", identified(cert, key, ca), "not allowed", "on the broker's machine: copilot policy check spiffe://example.com/node/worker-7 team-b export"},
		"absent":    {"absent", identified(cert, key, ca), "no such KEK", "on the broker's machine: copilot keys create absent"},
	} {
		r, _ := examine(test.kek, test.settings...)
		result, detail, mend := step(r, "broker")
		if result != "failed" || !strings.Contains(detail, test.detail) || !slices.Contains(mend, test.mend) {
			t.Errorf("%s: %s %s, want %q; mend %q, want %q", name, result, detail, test.detail, mend, test.mend)
		}
		if test.mend != restart && slices.Contains(mend, restart) {
			t.Errorf("%s: it has the broker of all nodes restarted", name)
		}
	}

	// Certificates that end soon, and one that has ended.
	soon, soonKey := b.enroll(t, "soon", "--for", "10d")
	output(t, command(t, "copilot", "certs", "renew", "--config-dir", b.dir, "--for", "10d", b.dir+"/server.pem"))
	r, _ := examine("team-a", identified(soon, soonKey, ca)...)
	result, detail, mend := step(r, "certificates")
	if result != "warning" || !strings.Contains(detail, "broker-cert expires on") || !slices.Contains(mend, "pilot node renew") || !slices.Contains(mend, "on the broker's machine: copilot certs renew /etc/copilot/server.pem") {
		t.Errorf("%s %s: %q", result, detail, mend)
	}
	if slices.Contains(mend, "on the broker's machine: copilot certs rotate-ca") {
		t.Error("the CA lasts for years")
	}
	r, _ = examine("team-a", identified(expired, expiredKey, ca)...)
	if result, detail, mend := step(r, "certificates"); result != "failed" || !strings.Contains(detail, "broker-cert has expired on") || slices.Contains(mend, "pilot node renew") {
		t.Errorf("%s %s: %q", result, detail, mend)
	}
	output(t, command(t, "copilot", "certs", "rotate-ca", "--config-dir", b.dir, "--for", "10d"))
	first, _, _ := strings.Cut(read(t, ca), "-----END CERTIFICATE-----\n")
	r, _ = examine("team-a", identified(cert, key, write(t, b.dir+"/short/ca.pem", first+"-----END CERTIFICATE-----\n"))...)
	if result, detail, mend := step(r, "certificates"); result != "warning" || !strings.Contains(detail, "broker-ca expires on") || !slices.Contains(mend, "on the broker's machine: copilot certs rotate-ca") {
		t.Errorf("%s %s: %q", result, detail, mend)
	}
}

// notYetValid makes a certificate for the key of worker-7 that is valid from tomorrow on.
func notYetValid(t *testing.T, b *madeBroker) (file string) {
	t.Helper()
	block, _ := pem.Decode([]byte(read(t, b.dir+"/ca-key.pem")))
	caKey, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	today := certificate(t, b.dir+"/worker-7.pem")
	tomorrow := *today
	tomorrow.SerialNumber, tomorrow.NotBefore = big.NewInt(7), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &tomorrow, certificate(t, b.dir+"/ca.pem"), today.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, b.dir+"/early.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// TestDestroyedVersion asks for a version of a KEK that is gone.
func TestDestroyedVersion(t *testing.T) {
	t.Parallel()
	b := initialized(t, "team-a")
	cert, key := b.enroll(t, "worker-7")
	home := b.dir + "/node"
	pilot(t, home, b.url(), "--broker-ca", b.dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--kek-cache-size", "0", "--diff-listen", "off")
	k := askPilot(t, home)
	annotation, err := k.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	output(t, b.command(t, "keys", "rotate", "team-a"))
	output(t, b.command(t, "keys", "destroy", "--key-version", "1", "--after", "0s", "--yes", "team-a"))
	if err := k.unwrap(t.Context(), annotation); err == nil || !strings.Contains(err.Error(), "no such KEK version 1: it was destroyed") || strings.Contains(err.Error(), "keys create") {
		t.Errorf("a destroyed version: %v", err)
	}
}
