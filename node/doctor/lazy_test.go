package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
)

// TestDoctorWarnsOfRegistriesThatPilotReachesOtherwise has a containerd with a directory of
// hosts.toml, and settings of pilot.
func TestDoctorWarnsOfRegistriesThatPilotReachesOtherwise(t *testing.T) {
	const mirror = "127.0.0.1:5443"
	dir := t.TempDir()
	e := examination{
		Doctor:  &Doctor{Configuration: "/etc/pilot/pilot.toml"},
		running: &containerd.Instance{Major: 2, Minor: 4},
		dump:    map[string]any{"plugins": map[string]any{containerd.CRIImages: map[string]any{"registry": map[string]any{"config_path": dir}}}},
	}
	expect := func(what string, warns bool, m Mirror) {
		t.Helper()
		e.Mirror = m
		step := e.reachesRegistries(passed("it works"))
		if !strings.HasPrefix(step.Detail, "it works") || (step.Result == Warning) != warns || warns != strings.Contains(step.Detail, dir+"/registry.test") {
			t.Errorf("%s: %+v", what, step)
		}
	}
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	expect("no files", false, Mirror{})
	write("registry.test/hosts.toml", "server = 'https://"+mirror+"'\n[host.'https://"+mirror+"']\n")
	expect("pilot's mirror", false, Mirror{Listen: mirror})
	expect("a mirror of others", true, Mirror{})
	write("registry.test/hosts.toml", "[host.'https://mirror.test']\n")
	expect("a mirror", true, Mirror{})
	expect("a mirror, and pilot's of other registries", true, Mirror{Listen: mirror})
	expect("pilot reads it", false, Mirror{HostsDir: dir})
	expect("pilot reads files of its own", false, Mirror{Listen: mirror, HostsDir: "/etc/pilot/hosts"})
	if err := os.Remove(filepath.Join(dir, "registry.test/hosts.toml")); err != nil {
		t.Fatal(err)
	}
	write("registry.test/ca.crt", "")
	expect("a CA", true, Mirror{})
}
