package server_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"testing"

	copilot "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// benchmarkPolicy has no limit that a benchmark reaches.
const benchmarkPolicy = accessPolicy + `
[[limit]]
identities = ["**"]
per-second = 1e6
burst = 1000000
`

// BenchmarkRequest has a broker describe a KEK to a client with a certificate, on one connection or
// on one for each request. The audit log goes nowhere, so that no disk is measured.
func BenchmarkRequest(b *testing.B) {
	for name, closes := range map[string]bool{"same connection": false, "new connections": true} {
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			create(b, dir, map[string][]byte{"team-a": nil})
			ca := certtest.NewAuthority(b)
			address := serveTLS(b, dir, ca, copilot.Config{TLSClientCA: ca.File, AuditLog: "/dev/null", Policy: writeFile(b, dir+"/policy.toml", benchmarkPolicy)})
			files := ca.Issue(b, spiffe("/node/7"))
			pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
			if err != nil {
				b.Fatal(err)
			}
			client := http.Client{Transport: &http.Transport{
				TLSClientConfig: &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{pair}}, DisableKeepAlives: closes,
			}}
			for b.Loop() {
				resp, err := client.Get("https://" + address + "/api/v2/keks/team-a")
				if err != nil {
					b.Fatal(err)
				}
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					b.Fatalf("%s: %s", resp.Status, body)
				}
			}
		})
	}
}
