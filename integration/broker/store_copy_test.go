package broker

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestStoreCopy moves a store from a file to PostgreSQL and back to another file: an
// image's key is unwrapped after each, and nothing of a KEK's life is lost.
func TestStoreCopy(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	store, back := dir+"/store", dir+"/back"
	keys := func(store string, args ...string) string {
		t.Helper()
		verb, rest := args[0], args[1:]
		return harness.Output(t, harness.Command(t, "copilot", append([]string{"keys", verb, "--dir", store}, rest...)...))
	}
	for _, kek := range []string{"team-a", "team-b", "other/c"} {
		keys(store, "create", kek)
	}
	first, url := harness.StartBroker(t, store)
	_, conf := harness.StartPilot(t, dir+"/ci", url)
	c := harness.NewCI(t, dir+"/ci", conf)
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	keys(store, "rotate", "team-a")
	keys(store, "revoke", "--identity", "uid:4242", "team-b")
	keys(store, "disable", "--key-version", "1", "other/c")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "store", "copy", store, back), "a running copilot uses "+store, "stop it first")
	described := func(store string, more ...string) string {
		t.Helper()
		var all strings.Builder
		for _, kek := range []string{"team-a", "team-b", "other/c"} {
			all.WriteString(keys(store, append(append([]string{"show"}, more...), "--json", kek)...))
		}
		return all.String()
	}
	want := described(store)
	if !strings.Contains(want, "uid:4242") || !strings.Contains(want, "disabled") {
		t.Fatal(want)
	}
	first.Stop(t)

	d := harness.StartPostgres(t)
	lines := func(out string) string {
		t.Helper()
		n := regexp.MustCompile(`copied 3 KEKs\ncopied (\d+) lines of the audit log\n`).FindStringSubmatch(out)
		if n == nil || n[1] == "0" {
			t.Fatal(out)
		}
		return n[1]
	}
	n := lines(harness.Output(t, harness.Command(t, "copilot", "store", "copy", store, d.URL())))
	harness.ExpectFailure(t, harness.Command(t, "copilot", "store", "copy", store, d.URL()), "has KEKs already", "copy to an empty store")
	if out := harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", store, "--database", d.URL())); !strings.HasPrefix(out, n+" lines, none changed or missing") {
		t.Errorf("the copy in the database: %s", out)
	}
	if got := described(store, "--database", d.URL()); got != want {
		t.Errorf("in the database: %s, want %s", got, want)
	}
	works := func(name string, args ...string) {
		t.Helper()
		decryptsWith(t, c, dir, image, name, args...)
	}
	works("database", "--dir", store, "--database", d.URL())

	// As the documentation says.
	harness.Output(t, d.Command(t, "pg_dump", "-h", d.Dir, "-U", "copilot", "--format=custom", "--table=copilot_*", "--file="+d.Dir+"/dump", "postgres"))
	harness.Output(t, d.Command(t, "createdb", "-h", d.Dir, "-U", "copilot", "restored"))
	harness.Output(t, d.Command(t, "pg_restore", "-h", d.Dir, "-U", "copilot", "--dbname=restored", d.Dir+"/dump"))
	restored := strings.Replace(d.URL(), "/postgres?", "/restored?", 1)
	if got := described(store, "--database", restored); got != want {
		t.Errorf("restored: %s, want %s", got, want)
	}
	works("restored", "--dir", store, "--database", restored)

	n = lines(harness.Output(t, harness.Command(t, "copilot", "store", "copy", "--dir", store, d.URL(), back)))
	if out := harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", back)); !strings.HasPrefix(out, n+" lines, none changed or missing") {
		t.Errorf("the copy in a file: %s", out)
	}
	if harness.Read(t, back+"/master.key") != harness.Read(t, store+"/master.key") {
		t.Error("the copy has another master key")
	}
	if got := described(back); got != want {
		t.Errorf("back in a file: %s, want %s", got, want)
	}
	works("back", "--dir", back)

	// What can't be copied.
	harness.ExpectFailure(t, harness.Command(t, "copilot", "store", "copy", dir+"/nowhere", dir+"/new"), "there is no store in "+dir+"/nowhere")
	other := dir + "/other"
	keys(other, "create", "x")
	harness.ExpectFailure(t, harness.Command(t, "copilot", "store", "copy", "--dir", other, back, dir+"/new"), "is not the one that the KEKs in "+back+" are sealed with")
	if _, err := os.Stat(dir + "/new"); err == nil {
		t.Error("a store was made")
	}
}

// decryptsWith has a copilot of that name serve a store, by these arguments, and an image
// decrypted with it.
func decryptsWith(t *testing.T, c *harness.CI, dir, image, name string, args ...string) {
	t.Helper()
	socket := dir + "/" + name + ".sock"
	p := harness.Start(t, dir+"/"+name, "copilot", exec.Command("copilot", append([]string{"serve", "--listen", "unix://" + socket}, args...)...))
	harness.Await(t, "copilot", harness.Reachable(socket))
	_, conf := harness.StartPilot(t, dir+"/"+name+"-ci", "unix://"+socket)
	other := *c.Node
	other.Ocicrypt = conf
	harness.Output(t, other.CtrPilot("images", "decrypt", image, image+"-"+name))
	p.Stop(t)
}
