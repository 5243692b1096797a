package kms

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestBrokerKMS has a broker use each KMS that there is a server for, by what
// its configuration says and nothing else.
func TestBrokerKMS(t *testing.T) {
	v := harness.NewVault(t)
	key := v.Put("team-a")
	v.Put("team-b")
	v.Write("transit/keys/team-a", `{"type": "aes256-gcm96"}`)
	v.Write("transit/keys/team-b", `{"type": "aes256-gcm96"}`)
	hsm := harness.NewHSMToken(t, "team-a", "team-b")
	cloud := newLocalKMS(t)
	cloud.start(1)
	dir := harness.TempDir(t)
	socket := dir + "/copilot.sock"
	admin := dir + "/store/admin.sock"
	config := fmt.Sprintf("dir = %q\nlisten = [%q]\n", dir+"/store", "unix://"+socket)
	for name, settings := range map[string]string{
		"kv":      fmt.Sprintf("type = 'vault-kv'\naddress = %q\ntoken-file = %q\n", v.URL, v.Dir+"/root-token"),
		"transit": fmt.Sprintf("type = 'vault-transit'\naddress = %q\ntoken-file = %q\n", v.URL, v.Dir+"/root-token"),
		"hsm":     "type = 'pkcs11'\n" + hsm.Settings(),
		"aws":     fmt.Sprintf("type = 'aws-kms'\nregion = 'eu-central-1'\nendpoint = %q\n", cloud.url),
	} {
		team, other := "team-a", "team-b"
		switch name {
		case "kv":
			team, other = "secret/data/team-a", "secret/data/team-b"
		case "aws":
			team, other = awsARN+"key/"+awsKeyA, awsARN+"key/"+awsKeyB
		}
		config += fmt.Sprintf("[backends.%s]\n%s[keks.%[1]s-team]\nbackend = %[1]q\npath = %[3]q\n[keks.%[1]s-other]\nbackend = %[1]q\npath = %[4]q\n", name, settings, team, other)
	}
	file := harness.Write(t, dir+"/copilot.toml", config)
	p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(socket))
	keys := func(verb string, args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append([]string{"keys", verb, "--config", file}, args...)...)
	}
	for _, name := range []string{"kv", "transit", "hsm", "aws"} {
		t.Run(name, func(t *testing.T) {
			team, other := "/api/v2/keks/"+name+"-team", "/api/v2/keks/"+name+"-other"
			status, answer := harness.RequestOverSocket(t, socket, "GET", team+"/key", "")
			if name == "kv" && (status != 200 || !strings.Contains(answer, base64.StdEncoding.EncodeToString(key))) || name != "kv" && (status != 409 || !strings.Contains(answer, "not-exported")) {
				t.Errorf("give out: %d %s", status, answer)
			}
			wrap := func(version int) string {
				t.Helper()
				status, answer := harness.RequestOverSocket(t, socket, "POST", team+"/wrap", `{"plaintext":"c2VjcmV0"}`)
				var w map[string]any
				if status != 200 || json.Unmarshal([]byte(answer), &w) != nil || w["version"] != float64(version) || (w["method"] == "copilot") != (name != "kv") {
					t.Fatalf("wrap: %d %s, want version %d", status, answer, version)
				}
				delete(w, "id")
				b, _ := json.Marshal(w)
				return string(b)
			}
			unwraps := func(path, wrapped string, want int) {
				t.Helper()
				status, answer := harness.RequestOverSocket(t, socket, "POST", path+"/unwrap", wrapped)
				if status != want || want == 200 && answer != `{"plaintext":"c2VjcmV0"}` {
					t.Errorf("unwrap: %d %s, want %d", status, answer, want)
				}
			}
			first := wrap(1)
			unwraps(team, first, 200)
			unwraps(other, first, 400) // for another KEK of the same KMS
			unwraps(team, strings.Replace(first, `"version":1`, `"version":2`, 1), map[bool]int{true: 400, false: 404}[name == "aws" || name == "transit"])
			if name == "aws" {
				harness.ExpectFailure(t, keys("rotate", name+"-team"), "rotate it there")
			} else {
				harness.Output(t, keys("rotate", name+"-team"))
				unwraps(team, wrap(2), 200)
				unwraps(team, first, 200)
				harness.Output(t, keys("disable", "--key-version", "1", name+"-team"))
				unwraps(team, first, 403)
				harness.Output(t, keys("enable", "--key-version", "1", name+"-team"))
			}
			harness.Output(t, keys("disable", name+"-team"))
			unwraps(team, first, 403)
			if status, answer := harness.RequestOverSocket(t, socket, "POST", team+"/wrap", `{"plaintext":"c2VjcmV0"}`); status != 403 {
				t.Errorf("wrap with a disabled KEK: %d %s", status, answer)
			}
			harness.Output(t, keys("enable", name+"-team"))
			unwraps(team, first, 200)
			harness.ExpectFailure(t, keys("destroy", "--after", "0s", "--yes", name+"-team"), "destroy it there")
			harness.ExpectFailure(t, keys("create", name+"-team"), "the configuration says that it is in "+name)
			if out := harness.Output(t, keys("show", name+"-team")); !strings.Contains(out, "in "+name) {
				t.Error(out)
			}
		})
	}

	// The original's ids reach what the configuration says, and no other path.
	original := func(id string) (int, string) {
		return harness.RequestOverSocket(t, socket, "GET", "/api/v1/key/"+strings.ReplaceAll(base64.StdEncoding.EncodeToString([]byte(id)), "/", "%2F"), "")
	}
	status, got := original(`{"kek_id":"kv-team","kms_provider":"vault","kms_provider_path":"secret/data/team-a","kms_additional_params":{}}`)
	if status != 200 || len(got) != 32 {
		t.Errorf("the original's id: %d, %d bytes", status, len(got))
	}
	for _, id := range []string{
		`{"kek_id":"kv-team","kms_provider":"vault","kms_provider_path":"secret/data/team-b"}`,
		`{"kek_id":"other","kms_provider":"vault","kms_provider_path":"secret/data/team-b"}`,
		`{"kek_id":"kv-team","kms_provider":"dev","kms_provider_path":""}`,
	} {
		if status, got := original(id); status != 404 {
			t.Errorf("%s: %d, %d bytes", id, status, len(got))
		}
	}

	// A KEK of the wrong length, and one that was removed.
	v.Write("secret/data/team-b", `{"data": {"kek": "AAAA"}}`)
	if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/kv-other/key", ""); status != 503 || strings.Contains(answer, "AAAA") {
		t.Errorf("a KEK of three bytes: %d %s", status, answer)
	}
	if log := harness.Read(t, p.Log); !strings.Contains(log, "3 bytes, not 32") {
		t.Errorf("the log does not say what is wrong:\n%s", log)
	}
	// The KMS is away: the broker says so, in time, and starts without it.
	v.Process.Kill()
	begin := time.Now()
	if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/kv-team/key", ""); status != 503 || !strings.Contains(answer, "the KMS gives no usable answer") {
		t.Errorf("without Vault: %d %s", status, answer)
	}
	if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/hsm-team", ""); status != 200 {
		t.Errorf("the HSM without Vault: %d %s", status, answer)
	}
	if took := time.Since(begin); took > harness.Timeout {
		t.Errorf("it took %s", took)
	}
	p.Stop(t)
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(socket))
	if status, answer := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/hsm-team/wrap", `{"plaintext":"c2VjcmV0"}`); status != 200 {
		t.Errorf("the HSM, without Vault from the start: %d %s", status, answer)
	}
	metrics := func() string { _, text := harness.RequestOverSocket(t, admin, "GET", "/metrics", ""); return text }
	if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/kv-team/key", ""); status != 503 {
		t.Errorf("without Vault: %d %s", status, answer)
	}
	if text := metrics(); !strings.Contains(text, `copilot_kms_errors_total{backend="kv",operation="get"} 1`) || !strings.Contains(text, `copilot_kek_wraps{kek="hsm-team",version="2"}`) {
		t.Errorf("metrics:\n%s", text)
	}
	v.Start()
	harness.Await(t, "Vault again", func() error {
		if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/kv-team/key", ""); status != 200 {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	})
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--config", file))
}

// TestBrokerKMSFull has many wrap at once with a KEK of a KMS whose version has
// wrapped as many keys as it may: it is rotated once.
func TestBrokerKMSFull(t *testing.T) {
	t.Parallel()
	v := harness.NewVault(t)
	v.Put("team-a")
	dir := harness.TempDir(t)
	socket := dir + "/copilot.sock"
	file := harness.Write(t, dir+"/copilot.toml", fmt.Sprintf(`
dir = %q
listen = [%q]
wrap-limit = 2048
[backends.kv]
type = "vault-kv"
address = %q
token-file = %q
[keks."team-a"]
backend = "kv"
path = "secret/data/team-a"
`, dir+"/store", "unix://"+socket, v.URL, v.Dir+"/root-token"))
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(socket))
	for range 2 { // 1024 wraps each
		if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 || !strings.Contains(answer, `"version":1`) {
			t.Fatalf("%d %s", status, answer)
		}
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			status, answer := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"c2VjcmV0"}`)
			if status != 200 || !strings.Contains(answer, `"version":2`) {
				t.Errorf("%d %s", status, answer)
			}
		})
	}
	wg.Wait()
	log := harness.Read(t, dir+"/store/audit.log")
	// A line before, and one with the version that was made.
	if n := strings.Count(log, `"action":"rotate"`); n != 2 || !strings.Contains(log, `"action":"rotate","kek":"team-a","version":2,`) || !strings.Contains(log, "version 1 has wrapped as many keys as it may, 2048, the last for uid:") {
		t.Errorf("it was rotated in %d lines:\n%s", n, log)
	}
}
