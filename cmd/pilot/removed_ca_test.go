package main

import (
	"crypto/tls"
	"os"
	"slices"
	"testing"
	"time"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestRemovedCACountsOnOpenConnections takes the CA of one of two clients out of
// tls-client-ca while both are connected: none of its calls is answered any more, and
// those of the other are.
func TestRemovedCACountsOnOpenConnections(t *testing.T) {
	t.Parallel()
	stays, goes := certtest.NewAuthority(t), certtest.NewAuthority(t)
	url, _ := startBroker(t)
	address := loopbacktest.FreeAddress(t)
	server := stays.Issue(t, certtest.Named("pilot"))
	read := func(name string) []byte {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	clients := t.TempDir() + "/clients.pem"
	write := func(b []byte) {
		t.Helper()
		// As a whole, as "copilot certs" and configuration management do.
		if err := os.WriteFile(clients+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(clients+".new", clients); err != nil {
			t.Fatal(err)
		}
	}
	write(slices.Concat(read(stays.File), read(goes.File)))
	startServe(t, address, "--tls-cert", server.Cert, "--tls-key", server.Key, "--tls-client-ca", clients, "--broker", url)

	connect := func(ca *certtest.Authority) *grpc.ClientConn {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: stays.Pool(), Certificates: []tls.Certificate{clientOf(t, ca)}})))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	call := func(conn *grpc.ClientConn) error {
		input := []byte(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["dGVhbS1h"]}},"optsdata":"c2VjcmV0"}}`)
		_, err := ocicryptpb.NewKeyProviderServiceClient(conn).WrapKey(t.Context(), &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: input})
		return err
	}
	staying, going := connect(stays), connect(goes)
	for _, conn := range []*grpc.ClientConn{staying, going} {
		if err := call(conn); err != nil {
			t.Fatal(err)
		}
	}
	write(read(stays.File))
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := call(going)
		if status.Code(err) == codes.Unauthenticated {
			break
		}
		if err != nil || time.Now().After(end) {
			t.Fatalf("the removed CA's client: %v, want Unauthenticated", err)
		}
	}
	if err := call(staying); err != nil {
		t.Errorf("the other client: %v", err)
	}
	// An unusable file changes nothing.
	write([]byte("no certificate"))
	if err := call(staying); err != nil {
		t.Errorf("the other client, while the file is unusable: %v", err)
	}
}
