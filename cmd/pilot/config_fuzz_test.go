package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzReadConfigFile reads any text as pilot.toml.
func FuzzReadConfigFile(f *testing.F) {
	f.Add("broker = \"https://a:1\"\nbroker-ca = \"/a\"\nkek-cache-ttl = \"5m\"\n")
	f.Add("broker = [\"https://a:1\", # first\n\"unix:///b\"]\n")
	f.Add("insecure-loopback = true\nlayers-at-once = 3\n[table]\na.b = 1\n")
	f.Add("broker-timeout = -1s\n")
	name := filepath.Join(f.TempDir(), "pilot.toml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		conf := defaults()
		if err := readConfigFile(&conf, name); err != nil {
			if !strings.HasPrefix(err.Error(), name) || strings.Contains(err.Error(), "\n") {
				t.Errorf("the error does not name the file in one line: %q", err)
			}
			return
		}
		if err := conf.check(); err == nil && len(conf.Broker) == 0 {
			t.Error("a configuration without a broker is accepted")
		}
	})
}
