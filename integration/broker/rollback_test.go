package broker

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestRecordPutBackInTheDatabaseIsRefused has somebody who can write to the database, and
// does not have the master key, undo a revocation, a disabling, a rotation and the deletion
// of a key, by older rows. copilot refuses each of those KEKs, and no other, at once and
// after a restart, until that is acknowledged.
func TestRecordPutBackInTheDatabaseIsRefused(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	d := harness.StartPostgres(t)
	rs := replicas(t, d, 2)
	a, b := rs[0], rs[1]
	copilot := func(args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append(args, "--dir", a.dir, "--database", d.URL())...)
	}
	keks := []string{"revoked", "disabled", "rotated", "destroyed"}
	for _, kek := range append(keks, "other") {
		harness.Output(t, a.keys(t, "create", kek))
	}
	harness.Output(t, a.keys(t, "rotate", "destroyed"))
	d.Sql(t, "CREATE TABLE earlier AS SELECT * FROM copilot_keks")
	harness.Output(t, a.keys(t, "revoke", "--identity", "uid:0", "revoked"))
	harness.Output(t, a.keys(t, "disable", "disabled"))
	harness.Output(t, a.keys(t, "rotate", "rotated"))
	harness.Output(t, a.keys(t, "destroy", "--key-version", "1", "--after", "0", "--yes", "destroyed"))
	harness.Output(t, a.keys(t, "rotate", "other"))
	export := func(r *replica, kek string) (int, string) {
		return harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/"+kek+"/key", "")
	}
	for _, r := range rs {
		for _, kek := range append(keks, "other") {
			export(r, kek)
		}
	}
	harness.Output(t, copilot("store", "check"))

	d.Sql(t, "UPDATE copilot_keks k SET record = e.record FROM earlier e WHERE k.id = e.id AND k.id <> 'other'")
	refused := func(when string) {
		t.Helper()
		for _, r := range rs {
			for _, kek := range keks {
				if status, body := export(r, kek); status != 403 || !strings.Contains(body, "put back as it was earlier") {
					t.Errorf("%s: %s: %d %s", when, kek, status, body)
				}
			}
			if status, body := export(r, "other"); status != 200 {
				t.Errorf("%s: another KEK: %d %s", when, status, body)
			}
		}
	}
	refused("at once")
	harness.ExpectFailure(t, a.keys(t, "rotate", "rotated"), "put back as it was earlier")
	harness.ExpectFailure(t, copilot("store", "check"), "kek destroyed: ", "kek disabled: ", "kek revoked: ", "kek rotated: ", "4 records were put back or deleted")
	harness.ExpectFailure(t, a.keys(t, "list"), "unusable", "4 KEKs can't be used, such as destroyed")
	_, recipient := backupKey(t, a.dir)
	harness.ExpectFailure(t, copilot("backup", "--recipient", recipient, "--out", a.dir+"/backup"), "4 records were put back", "nothing was written")
	for _, r := range rs {
		r.process.Stop(t)
		os.Remove(r.process.Log)
		r.start(t)
	}
	refused("after a restart")
	if log := harness.Read(t, b.process.Log); strings.Count(log, "A RECORD WAS PUT BACK") != 4 {
		t.Errorf("logged %s", log)
	}
	if _, m := harness.RequestOverSocket(t, b.dir+"/admin.sock", "GET", "/metrics", ""); !strings.Contains(m, "copilot_store_rolled_back 4\n") {
		t.Error("not in the metrics")
	}

	// With the anchors of that time, it is all of the store that is older than its log.
	d.Sql(t, "UPDATE copilot_keks k SET record = e.record FROM earlier e WHERE k.id = e.id")
	d.Sql(t, "DELETE FROM copilot_once WHERE name LIKE 'anchor %'")
	if status, body := export(a, "other"); status != 403 {
		t.Errorf("without anchors: %d %s", status, body)
	}
	for _, r := range rs {
		r.process.Stop(t)
		r.start(t)
	}
	for _, kek := range append(keks, "other") {
		if status, body := export(b, kek); status != 403 || !strings.Contains(body, "put back as it was earlier") {
			t.Errorf("without anchors, after a restart: %s: %d %s", kek, status, body)
		}
	}

	harness.ExpectFailure(t, copilot("store", "acknowledge", "--by", "Jane Doe"), "reason")
	if out := harness.Output(t, copilot("store", "acknowledge", "--by", "Jane Doe", "--reason", "database restored")); !strings.Contains(out, "store: ") {
		t.Errorf("acknowledged %s", out)
	}
	if line := d.Sql(t, "SELECT line FROM copilot_audit WHERE entry->>'action' = 'acknowledge'"); !strings.Contains(line, "by Jane Doe: database restored") {
		t.Errorf("audited: %s", line)
	}
	b.process.Stop(t)
	b.start(t)
	for _, r := range rs {
		for _, kek := range append(keks, "other") {
			if status, body := export(r, kek); status != 200 {
				t.Errorf("after it was acknowledged: %s: %d %s", kek, status, body)
			}
		}
	}
	harness.Output(t, copilot("store", "check"))
	harness.Output(t, a.keys(t, "rotate", "rotated"))

	d.Sql(t, "DELETE FROM copilot_keks WHERE id = 'disabled'")
	harness.ExpectFailure(t, copilot("store", "check"), "kek disabled: its record was deleted")
	harness.ExpectFailure(t, a.keys(t, "create", "disabled"), "put back as it was earlier")
}

// TestReplicaThatIsBehindDoesNotHideAChange puts back the whole store, and its audit log ends
// with a line of a replica that had not seen the last change.
func TestReplicaThatIsBehindDoesNotHideAChange(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	rs := replicas(t, d, 2)
	a, b := rs[0], rs[1]
	for _, kek := range []string{"revoked", "other"} {
		harness.Output(t, a.keys(t, "create", kek))
	}
	b.process.Stop(t)
	b.start(t)
	d.Sql(t, "CREATE TABLE keks AS SELECT * FROM copilot_keks; CREATE TABLE once AS SELECT * FROM copilot_once WHERE name LIKE 'anchor %'")
	harness.Output(t, a.keys(t, "revoke", "--identity", "uid:0", "revoked"))
	a.process.Stop(t)
	if status, body := harness.RequestOverSocket(t, b.socket, "GET", "/api/v2/keks/other/key", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	b.process.Kill()
	d.Sql(t, "UPDATE copilot_keks k SET record = e.record FROM keks e WHERE k.id = e.id; UPDATE copilot_once o SET value = e.value FROM once e WHERE o.name = e.name")
	a.start(t)
	if status, body := harness.RequestOverSocket(t, a.socket, "GET", "/api/v2/keks/revoked/key", ""); status != 403 || !strings.Contains(body, "put back as it was earlier") {
		t.Errorf("%d %s", status, body)
	}
}

// TestStorePutBackIsRefused puts back the whole file of a store, while copilot does not run,
// right after a command that changed it: its audit log goes on further, also where logrotate
// has moved that away. An earlier backup, restored with the log in place, is one that the
// command itself acknowledges, and the empty store from before is not.
func TestStorePutBackIsRefused(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	store := dir + "/store"
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", append(args, "--dir", store)...) }
	identity, recipient := backupKey(t, dir)
	harness.Output(t, copilot("keys", "create", "team-a"))
	harness.Output(t, copilot("backup", "--recipient", recipient, "--out", dir+"/1.backup"))
	earlier := harness.Read(t, store+"/keks.db")
	harness.Output(t, copilot("keys", "disable", "team-a"))
	harness.Write(t, store+"/keks.db", earlier)
	harness.Output(t, harness.Command(t, "cp", "-a", store, dir+"/saved"))
	err := os.Rename(store+"/audit.log", store+"/audit.log.1")
	harness.ExpectFailure(t, copilot("keys", "rotate", "team-a"), "put back as it was earlier", "all of the store")
	if err = errors.Join(err, os.RemoveAll(store), os.Rename(dir+"/saved", store)); err != nil {
		t.Fatal(err)
	}
	harness.ExpectFailure(t, copilot("keys", "rotate", "team-a"), "put back as it was earlier", "all of the store")
	harness.ExpectFailure(t, copilot("store", "check"), "store: it was changed ", "and copilot knows of ")
	p, _ := harness.StartBroker(t, store)
	if status, body := harness.RequestOverSocket(t, store+"/copilot.sock", "GET", "/api/v2/keks/team-a/key", ""); status != 403 {
		t.Errorf("%d %s", status, body)
	}
	harness.Output(t, copilot("store", "acknowledge", "--by", "Jane Doe", "--reason", "disk failed"))
	if status, body := harness.RequestOverSocket(t, store+"/copilot.sock", "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	p.Stop(t)
	harness.Output(t, copilot("store", "check"))

	if err := os.Remove(store + "/keks.db"); err != nil {
		t.Fatal(err)
	}
	p, _ = harness.StartBroker(t, store)
	p.Stop(t)
	empty := harness.Read(t, store+"/keks.db")
	harness.Output(t, copilot("restore", "--identity", identity, dir+"/1.backup"))
	restored := harness.Read(t, store+"/keks.db")
	harness.Write(t, store+"/keks.db", empty)
	harness.ExpectFailure(t, copilot("store", "check"), "store: it was changed ", "and copilot knows of ")
	harness.Write(t, store+"/keks.db", restored)
	harness.Output(t, copilot("store", "check"))
	harness.Output(t, copilot("keys", "rotate", "team-a"))
	if log := harness.Read(t, store+"/audit.log"); !strings.Contains(log, `"action":"restore"`) {
		t.Error("the restore is not in the audit log")
	}
}
