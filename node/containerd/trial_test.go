package containerd

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

// TestWhatATemplateHasAddedIsTakenOut has configurations that k3s has written by pilot's
// template.
func TestWhatATemplateHasAddedIsTakenOut(t *testing.T) {
	const (
		header = "# Written by \"pilot node install\"\n"
		base   = "version = 3\n\n[grpc]\naddress = '/run/k3s/containerd/containerd.sock'\n"
		was    = "[proxy_plugins.pilot]\ntype = 'diff'\n"
		is     = "[proxy_plugins.pilot]\ntype = 'diff'\naddress = '/run/pilot/diff.sock'\n"
	)
	for name, test := range map[string]struct{ template, config, want string }{
		"none":                {"", base, base},
		"marked":              {header + TemplateBase + TemplateMark + is, header + base + "\n\n" + TemplateMark + is, header + base + "\n"},
		"not yet written":     {header + TemplateBase + TemplateMark + is, base, base},
		"changed since":       {header + TemplateBase + TemplateMark + is, header + base + "\n\n" + TemplateMark + was, header + base + "\n"},
		"gone since":          {"", header + base + "\n\n" + TemplateMark + is, header + base + "\n"},
		"of earlier versions": {header + TemplateBase + is, header + base + "\n\n" + is, header + base + "\n\n"},
	} {
		h := host.Host{Root: t.TempDir()}
		c := &Instance{Files: ConfigFiles{Text: []byte(test.config)}, Ours: []string{"/config.toml.tmpl"}}
		if test.template != "" {
			if err := os.WriteFile(filepath.Join(h.Root, "config.toml.tmpl"), []byte(test.template), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if c.takeOutTemplate(h); string(c.Files.Text) != test.want {
			t.Errorf("%s: %q", name, c.Files.Text)
		}
	}
}
