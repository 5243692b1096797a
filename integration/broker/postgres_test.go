package broker

import (
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// replica is one of several brokers on a database.
type replica struct {
	dir, socket string
	process     *harness.Process
	database    *harness.Database
}

// replicas starts brokers on the database, which share a master key.
func replicas(t testing.TB, d *harness.Database, n int) []*replica {
	t.Helper()
	dir := harness.TempDir(t)
	var all []*replica
	for i := range n {
		r := &replica{dir: fmt.Sprintf("%s/%d", dir, i), database: d}
		r.socket = r.dir + "/copilot.sock"
		if i == 0 {
			harness.Output(t, harness.Command(t, "copilot", "keys", "list", "--dir", r.dir, "--database", d.URL()))
		} else {
			harness.Write(t, r.dir+"/master.key", harness.Read(t, all[0].dir+"/master.key"))
		}
		r.start(t)
		all = append(all, r)
	}
	return all
}

func (r *replica) start(t testing.TB) {
	t.Helper()
	r.process = harness.Start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--dir", r.dir, "--database", r.database.URL(), "--listen", "unix://"+r.socket))
	harness.Await(t, "copilot", harness.Reachable(r.socket))
}

func (r *replica) keys(t testing.TB, verb string, args ...string) *exec.Cmd {
	t.Helper()
	return harness.Command(t, "copilot", append([]string{"keys", verb, "--dir", r.dir}, args...)...)
}

// TestReplicasShareDatabase has several brokers work on one database at once, and takes it
// away from them.
func TestReplicasShareDatabase(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	rs := replicas(t, d, 3)

	// All create the same KEKs, and all rotate one.
	var created, rotated atomic.Int32
	var wg sync.WaitGroup
	for _, r := range rs {
		wg.Go(func() {
			for i := range 5 {
				if r.keys(t, "create", fmt.Sprintf("kek-%d", i)).Run() == nil {
					created.Add(1)
				}
			}
			for range 10 {
				if out, err := r.keys(t, "rotate", "kek-0").CombinedOutput(); err != nil {
					t.Errorf("rotate: %v\n%s", err, out)
				} else {
					rotated.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if created.Load() != 5 {
		t.Errorf("5 KEKs were created %d times", created.Load())
	}
	versionsAreWhole(t, rs[1], "kek-0", 31, 31)

	// One broker dies, and the database, while they rotate.
	stop := make(chan struct{})
	rotated.Store(0)
	for _, r := range rs[1:] {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if r.keys(t, "rotate", "kek-1").Run() == nil {
						rotated.Add(1)
					}
				}
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	rs[2].process.Kill()
	time.Sleep(500 * time.Millisecond)
	d.Crash(t)
	if status, body := harness.RequestOverSocket(t, rs[1].socket, "GET", "/api/v2/keks/kek-1/key?version=1", ""); status != 503 || !strings.Contains(body, "request") {
		t.Errorf("without a database: %d %s", status, body)
	}
	if status, body := harness.RequestOverSocket(t, rs[1].socket, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the key store can't be reached") {
		t.Errorf("without a database: %d %s", status, body)
	}
	if status, _ := harness.RequestOverSocket(t, rs[1].socket, "GET", "/healthz", ""); status != 204 {
		t.Errorf("healthz without a database: %d", status)
	}
	if out, err := rs[1].keys(t, "show", "kek-1").CombinedOutput(); err == nil || !strings.Contains(string(out), "can't be") {
		t.Errorf("without a database: %v\n%s", err, out)
	}
	d.Start(t)
	harness.Await(t, "the broker works again", func() error {
		if status, body := harness.RequestOverSocket(t, rs[1].socket, "GET", "/api/v2/keks/kek-1/key?version=1", ""); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	harness.Await(t, "it rotates again", func() error { return rs[0].keys(t, "rotate", "kek-1").Run() })
	close(stop)
	wg.Wait()
	rs[2].start(t)
	// A change that was made may have been reported as failed, never the reverse.
	versionsAreWhole(t, rs[2], "kek-1", int(rotated.Load())+2, int(rotated.Load())+10)

	// A broker that has another master key, and one that has none.
	other := harness.TempDir(t)
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", other, "--database", d.URL()), "the master key is missing")
	harness.Write(t, other+"/master.key", strings.Repeat("x", 32))
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", other, "--database", d.URL()), "not the one that the KEKs are sealed with")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", other, "--database", "postgres://copilot:hunter2@/postgres?host="+other), "database", "failed to connect")
	if out, _ := harness.Command(t, "copilot", "keys", "list", "--dir", other, "--database", "postgres://copilot:hunter2@127.0.0.1:1/postgres?sslmode=bad").CombinedOutput(); strings.Contains(string(out), "hunter2") {
		t.Errorf("the password is in the error: %s", out)
	}

	// No path keeps a request out of the log, or others that come at the same time.
	for range 20 {
		wg.Go(func() {
			if status, body := harness.RequestOverSocket(t, rs[0].socket, "GET", "/api/v2/keks/a%00b", ""); status != 404 && status != 429 {
				t.Errorf("a zero byte: %d %s", status, body)
			}
			if status, body := harness.RequestOverSocket(t, rs[0].socket, "GET", "/api/v2/keks/kek-4", ""); status != 200 && status != 429 {
				t.Errorf("beside a zero byte: %d %s", status, body)
			}
		})
	}
	wg.Wait()
	if n := strings.TrimSpace(d.Sql(t, `SELECT count(*) > 0 FROM copilot_audit WHERE entry->>'kek' LIKE '%a%b%'`)); n != "t" {
		t.Error("a request with a zero byte is not in the audit log")
	}

	// The audit log is in the database, and changes of it there are found.
	verify := func() *exec.Cmd {
		return harness.Command(t, "copilot", "audit", "verify", "--dir", rs[0].dir, "--database", d.URL())
	}
	if out := harness.Output(t, verify()); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}
	row := strings.Split(strings.TrimSpace(d.Sql(t, `SELECT chain, seq FROM copilot_audit WHERE entry->>'action' = 'rotate' AND seq > 3 LIMIT 1`)), "|")
	where := fmt.Sprintf("WHERE chain = '%s' AND seq = %s", row[0], row[1])
	d.Sql(t, `BEGIN; CREATE TABLE saved AS SELECT * FROM copilot_audit `+where+`; UPDATE copilot_audit SET line = replace(line, '"uid:0"', '"uid:1"') `+where+`; COMMIT`)
	harness.ExpectFailure(t, verify(), "it was changed")
	d.Sql(t, `DELETE FROM copilot_audit `+where)
	harness.ExpectFailure(t, verify(), "are missing before it")
	d.Sql(t, `INSERT INTO copilot_audit (chain, seq, line) SELECT chain, seq, line FROM saved`)
	harness.Output(t, verify())

	// Writing to the database can't enable a disabled KEK.
	before := d.Sql(t, `SELECT encode(record, 'hex') FROM copilot_keks WHERE id = 'kek-2'`)
	harness.Output(t, rs[0].keys(t, "disable", "kek-2"))
	d.Sql(t, `UPDATE copilot_keks SET record = convert_to(replace(convert_from(record, 'UTF8'), '"disabled":true', '"disabled":null'), 'UTF8') WHERE id = 'kek-2'`)
	harness.ExpectFailure(t, rs[1].keys(t, "show", "kek-2"), "the broker failed: see copilot's log")
	d.Sql(t, `UPDATE copilot_keks SET record = decode('`+strings.TrimSpace(before)+`', 'hex') WHERE id = 'kek-2'`)

	// No key is in the database in plain.
	status, body := harness.RequestOverSocket(t, rs[0].socket, "GET", "/api/v1/key/kek-3", "")
	if status != 200 || len(body) != 32 {
		t.Fatalf("%d, %d bytes", status, len(body))
	}
	dump := d.Sql(t, `SELECT encode(record, 'hex') || encode(record, 'escape') FROM copilot_keks UNION ALL SELECT line FROM copilot_audit`)
	if strings.Contains(dump, fmt.Sprintf("%x", body)) || strings.Contains(dump, body) {
		t.Error("a key is in the database")
	}
}

// versionsAreWhole checks that a KEK has so many versions, without gaps, that
// each has a key, and that no two have the same.
func versionsAreWhole(t *testing.T, r *replica, kek string, least, most int) {
	t.Helper()
	seen := make(map[string]bool)
	version := 1
	for ; ; version++ {
		status, body := harness.RequestOverSocket(t, r.socket, "GET", fmt.Sprintf("/api/v2/keks/%s/key?version=%d", kek, version), "")
		if status == 404 {
			break
		}
		if status == 429 {
			time.Sleep(100 * time.Millisecond)
			version--
			continue
		}
		_, key, _ := strings.Cut(body, `"key":`)
		if status != 200 || seen[key] {
			t.Errorf("%s version %d: %d", kek, version, status)
		}
		seen[key] = true
	}
	if n := version - 1; n < least || n > most {
		t.Errorf("%s has %d versions, not %d to %d", kek, n, least, most)
	}
}
