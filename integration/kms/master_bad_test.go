package kms

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestMasterKeyThatDoesNotUnwrap has a database whose master key an OpenBao has wrapped:
// for two copilots, with a key of another name, with a key that is disabled and then
// destroyed, and with what is not what was wrapped.
func TestMasterKeyThatDoesNotUnwrap(t *testing.T) {
	t.Parallel()
	v, d := harness.NewOpenBao(t), harness.StartPostgres(t)
	for _, key := range []string{"copilot", "other"} {
		v.Write("transit/keys/"+key, "{}")
	}
	kms := func(path string) string {
		return fmt.Sprintf("[backends.bao]\ntype = 'vault-transit'\naddress = %q\ntoken-file = %q\n\n[master-key]\nbackend = 'bao'\npath = %q\n", v.URL, v.Dir+"/root-token", path)
	}
	broker := func(database, text string) *sealedBroker {
		dir := harness.TempDir(t)
		b := &sealedBroker{dir: dir, socket: dir + "/copilot.sock"}
		b.config = harness.Write(t, dir+"/copilot.toml", fmt.Sprintf("dir = %q\ndatabase = %q\nlisten = [%q]\n%s", dir, database, "unix://"+b.socket, text))
		return b
	}
	first, second := broker(d.URL(), kms("copilot")), broker(d.URL(), kms("copilot"))
	first.run(t, "keys", "create", "team-a")
	d.Sql(t, "CREATE DATABASE another")
	another := broker(strings.Replace(d.URL(), "/postgres?", "/another?", 1), kms("copilot"))
	another.run(t, "keys", "create", "team-a")
	stranger := harness.Output(t, d.Command(t, "psql", "-h", d.Dir, "-U", "copilot", "-At", "-c", `SELECT convert_from(value, 'UTF8')::json->'keys'->0->'holders'->0->>'wrapped' FROM copilot_once WHERE name = 'master keys'`, "another"))
	first.start(t)
	second.start(t)
	key := first.key(t)
	if second.key(t) != key {
		t.Error("the other copilot has another key")
	}
	if out := second.run(t, "master", "rotate"); !strings.Contains(out, "master key 2 seals everything") {
		t.Error(out)
	}
	if first.key(t) != key {
		t.Error("another key after a rotation")
	}
	first.run(t, "keys", "rotate", "team-a")
	if rotated := second.key(t); rotated == key || rotated != first.key(t) {
		t.Error("the copilots have different keys")
	}
	key = first.key(t)
	first.process.Stop(t)
	second.process.Stop(t)

	// A key of another name, and none.
	other := broker(d.URL(), kms("other"))
	harness.ExpectFailure(t, other.command(t, "keys", "list"), "the store has none that bao/other has wrapped", `"bao/copilot"`, "copilot master move")
	harness.ExpectFailure(t, broker(d.URL(), "").command(t, "keys", "list"), "the master key is missing", `it is held by ["bao/copilot"]`)
	harness.ExpectFailure(t, broker(d.URL(), "[master-key]\nbackend = 'bao'\npath = 'x'\n").command(t, "keys", "list"), `no such backend: "bao"`)
	harness.ExpectFailure(t, broker(d.URL(), strings.Replace(kms("copilot"), "path = \"copilot\"", "", 1)).command(t, "keys", "list"), "master-key: path is not set")
	harness.ExpectFailure(t, broker(d.URL(), strings.Replace(kms("copilot"), "vault-transit", "vault-kv", 1)).command(t, "keys", "list"), "gives out keys, and does not wrap")

	// From one key to another, and back.
	if out := other.run(t, "master", "move"); !strings.Contains(out, "the master key is in bao/other, and was read back") || !strings.Contains(out, "copilot master forget bao/copilot") {
		t.Error(out)
	}
	other.run(t, "keys", "list")
	harness.ExpectFailure(t, other.command(t, "master", "forget", "bao/other"), "move it elsewhere first")
	first.run(t, "master", "forget", "bao/other")
	harness.ExpectFailure(t, other.command(t, "keys", "list"), "the store has none that bao/other has wrapped")

	// A file beside it.
	file := harness.Write(t, first.dir+"/master.key", strings.Repeat("x", 32))
	harness.ExpectFailure(t, first.command(t, "keys", "list"), "copilot.toml has [master-key], and "+file+" exists")
	harness.Output(t, exec.Command("rm", file))

	// A version that may not decrypt any more, then one that may.
	v.Write("transit/keys/copilot/rotate", "{}")
	v.Write("transit/keys/copilot/config", `{"min_decryption_version": 2}`)
	first.waits(t, "see min_decryption_version", func() { v.Write("transit/keys/copilot/config", `{"min_decryption_version": 1}`) })
	if first.key(t) != key {
		t.Error("another key")
	}
	first.process.Stop(t)

	// What was wrapped, changed, cut off, and of another store.
	kept := strings.TrimSpace(d.Sql(t, `SELECT encode(value, 'hex') FROM copilot_once WHERE name = 'master keys'`))
	replace := func(change string) {
		t.Helper()
		d.Sql(t, `UPDATE copilot_once SET value = convert_to(regexp_replace(convert_from(decode('`+kept+`', 'hex'), 'UTF8'), '"wrapped":"([^"]*)"', `+change+`), 'UTF8') WHERE name = 'master keys'`)
	}
	refuses := func(want ...string) {
		t.Helper()
		harness.ExpectFailure(t, exec.Command("copilot", "serve", "--config", first.config), append(want, "the master key can't be unwrapped with bao/copilot")...)
	}
	replace(`'"wrapped":"dmF1bHQ6djE6QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFB"'`)
	refuses("this KEK did not wrap that key, or it was changed", "restore the store from a backup")
	replace(`'"wrapped":"dmF1bHQ6djE6"'`)
	refuses("this KEK did not wrap that key, or it was changed")
	replace(`'"wrapped":"` + strings.TrimSpace(stranger) + `"'`)
	refuses("it is the master key of another store")
	d.Sql(t, `UPDATE copilot_once SET value = '{' WHERE name = 'master keys'`)
	harness.ExpectFailure(t, exec.Command("copilot", "serve", "--config", first.config), "what the store has of its master keys is damaged")
	d.Sql(t, `UPDATE copilot_once SET value = decode('`+kept+`', 'hex') WHERE name = 'master keys'`)
	first.run(t, "keys", "list")

	// The store goes to a file with what is wrapped, and the log with it.
	copied := harness.TempDir(t) + "/store"
	harness.Output(t, harness.Command(t, "copilot", "store", "copy", "--config", first.config, d.URL(), copied))
	harness.Write(t, first.config, fmt.Sprintf("dir = %q\nlisten = [%q]\n%s", copied, "unix://"+first.socket, kms("copilot")))
	first.run(t, "keys", "list")
	if out := first.run(t, "audit", "verify"); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}

	// Destroyed.
	v.Write("transit/keys/copilot/config", `{"deletion_allowed": true}`)
	deletePath(v, "transit/keys/copilot")
	first.start(t)
	harness.Await(t, "the log says why", func() error {
		if first.process.Logged(t, "not in the KMS") == 0 {
			return fmt.Errorf("%s", harness.Read(t, first.process.Log))
		}
		return nil
	})
}
