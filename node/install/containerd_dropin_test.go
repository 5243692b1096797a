package install

import (
	"errors"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestTemplateOfItsOwnerIsNotReplaced has k3s with a template, by who wrote it.
func TestTemplateOfItsOwnerIsNotReplaced(t *testing.T) {
	const path = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.tmpl"
	const pilots, owners = "# pilot's\n", "# theirs\n"
	ours := record{Files: []installed{{Path: path, SHA256: hash([]byte(pilots))}}}
	for _, test := range []struct {
		before  record
		text    string
		refuses bool
	}{
		{text: ""},
		{text: owners, refuses: true},
		{before: ours, text: pilots},
		{before: ours, text: pilots + owners, refuses: true},
	} {
		o := Options{Host: host.Host{Root: t.TempDir()}}
		if test.text != "" {
			write(t, o, path, test.text, 0o644)
		}
		p := &Plan{options: o, containerd: &containerd.Instance{
			Target: containerd.Target{Config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", Distribution: containerd.Distribution{Name: "k3s", Rewritten: true, Template: true}},
		}}
		if err := p.checkTemplate(test.before); errors.As(err, new(*host.Conflict)) != test.refuses {
			t.Errorf("%q: %v", test.text, err)
		}
	}
}
