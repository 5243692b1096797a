//go:build linux

package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCleanMounts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mounts")
	for range 2 {
		if err := cleanMounts(dir); err != nil {
			t.Fatal(err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
		if err := os.Mkdir(filepath.Join(dir, "containerd-mount123"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}
