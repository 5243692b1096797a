package kms

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestWrapLimitInKMS wraps as many keys as a version may with KEKs that copilot
// does not rotate. In AWS, which uses a key of its own for each, there is no
// limit. With a transit key, which copilot may not rotate here, there is one, and
// a rotation in Vault begins anew.
func TestWrapLimitInKMS(t *testing.T) {
	harness.Long(t)
	aws := newLocalKMS(t)
	aws.start(1)
	v := harness.NewVault(t)
	v.Write("transit/keys/team-b", "{}")
	dir := harness.TempDir(t)
	const limit = 2048
	file := harness.Write(t, dir+"/copilot.toml", fmt.Sprintf(`
dir = %q
listen = ["unix://%[1]s/copilot.sock"]
wrap-limit = %d
[backends.aws]
type = "aws-kms"
region = "eu-central-1"
endpoint = %q
[keks."team-a"]
backend = "aws"
path = "alias/a"
[backends.transit]
type = "vault-transit"
address = %q
%s
[keks."team-b"]
backend = "transit"
path = "team-b"
`, dir, limit, aws.url, v.URL, v.Token("vault-transit")))
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(dir+"/copilot.sock"))

	client := http.Client{Timeout: harness.Timeout, Transport: &http.Transport{MaxIdleConnsPerHost: 8, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/admin.sock") // which has no rate limit
	}}}
	defer client.CloseIdleConnections()
	wrap := func(kek string) (int, string) {
		resp, err := client.Post("http://copilot/api/v2/keks/"+kek+"/wrap", "application/json", strings.NewReader(`{"plaintext":"c2VjcmV0"}`))
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err.Error()
		}
		return resp.StatusCode, string(b)
	}
	wraps := func(kek string, times int) {
		t.Helper()
		var left atomic.Int32
		left.Store(int32(times))
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for left.Add(-1) >= 0 {
					if status, answer := wrap(kek); status != 200 || !strings.Contains(answer, `"version":1`) {
						t.Errorf("%s: %d %s", kek, status, answer)
						left.Store(0)
					}
				}
			})
		}
		all.Wait()
	}
	wraps("team-a", limit+100)
	wraps("team-b", limit)
	for range 2 {
		if status, answer := wrap("team-b"); status != 409 || !strings.Contains(answer, "rotate it in its KMS") || strings.Contains(answer, "transit/") {
			t.Errorf("full: %d %s", status, answer)
		}
	}
	v.Write("transit/keys/team-b/rotate", "{}")
	if status, answer := wrap("team-b"); status != 200 || !strings.Contains(answer, `"version":2`) {
		t.Errorf("rotated in Vault: %d %s", status, answer)
	}
}
