package faults

import (
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestCertificatesExpire lets pilot's and copilot's certificates expire while
// both run, and replaces them.
func TestCertificatesExpire(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	cert, key := b.Enroll(t, "worker-7", "--for", "15s")
	home := b.Dir + "/node"
	harness.StartPilot(t, home, b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--broker-timeout", "10s",
		"--kek-cache-size", "0", "--diff-listen", "off", "--admin-listen", "unix://"+home+"/admin.sock")
	k := harness.NewPilotClient(t, home)
	annotation, err := k.Wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	goroutines, files := k.Metric(t, "go_goroutines"), k.Metric(t, "process_open_fds")

	// replace makes a certificate anew, as its holder does in time or late.
	replace := func(name string, args ...string) {
		t.Helper()
		for _, file := range []string{b.Dir + "/" + name + "-key.pem", b.Dir + "/" + name + ".pem"} {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		b.Enroll(t, name, args...)
	}
	// expires asks until pilot gives the error, and never another.
	expires := func(what string, want ...string) {
		t.Helper()
		for end := time.Now().Add(harness.Timeout); ; time.Sleep(50 * time.Millisecond) {
			err := k.Unwrap(t.Context(), annotation)
			if err == nil && time.Now().Before(end) {
				continue
			}
			for _, w := range append(want, `KEK "team-a"`, "copilot at "+b.URL()) {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Fatalf("%s expired: %v, want %q", what, err, w)
				}
			}
			return
		}
	}
	// soon is when a failure is forgotten.
	soon := func(what string) {
		t.Helper()
		start := time.Now()
		harness.Await(t, what, func() error { return k.Unwrap(t.Context(), annotation) })
		if took := time.Since(start); took > harness.Timeout/4 {
			t.Errorf("%s: it took %s", what, took)
		}
	}
	expires("pilot's certificate", "broker-cert", "expired", "copilot certs renew")
	// copilot keeps no connection for a certificate that ends within three minutes.
	const soonOver = "170s"
	begin := time.Now()
	const short = 15 * time.Second
	replace("worker-7", "--for", short.String())
	soon("pilot has a new certificate")

	// Replaced in time: no request notices, though there is always one on the
	// connection.
	replace("worker-7", "--for", soonOver)
	for end := begin.Add(short + 5*time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err := k.Unwrap(t.Context(), annotation); err != nil {
			t.Fatalf("pilot's certificate was replaced in time: %v", err)
		}
	}

	// Nor do many at once, each of which has to send something.
	ciCert, ciKey := b.Enroll(t, "builder", "--role", "ci", "--for", soonOver)
	harness.StartPilot(t, b.Dir+"/ci", b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", ciCert, "--broker-key", ciKey, "--diff-listen", "off")
	ci := harness.NewPilotClient(t, b.Dir+"/ci")
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 50 {
				if _, err := ci.Wrap(t.Context()); err != nil {
					t.Errorf("wrap with a certificate that ends soon: %v", err)
					return
				}
			}
		})
	}
	callers.Wait()

	replace("worker-7", "--for", soonOver)
	replace("server", "--host", "127.0.0.1", "--for", "15s")
	expires("copilot's certificate", "the broker's certificate", "expired")
	replace("server", "--host", "127.0.0.1", "--for", "10m")
	soon("copilot has a new certificate")
	k.CheckLeaks(t, "go_goroutines", goroutines)
	k.CheckLeaks(t, "process_open_fds", files)
}
