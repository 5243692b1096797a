//go:build linux

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestPurgeRemovesWhatInitWrites compares what "copilot init" writes with what the Debian
// package removes when it is purged: all but the CAs and their keys.
func TestPurgeRemovesWhatInitWrites(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "copilot")
	if err := newApp().Run(t.Context(), []string{"copilot", "init", "--config-dir", dir, "--dir", t.TempDir(), "--host", "copilot.example.com", "--node-ca"}); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("../../packaging/deb/copilot.postrm")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.FieldsFunc(string(script), func(r rune) bool { return strings.ContainsRune(" \t\n;\\\"", r) })
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		ofCA := slices.Contains([]string{"ca.pem", "ca-key.pem", "node-ca.pem", "node-ca-key.pem"}, file.Name())
		if removed := slices.Contains(words, file.Name()); removed == ofCA {
			t.Errorf("%s: removed %t, of a CA %t", file.Name(), removed, ofCA)
		}
	}
}
