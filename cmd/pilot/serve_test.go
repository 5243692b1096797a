package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// startBroker runs a broker that has the KEK team-a.
func startBroker(t *testing.T) (url, auditLog string) {
	t.Helper()
	dir := t.TempDir()
	servertest.CreateKEKs(t, dir, "team-a")
	url = servertest.Serve(t, server.Config{Dir: dir})
	return url, filepath.Join(dir, "audit.log")
}

// startServe runs "pilot serve" at an address until the test ends, when it must stop
// without an error.
func startServe(t *testing.T, listen string, args ...string) *os.Process {
	t.Helper()
	return startServeIn(t, nil, listen, args...)
}

// startServeIn runs it with variables, such as PILOT_LOG_LEVEL=debug.
func startServeIn(t *testing.T, variables []string, listen string, args ...string) *os.Process {
	t.Helper()
	config := filepath.Join(t.TempDir(), "pilot.toml") // not this machine's
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command("pilot", append([]string{"serve", "--config", config, "--listen", listen, "--diff-listen", "off"}, args...)...)
	cmd.Stderr = &said
	// Under -race a program sleeps for a second before it exits.
	cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0"), variables...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("pilot serve: %v", err)
		}
		if t.Failed() {
			t.Logf("pilot serve said: %s", said.Bytes())
		}
	})
	network, address := "tcp", listen
	if path, ok := strings.CutPrefix(listen, "unix://"); ok {
		network, address = "unix", path
	}
	for range 6000 { // a minute
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
			return cmd.Process
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("pilot serve does not start")
	return nil
}

// ask has a layer key wrapped.
func ask(t *testing.T, address string, creds credentials.TransportCredentials) error {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	input := []byte(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["dGVhbS1h"]}},"optsdata":"c2VjcmV0"}}`)
	out, err := ocicryptpb.NewKeyProviderServiceClient(conn).WrapKey(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: input})
	if err == nil && !strings.Contains(string(out.GetKeyProviderKeyWrapProtocolOutput()), "annotation") {
		t.Errorf("answered %s", out.GetKeyProviderKeyWrapProtocolOutput())
	}
	return err
}

// TestServeOverTCPNeedsAClientCertificate has clients with and without one.
func TestServeOverTCPNeedsAClientCertificate(t *testing.T) {
	t.Parallel()
	ca, other := certtest.NewAuthority(t), certtest.NewAuthority(t)
	url, auditLog := startBroker(t)
	address := loopbacktest.FreeAddress(t)
	server := ca.Issue(t, certtest.Named("pilot"))
	startServe(t, address, "--tls-cert", server.Cert, "--tls-key", server.Key, "--tls-client-ca", ca.File, "--broker", url, "--kek-cache-size", "0")

	right := &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{clientOf(t, ca)}}
	if err := ask(t, address, credentials.NewTLS(right)); err != nil {
		t.Fatalf("with a certificate: %v", err)
	}
	for name, creds := range map[string]credentials.TransportCredentials{
		"without a certificate":          credentials.NewTLS(&tls.Config{RootCAs: ca.Pool()}),
		"with another CA's certificate":  credentials.NewTLS(&tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{clientOf(t, other)}}),
		"with another CA for the server": credentials.NewTLS(&tls.Config{RootCAs: other.Pool(), Certificates: right.Certificates}),
		"without TLS":                    insecure.NewCredentials(),
	} {
		if err := ask(t, address, creds); err == nil {
			t.Errorf("%s: it is answered", name)
		}
	}
	log, err := os.ReadFile(auditLog)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(log), `"action":"export"`); n != 1 {
		t.Errorf("the broker was asked %d times, want once, for the one with a certificate", n)
	}
}

// TestServeNeedsNoCertificateLocally has a unix socket and a loopback address.
func TestServeNeedsNoCertificateLocally(t *testing.T) {
	t.Parallel()
	url, _ := startBroker(t)
	socket := filepath.Join(t.TempDir(), "run", "s")
	startServe(t, "unix://"+socket, "--broker", url)
	if err := ask(t, "unix://"+socket, insecure.NewCredentials()); err != nil {
		t.Errorf("on a socket: %v", err)
	}
	if info, err := os.Stat(socket); err != nil {
		t.Error(err)
	} else if info.Mode().Perm() != 0o600 {
		t.Errorf("others may use the socket: mode %s", info.Mode())
	}

	address := loopbacktest.FreeAddress(t)
	startServe(t, address, "--insecure-loopback", "--broker", url)
	if err := ask(t, address, insecure.NewCredentials()); err != nil {
		t.Errorf("on a loopback address: %v", err)
	}
}

// TestServeUsesTheNextBroker has the first of two brokers be down.
func TestServeUsesTheNextBroker(t *testing.T) {
	t.Parallel()
	url, _ := startBroker(t)
	socket := filepath.Join(t.TempDir(), "s")
	startServe(t, "unix://"+socket, "--broker", "http://"+loopbacktest.FreeAddress(t)+", "+url)
	if err := ask(t, "unix://"+socket, insecure.NewCredentials()); err != nil {
		t.Error(err)
	}
}

// clientOf returns a client's certificate.
func clientOf(t *testing.T, ca *certtest.Authority) tls.Certificate {
	t.Helper()
	files := ca.Issue(t, certtest.Named("node"))
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestDoneBeforeItServes has SIGTERM come between listening and serving.
func TestDoneBeforeItServes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, done := context.WithCancel(t.Context())
	done()
	s := grpc.NewServer()
	s.Stop()
	var g errgroup.Group
	if serveUntilDone(ctx, &g, s, l); g.Wait() != nil {
		t.Error(g.Wait())
	}
}
