package integration

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// database is a PostgreSQL of the test's own, on a unix socket.
type database struct {
	dir, bin string
	uid      *syscall.Credential
	process  *process
}

// postgres makes and starts a database.
func postgres(t testing.TB) *database {
	t.Helper()
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	owner, err := user.Lookup("postgres")
	if len(bins) == 0 || err != nil {
		t.Fatalf("PostgreSQL is missing: install it with \"scripts/install-tools.sh %s\"", tools)
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	d := &database{dir: tempDir(t), bin: bins[len(bins)-1], uid: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	if err := os.Chown(d.dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	output(t, d.command(t, "initdb", "-D", d.dir+"/data", "-A", "trust", "-U", "copilot", "--no-sync"))
	d.start(t)
	return d
}

// command returns one of PostgreSQL's programs, which do not run as root.
func (d *database) command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := command(t, filepath.Join(d.bin, name), args...)
	cmd.Dir, cmd.SysProcAttr = d.dir, &syscall.SysProcAttr{Credential: d.uid}
	return cmd
}

func (d *database) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(filepath.Join(d.bin, "postgres"), "-D", d.dir+"/data", "-k", d.dir, "-c", "listen_addresses=", "-c", "fsync=off")
	cmd.Dir, cmd.SysProcAttr = d.dir, &syscall.SysProcAttr{Credential: d.uid}
	d.process = start(t, d.dir, "postgres", cmd)
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGINT) // does not wait for those that are connected
		<-d.process.done
	})
	await(t, "PostgreSQL", func() error { return d.command(t, "pg_isready", "-h", d.dir, "-U", "copilot", "-d", "postgres").Run() })
}

// crash ends the database at once, in the middle of whatever it does.
func (d *database) crash(t testing.TB) {
	t.Helper()
	d.process.cmd.Process.Signal(syscall.SIGQUIT)
	<-d.process.done
}

func (d *database) url() string { return "postgres://copilot@/postgres?host=" + d.dir }

// sql runs statements and returns what they say.
func (d *database) sql(t testing.TB, statements string) string {
	t.Helper()
	return output(t, d.command(t, "psql", "-h", d.dir, "-U", "copilot", "-At", "-c", statements, "postgres"))
}

// replica is one of several brokers on a database.
type replica struct {
	dir, socket string
	process     *process
	database    *database
}

// replicas starts brokers on the database, which share a master key.
func replicas(t testing.TB, d *database, n int) []*replica {
	t.Helper()
	dir := tempDir(t)
	var all []*replica
	for i := range n {
		r := &replica{dir: fmt.Sprintf("%s/%d", dir, i), database: d}
		r.socket = r.dir + "/copilot.sock"
		if i == 0 {
			output(t, command(t, "copilot", "keys", "list", "--dir", r.dir, "--database", d.url()))
		} else {
			write(t, r.dir+"/master.key", read(t, all[0].dir+"/master.key"))
		}
		r.start(t)
		all = append(all, r)
	}
	return all
}

func (r *replica) start(t testing.TB) {
	t.Helper()
	r.process = start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--dir", r.dir, "--database", r.database.url(), "--listen", "unix://"+r.socket))
	await(t, "copilot", answers(r.socket))
}

func (r *replica) keys(t testing.TB, verb string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, "copilot", append([]string{"keys", verb, "--dir", r.dir}, args...)...)
}

// TestReplicas has several brokers work on one database at once, and takes it
// away from them.
func TestReplicas(t *testing.T) {
	t.Parallel()
	d := postgres(t)
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
	rs[2].process.kill()
	time.Sleep(500 * time.Millisecond)
	d.crash(t)
	if status, body := ask(t, rs[1].socket, "GET", "/api/v2/keks/kek-1/key?version=1", ""); status != 503 || !strings.Contains(body, "request") {
		t.Errorf("without a database: %d %s", status, body)
	}
	if status, body := ask(t, rs[1].socket, "GET", "/readyz", ""); status != 503 || !strings.Contains(body, "the key store can't be reached") {
		t.Errorf("without a database: %d %s", status, body)
	}
	if status, _ := ask(t, rs[1].socket, "GET", "/healthz", ""); status != 204 {
		t.Errorf("healthz without a database: %d", status)
	}
	if out, err := rs[1].keys(t, "show", "kek-1").CombinedOutput(); err == nil || !strings.Contains(string(out), "can't be") {
		t.Errorf("without a database: %v\n%s", err, out)
	}
	d.start(t)
	await(t, "the broker works again", func() error {
		if status, body := ask(t, rs[1].socket, "GET", "/api/v2/keks/kek-1/key?version=1", ""); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	await(t, "it rotates again", func() error { return rs[0].keys(t, "rotate", "kek-1").Run() })
	close(stop)
	wg.Wait()
	rs[2].start(t)
	// A change that was made may have been reported as failed, and never the
	// other way round.
	versionsAreWhole(t, rs[2], "kek-1", int(rotated.Load())+2, int(rotated.Load())+10)

	// A broker that has another master key, and one that has none.
	other := tempDir(t)
	fails(t, command(t, "copilot", "keys", "list", "--dir", other, "--database", d.url()), "the master key is missing")
	write(t, other+"/master.key", strings.Repeat("x", 32))
	fails(t, command(t, "copilot", "keys", "list", "--dir", other, "--database", d.url()), "not the one that the KEKs are sealed with")
	fails(t, command(t, "copilot", "keys", "list", "--dir", other, "--database", "postgres://copilot:hunter2@/postgres?host="+other), "database", "failed to connect")
	if out, _ := command(t, "copilot", "keys", "list", "--dir", other, "--database", "postgres://copilot:hunter2@127.0.0.1:1/postgres?sslmode=bad").CombinedOutput(); strings.Contains(string(out), "hunter2") {
		t.Errorf("the password is in the error: %s", out)
	}

	// No path keeps a request out of the log, or others that come at the same time.
	for range 20 {
		wg.Go(func() {
			if status, body := ask(t, rs[0].socket, "GET", "/api/v2/keks/a%00b", ""); status != 404 && status != 429 {
				t.Errorf("a zero byte: %d %s", status, body)
			}
			if status, body := ask(t, rs[0].socket, "GET", "/api/v2/keks/kek-4", ""); status != 200 && status != 429 {
				t.Errorf("beside a zero byte: %d %s", status, body)
			}
		})
	}
	wg.Wait()
	if n := strings.TrimSpace(d.sql(t, `SELECT count(*) > 0 FROM copilot_audit WHERE entry->>'kek' LIKE '%a%b%'`)); n != "t" {
		t.Error("a request with a zero byte is not in the audit log")
	}

	// The audit log is in the database, and whoever changes it there is found.
	verify := func() *exec.Cmd {
		return command(t, "copilot", "audit", "verify", "--dir", rs[0].dir, "--database", d.url())
	}
	if out := output(t, verify()); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}
	row := strings.Split(strings.TrimSpace(d.sql(t, `SELECT chain, seq FROM copilot_audit WHERE entry->>'action' = 'rotate' AND seq > 3 LIMIT 1`)), "|")
	where := fmt.Sprintf("WHERE chain = '%s' AND seq = %s", row[0], row[1])
	d.sql(t, `BEGIN; CREATE TABLE saved AS SELECT * FROM copilot_audit `+where+`; UPDATE copilot_audit SET line = replace(line, '"uid:0"', '"uid:1"') `+where+`; COMMIT`)
	fails(t, verify(), "it was changed")
	d.sql(t, `DELETE FROM copilot_audit `+where)
	fails(t, verify(), "are missing before it")
	d.sql(t, `INSERT INTO copilot_audit (chain, seq, line) SELECT chain, seq, line FROM saved`)
	output(t, verify())

	// Whoever writes the database can't enable what was disabled.
	before := d.sql(t, `SELECT encode(record, 'hex') FROM copilot_keks WHERE id = 'kek-2'`)
	output(t, rs[0].keys(t, "disable", "kek-2"))
	d.sql(t, `UPDATE copilot_keks SET record = convert_to(replace(convert_from(record, 'UTF8'), '"disabled":true', '"disabled":null'), 'UTF8') WHERE id = 'kek-2'`)
	fails(t, rs[1].keys(t, "show", "kek-2"), "the broker could not do it")
	d.sql(t, `UPDATE copilot_keks SET record = decode('`+strings.TrimSpace(before)+`', 'hex') WHERE id = 'kek-2'`)

	// No key is in the database as it is.
	status, body := ask(t, rs[0].socket, "GET", "/api/v1/key/kek-3", "")
	if status != 200 || len(body) != 32 {
		t.Fatalf("%d, %d bytes", status, len(body))
	}
	dump := d.sql(t, `SELECT encode(record, 'hex') || encode(record, 'escape') FROM copilot_keks UNION ALL SELECT line FROM copilot_audit`)
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
		status, body := ask(t, r.socket, "GET", fmt.Sprintf("/api/v2/keks/%s/key?version=%d", kek, version), "")
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
