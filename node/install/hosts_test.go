package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestLazyPullingReadsWhereContainerdDoes installs, again and again, with each pilot.toml that
// a machine may have.
func TestLazyPullingReadsWhereContainerdDoes(t *testing.T) {
	const certs, setting = "/etc/containerd/certs.d", `mirror-hosts-dir = "/etc/containerd/certs.d"` + "\n"
	lazy := "lazy-listen = \"unix://" + LazySocket + "\"\n"
	for name, test := range map[string]struct {
		had    string // the owner's pilot.toml
		before string // the one of an earlier installation
		mode   containerd.LazyMode
		want   bool // the setting is added, or stays
	}{
		"first":                  {"", "", containerd.LazyOn, true},
		"before it was there":    {"", string(newPilotConfig(map[string]string{"lazy-listen": "unix://" + LazySocket}, true)), containerd.LazyOn, true},
		"not lazy":               {"", "", containerd.LazyOff, false},
		"the owner's":            {lazy, "", containerd.LazyOn, false},
		"the owner's other":      {lazy + "mirror-hosts-dir = \"/srv/hosts\"\n", "", containerd.LazyOn, false},
		"with a mirror":          {"", string(newPilotConfig(map[string]string{"mirror-listen": "127.0.0.1:5443"}, true)), containerd.LazyOn, false},
		"another directory":      {"", string(newPilotConfig(map[string]string{"mirror-hosts-dir": "/srv/hosts"}, true)), containerd.LazyOn, false},
		"lazy pulling ends":      {"", string(newPilotConfig(map[string]string{"mirror-hosts-dir": certs}, true)), containerd.LazyEnding, true},
		"lazy pulling has ended": {"", string(newPilotConfig(map[string]string{"mirror-hosts-dir": certs}, true)), containerd.LazyOff, false},
	} {
		o := Options{Host: host.Host{Root: t.TempDir()}}
		write := func(path, text string) {
			t.Helper()
			if err := os.MkdirAll(filepath.Join(o.Root, filepath.Dir(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(o.Root, path), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		write(certs+"/registry.example.com/hosts.toml", "[host.'https://mirror.example.com']\n")
		c := &containerd.Instance{Major: 2, Minor: 4, Lazy: test.mode, Plain: map[string]any{"plugins": map[string]any{
			containerd.CRIImages: map[string]any{"registry": map[string]any{"config_path": certs}}}}}
		text, before := test.had, record{LazyEnding: test.before != ""}
		if test.before != "" {
			text = test.before
			before.Files = []installed{{Path: pilotConfig, SHA256: hash([]byte(text))}}
		}
		if text != "" {
			write(pilotConfig, text)
		}
		for range 2 {
			p := &Plan{options: o, containerd: c}
			if err := p.pilotConfig(c, before, ""); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if len(p.Changes) == 0 {
				break
			}
			text = string(p.Changes[0].New)
			write(pilotConfig, text)
			before.Files = []installed{{Path: pilotConfig, SHA256: hash([]byte(text))}}
		}
		if strings.Contains(text, setting) != test.want {
			t.Errorf("%s: pilot.toml is\n%s", name, text)
		}
		if p := (&Plan{options: o, containerd: c}); p.pilotConfig(c, before, "") != nil || len(p.Changes) > 0 {
			t.Errorf("%s: run again, it changes %v", name, p.Changes)
		}
	}
}
