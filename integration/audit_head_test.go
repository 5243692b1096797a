package integration

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestAuditHead cuts the end off the audit log, deletes it and puts an older one back
// while copilot does not run. That is found without knowing where the log ended, and
// nothing that happens by itself looks like it.
func TestAuditHead(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	store, socket := dir+"/store", dir+"/copilot.sock"
	log := store + "/audit.log"
	output(t, command(t, "copilot", "keys", "create", "--dir", store, "team-a"))
	serve := func() *process {
		t.Helper()
		p := start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", store, "--listen", "unix://"+socket))
		await(t, "copilot", answers(socket))
		return p
	}
	export := func(n int) {
		t.Helper()
		for range n {
			if status, body := ask(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
				t.Fatalf("%d %s", status, body)
			}
		}
	}
	verify := func(files ...string) *exec.Cmd {
		return command(t, "copilot", append([]string{"audit", "verify", "--dir", store}, files...)...)
	}
	said := func() int { return strings.Count(read(t, dir+"/copilot.log"), "audit log: the lines of chain") }

	// Killed at any moment, it goes on, and nothing is missing.
	for range 5 {
		p := serve()
		export(7)
		p.kill()
		if out := output(t, verify()); !strings.Contains(out, "none changed or missing") {
			t.Error(out)
		}
	}
	// Moved away while it does not run, as by another tool than ours, to where verify does not look.
	moved := dir + "/audit.moved"
	if err := os.Rename(log, moved); err != nil {
		t.Fatal(err)
	}
	p := serve()
	export(3)
	output(t, verify(moved, log))
	if said() != 1 {
		t.Errorf("the log of the process has it %d times", said())
	}
	fails(t, verify(), "or its end, is missing")
	if out, err := verify(moved).CombinedOutput(); err != nil || !strings.Contains(string(out), "which these files do not have") {
		t.Errorf("the older file alone: %v\n%s", err, out)
	}
	p.stop(t)
	whole := read(t, moved) + read(t, log)
	os.Remove(moved)
	write(t, log, whole)
	old := whole
	p = serve()
	export(5)
	p.stop(t)
	output(t, verify())
	if said() != 1 {
		t.Errorf("what is whole is said to be cut off %d times", said()-1)
	}

	whole = read(t, log)
	lines := strings.SplitAfter(strings.TrimSuffix(whole, "\n"), "\n")
	for name, change := range map[string]func() error{
		"cut off":         func() error { return os.WriteFile(log, []byte(strings.Join(lines[:len(lines)-2], "")), 0o600) },
		"deleted":         func() error { return os.Remove(log) },
		"emptied":         func() error { return os.Truncate(log, 0) },
		"an older backup": func() error { return os.WriteFile(log, []byte(old), 0o600) },
	} {
		// Each begins with the store and the log as they were.
		output(t, command(t, "cp", "-a", store, dir+"/saved"))
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if name == "deleted" {
			fails(t, verify(), "no such file")
		} else {
			fails(t, verify(), "PROBLEM: chain", "was deleted, replaced or put back from a backup")
		}
		before := said()
		p := serve()
		if said() != before+1 {
			t.Errorf("%s: the log of the process has it %d times", name, said()-before)
		}
		export(20)
		_, metrics := ask(t, store+"/admin.sock", "GET", "/metrics", "")
		if !strings.Contains(metrics, "copilot_audit_losses_total 1\n") {
			t.Errorf("%s: the metrics do not have it", name)
		}
		// It does not go away by what follows.
		fails(t, verify(), "PROBLEM: chain", "or its end, is missing")
		if !strings.Contains(read(t, log), `"reason":"the lines of chain `) {
			t.Errorf("%s: the audit log does not say so", name)
		}
		p.stop(t)
		before = said()
		serve().stop(t)
		if said() != before {
			t.Errorf("%s: it is said again", name)
		}
		output(t, command(t, "rm", "-r", store))
		if err := os.Rename(dir+"/saved", store); err != nil {
			t.Fatal(err)
		}
	}

	// What the store can't show: both put back together. The end that was kept
	// elsewhere does.
	output(t, command(t, "cp", "-a", store, dir+"/saved"))
	p = serve()
	export(3)
	var since []string
	for _, head := range strings.Split(strings.TrimSpace(output(t, verify())), "\n")[1:] {
		since = append(since, "--since", head)
	}
	p.stop(t)
	output(t, command(t, "rm", "-r", store))
	if err := os.Rename(dir+"/saved", store); err != nil {
		t.Fatal(err)
	}
	output(t, verify())
	fails(t, verify(since...), "which were there before, are missing")
}

// TestAuditHeadDatabase deletes the last lines of a copilot's chain from the database
// that it shares with another, and moves the store with what it knows of chains.
func TestAuditHeadDatabase(t *testing.T) {
	t.Parallel()
	d := postgres(t)
	all := replicas(t, d, 2)
	verify := func() *exec.Cmd {
		return command(t, "copilot", "audit", "verify", "--dir", all[0].dir, "--database", d.url())
	}
	output(t, command(t, "copilot", "keys", "create", "--dir", all[0].dir, "--database", d.url(), "team-a"))
	for range 5 {
		for _, r := range all {
			if status, body := ask(t, r.socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
				t.Fatalf("%d %s", status, body)
			}
		}
	}
	output(t, verify())
	all[1].process.kill()
	output(t, verify())
	all[1].start(t)
	if log := read(t, all[1].process.log); strings.Contains(log, "last line that copilot has noted") {
		t.Error("a copilot that was killed looks like a log that was cut off")
	}
	ask(t, all[1].socket, "GET", "/api/v2/keks/team-a/key", "")
	for _, r := range all {
		r.process.stop(t)
	}
	output(t, verify())
	back := tempDir(t) + "/back"
	output(t, command(t, "copilot", "store", "copy", "--dir", all[0].dir, d.url(), back))
	output(t, command(t, "copilot", "audit", "verify", "--dir", back))

	chain := strings.TrimSpace(d.sql(t, "SELECT chain FROM copilot_audit GROUP BY chain ORDER BY max(id) DESC LIMIT 1"))
	d.sql(t, fmt.Sprintf("DELETE FROM copilot_audit WHERE chain = '%s' AND seq = (SELECT max(seq) FROM copilot_audit WHERE chain = '%[1]s')", chain))
	fails(t, verify(), "PROBLEM: chain "+chain, "lines were cut off")
	all[0].start(t)
	if log := read(t, all[0].process.log); !strings.Contains(log, "last line that copilot has noted") || !strings.Contains(log, chain) {
		t.Errorf("it is not said at start:\n%s", log)
	}
	fails(t, verify(), "PROBLEM: chain "+chain)

	// The copy knows, too.
	var lines []string
	last := -1
	for line := range strings.Lines(read(t, back+"/audit.log")) {
		if strings.Contains(line, `"chain":"`+chain+`"`) {
			last = len(lines)
		}
		lines = append(lines, line)
	}
	write(t, back+"/audit.log", strings.Join(slices.Delete(lines, last, last+1), ""))
	fails(t, command(t, "copilot", "audit", "verify", "--dir", back), "PROBLEM: chain", "lines were cut off")
}
