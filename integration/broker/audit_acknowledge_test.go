package broker

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestAuditAcknowledgeInDatabase deletes old chains from PostgreSQL, which is reported at
// each start until somebody acknowledges it, and then no more. What is deleted later is.
func TestAuditAcknowledgeInDatabase(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	b := replicas(t, d, 1)[0]
	copilot := func(args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append(args, "--dir", b.dir, "--database", d.URL())...)
	}
	by := []string{"audit", "acknowledge", "--by", "Jane Doe", "--reason", "old rows deleted"}
	b.process.Stop(t)
	since := harness.Write(t, harness.TempDir(t)+"/since", "")
	harness.Output(t, copilot("keys", "create", "team-a"))
	harness.Output(t, copilot("keys", "create", "team-b"))
	harness.Output(t, copilot("audit", "verify", "--since", since))
	if out := harness.Output(t, copilot(by...)); !strings.Contains(out, "nothing to acknowledge") {
		t.Errorf("acknowledged %s", out)
	}
	chainOf := func(kek string) string {
		return strings.TrimSpace(d.Sql(t, fmt.Sprintf("SELECT chain FROM copilot_audit WHERE entry->>'kek' = '%s' AND entry->>'action' = 'create'", kek)))
	}
	reported := func() (log, metrics bool) {
		t.Helper()
		os.Remove(b.process.Log)
		b.start(t)
		defer b.process.Stop(t)
		harness.RequestOverSocket(t, b.socket, "GET", "/api/v2/keks/team-a/key", "")
		_, m := harness.RequestOverSocket(t, b.dir+"/admin.sock", "GET", "/metrics", "")
		return strings.Contains(harness.Read(t, b.process.Log), "last line that copilot has noted"), strings.Contains(m, "copilot_audit_losses_total 1\n")
	}
	prune := func(kek string) string {
		t.Helper()
		chain := chainOf(kek)
		d.Sql(t, fmt.Sprintf("DELETE FROM copilot_audit WHERE chain = '%s'", chain))
		return chain
	}

	chain := prune("team-a")
	for range 2 {
		if log, metrics := reported(); !log || !metrics {
			t.Errorf("not reported: in the log %v, in the metrics %v", log, metrics)
		}
	}
	harness.ExpectFailure(t, copilot("audit", "verify"), "PROBLEM: chain "+chain)
	harness.ExpectFailure(t, copilot("audit", "acknowledge", "--by", "Jane Doe"), "reason")
	harness.ExpectFailure(t, copilot("audit", "acknowledge", "--by", " ", "--reason", "x"), "who acknowledges it is missing")
	harness.ExpectFailure(t, copilot("audit", "verify"), "PROBLEM: chain "+chain)

	// Through the copilot that runs.
	b.start(t)
	if out := harness.Output(t, copilot(by...)); !strings.HasPrefix(out, chain+"/") || strings.Count(out, "\n") != 1 {
		t.Errorf("acknowledged %s, want %s", out, chain)
	}
	b.process.Stop(t)
	line := d.Sql(t, "SELECT line FROM copilot_audit WHERE entry->>'action' = 'acknowledge' AND entry->>'reason' LIKE '%Jane Doe%'")
	if !strings.Contains(line, `"who":"uid:0"`) || !strings.Contains(line, "1 chains without their last lines, by Jane Doe: old rows deleted: "+chain) {
		t.Errorf("audited: %s", line)
	}
	if log, metrics := reported(); log || metrics {
		t.Errorf("reported after it was acknowledged: in the log %v, in the metrics %v", log, metrics)
	}
	for _, args := range [][]string{{}, {"--since", since}} {
		out, err := copilot(append([]string{"audit", "verify"}, args...)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "note: chain "+chain) || !strings.Contains(string(out), "as acknowledged by Jane Doe: old rows deleted") {
			t.Errorf("verify %v: %v\n%s", args, err, out)
		}
	}

	// Others are not acknowledged with it, and without a copilot it works, too.
	chain = prune("team-b")
	if log, metrics := reported(); !log || !metrics {
		t.Errorf("another chain is not reported: in the log %v, in the metrics %v", log, metrics)
	}
	harness.ExpectFailure(t, copilot("audit", "verify"), "PROBLEM: chain "+chain)
	if out := harness.Output(t, copilot(append(by, "--json")...)); !strings.Contains(out, `"`+chain+"/") {
		t.Errorf("acknowledged %s, want %s", out, chain)
	}
	harness.Output(t, copilot("audit", "verify"))
	if log, metrics := reported(); log || metrics {
		t.Errorf("reported after it was acknowledged: in the log %v, in the metrics %v", log, metrics)
	}
}

// TestAuditAcknowledgeFile deletes the file of the audit log while copilot does not run.
// It stays a problem to verify until somebody acknowledges it.
func TestAuditAcknowledgeFile(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	store := dir + "/store"
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", append(args, "--dir", store)...) }
	harness.Output(t, copilot("keys", "create", "team-a"))
	if err := os.Remove(store + "/audit.log"); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, copilot("keys", "create", "team-b"))
	harness.ExpectFailure(t, copilot("audit", "verify"), "PROBLEM: chain", "or its end, is missing")
	if out := harness.Output(t, copilot("audit", "acknowledge", "--by", "Jane Doe", "--reason", "disk failed")); strings.Count(out, "\n") != 1 {
		t.Errorf("acknowledged %s", out)
	}
	out, err := copilot("audit", "verify").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "as acknowledged by Jane Doe: disk failed") {
		t.Errorf("%v\n%s", err, out)
	}
	if out := harness.Output(t, copilot("audit", "acknowledge", "--by", "Jane Doe", "--reason", "disk failed")); !strings.Contains(out, "nothing to acknowledge") {
		t.Errorf("acknowledged again: %s", out)
	}

	// In the same moment in which copilot finds it.
	if err := os.Remove(store + "/audit.log"); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, copilot("audit", "acknowledge", "--by", "Jane Doe", "--reason", "disk failed again"))
	harness.Output(t, copilot("audit", "verify"))
	harness.Output(t, copilot("keys", "create", "team-c"))
	harness.Output(t, copilot("audit", "verify"))
}
