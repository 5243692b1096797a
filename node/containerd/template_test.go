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

func TestVersionsWithoutBaseTemplateAreRecognized(t *testing.T) {
	for text, want := range map[string]string{
		"k3s version v1.27.4+k3s1 (36645e73)\ngo version go1.20.6\n": "v1.27.4",
		"k3s version v1.27.5+k3s1 (8d074ecb)\ngo version go1.20.7\n": "",
		"k3s version v1.28.0-rc1+k3s1 (x)\n":                         "v1.28.0",
		"rke2 version v1.23.17+rke2r1 (x)\ngo version go1.19\n":      "v1.23.17",
		"rke2 version v1.24.17+rke2r1 (x)\n":                         "",
		"k3s version v1.36.1+k3s1 (x)\n":                             "",
		"k3s version dev (HEAD)\n":                                   "",
	} {
		if got := withoutBase(text); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}
