package encrypt

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLocalCommands pushes, tags and exports images of containerds whose transfer
// service is missing (1.6), ignores flags (1.7), or can't push one platform (2.x).
func TestLocalCommands(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	address, storage := harness.StartRegistry(t, dir)
	// pushed returns the digest that the registry has for NAME:TAG, or "".
	pushed := func(ref string) string {
		repository, tag, _ := strings.Cut(strings.TrimPrefix(ref, address+"/"), ":")
		link, err := os.ReadFile(filepath.Join(storage, "docker/registry/v2/repositories", repository, "_manifests/tags", tag, "current/link"))
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		return string(link)
	}
	hosts := filepath.Join(dir, "hosts")
	harness.Write(t, filepath.Join(hosts, address, "hosts.toml"), "server = 'http://"+address+"'\n")
	for _, v := range []harness.ContainerdVersion{harness.Containerd16(), harness.Containerd17(), harness.Containerd2()} {
		t.Run(v.Name, func(t *testing.T) {
			n := harness.NewNode(t, filepath.Join(dir, v.Name), v, "", "")
			l := harness.NewLayout(t)
			index := l.Index(harness.LayerKinds[1], harness.NewSecret())
			name := address + "/v" + v.Name + ":"
			harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(n.Dir+"/image.tar", name+"index", index)))
			single := l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret())
			harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", l.Tar(n.Dir+"/single.tar", name+"single", single)))

			for tag, flags := range map[string][]string{
				"plain-http": {"--plain-http"},
				"hosts-dir":  {"--hosts-dir", hosts},
				"local":      {"--local", "--plain-http"},
			} {
				harness.Output(t, n.CtrPilot(slices.Concat([]string{"images", "push"}, flags, []string{name + tag, name + "index"})...))
				if got := pushed(name + tag); got != index["digest"] {
					t.Errorf("%s: the registry has %q, not the index %s", tag, got, index["digest"])
				}
			}

			// One platform of an index, and the only one of a manifest.
			harness.Output(t, n.CtrPilot("images", "push", "--plain-http", "--platform", "linux/"+harness.Arch, name+"platform", name+"index"))
			harness.Output(t, n.CtrPilot("images", "pull", "--plain-http", name+"platform"))
			if got := pushed(name + "platform"); got == "" || got == index["digest"] || got != n.Target(name+"platform") {
				t.Errorf("with --platform the registry has %q, and the index is %s", got, index["digest"])
			}
			harness.Output(t, n.CtrPilot("images", "push", "--plain-http", "--platform", "linux/"+harness.Arch, name+"single"))
			if got := pushed(name + "single"); got != single["digest"] {
				t.Errorf("the registry has %q, not the manifest %s", got, single["digest"])
			}
			harness.ExpectFailure(t, n.CtrPilot("images", "push", "--plain-http", "--platform", "linux/riscv64", name+"refused", name+"index"),
				"has no platform linux/riscv64: it has linux/"+harness.Arch+", linux/s390x")
			harness.ExpectFailure(t, n.CtrPilot("images", "push", "--plain-http", "--platform", "linux/s390x", name+"refused", name+"single"), "has no platform linux/s390x")
			harness.ExpectFailure(t, n.CtrPilot("images", "push", "--plain-http", "--platform", "linux/s390x", name+"refused"), "not found")
			if got := pushed(name + "refused"); got != "" {
				t.Errorf("what was refused is in the registry: %s", got)
			}

			harness.Output(t, n.CtrPilot("images", "tag", name+"index", name+"tagged"))
			harness.ExpectFailure(t, n.CtrPilot("images", "tag", name+"single", name+"tagged"), "already exists")
			if got := n.Target(name + "tagged"); got != index["digest"] {
				t.Errorf("tag without --force: %s, not %s", got, index["digest"])
			}
			harness.Output(t, n.CtrPilot("images", "tag", "--force", name+"single", name+"tagged"))
			if got := n.Target(name + "tagged"); got != single["digest"] {
				t.Errorf("tag --force: %s, not %s", got, single["digest"])
			}

			archive := n.Dir + "/export.tar"
			harness.Output(t, n.CtrPilot("images", "export", "--all-platforms", archive, name+"index"))
			harness.Output(t, n.CtrPilot("images", "remove", "--sync", name+"index", name+"platform"))
			harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", "--all-platforms", archive))
			if got := n.Target(name + "index"); got != index["digest"] {
				t.Errorf("export: %s came back as %s", index["digest"], got)
			}
			n.ExpectNothingPending()
		})
	}
}

// TestEncryptingPageCommandsRun runs the commands of docs/encrypting.md's section on ctr-pilot
// as they are, with a registry of our own.
func TestEncryptingPageCommandsRun(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, ociConf := harness.StartPilot(t, dir+"/node", brokerURL)
	n := harness.NewNode(t, dir+"/node", harness.Containerd2(), ociConf, "")
	address, _ := harness.StartRegistry(t, dir)
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", "app:1", l.Image(harness.LayerKinds[1], false, harness.Arch, secret))))

	_, section, _ := strings.Cut(harness.Read(t, filepath.Join(harness.Repo, "docs/encrypting.md")), "\n## ctr-pilot\n")
	_, section, _ = strings.Cut(section, "```\n")
	block, _, ok := strings.Cut(section, "```")
	ran := false
	for line := range strings.Lines(block) {
		words := strings.Fields(strings.ReplaceAll(line, "registry.example.com", address))
		if words[1] != "run" {
			harness.Output(t, n.CtrPilot(words[1:]...))
		} else if out := harness.ContainerOutput(t, n.CtrPilot(words[1:]...)); !strings.Contains(out, "hello, "+secret) {
			t.Errorf("%s: %s", line, out)
		} else {
			ran = true
		}
	}
	if !ok || !ran {
		t.Fatalf("the section has no block that runs an image:\n%s", block)
	}
	if got, want := n.Target("app:plain"), n.Target("app:1"); got != want {
		t.Errorf("decrypted: %s, was %s", got, want)
	}
}
