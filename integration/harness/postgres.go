package harness

import (
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// Database is a PostgreSQL of the test's own, on a unix socket.
type Database struct {
	Dir, bin string
	UID      *syscall.Credential
	Process  *Process
}

// StartPostgres makes and starts a database.
func StartPostgres(t testing.TB) *Database {
	t.Helper()
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	owner, err := user.Lookup("postgres")
	if len(bins) == 0 || err != nil {
		t.Fatalf("PostgreSQL is missing: install it with \"scripts/install-tools.sh %s\"", Tools)
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	d := &Database{Dir: TempDir(t), bin: bins[len(bins)-1], UID: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	if err := os.Chown(d.Dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	Output(t, d.Command(t, "initdb", "-D", d.Dir+"/data", "-A", "trust", "-U", "copilot", "--no-sync"))
	d.Start(t)
	return d
}

// Command returns one of PostgreSQL's programs, which do not run as root.
func (d *Database) Command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := Command(t, filepath.Join(d.bin, name), args...)
	cmd.Dir, cmd.SysProcAttr = d.Dir, &syscall.SysProcAttr{Credential: d.UID}
	return cmd
}

func (d *Database) Start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(filepath.Join(d.bin, "postgres"), "-D", d.Dir+"/data", "-k", d.Dir, "-c", "listen_addresses=", "-c", "fsync=off")
	cmd.Dir, cmd.SysProcAttr = d.Dir, &syscall.SysProcAttr{Credential: d.UID}
	d.Process = Start(t, d.Dir, "postgres", cmd)
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGINT) // does not wait for those that are connected
		<-d.Process.Done
	})
	Await(t, "PostgreSQL", func() error { return d.Command(t, "pg_isready", "-h", d.Dir, "-U", "copilot", "-d", "postgres").Run() })
}

// Crash ends the database at once, in the middle of whatever it does.
func (d *Database) Crash(t testing.TB) {
	t.Helper()
	d.Process.Cmd.Process.Signal(syscall.SIGQUIT)
	<-d.Process.Done
}

func (d *Database) URL() string { return "postgres://copilot@/postgres?host=" + d.Dir }

// Sql runs statements and returns what they say.
func (d *Database) Sql(t testing.TB, statements string) string {
	t.Helper()
	return Output(t, d.Command(t, "psql", "-h", d.Dir, "-U", "copilot", "-At", "-c", statements, "postgres"))
}

// Reload has PostgreSQL read its configuration, and waits until that counts for new
// connections.
func (d *Database) Reload(t testing.TB) {
	t.Helper()
	loaded := d.Sql(t, "SELECT pg_conf_load_time()")
	d.Sql(t, "SELECT pg_reload_conf()")
	Await(t, "PostgreSQL reads its configuration", func() error {
		if d.Sql(t, "SELECT pg_conf_load_time()") == loaded {
			return errors.New("not yet")
		}
		return nil
	})
}
