package broker

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestAuditLogCutOffWhileStoppedIsFound truncates the audit log, deletes it and restores an older one while
// copilot is stopped. That is found without knowing where the log ended, and normal
// operation never looks like it.
func TestAuditLogCutOffWhileStoppedIsFound(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	store, socket := dir+"/store", dir+"/copilot.sock"
	log := store + "/audit.log"
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", store, "team-a"))
	serve := func() *harness.Process {
		t.Helper()
		p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", store, "--listen", "unix://"+socket))
		harness.Await(t, "copilot", harness.Reachable(socket))
		return p
	}
	export := func(n int) {
		t.Helper()
		for range n {
			if status, body := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
				t.Fatalf("%d %s", status, body)
			}
		}
	}
	verify := func(files ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append([]string{"audit", "verify", "--dir", store}, files...)...)
	}
	said := func() int { return strings.Count(harness.Read(t, dir+"/copilot.log"), "audit log: the lines of chain") }

	// Killed at any moment, it continues, and nothing is missing.
	for range 5 {
		p := serve()
		export(7)
		p.Kill()
		if out := harness.Output(t, verify()); !strings.Contains(out, "none changed or missing") {
			t.Error(out)
		}
	}
	// Moved away while copilot is stopped, by another tool, to where verify does not look.
	moved := dir + "/audit.moved"
	if err := os.Rename(log, moved); err != nil {
		t.Fatal(err)
	}
	p := serve()
	export(3)
	harness.Output(t, verify(moved, log))
	if said() != 1 {
		t.Errorf("the log of the process has it %d times", said())
	}
	harness.ExpectFailure(t, verify(), "or its end, is missing")
	if out, err := verify(moved).CombinedOutput(); err != nil || !strings.Contains(string(out), "which these files do not have") {
		t.Errorf("the older file alone: %v\n%s", err, out)
	}
	p.Stop(t)
	whole := harness.Read(t, moved) + harness.Read(t, log)
	os.Remove(moved)
	harness.Write(t, log, whole)
	old := whole
	p = serve()
	export(5)
	p.Stop(t)
	harness.Output(t, verify())
	if said() != 1 {
		t.Errorf("what is whole is said to be cut off %d times", said()-1)
	}

	whole = harness.Read(t, log)
	lines := strings.SplitAfter(strings.TrimSuffix(whole, "\n"), "\n")
	for name, change := range map[string]func() error{
		"cut off":         func() error { return os.WriteFile(log, []byte(strings.Join(lines[:len(lines)-2], "")), 0o600) },
		"deleted":         func() error { return os.Remove(log) },
		"emptied":         func() error { return os.Truncate(log, 0) },
		"an older backup": func() error { return os.WriteFile(log, []byte(old), 0o600) },
	} {
		// Each case starts with the original store and log.
		harness.Output(t, harness.Command(t, "cp", "-a", store, dir+"/saved"))
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if name == "deleted" {
			harness.ExpectFailure(t, verify(), "no such file")
		} else {
			harness.ExpectFailure(t, verify(), "PROBLEM: chain", "was deleted, replaced or put back from a backup")
		}
		before := said()
		p := serve()
		if said() != before+1 {
			t.Errorf("%s: the log of the process has it %d times", name, said()-before)
		}
		export(20)
		_, metrics := harness.RequestOverSocket(t, store+"/admin.sock", "GET", "/metrics", "")
		if !strings.Contains(metrics, "copilot_audit_losses_total 1\n") {
			t.Errorf("%s: the metrics do not have it", name)
		}
		// Later lines do not hide it.
		harness.ExpectFailure(t, verify(), "PROBLEM: chain", "or its end, is missing")
		if !strings.Contains(harness.Read(t, log), `"reason":"the lines of chain `) {
			t.Errorf("%s: the audit log does not say so", name)
		}
		p.Stop(t)
		before = said()
		serve().Stop(t)
		if said() != before {
			t.Errorf("%s: it is said again", name)
		}
		harness.Output(t, harness.Command(t, "rm", "-r", store))
		if err := os.Rename(dir+"/saved", store); err != nil {
			t.Fatal(err)
		}
	}

	// The store can't show that both were restored. The end that was kept elsewhere does.
	harness.Output(t, harness.Command(t, "cp", "-a", store, dir+"/saved"))
	p = serve()
	export(3)
	var since []string
	for _, head := range strings.Split(strings.TrimSpace(harness.Output(t, verify())), "\n")[1:] {
		since = append(since, "--since", head)
	}
	p.Stop(t)
	harness.Output(t, harness.Command(t, "rm", "-r", store))
	if err := os.Rename(dir+"/saved", store); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, verify())
	harness.ExpectFailure(t, verify(since...), "which were there before, are missing")
}

// TestAuditRowsDeletedFromDatabaseAreFound deletes the last lines of a copilot's chain from the database
// that it shares with another, and moves the store with what it knows of chains.
func TestAuditRowsDeletedFromDatabaseAreFound(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	all := replicas(t, d, 2)
	verify := func() *exec.Cmd {
		return harness.Command(t, "copilot", "audit", "verify", "--dir", all[0].dir, "--database", d.URL())
	}
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", all[0].dir, "--database", d.URL(), "team-a"))
	for range 5 {
		for _, r := range all {
			if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
				t.Fatalf("%d %s", status, body)
			}
		}
	}
	harness.Output(t, verify())
	all[1].process.Kill()
	harness.Output(t, verify())
	all[1].start(t)
	if log := harness.Read(t, all[1].process.Log); strings.Contains(log, "last line that copilot has noted") {
		t.Error("a copilot that was killed looks like a log that was cut off")
	}
	harness.RequestOverSocket(t, all[1].socket, "GET", "/api/v2/keks/team-a/key", "")
	for _, r := range all {
		r.process.Stop(t)
	}
	harness.Output(t, verify())
	back := harness.TempDir(t) + "/back"
	harness.Output(t, harness.Command(t, "copilot", "store", "copy", "--dir", all[0].dir, d.URL(), back))
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", back))

	chain := strings.TrimSpace(d.Sql(t, "SELECT chain FROM copilot_audit GROUP BY chain ORDER BY max(id) DESC LIMIT 1"))
	d.Sql(t, fmt.Sprintf("DELETE FROM copilot_audit WHERE chain = '%s' AND seq = (SELECT max(seq) FROM copilot_audit WHERE chain = '%[1]s')", chain))
	harness.ExpectFailure(t, verify(), "PROBLEM: chain "+chain, "lines were cut off")
	all[0].start(t)
	if log := harness.Read(t, all[0].process.Log); !strings.Contains(log, "last line that copilot has noted") || !strings.Contains(log, chain) {
		t.Errorf("it is not said at start:\n%s", log)
	}
	harness.ExpectFailure(t, verify(), "PROBLEM: chain "+chain)

	// The copy detects it, too.
	var lines []string
	last := -1
	for line := range strings.Lines(harness.Read(t, back+"/audit.log")) {
		if strings.Contains(line, `"chain":"`+chain+`"`) {
			last = len(lines)
		}
		lines = append(lines, line)
	}
	harness.Write(t, back+"/audit.log", strings.Join(slices.Delete(lines, last, last+1), ""))
	harness.ExpectFailure(t, harness.Command(t, "copilot", "audit", "verify", "--dir", back), "PROBLEM: chain", "lines were cut off")
}
