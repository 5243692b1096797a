package broker

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestDatabaseAwayAtStart starts copilot before PostgreSQL, and with a database that
// does not let it in.
func TestDatabaseAwayAtStart(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	d := harness.StartPostgres(t)
	d.Crash(t)
	dir := harness.TempDir(t)
	const notReady = "not ready: the database can't be used"
	serve := func(name, url string) (r *replica) {
		r = &replica{dir: dir + "/" + name, database: d}
		r.socket = r.dir + "/copilot.sock"
		r.process = harness.Start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--dir", r.dir, "--database", url, "--listen", "unix://"+r.socket))
		harness.Await(t, "copilot listens", harness.Reachable(r.socket))
		return r
	}
	ready := func(r *replica) {
		t.Helper()
		harness.Await(t, "copilot is ready", func() error {
			if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/readyz", ""); status != 204 {
				return fmt.Errorf("%d %s", status, body)
			}
			return nil
		})
	}
	refuses := func(r *replica, why string) {
		t.Helper()
		if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the key store can't be reached") {
			t.Errorf("readyz: %d %s", status, body)
		}
		if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/healthz", ""); status != 204 {
			t.Errorf("healthz: %d %s", status, body)
		}
		status, body := harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/team-a/key", "")
		if status != 503 || !strings.Contains(body, "copilot is not ready: its database can't be used") || strings.Contains(body, why) {
			t.Errorf("a request: %d %s", status, body)
		}
		harness.ExpectFailure(t, r.keys(t, "list"), "copilot is not ready", why, "tried again")
		if n := r.process.Logged(t, notReady); n == 0 || r.process.Logged(t, why) == 0 {
			t.Errorf("%d lines that say that it is not ready:\n%s", n, harness.Read(t, r.process.Log))
		}
	}

	r := serve("away", d.URL())
	refuses(r, "failed to connect")
	time.Sleep(3 * time.Second) // it tries again
	if n := r.process.Logged(t, notReady); n != 1 {
		t.Errorf("%d lines say the same", n)
	}
	d.Start(t)
	ready(r)
	harness.Output(t, r.keys(t, "create", "team-a"))
	if status, body := harness.RequestOverSocket(t, r.socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("after the database came: %d %s", status, body)
	}
	if out := harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", r.dir, "--database", d.URL())); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}

	// A wrong password, then no right to create tables.
	d.Sql(t, `CREATE ROLE app LOGIN PASSWORD 'right'`)
	d.Sql(t, `CREATE DATABASE app`)
	harness.Write(t, d.Dir+"/data/pg_hba.conf", "local all app scram-sha-256\nlocal all all trust\n")
	d.Reload(t)
	r = serve("app", "postgres://app:hunter2@/app?host="+d.Dir)
	refuses(r, "password authentication failed")
	d.Sql(t, `ALTER ROLE app PASSWORD 'hunter2'`)
	harness.Await(t, "the next reason is logged", func() error {
		if r.process.Logged(t, "permission denied for schema public") == 0 {
			return fmt.Errorf("log:\n%s", harness.Read(t, r.process.Log))
		}
		return nil
	})
	refuses(r, "permission denied for schema public")
	d.Sql(t, `ALTER DATABASE app OWNER TO app`)
	ready(r)
	harness.Output(t, r.keys(t, "create", "team-a"))
	if n := r.process.Logged(t, "hunter2"); n != 0 {
		t.Errorf("the password is in the log %d times", n)
	}

	// Another master key is no reason to wait.
	other := dir + "/other"
	harness.Write(t, other+"/master.key", strings.Repeat("x", 32))
	harness.ExpectFailure(t, harness.Command(t, "copilot", "serve", "--dir", other, "--database", d.URL(), "--listen", "unix://"+other+"/copilot.sock"), "not the one that the KEKs are sealed with")

	// It stops while it waits.
	d.Crash(t)
	r = serve("stopped", d.URL())
	r.process.Stop(t)
	if code := r.process.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("it ends with status %d:\n%s", code, harness.Read(t, r.process.Log))
	}
}
