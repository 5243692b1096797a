package broker

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// backupKey makes an age key pair, and returns the file of the identity and the recipient.
func backupKey(t *testing.T, dir string) (identity, recipient string) {
	t.Helper()
	id, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return harness.Write(t, dir+"/identity.txt", id.String()+"\n"), id.Recipient().String()
}

// described returns what a store says of all its KEKs.
func described(t *testing.T, args ...string) string {
	t.Helper()
	return harness.Output(t, harness.Command(t, "copilot", append([]string{"keys", "list", "--json"}, args...)...))
}

// TestBackupRestoredFromSharesElsewhere loses the broker's machine: three of five shares
// restore its KEKs into PostgreSQL, and from there into a file, each time under another
// master key. An image's key is unwrapped after each, and nothing of a KEK's life is lost.
func TestBackupRestoredFromSharesElsewhere(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	store, shares := dir+"/store", dir+"/shares"
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", args...) }
	harness.Output(t, copilot("backup", "shares", "--shares", "5", "--threshold", "3", "--out", shares))
	for _, kek := range []string{"team-a", "team-b", "other/c"} {
		harness.Output(t, copilot("keys", "create", "--dir", store, kek))
	}
	first, url := harness.StartBroker(t, store)
	_, conf := harness.StartPilot(t, dir+"/ci", url)
	c := harness.NewCI(t, dir+"/ci", conf)
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	for _, args := range [][]string{
		{"rotate", "team-a"}, {"revoke", "--identity", "uid:4242", "team-b"}, {"disable", "--key-version", "1", "other/c"},
		{"rotate", "team-b"}, {"destroy", "--key-version", "1", "--after", "0", "--yes", "team-b"}, {"rotate", "other/c"}, {"destroy", "--key-version", "2", "other/c"},
	} {
		harness.Output(t, copilot(append([]string{"keys", args[0], "--dir", store}, args[1:]...)...))
	}
	want := described(t, "--dir", store)

	// While it runs, for the file of the configuration.
	config := harness.Write(t, dir+"/copilot.toml", fmt.Sprintf("dir = %q\nbackup-recipients = %q\n", store, shares+"/recipient.txt"))
	out := harness.Output(t, copilot("backup", "--config", config, "--out", dir+"/1.backup"))
	if !strings.Contains(out, "3 KEKs with 6 versions and 5 keys") {
		t.Error(out)
	}
	digest := strings.Fields(out)[len(strings.Fields(out))-1]
	if log := harness.Read(t, store+"/audit.log"); !strings.Contains(log, `"action":"backup"`) || !strings.Contains(log, digest) {
		t.Errorf("the audit log does not have %s", digest)
	}
	if info, err := os.Stat(dir + "/1.backup"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	// To standard output too, from where there is no file to fetch.
	harness.Write(t, dir+"/piped.backup", harness.Output(t, copilot("backup", "--config", config, "--out", "-")))
	harness.Output(t, copilot("backup", "verify", "--compare", "--config", config, "--share", shares+"/share-1.txt", "--share", shares+"/share-2.txt", "--share", shares+"/share-3.txt", dir+"/piped.backup"))
	first.Stop(t)
	log := harness.Write(t, dir+"/old.log", harness.Read(t, store+"/audit.log"))
	if err := os.RemoveAll(store); err != nil {
		t.Fatal(err)
	}

	d := harness.StartPostgres(t)
	three := []string{"--share", shares + "/share-5.txt", "--share", shares + "/share-1.txt", "--share", shares + "/share-4.txt"}
	harness.Output(t, copilot(append(append([]string{"backup", "verify"}, three...), dir+"/1.backup")...))
	there := []string{"--dir", dir + "/machine-2", "--database", d.URL()}
	restore := func(args ...string) string {
		return harness.Output(t, copilot(append([]string{"restore"}, args...)...))
	}
	if out := restore(append(append(there, three...), dir+"/1.backup")...); !strings.Contains(out, "restored 3 KEKs with 6 versions and 5 keys") {
		t.Error(out)
	}
	if line := d.Sql(t, "SELECT line FROM copilot_audit WHERE entry->>'action' = 'restore'"); !strings.Contains(line, digest) {
		t.Errorf("the audit log has %s, and the backup is %s", line, digest)
	}
	if got := described(t, there...); got != want {
		t.Errorf("in the database: %s, want %s", got, want)
	}
	works := func(name string, args ...string) {
		t.Helper()
		decryptsWith(t, c, dir, image, name, args...)
	}
	works("database", there...)
	harness.ExpectFailure(t, copilot(append(append(append([]string{"restore"}, there...), three...), dir+"/1.backup")...), "the store has KEKs already", "restore into an empty one")

	harness.Output(t, copilot(append(append([]string{"backup"}, there...), "--recipients-file", shares+"/recipient.txt", "--out", dir+"/2.backup")...))
	restore(append([]string{"--dir", dir + "/machine-3"}, append(three, dir+"/2.backup")...)...)
	if got := described(t, "--dir", dir+"/machine-3"); got != want {
		t.Errorf("back in a file: %s, want %s", got, want)
	}
	works("file", "--dir", dir+"/machine-3")
	if harness.Read(t, dir+"/machine-2/master.key") == harness.Read(t, dir+"/machine-3/master.key") {
		t.Error("the stores have one master key")
	}
	harness.Output(t, copilot("audit", "verify", "--dir", dir+"/machine-3"))

	// The log of the machine that is lost, whose key only the backup has.
	verify := func(more ...string) *exec.Cmd {
		return copilot(append([]string{"audit", "verify", "--dir", dir + "/machine-3"}, more...)...)
	}
	harness.ExpectFailure(t, verify(log), "it was changed, or written with another master key")
	old := append(three, "--backup", dir+"/1.backup")
	if out := harness.Output(t, verify(append(old, log)...)); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}
	lines := strings.SplitAfter(harness.Read(t, log), "\n")
	cut := harness.Write(t, dir+"/cut.log", strings.Join(lines[:3], ""))
	harness.ExpectFailure(t, verify(append(old, cut)...), "ends with line 3, and copilot has noted line", "lines were cut off")
	harness.ExpectFailure(t, verify(old...), "name the files of the log")
	harness.ExpectFailure(t, verify("--backup", dir+"/1.backup", log), "--identity FILE, or --share FILE")
}

// TestBackupIsReadByAge opens a backup with the age program, by a post-quantum key, by one
// of SSH, and not by another.
func TestBackupIsReadByAge(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir+"/store", "team-a"))
	identity, recipient := backupKey(t, dir)
	ssh := dir + "/ssh"
	harness.Output(t, harness.Command(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh))
	for name, test := range map[string]struct{ recipient, identity string }{
		"pq":  {recipient, identity},
		"ssh": {strings.TrimSpace(harness.Read(t, ssh+".pub")), ssh},
	} {
		file := dir + "/" + name + ".backup"
		harness.Output(t, harness.Command(t, "copilot", "backup", "--dir", dir+"/store", "--recipient", test.recipient, "--out", file))
		lines := strings.Split(strings.TrimSpace(harness.Output(t, harness.Command(t, ageProgram(t), "--decrypt", "--identity", test.identity, file))), "\n")
		var first struct {
			CopilotBackup int
			AuditKey      []byte
		}
		if err := json.Unmarshal([]byte(lines[0]), &first); err != nil || first.CopilotBackup != 1 || len(first.AuditKey) != 32 {
			t.Errorf("%s begins with %s", name, lines[0])
		}
		if last := lines[len(lines)-1]; last != `{"end":{"keks":1,"versions":1,"keys":1}}` {
			t.Errorf("%s ends with %s", name, last)
		}
		harness.Output(t, harness.Command(t, "copilot", "backup", "verify", "--identity", test.identity, file))
	}
	harness.ExpectFailure(t, harness.Command(t, "copilot", "backup", "verify", "--identity", ssh, dir+"/pq.backup"), "sealed to other recipients")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "backup", "--dir", dir+"/store", "--recipient", recipient, "--recipient", strings.TrimSpace(harness.Read(t, ssh+".pub")), "--out", dir+"/both"), "use one kind")
}

// ageProgram builds the age program of the module that copilot uses.
func ageProgram(t *testing.T) string {
	t.Helper()
	out := harness.TempDir(t) + "/age"
	harness.GoBuild(t, "", out, "filippo.io/age/cmd/age")
	return out
}

// TestBackupIsOfOneMoment backs up again and again while KEKs are rotated in pairs, in a
// file and in PostgreSQL: the second of a pair is never ahead of the first.
func TestBackupIsOfOneMoment(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	for name, args := range map[string][]string{"file": nil, "postgres": {"--database", harness.StartPostgres(t).URL()}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := harness.TempDir(t)
			identity, recipient := backupKey(t, dir)
			args := append([]string{"--dir", dir}, args...)
			for _, kek := range []string{"a", "z"} {
				harness.Output(t, harness.Command(t, "copilot", append(append([]string{"keys", "create"}, args...), kek)...))
			}
			socket := dir + "/copilot.sock"
			harness.Start(t, dir, "copilot", exec.Command("copilot", append([]string{"serve", "--listen", "unix://" + socket}, args...)...))
			harness.Await(t, "copilot", harness.Reachable(socket))
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				for {
					for _, kek := range []string{"a", "z"} {
						select {
						case <-stop:
							return
						case <-time.After(2 * time.Millisecond): // or there are thousands of versions
						}
						// The admin socket has no limit.
						if status, body := harness.RequestOverSocket(t, dir+"/admin.sock", "POST", "/api/v2/keks/"+kek+"/rotate", ""); status != http.StatusOK {
							t.Errorf("rotate %s: %d %s", kek, status, body)
							return
						}
					}
				}
			}()
			versions := make(map[string]int)
			for i := range 20 {
				file := fmt.Sprintf("%s/%d.backup", dir, i)
				harness.Output(t, harness.Command(t, "copilot", append(append([]string{"backup"}, args...), "--recipient", recipient, "--out", file)...))
				for _, k := range keksOf(t, file, identity) {
					versions[k.ID] = len(k.Keys)
				}
				if ahead := versions["a"] - versions["z"]; ahead != 0 && ahead != 1 {
					t.Errorf("backup %d has %v", i, versions)
				}
			}
			close(stop)
			<-stopped
			if versions["z"] < 2 {
				t.Errorf("nothing was rotated: %v", versions)
			}
		})
	}
}

// keksOf returns the KEKs in a backup.
func keksOf(t *testing.T, file, identity string) (list []*keystore.HeldKEK) {
	t.Helper()
	ids, err := backup.ReadIdentities(identity)
	if err != nil {
		t.Fatal(err)
	}
	r, err := backup.Open(bytes.NewReader([]byte(harness.Read(t, file))), ids...)
	for err == nil {
		var h keystore.Held
		if h, err = r.Next(); h.KEK != nil {
			list = append(list, h.KEK)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return list
}

// TestBackupThatCanNotBeRestored shows each reason, and that the store stays empty.
func TestBackupThatCanNotBeRestored(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	identity, recipient := backupKey(t, dir)
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", args...) }
	for i := range 3 {
		harness.Output(t, copilot("keys", "create", "--dir", dir+"/store", fmt.Sprintf("team-%d", i)))
	}
	harness.Output(t, copilot("backup", "--dir", dir+"/store", "--recipient", recipient, "--out", dir+"/good"))
	good := harness.Read(t, dir+"/good")
	file := func(name, text string) string { return harness.Write(t, dir+"/"+name, text) }
	changed := []byte(good)
	changed[len(changed)-40] ^= 1
	to, err := age.ParseHybridRecipient(recipient)
	if err != nil {
		t.Fatal(err)
	}
	sealed := func(lines ...string) string {
		var b bytes.Buffer
		w, err := age.Encrypt(&b, to)
		if err == nil {
			_, err = io.WriteString(w, strings.Join(lines, "\n")+"\n")
		}
		if err = errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	const header, end = `{"copilotBackup":1,"created":"2026-01-02T03:04:05Z","copilot":"1","generation":0,"auditKey":"AAAA"}`, `{"end":{"keks":1,"versions":1,"keys":1}}`
	for name, test := range map[string]struct{ file, want string }{
		"no backup":              {file("text", "hello"), "it is no backup of copilot"},
		"empty":                  {file("empty", ""), "it is no backup of copilot"},
		"another age file":       {file("other", sealed("hello")), "it is no backup of copilot"},
		"cut in its header":      {file("cut-1", good[:200]), "the backup was cut short: use another copy"},
		"cut in the middle":      {file("cut-2", good[:len(good)-200]), "use another copy"},
		"cut at a line":          {file("cut-3", sealed(header)), "the backup was cut short: use another copy"},
		"changed":                {file("changed", string(changed)), "the backup is damaged: use another copy"},
		"longer":                 {file("longer", good+"x"), "use another copy"},
		"from the future":        {file("future", sealed(`{"copilotBackup":2,"x":1}`)), "a newer copilot made the backup"},
		"a KEK from the future":  {file("kek", sealed(header, `{"kek":"a","record":{"versions":[{"version":1,"colour":"red"}]},"keys":{"1":"AAAA"}}`, end)), "does not know"},
		"a key too short":        {file("key", sealed(header, `{"kek":"a","record":{"versions":[{"version":1}]},"keys":{"1":"AAAA"}}`, end)), "a key of 3 bytes"},
		"a name that can't be":   {file("name", sealed(header, `{"kek":"../a","record":{},"keys":{}}`, end)), "can't be a KEK's name"},
		"less than it says":      {file("less", sealed(header, end)), "it has 0 KEKs"},
		"more after its end":     {file("more", sealed(header, `{"end":{"keks":0,"versions":0,"keys":0}}`, "x")), "goes on after its end"},
		"another kind of line":   {file("kind", sealed(header, `{"policy":1}`, end)), "the backup is damaged"},
		"a KEK twice":            {file("twice", sealed(header, `{"kek":"a","record":{},"keys":{}}`, `{"kek":"a","record":{},"keys":{}}`, `{"end":{"keks":2,"versions":0,"keys":0}}`)), `KEK "a" comes after "a"`},
		"wraps below nothing":    {file("wraps", sealed(header, `{"wraps":{"id":"a","version":1,"wraps":-1}}`, `{"end":{"keks":0,"versions":0,"keys":0}}`)), "can't have wrapped -1 keys"},
		"a KEK's line cut short": {file("half", sealed(header, `{"kek":"a","rec`)), "the backup is damaged"},
	} {
		store := dir + "/new"
		out := harness.ExpectFailure(t, copilot("restore", "--dir", store, "--identity", identity, test.file), test.want)
		if _, err := os.Stat(store); err == nil || strings.Contains(out, "the broker failed") {
			t.Errorf("%s: a store was made, or the reason is missing: %s", name, out)
		}
		harness.ExpectFailure(t, copilot("backup", "verify", "--identity", identity, test.file), test.want)
		harness.ExpectFailure(t, copilot("audit", "verify", "--dir", dir+"/store", "--identity", identity, "--backup", test.file, dir+"/store/audit.log"), test.want)
	}
	harness.ExpectFailure(t, copilot("restore", "--dir", dir+"/new", "--identity", identity, dir+"/nowhere"), "no such file")
	harness.ExpectFailure(t, copilot("restore", "--dir", dir+"/new", dir+"/good"), "--identity FILE, or --share FILE")
	harness.ExpectFailure(t, copilot("backup", "--dir", dir+"/store", "--recipient", recipient, "--out", dir+"/good"), "exists already")
	harness.ExpectFailure(t, copilot("backup", "--dir", dir+"/store", "--recipient", "age1nonsense", "--out", dir+"/2"), `recipient "age1nonsense" is neither`)
	harness.ExpectFailure(t, copilot("backup", "--dir", dir+"/store", "--out", dir+"/2"), "name who can open it")
	harness.ExpectFailure(t, copilot("backup", "--dir", dir+"/none", "--recipient", recipient, "--out", dir+"/2"), "there is no store", "nothing was written")
	if left, err := filepath.Glob(dir + "/*part*"); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	if _, err := os.Stat(dir + "/2"); err == nil {
		t.Error("a backup that failed is there")
	}
	if harness.Read(t, dir+"/good") != good {
		t.Error("the backup was overwritten")
	}
}

// TestSharesThatDoNotOpen shows what is wrong with shares, each by its own error.
func TestSharesThatDoNotOpen(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", args...) }
	for _, set := range []string{"a", "b"} {
		harness.Output(t, copilot("backup", "shares", "--out", dir+"/"+set))
	}
	harness.Output(t, copilot("keys", "create", "--dir", dir+"/store", "team-a"))
	harness.Output(t, copilot("backup", "--dir", dir+"/store", "--recipients-file", dir+"/a/recipient.txt", "--out", dir+"/a.backup"))
	share := func(set string, n int) string { return fmt.Sprintf("%s/%s/share-%d.txt", dir, set, n) }
	text := harness.Read(t, share("a", 1))
	_, line, _ := strings.Cut(text, "\n")
	typo := harness.Write(t, dir+"/typo", strings.Replace(line, line[30:31], map[bool]string{true: "7", false: "8"}[line[30] == '8'], 1))
	// As a person writes it down, and types it in.
	copied := harness.Write(t, dir+"/copied", strings.ToLower(strings.NewReplacer("-", " ", "0", "O", "1", "l").Replace(line)))
	broken := harness.Write(t, dir+"/broken", strings.ReplaceAll(line, "-", "\n"))
	verify := func(files ...string) *exec.Cmd {
		args := []string{"backup", "verify"}
		for _, f := range files {
			args = append(args, "--share", f)
		}
		return copilot(append(args, dir+"/a.backup")...)
	}
	for name, test := range map[string]struct {
		cmd  *exec.Cmd
		want string
	}{
		"one too few":      {verify(share("a", 1), share("a", 2)), "there are too few shares: 2 of set"},
		"one given twice":  {verify(share("a", 1), share("a", 2), copied), "there are too few shares: 2 of set"},
		"of another set":   {verify(share("a", 1), share("a", 2), share("b", 3)), "the shares are of different sets"},
		"a typing error":   {verify(typo, share("a", 2), share("a", 3)), dir + "/typo: the share has a typing error"},
		"cut short":        {verify(harness.Write(t, dir+"/cut", line[:100]), share("a", 2), share("a", 3)), "the share has a typing error"},
		"no share":         {verify(dir+"/a/recipient.txt", share("a", 2), share("a", 3)), "it is no share"},
		"all of other set": {verify(share("b", 1), share("b", 2), share("b", 3)), "sealed to other recipients"},
	} {
		out := harness.CombinedOutput(t, test.cmd)
		if test.cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out, test.want) {
			t.Errorf("%s: %s", name, out)
		}
	}
	for _, first := range []string{copied, broken, share("a", 1)} {
		harness.Output(t, verify(first, share("a", 2), share("a", 3)))
	}
	harness.Output(t, verify(share("a", 5), share("a", 4), share("a", 3), share("a", 2)))
	harness.ExpectFailure(t, copilot("backup", "shares", "--out", dir+"/a"), "exists")
	harness.ExpectFailure(t, copilot("backup", "shares", "--threshold", "6", "--out", dir+"/c"), "--threshold 6 of --shares 5")
	harness.ExpectFailure(t, copilot("backup", "shares"), "this is no terminal")
	if harness.Read(t, share("a", 1)) != text {
		t.Error("the shares were overwritten")
	}
}

// TestBackupVerifyComparesWithTheStore finds what a backup lacks, what it has older, and
// what somebody else made with the same names, in a store that a copilot has open.
func TestBackupVerifyComparesWithTheStore(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	identity, recipient := backupKey(t, dir)
	copilot := func(args ...string) *exec.Cmd { return harness.Command(t, "copilot", args...) }
	for _, kek := range []string{"a", "b", "c"} {
		for _, store := range []string{"/store", "/other"} {
			harness.Output(t, copilot("keys", "create", "--dir", dir+store, kek))
		}
	}
	for _, store := range []string{"/store", "/other"} {
		harness.Output(t, copilot("backup", "--dir", dir+store, "--recipient", recipient, "--out", dir+store+".backup"))
	}
	harness.StartBroker(t, dir+"/store")
	verify := func(name string) (differences []backup.Difference, status int) {
		cmd := copilot("backup", "verify", "--json", "--compare", "--dir", dir+"/store", "--identity", identity, dir+name)
		out, _ := cmd.Output()
		var report struct{ Differences []backup.Difference }
		if err := json.Unmarshal(out, &report); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return report.Differences, cmd.ProcessState.ExitCode()
	}
	if d, status := verify("/store.backup"); len(d) > 0 || status != 0 {
		t.Errorf("%v, exit status %d", d, status)
	}
	for _, args := range [][]string{{"rotate", "a"}, {"revoke", "--identity", "uid:7", "b"}, {"create", "aa"}, {"create", "z"}} {
		harness.Output(t, copilot(append([]string{"keys", args[0], "--dir", dir + "/store"}, args[1:]...)...))
	}
	kinds := func(list []backup.Difference) (text string) {
		for _, d := range list {
			text += d.KEK + " " + d.Kind + ", "
		}
		return text
	}
	if d, status := verify("/store.backup"); kinds(d) != "a older, aa missing, b older, z missing, " || status != 3 {
		t.Errorf("%v, exit status %d", d, status)
	}
	if d, status := verify("/other.backup"); kinds(d) != "a other-key, aa missing, b other-key, c other-key, z missing, " || status != 3 {
		t.Errorf("%v, exit status %d", d, status)
	}
	if log := harness.Read(t, dir+"/store/audit.log"); !strings.Contains(log, `"action":"describe"`) {
		t.Error("the comparison is not in the audit log")
	}
}

// TestRestoreOfManyKEKsIsKilled kills restores of many KEKs: the store has all of them then,
// or none. They are backed up again while copilot runs.
func TestRestoreOfManyKEKsIsKilled(t *testing.T) {
	fipstest.Refused(t, fipstest.Backup)
	harness.Long(t)
	t.Parallel()
	const n = 10_000
	dir := harness.TempDir(t)
	identity, recipient := backupKey(t, dir)
	to, err := backup.ParseRecipient(recipient)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(dir + "/many.backup")
	if err != nil {
		t.Fatal(err)
	}
	_, err = backup.Write(f, []age.Recipient{to}, backup.Header{Created: time.Now(), AuditKey: make([]byte, 32)}, func(put func(keystore.Held) error) error {
		for i := range n {
			key := make([]byte, 32)
			rand.Read(key)
			record := fmt.Sprintf(`{"revoked":["spiffe://example.com/node/worker-%d"],"versions":[{"version":1,"created":"2026-01-02T03:04:05Z","bits":256}]}`, i)
			k := &keystore.HeldKEK{ID: fmt.Sprintf("team-%06d", i), Record: []byte(record), Keys: map[int][]byte{1: key}}
			if err := put(keystore.Held{KEK: k}); err != nil {
				return err
			}
		}
		return nil
	})
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{"file": nil, "postgres": {"--database", harness.StartPostgres(t).URL()}} {
		store := append([]string{"--dir", dir + "/" + name}, args...)
		restore := append(append([]string{"restore", "--identity", identity}, store...), dir+"/many.backup")
		keks := func() int {
			return strings.Count(harness.CombinedOutput(t, harness.Command(t, "copilot", append([]string{"keys", "list"}, store...)...)), "team-")
		}
		for _, wait := range []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second} {
			cmd := harness.Command(t, "copilot", restore...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(wait)
			cmd.Process.Kill()
			cmd.Wait()
			if got := keks(); got != 0 && got != n {
				t.Fatalf("%s: killed after %s, %d KEKs are in the store", name, wait, got)
			}
		}
		if out, err := harness.Command(t, "copilot", restore...).CombinedOutput(); err != nil && !strings.Contains(string(out), "has KEKs already") {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		if got := keks(); got != n {
			t.Errorf("%s: %d KEKs", name, got)
		}
		socket := dir + "/" + name + ".sock"
		p := harness.Start(t, dir+"/"+name, "copilot", exec.Command("copilot", append([]string{"serve", "--listen", "unix://" + socket}, store...)...))
		harness.Await(t, "copilot", harness.Reachable(socket))
		file := dir + "/" + name + ".backup"
		harness.Output(t, harness.Command(t, "copilot", append(append([]string{"backup"}, store...), "--recipient", recipient, "--out", file)...))
		if got := keksOf(t, file, identity); len(got) != n {
			t.Errorf("%s: %d KEKs in the backup", name, len(got))
		}
		p.Stop(t)
	}
}
