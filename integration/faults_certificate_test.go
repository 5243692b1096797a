package integration

import (
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestCertificatesExpire lets pilot's and copilot's certificates expire while
// both run, and replaces them.
func TestCertificatesExpire(t *testing.T) {
	t.Parallel()
	b := initialized(t, "team-a")
	cert, key := b.enroll(t, "worker-7", "--for", "15s")
	home := b.dir + "/node"
	pilot(t, home, b.url(), "--broker-ca", b.dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key, "--broker-timeout", "10s",
		"--kek-cache-size", "0", "--diff-listen", "off", "--admin-listen", "unix://"+home+"/admin.sock")
	k := askPilot(t, home)
	annotation, err := k.wrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	goroutines, files := k.metric(t, "go_goroutines"), k.metric(t, "process_open_fds")

	// replace makes a certificate anew, as its holder does in time or late.
	replace := func(name string, args ...string) {
		t.Helper()
		for _, file := range []string{b.dir + "/" + name + "-key.pem", b.dir + "/" + name + ".pem"} {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		b.enroll(t, name, args...)
	}
	// expires asks until pilot gives the error, and never another.
	expires := func(what string, want ...string) {
		t.Helper()
		for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			err := k.unwrap(t.Context(), annotation)
			if err == nil && time.Now().Before(end) {
				continue
			}
			for _, w := range append(want, `KEK "team-a"`, "copilot at "+b.url()) {
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
		await(t, what, func() error { return k.unwrap(t.Context(), annotation) })
		if took := time.Since(start); took > patience/4 {
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
		if err := k.unwrap(t.Context(), annotation); err != nil {
			t.Fatalf("pilot's certificate was replaced in time: %v", err)
		}
	}

	// Nor do many at once, each of which has to send something.
	ciCert, ciKey := b.enroll(t, "builder", "--role", "ci", "--for", soonOver)
	pilot(t, b.dir+"/ci", b.url(), "--broker-ca", b.dir+"/ca.pem", "--broker-cert", ciCert, "--broker-key", ciKey, "--diff-listen", "off")
	ci := askPilot(t, b.dir+"/ci")
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 50 {
				if _, err := ci.wrap(t.Context()); err != nil {
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
	k.flat(t, "go_goroutines", goroutines)
	k.flat(t, "process_open_fds", files)
}
