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
