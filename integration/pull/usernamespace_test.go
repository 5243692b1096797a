package pull

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestRootOfUserNamespace asks over copilot's socket, which everybody may use, as root
// of a user namespace that another user has made: to copilot it is that user.
func TestRootOfUserNamespace(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "chmod", "0755", dir))
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir+"/store", "team-a"))
	policy := harness.Write(t, dir+"/policy.toml", "[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"team-a\"]\nactions = [\"export\"]\n")
	socket := dir + "/s"
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", harness.Write(t, dir+"/copilot.toml", "socket-mode = \"0666\"\n"), "--dir", dir+"/store", "--policy", policy, "--listen", "unix://"+socket))
	harness.Await(t, "copilot", harness.Reachable(socket))
	ask := func(prefix ...string) string {
		args := append(prefix, "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--unix-socket", socket, "http://copilot/api/v2/keks/team-a/key")
		return strings.TrimSpace(harness.Output(t, harness.Command(t, args[0], args[1:]...)))
	}
	if got := ask(); got != "200" {
		t.Fatalf("root: %s", got)
	}
	asNobody := []string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"}
	if got := ask(asNobody...); got != "403" {
		t.Errorf("nobody: %s", got)
	}
	inNamespace := append(asNobody, "unshare", "--user", "--map-root-user")
	if id := strings.TrimSpace(harness.Output(t, harness.Command(t, inNamespace[0], append(inNamespace[1:], "id", "-u")...))); id != "0" {
		t.Fatalf("it is user %s in its namespace", id)
	}
	if got := ask(inNamespace...); got != "403" {
		t.Errorf("root of nobody's user namespace: %s", got)
	}
}
