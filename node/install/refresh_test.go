package install

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestRefreshOutOfTimeKeepsTheDropIn checks that the drop-in stays if containerd's program takes too
// long.
func TestRefreshOutOfTimeKeepsTheDropIn(t *testing.T) {
	const path, text = "/etc/containerd/conf.d/pilot.toml", "[proxy_plugins.pilot]\n"
	o := Options{Host: host.Host{Root: t.TempDir()}}
	if err := os.MkdirAll(filepath.Dir(o.Path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.Path(path), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	before := record{Files: []installed{{Path: path, SHA256: hash([]byte(text))}}}
	c := &containerd.Instance{Target: containerd.Target{Program: "/usr/bin/containerd", Config: containerd.DefaultConfig}, Ours: []string{path}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := leaveOut(ctx, c, o, before, ctx.Err()); err == nil || !strings.Contains(err.Error(), "stays as it was") {
		t.Errorf("refresh: %v", err)
	}
	if b, err := os.ReadFile(o.Path(path)); err != nil || string(b) != text {
		t.Errorf("the drop-in: %q, %v", b, err)
	}
}

// TestRefreshLeavesOutADifferThatPilotDoesNotServe has a node that was set up for containerd
// 1.6, and has a newer one now.
func TestRefreshLeavesOutADifferThatPilotDoesNotServe(t *testing.T) {
	for _, test := range []struct {
		conf         string
		major, minor int
		ok           bool
	}{
		{string(newPilotConfig(nil, false)), 1, 6, true},
		{string(newPilotConfig(nil, false)), 1, 7, false},
		{string(newPilotConfig(nil, false)), 2, 4, false},
		{string(newPilotConfig(nil, true)), 2, 4, true},
		{"", 2, 4, true},
	} {
		o := Options{Host: host.Host{Root: t.TempDir()}}
		write(t, o, pilotConfig, test.conf, 0o644)
		p := &Plan{options: o, containerd: &containerd.Instance{Target: containerd.Target{Program: "/usr/bin/containerd", Config: containerd.DefaultConfig}, Major: test.major, Minor: test.minor}}
		err := p.forRefresh(t.Context(), record{})
		if refused := err != nil && strings.Contains(err.Error(), "serves no differ"); refused == test.ok {
			t.Errorf("containerd %d.%d with %q: %v", test.major, test.minor, test.conf, err)
		}
	}
}

// TestRefreshMovesThePluginWithPluginPath has containerd start its NRI plugins from another
// directory than before.
func TestRefreshMovesThePluginWithPluginPath(t *testing.T) {
	const dir = "/etc/nri/plugins"
	o := Options{Host: host.Host{Root: t.TempDir()}, PilotBinary: "/usr/bin/pilot"}
	text := nriPluginText(o.PilotBinary)
	write(t, o, containerd.DefaultPlugin, string(text), 0o755)
	before := record{Workloads: true, Files: []installed{{Path: containerd.DefaultPlugin, SHA256: hash(text)}}}
	for _, onlyNRI := range []bool{false, true} {
		p := &Plan{options: o, onlyNRI: onlyNRI, containerd: &containerd.Instance{
			Target: containerd.Target{Program: "/usr/bin/containerd", Config: containerd.DefaultConfig},
			Major:  2, Minor: 2, Workloads: true,
			Plain: map[string]any{"plugins": map[string]any{containerd.NRI: map[string]any{"plugin_path": dir}}},
		}}
		_ = p.forRefresh(t.Context(), before) // there is no containerd
		var removed, written bool
		for _, c := range p.Changes {
			removed = removed || c.Remove && c.Path == containerd.DefaultPlugin
			written = written || c.Path == dir+"/"+containerd.PluginFile && string(c.New) == string(text) && c.Mode == 0o755
		}
		if !removed || !written {
			t.Errorf("refresh, only for NRI %t: %+v", onlyNRI, p.Changes)
		}
	}
}

// write writes a file of the machine.
func write(t *testing.T, o Options, path, text string, mode os.FileMode) {
	t.Helper()
	if err := o.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := o.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
