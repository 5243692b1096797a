package server_test

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// TestSilentConnections opens many connections that send nothing, or only their hello:
// they delay no other.
func TestSilentConnections(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	ca := certtest.NewAuthority(t)
	address := serveTLS(t, dir, ca, server.Config{
		TLSClientCA: ca.File, Policy: writeFile(t, dir+"/policy.toml", accessPolicy),
	})
	for i := range 40 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if i%2 == 0 {
			// It sends its hello, and does not read the answer.
			go tls.Client(helloOnly{conn}, &tls.Config{InsecureSkipVerify: true}).Handshake()
		}
	}
	files := ca.Issue(t, spiffe("/node/7"))
	// If they had the turns, the broker would refuse this one.
	newRemote(t, address, ca, &files).want(t, 200, "GET", "/api/v2/keks/team-a/key", "")
}

// helloOnly is a connection of a client that reads nothing.
type helloOnly struct{ net.Conn }

func (helloOnly) Read([]byte) (int, error) { select {} }
