package broker

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestKeysCheckTriesKMS tries KEKs in an OpenBao, with the copilot that runs and without one.
func TestKeysCheckTriesKMS(t *testing.T) {
	t.Parallel()
	v := harness.NewOpenBao(t)
	v.Put("team-a")
	v.Write("transit/keys/team-b", `{"type": "aes256-gcm96"}`)
	dir := harness.TempDir(t)
	socket := dir + "/copilot.sock"
	token := fmt.Sprintf("address = %q\n", v.URL) + v.Token("vault-kv", "vault-transit", "vault-transit, rotating")
	file := harness.Write(t, dir+"/copilot.toml", fmt.Sprintf("dir = %q\nlisten = [%q]\n", dir+"/store", "unix://"+socket)+
		"[backends.kv]\ntype = 'vault-kv'\n"+token+"[backends.transit]\ntype = 'vault-transit'\n"+token+
		"[keks.team-a]\nbackend = 'kv'\npath = 'secret/data/team-a'\n[keks.team-b]\nbackend = 'transit'\npath = 'team-b'\n"+
		"[keks.nowhere]\nbackend = 'transit'\npath = 'nowhere'\n")
	keys := func(verb string, args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append([]string{"keys", verb, "--config", file}, args...)...)
	}
	harness.Output(t, keys("create", "own"))
	check := func(kek, want string) {
		t.Helper()
		if out := harness.Output(t, keys("check", kek)); !strings.HasPrefix(out, kek+" works, in "+want) || !strings.Contains(out, " ms, unwrap ") {
			t.Errorf("check %s: %s", kek, out)
		}
	}
	all := func() {
		t.Helper()
		check("own", "copilot's store: version 1, wrap ")
		check("team-a", "kv (vault-kv, path secret/data/team-a): version 1, wrap ")
		check("team-b", "transit (vault-transit, path team-b): version 1, wrap ")
	}
	all()
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(socket))
	all()

	// It is in the audit log, and counts no wraps.
	if log := harness.Read(t, dir+"/store/audit.log"); strings.Count(log, `"action":"check","kek":"team-b","version":1,`) != 2 || strings.Contains(log, `"action":"wrap"`) {
		t.Errorf("audit log:\n%s", log)
	}
	out := harness.Output(t, keys("show", "team-b"))
	for _, want := range []string{"team-b, in transit\n", "vault-transit, path team-b\n", "never exported", `"copilot keys check team-b"`} {
		if !strings.Contains(out, want) {
			t.Errorf("show lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "WRAPS") {
		t.Errorf("a check counts as a wrap:\n%s", out)
	}
	if out := harness.Output(t, keys("rotate", "team-b")); out != "team-b rotated, current version 2\n" {
		t.Errorf("rotate: %s", out)
	}
	check("team-b", "transit (vault-transit, path team-b): version 2, ")
	if status, answer := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/team-b/wrap", `{"plaintext":"c2VjcmV0"}`); status != 200 {
		t.Fatal(answer)
	}
	if out := harness.Output(t, keys("show", "team-b")); !regexp.MustCompile(`(?m)^2 +- +enabled +[1-9]`).MatchString(out) {
		t.Errorf("show after a wrap:\n%s", out)
	}

	failed := func(cmd *exec.Cmd, status int, want ...string) {
		t.Helper()
		harness.ExpectFailure(t, cmd, want...)
		if got := cmd.ProcessState.ExitCode(); got != status {
			t.Errorf("%s: exit status %d, want %d", cmd.Args, got, status)
		}
	}
	failed(keys("check", "nobody"), 3, "no such KEK")
	failed(keys("check", "nowhere"), 1, "in transit (vault-transit, path nowhere): wrap: ", `path "transit/encrypt/nowhere"`, "no such key")
	v.Write("secret/data/team-a", `{"data": {"kek": "AAAA"}}`)
	failed(keys("check", "team-a"), 1, "3 bytes, not 32")
	harness.Output(t, keys("disable", "team-b"))
	failed(keys("check", "team-b"), 1, "the KEK is disabled")
	harness.Output(t, keys("enable", "team-b"))
	v.Process.Stop(t)
	cmd := keys("check", "--json", "team-b")
	b, err := cmd.Output()
	var found struct {
		ID, Backend, Error string
		OK                 bool
		Version            int
	}
	if json.Unmarshal(b, &found) != nil || err == nil || found.OK || found.ID != "team-b" || found.Backend != "transit" || !strings.Contains(found.Error, "the Vault at "+v.URL) {
		t.Errorf("without OpenBao: %v\n%s", err, b)
	}
	check("own", "copilot's store: version 1, ")

	// Callers without the right admin learn nothing.
	if status, answer := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/team-b/check", ""); status != 403 || strings.Contains(answer, v.URL) {
		t.Errorf("check on the socket for everybody: %d %s", status, answer)
	}
	if status, answer := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-b", ""); status != 200 || strings.Contains(answer, `"path"`) {
		t.Errorf("info on the socket for everybody: %d %s", status, answer)
	}
}
