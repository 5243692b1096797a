package broker

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// pooler is a PgBouncer in transaction mode before a database. It listens on a
// unix socket in dir.
type pooler struct {
	dir     string
	program []string
	process *harness.Process
}

// pgbouncer starts the PgBouncer that program runs, whose version has to begin
// with version. Its database "one" has a single connection.
func pgbouncer(t testing.TB, d *harness.Database, version string, program ...string) *pooler {
	t.Helper()
	p := &pooler{dir: filepath.Join(d.Dir, "pgbouncer-"+version), program: program}
	if _, err := os.Stat(filepath.Join(harness.Tools, "bin/pgbouncer")); err != nil {
		t.Fatalf("PgBouncer is missing: install it with \"scripts/install-tools.sh %s\"", harness.Tools)
	}
	if out := harness.Output(t, harness.Command(t, program[0], append(program[1:], "--version")...)); !strings.HasPrefix(out, "PgBouncer "+version+".") {
		t.Fatalf("%s is not PgBouncer %s:\n%s", program[len(program)-1], version, out)
	}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	conf := harness.Write(t, p.dir+"/pgbouncer.ini", fmt.Sprintf(`[databases]
postgres = host=%s user=copilot
one = host=%[1]s user=copilot dbname=postgres pool_size=1
[pgbouncer]
listen_addr =
unix_socket_dir = %s
listen_port = 5432
auth_type = any
pool_mode = transaction
`, d.Dir, p.dir))
	for _, name := range []string{p.dir, conf} {
		if err := os.Chown(name, int(d.UID.Uid), int(d.UID.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	p.program = append(p.program, conf)
	p.start(t)
	return p
}

func (p *pooler) start(t testing.TB) {
	t.Helper()
	os.Remove(p.dir + "/.s.PGSQL.5432") // of one that was killed
	p.process = harness.Start(t, p.dir, "pgbouncer", exec.Command(p.program[0], p.program[1:]...))
	t.Cleanup(p.process.Kill) // a SIGTERM has newer ones wait for their clients
	harness.Await(t, "PgBouncer", harness.Reachable(p.dir+"/.s.PGSQL.5432"))
}

func (p *pooler) url(database string) string {
	return "postgres://copilot@/" + database + "?host=" + p.dir
}

// TestPgBouncer has two brokers share a database, each through a PgBouncer of
// another version, in transaction mode and with the defaults.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	m := harness.BareMachine(t, filepath.Join(harness.Tools, "trixie"))
	m.Mount(d.Dir, d.Dir, "", syscall.MS_BIND, "")
	user := fmt.Sprintf("%d:%d", d.UID.Uid, d.UID.Gid)
	poolers := []*pooler{
		pgbouncer(t, d, "1.18", "chroot", "--userspec="+user, "/", filepath.Join(harness.Tools, "bin/pgbouncer")),
		pgbouncer(t, d, "1.24", "chroot", "--userspec="+user, m.Root, "/usr/sbin/pgbouncer"),
	}
	dir := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir+"/0", "--database", poolers[0].url("postgres"), "team-a"))
	serve := func(name, url string) *replica {
		r := &replica{dir: filepath.Join(dir, name)}
		r.socket = r.dir + "/copilot.sock"
		harness.Write(t, r.dir+"/master.key", harness.Read(t, dir+"/0/master.key"))
		r.process = harness.Start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--dir", r.dir, "--database", url, "--listen", "unix://"+r.socket))
		harness.Await(t, "copilot", harness.Reachable(r.socket))
		return r
	}
	ready := func(r *replica, want int) error {
		if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/readyz", ""); status != want {
			return fmt.Errorf("readyz: %d %s, want %d", status, body, want)
		}
		return nil
	}
	var brokers []*replica
	for i, p := range poolers {
		brokers = append(brokers, serve(fmt.Sprint(i), p.url("postgres")))
	}

	// Another client keeps a KEK locked: the wait for it is bounded.
	harness.Output(t, brokers[0].keys(t, "create", "locked"))
	harness.Start(t, d.Dir, "lock", d.Command(t, "psql", "-h", d.Dir, "-U", "copilot", "-c",
		`SET application_name = locker; BEGIN; SELECT FROM copilot_keks WHERE id = 'locked' FOR UPDATE; SELECT pg_sleep(600)`, "postgres"))
	const lockers = ` FROM pg_stat_activity WHERE application_name = 'locker' AND wait_event = 'PgSleep'`
	harness.Await(t, "the lock", func() error {
		if n := d.Sql(t, `SELECT count(*)`+lockers); n != "1\n" {
			return fmt.Errorf("%s have it", n)
		}
		return nil
	})
	locked := make(chan string)
	go func() {
		out, _ := brokers[1].keys(t, "rotate", "locked").CombinedOutput()
		locked <- string(out)
	}()

	// All operations, many at once.
	var wg sync.WaitGroup
	for _, r := range brokers {
		for worker := range 4 {
			wg.Go(func() {
				own := fmt.Sprintf("%s-%d", filepath.Base(r.dir), worker)
				for _, cmd := range []*exec.Cmd{r.keys(t, "create", own), r.keys(t, "rotate", "team-a"), r.keys(t, "list"), r.keys(t, "disable", own), r.keys(t, "enable", own)} {
					if out, err := cmd.CombinedOutput(); err != nil {
						t.Errorf("%v: %v\n%s", cmd.Args, err, out)
					}
				}
				for range 10 {
					if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/team-a/key?version=1", ""); status != 200 && status != 429 {
						t.Errorf("get: %d %s", status, body)
					}
					if status, body := harness.RequestOverSocket(t, r.socket, "POST", "/api/v2/keks/"+own+"/wrap", `{"plaintext":"c2VjcmV0"}`); status != 200 && status != 429 {
						t.Errorf("wrap: %d %s", status, body)
					}
					harness.Await(t, "it is ready", func() error { return ready(r, 204) })
				}
			})
		}
	}
	wg.Wait()
	for _, r := range brokers {
		versionsAreWhole(t, r, "team-a", 9, 9)
	}
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", brokers[0].dir, "--database", poolers[1].url("postgres")))

	// Settings that poolers reject.
	prepares := serve("prepares", poolers[0].url("one")+"&default_query_exec_mode=cache_statement")
	var refused sync.Once
	for range 8 {
		wg.Go(func() {
			for range 5 {
				status, body := harness.RequestOverSocket(t, prepares.socket, "GET", "/api/v2/keks/team-a/key?version=1", "")
				switch status {
				case 200, 429:
				case 503:
					refused.Do(func() {})
				default:
					t.Errorf("get with prepared statements: %d %s", status, body)
				}
			}
		})
	}
	wg.Wait()
	refused.Do(func() { t.Error("prepared statements work with PgBouncer 1.18") })
	if log := harness.Read(t, prepares.process.Log); !strings.Contains(log, "remove default_query_exec_mode from the database's URL") {
		t.Errorf("no hint in\n%s", log)
	}
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", dir+"/other", "--database", poolers[0].url("postgres")+"&lock_timeout=1s"), "unsupported startup parameter", "remove it from the database's URL")

	// By PostgreSQL's limit for locks, or copilot's own for all.
	out := <-locked
	if log := harness.Read(t, brokers[1].process.Log); !strings.Contains(out, "the key store can't be reached") || !strings.Contains(log, "lock timeout") && !strings.Contains(log, "deadline exceeded") {
		t.Errorf("a rotation of a locked KEK: %s", out)
	}
	d.Sql(t, `SELECT pg_terminate_backend(pid)`+lockers)
	harness.Output(t, brokers[1].keys(t, "rotate", "locked"))

	// Without the pooler, and with it again.
	poolers[1].process.Kill()
	if err := ready(brokers[1], 503); err != nil {
		t.Error(err)
	}
	if status, body := harness.RequestOverSocket(t, brokers[1].socket, "GET", "/api/v2/keks/team-a/key", ""); status != 503 {
		t.Errorf("without PgBouncer: %d %s", status, body)
	}
	if err := ready(brokers[0], 204); err != nil {
		t.Error(err)
	}
	poolers[1].start(t)
	harness.Await(t, "ready again", func() error { return ready(brokers[1], 204) })
	harness.Output(t, brokers[1].keys(t, "rotate", "team-a"))
}

// TestReadOnlyDatabase: a broker on one is not ready, and says why.
func TestReadOnlyDatabase(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	r := replicas(t, d, 1)[0]
	harness.Output(t, r.keys(t, "create", "team-a"))
	state := func(what string, want int, log string) {
		t.Helper()
		harness.Await(t, what, func() error {
			status, body := harness.RequestOverSocket(t, r.socket, "GET", "/readyz", "")
			if status != want || !strings.Contains(harness.Read(t, r.process.Log), log) {
				return fmt.Errorf("%d %s, want %d and %q in the log", status, body, want, log)
			}
			return nil
		})
		if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/team-a/key", ""); (status == 200) != (want == 204) || status != 200 && status != 503 {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
	state("a database", 204, "")
	d.Sql(t, `ALTER SYSTEM SET default_transaction_read_only = on`)
	d.Sql(t, `SELECT pg_reload_conf()`)
	state("read-only", 503, "the database is read-only")
	d.Sql(t, `ALTER SYSTEM RESET default_transaction_read_only`)
	d.Sql(t, `SELECT pg_reload_conf()`)
	state("no longer read-only", 204, "")

	d.Crash(t)
	harness.Write(t, d.Dir+"/data/standby.signal", "")
	d.Start(t)
	state("a standby", 503, "the database is a standby")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", r.dir+"-other", "--database", d.URL()), "read-only transaction", "target_session_attrs=read-write")
	d.Crash(t)
	if err := os.Remove(d.Dir + "/data/standby.signal"); err != nil {
		t.Fatal(err)
	}
	d.Start(t)
	state("no longer a standby", 204, "")
}
