package integration

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// logged returns how many lines of a program's log have the text.
func (p *process) logged(t testing.TB, text string) (n int) {
	t.Helper()
	for line := range strings.Lines(read(t, p.log)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// TestDatabaseAwayAtStart starts copilot before PostgreSQL, and with a database that
// does not let it in.
func TestDatabaseAwayAtStart(t *testing.T) {
	t.Parallel()
	d := postgres(t)
	d.crash(t)
	dir := tempDir(t)
	const notReady = "not ready: the database can't be used"
	serve := func(name, url string) (r *replica) {
		r = &replica{dir: dir + "/" + name, database: d}
		r.socket = r.dir + "/copilot.sock"
		r.process = start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--dir", r.dir, "--database", url, "--listen", "unix://"+r.socket))
		await(t, "copilot listens", answers(r.socket))
		return r
	}
	ready := func(r *replica) {
		t.Helper()
		await(t, "copilot is ready", func() error {
			if status, body := ask(t, r.socket, "GET", "/readyz", ""); status != 204 {
				return fmt.Errorf("%d %s", status, body)
			}
			return nil
		})
	}
	refuses := func(r *replica, why string) {
		t.Helper()
		if status, body := ask(t, r.socket, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the key store can't be reached") {
			t.Errorf("readyz: %d %s", status, body)
		}
		if status, body := ask(t, r.socket, "GET", "/healthz", ""); status != 204 {
			t.Errorf("healthz: %d %s", status, body)
		}
		status, body := ask(t, r.socket, "GET", "/api/v2/keks/team-a/key", "")
		if status != 503 || !strings.Contains(body, "copilot is not ready: its database can't be used") || strings.Contains(body, why) {
			t.Errorf("a request: %d %s", status, body)
		}
		fails(t, r.keys(t, "list"), "copilot is not ready", why, "tried again")
		if n := r.process.logged(t, notReady); n == 0 || r.process.logged(t, why) == 0 {
			t.Errorf("%d lines that say that it is not ready:\n%s", n, read(t, r.process.log))
		}
	}

	r := serve("away", d.url())
	refuses(r, "failed to connect")
	time.Sleep(3 * time.Second) // it tries again
	if n := r.process.logged(t, notReady); n != 1 {
		t.Errorf("%d lines say the same", n)
	}
	d.start(t)
	ready(r)
	output(t, r.keys(t, "create", "team-a"))
	if status, body := ask(t, r.socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
		t.Errorf("after the database came: %d %s", status, body)
	}
	if out := output(t, command(t, "copilot", "audit", "verify", "--dir", r.dir, "--database", d.url())); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}

	// A wrong password, then no right to make tables.
	d.sql(t, `CREATE ROLE app LOGIN PASSWORD 'right'`)
	d.sql(t, `CREATE DATABASE app`)
	write(t, d.dir+"/data/pg_hba.conf", "local all app scram-sha-256\nlocal all all trust\n")
	d.sql(t, `SELECT pg_reload_conf()`)
	r = serve("app", "postgres://app:hunter2@/app?host="+d.dir)
	refuses(r, "password authentication failed")
	d.sql(t, `ALTER ROLE app PASSWORD 'hunter2'`)
	await(t, "the next reason is logged", func() error {
		if r.process.logged(t, "permission denied for schema public") == 0 {
			return fmt.Errorf("log:\n%s", read(t, r.process.log))
		}
		return nil
	})
	refuses(r, "permission denied for schema public")
	d.sql(t, `ALTER DATABASE app OWNER TO app`)
	ready(r)
	output(t, r.keys(t, "create", "team-a"))
	if n := r.process.logged(t, "hunter2"); n != 0 {
		t.Errorf("the password is in the log %d times", n)
	}

	// Another master key is no reason to wait.
	other := dir + "/other"
	write(t, other+"/master.key", strings.Repeat("x", 32))
	fails(t, command(t, "copilot", "serve", "--dir", other, "--database", d.url(), "--listen", "unix://"+other+"/copilot.sock"), "not the one that the KEKs are sealed with")

	// It stops while it waits.
	d.crash(t)
	r = serve("stopped", d.url())
	r.process.stop(t)
	if code := r.process.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("it ends with status %d:\n%s", code, read(t, r.process.log))
	}
}
