package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestLocalCommands pushes, tags and exports images of containerds whose transfer
// service is missing (1.6), ignores flags (1.7), or can't push one platform (2.x).
func TestLocalCommands(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	address, storage := registry(t, dir)
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
	write(t, filepath.Join(hosts, address, "hosts.toml"), "server = 'http://"+address+"'\n")
	for _, v := range []version{containerd16(), containerd17(), containerd2()} {
		t.Run(v.name, func(t *testing.T) {
			n := newNode(t, filepath.Join(dir, v.name), v, "", "")
			l := newLayout(t)
			index := l.index(kinds[1], newSecret())
			name := address + "/v" + v.name + ":"
			output(t, n.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(n.dir+"/image.tar", name+"index", index)))
			single := l.image(kinds[1], false, goarch, newSecret())
			output(t, n.ctrPilot("images", "import", "--no-unpack", l.tar(n.dir+"/single.tar", name+"single", single)))

			for tag, flags := range map[string][]string{
				"plain-http": {"--plain-http"},
				"hosts-dir":  {"--hosts-dir", hosts},
				"local":      {"--local", "--plain-http"},
			} {
				output(t, n.ctrPilot(slices.Concat([]string{"images", "push"}, flags, []string{name + tag, name + "index"})...))
				if got := pushed(name + tag); got != index["digest"] {
					t.Errorf("%s: the registry has %q, not the index %s", tag, got, index["digest"])
				}
			}

			// One platform of an index, and the only one of a manifest.
			output(t, n.ctrPilot("images", "push", "--plain-http", "--platform", "linux/"+goarch, name+"platform", name+"index"))
			output(t, n.ctrPilot("images", "pull", "--plain-http", name+"platform"))
			if got := pushed(name + "platform"); got == "" || got == index["digest"] || got != n.target(name+"platform") {
				t.Errorf("with --platform the registry has %q, and the index is %s", got, index["digest"])
			}
			output(t, n.ctrPilot("images", "push", "--plain-http", "--platform", "linux/"+goarch, name+"single"))
			if got := pushed(name + "single"); got != single["digest"] {
				t.Errorf("the registry has %q, not the manifest %s", got, single["digest"])
			}
			fails(t, n.ctrPilot("images", "push", "--plain-http", "--platform", "linux/riscv64", name+"refused", name+"index"),
				"has no platform linux/riscv64: it has linux/"+goarch+", linux/s390x")
			fails(t, n.ctrPilot("images", "push", "--plain-http", "--platform", "linux/s390x", name+"refused", name+"single"), "has no platform linux/s390x")
			fails(t, n.ctrPilot("images", "push", "--plain-http", "--platform", "linux/s390x", name+"refused"), "not found")
			if got := pushed(name + "refused"); got != "" {
				t.Errorf("what was refused is in the registry: %s", got)
			}

			output(t, n.ctrPilot("images", "tag", name+"index", name+"tagged"))
			fails(t, n.ctrPilot("images", "tag", name+"single", name+"tagged"), "already exists")
			if got := n.target(name + "tagged"); got != index["digest"] {
				t.Errorf("tag without --force: %s, not %s", got, index["digest"])
			}
			output(t, n.ctrPilot("images", "tag", "--force", name+"single", name+"tagged"))
			if got := n.target(name + "tagged"); got != single["digest"] {
				t.Errorf("tag --force: %s, not %s", got, single["digest"])
			}

			archive := n.dir + "/export.tar"
			output(t, n.ctrPilot("images", "export", "--all-platforms", archive, name+"index"))
			output(t, n.ctrPilot("images", "remove", "--sync", name+"index", name+"platform"))
			output(t, n.ctrPilot("images", "import", "--no-unpack", "--all-platforms", archive))
			if got := n.target(name + "index"); got != index["digest"] {
				t.Errorf("export: %s came back as %s", index["digest"], got)
			}
			n.nothingPending()
		})
	}
}

// TestReadmeCtrPilot runs the commands of README's section on ctr-pilot as they
// are, with a registry of our own.
func TestReadmeCtrPilot(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/node", brokerURL)
	n := newNode(t, dir+"/node", containerd2(), ociConf, "")
	address, _ := registry(t, dir)
	secret := newSecret()
	l := newLayout(t)
	output(t, n.ctrPilot("images", "import", "--no-unpack", l.tar(dir+"/image.tar", "app:1", l.image(kinds[1], false, goarch, secret))))

	_, section, _ := strings.Cut(read(t, filepath.Join(repo, "README.md")), "\n### ctr-pilot\n")
	_, section, _ = strings.Cut(section, "```\n")
	block, _, ok := strings.Cut(section, "```")
	ran := false
	for line := range strings.Lines(block) {
		words := strings.Fields(strings.ReplaceAll(line, "registry.example.com", address))
		out := output(t, n.ctrPilot(words[1:]...))
		if words[1] == "run" {
			if ran = true; !strings.Contains(out, "hello, "+secret) {
				t.Errorf("%s: %s", line, out)
			}
		}
	}
	if !ok || !ran {
		t.Fatalf("README's section has no block that runs an image:\n%s", block)
	}
	if got, want := n.target("app:plain"), n.target("app:1"); got != want {
		t.Errorf("decrypted: %s, was %s", got, want)
	}
}
