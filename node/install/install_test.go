package install

import (
	"slices"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestWhatStartsPilotComesFirst checks the order of changes, after any of which an installation
// may be killed.
func TestWhatStartsPilotComesFirst(t *testing.T) {
	old := []byte("x")
	p := &Plan{Changes: []Change{
		{Path: "drop-in"}, {Path: "config.toml", Old: old},
		{Path: "pilot.toml", Old: old}, {Path: "unit"}, {Path: "link", Link: "unit"}, {Path: "old link", Link: "old unit", Remove: true}, {Path: "old unit", Old: old, Remove: true},
	}}
	p.startFirst(2)
	var order []string
	for _, c := range p.Changes {
		order = append(order, c.Path)
	}
	if want := []string{"unit", "link", "drop-in", "config.toml", "pilot.toml", "old link", "old unit"}; !slices.Equal(order, want) {
		t.Errorf("%q", order)
	}
}

// TestMovedContainerdIsRecorded installs where nothing but the path of containerd's program has
// changed.
func TestMovedContainerdIsRecorded(t *testing.T) {
	const dir = "/var/lib/rancher/rke2"
	o := Options{Host: host.Host{Root: t.TempDir()}}
	before := record{Containerd: &installedTarget{Program: dir + "/data/v1/bin/containerd"}, Files: []installed{{Path: keyProviders}}}
	p := &Plan{options: o, before: &before, deferred: true, containerd: &containerd.Instance{Target: containerd.Target{Program: dir + "/bin/containerd"}}}
	if err := p.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := o.readRecord()
	if err != nil || s.Containerd == nil || s.Containerd.Program != dir+"/bin/containerd" || len(s.Files) != 1 {
		t.Errorf("%+v, %v", s.Containerd, err)
	}
}
