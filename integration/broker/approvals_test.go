package broker

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

var requestID = regexp.MustCompile(`copilot approvals approve ([a-z2-7]{12})`)

// asked runs a command that has to be refused since it needs a second admin, and returns
// the id of its request.
func asked(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out := harness.CombinedOutput(t, cmd)
	id := requestID.FindStringSubmatch(out)
	if id == nil || cmd.ProcessState.ExitCode() != 3 {
		t.Fatalf("%s: exit status %d\n%s", strings.Join(cmd.Args, " "), cmd.ProcessState.ExitCode(), out)
	}
	return id[1]
}

// approving appends to a broker's configuration which operations need a second admin.
func approving(t *testing.T, config, validFor string) {
	t.Helper()
	harness.Write(t, config, harness.Read(t, config)+"\n[approvals]\nrequire = [\"destroy\", \"export\", \"restore\", \"master-rotate\"]\nvalid-for = \""+validFor+"\"\n")
}

// TestDestroyNeedsASecondAdmin has root on the broker's machine destroy a KEK, which an
// admin with a certificate approves: for this KEK, this version and this time, once, and
// across a restart.
func TestDestroyNeedsASecondAdmin(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a", "team-b")
	approving(t, b.Dir+"/copilot.toml", "24h")
	b.Process.Stop(t)
	b.Start(t)
	node, nodeKey := b.Enroll(t, "worker-7")
	as := func(cert, key string, args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append(args, "--server", b.URL(), "--ca", b.Dir+"/ca.pem", "--cert", cert, "--key", key)...)
	}
	admin := func(args ...string) *exec.Cmd { return as(b.Dir+"/admin.pem", b.Dir+"/admin-key.pem", args...) }
	destroy := func(kek string, more ...string) *exec.Cmd {
		return b.Command(t, "keys", "destroy", append([]string{"--after", "0", "--yes", kek}, more...)...)
	}
	state := func(kek string) string { return harness.Output(t, b.Command(t, "keys", "show", kek)) }

	id := asked(t, destroy("team-a"))
	if again := asked(t, destroy("team-a")); again != id {
		t.Errorf("another request for the same: %s and %s", id, again)
	}
	other := asked(t, destroy("team-b"))
	if other == id {
		t.Error("one request for two KEKs")
	}
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", "spiffe://example.com/admin", "team-b"))
	harness.ExpectFailure(t, admin("approvals", "approve", other), "spiffe://example.com/admin may not")
	if strings.Contains(state("team-a"), "destroyed") {
		t.Fatal("destroyed without approval")
	}
	harness.ExpectFailure(t, b.Command(t, "approvals", "approve", id), "uid:0 has made request "+id, "somebody else has to approve it")
	// Another user of the admin socket is nobody else.
	if out := harness.CombinedOutput(t, harness.Command(t, "setpriv", "--reuid=4242", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override",
		"curl", "-s", "--unix-socket", b.Dir+"/store/admin.sock", "-X", "POST", "http://copilot/api/v2/approvals/"+id+"/approve")); !strings.Contains(out, "somebody else has to approve it") {
		t.Errorf("root as another user: %s", out)
	}
	harness.ExpectFailure(t, as(node, nodeKey, "approvals", "approve", id), "no such request")
	if out := harness.Output(t, as(node, nodeKey, "approvals", "list")); strings.Contains(out, id) {
		t.Errorf("a node sees %s", out)
	}
	if out := harness.Output(t, admin("approvals", "list")); !strings.Contains(out, id) || !strings.Contains(out, "uid:0") || !strings.Contains(out, "all versions, 0s after it is run") {
		t.Errorf("the admin sees %s", out)
	}
	harness.ExpectFailure(t, admin("approvals", "approve", "nonsense"), "no such request")
	harness.Output(t, admin("approvals", "approve", id))
	harness.ExpectFailure(t, admin("approvals", "approve", id), "has approved request "+id+" already")

	// For nothing else, and nobody else.
	if other := asked(t, b.Command(t, "keys", "destroy", "--key-version", "1", "--after", "0", "--yes", "team-a")); other == id {
		t.Error("it is good for a version")
	}
	if other := asked(t, b.Command(t, "keys", "destroy", "--after", "1h", "team-a")); other == id {
		t.Error("it is good for another time")
	}
	if other := asked(t, admin("keys", "destroy", "--after", "0", "--yes", "team-a")); other == id {
		t.Error("it is good for another admin")
	}
	b.Process.Stop(t)
	// Without a broker too, after a restart, and once.
	harness.Output(t, destroy("team-a"))
	if !strings.Contains(state("team-a"), "destroyed") {
		t.Errorf("not destroyed: %s", state("team-a"))
	}
	b.Start(t)
	if again := asked(t, destroy("team-a")); again == id {
		t.Error("it is good twice")
	}
	harness.ExpectFailure(t, admin("approvals", "approve", id), "was used")
	log := harness.Read(t, b.Dir+"/store/audit.log")
	for _, want := range []string{
		`"action":"approval-request","kek":"team-a","who":"uid:0"`,
		`"action":"approve","kek":"team-a","who":"spiffe://example.com/admin"`,
		`"approval":"` + id + `, approved by spiffe://example.com/admin"`,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
	harness.Output(t, b.Command(t, "audit", "verify"))
}

// TestExportOutsideThePolicyNeedsASecondAdmin has the store's owner take out a KEK over the
// admin socket, and a backup for a key of their own. Neither works alone, and both do
// where the policy or the configuration says so.
func TestExportOutsideThePolicyNeedsASecondAdmin(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	b := harness.NewTLSBroker(t, "team-a")
	identity, recipient := backupKey(t, b.Dir)
	_, other := backupKey(t, harness.TempDir(t))
	harness.Write(t, b.Dir+"/copilot.toml", "backup-recipients = \""+harness.Write(t, b.Dir+"/recipients", recipient+"\n")+"\"\n"+harness.Read(t, b.Dir+"/copilot.toml"))
	approving(t, b.Dir+"/copilot.toml", "24h")
	policy := b.Dir + "/policy.toml"
	harness.Write(t, policy, strings.Replace(harness.Read(t, policy), `identities = ["uid:0"]`, `identities = ["uid:4242"]`, 1))
	b.Process.Stop(t)
	b.Start(t)
	approve := func(id string) {
		t.Helper()
		harness.Output(t, harness.Command(t, "copilot", "approvals", "approve", "--server", b.URL(), "--ca", b.Dir+"/ca.pem", "--cert", b.Dir+"/admin.pem", "--key", b.Dir+"/admin-key.pem", id))
	}
	for _, path := range []string{"/api/v2/keks/team-a/key", "/api/v1/key/team-a"} {
		get := func() (int, string) {
			return harness.RequestOverSocket(t, b.Dir+"/store/admin.sock", "GET", path, "")
		}
		status, body := get()
		id := requestID.FindStringSubmatch(body)
		if status != 403 || id == nil || !strings.Contains(body, "urn:pilot:problem:needs-approval") {
			t.Fatalf("%s: %d %s", path, status, body)
		}
		approve(id[1])
		if status, body := get(); status != 200 {
			t.Errorf("%s, approved: %d %s", path, status, body)
		}
		if status, _ := get(); status != 403 {
			t.Errorf("%s, again: %d", path, status)
		}
	}
	harness.Output(t, harness.Command(t, "copilot", "backup", "--config", b.Dir+"/copilot.toml", "--out", b.Dir+"/1.backup"))
	mine := func() *exec.Cmd {
		return harness.Command(t, "copilot", "backup", "--config", b.Dir+"/copilot.toml", "--recipient", other, "--out", b.Dir+"/2.backup")
	}
	approve(asked(t, mine()))
	harness.Output(t, mine())

	// A restore needs one, too.
	store := b.Dir + "/new"
	restore := func() *exec.Cmd {
		return harness.Command(t, "copilot", "restore", "--config", b.Dir+"/copilot.toml", "--dir", store, "--identity", identity, b.Dir+"/1.backup")
	}
	b.Process.Stop(t)
	id := asked(t, restore())
	p := harness.Start(t, store, "copilot", exec.Command("copilot", "serve", "--config", b.Dir+"/copilot.toml", "--dir", store, "--listen", b.Address, "--listen", "unix://"+store+"/copilot.sock"))
	harness.Await(t, "copilot", harness.Reachable(store+"/copilot.sock"))
	approve(id)
	p.Stop(t)
	harness.Output(t, restore())
	if log := harness.Read(t, store+"/audit.log"); !strings.Contains(log, `"approval":"`+id+`, approved by spiffe://example.com/admin"`) {
		t.Error("the audit log does not say who has approved the restore")
	}

	// And a rotation of the master key.
	asked(t, harness.Command(t, "copilot", "master", "rotate", "--config", b.Dir+"/copilot.toml"))
}

// TestApprovalIsSharedTimeLimitedAndNotReplayed makes a request on one replica, which is
// seen on another. A used one that is put back in the database does not count, nor does one
// that has expired.
func TestApprovalIsSharedTimeLimitedAndNotReplayed(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	rs := replicas(t, d, 2)
	for i, r := range rs {
		r.process.Stop(t)
		config := harness.Write(t, r.dir+"/copilot.toml", "dir = \""+r.dir+"\"\ndatabase = \""+d.URL()+"\"\npolicy = \""+
			harness.Write(t, r.dir+"/policy.toml", "[[rule]]\nidentities = [\"uid:4242\"]\nkeks = [\"**\"]\nactions = [\"admin\"]\n"+
				"[[rule]]\nidentities = [\"uid:4343\"]\nkeks = [\"*\", \"*/*\"]\nactions = [\"admin\"]\n")+"\"\nsocket-mode = \"0666\"\n")
		approving(t, config, map[int]string{0: "1h", 1: "1s"}[i])
		for dir := r.dir; dir != "/tmp"; dir = dir[:strings.LastIndex(dir, "/")] {
			os.Chmod(dir, 0o755)
		}
		r.process = harness.Start(t, r.dir, "copilot", exec.Command("copilot", "serve", "--config", config, "--listen", "unix://"+r.socket))
		harness.Await(t, "copilot", harness.Reachable(r.socket))
		harness.Output(t, r.keys(t, "create", map[int]string{0: "a", 1: "b"}[i]))
	}
	destroy := func(r *replica, kek string) *exec.Cmd { return r.keys(t, "destroy", "--after", "1h", kek) }
	as := func(uid string, r *replica, id string) string {
		return harness.CombinedOutput(t, harness.Command(t, "setpriv", "--reuid="+uid, "--clear-groups", "curl", "-s", "--unix-socket", r.socket, "-X", "POST", "http://copilot/api/v2/approvals/"+id+"/approve"))
	}
	approve := func(r *replica, id string) string { return as("4242", r, id) }
	store := asked(t, harness.Command(t, "copilot", "master", "rotate", "--dir", rs[0].dir))
	if out := as("4343", rs[0], store); !strings.Contains(out, "no such request") {
		t.Errorf("an admin of some KEKs approved a rotation of the master key: %s", out)
	}
	id := asked(t, destroy(rs[0], "a"))
	if out := harness.Output(t, harness.Command(t, "copilot", "approvals", "list", "--dir", rs[1].dir)); !strings.Contains(out, id) {
		t.Errorf("the other replica lists %s", out)
	}
	if out := approve(rs[1], id); !strings.Contains(out, `"approved":"uid:4242"`) {
		t.Fatalf("approved: %s", out)
	}
	d.Sql(t, "CREATE TABLE earlier AS SELECT * FROM copilot_once WHERE name = 'approval "+id+"'")
	harness.Output(t, destroy(rs[0], "a"))
	harness.Output(t, rs[0].keys(t, "enable", "a"))
	d.Sql(t, "UPDATE copilot_once o SET value = e.value FROM earlier e WHERE o.name = e.name")
	for _, r := range rs {
		if again := asked(t, destroy(r, "a")); again == id {
			t.Error("a used request was used again")
		}
	}

	id = asked(t, destroy(rs[1], "b"))
	time.Sleep(1500 * time.Millisecond)
	if out := approve(rs[0], id); !strings.Contains(out, "has expired") {
		t.Errorf("approved too late: %s", out)
	}
	if again := asked(t, destroy(rs[1], "b")); again == id {
		t.Error("an expired request is still there")
	}
}
