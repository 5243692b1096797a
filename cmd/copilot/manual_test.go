//go:build linux

package main

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/server"
)

// TestManualHasAllSettings looks for the settings of copilot.toml in copilot.toml(5).
func TestManualHasAllSettings(t *testing.T) {
	page, err := os.ReadFile("../../packaging/man/copilot.toml.5")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(page), `\-`, "-")
	for _, field := range reflect.VisibleFields(reflect.TypeFor[server.Config]()) {
		name := field.Tag.Get("toml")
		if name != "-" && !regexp.MustCompile(`(?m)^\.(B|BR|SS) (.*[" [])?`+regexp.QuoteMeta(name)+`([\]." ]|$)`).MatchString(text) {
			t.Errorf("it lacks %s", name)
		}
	}
}
