package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

// TestPluginReadsTheRecordOfItsPilot checks that containerd's NRI plugin finds the record of
// layers where "pilot serve" writes it, also where pilot.toml does not say it.
func TestPluginReadsTheRecordOfItsPilot(t *testing.T) {
	defer func(file string) { brokerconfig.DefaultFile = file }(brokerconfig.DefaultFile)
	brokerconfig.DefaultFile = filepath.Join(t.TempDir(), "pilot.toml")
	for text, want := range map[string]string{
		``: "/var/lib/pilot/layers",
		`diff-listen = "unix:///run/second/diff.sock"`: "/var/lib/pilot/layers-run-second-diff.sock",
		`layer-record = "/srv/layers"`:                 "/srv/layers",
	} {
		if err := os.WriteFile(brokerconfig.DefaultFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if conf, err := pluginSettings(""); err != nil || conf.LayerRecord != want {
			t.Errorf("%s: %s, %v", text, conf.LayerRecord, err)
		}
	}
	// What can't be read has to be an error: the rules of must-be-encrypted would be missing.
	for text, want := range map[string]string{"\nnonsense = 1": "pilot.toml:2: nonsense", "[[must-be-encrypted": "pilot.toml:1:"} {
		if err := os.WriteFile(brokerconfig.DefaultFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := pluginSettings(""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
