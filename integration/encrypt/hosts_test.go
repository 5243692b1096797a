package encrypt

import (
	"fmt"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestWhatIsThereIsAskedOfTheHostThatTakesPushes pulls from one host of a registry, such as a
// mirror, and pushes to another.
func TestWhatIsThereIsAskedOfTheHostThatTakesPushes(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a", "team-b")
	mirror, _ := harness.StartRegistry(t, dir)
	origin, _ := harness.StartDistribution(t, dir)
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Index(harness.LayerKinds[1], harness.NewSecret()))
	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+mirror+"/app:1")
	hosts := dir + "/hosts"
	harness.Write(t, hosts+"/registry.example.com/hosts.toml", fmt.Sprintf(
		"server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"push\"]\n", mirror, origin))
	const app = "docker://registry.example.com/app:"

	// Under its own name, and under another.
	for _, to := range []string{app + "1", app + "2"} {
		if r := a.rewrap("--hosts-dir", hosts, "--from", "team-a", "--to", "team-b", app+"1", to)[0]; r.Result != "changed" {
			t.Errorf("%s: %+v", to, r)
		}
	}
	if r := a.rewrap("--hosts-dir", hosts, app+"1", app+"3")[0]; r.Result != "upToDate" {
		t.Errorf("%+v", r)
	}
	for tag, want := range map[string]string{"1": "team-b@1", "2": "team-b@1", "3": "team-a@1"} {
		name := "docker://" + origin + "/app:" + tag
		if _, keks := a.layers(name); keks != want {
			t.Errorf("%s: %s, want %s", name, keks, want)
		}
		a.crypt("decrypt", "--json", name, "oci:"+dir+"/back:"+tag)
	}
	// What the mirror does not have is there all the same.
	harness.ExpectFailure(t, a.images("rewrap", "--hosts-dir", hosts, app+"1", app+"2"), "already exists")

	// Tags are listed by the next host if one does not answer.
	harness.Write(t, hosts+"/registry.example.com/hosts.toml", fmt.Sprintf(
		"server = \"http://%s\"\n[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"pull\", \"resolve\"]\n", origin))
	if r := a.rewrap("--hosts-dir", hosts, "--dry-run", app+"*"); len(r) != 3 || r[0].Error+r[1].Error+r[2].Error != "" {
		t.Errorf("%+v", r)
	}
}
