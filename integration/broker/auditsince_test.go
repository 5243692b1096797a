package broker

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestVerifySinceFileFollowsTheLog verifies the audit log night after night: in a database, to
// which each command adds a chain, and in a file that logrotate moves away.
func TestVerifySinceFileFollowsTheLog(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	dir := harness.TempDir(t)
	ends := harness.Write(t, dir+"/ends", "")
	if err := os.Chown(ends, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	copilot := func(args ...string) *exec.Cmd {
		t.Helper()
		return harness.Command(t, "copilot", append(args, "--dir", dir, "--database", d.URL())...)
	}
	lines := func() int { return strings.Count(harness.Read(t, ends), "\n") }
	for i, kek := range []string{"a", "b", "c"} {
		harness.Output(t, copilot("keys", "create", kek))
		harness.Output(t, copilot("keys", "rotate", kek))
		harness.Output(t, copilot("audit", "verify", "--since", ends))
		if n := lines(); n != 2*(i+1) {
			t.Errorf("%d chains after %s", n, kek)
		}
	}
	info, err := os.Stat(ends)
	if err != nil || info.Mode() != 0o600 || info.Sys().(*syscall.Stat_t).Uid != 1234 {
		t.Errorf("the file's mode and owner: %v, %v", info, err)
	}

	// A truncated chain is found, every night.
	before := harness.Read(t, ends)
	harness.Output(t, copilot("keys", "create", "d"))
	d.Sql(t, "DELETE FROM copilot_audit WHERE chain IN (SELECT chain FROM copilot_audit WHERE entry->>'kek' = 'c')")
	for range 2 {
		cmd := copilot("audit", "verify", "--since", ends, "--json")
		out, err := cmd.Output()
		var report struct {
			OK              bool
			Lines           int
			Heads, Problems []string
		}
		if json.Unmarshal(out, &report) != nil || err == nil || report.OK || report.Lines != 10 || len(report.Heads) != 5 || len(report.Problems) == 0 || cmd.ProcessState.ExitCode() != 3 {
			t.Errorf("a chain is gone: %v, %s", err, out)
		}
		if harness.Read(t, ends) != before {
			t.Error("the file changed, and there is a problem")
		}
	}

	// The error for another user says which user to use.
	harness.ExpectFailure(t, harness.Command(t, "copilot", "audit", "verify", "--dir", dir, "--database", "postgres:///postgres?host="+d.Dir), `role "root" does not exist`, "runuser -u copilot --")
	d.Process.Stop(t)
	down := copilot("audit", "verify", "--since", ends)
	harness.ExpectFailure(t, down, "audit log")
	if status := down.ProcessState.ExitCode(); status != 1 {
		t.Errorf("without the database: exit status %d", status)
	}

	// With a file, those that logrotate has moved away and compressed are read too.
	store := harness.TempDir(t)
	file := func(args ...string) *exec.Cmd {
		t.Helper()
		return harness.Command(t, "copilot", append(args, "--dir", store)...)
	}
	fileEnds := harness.Write(t, store+"/ends", "")
	// As logrotate does with the package's settings.
	const rotate = `set -e; cd "$0"
for n in 3 2; do [ ! -e audit.log.$n.gz ] || mv audit.log.$n.gz audit.log.$((n + 1)).gz; done
[ ! -e audit.log.1 ] || { mv audit.log.1 audit.log.2; gzip audit.log.2; }
mv audit.log audit.log.1; touch audit.log`
	for i, kek := range []string{"a", "b", "c", "d"} {
		harness.Output(t, file("keys", "create", kek))
		out := harness.Output(t, file("audit", "verify", "--since", fileEnds))
		harness.Output(t, file("audit", "verify"))
		// One for the KEK, one that says that the store was changed, and from the second
		// night one that says that the log was moved away while nobody wrote it.
		if want := fmt.Sprintf("%d lines, none changed or missing", 3*i+2); !strings.HasPrefix(out, want) {
			t.Errorf("night %d: %s", i, out)
		}
		harness.Output(t, harness.Command(t, "sh", "-c", rotate, store))
	}
	if _, err := os.Stat(store + "/audit.log.3.gz"); err != nil {
		t.Error(err)
	}
	if err := os.Remove(store + "/audit.log.1"); err != nil {
		t.Fatal(err)
	}
	harness.ExpectFailure(t, file("audit", "verify", "--since", fileEnds), "which were there before, are missing")
}
