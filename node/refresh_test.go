package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRefreshOutOfTime has containerd's program take too long: that says nothing
// about pilot's drop-in, which must stay.
func TestRefreshOutOfTime(t *testing.T) {
	const path, text = "/etc/containerd/conf.d/pilot.toml", "[proxy_plugins.pilot]\n"
	o := Options{Root: t.TempDir()}
	if err := os.MkdirAll(filepath.Dir(o.path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.path(path), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	before := state{Files: []installed{{Path: path, SHA256: hash([]byte(text))}}}
	c := &containerd{target: target{program: "/usr/bin/containerd", config: defaultConfig}, ours: []string{path}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.leaveOut(ctx, o, before, ctx.Err()); err == nil || !strings.Contains(err.Error(), "stays as it was") {
		t.Errorf("refresh: %v", err)
	}
	if b, err := os.ReadFile(o.path(path)); err != nil || string(b) != text {
		t.Errorf("the drop-in: %q, %v", b, err)
	}
}
